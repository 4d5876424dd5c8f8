"""A 64-bit Arm machine under emulation: extras installed, doctor, `build --check`, and a whole reply token for token.

    python -m benchmarks.aarch64 [--work .work/aarch64]     # make aarch64-check; writes docs/results/aarch64.md

Needs a Debian or Ubuntu machine (apt-get, dpkg) that reaches Debian's archive and a package index; nothing is installed
on it. Emulator, Python and its libraries are Debian's, unpacked into the work folder; wheels are those that a board
would get. The emulator is that of Debian 13: under the 7.2 of Debian 12, ONNX Runtime 1.32 crashes when it is imported.
Seconds under emulation say nothing of a board.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .harness import ROOT, command_line, record, table

ARCHIVE = "http://deb.debian.org/debian"
KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"
#: Python -> Debian's release that has it. 3.10 is in no release: that its wheels resolve is `make extras`.
RELEASES = {"3.11": "bookworm", "3.13": "trixie"}
LIBRARIES = ("libstdc++6", "libgomp1", "libportaudio2")
EXTRAS = ("ort", "media", "live", "serve", "wyoming")
#: what `build` needs of the extra `trt`, whose libraries are JetPack's, or on an index of NVIDIA's
BESIDE = ("onnx",)
PLATFORMS = ("linux_aarch64", "manylinux2014_aarch64", *(f"manylinux_2_{n}_aarch64" for n in (17, 24, 26, 27, 28)))
#: glibc of the release -> more of them
NEWER = {"bookworm": (31, 34, 35), "trixie": (31, 34, 35, 38, 39)}
BOARDS = ("jetson-orin-nano-8gb", "jetson-agx-orin-64gb")

#: arguments: bundle, picture, sound, where the samples go
REPLY = """
import json, sys, time
import numpy as np
from omniport.runtime import AudioChunk, Done, OmniSession, SamplingConfig
bundle, picture, sound, out = sys.argv[1:]
begun = time.perf_counter()
with OmniSession.open(bundle, threads=1) as session:
    content = [{"type": "image", "image": picture}, {"type": "audio", "audio": sound}]
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=12)
    events = list(session.reply([{"role": "user", "content": content}], thinker=greedy,
                                talker=SamplingConfig(temperature=0.0, max_new_tokens=60), seed=1, ignore_stop=True))
