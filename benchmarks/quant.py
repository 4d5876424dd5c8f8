"""Measure quantized bundles beside the bundle they were made from; writes docs/results/quant.md and quant.json.

    python -m benchmarks.quant BUNDLE FOLDER --calib FILE [--recipes int8,w8,int4] [--steps 12] [--rounds 4]

FOLDER takes the quantized bundles; those that are there are used. ``RECIPE-alone`` is a recipe without the
calibration. One process measures everything, and speed in turns, one bundle after the other, so that whatever else the
machine does falls on all of them. Loss is the SQNR of logits against BUNDLE over the same tokens, drawn from the
vocabulary with a fixed seed and fed one by one after a prefill; decode is the time of one such step, the best of all
rounds. Of the DiT it is the SQNR of the mel for random codes, of the vocoder that of its samples for BUNDLE's mel.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omniport.calib.calibration_file import Calibration
from omniport.calib.quantizer import quantize
from omniport.export.evaluation.speech_metrics import snr_db
from omniport.runtime.backends.onnxruntime.backend import OrtBackend
from omniport.runtime.backends.onnxruntime.packages import import_onnxruntime
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.system.host import cpu_name, physical_cores

from benchmarks.fixed_tokens import FixedTokens
from benchmarks.harness import command_line, record, table
from benchmarks.speech_loss import measure_speech

LM_PARTS = ("thinker", "talker")
PREFILL = 256
#: codec tokens that are spoken: 0.7 seconds
CODES = 36
#: what issue and design ask for: size of thinker and talker, decode and prefill speed, thinker logits' SQNR in dB
ASKED = {"w8": (None, 2.5, None, 35.0), "int8": (None, 2.8, 1.5, 22.0), "int4": (0.20, 3.5, None, None)}


def measure_part(roots: dict[str, Path], name: str, threads: int, steps: int, rounds: int) -> dict[str, Any]:
    """Speed and loss of one decoder in every bundle, in turns."""
    bundles = {key: Bundle.open(root) for key, root in roots.items()}
    parts = {
        key: FixedTokens(bundle, OrtBackend(bundle, threads=threads), name, PREFILL + steps)
        for key, bundle in bundles.items()
    }
    times: dict[str, tuple[list[float], list[float]]] = {key: ([], []) for key in parts}
    logits: dict[str, NDArray[Any]] = {}
    for _ in range(rounds):
        for key, part in parts.items():
            times[key][0].append(part.feed(0, PREFILL)[0])
            fed = [part.feed(index, index + 1) for index in range(PREFILL, PREFILL + steps)]
            times[key][1].extend(seconds for seconds, _ in fed)
            logits[key] = np.asarray([row for _, row in fed])
    result: dict[str, Any] = {key: {"prefill": min(first), "decode": min(step)} for key, (first, step) in times.items()}
    for key in parts.keys() - {"base"}:
        result[key]["sqnr"] = snr_db(logits[key], logits["base"])
        result[key]["same_choice"] = float((logits[key].argmax(-1) == logits["base"].argmax(-1)).mean())
    return result


def sizes(root: Path) -> dict[str, int]:
    """Bytes of each graph, its weights included, and of the whole bundle as ``all``."""
    manifest = Bundle.open(root).manifest
    found = {
        name: sum(manifest.files[file].size for file in (spec.file, *spec.data))
        for name, spec in manifest.graphs.items()
    }
    return found | {"all": sum(record.size for record in manifest.files.values())}


def make(base: Path, out: Path, recipe: str, calibration: Calibration | None) -> float:
    """Quantize a bundle unless it is there; seconds."""
    if out.exists():
        return 0.0
    name = recipe.removesuffix("-alone")
    used = calibration if name == recipe else None
    return round(quantize(base, out, name, calibration=used).seconds, 1)


def measure(options: argparse.Namespace, _: object) -> Iterator[dict[str, Any]]:
    """Everything that the page shows."""
    base, steps, rounds = options.bundle, options.steps, options.rounds
    calibration = Calibration.load(options.calib) if options.calib else None
    roots = {"base": base}
    seconds = {}
    for recipe in options.recipes.split(","):
        roots[recipe] = options.folder / f"{base.name}-{recipe}"
        seconds[recipe] = make(base, roots[recipe], recipe, calibration)
    threads = physical_cores()
    yield {
        "bundle": options.name or Bundle.open(base).manifest.source.name,
        "precision": Bundle.open(base).manifest.precision,
        "onnxruntime": import_onnxruntime().__version__,
        "threads": threads,
        "processor": cpu_name(),
        "steps": steps,
        "rounds": rounds,
        "quantize_seconds": seconds,
        "sizes": {key: sizes(root) for key, root in roots.items()},
        "parts": {name: measure_part(roots, name, threads, steps, rounds) for name in LM_PARTS},
        "speech": measure_speech(roots, threads, CODES),
    }


def page(found: dict[str, Any]) -> str:
    """docs/results/quant.md."""
    head = f"""# Quantized bundles: size, speed, loss

