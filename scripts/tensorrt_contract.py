"""Record what the Python modules of TensorRT offer: attributes, enum members and signatures, from the real bindings.

    python -m scripts.tensorrt_contract            # write tests/data/trt_attributes.json
    python -m scripts.tensorrt_contract --module X # print the record of one module that imports here

The bindings are on PyPI, a megabyte each, and their libraries are not. They import over libraries that define the few
functions that they call, which are compiled here (cc and nm are needed); nothing of them runs. `make
tensorrt-contract` compares what is recorded with the real modules.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "tests" / "data" / "trt_attributes.json"
#: package of the bindings and version: JetPack 6.2's, the first with weights by address, the first with the cache, and
#: the one that pip takes today
BINDINGS = (
    ("tensorrt-cu12-bindings", "10.3.0"),
    ("tensorrt-cu12-bindings", "10.13.3.9"),
    ("tensorrt-cu12-bindings", "10.15.1.29"),
    ("tensorrt-cu13-bindings", "11.4.0.106"),
)
#: what this project touches, and a part of its neighbourhood; a test of what is recorded fails where one is missing
CLASSES = (
    "Builder",
    "BuilderFlag",
    "ComputeCapability",
    "DataType",
    "DynamicShapesKernelSpecializationStrategy",
    "ExecutionContextAllocationStrategy",
    "IAttention",
    "IAttentionInputLayer",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "IHostMemory",
    "ILayer",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IProgressMonitor",
    "IRuntimeCache",
    "IRuntimeConfig",
    "IStreamWriter",
    "ITensor",
    "ITimingCache",
    "LayerType",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "OnnxParser",
    "ParserError",
    "Runtime",
    "TensorIOMode",
)
#: their methods are many, and this project adds no layers
_NAMES_ONLY = re.compile(r"INetworkDefinition\.(add|set)_")


def record_of(module: Any) -> dict[str, dict[str, Any]]:
    """class -> what it offers: for an enum its members, else attribute -> how it is called.

    A method is its signatures, a property ``get``, ``set`` or both with the value's type, anything else nothing.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in CLASSES:
        kind = getattr(module, name, None)
        if kind is None:
            continue
        if members := getattr(kind, "__members__", None):
            found[name] = {"members": sorted(members)}
            continue
        public = [attribute for attribute in dir(kind) if not attribute.startswith("_")]
        calls = {attribute: _called(name, attribute, getattr(kind, attribute)) for attribute in (*public, "__init__")}
        found[name] = {"attributes": calls}
    return found


def _called(kind: str, name: str, attribute: Any) -> str:
    if _NAMES_ONLY.match(f"{kind}.{name}"):
        return ""
    if isinstance(attribute, property):
        getter = (attribute.fget.__doc__ or "") if attribute.fget else ""
        access = "get set" if attribute.fset and getter else "get" if getter else "set"
        return f"{access} {_plain(getter.partition('->')[2].partition(chr(10))[0])}".strip()
    documented = attribute.__doc__ or ""
    pattern = rf"^(?:\d+\. )?{re.escape(name)}(\(self: .*)$"
    return "; ".join(_plain(found) for found in re.findall(pattern, documented, re.MULTILINE))


def _plain(text: str) -> str:
    """A signature without the names of modules."""
    text = re.sub(r"\b(tensorrt(_rtx)?_bindings\.tensorrt(_rtx)?|typing(_extensions)?|collections\.abc)\.", "", text)
    text = re.sub(r"\b\w+::", "", text).replace("IParserError", "ParserError")
    return re.sub(r"^\(self: [\w.]+(, )?", "(", text.strip())


def fetch(package: str, version: str, folder: Path) -> Path:
    """Download bindings for the Python that runs here; gives the folder to import ``tensorrt_bindings`` from.

    Raises:
        CalledProcessError: pip's, with its messages in ``stderr``.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "-d", folder, f"{package}=={version}"], check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "module")
    return folder / "module"


def make_stubs(library: Path, folder: Path) -> None:
    """Compile libraries of the names that ``library`` wants, with the functions that nothing else here defines.

    Each of them gives a null pointer, which Python hears as an object that could not be made.
    """
    folder.mkdir()
    here = [ctypes.CDLL(None), ctypes.CDLL("libstdc++.so.6")]
    listed = subprocess.run(["nm", "-D", "--undefined-only", library], check=True, capture_output=True, text=True)
    symbols = [name for kind, name in map(str.split, listed.stdout.splitlines()) if kind == "U" and "@" not in name]
    missing = [name for name in symbols if not any(hasattr(place, name) for place in here)]
    wanted = sorted(set(re.findall(rb"libnv\w+\.so\.\d+", library.read_bytes())))
    for number, name in enumerate(found.decode() for found in wanted):
        source = "".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in missing if number == 0)
        command = ["cc", "-shared", "-fPIC", "-x", "c", "-", f"-Wl,-soname,{name}", "-o", folder / name]
        subprocess.run(command, input=source, check=True, text=True)


def recorded(package: str, version: str) -> dict[str, dict[str, Any]]:
    """The record of bindings, which another process imports. CalledProcessError: pip's, the compiler's or Python's."""
    with tempfile.TemporaryDirectory() as scratch:
        module = fetch(package, version, Path(scratch))
        make_stubs(module / "tensorrt_bindings" / "tensorrt.so", Path(scratch, "stubs"))
        places = {"PYTHONPATH": os.pathsep.join((str(module), str(ROOT))), "LD_LIBRARY_PATH": f"{scratch}/stubs"}
        command = [sys.executable, "-m", "scripts.tensorrt_contract", "--module", "tensorrt_bindings"]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | places)
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


def name_of(package: str, version: str) -> str:
    """What bindings are recorded as: ``tensorrt 10.3.0``."""
    return f"{re.sub(r'(-cu[0-9]+)?-bindings$', '', package)} {version}"


def read_record() -> dict[str, dict[str, Any]]:
    """What was recorded: ``tensorrt 10.3.0`` -> ``{"source": ..., "classes": ...}``."""
    held: dict[str, dict[str, Any]] = json.loads(RECORD.read_text(encoding="utf-8"))
    return held


def _text(found: dict[str, dict[str, Any]]) -> str:
    """JSON with a line for each class."""
    packages = []
    for name, entry in found.items():
        classes = (f"   {json.dumps(kind)}: {json.dumps(offers)}" for kind, offers in entry["classes"].items())
        head = f'  "source": {json.dumps(entry["source"])},\n  "classes": {{\n'
        packages.append(f" {json.dumps(name)}: {{\n{head}" + ",\n".join(classes) + "\n  }\n }")
    return "{\n" + ",\n".join(packages) + "\n}\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--module", help="print the record of this module")
    options = parser.parse_args(arguments)
    if options.module:
        print(json.dumps(record_of(importlib.import_module(options.module))))
        return
    found = {}
    for package, version in BINDINGS:
        source = f"the wheel {package} {version}, over libraries of stubs"
        found[name_of(package, version)] = {"source": source, "classes": recorded(package, version)}
    rtx = importlib.import_module("tensorrt_rtx")
    found[f"tensorrt-rtx {rtx.__version__}"] = {"source": "the installed package", "classes": record_of(rtx)}
    RECORD.write_text(_text(found), encoding="utf-8")


if __name__ == "__main__":
    main()
