"""Decoding in child processes, which are kept for the next medium, ended when they take too long, and replaced."""

from __future__ import annotations

import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from numpy.typing import NDArray
from omniport.runtime.errors import MediaError

from ..settings import Limits
from .decoding_messages import (
    Answer,
    Asked,
    Decoded,
    NotAnAnswer,
    Nothing,
    Opened,
    Refused,
    Request,
    receive,
    receive_array,
    send,
)

_LOG = logging.getLogger(__name__)
COMMAND = (sys.executable, "-m", "omniport.serve.media.decoding_child")
#: children at most
WORKERS = 2
#: what a child has of the server's environment: how Python is found, and no key
_KEPT = ("PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR", "TEMP", "LANG")
#: bytes of a pipe, where it can be asked for: fewer turns for a picture
_PIPE = 1 << 20


class Decoders:
    """Children that decode. May be used by several threads.

    Args:
        limits: of time and of memory. command: what begins a child.
    """

    def __init__(self, limits: Limits, command: Sequence[str] = COMMAND) -> None:
        self._limits, self._command = limits, command
        self._workers: set[_Worker] = set()
        self._places: queue.LifoQueue[_Worker | None] = queue.LifoQueue()  # the one that was used last goes first
        self._closed = False
        for _ in range(WORKERS):
            self._places.put(None)

    def warm(self) -> None:
        """Begin a child, so that the first medium need not wait for it."""
        worker = self._places.get()
        self._places.put(worker or self._begin())

    def decode(self, asked: Asked, data: bytes) -> NDArray[Any] | Opened | None:
        """What a file holds: an array, or what there is to know of a video; None: nothing.

        Raises:
            MediaError: it cannot be read, or its decoder crashed or took too much time or memory.
        """
        seconds = self._limits.decode_seconds
        try:
            worker = self._places.get(timeout=seconds)
        except queue.Empty:
            raise MediaError(f"no decoder was free for {seconds:g} s; try again") from None
        kept: _Worker | None = None
        try:
            worker = worker if worker is not None and worker.alive else self._begin(worker)
            answer = worker.ask(asked, data, seconds)
            kept = worker
        except _Ended as error:
            _LOG.warning("a decoder was ended: %s", error)
            raise MediaError(f"it cannot be read: {error}") from error
        finally:
            if kept is None and worker is not None:
                self._end(worker)
            self._places.put(kept)
        if isinstance(answer, Refused):
            raise MediaError(answer.problem)
        return answer

    def close(self) -> None:
        """End them all."""
        self._closed = True
        for worker in list(self._workers):
            self._end(worker)

    def _begin(self, dead: _Worker | None = None) -> _Worker:
        if dead is not None:
            self._end(dead)
        if self._closed:
            raise MediaError("the server is being closed")
        worker = _Worker(self._command, self._limits.decode_memory)
        self._workers.add(worker)
        return worker

    def _end(self, worker: _Worker) -> None:
        self._workers.discard(worker)
        worker.end()


class _Ended(Exception):
    """A child has ended, or must."""


class _Worker:
    def __init__(self, command: Sequence[str], memory: int) -> None:
        self._memory = memory
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
        # a thread's buffers count as memory, and pictures are decoded without linear algebra
        environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        options: dict[str, Any] = {"start_new_session": True} if os.name == "posix" else {}
        self._process = subprocess.Popen(
            [*command, str(memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            **options,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        self._widen()
        self._lock = threading.Lock()
        self._asked = self._late = False

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, asked: Asked, data: bytes, seconds: float) -> NDArray[Any] | Opened | Refused | None:
        """An answer within so many seconds.

        Raises:
            _Ended: there is none; the child is of no more use.
        """
        timer = threading.Timer(seconds, self._end_late)
        timer.daemon = True
        self._asked = True
        timer.start()
        try:
            send(self._requests, Request(asked, len(data), seconds), data)
            return self._receive(asked)
        except (OSError, ValueError, NotAnAnswer) as error:
            raise _Ended(self._reason(seconds)) from error
        finally:
            with self._lock:
                self._asked = False
            timer.cancel()

    def end(self) -> None:
        """End the child, whatever it does."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._requests, self._answers):
            with suppress(OSError, ValueError):
                pipe.close()

    def _receive(self, asked: Asked) -> NDArray[Any] | Opened | Refused | None:
        told: Answer = receive(self._answers, Answer)  # type: ignore[arg-type]
        if isinstance(told, Decoded):
            return receive_array(self._answers, told, asked, self._memory)
        return None if isinstance(told, Nothing) else told

    def _end_late(self) -> None:
        with self._lock:
            if self._asked:
                self._late = True
                self._process.kill()

    def _reason(self, seconds: float) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        code = self._process.returncode
        if self._late or (code is not None and -code == getattr(signal, "SIGALRM", None)):
            return f"it took more than {seconds:g} s; send it smaller or shorter"
        if code is None:
            return "its decoder gave no answer; convert it or check the file"
        how = signal.Signals(-code).name if -code in set(signal.Signals) else f"exit code {code}"
        return f"its decoder crashed ({how}); convert it or check the file"

    def _widen(self) -> None:
        if sys.platform == "linux":
            import fcntl

            for pipe in (self._requests, self._answers):
                with suppress(OSError):  # as much as the user may have
                    fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, _PIPE)
