"""Hold `omniport plan` against measurements on this machine's CPU and against published figures.

    python -m benchmarks.plan BUNDLE...          # measure, add to docs/results/plan.json, write plan.md

Each bundle is measured in a process of its own: resident memory after every graph is loaded, and at its highest while a
question of 30 s of speech and a picture of 1024x768 is answered in 6 s of speech; decode rates of thinker and talker at
two contexts. What the processor reads and multiplies in a second is measured in turns with the steps, so that whatever
else the machine does falls on both, and is what the plan is given. Everything is timed by the wall: leave the machine
alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from omniport.export.devices.catalog import TARGETS
from omniport.export.planning.machines import Rates, cpu_machine, machine_of, measure_rates
from omniport.export.planning.plan import TargetPlan, make_plan
from omniport.export.planning.shapes import DecoderShape, ModelShape, decoder_graph, find_model, shape_of_config
from omniport.export.synthetic.geometries import SIZES, geometry_config
from omniport.runtime.backends.onnxruntime.backend import OrtBackend
from omniport.runtime.backends.onnxruntime.packages import import_onnxruntime
from omniport.runtime.bundle.manifest import SamplingConfig
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.session import OmniSession
from omniport.runtime.system.host import cpu_name, resident_memory, usable_cpus

from benchmarks.fixed_tokens import FixedTokens
from benchmarks.harness import command_line, own_process, record, table

CONTEXT = 2048
DECODED_AT = (128, 1024)
STEPS, ROUNDS = 16, 6
#: limits that the issue sets
MEMORY_LIMIT, DECODE_LIMIT = 0.10, 0.25

#: text models that figures were published of: layers, heads, kv heads, head width, width, ffn, vocabulary
_MODELS = {
    "3B": (36, 16, 2, 128, 2048, 11008, 151936),
    "4B": (36, 32, 8, 128, 2560, 9728, 151936),
    "8B": (36, 32, 8, 128, 4096, 12288, 151936),
    "Llama 8B": (32, 32, 8, 128, 4096, 14336, 128256),
}
#: device, model, recipe, decode tokens/s, source
_DECODE = (
    ("jetson-agx-orin-64gb", "3B", "fp16", 27.0, "[published](published.md)"),
    ("jetson-agx-orin-64gb", "3B", "w8", 45.0, "[published](published.md)"),
    ("jetson-agx-orin-64gb", "3B", "int4", 72.0, "[published](published.md)"),
    ("jetson-agx-orin-64gb", "4B", "int4", 53.0, "[published](published.md) (Edge-LLM)"),
    ("jetson-agx-orin-64gb", "8B", "int4", 32.5, "[published](published.md) (Edge-LLM)"),
    ("jetson-orin-nx-16gb", "4B", "int4", 31.6, "[published](published.md) (Edge-LLM)"),
    ("jetson-orin-nx-16gb", "8B", "int4", 19.0, "[published](published.md) (Edge-LLM)"),
    ("jetson-agx-thor", "4B", "int4", 76.4, "TensorRT Edge-LLM 0.4.0, performance benchmarks"),
    ("jetson-agx-thor", "Llama 8B", "int4", 50.8, "TensorRT Edge-LLM 0.4.0, performance benchmarks"),
)
#: Snapdragon 8 Elite: LPDDR5X at 5300 MHz, 64 bits. MNN's thinker and talker of the 3B, tokens/s
_PHONE_BANDWIDTH, _PHONE_THINKER, _PHONE_TALKER = 84.8e9, 23.3, 62.3


def published() -> list[dict[str, Any]]:
    """Predictions beside published decode rates."""
    rows = []
    for device, model, recipe, measured, source in _DECODE:
        plan = make_plan(_text_model(model), machine_of(TARGETS[device]), 256)
        rows.append(_row(device, model, recipe, measured, source, _speed(plan, recipe).decode))
    phone = cpu_machine(Rates(_PHONE_BANDWIDTH, 1e15), memory=16 << 30)
    speed = _speed(make_plan(find_model("3b"), phone, 256), "int4")
    where = "[published](published.md) (MNN)"
    rows.append(_row("Snapdragon 8 Elite", "3B thinker", "int4", _PHONE_THINKER, where, speed.decode))
    rows.append(_row("Snapdragon 8 Elite", "3B talker", "int4", _PHONE_TALKER, where, speed.codes or 0.0))
    return rows


def _text_model(name: str) -> ModelShape:
    layers, heads, kv, head, width, ffn, vocabulary = _MODELS[name]
    shape = DecoderShape(layers, heads, kv, head, width, ffn, vocabulary, width)
    return ModelShape(name, {"thinker": decoder_graph("thinker", shape)}, {"thinker": shape}, {}, 32768)


def _speed(plan: TargetPlan, recipe: str) -> Any:
    return next(row.speed for row in plan.recipes if row.recipe.name == recipe)


def _row(device: str, model: str, recipe: str, measured: float, source: str, predicted: float) -> dict[str, Any]:
    return {
        "device": device,
        "model": model,
        "recipe": recipe,
        "measured": measured,
        "predicted": round(predicted, 1),
        "deviation": round(predicted / measured - 1, 3),
        "source": source,
    }


# --- this machine --------------------------------------------------------------------------------------------


def decoding(folder: str) -> dict[str, Any]:
    """Decode rates of thinker and talker beside this machine's rates."""
    root = Path(folder)
    decode = {name: _decode(root, name) for name in ("thinker", "talker")}
    return {"recipe": Bundle.open(root).manifest.precision, "decode": decode}


