"""Work on a session's conversation outside turns: messages that are added, and prefilled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from .backends.guarded import GuardedBackend
from .concurrency.cancel import Cancelled, CancelToken
from .concurrency.timing import StageTimer
from .errors import UsageError
from .generation.conversation import Conversation
from .generation.encoders import Encoders


class OutsideTurns:
    """What is under way on a conversation outside turns.

    Args:
        guarded: gives the backend for one piece of work. UsageError if the session is closed.
        alone: holds turns off; gives whether none is open, which would have the KV caches.
    """

    def __init__(
        self,
        conversation: Conversation,
        guarded: Callable[[CancelToken, StageTimer], GuardedBackend],
        alone: Callable[[], AbstractContextManager[bool]],
    ) -> None:
        self._conversation, self._guarded, self._alone = conversation, guarded, alone
        self._under_way: set[CancelToken] = set()

    def cancel(self) -> None:
        """Stop it: the session is closed."""
        for token in tuple(self._under_way):
            token.cancel()

    @contextmanager
    def computing(self, alone: bool) -> Iterator[Encoders | None]:
        """Around work.

        Args:
            alone: it needs the KV caches.

        Yields:
            What encodes media; None if ``alone``, and a turn is open that has the caches.

        Raises:
            UsageError: the session is closed, or was closed meanwhile.
        """
        token, timer = CancelToken(), StageTimer()
        self._under_way.add(token)
        try:
            backend = self._guarded(token, timer)
            if not alone:
                yield Encoders(backend, timer)
                return
            with self._alone() as free:
                if not free:
                    yield None
                    return
                self._conversation.use(backend, timer)
                yield Encoders(backend, timer)
        except Cancelled:
            raise UsageError("the session was closed; open another one with OmniSession.open(...)") from None
        finally:
            self._under_way.discard(token)
