"""The runtime is light: what importing it costs, and what it may import at all."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import REPOSITORY

RUNTIME = REPOSITORY / "runtime"
HEAVY = {"torch", "transformers", "onnx", "onnxruntime", "onnxscript", "optimum", "av", "PIL", "soundfile", "soxr"}
ALLOWED = {"numpy", "tokenizers", "msgspec"}
BANNED_ANYWHERE = {"torch", "transformers", "onnx", "onnxscript", "onnx_ir", "optimum", "omniport"}


def in_fresh_python(code: str) -> dict[str, object]:
    """Run code that leaves a dictionary in ``found``."""
    script = f"import json, sys, time\n{code}\nprint(json.dumps(found))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def test_import_is_fast_and_light() -> None:
    """Processor seconds beside those of numpy's import on the same machine (0.1 s on a desktop core)."""
    code = (
        "start = time.process_time()\nimport numpy\nthen = time.process_time()\nimport omniport.runtime\n"
        "found = {'numpy': then - start, 'ours': time.process_time() - then, 'modules': sorted(sys.modules)}"
    )
    runs = [in_fresh_python(code) for _ in range(3)]
    assert min(float(str(run["ours"])) for run in runs) < min(float(str(run["numpy"])) for run in runs)
    loaded = {str(name).partition(".")[0] for name in list(runs[0]["modules"])}  # type: ignore[call-overload]
    assert not loaded & HEAVY


def test_using_the_api_loads_nothing_heavy_either() -> None:
    code = (
        "from omniport.runtime import OmniSession, SamplingConfig, TextDelta, AudioChunk, Done, Stats, UserError\n"
        "found = {'modules': sorted(sys.modules)}"
    )
    loaded = {str(name).partition(".")[0] for name in list(in_fresh_python(code)["modules"])}  # type: ignore[call-overload]
    assert {"numpy", "tokenizers", "msgspec"} <= loaded
    assert not loaded & HEAVY


def test_public_names_exist_and_unknown_ones_do_not() -> None:
    runtime = importlib.import_module("omniport.runtime")
    for name in runtime.__all__:
        assert getattr(runtime, name) is not None
        assert name in dir(runtime)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = runtime.Nothing


def imported(node: ast.AST) -> list[tuple[str, int]]:
    """(top-level module, relative level) of an import statement."""
    if isinstance(node, ast.Import):
        return [(alias.name.partition(".")[0], 0) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [((node.module or "").partition(".")[0], node.level)]
    return []


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def at_import_time(node: ast.AST) -> list[tuple[str, int]]:
    """Imports that run when the module is imported: not those in functions or under TYPE_CHECKING."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or is_type_checking(node):
        return []
    return imported(node) + [found for child in ast.iter_child_nodes(node) for found in at_import_time(child)]


SOURCES = sorted(RUNTIME.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(RUNTIME).as_posix())
def test_imports_of_each_file(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for name, level in at_import_time(tree):
        assert level or name in ALLOWED or name in sys.stdlib_module_names, f"{path} imports {name} at module level"
    depth = len(path.relative_to(RUNTIME).parts)
    for node in ast.walk(tree):
        for name, level in imported(node):
            assert level <= depth, f"{path} imports from outside runtime/"
            assert level or name not in BANNED_ANYWHERE, f"{path} imports {name}"


def test_the_walk_sees_files_and_imports() -> None:
    assert {"session.py", "ode.py", "staging.py"} <= {path.name for path in SOURCES}
    tree = ast.parse(
        "import torch.nn\nif x:\n    from onnx import y\ndef f():\n    import av\nclass A:\n    import PIL"
    )
    assert at_import_time(tree) == [("torch", 0), ("onnx", 0), ("PIL", 0)]
