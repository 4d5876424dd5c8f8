"""Measure quantized bundles beside the bundle they were made from; writes docs/results/quant.md and quant.json.

    python -m benchmarks.quant BUNDLE FOLDER --calib FILE [--recipes int8,w8,int4] [--steps 12] [--rounds 4]
    python -m benchmarks.quant --page

FOLDER takes the quantized bundles; those that are there are used. ``RECIPE-alone`` is a recipe without the
calibration. One process measures everything, and speed in turns, one bundle after the other, so that whatever else the
machine does falls on all of them. Loss is the SQNR of logits against BUNDLE over the same tokens, drawn from the
vocabulary with a fixed seed and fed one by one after a prefill; decode is the time of one such step, the best of all
rounds. Of the DiT it is the SQNR of the mel for random codes, of the vocoder that of its samples for BUNDLE's mel.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omniport.calib.calibration_file import Calibration
from omniport.calib.quantize import quantize_bundle
from omniport.runtime.backends.onnxruntime.backend import OrtBackend
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.generation.decoder import Decoder
from omniport.runtime.system.host import physical_cores

from benchmarks.harness import RESULTS
from benchmarks.speech_loss import measure_speech, sqnr

LM_PARTS = ("thinker", "talker")
PREFILL = 256
#: codec tokens that are spoken: 0.7 seconds
CODES = 36
#: what issue and design ask for: size of thinker and talker, decode and prefill speed, thinker logits' SQNR in dB
ASKED = {"w8": (None, 2.5, None, 35.0), "int8": (None, 2.8, 1.5, 22.0), "int4": (0.20, 3.5, None, None)}


class Part:
    """One decoder of one bundle, fed with embeddings of fixed tokens."""

    def __init__(self, root: Path, name: str, threads: int, count: int) -> None:
        self.bundle = Bundle.open(root)
        self._graph = OrtBackend(self.bundle, threads=threads).graph(name)
        # the talker reads rows of the thinker's width; its own table has them
        table = self.bundle.embedding("thinker" if name == "thinker" else "talker")
        ids = np.random.default_rng(0).integers(0, table.vocab_size, count)
        self._rows = table.rows(ids)
        self._decoder = Decoder(self._graph, self._graph.new_cache(count))

    def prefill(self) -> float:
        """Feed the prompt; seconds."""
        self._decoder.truncate(0)
        return self._feed(0, PREFILL)[0]

    def step(self, index: int) -> tuple[float, NDArray[Any], NDArray[Any] | None]:
        """Feed one more token: seconds, logits, hidden."""
        return self._feed(PREFILL + index, PREFILL + index + 1)

    def _feed(self, start: int, stop: int) -> tuple[float, NDArray[Any], NDArray[Any] | None]:
        positions = np.repeat(np.arange(start, stop)[None], 3, axis=0)
        begun = time.perf_counter()
        logits, hidden = self._decoder.forward(self._rows[start:stop], positions)
        return time.perf_counter() - begun, logits, hidden


def measure_part(roots: dict[str, Path], name: str, threads: int, steps: int, rounds: int) -> dict[str, Any]:
    """Speed and loss of one decoder in every bundle, in turns."""
    parts = {key: Part(root, name, threads, PREFILL + steps) for key, root in roots.items()}
    result: dict[str, Any] = {key: {"prefill": [], "decode": []} for key in parts}
    logits: dict[str, list[NDArray[Any]]] = {}
    for _ in range(rounds):
        for key, part in parts.items():
            result[key]["prefill"].append(part.prefill())
            rows = [part.step(index) for index in range(steps)]
            result[key]["decode"] += [seconds for seconds, _, _ in rows]
            logits[key] = [row for _, row, _ in rows]
    for key in parts:
        found = result[key]
        found["prefill"], found["decode"] = min(found["prefill"]), min(found["decode"])
        if key != "base":
            found["sqnr"] = sqnr(np.asarray(logits[key]), np.asarray(logits["base"]))
            equal = np.asarray(logits[key]).argmax(-1) == np.asarray(logits["base"]).argmax(-1)
            found["same_choice"] = float(equal.mean())
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
    return round(quantize_bundle(base, out, name, calibration=used).seconds, 1)


def measure(
    base: Path, folder: Path, recipes: list[str], calibration: Calibration | None, steps: int, rounds: int
) -> dict[str, Any]:
    """Everything that the page shows."""
    import onnxruntime

    roots = {"base": base}
    seconds = {}
    for recipe in recipes:
        roots[recipe] = folder / f"{base.name}-{recipe}"
        seconds[recipe] = make(base, roots[recipe], recipe, calibration)
    threads = physical_cores()
    return {
        "bundle": Bundle.open(base).manifest.source.name,
        "precision": Bundle.open(base).manifest.precision,
        "onnxruntime": onnxruntime.__version__,
        "threads": threads,
        "processor": processor(),
        "steps": steps,
        "rounds": rounds,
        "quantize_seconds": seconds,
        "sizes": {key: sizes(root) for key, root in roots.items()},
        "parts": {name: measure_part(roots, name, threads, steps, rounds) for name in LM_PARTS},
        "speech": measure_speech(roots, threads, CODES),
    }


def processor() -> str:
    """The name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def page(found: dict[str, Any]) -> str:
    """docs/results/quant.md."""
    head = f"""# Quantized bundles: size, speed, loss

Made by `python -m benchmarks.quant` from quant.json: do not edit by hand.

Random-weight checkpoint `{found["bundle"]}`, bundle in {found["precision"]}, quantized with a calibration where a
recipe does not say *alone*. ONNX Runtime {found["onnxruntime"]} on {found["threads"]} threads of
{found["processor"]}. All bundles in one process, in turns; times are the best of {found["rounds"]} rounds.
Logits: {found["steps"]} steps after a prefill of {PREFILL} tokens, against the bundle that was quantized.

| part | recipe | size, ratio | prefill {PREFILL}, ms | step, ms | times as fast | logits SQNR, dB | same choice |
|---|---|---|---|---|---|---|---|
"""
    base_sizes = found["sizes"]["base"]
    rows = []
    for part, results in found["parts"].items():
        for key, row in results.items():
            ratio = found["sizes"][key][part] / base_sizes[part]
            loss = f"{row['sqnr']:.1f} | {row['same_choice']:.0%}" if key != "base" else "- | -"
            faster = results["base"]["decode"] / row["decode"]
            name = found["precision"] if key == "base" else key
            size = f"{found['sizes'][key][part] / 1e6:,.0f} MB, {ratio:.3f}"
            times = f"{row['prefill'] * 1e3:,.0f} | {row['decode'] * 1e3:.1f} | {faster:.2f}"
            rows.append(f"| {part} | {name} | {size} | {times} | {loss} |")
    return head + "\n".join(rows) + "\n\n" + _speech(found) + "\n" + _asked(found)


