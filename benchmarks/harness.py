"""What measurements share: where results are, and a process of its own for each."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"


def own_process(function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None) -> Any:
    """What a function of a module returns when it is called in a fresh process.

    Args:
        arguments: any that JSON can hold; so has to be what is returned. The function may print to stderr only.
        environment: variables that are set for it, beside those of this process.

    Raises:
        subprocess.CalledProcessError: it failed; the reason is on stderr.
    """
    main = sys.modules["__main__"].__spec__
    module = main.name if function.__module__ == "__main__" and main is not None else function.__module__
    command = [sys.executable, "-m", "benchmarks.harness", f"{module}:{function.__name__}", json.dumps(arguments)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    variables = {**os.environ, **(environment or {}), "PYTHONPATH": path}
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, env=variables).stdout)


def _child(name: str, arguments: str) -> None:
    module, _, function = name.partition(":")
    print(json.dumps(getattr(importlib.import_module(module), function)(*json.loads(arguments))))


if __name__ == "__main__":
    _child(*sys.argv[1:])