def _decode(root: Path, name: str) -> dict[str, Any]:
    """By context, of every round: bytes and operations a second of this machine, and the best step after them."""
    bundle = Bundle.open(root)
    tokens = FixedTokens(bundle, OrtBackend(bundle), name, max(DECODED_AT) + STEPS, capacity=CONTEXT)
    found: dict[str, Any] = {}
    for context in DECODED_AT:
        tokens.feed(0, context)
        rounds = []
        for _ in range(ROUNDS):
            rates = measure_rates(4)
            step = min(tokens.feed(index, index + 1)[0] for index in range(context, context + STEPS))
            rounds.append([rates.bandwidth, rates.products, step])
        found[str(context)] = rounds
    return found


def memory(root: str) -> dict[str, Any]:
    """Resident memory: when every graph is loaded, and at its highest while it hears, sees and speaks."""
    session = OmniSession.open(root, backend="ort-cpu", max_context=CONTEXT)
    session.load()
    loaded = {field: resident_memory(field) for field in ("VmRSS", "RssAnon", "RssFile")}
    Path("/proc/self/clear_refs").write_text("5")
    draw = np.random.default_rng(0)
    sound = (0.1 * draw.standard_normal(30 * 16000)).astype(np.float32)
    picture = draw.integers(0, 255, (768, 1024, 3), dtype=np.uint8)
    content = [{"type": "audio", "audio": (sound, 16000)}, {"type": "image", "image": picture}]
    limits = SamplingConfig(max_new_tokens=4), SamplingConfig(max_new_tokens=300)
    heard = 0
    messages = [{"role": "user", "content": content}]
    for event in session.reply(messages, thinker=limits[0], talker=limits[1]):
        heard += len(getattr(event, "samples", ()))
    return {"loaded": loaded, "peak": resident_memory("VmHWM"), "samples": heard}


def predicted(model: ModelShape, recipe: str, found: dict[str, Any]) -> dict[str, Any]:
    """What the plan says of a measured bundle.

    Returns:
        ``memory``, bytes; ``decode``: by decoder and context the median over all rounds of step, of read and product
        rates, and of the deviation of the predicted rate, each predicted from the rates of its own round.
    """
    memory = _plan_row(model, recipe, Rates(1e10, 1e11), CONTEXT).memory
    assert memory is not None
    decode = {}
    for part, contexts in found["decode"].items():
        for context, rounds in contexts.items():
            deviations = []
            for bandwidth, products, step in rounds:
                speed = _plan_row(model, recipe, Rates(bandwidth, products), int(context)).speed
                assert speed is not None
                deviations.append((speed.decode if part == "thinker" else speed.codes or 0.0) * step - 1)
            decode[part, context] = (*np.median(rounds, axis=0).tolist(), float(np.median(deviations)))
    return {"memory": memory.total, "decode": decode}