Made by `python -m benchmarks.quant` from quant.json: do not edit by hand.

Random-weight checkpoint `{found["bundle"]}`, bundle in {found["precision"]}, quantized with a calibration where a
recipe does not say *alone*. ONNX Runtime {found["onnxruntime"]} on {found["threads"]} threads of
{found["processor"]}. All bundles in one process, in turns; times are the best of {found["rounds"]} rounds.
Logits: {found["steps"]} steps after a prefill of {PREFILL} tokens, against the bundle that was quantized.

"""
    base_sizes = found["sizes"]["base"]
    rows = []
    for part, results in found["parts"].items():
        for key, row in results.items():
            ratio = found["sizes"][key][part] / base_sizes[part]
            loss = (f"{row['sqnr']:.1f}", f"{row['same_choice']:.0%}") if key != "base" else ("-", "-")
            faster = results["base"]["decode"] / row["decode"]
            name = found["precision"] if key == "base" else key
            size = f"{found['sizes'][key][part] / 1e6:,.0f} MB, {ratio:.3f}"
            times = (f"{row['prefill'] * 1e3:,.0f}", f"{row['decode'] * 1e3:.1f}", f"{faster:.2f}")
            rows.append((part, name, size, *times, *loss))
    measured = ("size, ratio", f"prefill {PREFILL}, ms", "step, ms", "times as fast", "logits SQNR, dB", "same choice")
    lines = [*table(("part", "recipe", *measured), rows), "", *_speech(found), "", *_asked(found)]
    return head + "\n".join(lines) + "\n"


def _speech(found: dict[str, Any]) -> list[str]:
    base = found["sizes"]["base"]
    graphs = [name for name in base if name != "all"]
    rows = []
    for key, row in found["speech"].items():
        sizes = found["sizes"][key]
        ratios = [sizes[n] / base[n] for n in ("audio_encoder", "vision_encoder", "dit", "bigvgan")]
        ratios += [sum(sizes[n] for n in graphs) / sum(base[n] for n in graphs), sizes["all"] / base["all"]]
        losses = [f"{row[name]:.1f}" if name in row else "-" for name in ("mel", "wave")]
        rows.append((key, *(f"{ratio:.3f}" for ratio in ratios), *losses))
    names = ("audio encoder", "vision encoder", "DiT", "vocoder", "six graphs", "bundle", "mel", "samples")
    return [
        "Graphs outside the decoders, and the whole bundle, embeddings included. Mel and samples: each graph alone,",
        f"{CODES} random codec tokens, SQNR in dB; a dash where the recipe leaves the graph as it is.",
        "",
        *table(("recipe", *names), rows),
    ]


def _asked(found: dict[str, Any]) -> list[str]:
    thinker, sizes = found["parts"]["thinker"], found["sizes"]
    rows = []
    for key in (key for key in sizes if key != "base"):
        size, decode, prefill, loss = ASKED.get(key, (None, None, None, None))
        both = [sum(sizes[k][part] for part in LM_PARTS) for k in (key, "base")]
        faster = [thinker["base"][what] / thinker[key][what] for what in ("decode", "prefill")]
        rows.append(
            (
                key,
                f"{both[0] / both[1]:.3f}" + (f" (asked: at most {size})" if size else ""),
                f"{faster[0]:.2f}x" + (f" (asked: {decode}x)" if decode else ""),
                f"{faster[1]:.2f}x" + (f" (asked: {prefill}x)" if prefill else ""),
                f"{thinker[key]['sqnr']:.1f} dB" + (f" (asked: {loss} dB)" if loss else ""),
            )
        )
    figures = ("thinker and talker, ratio", "thinker decode", "thinker prefill", "thinker logits SQNR")
    return table(("recipe", *figures), rows)


def main() -> None:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipes", default="int8,w8,int4,int8-plain,w8-alone,int4-alone")
    parser.add_argument("--calib", type=Path)
    parser.add_argument("--name", help="what the page calls the checkpoint; the bundle's name for it otherwise")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=4)
    record("quant", page, measure, parser)


if __name__ == "__main__":
    main()