samples = np.concatenate([event.samples for event in events if isinstance(event, AudioChunk)])
done = next(event for event in events if isinstance(event, Done))
np.save(out, samples)
print(json.dumps({"tokens": done.token_ids, "codes": done.codec_ids, "seconds": time.perf_counter() - begun}))
"""


class Debian:
    """Packages of a release for an architecture, unpacked into a folder without installing them."""

    def __init__(self, folder: Path, release: str, architecture: str) -> None:
        self.root = folder / "root"
        self._folder = folder
        state = folder / "apt"
        for made in (state / "lists" / "partial", state / "cache" / "archives" / "partial", self.root):
            made.mkdir(parents=True, exist_ok=True)
        (state / "sources.list").write_text(f"deb [signed-by={KEYS}] {ARCHIVE} {release} main\n")
        (state / "status").touch()
        options = {
            "Dir::State": state,
            "Dir::State::status": state / "status",
            "Dir::State::lists": state / "lists",
            "Dir::Cache": state / "cache",
            "Dir::Etc::sourcelist": state / "sources.list",
            "Dir::Etc::sourceparts": "-",
            "APT::Architecture": architecture,
            "APT::Architectures": architecture,
            "APT::Sandbox::User": "root",
            "Debug::NoLocking": "true",
        }
        self._options = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        self._archives = state / "cache" / "archives"

    def unpack(self, *packages: str, alone: bool = False) -> None:
        """Packages with all that they need, or ``alone``."""
        self._apt("update")
        if alone:
            self._apt("download", *packages, folder=self._archives)
        else:
            self._apt("install", "--no-install-recommends", "--download-only", "-y", *packages)
        for name in ("bin", "sbin", "lib"):  # links that a whole system has
            if not (self.root / name).exists():
                (self.root / "usr" / name).mkdir(parents=True, exist_ok=True)
                (self.root / name).symlink_to(f"usr/{name}")
        for archive in sorted(self._archives.glob("*.deb")):
            listed = subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE, check=True)
            # not dpkg -x: it replaces a link to a folder by a folder
            subprocess.run(["tar", "-x", "--keep-directory-symlink"], cwd=self.root, input=listed.stdout, check=True)

    def _apt(self, *words: str, folder: Path | None = None) -> None:
        subprocess.run(["apt-get", "-qq", *self._options, *words], check=True, cwd=folder)


class Board:
    """Python for aarch64 with omniport, run by the emulator."""

    def __init__(self, work: Path, emulator: Path, python: str) -> None:
        self.python, self._emulator = python, emulator
        release = RELEASES[python]
        system = Debian(work / release, release, "arm64")
        self._root, self._site = system.root, work / release / "site"
        if not (self._root / "usr" / "bin" / f"python{python}").exists():
            system.unpack(f"python{python}", *LIBRARIES)
        self._platforms = (*PLATFORMS, *(f"manylinux_2_{n}_aarch64" for n in NEWER[release]))

    def install(self, wheel: Path) -> None:
        """omniport with the extras of a board."""
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target", str(self._site)]
        command += ["--only-binary=:all:", "--implementation=cp", f"--python-version={self.python}"]
        command += [f"--platform={name}" for name in self._platforms]
        subprocess.run([*command, f"{wheel}[{','.join(EXTRAS)}]", *BESIDE], check=True)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Python with arguments."""
        program = self._root / "usr" / "bin" / f"python{self.python}"
        command = [str(self._emulator), "-L", str(self._root), str(program), *arguments]
        variables = {**os.environ, "PYTHONPATH": str(self._site), "QEMU_LD_PREFIX": str(self._root)}
        return subprocess.run(command, capture_output=True, text=True, env=variables, cwd=self._site)

    def omniport(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command."""
        return self.run("-m", "omniport.cli", *arguments, "--json", "-q")


def reply(run: Callable[..., subprocess.CompletedProcess[str]], bundle: Path, media: Path, out: Path) -> dict[str, Any]:
    """A greedy reply to a picture and a sound; ``run`` gives Python its arguments."""
    done = run("-c", REPLY, str(bundle), str(media / "picture.png"), str(media / "question.wav"), str(out))
    if done.returncode:
        raise SystemExit(f"no reply:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """This machine's Python."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


def measure(options: argparse.Namespace, _: Any) -> Iterator[Any]:
    work: Path = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    emulator = Debian(work / "emulator", "trixie", "amd64")
    program = emulator.root / "usr" / "bin" / "qemu-aarch64"
    if not program.exists():
        emulator.unpack("qemu-user", alone=True)
    version = subprocess.run([program, "--version"], stdout=subprocess.PIPE, text=True, check=True).stdout
    wheels = work / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(wheels), str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = wheels.glob("omniport-*.whl")
    bundle, media = _bundle(work)
    wanted = reply(here, bundle, media, work / "here.npy")
    result: dict[str, Any] = {"emulator": version.splitlines()[0], "host": platform.machine(), "pythons": {}}
    for python in options.pythons.split(","):
        board = Board(work, program, python)
        begun = time.perf_counter()
        board.install(wheel)
        row: dict[str, Any] = {"install": round(time.perf_counter() - begun, 1)}
        doctor = board.omniport("doctor")
        row["doctor"] = [b["name"] for b in json.loads(doctor.stdout)["backends"] if b["can_run"]]
        checks = {name: board.omniport("build", str(bundle), "--target", name, "--check") for name in BOARDS}
        row["checks"] = {n: {"code": c.returncode, "said": c.stderr.strip()} for n, c in checks.items()}
        got = reply(board.run, bundle, media, work / "there.npy")
        row["reply"] = compared(wanted, got, np.load(work / "here.npy"), np.load(work / "there.npy"))
        result["pythons"][python] = row
        yield result
        if not row["reply"]["same_tokens"] or not row["reply"]["same_codes"] or not row["doctor"]:
            raise SystemExit(f"Python {python} on aarch64: {row['reply']}, doctor: {doctor.stderr or row['doctor']}")


def compared(wanted: dict[str, Any], got: dict[str, Any], here: Any, there: Any) -> dict[str, Any]:
    """Two replies; the loudness says that there is something to compare."""
    assert np.sqrt(np.mean(np.square(here))) > 1e-3, "the reply is silent"
    same = here.shape == there.shape
    return {
        "tokens": len(wanted["tokens"]),
        "codes": len(wanted["codes"]),
        "same_tokens": wanted["tokens"] == got["tokens"],
        "same_codes": wanted["codes"] == got["codes"],
        "sound": float(np.abs(here - there).max()) if same else None,
        "peak": float(np.abs(here).max()),
        "seconds": [round(wanted["seconds"], 1), round(got["seconds"], 1)],
    }


def _bundle(work: Path) -> tuple[Path, Path]:
    """A tiny bundle with random weights, and a picture and a sound to ask about."""
    from scripts.sample_media import make_media

    bundle, media = work / "bundle", work / "media"
    if not bundle.exists():
        for words in ((f"make-checkpoint {work}/tiny --size tiny"), (f"export {work}/tiny {bundle}")):
            subprocess.run([sys.executable, "-m", "omniport.cli", *words.split(), "-q"], check=True)
    make_media(media)
    return bundle, media


def page(found: Any) -> str:
    """docs/results/aarch64.md"""
    lines = [
        "# A 64-bit Arm machine under emulation",
        "",
        "Made by `make aarch64-check` (`python -m benchmarks.aarch64`). "
        f"Emulator: {found['emulator']}, on {found['host']}.",
        "",
        f"Installed: omniport with the extras {', '.join(EXTRAS)}, and {', '.join(BESIDE)}, from wheels for aarch64.",
        "The reply is that of a `tiny` bundle with random weights to a picture and a spoken question, in FP32 on ONNX",
        "Runtime, compared token for token and sample for sample with the same reply on x86-64. Seconds are those of",
        "the emulator on a shared machine; they say nothing of a board.",
        "",
    ]
    rows = [
        [python, f"{row['install']} s", ", ".join(row["doctor"]), *(_ended(c) for c in row["checks"].values())]
        for python, row in found["pythons"].items()
    ]
    head = ["Python", "install", "`doctor`: can run here", *(f"`build --check`, {name}" for name in BOARDS)]
    lines += [*table(head, rows), ""]
    replies = [
        [
            python,
            f"{r['tokens']}, {'equal' if r['same_tokens'] else 'DIFFERENT'}",
            f"{r['codes']}, {'equal' if r['same_codes'] else 'DIFFERENT'}",
            "other length" if r["sound"] is None else f"{r['sound']:.1e} of {r['peak']:.2f}",
            f"{r['seconds'][0]} s and {r['seconds'][1]} s",
        ]
        for python, r in ((python, row["reply"]) for python, row in found["pythons"].items())
    ]
    head = ["Python", "text tokens", "codec tokens", "largest difference of the sound", "x86-64 and emulated"]
    lines += [*table(head, replies), ""]
    lines += [
        "Python 3.10, that of JetPack 6, is in no release of Debian: `make extras` resolves its wheels, and nothing"
    ]
    return "\n".join([*lines, "of it was run on aarch64.", ""])


def _ended(done: dict[str, Any]) -> str:
    return f"exit code {done['code']}" + (f": {done['said']}" if done["said"] else "")


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("--work", type=Path, default=Path(".work/aarch64"))
    parser.add_argument("--pythons", default=",".join(RELEASES), help="comma-separated")
    record("aarch64", page, measure, parser)
