"""Kill commands at random moments, and look at what they leave: outputs are whole or absent, and the next run works.

Usage: python -m scripts.kills --checkpoint DIR --bundle DIR [--kills 50] [--seed 0] [--only export,run] [--page]
       --kills export=30,run=80: so many of these, in this order

Each command runs in a fork of this process, which has the packages loaded already, so that a kill falls into the work
and not into the imports. After every kill what stands at the output must be whole, with the notes that somebody put
into an earlier one, and an earlier one must not be gone; after SIGTERM and SIGINT nothing else may be left beside it,
but the work folder that a rerun goes on from. In the end the command runs to its end. --page writes
docs/results/kills.md.
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
import traceback
import wave
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
#: in a bundle, of somebody else: what replaces the bundle keeps it
_NOTES = "notes.txt"
PAGE = Path("docs/results/kills.md")
HEAD = """# Commands killed at random moments

Written by `make kills` (`python -m scripts.kills --page`). Each command is sent SIGKILL, SIGTERM and SIGINT in turn, at
a random moment of the time that it takes on the tiny checkpoint. In three of ten runs it replaces an earlier output,
which holds a file of somebody else's where it is a folder. What is at the output's place afterwards has to be whole (a
bundle by its hashes), and the earlier one or the new one where there was one; after SIGTERM and SIGINT nothing may lie
beside it but the work folder from which `calibrate` and `deploy` go on. In the end the command runs once more, and has
to leave its output and nothing else. `trace` is an export of one graph with nothing in the caches.

"""


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
        other: options with which an earlier output is made, so that there is something to do where it stands.
    """

    name: str
    arguments: Sequence[str]
    output: str
    whole: Callable[[Path], None]
    kept: str = ""
    cold: bool = False
    other: Sequence[str] = ()


