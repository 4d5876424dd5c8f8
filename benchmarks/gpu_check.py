"""Check a machine's GPU with random weights, and write down what came of it: docs/results/gpu-<name>.json.

    python -m benchmarks.gpu_check [--sizes tiny,small] [--precision fp16] [--backends tensorrt,tensorrt-rtx,ort-cuda]
                                [--work FOLDER] [--out docs/results] [--name NAME]

For each size and backend: engines are built, every graph is compared with PyTorch (`omniport validate`), decoding is
timed against what the memory's bandwidth allows, and the time to the first sound of a reply is taken. A backend that
cannot run here is written down with the reason. Exits with 1 when a comparison failed, or nothing ran.

``--backends ort-cpu`` needs no GPU and shows that the script itself works.
"""

from __future__ import annotations

import json
import platform
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omniport.export.devices.catalog import Target
from omniport.runtime import Done, OmniSession, SamplingConfig
from omniport.runtime.backends import open_backend
from omniport.runtime.backends.base import Backend
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import BackendError, BuildError
from omniport.runtime.system.progress import Say

from benchmarks.fixed_tokens import FixedTokens
from benchmarks.harness import RESULTS, command_line

BACKENDS = ("tensorrt", "tensorrt-rtx", "ort-cuda")
_BUILT = ("tensorrt", "tensorrt-rtx")
#: tokens before decoding is timed, and tokens that are timed
PROMPT, STEPS = 512, 64
#: tokens of the bundles' KV caches, and embeddings of the largest image: more than anything here takes
_CONTEXT, _UNITS = 2048, 1024

Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What to check.

    Attributes:
        graphs: compare these parts only, as ``omniport validate --graphs`` names them.
        prompt, steps: tokens before decoding is timed, and tokens that are timed.
        seconds: of speech in the timed reply, at most.
    """

    sizes: tuple[str, ...] = ("tiny", "small")
    precision: str = "fp16"
    backends: tuple[str, ...] = BACKENDS
    graphs: tuple[str, ...] | None = None
    prompt: int = PROMPT
    steps: int = STEPS
    seconds: float = 4.0


def check_machine(plan: Plan, work: Path, target: Target | None, say: Say = lambda _: None) -> Row:
    """Everything; gives the document that is written.

    Args:
        work: folder for checkpoints and bundles; those that are there are used again.
        target: the machine's GPU; None for a CPU.
    """
    from omniport.export.exporter import export_checkpoint
    from omniport.export.synthetic.make_checkpoint import make_checkpoint

    rows = []
    for size in plan.sizes:
        checkpoint, bundle = work / size, work / f"{size}-{plan.precision}"
        if not checkpoint.exists():
            say(f"make checkpoint {size}")
            make_checkpoint(checkpoint, size=size)
        if not (bundle / "bundle.json").exists():
            say(f"export {size} in {plan.precision}")
            export_checkpoint(checkpoint, bundle, precision=plan.precision, max_context=_CONTEXT)
        for backend in plan.backends:
            say(f"{size} on {backend}")
            rows.append({"size": size, "backend": backend, **check_backend(bundle, checkpoint, backend, target, plan)})
    return {"machine": _machine(target), "precision": plan.precision, "weights": "random", "results": rows}


def check_backend(bundle: Path, checkpoint: Path, backend: str, target: Target | None, plan: Plan) -> Row:
    """One bundle on one backend: ``not_run`` with the reason, or figures."""
    row: Row = {}
    try:
        if backend in _BUILT:
            row["engines"] = _build(bundle, backend, target)
        opened = Bundle.open(bundle)
        row["runs_as"] = (made := open_backend(backend, opened)).name
        row["decode"] = {name: decode_rate(opened, made, name, target, plan) for name in ("thinker", "talker")}
        row["work_on_host"] = {k: len(v) for k, v in made.host_nodes.items()}
        made.close()
        row["reply"] = speech_times(bundle, backend, plan)
    except (BackendError, BuildError) as error:
        return {"not_run": str(error)}
    row["parity"] = _parity(bundle, checkpoint, backend, plan)
    return row


def decode_rate(bundle: Bundle, backend: Backend, name: str, target: Target | None, plan: Plan) -> Row:
    """Tokens a second of a decoder, and of what the memory's bandwidth allows.

    A step reads every weight once, and the keys and values of the tokens so far.
    """
    manifest = bundle.manifest
    geometry = manifest.thinker if name == "thinker" else manifest.talker
    assert geometry is not None, "the checkpoints that this script makes can speak"
    count = plan.prompt + plan.steps + 8
    tokens = FixedTokens(bundle, backend, name, count)
    prefill, _ = tokens.feed(0, plan.prompt)
    # the first steps choose how decoding runs, and are not counted
    seconds = [tokens.feed(index, index + 1)[0] for index in range(plan.prompt, count)][8:]
    step = float(np.median(seconds))
    itemsize = {"float32": 4}.get(manifest.kv.dtype, 2)
    row = 2 * geometry.num_layers * geometry.num_kv_heads * geometry.head_dim * itemsize
    weights = sum(manifest.files[file].size for file in manifest.graphs[name].data)
    nbytes = weights + row * (plan.prompt + plan.steps // 2)
    found: Row = {
        "tokens_per_second": round(1 / step, 2),
        "step_seconds": step,
        "slowest_step_seconds": max(seconds),
        "prefill_tokens": plan.prompt,
        "first_prefill_seconds": prefill,
        "bytes_per_token": nbytes,
        "bytes_per_second": round(nbytes / step),
    }
    if target is not None and target.bandwidth:
        found["roofline_tokens_per_second"] = round(target.bandwidth / nbytes, 2)
        found["share_of_roofline"] = round(nbytes / step / target.bandwidth, 4)
    timing = getattr(tokens.graph, "decoding", None)
    if timing is not None:
        found["cuda_graph"] = {
            "used": timing.uses_graph,
            "plain_step_seconds": timing.plain,
            "graph_step_seconds": timing.graph,
            "problem": timing.problem,
        }
    return found


def speech_times(bundle: Path, backend: str, plan: Plan) -> Row:
    """Times of a spoken reply, after one that loads the graphs. Seconds from the question's end."""
    thinker = SamplingConfig(max_new_tokens=64)
    talker = SamplingConfig(max_new_tokens=int(plan.seconds * 50), temperature=0.9, top_k=40, top_p=0.8)
    messages = [{"role": "user", "content": "What do you see?"}]
    with OmniSession.open(bundle, backend) as session:
        for _ in range(2):
            events = list(session.reply(messages, thinker=thinker, talker=talker, seed=0))
    done = events[-1]
    assert isinstance(done, Done)
    stats = done.stats
    return {
        "prompt_tokens": stats.prompt_tokens,
        "text_tokens": stats.text_tokens,
        "codec_tokens": stats.codec_tokens,
        "time_to_first_token": stats.time_to_first_token,
        "time_to_first_audio": stats.time_to_first_audio,
        "tokens_per_second": stats.tokens_per_second,
        "codes_per_second": stats.codes_per_second,
        "real_time_factor": stats.real_time_factor,
        "underruns": stats.underruns,
    }


