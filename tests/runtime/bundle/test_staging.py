"""Folders that are replaced as a whole: whenever the process is killed, one version of them is there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from omniport.runtime.bundle import staging as staging_module
from omniport.runtime.bundle.staging import recover, staging
from omniport.runtime.system.files import exchange
from support.interpreters import in_fresh_python

#: replaces a folder again and again, in a process that is killed: at its n-th step, then at random moments
KILLS = """
import os, random, signal, sys, time
from pathlib import Path
from omniport.runtime.bundle import staging as module
from omniport.runtime.bundle.staging import recover, staging, take_over

out, kills, one_step = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "one step"
if not one_step:
    module.exchange = lambda fresh, target: False
draw = random.Random(0)

def write(version):
    with staging(out) as folder:
        for name in ("graph", "weights", "manifest"):
            (folder / name).write_text(str(version))
        take_over(out / "engines" / "talker.engine", folder / "engines" / "talker.engine")

def killed(version, step, moment):
    process = os.fork()
    if not process:
        count = 0
        def hook(event, _):
            nonlocal count
            if event.startswith(("os.", "open", "shutil.", "ctypes.", "tempfile.")):
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        write(version)
        os._exit(0)
    if moment:
        time.sleep(moment)
        os.kill(process, signal.SIGKILL)
    return os.waitpid(process, 0)[1] != 0

(out / "engines").mkdir(parents=True)
(out / "engines" / "talker.engine").write_text("hours of building")
write(0)
started = time.perf_counter()
write(0)
usual = time.perf_counter() - started
before, deaths, gone, step, version = 0, 0, 0, 1, 0
while step or deaths < kills:
    version += 1
    died = killed(version, step, 0 if step else draw.uniform(0.1, 1.5) * usual)
    step = step + 1 if step and died else 0  # at every step, until it ends before
    deaths += died
    gone += not out.exists()
    recover(out)
    found = {path.name: path.read_text() for path in out.rglob("*") if path.is_file()}
    assert found.pop("talker.engine") == "hours of building", found
    (content,) = set(found.values())
    assert len(found) == 3 and int(content) in ((before, version) if died else (version,)), (found, before, version)
    before = int(content)
    assert [path.name for path in out.parent.iterdir()] == [out.name]
print(deaths, gone)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked and killed")
@pytest.mark.parametrize("how", ["one step", "two renames"])
def test_kills_lose_nothing(tmp_path: Path, how: str) -> None:
    count = int(os.environ.get("OMNIPORT_KILLS", "60"))
    deaths, gone = map(int, in_fresh_python(KILLS, tmp_path / "room" / "bundle", str(count), how).split())
    assert deaths >= count
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    if how == "two renames":
        assert gone > 0, "a kill came between two renames, so that putting back was tried"
    elif exchange(tmp_path / "a", tmp_path / "b"):
        assert gone == 0, "one version is there at every moment"


def test_files_are_on_the_disk_before_names_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(staging_module, "sync", lambda path: events.append(path.name))
    monkeypatch.setattr(staging_module, "exchange", lambda *_: bool(events.append("exchange")) or False)
    out = tmp_path / "bundle"
    for _ in range(2):
        with staging(out) as folder:
            (folder / "graphs").mkdir()
            (folder / "graphs" / "a.onnx").write_text("a")
    assert events == ["graphs", "a.onnx", "new", tmp_path.name, "graphs", "a.onnx", "new", "exchange", tmp_path.name]


def test_an_export_under_way_is_not_swept(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    with staging(out) as folder:
        (folder / "file").write_text("new")
        recover(out)
        assert folder.exists()
    assert (out / "file").read_text() == "new"


def test_two_write_the_same_folder_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them ends well, and the later one stays, whichever moment the other one chooses."""
    out, exists, lock = tmp_path / "bundle", Path.exists, staging_module.path_lock

    def write(version: str) -> None:
        with staging(out) as folder:
            (folder / "file").write_text(version)

    def swept(folder: Path) -> int | None:
        monkeypatch.setattr(staging_module, "path_lock", lock)
        recover(out)
        return lock(folder)

    monkeypatch.setattr(staging_module, "path_lock", swept)
    with staging(out) as folder:
        (folder / "file").write_text("first")
        monkeypatch.setattr(Path, "exists", lambda path: _there(path))

        def _there(path: Path) -> bool:
            monkeypatch.setattr(Path, "exists", exists)
            write("second")
            return path != out

    assert (out / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