def _speech(found: dict[str, Any]) -> str:
    lines = [
        "Graphs outside the decoders, and the whole bundle, embeddings included. Mel and samples: each graph alone,",
        f"{CODES} random codec tokens, SQNR in dB; a dash where the recipe leaves the graph as it is.",
        "",
        "| recipe | audio encoder | vision encoder | DiT | vocoder | six graphs | bundle | mel | samples |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    base = found["sizes"]["base"]
    for key, row in found["speech"].items():
        sizes = found["sizes"][key]
        graphs = [name for name in base if name != "all"]
        ratios = [sizes[n] / base[n] for n in ("audio_encoder", "vision_encoder", "dit", "bigvgan")]
        ratios += [sum(sizes[n] for n in graphs) / sum(base[n] for n in graphs), sizes["all"] / base["all"]]
        losses = [f"{row[name]:.1f}" if name in row else "-" for name in ("mel", "wave")]
        lines.append(f"| {key} | " + " | ".join([*(f"{ratio:.3f}" for ratio in ratios), *losses]) + " |")
    return "\n".join(lines) + "\n"


def _asked(found: dict[str, Any]) -> str:
    lines = [
        "| recipe | thinker and talker, ratio | thinker decode | thinker prefill | thinker logits SQNR |",
        "|---|---|---|---|---|",
    ]
    thinker, sizes = found["parts"]["thinker"], found["sizes"]
    for key in sizes:
        if key == "base":
            continue
        size, decode, prefill, loss = ASKED.get(key, (None, None, None, None))
        both = [sum(sizes[k][part] for part in LM_PARTS) for k in (key, "base")]
        faster = [thinker["base"][what] / thinker[key][what] for what in ("decode", "prefill")]
        cells = (
            f"{both[0] / both[1]:.3f}" + (f" (asked: at most {size})" if size else ""),
            f"{faster[0]:.2f}x" + (f" (asked: {decode}x)" if decode else ""),
            f"{faster[1]:.2f}x" + (f" (asked: {prefill}x)" if prefill else ""),
            f"{thinker[key]['sqnr']:.1f} dB" + (f" (asked: {loss} dB)" if loss else ""),
        )
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure quantized bundles.")
    parser.add_argument("bundle", nargs="?", type=Path)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--recipes", default="int8,w8,int4,int8-plain,w8-alone,int4-alone")
    parser.add_argument("--calib", type=Path)
    parser.add_argument("--name", help="what the page calls the checkpoint; the bundle's name for it otherwise")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--page", action="store_true", help="only write the page from quant.json")
    options = parser.parse_args()
    place = RESULTS / "quant.json"
    if not options.page:
        if options.bundle is None or options.folder is None:
            parser.error("give BUNDLE and FOLDER, or --page")
        recipes = options.recipes.split(",")
        calibration = Calibration.load(options.calib) if options.calib else None
        found = measure(options.bundle, options.folder, recipes, calibration, options.steps, options.rounds)
        found["bundle"] = options.name or found["bundle"]
        place.write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "quant.md").write_text(page(json.loads(place.read_text())))


if __name__ == "__main__":
    main()
