"""Certificates: those of the operator, or one that is made and kept here, for a browser's microphone needs https."""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import os
import socket
import ssl
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from omniport.runtime.errors import UsageError
from omniport.runtime.system.files import read_file, replace_file

#: days for which a certificate is made, the most that phones take; it is made anew when so many are left
_DAYS, _LEFT = 825, 30
#: bytes of a file of certificates or a key, at most
_MOST = 1 << 20
#: nobody's addresses: which of ours would be used to reach them, nothing is sent
_ELSEWHERE = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))
_Name = str | ipaddress.IPv4Address | ipaddress.IPv6Address


def state_folder() -> Path:
    """Where the server keeps what it made: systemd's ``StateDirectory=``, or the user's folder for that."""
    if given := os.environ.get("STATE_DIRECTORY"):
        return Path(given.partition(":")[0])
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "omniport"
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "omniport"


def self_signed(folder: Path, host: str) -> tuple[Path, Path]:
    """A certificate and its key, made at the first time and kept.

    It is made anew when it is about to expire, or does not name what this machine is called now.

    Args:
        host: that is listened on.

    Raises:
        UsageError: the cryptography package is missing, or the folder cannot be written.
    """
    certificate, key = folder / "tls-certificate.pem", folder / "tls-key.pem"
    names = _names(host)
    if not _good(certificate, key, names):
        made, secret = _make(names)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write_private(key, secret)
            replace_file(certificate, made)
        except OSError as error:
            raise UsageError(f"cannot keep a certificate in {folder}: {error}; name a folder by --state") from error
    return certificate, key


def check_pair(certificate: Path, key: Path) -> None:
    """UsageError unless a certificate and a key can be read and belong together."""
    for path in (certificate, key):
        try:
            read_file(path, _MOST)  # OpenSSL would wait for a pipe, and read a device for ever
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from error
    try:
        # asked for a pass phrase, OpenSSL would ask the terminal
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except (ssl.SSLError, ValueError, OSError) as error:
        raise UsageError(
            f"{certificate} and {key} are no certificate and its key without a pass phrase, in PEM form ({error})"
        ) from error


def fingerprint(certificate: Path) -> str:
    """SHA-256 of a certificate, as browsers show it."""
    text = hashlib.sha256(_der(certificate)).hexdigest().upper()
    return ":".join(text[i : i + 2] for i in range(0, len(text), 2))


def days_left(certificate: Path) -> float:
    """Until a certificate expires; less than 0 after that."""
    end: datetime.datetime = _load(certificate).not_valid_after_utc
    return (end - datetime.datetime.now(datetime.timezone.utc)).total_seconds() / 86400


def _der(certificate: Path) -> bytes:
    """Of the first certificate of a file."""
    text = read_file(certificate, _MOST).decode("utf-8", "replace")
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    return ssl.PEM_cert_to_DER_cert(f"{begin}{text.partition(begin)[2].partition(end)[0]}{end}")


def _load(certificate: Path) -> Any:
    return _x509().load_der_x509_certificate(_der(certificate))


def _x509() -> Any:
    try:
        from cryptography import x509
    except ImportError as error:
        raise UsageError(
            f"certificates need the cryptography package, which is not installed ({error}): pip install "
            "'omniport[serve]', or make a certificate elsewhere and give --tls-cert FILE --tls-key FILE"
        ) from error
    return x509


def _names(host: str) -> list[_Name]:
    """What this machine is called by those that can reach the address."""
    own = socket.gethostname().lower()
    with suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            own = ""
    names: list[_Name] = ["localhost", ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("::1")]
    if own and own != "localhost":
        names += [own, *([] if "." in own else [f"{own}.local"])]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        names.append(host.lower())
    else:
        names += _own_addresses() if address.is_unspecified else [address]
    return list(dict.fromkeys(name for name in names if not isinstance(name, str) or name.isascii()))


def _own_addresses() -> list[_Name]:
    found: list[_Name] = []
    for family, elsewhere in _ELSEWHERE:
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as asked:
            asked.connect((elsewhere, 9))
            found.append(ipaddress.ip_address(asked.getsockname()[0]))
    return found


def _good(certificate: Path, key: Path, names: list[_Name]) -> bool:
    """Whether a kept certificate can go on being used."""
    try:
        check_pair(certificate, key)
        x509 = _x509()
        held = _load(certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        known = {*held.get_values_for_type(x509.DNSName), *held.get_values_for_type(x509.IPAddress)}
        return days_left(certificate) > _LEFT and known.issuperset(names)
    except UsageError:
        _x509()  # a package that is missing is no reason to make another
        return False
    except Exception:  # noqa: BLE001 - whatever stands in the file, another one takes its place
        return False


def _make(names: list[_Name]) -> tuple[bytes, bytes]:
    """A certificate and its key, in PEM form."""
    x509 = _x509()
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    secret = ec.generate_private_key(ec.SECP256R1())
    called = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "omniport")])
    others = [x509.DNSName(name) if isinstance(name, str) else x509.IPAddress(name) for name in names]
    now = datetime.datetime.now(datetime.timezone.utc)
    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "key_cert_sign",
            "crl_sign",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    public = secret.public_key()
    made = (
        x509.CertificateBuilder()
        .subject_name(called)
        .issuer_name(called)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # a board's clock may be behind
        .not_valid_after(now + datetime.timedelta(days=_DAYS))
        .add_extension(x509.SubjectAlternativeName(others), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(digital_signature=True, **usage), critical=True)
        .add_extension(x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), critical=False)
        .sign(secret, hashes.SHA256())
    )
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    pem = serialization.Encoding.PEM
    return made.public_bytes(pem), secret.private_bytes(pem, *form)


def _write_private(path: Path, content: bytes) -> None:
    """Nobody else may read it, at no time."""
    partial = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
