"""Reply to a conversation that is given whole, over borrowed KV caches."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..backends.base import KvCache
from ..bundle.parts import encoder_of
from ..events import Stats
from ..generation.conversation import Conversation
from ..generation.encoders import Encoders
from ..generation.thinker import require_room
from ..prompt.builder import Prompt, build_prompt
from ..prompt.positions import fresh_key
from .reply import Reply
from .task import ReplyTask


def read_prompt(
    task: ReplyTask, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], capacity: int
) -> Prompt:
    """The prompt of messages, all media read.

    Args:
        capacity: tokens of the KV caches, which have to hold it and a reply.

    Raises:
        PromptError, MediaError, PromptTooLong. UsageError: the bundle lacks an encoder.
    """
    bundle = task.bundle
    with task.timer("preprocess"):
        prompt = build_prompt(messages, bundle.manifest, task.codec, capacity, tools=tools, asked=not task.given)
    require_room(len(prompt.token_ids), capacity, reply=task.least)
    for span in prompt.media:
        bundle.require_graph(encoder_of(span.kind).name, f"the {span.kind}")
    return prompt


class CachePool:
    """KV caches that replies borrow, by graph.

    Args:
        new_cache: gives a cache for the graph of that name.
        capacity: tokens of each.
    """

    def __init__(self, new_cache: Callable[[str], KvCache], capacity: int) -> None:
        self.capacity = capacity
        self._new_cache = new_cache
        self._lock = threading.Lock()
        self._idle: dict[str, list[KvCache]] = {}

    def borrow(self, name: str) -> KvCache:
        """A cache that nobody else uses; what it holds is of no value."""
        with self._lock:
            idle = self._idle.setdefault(name, [])
            return idle.pop() if idle else self._new_cache(name)

    def give_back(self, name: str, cache: KvCache) -> None:
        """The next may have it."""
        with self._lock:
            self._idle.setdefault(name, []).append(cache)

    def clear(self) -> None:
        """Free what nobody uses."""
        with self._lock:
            self._idle.clear()


class WholeReply(Reply):
    """Answers ``prompt`` alone."""

    def __init__(self, task: ReplyTask, prompt: Prompt, pool: CachePool, started: float) -> None:
        self._prompt, self._pool = prompt, pool
        self._borrowed: list[tuple[str, KvCache]] = []
        super().__init__(
            task, Conversation(task.bundle, self._borrow, pool.capacity), Stats(backend=task.backend.name), started
        )

    def _borrow(self, name: str) -> KvCache:
        cache = self._pool.borrow(name)
        self._borrowed.append((name, cache))
        return cache

    def _prepare(self) -> None:
        task, prompt, conversation = self._task, self._prompt, self._conversation
        conversation.use(task.backend, task.timer)
        conversation.begin_turn()
        encoders = Encoders(task.backend, task.timer)
        conversation.add(
            prompt.tokens.fill([(span.indices, encoders.embed(span), fresh_key()) for span in prompt.media])
        )

    def _release(self) -> None:
        while self._borrowed:
            self._pool.give_back(*self._borrowed.pop())
