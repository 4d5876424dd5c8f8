"""Schemathesis over /openapi.json: what the document allows, and what it forbids. It is no part of the `test` extra.

A body may be all that its schema asks for and hold a recording that is none, so that what the document allows may be
refused; what it forbids has to be.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.served import Served

pytest.importorskip("schemathesis", reason="schemathesis is not installed: run make serve-check")
OPTIONS = {
    "--exclude-path": "/v1/omniport/drain",  # the server would refuse the rest
    "--exclude-checks": "positive_data_acceptance",
    "--phases": "coverage,fuzzing",
    "--max-examples": "60",
    "--request-timeout": "30",
}


@pytest.mark.slow
def test_what_is_served_is_what_is_described(served: Served, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{served.url}/openapi.json"]
    command += [word for pair in OPTIONS.items() for word in pair]
    command += ["--exclude-path", "/openapi.json"]  # some versions leave the document out by themselves
    flags = ["--generation-deterministic", "--continue-on-failure", "--no-color", "--warnings", "off"]
    done = subprocess.run(
        [*command, *flags],
        cwd=tmp_path,  # it leaves a folder there
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout
    paths = served.http().get("/openapi.json").json()["paths"]
    assert f"Tested: {sum(map(len, paths.values())) - 2}" in done.stdout, done.stdout
    assert served.service.state == "ready"
    assert served.quiet()
