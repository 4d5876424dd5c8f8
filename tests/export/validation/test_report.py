"""The report: rows, figures beside limits, JSON that can be read back, a page that needs nothing else."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import wave
from html.parser import HTMLParser

import msgspec
import numpy as np
import pytest
from omniport.export.evaluation import plots
from omniport.export.evaluation.metrics import figure_text
from omniport.export.validation import report_page as page
from omniport.export.validation import summary as report
from omniport.export.validation.tolerances import LIMITS
from omniport.export.validation.types import FAIL, NOT_RUN, PASS, Check, ValidationReport
from support.paths import REPOSITORY

from scripts import validate_docs

RATE = 24000


def check(stage: str, name: str, error: float, bound: float = 1e-4, **extra: object) -> Check:
    fields = {"figures": {"rel_rms": error}, "limits": {"rel_rms": bound}, "reasons": {"rel_rms": "order of summation"}}
    status = PASS if error <= bound else FAIL
    return Check(stage=stage, name=name, status=status, **(fields | extra))  # type: ignore[arg-type]


def make(checks: list[Check], **fields: object) -> ValidationReport:
    plain: dict[str, object] = {
        "ok": all(c.status != FAIL for c in checks) and any(c.status != NOT_RUN for c in checks),
        "bundle": "a bundle",
        "checkpoint": "tiny",
        "fingerprint": "ab" * 32,
        "backend": "ort-cpu",
        "precision": "fp32",
        "suite": "quick",
        "checks": checks,
        "environment": {"cpu": "some <CPU>", "torch": "2.13"},
        "hashes": {"graphs/thinker.onnx": "cd" * 32},
        "seconds": 12.5,
        "peak_memory_bytes": 1 << 30,
    }
    return ValidationReport(**(plain | fields))  # type: ignore[arg-type]


def sweep(seconds: float = 0.5) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    time = np.arange(int(RATE * seconds)) / RATE
    return (0.4 * np.sin(2 * np.pi * (200 + 3000 * time) * time)).astype(np.float32)


# rows


def test_a_row_for_each_stage_in_the_order_of_the_pipeline() -> None:
    made = make([check("speech", "b", 1e-5), check("thinker", "a", 1e-5), check("preprocess", "c", 0.0)])
    assert [row.stage for row in report.stage_rows(made)] == ["preprocess", "thinker", "speech"]


def test_an_unknown_stage_is_shown_too() -> None:
    assert [row.stage for row in report.stage_rows(make([check("new", "a", 0.0)]))] == ["new"]


def test_the_row_holds_counts_and_the_figure_nearest_to_its_limit() -> None:
    near = check("thinker", "near", 5e-3, 1e-2)
    far = check("thinker", "far", 1e-6)
    left = Check(stage="thinker", name="left", status=NOT_RUN, message="why")
    (row,) = report.stage_rows(make([near, far, left], emulated=["thinker"]))
    assert (row.status, row.checks, row.failed, row.not_run, row.emulated) == (PASS, 3, 0, 1, True)
    assert row.worst is not None
    assert (row.worst.check, row.worst.used, row.worst.text) == ("near", 0.5, "rel_rms 0.005 <= 0.01")


def test_one_failure_fails_the_stage_and_all_not_run_is_not_run() -> None:
    left = Check(stage="dit", name="left", status=NOT_RUN)
    rows = report.stage_rows(make([check("thinker", "a", 0.0), check("thinker", "b", 1.0), left]))
    assert [(row.stage, row.status) for row in rows] == [("thinker", FAIL), ("dit", NOT_RUN)]


@pytest.mark.parametrize(
    ("figure", "value", "bound", "fails"),
    [
        ("rel_rms", 1e-5, 1e-4, False),
        ("rel_rms", 2e-4, 1e-4, True),
        ("rel_rms", math.inf, 1e-4, True),
        ("rel_rms", math.nan, 1e-4, True),
        ("rel_rms", None, 1e-4, True),
        ("differing", 0, 0.0, False),
        ("differing", 1, 0.0, True),
        ("context_gain", 10.0, 5.0, False),
        ("context_gain", 2.0, 5.0, True),
        ("context_gain", 0.0, 5.0, True),
    ],
)
def test_share_of_the_limit(figure: str, value: float | None, bound: float, fails: bool) -> None:
    found = Check(stage="s", name="n", status=PASS, figures={figure: value}, limits={figure: bound})
    (worst,) = report.limited_figures(found)
    assert (worst.used > 1) == fails


def test_the_direction_of_a_limit_comes_from_the_table() -> None:
    assert any(limit.at_least for limit in LIMITS.values()), "no limit of this kind is left: drop the code for it"
    for (figure, _), limit in LIMITS.items():
        assert report.at_least(figure) == limit.at_least, "figures of one name must have one direction"


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.23456e-7, "1.23e-07"), (True, "yes"), (3, "3"), (None, "-"), (math.inf, "inf"), (math.nan, "nan"), ("a", "a")],
)
def test_figures_as_text(value: float | str | None, text: str) -> None:
    assert figure_text(value) == text


# JSON


def test_json_is_read_back_with_infinity_as_null() -> None:
    made = make([check("thinker", "a", math.inf), check("dit", "b", 1e-6)])
    back = msgspec.json.decode(report.encode(made), type=ValidationReport)
    assert back.checks[0].figures["rel_rms"] is None
    assert back.checks[1] == made.checks[1]
    assert json.loads(report.encode(made))["schema_version"] == 1


def test_the_schema_describes_the_document() -> None:
    schema = msgspec.json.schema(ValidationReport)
    for struct in (ValidationReport, Check):
        described = schema["$defs"][struct.__name__]
        assert tuple(described["properties"]) == struct.__struct_fields__
        assert described["additionalProperties"] is False


def documented(heading: str) -> list[tuple[str, str]]:
    """(field, type) of the table under a heading of docs/validate.md."""
    text = (REPOSITORY / "docs" / "validate.md").read_text(encoding="utf-8")
    section = text.partition(f"### {heading}\n")[2].partition("\n#")[0]
    return re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section, re.MULTILINE)


@pytest.mark.parametrize("struct", [ValidationReport, Check], ids=lambda struct: struct.__name__)
def test_documented_fields_are_the_structs(struct: type[msgspec.Struct]) -> None:
    assert [name for name, _ in documented(struct.__name__)] == list(struct.__struct_fields__)
    words = {bool: "boolean", str: "string", int: "integer", float: "number", list: "list", dict: "object"}
    hints = msgspec.inspect.type_info(struct)
    assert isinstance(hints, msgspec.inspect.StructType)
    kinds = {
        msgspec.inspect.BoolType: words[bool],
        msgspec.inspect.StrType: words[str],
        msgspec.inspect.IntType: words[int],
        msgspec.inspect.FloatType: words[float],
        msgspec.inspect.ListType: words[list],
        msgspec.inspect.DictType: words[dict],
    }
    for field, (_, text) in zip(hints.fields, documented(struct.__name__), strict=True):
        assert text.split()[0] == kinds[type(field.type)]  # type: ignore[index]


def test_the_table_of_limits_is_fresh() -> None:
    text = validate_docs.PAGE.read_text(encoding="utf-8")
    assert text == validate_docs.render(text), "run make docs"
    assert all(f"| `{figure}` |" in text for figure, _ in LIMITS)


def test_links_and_pictures_of_the_page_exist() -> None:
    text = (REPOSITORY / "docs" / "validate.md").read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if not target.startswith("http")]
    assert "images/validate.png" in targets
    for target in targets:
        assert (REPOSITORY / "docs" / target).is_file()
    assert (REPOSITORY / "docs" / "images" / "validate.png").stat().st_size < 400_000


# the page


class Page(HTMLParser):
    """Tags, text and everything that a page would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.depth: list[str] = []
        self.sources: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.opened.append(tag)
        if tag not in ("meta", "img", "br", "link"):
            self.depth.append(tag)
        self.sources += [(tag, value or "") for key, value in attributes if key in ("src", "href", "data", "srcset")]

    def handle_endtag(self, tag: str) -> None:
        assert self.depth.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def full_page() -> tuple[str, Page]:
    wanted = sweep()
    arrays = {"r": wanted, "w": wanted, "s": wanted[: len(wanted) // 2], "mel": np.zeros((80, 9), np.float32)}
    roles = {"reference": "r", "whole": "w", "streamed": "s", "reference_mel": "mel"}
    checks = [
        check("thinker", "17 tokens, <hidden>", 1e-6),
        check("thinker", "17 tokens, logits", math.inf, message="the output holds values that are not finite"),
        *(check("thinker", f"layer {i}, hidden state", 1e-6 * 10**i) for i in range(4)),
        check("speech", "streamed reply of 37 codes", 0.2, 0.1, artifacts=roles),
        Check(
            stage="dit",
            name="two figures",
            status=FAIL,
            figures={"rel_rms": 1e-6, "kl": 7.0},
            limits={"rel_rms": 1e-4, "kl": 5.0},
        ),
        Check(stage="talker", name="everything", status=NOT_RUN, message="no device here"),
        Check(
            stage="end_to_end",
            name="a reply: token ids",
            status=PASS,
            figures={"count": 9, "equal": 4, "tokens of the reference": "1 [2]", "tokens of the bundle": "1 [3]"},
        ),
    ]
    text = page.render(make(checks, emulated=["thinker"]), arrays)
    return text, Page(text)


def test_the_page_needs_no_other_file(full_page: tuple[str, Page]) -> None:
    text, parsed = full_page
    assert not parsed.depth, "every element is closed"
    assert parsed.sources
    assert all(value.startswith("data:") for _, value in parsed.sources)
    assert "script" not in parsed.opened
    assert "link" not in parsed.opened
    assert not re.search(r"url\(|@import|https?://", text)


def test_the_page_says_everything(full_page: tuple[str, Page]) -> None:
    _, parsed = full_page
    for words in (
        "4 of 9 checks fail",
        "1 did not run",
        "no device here",
        "17 tokens, <hidden>",
        "the output holds values that are not finite",
        "some <CPU>",
        "cd" * 32,
        "order of summation",
        "thinker (emulated)",
        "tokens of the reference:\n  1 [2]",
        "tokens of the bundle:\n  1 [3]",
        "Error by layer",
        "Error by case",
    ):
        assert words in parsed.text
    assert [tag for tag, _ in parsed.sources].count("audio") == 3


def test_a_failure_names_the_figures_beyond_their_limits(full_page: tuple[str, Page]) -> None:
    text, _ = full_page
    assert '<td class="case">two figures</td><td>kl 7 (allowed ≤ 5)</td>' in text


def test_the_page_prints(full_page: tuple[str, Page]) -> None:
    text, _ = full_page
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert "@media print" in style
    assert "break-inside: avoid" in style
    assert "@page" in style


def test_a_page_of_nothing_does_not_claim_success() -> None:
    text = page.render(make([Check(stage="dit", name="all", status=NOT_RUN, message="no GPU")]), {})
    assert "proves nothing" in text
    assert "checks hold" not in text
    assert "Not measured in this run: --trace thinker" in text


def test_the_same_report_gives_the_same_page() -> None:
    made = make([check("thinker", "a", 1e-6), check("thinker", "layer 0, hidden state", 1e-6)])
    assert page.render(made, {}) == page.render(made, {})


# sounds


def test_a_player_holds_the_samples() -> None:
    samples = sweep()
    uri = plots.sound_uri(samples, RATE)
    kind, _, content = uri.partition(";base64,")
    assert kind == "data:audio/wav"
    with wave.open(io.BytesIO(base64.b64decode(content))) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (RATE, 1, 2)
        back = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767
    assert np.sqrt(np.mean(samples**2)) > 0.1
    assert np.abs(back - samples).max() < 1e-4


def test_broken_sound_is_still_drawn() -> None:
    broken = sweep()
    broken[100:200] = np.inf
    broken[300] = np.nan
    assert plots.spectrograms({"a": sweep(), "b": broken, "c": broken[:3]}, RATE).startswith("data:image/png")
    assert plots.sound_uri(broken, RATE).startswith("data:audio/wav")


def test_bars_and_layers_take_what_is_not_finite() -> None:
    values, bounds = [1e-6, math.inf, 0.0, math.nan], [1e-4] * 4
    assert plots.bars(["a", "b", "c", "d"], values, bounds, "error").startswith("data:image/svg+xml")
    assert plots.layers("thinker", range(4), values, bounds, "error").startswith("data:image/svg+xml")
