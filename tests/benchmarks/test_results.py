"""Committed figures: pages are those of their JSON files, and what was asked of quantized bundles was reached."""

from __future__ import annotations

import json
from typing import Any

import pytest
from omniport.runtime.bench.results import read_report
from support.paths import REPOSITORY

from benchmarks import (
    aarch64,
    activation_forms,
    bench_page,
    build_matrix,
    calibrate,
    deploy,
    dit_windows,
    echo,
    install_check,
    kv_forms,
    live,
    openvino,
    plan,
    quant,
    real_sizes,
    search,
    serve_check,
    serve_page,
    solvers,
    validate,
    vocoder,
    vocoder_forms,
    wren_again,
    wren_loss,
)
from benchmarks.harness import RESULTS
from scripts import structure

#: page -> the module that makes it of the JSON file of that name
PAGES = {
    "aarch64": aarch64,
    "activation-forms": activation_forms,
    "build-matrix": build_matrix,
    "calibrate": calibrate,
    "deploy": deploy,
    "dit_windows": dit_windows,
    "echo": echo,
    "install-check": install_check,
    "kv-forms": kv_forms,
    "live": live,
    "openvino": openvino,
    "plan": plan,
    "quant": quant,
    "real-sizes": real_sizes,
    "search": search,
    "serve": serve_page,
    "serve-check": serve_check,
    "solvers": solvers,
    "structure": structure,
    "validate": validate,
    "vocoder": vocoder,
    "vocoder-forms": vocoder_forms,
    "wren": wren_loss,
    "wren-again": wren_again,
}


def results(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_fresh(name: str) -> None:
    assert (RESULTS / f"{name}.md").read_text() == PAGES[name].page(results(name))


def test_the_page_of_speed_is_fresh() -> None:
    """It is made of a report and of notes written by hand."""
    assert (RESULTS / "bench.md").read_text() == bench_page.page(read_report(RESULTS / "bench.json"))


def test_readme_says_what_was_measured() -> None:
    """The few figures of README.md are those of the results."""
    text = (REPOSITORY / "README.md").read_text().split("## Measured")[1].split("\n## ")[0]
    live, export = results("live"), results("real-sizes")["3b"]["export bf16"]
    sooner = live["ratios"]["first_audio_sooner_than_reference"]
    assert f"after {live['reply']['first_audio']:.1f} s, {sooner:.1f} times sooner" in text
    assert f"export takes {export['synced_seconds']:.0f} s" in text


def test_the_index_of_results_says_what_was_measured() -> None:
    """The figures of docs/results/README.md, At a glance, are those of the results."""
    text = (RESULTS / "README.md").read_text().split("## At a glance")[1].split("\n## ")[0]
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    whole = {name: read_report(RESULTS / f"{name}.json").stages for name in ("bench", "bench-int8")}
    replies = {name: {f.name: f for f in stages["reply"].figures} for name, stages in whole.items()}
    decode = next(f for f in whole["bench"]["decode"].figures if f.name == "1024")
    sizes, live = results("real-sizes"), results("live")

    def times(name: str, figure: str) -> str:
        found = replies[name][figure].faster
        assert found is not None
        return f"{found.median:.1f}"

    half = read_report(RESULTS / bench_page.BF16).stages
    ratios = (half[stage].figures[-1].faster for stage in ("dit", "audio_encoder", "vision_encoder"))
    bf16 = [f"{ratio.median:.1f}" for ratio in ratios if ratio is not None]

    def seconds(size: str, step: str) -> str:
        found = sizes[size][f"{step} bf16"]
        return f"{found['synced_seconds']:.0f} s"

    wanted: list[list[str]] = [
        [f"{seconds('3b', step)} and {seconds('7b', step)}" for step in ("export", "copy")],
        [f"FP32 {times('bench', 'first sound')} times", f"`int8` {times('bench-int8', 'first sound')} times"],
        [f"{live['reply']['first_audio']:.1f} s, {live['ratios']['first_audio_sooner_than_reference']:.1f} times"],
        [f"{live['first_token'][-1]['pushed']:.2f} s"],
        [
            f"FP32 {times('bench', 'total')} times as fast",
            f"fast` {times('bench', 'total, fast')} times",
            f"`int8` {times('bench-int8', 'total')} and {times('bench-int8', 'total, fast')} times",
        ],
        ["{}, {} and {} times as fast".format(*bf16)],
        [f"{decode.faster.median:.1f} times" if decode.faster else "", f"at {100 * (decode.share or 0):.0f} % of"],
    ]
    assert len(rows) == len(wanted)
    for row, parts in zip(rows, wanted, strict=True):
        for part in parts:
            assert part in row
    peak = max(sizes[size]["export bf16"]["peak_bytes"] for size in ("3b", "7b"))
    assert f"at most {peak / (1 << 30):.1f} GiB" in rows[0]


def test_what_was_asked_of_quantized_bundles() -> None:
    """Limits of size, of decode and prefill speed beside FP32, and of the logits, on `small --outliers`."""
    found = results("quant")
    assert "--outliers" in found["bundle"]
    thinker, base = found["parts"]["thinker"], found["sizes"]["base"]
    for recipe, (size, decode, prefill, loss) in quant.ASKED.items():
        row, parts = thinker[recipe], ("thinker", "talker")
        if size is not None:
            assert sum(found["sizes"][recipe][part] for part in parts) <= size * sum(base[part] for part in parts)
        assert thinker["base"]["decode"] / row["decode"] >= decode, recipe
        assert prefill is None or thinker["base"]["prefill"] / row["prefill"] >= prefill, recipe
        assert loss is None or row["sqnr"] >= loss, recipe
    assert thinker["int8"]["sqnr"] - thinker["int8-plain"]["sqnr"] >= 10
    assert thinker["int4"]["sqnr"] - thinker["int4-alone"]["sqnr"] >= 1
    graphs = [name for name in base if name != "all"]
    assert sum(found["sizes"]["int8"][name] for name in graphs) <= 0.30 * sum(base[name] for name in graphs)
    assert min(found["speech"]["int8"].values()) >= 20  # else the default recipe would have to leave the graph alone
