"""Fetch a medium by https from hosts that the operator named, and from nowhere else."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
from collections.abc import Collection
from urllib.parse import urlsplit

from omniport.runtime.errors import MediaError

#: seconds for each step of a transfer
_TIMEOUT = 10.0


class _Connection(http.client.HTTPSConnection):
    """To an address that was looked up and checked before, so that a name cannot lead elsewhere meanwhile."""

    def __init__(self, host: str, address: str) -> None:
        self._address, self._tls = address, ssl.create_default_context()
        super().__init__(host, 443, timeout=_TIMEOUT, context=self._tls)

    def connect(self) -> None:
        plain = socket.create_connection((self._address, 443), _TIMEOUT)
        try:
            self.sock = self._tls.wrap_socket(plain, server_hostname=self.host)
        except BaseException:
            plain.close()
            raise


def fetch(url: str, hosts: Collection[str], limit: int) -> bytes:
    """What the URL holds; redirects are not followed.

    Args:
        hosts: names that may be asked. limit: bytes.

    Raises:
        MediaError: another host, a private address, or anything but 200 with at most so many bytes.
    """
    parts = urlsplit(url)
    host = (parts.hostname or "").lower()
    if parts.scheme.lower() != "https" or host not in hosts or parts.port not in (None, 443):
        raise MediaError(f"{url[:80]!r} is not fetched: this server reads data: URLs, and https of named hosts alone")
    try:
        connection = _Connection(host, _public_address(host))
        try:
            connection.request("GET", f"{parts.path or '/'}{'?' * bool(parts.query)}{parts.query}")
            answer = connection.getresponse()
            data = answer.read(limit + 1) if answer.status == 200 else b""
        finally:
            connection.close()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise MediaError(f"{url[:80]!r} cannot be fetched: {type(error).__name__}") from error
    if answer.status != 200:
        raise MediaError(f"{url[:80]!r} cannot be fetched: status {answer.status}")
    if len(data) > limit:
        raise MediaError(f"{url[:80]!r} has more than {limit >> 20} MiB: shorten it")
    return data


def _public_address(host: str) -> str:
    """The first address of a name, all of whose addresses are public."""
    found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)]
    if not found or not all(ipaddress.ip_address(address).is_global for address in found):
        raise MediaError(f"{host} is not on the public network; nothing is fetched from there")
    return found[0]
