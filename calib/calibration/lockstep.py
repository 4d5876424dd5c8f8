"""Run the runtime's loops for several samples in lockstep, so that their graph calls pass each layer together.

Every job runs in its own thread against a stand-in for a backend. When all jobs that still run wait for a graph,
the calls of one graph are carried out, in the order of the jobs: what comes out does not depend on which thread was
faster.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from omniport.runtime.backends.base import Array, Backend, Graph, KvCache, Outputs, RunHandle
from torch import Tensor

T = TypeVar("T")


class LayerCaches:
    """A KV cache that holds what was written to it and no more.

    Attributes:
        tensors: key and value of every layer, [1, Hkv, L, D].
    """

    def __init__(self, tensors: list[Tensor], capacity: int) -> None:
        self.tensors = tensors
        self._capacity = capacity

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def nbytes(self) -> int:
        return sum(int(tensor.nbytes) for tensor in self.tensors)


@dataclass(frozen=True, eq=False)
class Request:
    """One call of a graph that a job waits for."""

    job: int
    graph: str
    feeds: Mapping[str, Array]
    cache: KvCache | None


class _Stopped(BaseException):
    """Unwinds the other jobs when one has failed; not an Exception, so that nothing on the way takes it for one."""


class Lockstep(Generic[T]):
    """Jobs that run side by side, call by call.

    Args:
        execute: carries out calls of one graph and gives their outputs, in order.
        new_cache: an empty cache of a graph, for that many tokens.
    """

    def __init__(
        self,
        execute: Callable[[str, Sequence[Request]], Sequence[Outputs]],
        new_cache: Callable[[str, int], KvCache],
    ) -> None:
        self._execute = execute
        self.new_cache = new_cache
        self._changed = threading.Condition()
        self._waiting: dict[int, Request] = {}
        self._answers: dict[int, Outputs] = {}
        self._running = 0
        self._error: BaseException | None = None
        self._results: dict[int, T] = {}

    def run(self, jobs: Sequence[Callable[[Any], T]]) -> list[T]:
        """Run all jobs to their end; each gets a backend. The first error of any is raised again.

        Raises:
            whatever a job or ``execute`` raises.
        """
        self._running = len(jobs)
        threads = [threading.Thread(target=self._job, args=(i, job), daemon=True) for i, job in enumerate(jobs)]
        for thread in threads:
            thread.start()
        try:
            while (requests := self._gather()) is not None:
                outputs = self._execute(requests[0].graph, requests)
                with self._changed:
                    for request, output in zip(requests, outputs, strict=True):
                        del self._waiting[request.job]
                        self._answers[request.job] = output
                        self._running += 1
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()
            raise
        finally:
            for thread in threads:
                thread.join()
        return [self._results[i] for i in range(len(jobs))]

    def call(self, request: Request) -> Outputs:
        """From a job's thread: wait until the call has been carried out."""
        with self._changed:
            self._waiting[request.job] = request
            self._running -= 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: request.job in self._answers or self._error is not None)
            if self._error is not None:
                raise _Stopped
            return self._answers.pop(request.job)

    def _gather(self) -> list[Request] | None:
        """The calls of the graph that the first waiting job waits for; None when all jobs have ended."""
        with self._changed:
            self._changed.wait_for(lambda: not self._running or self._error is not None)
            if self._error is not None:
                raise self._error
            if not self._waiting:
                return None
            graph = self._waiting[min(self._waiting)].graph
            return [self._waiting[job] for job in sorted(self._waiting) if self._waiting[job].graph == graph]

    def _job(self, index: int, job: Callable[[Any], T]) -> None:
        try:
            self._results[index] = job(_Backend(self, index))
        except _Stopped:
            pass  # another job's error, which `run` raises
        except BaseException as error:  # noqa: BLE001 - raised again by `run`, in the caller's thread
            with self._changed:
                self._error = self._error or error
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()


class _Backend(Backend):
    """A backend whose graphs wait for the other jobs."""

    name = "calibration"

    def __init__(self, lockstep: Lockstep[Any], job: int) -> None:
        self._lockstep, self._job = lockstep, job

    def graph(self, name: str) -> _Graph:
        return _Graph(self._lockstep, self._job, name)

    def close(self) -> None:
        """Nothing is held."""


class _Graph(Graph):
    def __init__(self, lockstep: Lockstep[Any], job: int, name: str) -> None:
        self._lockstep, self._job, self._name = lockstep, job, name

    def run(self, feeds: Mapping[str, Array], cache: KvCache | None = None, handle: RunHandle | None = None) -> Outputs:
        return self._lockstep.call(Request(self._job, self._name, feeds, cache))

    def new_cache(self, capacity: int) -> KvCache:
        return self._lockstep.new_cache(self._name, capacity)
