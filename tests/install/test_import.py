"""The runtime is light: what importing it costs, and what it may import at all."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest
from support.interpreters import in_fresh_python
from support.paths import REPOSITORY

RUNTIME = REPOSITORY / "runtime"
HEAVY = {"torch", "transformers", "onnx", "onnxruntime", "onnxscript", "optimum", "av", "PIL", "soundfile", "soxr"}
ALLOWED = {"numpy", "tokenizers", "msgspec"}
BANNED_ANYWHERE = {"torch", "transformers", "onnx", "onnxscript", "onnx_ir", "optimum", "omniport"}


def test_using_the_api_loads_nothing_heavy() -> None:
    code = (
        "import json, sys\n"
        "from omniport.runtime import OmniSession, SamplingConfig, TextDelta, AudioChunk, Done, Stats, UserError\n"
        "print(json.dumps(list(sys.modules)))"
    )
    loaded = {name.partition(".")[0] for name in json.loads(in_fresh_python(code))}
    assert {"numpy", "tokenizers", "msgspec"} <= loaded
    assert not loaded & HEAVY


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
