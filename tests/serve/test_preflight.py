"""What `omniport serve --check` finds, and says what to do about."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path

import pytest
from omniport.serve import preflight
from omniport.serve.preflight import Finding, examine
from omniport.serve.settings import Settings
from support.served_process import start


def found(
    root: Path, settings: Settings, max_context: int | None = None, key_file: Path | None = None
) -> dict[str, Finding]:
    findings = list(examine(root, settings, max_context, key_file))
    assert all(bool(finding.remedy) != finding.ok for finding in findings)
    return {finding.name: finding for finding in findings}


def test_all_is_well(root: Path) -> None:
    findings = found(root, Settings(port=0))
    assert all(finding.ok for finding in findings.values()), findings
    assert findings.keys() == {"bundle", "voices", "context", "memory", "access", "address", "media", "turns"}
    assert "KV caches" in findings["memory"].detail


def test_what_is_wrong(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("sk-1\n")
    keys.chmod(0o644)
    monkeypatch.setattr(preflight, "total_memory", lambda: 1 << 20)
    (tmp_path / "cert.pem").write_text("none")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = Settings(
            port=port,
            wyoming=("127.0.0.1", port),
            keys=("sk-1",),
            voices={"nova": "Nobody"},
            certificate=tmp_path / "cert.pem",
            certificate_key=tmp_path / "cert.pem",
        )
        findings = found(root, settings, 1 << 20, keys)
    wrong = {name: finding.remedy for name, finding in findings.items() if not finding.ok}
    assert wrong.keys() == {"voices", "context", "memory", "key file", "address", "wyoming", "certificate"}
    assert "chmod 600" in wrong["key file"]
    assert "2048" in wrong["context"]


def test_a_certificate_that_expires(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cryptography")
    from omniport.serve import tls

    certificate, key = tls.self_signed(tmp_path, "127.0.0.1")
    settings = Settings(port=0, certificate=certificate, certificate_key=key)
    assert found(root, settings)["certificate"].ok
    monkeypatch.setattr(preflight, "days_left", lambda _: 3.0)
    assert "in 3 days" in found(root, settings)["certificate"].detail


def test_a_bundle_that_is_none(tmp_path: Path) -> None:
    findings = found(tmp_path, Settings(port=0))
    assert not findings["bundle"].ok
    assert "memory" not in findings


def test_the_command(root: Path, stopped: list[subprocess.Popen[str]]) -> None:
    process = start(root, "--check", "--json")
    stopped.append(process)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    told = json.loads(out)
    assert told["ok"]
    assert told["findings"][0].keys() == {"name", "ok", "detail", "remedy"}
    process = start(root, "--check", "--voice", "nova=Nobody")
    stopped.append(process)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "problem voices: Ethan, Chelsie; not there: Nobody\n        to do: correct --voice\n" in out
    process = start(root, "--check", "--host", "0.0.0.0")
    stopped.append(process)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "--no-auth" in out
    process = start(root, "--json")
    stopped.append(process)
    assert process.wait(60) == 2
