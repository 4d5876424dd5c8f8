"""Write docs/results/bench.md and its picture from docs/results/bench.json, which `omniport bench --json` wrote.

omniport bench BUNDLE --against CHECKPOINT --json docs/results/bench.json
python -m benchmarks.bench_page
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence

from omniport.export.evaluation.bench_picture import draw
from omniport.runtime.bench.results import BenchReport, Figure, Timing, read_report

from benchmarks.harness import RESULTS, table

PICTURE = RESULTS.parent / "images" / "bench.svg"
#: what was tried where something falls short, written by hand
NOTES = RESULTS / "bench-notes.md"
#: bundle, its file of results
QUANTIZED = {"int8": "bench-int8.json", "int4, int8": "bench-int4-int8.json"}
BF16 = "bench-bf16.json"
#: of the small trained model
WREN = "bench-wren.json"
#: stage, figure (the largest if empty), what is asked for, how it is read off
ASKED: tuple[tuple[str, str, str, Callable[[Figure], str]], ...] = (
    ("decode", "1024", "80 % of the roofline", lambda f: _percent(f.share)),
    ("decode", "1024", "1.5 times as fast", lambda f: _times(f.faster)),
    ("prefill", "512", "1.2 times as fast", lambda f: _times(f.faster)),
    ("talker", "1024", "1.5 times as fast", lambda f: _times(f.faster)),
    ("audio_encoder", "", "1.2 times as fast", lambda f: _times(f.faster)),
    ("vision_encoder", "", "1.2 times as fast", lambda f: _times(f.faster)),
    ("dit", "60 codes", "1.5 times as fast", lambda f: _times(f.faster)),
    ("bigvgan", "", "1.3 times as fast", lambda f: _times(f.faster)),
    ("reply", "first sound", "10 times sooner", lambda f: _times(f.faster)),
    ("reply", "total", "1.6 times as fast", lambda f: _times(f.faster)),
    ("reply", "total, fast", "3 times as fast", lambda f: _times(f.faster)),
)
#: the same of other files
ASKED_ELSEWHERE: Mapping[str, tuple[tuple[str, str, str, Callable[[Figure], str]], ...]] = {
    BF16: tuple(
        (stage, name, "3 times as fast in BF16 (OpenVINO)", lambda f: _times(f.faster))
        for stage, name in (("audio_encoder", ""), ("vision_encoder", ""), ("dit", "60 codes"), ("dit", ""))
    ),
    WREN: tuple(
        ("reply", name, "a real-time factor of 0.3 at most, Wren", lambda f: f"{_real_time(f):.2f}")
        for name in ("total", "total, fast")
    ),
    QUANTIZED["int8"]: (("reply", "total, fast", "7 times as fast in int8", lambda f: _times(f.faster)),),
}


def page(report: BenchReport) -> str:
    """The results as a page of the documentation."""
    place, versions = report.environment, report.environment.versions
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items())
    head = (
        f"Made by `python -m benchmarks.bench_page` from bench.json: do not edit by hand. Checkpoint `{report.bundle}` "
        f"(`make-checkpoint`: the 3B's layer widths, four layers a stack, random weights), bundle in "
        f"{report.precision}{' (' + report.recipe + ')' if report.recipe else ''}, on {place.cores} cores of "
        f"{place.processor}; {libraries}. Median of all rounds, smallest and largest in brackets; ours and "
        f"{report.against or 'nothing'} in turns, in one process, on the same threads and inputs. "
        f"{_clock(report)}What is measured and how: [bench.md](../bench.md)."
    )
    parts = [
        "# Speed, measured",
        textwrap.fill(head, 120),
        "![roofline, latency by context, first sound](../images/bench.svg)",
        _asked(report),
        "## All figures",
        _figures(report),
        "## In bfloat16",
        _bf16(),
        "## Quantized bundles",
        _quantized(),
        "## The machine beside each stage",
        _machines(report),
        "## Solvers of speech",
        _solvers(report),
        "## Where the time goes",
        _operators(report),
    ]
    if NOTES.exists():
        parts.append(NOTES.read_text(encoding="utf-8").strip())
    return "\n\n".join(part for part in parts if part) + "\n"


def _clock(report: BenchReport) -> str:
    if report.clock == "wall":
        return ""
    return (
        "The machine was busy with other things: all but whole replies is processor time on one thread (`--clock cpu "
        "--threads 1`), which leaves out how well either side uses a second core. "
    )


def _asked(report: BenchReport) -> str:
    rows = []
    wanted = [(report, ASKED), *((read_report(RESULTS / file), asked) for file, asked in ASKED_ELSEWHERE.items())]
    for source, each in wanted:
        for stage, name, asked, read in each:
            try:
                figure = source.figure(stage, name) if name else source.stages[stage].figures[-1]
                rows.append((stage, figure.name, asked, read(figure)))
            except KeyError:
                rows.append((stage, name, asked, "not run"))
    for stage in ("decode", "talker"):
        figures = report.stages[stage].figures if stage in report.stages else ()
        if figures and "growth" in figures[-1].values:
            asked = f"1.3 times the time at {figures[0].name} at most" if stage == "decode" else ""
            contexts = f"{figures[-1].name} beside {figures[0].name}"
            rows.append((stage, contexts, asked, f"{figures[-1].values['growth']:.2f}"))
    return _table(("stage", "input", "asked", "measured"), rows)


def _figures(report: BenchReport) -> str:
    rows = [
        (
            stage,
            f.name,
            _spread(f.seconds),
            f"{f.rate:.3g} {f.unit}/s",
            _percent(f.share),
            "" if f.reference is None else _spread(f.reference),
            _times(f.faster),
            "" if f.difference is None else f"{f.difference:.0e}",
        )
        for stage, result in report.stages.items()
        for f in result.figures
    ]
    columns = ("time", "rate", "of the roofline", "reference", "times as fast", "difference")
    return _table(("stage", "input", *columns), rows)


def _real_time(total: Figure) -> float:
    """Seconds for a second of speech: a whole reply's, over those that its sound lasts."""
    return 1 / total.rate


