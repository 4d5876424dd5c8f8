"""Kill commands at random moments, and look at what they leave: outputs are whole or absent, and the next run works.

Usage: python -m scripts.kills --checkpoint DIR --bundle DIR [--kills 10] [--seed 0] [--only export,run]

Each command runs in a fork of this process, which has the packages loaded already, so that a kill falls into the work
and not into the imports. After every kill what stands at the output must be whole; after SIGTERM and SIGINT nothing
else may be left beside it, but the work folder that a rerun goes on from. In the end the command runs to its end.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import wave
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from omniport.calib.calibration_file import Calibration
from omniport.cli.main import run
from omniport.runtime.bundle.reader import Bundle

#: what a kill is not to spend its time on
_LOADED = (
    "torch",
    "onnxscript",
    "onnxruntime",
    "transformers.models.auto.tokenization_auto",
    "omniport.export.exporter",
    "omniport.calib.calibrator",
    "omniport.calib.deployer",
    "omniport.calib.quantizer",
    "omniport.cli.show_reply",
)
_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def _whole_bundle(path: Path) -> None:
    Bundle.open(path, verify=True)


def _whole_calibration(path: Path) -> None:
    Calibration.load(path)


def _whole_sound(path: Path) -> None:
    with wave.open(str(path)) as sound:
        assert len(sound.readframes(sound.getnframes())) == sound.getnframes() * sound.getsampwidth() > 0


@dataclass(frozen=True)
class Case:
    """A command, and what is to be true of its output.

    Attributes:
        output: name of what it writes.
        kept: name of the work folder that a stopped run may leave.
        cold: nothing of an earlier run is in the caches, so that kills come while they are written, too.
    """

    name: str
    arguments: Sequence[str]
    output: str
    whole: Callable[[Path], None]
    kept: str = ""
    cold: bool = False


def cases(checkpoint: Path, bundle: Path, folder: Path) -> list[Case]:
    """The commands, writing into a folder."""

    def out(name: str) -> str:
        return str(folder / name)

    model, data = str(checkpoint), str(folder.parent / "data" / "calib.jsonl")
    sampled = ("--data", data, "--samples", "2", "--max-speech", "0.3")
    return [
        Case("export", ("export", model, out("bundle"), "-q"), "bundle", _whole_bundle),
        Case(
            "trace", ("export", model, out("part"), "--graphs", "audio_encoder", "-q"), "part", _whole_bundle, cold=True
        ),
        Case("quantize", ("quantize", str(bundle), out("small"), "--recipe", "w8", "-q"), "small", _whole_bundle),
        Case(
            "calibrate",
            ("calibrate", model, out("m.calib"), *sampled, "-q"),
            "m.calib",
            _whole_calibration,
            ".m.calib.work",
        ),
        Case(
            "run",
            ("run", str(bundle), "--text", "Hello", "--speak", out("reply.wav"), "--max-speech", "1"),
            "reply.wav",
            _whole_sound,
        ),
        Case(
            "deploy",
            ("deploy", model, out("device"), "--target", "cpu", "--recipe", "fp32", "--validate", "none", "-q"),
            "device",
            _whole_bundle,
            ".device.deploy",
        ),
    ]


def started(arguments: Sequence[str], log: Path) -> int:
    """Run a command in a fork; gives its process id."""
    process = os.fork()
    if process:
        return process
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    code = 101
    try:
        run(arguments)
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    finally:
        os._exit(code)


def ended(process: int) -> int:
    """Wait for a process; its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _clear(folder: Path, caches: bool) -> None:
    for gone in (folder, *([folder.parent / "cache"] if caches else [])):
        shutil.rmtree(gone, ignore_errors=True)
    folder.mkdir()


def strangers(case: Case, folder: Path) -> list[str]:
    """What lies beside the output."""
    return sorted(path.name for path in folder.iterdir() if path.name not in (case.output, case.kept))


def try_case(case: Case, folder: Path, kills: int, chance: random.Random) -> list[str]:
    """Kill a command again and again; gives what is wrong."""
    wrong, log = [], folder.parent / f"{case.name}.log"
    whole = 0.0
    for _ in range(2):  # the first one fills the caches
        begun = time.monotonic()
        _clear(folder, case.cold)
        if code := ended(started(case.arguments, log)):
            return [f"{case.name}: ends with {code}, see {log}"]
        whole = time.monotonic() - begun
    for number in range(kills):
        sign = _SIGNALS[number % len(_SIGNALS)]
        if chance.random() < 0.7:  # else it replaces what is there
            _clear(folder, case.cold)
        process, wait = started(case.arguments, log), chance.random() * whole
        time.sleep(wait)
        os.kill(process, sign)
        code, what = ended(process), f"{case.name}: {sign.name} after {wait:.2f} of {whole:.2f} s"
        print(f"{what}: exit {code}, left {sorted(path.name for path in folder.iterdir())}", flush=True)
        if sign != signal.SIGKILL and code not in (0, 130, 143):
            wrong.append(f"{what}: exit {code}")
        if (folder / case.output).exists():
            try:
                case.whole(folder / case.output)
            except Exception as error:  # noqa: BLE001 - whatever it is, the output is not whole
                wrong.append(f"{what}: {error!r}")
        if sign != signal.SIGKILL and (left := strangers(case, folder)):
            wrong.append(f"{what}: left {left}")
    if code := ended(started(case.arguments, log)):
        return [*wrong, f"{case.name}: the rerun ends with {code}, see {log}"]
    case.whole(folder / case.output)
    if left := [path.name for path in folder.iterdir() if path.name != case.output]:
        wrong.append(f"{case.name}: the rerun leaves {sorted(left)}")
    return wrong


def main() -> int:
    """Run the cases; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    asked = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="omniport-kills-"))
    os.environ["OMNIPORT_CACHE"] = str(root / "cache")
    for module in _LOADED:
        importlib.import_module(module)
    if code := ended(started(("calibrate", "--sample-data", str(root / "data")), root / "data.log")):
        print(f"the samples end with {code}, see {root}")
        return 1
    wrong: list[str] = []
    for case in cases(asked.checkpoint, asked.bundle, root / "out"):
        if asked.only and case.name not in asked.only.split(","):
            continue
        wrong += try_case(case, root / "out", asked.kills, random.Random(f"{case.name} {asked.seed}"))
    cache = [path for path in (root / "cache").rglob("*partial*") if path.is_file()]
    print("\n".join(wrong) or "nothing is wrong", f"\n{len(cache)} unfinished files in the cache")
    if wrong:
        return 1
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
