"""Fetch a medium by https from hosts that the operator named, and from nowhere else."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
from collections.abc import Collection
from contextlib import suppress
from urllib.parse import urlsplit

from omniport.runtime.errors import MediaError

from ..settings import Limits

#: seconds for each step of a transfer
_TIMEOUT = 10.0
#: networks whose addresses lead to others, by a translation that is not ours to know
_TRANSLATED = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "2002::/16", "2001::/32")))


class _Connection(http.client.HTTPSConnection):
    """To an address that was looked up and checked before, so that a name cannot lead elsewhere meanwhile."""

    def __init__(self, host: str, address: str) -> None:
        self._address, self._tls = address, ssl.create_default_context()
        self.stopped = False
        super().__init__(host, 443, timeout=_TIMEOUT, context=self._tls)

    def connect(self) -> None:
        plain = socket.create_connection((self._address, 443), _TIMEOUT)
        try:
            self.sock = self._tls.wrap_socket(plain, server_hostname=self.host)
        except BaseException:
            plain.close()
            raise

    def stop(self) -> None:
        """Let whoever waits for it wait no more."""
        self.stopped = True
        with suppress(OSError, AttributeError):
            self.sock.shutdown(socket.SHUT_RDWR)


def fetch(url: str, hosts: Collection[str], limits: Limits) -> bytes:
    """What the URL holds; redirects are not followed.

    Args:
        hosts: names that may be asked. limits: of bytes and of time.

    Raises:
        MediaError: another host, a private address, or anything but 200 with at most so many bytes in time.
    """
    limit, asked = limits.part, _named(url, hosts)
    if asked is None:
        raise MediaError(f"{url[:80]!r} is not fetched: this server reads data: URLs, and https of named hosts alone")
    host, path = asked
    try:
        connection = _Connection(host, _public_address(host))
        late = threading.Timer(limits.decode_seconds, connection.stop)  # a byte now and then is in time for each step
        late.daemon = True
        late.start()
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            data = answer.read(limit + 1) if answer.status == 200 else b""
        finally:
            late.cancel()
            connection.close()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise MediaError(f"{url[:80]!r} cannot be fetched: {type(error).__name__}") from error
    if answer.status != 200:
        raise MediaError(f"{url[:80]!r} cannot be fetched: status {answer.status}")
    if connection.stopped:
        raise MediaError(f"{url[:80]!r} took more than {limits.decode_seconds:g} s")
    if len(data) > limit:
        raise MediaError(f"{url[:80]!r} has more than {limit >> 20} MiB: shorten it")
    return data


def _named(url: str, hosts: Collection[str]) -> tuple[str, str] | None:
    """Host and path of a URL that may be fetched."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").lower()
        if parts.scheme.lower() != "https" or host not in hosts or parts.port not in (None, 443):
            return None
    except ValueError:
        return None
    return host, f"{parts.path or '/'}{'?' * bool(parts.query)}{parts.query}"


def _is_public(address: str) -> bool:
    found = ipaddress.ip_address(address)
    return found.is_global and not found.is_multicast and not any(found in network for network in _TRANSLATED)


def _public_address(host: str) -> str:
    """The first address of a name, all of whose addresses are public."""
    found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)]
    if not found or not all(map(_is_public, found)):
        raise MediaError(f"{host} is not on the public network; nothing is fetched from there")
    return found[0]