def _bf16() -> str:
    """Graphs of the same bundle that OpenVINO computes in bfloat16, beside transformers in float32."""
    report = read_report(RESULTS / BF16)
    about = (
        "`omniport bench --backend openvino --compute bf16`, OpenVINO "
        f"{report.environment.versions['openvino']}, beside "
        "transformers in FP32, on a processor with AVX512-BF16. Difference: relative RMS of the outputs."
    )
    return textwrap.fill(about, 120) + "\n\n" + _figures(report)


def _quantized() -> str:
    """Spoken replies of other bundles, each beside transformers on the checkpoint that it was made from."""
    rows = []
    for name, file in QUANTIZED.items():
        for f in read_report(RESULTS / file).stages["reply"].figures:
            if f.faster is not None and f.reference is not None:
                busy = [f.values.get(f"{part}_seconds") for part in ("dit", "bigvgan", "talker", "thinker")]
                cells = ("" if seconds is None else f"{seconds:.1f} s" for seconds in busy)
                rows.append((name, f.name, _spread(f.seconds), _spread(f.reference), _times(f.faster), *cells))
    columns = ("time", "reference", "times as fast", "DiT", "vocoder", "talker", "thinker")
    about = "`small --outliers`, calibrated. *int4, int8*: `int8`, with INT4 in thinker and talker (`--graph-recipe`)."
    return about + "\n\n" + _table(("bundle", "reply", *columns), rows)


def _machines(report: BenchReport) -> str:
    rows = []
    for stage, result in report.stages.items():
        m = result.machine
        memory = "" if result.resident_bytes is None else f"{max(0, result.resident_bytes) / 1e6:,.0f} MB"
        rates = f"{m.read_bandwidth / 1e9:.1f} GB/s", f"{m.matmul_rate / 1e9:.0f} GFLOP/s"
        rows.append((stage, *rates, m.load_average, result.threads, memory))
    return _table(("stage", "read", "products", "processes waiting", "threads", "memory"), rows)


def _solvers(report: BenchReport) -> str:
    if "solver" not in report.stages:
        return "Not run."
    rows = [
        (
            f.name,
            f"{f.values['evaluations']:.0f}",
            _spread(f.seconds),
            f"{f.values['mel_distance']:.1e}",
            f"{f.values['mel_error_db']:.3f}",
        )
        for f in report.stages["solver"].figures
    ]
    return _table(("solver", "evaluations", "time", "mel distance to rk4", "in dB"), rows)


def _operators(report: BenchReport) -> str:
    rows = []
    for stage, result in report.stages.items():
        total = sum(result.operators.values())
        shares = [f"{name} {seconds / total:.0%}" for name, seconds in list(result.operators.items())[:6]]
        if shares:
            rows.append((stage, ", ".join(shares)))
    return _table(("stage, largest input", "share of the run by operator"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    return "\n".join(table(head, rows))


def _spread(timing: Timing) -> str:
    return f"{_seconds(timing.median)} ({_seconds(timing.low)} to {_seconds(timing.high)})"


def _seconds(seconds: float) -> str:
    if seconds >= 10:
        return f"{seconds:.1f} s"
    return f"{1e3 * seconds:.0f} ms" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def _times(timing: Timing | None) -> str:
    return "" if timing is None else f"{timing.median:.2f} ({timing.low:.2f} to {timing.high:.2f})"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def main() -> None:
    """Write the page and the picture."""
    report = read_report(RESULTS / "bench.json")
    draw(report, PICTURE)
    (RESULTS / "bench.md").write_text(page(report), encoding="utf-8")


if __name__ == "__main__":
    main()
