"""https with a certificate that is made here, or with the operator's."""

from __future__ import annotations

import builtins
import datetime
import os
import socket
import ssl
import stat
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from omniport.runtime.errors import UsageError
from omniport.serve import tls
from support.served_process import stacks, start
from websockets.sync.client import connect

x509 = pytest.importorskip("cryptography.x509")


def names(certificate: Path) -> tuple[set[str], set[str]]:
    held = x509.load_pem_x509_certificate(certificate.read_bytes())
    known = held.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return set(known.get_values_for_type(x509.DNSName)), {
        str(address) for address in known.get_values_for_type(x509.IPAddress)
    }


def test_a_certificate_is_made_once(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "state"
    certificate, key = tls.self_signed(folder, "127.0.0.1")
    if os.name == "posix":
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    before = certificate.read_bytes(), key.read_bytes()
    assert tls.self_signed(folder, "127.0.0.1") == (certificate, key)
    assert (certificate.read_bytes(), key.read_bytes()) == before
    assert names(certificate) == ({"localhost"}, {"127.0.0.1", "::1"})
    assert 800 < tls.days_left(certificate) < 826
    assert sorted(path.name for path in folder.iterdir()) == ["tls-certificate.pem", "tls-key.pem"]


def test_it_names_what_is_listened_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "Board")
    monkeypatch.setattr(tls, "_own_addresses", lambda: [tls.ipaddress.ip_address("192.168.1.7")])
    certificate, _ = tls.self_signed(tmp_path, "0.0.0.0")
    assert names(certificate) == ({"localhost", "board", "board.local"}, {"127.0.0.1", "::1", "192.168.1.7"})
    before = certificate.read_bytes()
    tls.self_signed(tmp_path, "127.0.0.1")
    assert certificate.read_bytes() == before, "it names that, too"
    certificate, _ = tls.self_signed(tmp_path, "box.example")
    assert "box.example" in names(certificate)[0]


@pytest.mark.parametrize("harm", ["expires soon", "another key", "no certificate", "no key", "not text"])
def test_one_that_is_of_no_use_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str) -> None:
    if harm == "expires soon":
        monkeypatch.setattr(tls, "_DAYS", 29)
    certificate, key = tls.self_signed(tmp_path, "127.0.0.1")
    monkeypatch.undo()
    if harm == "another key":
        key.write_bytes(tls.self_signed(tmp_path / "other", "127.0.0.1")[1].read_bytes())
    if harm.startswith("no "):
        (key if harm == "no key" else certificate).unlink()
    if harm == "not text":
        certificate.write_bytes(b"\xff\0")
    tls.self_signed(tmp_path, "127.0.0.1")
    tls.check_pair(certificate, key)
    assert tls.days_left(certificate) > 30


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--state"):
        tls.self_signed(tmp_path / "file", "127.0.0.1")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name.startswith("cryptography"):
            raise ImportError("no module named cryptography")
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"omniport\[serve\]'.*--tls-cert FILE --tls-key FILE"):
        tls.self_signed(tmp_path, "127.0.0.1")


def test_files_that_are_no_pair(tmp_path: Path) -> None:
    certificate, key = tls.self_signed(tmp_path / "a", "127.0.0.1")
    other = tls.self_signed(tmp_path / "b", "127.0.0.1")[1]
    closed = tmp_path / "closed.pem"
    from cryptography.hazmat.primitives import serialization

    secret = serialization.load_pem_private_key(key.read_bytes(), None)
    form = serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"word")
    closed.write_bytes(secret.private_bytes(serialization.Encoding.PEM, *form))
    for pair in ((certificate, other), (certificate, closed), (key, key), (tmp_path / "none", key), (tmp_path, key)):
        with pytest.raises(UsageError):
            tls.check_pair(*pair)
    tls.check_pair(certificate, key)


@pytest.mark.parametrize("which", [0, 1])
def test_a_certificate_is_a_regular_file(tmp_path: Path, which: int) -> None:
    """Of a device or a pipe OpenSSL would read for ever."""
    pair = [*tls.self_signed(tmp_path, "127.0.0.1")]
    pair[which] = Path(os.devnull)
    with pytest.raises(UsageError, match="not a regular file"):
        tls.check_pair(*pair)


def test_the_state_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/x")
    if os.name == "posix":
        assert tls.state_folder() == Path("/x/omniport")
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/omniport:/var/lib/other")
    assert tls.state_folder() == Path("/var/lib/omniport")


def test_https_and_wss(root: Path, stopped: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    process = start(root, "--quiet", "--tls-self-signed", "--state", str(tmp_path))
    stopped.append(process)
    assert process.stdout is not None
    url, told = process.stdout.readline().strip(), process.stdout.readline().strip()
    certificate = tmp_path / "tls-certificate.pem"
    assert url.startswith("https://127.0.0.1:"), process.communicate()
    assert told == f"certificate: SHA-256 {tls.fingerprint(certificate)}"
    trusting = ssl.create_default_context(cafile=str(certificate))
    trusting.verify_flags |= ssl.VERIFY_X509_STRICT
    due = datetime.datetime.now() + datetime.timedelta(seconds=60)
    with httpx.Client(verify=trusting) as client:
        while client.get(f"{url}/ready").status_code != 200:
            assert datetime.datetime.now() < due
    try:
        with connect(url.replace("https", "wss") + "/v1/realtime", ssl=trusting, open_timeout=60) as connection:
            assert "session.created" in str(connection.recv(60))
    except TimeoutError:
        pytest.fail(stacks(process))
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/ready")
    process.terminate()
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [(["--tls-cert", "a.pem"], "go together"), (["--tls-self-signed", "--tls-key", "a.pem"], "leave --tls-cert")],
)
def test_options_that_do_not_go_together(
    root: Path, stopped: list[subprocess.Popen[str]], arguments: list[str], problem: str
) -> None:
    process = start(root, "--quiet", *arguments)
    stopped.append(process)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert problem in err
