"""Let the clients of others, unmodified, talk with `omniport serve`, and write down which did, in what version.

    python -m benchmarks.serve_check [--folder DIR] [--only NAME ...]

Writes docs/results/serve-check.json and serve-check.md; checks that are not run keep what they had. The `test` extra
leaves most of these clients out. They are installed beside what is installed here, not into it: into folders of their
own, together with what they want. Exits with 1 if a check failed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import site
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.harness import ROOT, command_line, record, table

CLIENTS = (
    *("openai-agents>=0.24", "livekit-plugins-openai>=1.8", "pipecat-ai>=1.14", "schemathesis>=4.32"),
    *("playwright>=1.50",),
)
RAY = ("ray[serve]>=2.60",)
NODE_CLIENTS = ("@openai/agents-realtime@0.20", "ws")
SERVED = "tests/serve"
HOSTILE = 500
#: tests that run in one process, and pytest's options there: a browser has a loop of its own
GROUPS: dict[str, tuple[str, ...]] = {
    "clients": (),
    "page": ("-m", "browser"),
    "ray": ("-m", "cluster"),
    "hostile": (),
}
_TRAINED = "trained/test_clients_of_others.py"
_SPOKEN = "trained/test_spoken_answers.py"


@dataclass(frozen=True)
class Check:
    """One client.

    Attributes:
        name: of the row. package: by which its version is known; after "npm:" one of Node's.
        tests: files, and after "::" what the names of functions there have in them.
        shown: what it shows. group: that it is run in.
    """

    name: str
    package: str
    tests: tuple[str, ...]
    shown: str
    group: str = "clients"


CHECKS = (
    Check(
        "openai",
        "openai",
        (
            *("test_chat.py", "test_chat_errors.py", "test_speech_and_transcription.py"),
            *(f"realtime/test_{name}.py" for name in ("text_turns", "spoken_turns", "tools")),
            *(f"{_SPOKEN}::{name}" for name in ("chat", "given", "recording", "realtime")),
        ),
        "chat, streams, speech, transcriptions, errors; Realtime with turns, interruptions, tools",
    ),
    Check(
        "dashscope",
        "dashscope",
        ("realtime/test_dashscope.py", f"{_SPOKEN}::dashscope"),
        "its Realtime session: earlier names, 16 kHz in, turns by hand",
    ),
    Check(
        "wyoming",
        "wyoming",
        ("test_wyoming.py", f"{_SPOKEN}::wyoming"),
        "describe, asr, handle, tts, all streamed; errors, clients that leave",
    ),
    Check(
        "openai-agents",
        "openai-agents",
        ("realtime/test_openai_agents.py", f"{_TRAINED}::openai_agents"),
        "its default session: messages, speech, interruption",
    ),
    Check(
        "@openai/agents-realtime",
        "npm:@openai/agents-realtime",
        ("realtime/test_agents_realtime_js.py", f"{_TRAINED}::javascript"),
        "its default session in Node: each event passes its schema; interruption, truncation, a tool",
    ),
    Check(
        "livekit-plugins-openai",
        "livekit-plugins-openai",
        ("realtime/test_livekit.py", f"{_TRAINED}::livekit"),
        "a chat context, a reply that is asked for, speech that is answered",
    ),
    Check(
        "pipecat-ai",
        "pipecat-ai",
        ("realtime/test_pipecat.py", f"{_TRAINED}::pipecat"),
        "a whole pipeline: a text and speech, answered",
    ),
    Check(
        "schemathesis",
        "schemathesis",
        ("test_schemathesis.py",),
        "HTTP as `/openapi.json` describes it: what it allows, what it forbids",
    ),
    Check(
        "Chromium, by Playwright",
        "playwright",
        ("page",),
        "the web page: a microphone that plays a question, interruption, camera, chat, status, keys, by keyboard, on a "
        "phone's width, light and dark",
        "page",
    ),
    Check(
        "Ray Serve",
        "ray",
        ("test_ray.py",),
        "three replicas: sessions stay, a full one refuses, one is killed in a conversation that goes on",
        "ray",
    ),
    Check(
        f"{HOSTILE} hostile clients",
        "",
        ("test_hostile_clients.py",),
        "requests and events of wrong types, sizes and order, damaged, half open: an error each, nothing left behind",
        "hostile",
    ),
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


def version(package: str, python: Path, modules: Path | None) -> str:
    """Of a client; a dash for what is no package, or is not there."""
    found = ""
    if package.startswith("npm:"):
        if modules is not None:
            found = json.loads((modules / package[4:] / "package.json").read_text())["version"]
    elif package:
        code = f"import importlib.metadata as m; print(m.version({package!r}))"
        found = subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()
        if package == "playwright" and (chromium := shutil.which("chromium") or shutil.which("google-chrome")):
            told = subprocess.check_output([chromium, "--version"], text=True).split()
            found = f"{next((word for word in told if word[0].isdigit()), '')}, {found}"
    return found or "-"


def run_tests(
    python: Path, group: str, checks: Sequence[Check], environment: Mapping[str, str]
) -> list[ElementTree.Element]:
    """Run the tests of checks in one process, as some make a bundle first; what pytest tells of each test."""
    files = dict.fromkeys(str(ROOT / SERVED / test.partition("::")[0]) for check in checks for test in check.tests)
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told.xml"
        options = ["-q", "-rs", "-p", "no:cacheprovider", f"--junitxml={told}", *GROUPS[group]]
        command = [str(python), "-m", "pytest", *options, *files]
        subprocess.run(command, cwd=ROOT, env={**os.environ, **environment})
        return list(ElementTree.parse(told).iter("testcase")) if told.exists() else []


def counted(check: Check, cases: Sequence[ElementTree.Element]) -> dict[str, int]:
    """How many tests of a check passed, failed and were skipped."""
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    for case in cases:
        name, module = case.get("name", ""), case.get("classname", "")
        if any(_is_of(test, module, name) for test in check.tests):
            ends = {child.tag for child in case}
            counts["failed" if ends & {"failure", "error"} else "skipped" if "skipped" in ends else "passed"] += 1
    return counts


def _is_of(test: str, module: str, name: str) -> bool:
    file, _, word = test.partition("::")
    wanted = f"{SERVED}/{file}".removesuffix(".py").replace("/", ".")
    return (module == wanted or module.startswith(f"{wanted}.")) and word in name


def measure(options: argparse.Namespace, found: Any) -> Iterator[Any]:
    """Install, and run the tests, one group after the other."""
    chosen = [check for check in CHECKS if not options.only or check.name in options.only]
    groups = dict.fromkeys(check.group for check in chosen)
    folder: Path = options.folder
    rows = {row["client"]: row for row in found.get("checks", ())}
    modules = install_for_node(folder / "node") if "clients" in groups else None
    environment = {"OMNIPORT_HOSTILE_CLIENTS": str(HOSTILE), "OMNIPORT_TEST_GRAPHS": str(folder / "graphs")}
    if modules is not None:
        environment["NODE_PATH"] = str(modules)
    for group in groups:
        python = install(folder / "ray", RAY) if group == "ray" else install(folder, CLIENTS)
        checks, begun = [check for check in chosen if check.group == group], time.perf_counter()
        cases = run_tests(python, group, checks, environment)
        print(f"{group}: {time.perf_counter() - begun:.0f} s", flush=True)
        for check in checks:
            told = {"client": check.name, "version": version(check.package, python, modules)}
            day = datetime.date.today().isoformat()
            rows[check.name] = {**told, "date": day, "shown": check.shown, **counted(check, cases)}
        kept = [rows[check.name] for check in CHECKS if check.name in rows]
        yield {"python": platform.python_version(), "system": platform.machine(), "checks": kept}
    if any(rows[check.name]["failed"] or not rows[check.name]["passed"] for check in chosen):
        sys.exit("a check failed, or had nothing to run")


def page(found: Any) -> str:
    """docs/results/serve-check.md"""
    head = ("client", "version", "checked", "passed", "failed", "skipped", "date")
    rows = [[row[key if key != "checked" else "shown"] for key in head] for row in found["checks"]]
    return "\n".join(
        [
            "# Clients that were tried",
            "",
            "Made by `make serve-check`: the clients of others, unmodified, hold conversations with `omniport serve`.",
            "Numbers are of tests. Most run over graphs whose replies are scripted. In some of each client's, and in",
            "the page, a question is spoken to Wren, the trained model: the words of its answer have to be right, and",
            "its speech is heard by a recogniser. Wren was taught no dictation: what writes down recordings is asked",
            "without its instruction there, and then has to write the answer to what it heard.",
            "",
            f"Python {found['python']} on {found['system']}.",
            "",
            *table(head, rows),
            "",
        ]
    )


if __name__ == "__main__":
    line = command_line(__doc__)
    line.add_argument("--folder", type=Path, default=ROOT / "build" / "clients", help="where to install")
    names = [check.name for check in CHECKS]
    line.add_argument("--only", nargs="*", choices=names, help="clients, as the page names them; all without it")
    record("serve-check", page, measure, line)
