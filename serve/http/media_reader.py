"""Media of one request, read elsewhere than in the event loop and within the limits of all of them together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, TypeVar

from omniport.runtime.errors import MediaError

from ..media.medium import Medium, read_medium
from ..media.url_fetch import fetch
from ..service import Service
from .api_errors import ApiError, from_runtime, invalid

T = TypeVar("T")


class MediaReader:
    """Of one request, or of one event."""

    def __init__(self, service: Service) -> None:
        limits = service.settings.limits
        self._service, self._left, self._seconds = service, limits.decoded, limits.media_seconds

    async def read(self, medium: Medium, where: str) -> dict[str, Any]:
        """The part of a message that a medium is.

        Raises:
            ApiError: unreadable or beyond a limit.
        """
        limits = self._service.settings.limits
        if len(medium.data) > limits.part:
            most = limits.part >> 20
            raise ApiError(413, "request_too_large", f"{where} has more than {most} MiB: shorten it", param=where)
        part = await self._in_thread(where, read_medium, medium, limits, self._service.decoders)
        self._left -= part["image"].nbytes if medium.kind == "image" else len(medium.data)
        if self._left < 0:
            most = limits.decoded >> 20
            message = f"with {where} the media of the request take more than {most} MiB: send fewer or smaller ones"
            raise ApiError(413, "request_too_large", message, param=where)
        return part

    async def fetch(self, url: str, where: str) -> bytes:
        """What a URL of a host holds that may be asked.

        Raises:
            ApiError: it may not, or cannot.
        """
        settings = self._service.settings
        return await self._in_thread(where, fetch, url, settings.url_hosts, settings.limits)

    async def _in_thread(self, where: str, read: Callable[..., T], *arguments: Any) -> T:
        if self._seconds < 0:
            most = self._service.settings.limits.media_seconds
            raise invalid(f"before {where} the media of the request took more than {most:g} s: send fewer", where)
        begun = time.monotonic()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._service.reading, read, *arguments)
        except MediaError as error:
            told = from_runtime(error, where)
            assert told is not None
            raise told from error
        finally:
            self._seconds -= time.monotonic() - begun
