"""The process that a session works in: its threads do not come along with ``os.fork``, and its locks may be held."""

from __future__ import annotations

import os

from ..errors import UsageError


class Owner:
    """The process that first claimed something; nobody's until then, so that a server may fork with a session open."""

    def __init__(self) -> None:
        self._process: int | None = None

    @property
    def elsewhere(self) -> bool:
        """Whether it is claimed by another process: the parent of this one."""
        return self._process not in (None, os.getpid())

    def check(self) -> None:
        """UsageError if it is claimed by another process."""
        if self.elsewhere:
            raise UsageError(
                f"this session was used in process {self._process}, of which this one is a fork: its threads are not "
                "here. Open a session in each process, or fork before the first turn or reply"
            )

    def claim(self) -> None:
        """It is this process's from now on. UsageError as ``check``."""
        self.check()
        self._process = os.getpid()
