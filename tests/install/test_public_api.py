"""The APIs for programs, from outside: what importing them costs, their names, and the whole way through them."""

from __future__ import annotations

import ast
import inspect
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import omniport.calib
import omniport.export
import omniport.runtime
import pytest
from support.interpreters import in_fresh_python
from support.paths import REPOSITORY

PACKAGES = (omniport.runtime, omniport.export, omniport.calib)
HEAVY = {"torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "optimum", "numpy", "msgspec"}
HEAVY |= {"av", "PIL", "soundfile", "soxr", "starlette", "uvicorn", "websockets", "prometheus_client"}


def folder_of(package: ModuleType) -> Path:
    return REPOSITORY / package.__name__.rpartition(".")[2]


@pytest.mark.parametrize("name", [package.__name__ for package in PACKAGES])
def test_importing_a_package_is_quick_and_loads_nothing_until_it_is_used(name: str) -> None:
    """Processor seconds beside those of numpy's import on the same machine (0.1 s on a desktop core)."""
    code = (
        f"import json, sys, time\nstart = time.process_time()\nimport {name}\nthen = time.process_time()\n"
        "modules = list(sys.modules)\nimport numpy\n"
        "print(json.dumps([then - start, time.process_time() - then, modules]))"
    )
    runs = [json.loads(in_fresh_python(code)) for _ in range(3)]
    ours, numpy = (min(times) for times in list(zip(*runs, strict=True))[:2])
    assert ours < min(numpy, 0.1)
    loaded = {module.partition(".")[0] for module in runs[0][2]}
    assert not loaded & HEAVY


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_public_name_is_there_and_documented(package: ModuleType) -> None:
    for name in package.__all__:
        value = getattr(package, name)
        assert value is not None, name
        assert inspect.getdoc(value) or not callable(value), name
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="nonsense"):
        package.nonsense  # noqa: B018 - it is asked for


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_a_public_name_is_no_module(package: ModuleType) -> None:
    """Importing a module sets it in its package: a function of the same name would be gone."""
    modules = {path.stem for path in folder_of(package).iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not set(package.__all__) & modules


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_names_for_types_and_for_running_are_the_same(package: ModuleType) -> None:
    """Type checkers read one list of imports, Python another."""
    tree = ast.parse((folder_of(package) / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imported = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported == set(package.__all__) == {name for names in package._MODULES.values() for name in names}


def test_a_package_that_is_missing_is_named_with_its_extra() -> None:
    code = (
        "import sys\nsys.modules['torch'] = None\nimport omniport.export\n"
        "try: omniport.export.export_checkpoint\nexcept ImportError as error: print(error)"
    )
    assert in_fresh_python(code).strip() == (
        "omniport.export.export_checkpoint needs torch, not installed here: pip install 'omniport[export]'"
    )


@pytest.mark.slow
def test_the_whole_way(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Export, plan, prove, calibrate, quantize, compare and answer, by public names alone."""
    from omniport.calib import Calibration, calibrate, compare, quantize
    from omniport.export import export_checkpoint, plan, validate
    from omniport.runtime import AudioChunk, OmniSession, SamplingConfig, UserError

    bundle, file, smaller = tmp_path / "bundle", tmp_path / "tiny.calib", tmp_path / "int8"
    exported = export_checkpoint(tiny_checkpoint, bundle, max_context=4096)
    assert (exported.path, len(exported.graphs)) == (bundle, 6)

    (orin,) = plan(bundle, "jetson-orin-nano-8gb")
    assert orin.best in {row.recipe.name for row in orin.recipes if row.works}

    checked = validate(bundle, tiny_checkpoint, graphs=["preprocess", "thinker", "bigvgan"])
    assert checked.report.ok
    assert {check.stage for check in checked.report.checks} >= {"preprocess", "thinker", "bigvgan"}

    data, asked = tmp_path / "calib.jsonl", tmp_path / "asked.jsonl"
    question = {"messages": [{"role": "user", "content": "Tell me of the sea."}]}
    data.write_text(json.dumps({**question, "reply": "It is wide."}) + "\n", encoding="utf-8")
    asked.write_text(json.dumps(question) + "\n", encoding="utf-8")
    found = calibrate(tiny_checkpoint, data, file, max_codes=10)
    assert set(found.missing) == {"audio_encoder", "vision_encoder"}

    recipes = dict.fromkeys(found.missing, "w8")
    quantized = quantize(bundle, smaller, "int8", graph_recipes=recipes, calibration=Calibration.load(file))
    assert all(row.bytes_after < row.bytes_before for row in quantized.graphs if row.name != "bigvgan")
    with pytest.raises(UserError, match="quantized already"):
        quantize(smaller, tmp_path / "twice", "w8")

    compared = compare(bundle, [smaller], data=asked)
    assert [row.recipe for row in compared.report.bundles] == ["fp32", "int8"]
    assert compared.report.bundles[1].graphs[0].bytes < compared.report.bundles[0].graphs[0].bytes

    with OmniSession.open(smaller, backend="ort-cpu") as session:
        greedy = SamplingConfig(max_new_tokens=4, temperature=0.0)
        events = list(session.reply([{"role": "user", "content": "Hello"}], speak=True, thinker=greedy, talker=greedy))
    samples = [event.samples for event in events if isinstance(event, AudioChunk)]
    assert samples
    assert np.isfinite(np.concatenate(samples)).all()
