"""Hold conversations with the clients of others, unmodified, with schemathesis, and with replicas under Ray Serve.

    python -m scripts.check_clients

The `test` extra leaves them out. They are installed beside what is installed here, not into it: into folders of their
own, together with what they want.
"""

from __future__ import annotations

import argparse
import os
import shutil
import site
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PYTHON_CLIENTS = ("openai-agents>=0.24", "livekit-plugins-openai>=1.8", "pipecat-ai>=1.14", "schemathesis>=4.32")
RAY = ("ray[serve]>=2.60",)
NODE_CLIENTS = ("@openai/agents-realtime@0.20", "ws")
TESTS = (
    "test_schemathesis.py",
    "realtime/test_openai_agents.py",
    "realtime/test_livekit.py",
    "realtime/test_pipecat.py",
    "realtime/test_agents_realtime_js.py",
    "trained/test_clients_of_others.py",
)


def install(folder: Path, packages: Sequence[str]) -> Path:
    """A Python that has these packages, and all that this one has."""
    python = folder / "python" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(folder / "python", with_pip=True)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    theirs = Path(subprocess.check_output([python, "-c", where], text=True).strip())
    ours = [path for path in site.getsitepackages() if Path(path).is_dir()]
    lines = [f"import site; site.addsitedir({path!r})" for path in ours]  # so that editable installs are found, too
    (theirs / "beside.pth").write_text("\n".join(lines) + "\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def install_for_node(folder: Path) -> Path | None:
    """The folder of Node's clients; None without npm."""
    npm = shutil.which("npm")
    if npm is None:
        print("no npm here: @openai/agents-realtime is not tried")
        return None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "package.json").write_text("{}\n")
    options = ["--no-audit", "--no-fund", "--loglevel", "error"]
    subprocess.run([npm, "install", *options, *NODE_CLIENTS], cwd=folder, check=True)
    return folder / "node_modules"


def main() -> int:
    """Install, and run the tests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "build" / "clients", help="where to install")
    folder = parser.parse_args().folder
    python, modules = install(folder, PYTHON_CLIENTS), install_for_node(folder / "node")
    environment = os.environ | ({} if modules is None else {"NODE_PATH": str(modules)})
    served = REPOSITORY / "tests" / "serve"
    pytest = ("-m", "pytest", "-q", "-rs")
    clients = [str(python), *pytest, *(str(served / name) for name in TESTS)]
    cluster = [str(install(folder / "ray", RAY)), *pytest, "-m", "cluster", str(served / "test_ray.py")]
    codes = [subprocess.run(tests, cwd=REPOSITORY, env=environment).returncode for tests in (clients, cluster)]
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
