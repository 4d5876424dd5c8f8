"""What a TensorRT can do, read off recorded attribute sets; progress out of nested phases."""

from __future__ import annotations

import dataclasses
import gc
import random
import subprocess
import sys
from typing import Any

import pytest
from omniport.export.tensorrt.builder_api import (
    INT8_BLOCKS,
    Api,
    PhaseStack,
    features_of,
    load_api,
    too_old_for,
)
from omniport.runtime.backends.tensorrt.runtime_api import TrtRuntime
from omniport.runtime.errors import BackendError
from omniport.runtime.system.host import version_numbers

from scripts.tensorrt_contract import read_record

RECORDED = read_record()
NATIVE = ("Attention", "RotaryEmbedding", "RMSNormalization", "TensorScatter")


def features(name: str) -> set[str]:
    """Names of the features that a recorded module has."""
    builder, version = name.split()
    classes = {
        kind: offers.get("members") or offers["attributes"] for kind, offers in RECORDED[name]["classes"].items()
    }
    found = features_of(builder, version, classes)
    return {field for field, on in dataclasses.asdict(found).items() if on}


OLD = {"strong_typing_flag", "timing_cache", "progress"}
NEW = OLD | {"mapped_weights", "streamed_engine", "native_attention", "native_cache"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tensorrt 10.3.0", OLD),
        ("tensorrt 10.13.3.9", OLD | {"mapped_weights", "streamed_engine"}),
        ("tensorrt 10.15.1.29", NEW),
        ("tensorrt 11.4.0.106", NEW - {"strong_typing_flag"}),
        ("tensorrt-rtx 1.7.1.116", (NEW | {"explicit_capability", "user_allocation"}) - {"timing_cache"}),
    ],
)
def test_features_of_recorded_modules(name: str, expected: set[str]) -> None:
    assert features(name) == expected


def test_a_package_without_anything_has_no_features() -> None:
    assert not any(dataclasses.asdict(features_of("tensorrt", "9", {})).values())


def test_the_installed_package_has_what_is_relied_on() -> None:
    pytest.importorskip("tensorrt_rtx")
    api = load_api("tensorrt-rtx")
    wanted = {
        "explicit_capability",
        "mapped_weights",
        "streamed_engine",
        "native_attention",
        "native_cache",
        "progress",
    }
    assert wanted <= {field for field, on in dataclasses.asdict(api.features).items() if on}


@pytest.mark.parametrize(
    ("version", "operators", "opset", "lacks"),
    [
        ("10.3.0", NATIVE, 24, [f"{name} ({v})" for name, v in zip(NATIVE, ("10.14", *("10.15",) * 3), strict=True)]),
        ("10.14.1.48", NATIVE, 24, ["RotaryEmbedding (10.15)", "RMSNormalization (10.15)", "TensorScatter (10.15)"]),
        ("10.15.1.29", NATIVE, 24, []),
        ("11.4", NATIVE, 24, []),
        ("10.3.0", ("MatMul", "DequantizeLinear"), 21, []),
        ("10.3.0", ("DequantizeLinear", INT8_BLOCKS), 21, ["INT8 in blocks (10.16)"]),
        ("10.3.0", ("MatMul",), 24, ["opset 24 (10.14)"]),
        ("10.13", ("Attention",), 23, ["Attention (10.14)"]),
    ],
)
def test_what_an_older_parser_lacks(version: str, operators: tuple[str, ...], opset: int, lacks: list[str]) -> None:
    assert too_old_for(operators, opset, version) == lacks


def test_versions() -> None:
    assert version_numbers("10.16.1.11") == (10, 16, 1)
    assert version_numbers("10.3") == (10, 3)
    assert version_numbers("11.0.0rc1") == (11, 0)
    assert version_numbers("11.5") > version_numbers("10.15.1")


def test_builds_and_runs_share_the_logger_and_not_the_messages() -> None:
    module: Any = pytest.importorskip("tensorrt_rtx")
    api, runtime = load_api("tensorrt-rtx"), TrtRuntime("tensorrt-rtx")
    assert api.logger is runtime.logger is load_api("tensorrt-rtx").logger
    api.messages()
    runtime.messages.take()
    severity = module.ILogger.Severity
    for level, text in ((severity.ERROR, "it\n is broken"), (severity.WARNING, "careful"), (severity.INFO, "hello")):
        api.logger.log(level, text)
    assert api.messages() == [("ERROR", "it\n is broken"), ("WARNING", "careful")]
    assert api.messages() == []
    assert runtime.messages.reason() == "it is broken"
    assert runtime.messages.reason() == "it gives no reason"
    for _ in range(2000):
        api.logger.log(severity.ERROR, "again")
    assert len(runtime.messages.take()) == 1000
    before = len(api.logger.listeners)
    del runtime
    gc.collect()
    assert len(api.logger.listeners) < before


def test_an_unknown_capability_lists_the_known_ones() -> None:
    pytest.importorskip("tensorrt_rtx")
    api: Api = load_api("tensorrt-rtx")
    config = api.module.Builder(api.logger).create_builder_config()
    with pytest.raises(BackendError, match="does not compile for SM87; it knows SM120, SM121, SM75"):
        api.set_capability(config, "8.7")
    api.set_capability(config, "8.9")
    assert config.get_compute_capability(0) == api.module.ComputeCapability.SM89


def test_progress_never_goes_back() -> None:
    phases = PhaseStack()
    phases.start("build", None, 4)
    assert phases.fraction() == 0
    phases.step("build", 1)
    phases.start("optimize", "build", 2)
    phases.step("optimize", 1)
    assert phases.fraction() == 1.5 / 4
    phases.finish("optimize")
    assert phases.fraction() == 1.5 / 4  # not a quarter again
    phases.step("build", 2)
    assert phases.fraction() == 0.5
    phases.step("build", 4)
    assert phases.fraction() == 1.0
    phases.finish("build")
    assert phases.fraction() == 1.0


def test_progress_stays_within_bounds_whatever_is_reported() -> None:
    random.seed(0)
    phases, last = PhaseStack(), 0.0
    for _ in range(500):
        name = random.choice("abcd")
        random.choice(
            [
                lambda name=name: phases.start(name, random.choice([None, "a", "x"]) if name != "a" else None, 3),
                lambda name=name: phases.step(name, random.randint(0, 9)),
                lambda name=name: phases.finish(name),
            ]
        )()
        now = phases.fraction()
        assert last <= now <= 1.0
        last = now


def test_building_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\n"
        "import omniport.export.tensorrt.build, omniport.export.tensorrt.build_check, omniport.export.devices.detect\n"
        "heavy = {'torch', 'transformers', 'onnxscript', 'onnxruntime', 'tensorrt_rtx', 'tensorrt', 'optimum'}\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