def _parity(bundle: Path, checkpoint: Path, backend: str, plan: Plan) -> Row:
    from omniport.export.validation.validate import validate

    report, _ = validate(bundle, checkpoint, backend=backend, graphs=plan.graphs)
    stages: dict[str, Row] = {}
    for check in report.checks:
        stage = stages.setdefault(check.stage, {"pass": 0, "fail": 0, "not_run": 0, "problems": []})
        stage[check.status] += 1
        if check.message:
            stage["problems"].append(f"{check.name}: {check.message}")
        error = check.figures.get("relative_rms")
        if isinstance(error, float):
            stage["worst_relative_rms"] = max(error, stage.get("worst_relative_rms", 0.0))
    return {"ok": report.ok, "stages": stages}


def _build(bundle: Path, builder: str, target: Target | None) -> Row:
    from omniport.export.tensorrt.build import build_bundle
    from omniport.export.tensorrt.profiles import Limits

    if target is None:
        raise BackendError("engines need an NVIDIA GPU, and the CUDA driver sees none here")
    report = build_bundle(Bundle.open(bundle), target, builder=builder, limits=Limits(max_units=_UNITS))
    return {
        "builder": f"{report.builder} {report.version}",
        "seconds": round(report.seconds, 1),
        "engine_bytes": {row.graph: row.record.engine.size for row in report.graphs},
    }


def _machine(target: Target | None) -> Row:
    from omniport.cli.commands.doctor import examine

    facts = examine()
    kept = ("python", "machine", "cpu", "cpu_cores", "memory_bytes", "gpus")
    gpu = None
    if target is not None:
        gpu = {"title": target.title, "capability": target.capability, "bandwidth": target.bandwidth}
    packages = {name: version for name, version in facts["packages"].items() if version is not None}
    return {**{key: facts[key] for key in kept}, "system": platform.system(), "packages": packages, "gpu": gpu}


def failed(document: Row) -> bool:
    """Whether a comparison failed, or nothing was compared."""
    results = [row["parity"]["ok"] for row in document["results"] if "parity" in row]
    return not results or not all(results)


def file_name(document: Row) -> str:
    """``h100``, ``rtx-4090``: the GPU's name, or ``cpu``."""
    gpu = document["machine"]["gpu"]
    title = re.sub(r"\b(nvidia|geforce)\b", "", gpu["title"].lower()) if gpu else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", title).strip("-")


def _target(backends: Sequence[str]) -> Target | None:
    from omniport.export.devices.detect import this_target

    try:
        return this_target()
    except BackendError as error:
        if set(backends) <= {"ort-cpu"}:
            return None
        raise SystemExit(f"error: {error}. '--backends ort-cpu' tries this script without a GPU") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; gives the exit code."""
    parser = command_line(__doc__)
    parser.add_argument("--sizes", default=",".join(Plan.sizes))
    parser.add_argument("--precision", default=Plan.precision, choices=("fp32", "fp16", "bf16"))
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--graphs", default="", help="compare these parts only")
    parser.add_argument("--steps", type=int, default=STEPS, help="tokens that are timed")
    parser.add_argument("--seconds", type=float, default=Plan.seconds, help="speech in the timed reply")
    parser.add_argument("--work", type=Path, help="folder for checkpoints and bundles; kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", help="of the file: gpu-NAME.json; the GPU's by default")
    options = parser.parse_args(arguments)
    plan = Plan(
        sizes=tuple(options.sizes.split(",")),
        precision=options.precision,
        backends=tuple(options.backends.split(",")),
        graphs=tuple(options.graphs.split(",")) if options.graphs else None,
        steps=options.steps,
        seconds=options.seconds,
    )
    target = _target(plan.backends)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        document = check_machine(plan, options.work or Path(scratch), target, say)
    path = options.out / f"gpu-{options.name or file_name(document)}.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(path)
    for row in document["results"]:
        outcome = row.get("not_run") or ("parity holds" if row["parity"]["ok"] else "PARITY FAILS")
        print(f"{row['size']} {row['backend']}: {outcome}")
    return int(failed(document))


if __name__ == "__main__":
    raise SystemExit(main())