def _plan_row(model: ModelShape, recipe: str, rates: Rates, context: int) -> Any:
    plan = make_plan(model, cpu_machine(rates, memory=24 << 30), context)
    return next(row for row in plan.recipes if row.recipe.name == recipe)


# --- page ----------------------------------------------------------------------------------------------------


def page(results: dict[str, Any]) -> str:
    """docs/results/plan.md."""
    lines = [
        "# The plan beside measurements",
        "",
        "Made by `python -m benchmarks.plan` from plan.json: do not edit by hand. The model: [plan.md](../plan.md).",
        "",
        f"## On a CPU: {results['machine']}",
        "",
        f"`small`, ONNX Runtime {results['onnxruntime']}, all graphs, a KV cache for {CONTEXT} tokens. *Loaded*:",
        "resident memory when every graph is loaded. *Peak*: while 30 s of sound and a picture of 1024x768 are heard",
        "and seen, and the reply is spoken. Limits: memory within 10 %, decode within 25 %.",
        "",
        *_memory_table(results["bundles"]),
        "",
        f"Decode: {ROUNDS} rounds of measuring the machine, then {STEPS} steps, of which the best counts. Each round",
        "is predicted from its own rates, and figures are medians of the rounds.",
        "",
        *_decode_table(results["bundles"]),
        "",
        "## Published figures",
        "",
        "Decode, tokens/s, one sequence, short context. 4B and 8B are taken to be Qwen3's. The two factors of a GPU",
        "were fitted to the first three rows; the others are predictions. The last two rows are a CPU with other",
        "kernels than ONNX Runtime's, by the bandwidth alone.",
        "",
        *_published_table(),
    ]
    return "\n".join(lines) + "\n"


def _says(bundles: dict[str, Any]) -> dict[str, Any]:
    model = shape_of_config(geometry_config(SIZES["small"]), "small")
    return {name: predicted(model, name, found) for name, found in bundles.items()}


def _memory_table(bundles: dict[str, Any]) -> list[str]:
    rows = []
    for name, says in _says(bundles).items():
        loaded, peak = bundles[name]["loaded"], bundles[name]["peak"]
        off = says["memory"] / peak - 1
        cells = (loaded["VmRSS"], loaded["RssAnon"], peak, says["memory"])
        rows.append((name, *(f"{cell / 1e6:,.0f}" for cell in cells), f"{off:+.1%}", _held(off, MEMORY_LIMIT)))
    columns = ("loaded MB", "of it anonymous", "peak MB", "predicted peak", "deviation", "held")
    return table(("bundle", *columns), rows)


def _decode_table(bundles: dict[str, Any]) -> list[str]:
    rows = []
    for name, says in _says(bundles).items():
        for case, (bandwidth, products, step, off) in says["decode"].items():
            rates = (f"{bandwidth / 1e9:.1f}", f"{products / 1e9:.0f}", f"{1e3 * step:.1f}", f"{1 / step:.1f}")
            rows.append((name, *case, *rates, f"{off:+.1%}", _held(off, DECODE_LIMIT)))
    columns = ("context", "read GB/s", "GFLOPS", "step ms", "tokens/s", "deviation of the plan", "held")
    return table(("bundle", "decoder", *columns), rows)


def _published_table() -> list[str]:
    names = ("device", "model", "recipe", "measured", "predicted", "deviation", "source")
    rows = [row | {"deviation": f"{row['deviation']:+.1%}"} for row in published()]
    head = ("published" if name == "measured" else name for name in names)
    return table(tuple(head), ([row[name] for name in names] for row in rows))


def _held(deviation: float, limit: float) -> str:
    return "yes" if abs(deviation) <= limit else "**no**"


def measure(options: argparse.Namespace, found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Bundles, beside those that were measured before."""
    machine = {"machine": f"{cpu_name()}, {len(usable_cpus())} cores", "onnxruntime": import_onnxruntime().__version__}
    for root in options.bundles:
        one = own_process(memory, str(root)) | own_process(decoding, str(root))
        found = found | machine | {"bundles": found.get("bundles", {}) | {one["recipe"]: one}}
        yield found


def main() -> None:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("bundles", nargs="+", type=Path)
    record("plan", page, measure, parser)


if __name__ == "__main__":
    main()