def cases(checkpoint: Path, bundle: Path, folder: Path) -> list[Case]:
    """The commands, writing into a folder."""

    def out(name: str) -> str:
        return str(folder / name)

    model, data = str(checkpoint), str(folder.parent / "data" / "calib.jsonl")
    sampled = ("--data", data, "--samples", "1", "--max-speech", "0.1")
    return [
        Case("export", ("export", model, out("bundle"), "-q"), "bundle", _whole_bundle, other=("--max-context", "512")),
        Case(
            "trace", ("export", model, out("part"), "--graphs", "audio_encoder", "-q"), "part", _whole_bundle, cold=True
        ),
        Case("quantize", ("quantize", str(bundle), out("small"), "--recipe", "w8", "-q"), "small", _whole_bundle),
        Case(
            "run",
            ("run", str(bundle), "--text", "Hello", "--speak", out("reply.wav"), "--max-speech", "1"),
            "reply.wav",
            _whole_sound,
        ),
        Case(
            "calibrate",
            ("calibrate", model, out("m.calib"), *sampled, "-q"),
            "m.calib",
            _whole_calibration,
            ".m.calib.work",
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
    except BaseException:  # noqa: BLE001 - nothing of it may come into the caller
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(process: int) -> int:
    """Wait for a process; its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _clear(folder: Path, caches: bool) -> None:
    for gone in (folder, *([folder.parent / "cache"] if caches else [])):
        shutil.rmtree(gone, ignore_errors=True)
    folder.mkdir()


def _put(earlier: Path, folder: Path) -> None:
    """An earlier output, with what somebody else has put into it."""
    shutil.rmtree(folder)
    shutil.copytree(earlier, folder, copy_function=shutil.copyfile)
    for output in folder.iterdir():
        if output.is_dir():
            (output / _NOTES).write_text("mine")


def strangers(case: Case, folder: Path) -> list[str]:
    """What lies beside the output."""
    return sorted(path.name for path in folder.iterdir() if path.name not in (case.output, case.kept))


@dataclass
class Tally:
    """What came of the kills of one command.

    Attributes:
        seconds, again: that the command takes when nobody kills it; where there is an earlier output.
        left: outcomes, counted.
    """

    seconds: float = 0.0
    again: float = 0.0
    left: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        """Signals that were sent."""
        return sum(self.left.values())


class _Failed(Exception):
    """A command that nobody killed."""


def _run(name: str, arguments: Sequence[str], log: Path) -> float:
    """Run a command to its end; the seconds that it took."""
    begun = time.monotonic()
    if code := ended(started(arguments, log)):
        raise _Failed(f"{name}: ends with {code}, see {log}")
    return time.monotonic() - begun


def try_case(case: Case, folder: Path, kills: int, chance: random.Random) -> Tally:
    """Kill a command again and again."""
    tally, log = Tally(), folder.parent / f"{case.name}.log"
    earlier = folder.parent / f"{case.name}.earlier"
    try:
        _clear(folder, case.cold)
        _run(case.name, (*case.arguments, *case.other), log)
        folder.rename(earlier)
        _clear(folder, case.cold)
        tally.seconds = _run(case.name, case.arguments, log)
        _put(earlier, folder)
        tally.again = _run(case.name, case.arguments, log)
        for number in range(kills):
            seconds = tally.seconds
            _clear(folder, case.cold)
            if chance.random() < 0.3:
                _put(earlier, folder)
                seconds = tally.again
            _kill(case, folder, log, _SIGNALS[number % len(_SIGNALS)], chance.random() * seconds, tally)
        _run(case.name, case.arguments, log)
    except _Failed as error:
        tally.wrong.append(str(error))
        return tally
    case.whole(folder / case.output)
    if left := [path.name for path in folder.iterdir() if path.name != case.output]:
        tally.wrong.append(f"{case.name}: the last run leaves {sorted(left)}")
    return tally


def _kill(case: Case, folder: Path, log: Path, sign: signal.Signals, wait: float, tally: Tally) -> None:
    """Run the command, kill it after so many seconds, and look at what is there."""
    output = folder / case.output
    before = output.stat() if output.exists() else None
    noted = (output / _NOTES).exists()
    process = started(case.arguments, log)
    time.sleep(wait)
    os.kill(process, sign)
    code, what = ended(process), f"{case.name}: {sign.name} after {wait:.2f} s, earlier output: {before is not None}"
    print(f"{what}: exit {code}, left {sorted(path.name for path in folder.iterdir())}", flush=True)
    wrong: list[str] = []
    if sign != signal.SIGKILL and code not in (0, 130, 143):
        wrong.append(f"exit {code}")
    if output.exists():
        try:
            case.whole(output)
        except Exception as error:  # noqa: BLE001 - whatever it is, the output is not whole
            wrong.append(repr(error))
        if noted and not (output / _NOTES).exists():
            wrong.append("somebody else's file is gone")
    elif before is not None:
        wrong.append("the earlier output is gone")
    if sign != signal.SIGKILL and (left := strangers(case, folder)):
        wrong.append(f"left {left}")
    tally.left[_outcome(before, output, code)] += 1
    tally.wrong += [f"{what}: {fault}" for fault in wrong]


def _outcome(before: os.stat_result | None, output: Path, code: int) -> str:
    if code == 0:
        return "ended first"
    if not output.exists():
        return "no output"
    after = output.stat()
    same = before is not None and (before.st_ino, before.st_dev) == (after.st_ino, after.st_dev)
    return "earlier output" if same else "new output"


def page(tallies: dict[str, Tally], unfinished: int, seed: int) -> str:
    """The figures."""
    outcomes = ("no output", "earlier output", "new output", "ended first")
    wrong = sum(len(tally.wrong) for tally in tallies.values())
    total = sum(tally.kills for tally in tallies.values())
    lines = [f"{total} kills, seed {seed}: {f'**{wrong} faults**' if wrong else 'nothing was lost or left'}.", ""]
    lines += [
        "| command | takes | where one was before | kills | no output yet | earlier output | new output | it had ended "
        "| faults |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, tally in tallies.items():
        cells = [
            f"{tally.seconds:.1f} s",
            f"{tally.again:.1f} s",
            tally.kills,
            *(tally.left[outcome] for outcome in outcomes),
        ]
        lines.append(f"| {name} | {' | '.join(map(str, cells))} | {len(tally.wrong)} |")
    lines += ["", f"{unfinished} unfinished files were left in the cache of traced graphs.", ""]
    return HEAD + "\n".join(lines)


def _unfinished(root: Path) -> int:
    return sum(path.is_file() for path in (root / "cache").rglob("*partial*"))


def _plan(asked: str, known: Sequence[Case]) -> list[tuple[Case, int]]:
    """How often to kill which command, of ``50`` or ``export=30,run=80``."""
    if asked.isdigit():
        return [(case, int(asked)) for case in known]
    named = {case.name: case for case in known}
    return [(named[name], int(count)) for name, _, count in (one.partition("=") for one in asked.split(","))]


def main() -> int:
    """Run the cases; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--kills", default="50")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--page", action="store_true")
    asked = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="omniport-kills-"))
    os.environ["OMNIPORT_CACHE"] = str(root / "cache")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # small graphs are no faster by more, and slower on busy cores
    for module in _LOADED:
        importlib.import_module(module)
    if code := ended(started(("calibrate", "--sample-data", str(root / "data")), root / "data.log")):
        print(f"the samples end with {code}, see {root}")
        return 1
    tallies: dict[str, Tally] = {}
    for case, kills in _plan(asked.kills, cases(asked.checkpoint, asked.bundle, root / "out")):
        if not asked.only or case.name in asked.only.split(","):
            tallies[case.name] = try_case(case, root / "out", kills, random.Random(f"{case.name} {asked.seed}"))
            if asked.page:  # after each: a long run that is stopped leaves what it has counted
                PAGE.write_text(page(tallies, _unfinished(root), asked.seed))
    unfinished = _unfinished(root)
    wrong = [fault for tally in tallies.values() for fault in tally.wrong]
    print("\n".join(wrong) or "nothing is wrong", f"\n{unfinished} unfinished files in the cache")
    if wrong:
        return 1
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
