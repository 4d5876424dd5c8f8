"""docs/live.md held to a small model of it: calls on a session in any order, from several threads, over fake graphs."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from omniport.runtime import (
    Done,
    MediaError,
    OmniSession,
    PromptError,
    PromptTooLong,
    SamplingConfig,
    TextDelta,
    Turn,
    TurnEnded,
    TurnsDropped,
    UsageError,
)
from omniport.runtime.generation.entries import Tokens
from omniport.runtime.prompt import chat_template
from omniport.runtime.prompt.positions import Layout
from support.bundles import make_bundle
from support.fake_backend import FakeCache, FakeDecoder
from support.fuzzing import BYTES, Peak, note, seeds
from support.live_turns import Live, start, voice

REPLY = "It is so."
CODES = [*range(40), 52]
#: seconds that a call may take before it counts as one that never ends
PATIENCE = 20


class Contract(RuleBasedStateMachine):
    """One session at a time; ``turn`` is the one that is open or replying, ``past`` what the conversation must be."""

    root: Path

    def __init__(self) -> None:
        super().__init__()
        self.threads = set(threading.enumerate())
        self.peak = Peak()
        self.live = Live(self.root)
        self.others: list[OmniSession] = []
        self.session = self.live.session
        self.closed = False
        self.turn: Turn | None = None
        self.ended: Turn | None = None
        self.events: Any = None
        self.text: str | None = ""  # of the open turn; None once it holds other media
        self.anything = False
        self.begun = False
        self.given = False  # the reply is
        self.speak = False
        self.delivered = 0
        self.past: list[list[int]] = []  # the turns' tokens, the system message first
        self.joined: list[int] | None = None  # the turn before, which a reply without a question joins

    @initialize(capacity=st.sampled_from([None, 150, 400]))
    def opened(self, capacity: int | None) -> None:
        note("turns")
        self.live.script(REPLY, CODES)
        if capacity is not None:
            self.session = OmniSession(self.live.bundle, self.live.backend, max_context=capacity)
            self.live.session = self.session

    # -- what happens while no turn is open

    @precondition(lambda self: self.turn is None)
    @rule(
        speak=st.booleans(),
        threads=st.booleans(),
        exact=st.booleans(),
        longest=st.sampled_from([3, 30]),
        text=st.sampled_from([{}, {}, {"stop": "so"}, {"stop": ("is that", ".")}, {"say": REPLY}]),
    )
    def begins(self, speak: bool, threads: bool, exact: bool, longest: int, text: dict[str, Any]) -> None:
        options: dict[str, Any] = {"speak": speak, "threads": threads, "exact": exact, **text}
        options["thinker"], options["talker"] = (SamplingConfig(max_new_tokens=most) for most in (longest, 60))
        self.given = "say" in text

        def begin() -> Turn:
            return self.session.turn(**options)

        if self.closed:
            self.refused(begin, UsageError)
            return
        self.turn, self.speak = self.elsewhere(begin), speak
        self.text, self.anything, self.begun, self.delivered, self.events = "", False, False, 0, None
        self.past = self.past or self.tokens()[:1]

    @precondition(lambda self: self.turn is None and not self.closed)
    @rule(speak=st.booleans(), drop=st.booleans())
    def answers(self, speak: bool, drop: bool) -> None:
        short = SamplingConfig(max_new_tokens=30)
        self.past = self.past or self.tokens()[:1]
        self.turn, self.speak = self.session.turn(speak=speak, thinker=short, talker=short), speak
        self.text, self.anything, self.given, self.delivered = None, False, False, 0
        self.joined = self.past.pop() if len(self.past) > 1 else None
        try:
            self.events = self.elsewhere(lambda: self.open_turn.answer(drop=drop))
        except PromptTooLong:
            self.is_undone()

    @precondition(lambda self: self.turn is None and not self.closed)
    @rule(texts=st.lists(st.sampled_from(["a", "Well? ", "x" * 40, "y" * 5000]), max_size=3))
    def replaces(self, texts: list[str]) -> None:
        messages = [{"role": "user", "content": text} for text in texts]
        before = self.tokens()
        try:
            self.elsewhere(lambda: self.session.items.replace(messages))
        except PromptTooLong:
            assert self.tokens() == before
            return
        built = self.live.prompt([*messages, {"role": "user", "content": "z"}]).token_ids
        flat = self.flat(self.tokens())
        assert flat == [int(i) for i in built[: len(flat)]]
        self.past = self.tokens()

    @precondition(lambda self: self.turn is None)
    @rule(system=st.sampled_from([None, "", "Be brief."]), instructions=st.sampled_from([None, "Hm."]))
    def resets(self, system: str | None, instructions: str | None) -> None:
        self.elsewhere(lambda: self.session.reset(system, instructions=instructions))
        self.past, self.ended = [], None

    # -- while it is open

    @property
    def is_open(self) -> bool:
        return self.turn is not None and self.events is None

    @precondition(lambda self: self.is_open)
    @rule(text=st.sampled_from(["", "a", "Well? ", "ä" * 20, "x" * 120, "y" * 5000]), whole=st.booleans())
    def writes(self, text: str, whole: bool) -> None:
        turn = self.open_turn
        if self.push(lambda: turn.push(text) if whole else turn.push_text(text)) and text:
            self.anything = True
            self.text = None if self.text is None else self.text + text

    @precondition(lambda self: self.is_open)
    @rule(result=st.sampled_from(["", "3 °C", "z" * 300]))
    def tells_what_a_tool_gave(self, result: str) -> None:
        turn = self.open_turn
        if self.push(lambda: turn.push_tool_result(result)):
            self.anything, self.text = True, None

    @precondition(lambda self: self.is_open)
    @rule(seconds=st.sampled_from([0.0, 0.01, 0.3, 1.0, 2.0, 2.6, 7.0]), rate=st.sampled_from([16000, 44100]))
    def speaks(self, seconds: float, rate: int) -> None:
        turn, samples = self.open_turn, voice(seconds + 0.02, rate)[: round(seconds * rate)]
        if self.push(lambda: turn.push_audio(samples, rate)) and len(samples):
            self.anything, self.text = True, None

    @precondition(lambda self: self.is_open)
    @rule(time_s=st.sampled_from([0.0, 0.2, 0.5, 1.0, 1.9, 2.5, 4.1, 9.0]), size=st.sampled_from([28, 56, 112]))
    def shows(self, time_s: float, size: int) -> None:
        turn, pixels = self.open_turn, np.full((size, 56, 3), 90, np.uint8)
        if self.push(lambda: turn.push_frame(pixels, time_s)):
            self.anything, self.text = True, None

    @precondition(lambda self: self.is_open)
    @rule(count=st.sampled_from([1, 2, 9]), bad=st.booleans())
    def attaches(self, count: int, bad: bool) -> None:
        turn, pixels = self.open_turn, np.full((56, 56, 3), 90, np.uint8)
        parts: list[dict[str, Any]] = [{"type": "image", "image": pixels}] * count
        if bad:
            parts.append({"type": "image", "image": b"no picture"})
        if self.push(lambda: turn.push(parts)):
            assert not bad
            self.anything, self.text = True, None

    @precondition(lambda self: self.is_open)
    @rule(what=st.sampled_from(["text", "audio", "frame", "image", "content"]))
    def pushes_nonsense(self, what: str) -> None:
        turn = self.open_turn
        call: Callable[[], Any] = {
            "text": lambda: turn.push_text(7),  # type: ignore[arg-type]
            "audio": lambda: turn.push_audio(np.full(9, np.nan, np.float32), 16000),
            "frame": lambda: turn.push_frame(np.zeros((56, 56, 3), np.uint8), float("nan")),
            "image": lambda: turn.push_image(b"no picture"),
            "content": lambda: turn.push([{"type": "text"}]),
        }[what]
        assert not self.push(call)

    @precondition(lambda self: self.is_open)
    @rule()
    def commits(self) -> None:
        turn, before = self.open_turn, (self.tokens(), self.open_turn._layout.pending)
        if not self.anything and not self.given:
            self.refused(turn.commit, PromptError)
            return
        try:
            self.events = self.elsewhere(turn.commit)
        except MediaError:  # the last sound is too short: the turn stays open
            self.took_nothing(before)
        except PromptTooLong:
            self.is_undone()

    @precondition(lambda self: self.is_open)
    @rule()
    def keeps(self) -> None:
        turn, before = self.open_turn, (self.tokens(), self.open_turn._layout.pending)
        if not self.anything:
            self.refused(turn.keep, PromptError)
            return
        try:
            self.elsewhere(turn.keep)
        except MediaError:
            self.took_nothing(before)
        except PromptTooLong:
            self.is_undone()
        else:
            self.ended, self.turn = turn, None
            self.dropping_answered()

    # -- while no reply is made, the conversation may be changed

    @precondition(lambda self: self.events is None and not self.closed)
    @rule(
        role=st.sampled_from(["user", "assistant", "system", "developer", "tool"]),
        text=st.sampled_from(["", "a", "Well? ", "x" * 60, "y" * 3000]),
        place=st.sampled_from([None, None, 0, 1, 5]),
    )
    def appends(self, role: str, text: str, place: int | None) -> None:
        items, before = self.session.items, self.complete()
        ids = [item.id for item in items]
        where = None if place is None or not ids else ids[place % len(ids)]
        try:
            item = self.elsewhere(lambda: items.append({"role": role, "content": text}, before=where))
        except PromptTooLong:
            assert self.complete() == before
            return
        assert item.content == ([{"type": "text", "text": text}] if text else [])
        flat, new = self.flat(self.complete()), self.flat(before)
        assert len(flat) == len(new) + item.tokens or self.session.max_context < 2048
        assert where is not None or flat[-item.tokens :] == self.item_tokens(item.id)
        self.past = self.complete()

    @precondition(lambda self: self.events is None and len(self.session.items))
    @rule(which=st.integers(0, 20))
    def deletes(self, which: int) -> None:
        ids = [item.id for item in self.session.items]
        item_id = ids[which % len(ids)]
        wanted = [token for other in ids if other != item_id for token in self.item_tokens(other)]
        self.elsewhere(lambda: self.session.items.delete(item_id))
        assert self.flat(self.complete()) == wanted
        self.past = self.complete()

    @precondition(lambda self: self.events is None and len(self.session.items))
    @rule(which=st.integers(0, 20))
    def rewinds(self, which: int) -> None:
        ids = [item.id for item in self.session.items]
        wanted = [token for other in ids[: which % len(ids) + 1] for token in self.item_tokens(other)]
        self.elsewhere(lambda: self.session.items.rewind(ids[which % len(ids)]))
        assert self.flat(self.complete()) == wanted
        self.past = self.complete()

    @precondition(lambda self: self.turn is not None)
    @rule()
    def another_begins(self) -> None:
        self.refused(self.session.turn, UsageError)
        self.refused(self.session.reset, UsageError)

    # -- while it replies

    @precondition(lambda self: self.events is not None)
    @rule(count=st.sampled_from([1, 2, 5, 1000]))
    def listens(self, count: int) -> None:
        try:
            got = self.elsewhere(lambda: list(itertools.islice(self.events, count)))
        except PromptTooLong:
            self.is_undone()
            return
        self.takes(got)
        if len(got) < count or isinstance(got[-1], Done):
            self.is_answered(got[-1])

    @precondition(lambda self: self.events is not None)
    @rule(again=st.booleans())
    def drops_the_iterator(self, again: bool) -> None:
        if again:
            self.elsewhere(self.events.close)
        self.events.close()
        self.is_cut()

    @precondition(lambda self: self.events is not None)
    @rule()
    def pushes_too_late(self) -> None:
        turn = self.open_turn
        self.refused(lambda: turn.push_text("more"), TurnEnded)
        self.refused(lambda: turn.push_audio(voice(0.1), 16000), TurnEnded)
        self.refused(turn.commit, TurnEnded)

    # -- at any time

    @precondition(lambda self: self.turn is not None)
    @rule(heard=st.sampled_from([None, 0, 0.2, 0.9, 1e9, float("inf")]), again=st.sampled_from([None, 0, 0.5]))
    def cancels(self, heard: float | None, again: float | None) -> None:
        turn = self.open_turn
        self.elsewhere(lambda: turn.cancel(heard=heard))
        if self.events is None:
            self.is_undone()
        else:
            self.is_cut(heard)
        turn.cancel(heard=again)
        self.is_shortened(again)

    @precondition(lambda self: self.turn is not None or self.ended is not None)
    @rule(heard=st.sampled_from([-1, float("nan"), "1", 1j]))
    def hears_nonsense(self, heard: Any) -> None:
        turn = self.turn or self.ended
        assert turn is not None
        self.refused(lambda: turn.cancel(heard=heard), UsageError)

    @precondition(lambda self: self.ended is not None and self.joined is None)
    @rule(heard=st.sampled_from([None, 0, 0.3, 2.0]))
    def cuts_back(self, heard: float | None) -> None:
        assert self.ended is not None
        turn = self.ended
        self.elsewhere(lambda: turn.cancel(heard=heard))
        self.is_shortened(heard)

    @precondition(lambda self: self.ended is not None)
    @rule()
    def uses_an_ended_turn(self) -> None:
        turn = self.ended
        assert turn is not None
        assert turn.ended
        for call in (lambda: turn.push_text("x"), turn.commit, lambda: turn.push("x")):
            self.refused(call, TurnEnded)

    @rule()
    def forks(self) -> None:
        if self.closed:
            self.refused(self.session.fork, UsageError)
            return
        other = self.elsewhere(self.session.fork)
        self.others.append(other)
        turn = other.turn(speak=False, thinker=SamplingConfig(max_new_tokens=3))
        turn.push_text("Hi")
        assert isinstance(list(turn.commit())[-1], Done)

    @precondition(lambda self: self.others)
    @rule()
    def closes_a_fork(self) -> None:
        other = self.others.pop()
        both = [start(other.close), start(other.close)]
        for each in both:
            each.result(PATIENCE)
        self.refused(other.turn, UsageError)

    @rule(really=st.sampled_from([False, False, False, True]))  # most runs go on
    def closes(self, really: bool) -> None:
        if not really:
            return
        both = [start(self.session.close), start(self.session.close)]
        for each in both:
            each.result(PATIENCE)
        assert self.live.backend.closed == (not self.others)
        if self.turn is not None:
            assert self.turn.ended
            self.turn, self.events = None, None
        self.closed, self.past, self.ended, self.joined = True, [], None, None
        if not self.others:
            self.live = Live(self.root)
            self.live.script(REPLY, CODES)
            self.session, self.closed = self.live.session, False

    @precondition(lambda self: self.is_open)
    @rule(delay=st.sampled_from([0, 0.0005, 0.003]), seconds=st.sampled_from([0.1, 2.5, 6.0]))
    def cancels_in_a_push(self, delay: float, seconds: float) -> None:
        turn, samples = self.open_turn, voice(seconds)

        def push() -> None:
            with suppress(TurnEnded, PromptTooLong, MediaError):
                turn.push_audio(samples, 16000)

        pushing = start(push)
        time.sleep(delay)
        turn.cancel()
        pushing.result(PATIENCE)
        self.is_undone()

    @precondition(lambda self: self.events is not None)
    @rule(
        delay=st.sampled_from([0, 0.001, 0.005, 0.02]),
        how=st.sampled_from(["cancel", "heard", "close", "exit", "twice"]),
    )
    def ends_while_it_replies(self, delay: float, how: str) -> None:
        turn, events, got = self.open_turn, self.events, []

        def listen() -> None:
            for event in events:
                got.append(event)

        def end() -> None:
            if how == "close":
                events.close()
            elif how == "exit":
                turn.__exit__()
            else:
                turn.cancel(heard=0.2 if how == "heard" else None)

        listening = start(listen)
        time.sleep(delay)
        ending = [start(end) for _ in range(2 if how == "twice" else 1)]
        for each in ending:
            each.result(PATIENCE)
        try:
            listening.result(PATIENCE)
        except PromptTooLong:  # with what ends its message the turn does not fit, and is discarded
            self.is_undone()
            return
        self.takes(got)
        self.is_cut()

    # -- the model

    @property
    def open_turn(self) -> Turn:
        assert self.turn is not None
        return self.turn

    def elsewhere(self, call: Callable[[], Any]) -> Any:
        """Its result, from another thread."""
        return start(call).result(PATIENCE)

    def refused(self, call: Callable[[], Any], error: type[Exception]) -> None:
        """It raises this, and nothing is different afterwards."""
        before = self.tokens()
        with pytest.raises(error):
            self.elsewhere(call)
        assert self.events is not None or self.tokens() == before
        assert self.turn is None or not self.turn.ended

    def push(self, call: Callable[[], Any]) -> bool:
        """Whether it was taken; a push that was refused has taken nothing, and dropped nothing."""
        before = self.tokens(), self.open_turn._layout.pending
        try:
            self.elsewhere(call)
        except (MediaError, PromptError):
            self.took_nothing(before)
            return False
        self.dropping()
        return True

    def took_nothing(self, before: object) -> None:
        assert not self.open_turn.ended
        assert (self.tokens(), self.open_turn._layout.pending) == before

    def tokens(self) -> list[list[int]]:
        """The conversation, turn by turn."""
        turns = self.session._conversation.entries.turns()
        return [[int(i) for entry in turn for segment in entry.segments for i in segment.ids] for turn in turns]

    def complete(self) -> list[list[int]]:
        """The same without the turn that is open or replying."""
        return self.tokens()[: None if self.turn is None else -1]

    @staticmethod
    def flat(turns: list[list[int]]) -> list[int]:
        return list(itertools.chain.from_iterable(turns))

    def item_tokens(self, item_id: str) -> list[int]:
        entry = self.session._conversation.entries.find(item_id)
        return [int(i) for segment in entry.segments for i in segment.ids]

    def dropping(self) -> None:
        """The oldest turns after the system message may be gone, whole."""
        kept = self.tokens()[1 : None if self.turn is None else -1]
        while len(self.past) - 1 > len(kept):
            del self.past[1]

    def takes(self, events: list[Any]) -> None:
        self.delivered += sum(isinstance(e, TextDelta) for e in events)
        assert not any(isinstance(e, TurnsDropped) and e.turns < 1 for e in events)

    def is_undone(self) -> None:
        """The turn was discarded: the conversation is as it was before."""
        assert self.open_turn.ended
        self.ended, self.turn, self.events = self.turn, None, None
        self.past += [] if self.joined is None else [self.joined]
        self.joined = None
        self.dropping()
        assert self.tokens()[: len(self.past)] == self.past
        assert len(self.tokens()) == max(1, len(self.past))
        self.said = None

    def is_cut(self, heard: float | None = None) -> None:
        turn = self.open_turn
        assert turn.ended
        rest = [] if self.events is None else list(self.events)
        assert [type(e) for e in rest] in ([], [Done])
        if rest:
            assert rest[0].finish_reason == "cancelled" or self.delivered
        self.is_answered(rest[0] if rest else None)
        if heard == 0 and self.speak and self.said is not None:
            assert self.said == []

    def is_answered(self, done: Done | None) -> None:
        """The reply has ended: what was said stays."""
        turn = self.open_turn
        assert turn.ended
        closing = [int(i) for i in chat_template.end_of_reply(self.live.bundle.manifest, self.session.text_codec)]
        tokens = self.tokens()
        if len(tokens) == 1 or tokens[-1][-len(closing) :] != closing:
            raise AssertionError(f"the turn has no reply in {tokens}")
        wanted = self.live.encode(REPLY)
        question = self.question()
        if question is not None:
            assert tokens[-1][: len(question)] == question
            said = tokens[-1][len(question) : -len(closing)]
            assert said == wanted[: len(said)]
            assert len(said) <= self.delivered
            if done is not None:
                assert said == list(done.token_ids)[: len(said)]
            self.said: list[int] | None = said
        else:
            self.said = None
        self.ended, self.turn, self.events = self.turn, None, None
        self.dropping_answered()

    def dropping_answered(self) -> None:
        tokens = self.tokens()
        assert tokens[0] == self.past[0]
        kept = tokens[1:-1]
        assert kept == self.past[len(self.past) - len(kept) :]
        assert self.joined is None or tokens[-1][: len(self.joined)] == self.joined
        self.past, self.joined = tokens, None

    def is_shortened(self, heard: float | None) -> None:
        """``cancel`` after the end: its reply may have become shorter, by nothing if nothing was said of sound."""
        tokens = self.complete()
        if not self.past or not tokens[-1:]:
            return
        changed = [(now, past) for now, past in zip(tokens, self.past, strict=True) if now != past]
        assert len(changed) <= (heard is not None)
        assert all(len(now) < len(past) for now, past in changed)
        self.past = tokens

    def question(self) -> list[int] | None:
        """The user's message and what begins the reply; None if it holds media."""
        if self.text is None:
            return None
        layout = Layout(self.live.bundle.manifest, self.session.text_codec)
        if self.anything:
            chat_template.begin_message(layout, "user")
            layout.text(self.text)
            chat_template.end_message(layout)
        chat_template.begin_reply(layout)
        layout.flush()
        return [int(i) for i in layout.segment().ids]

    @invariant()
    def caches_hold_a_prefix(self) -> None:
        """Of the conversation's tokens, whenever no reply is at work."""
        caches = self.session._conversation.caches
        decoder = caches._decoders.get("thinker")
        if self.closed or self.events is not None or decoder is None:
            return
        assert decoder.length == len(caches.held)
        talker = caches._decoders.get("talker")
        talked = 0 if talker is None else talker.length
        assert talked + len(caches._conditioning) == decoder.length
        segments = self.session._conversation.entries.segments()
        tokens = Tokens.of(segments)
        same = caches.held.common(tokens)
        if not same:
            return
        embeds, positions, media = caches._embeds(segments, 0)[:same], tokens.positions[:, :same], tokens.keys[:same]
        cache = decoder._cache
        assert isinstance(cache, FakeCache)
        np.testing.assert_allclose(cache.rows[:same], embeds, atol=1e-5)
        if talker is not None and talked:
            fresh = FakeDecoder(self.live.bundle.manifest.thinker, hidden=True, seed=3)
            feeds = {
                "inputs_embeds": np.ascontiguousarray(embeds[None]),
                "position_ids": np.ascontiguousarray(positions[:, None]),
                "kv_positions": np.arange(same),
                "write_index": np.zeros(1, np.int64),
            }
            hidden = fresh.run(feeds, fresh.new_cache(same))["hidden"][0]
            wanted = hidden + np.where(media[:, None] != 0, 0, embeds)
            rows, both = talker._cache, min(talked, same)
            assert isinstance(rows, FakeCache)
            np.testing.assert_allclose(rows.rows[:both], wanted[:both], atol=1e-4)

    def teardown(self) -> None:
        for session in (self.session, *self.others):
            session.close()
        assert self.live.backend.closed
        limit = time.monotonic() + PATIENCE
        while left := [t for t in threading.enumerate() if t not in self.threads and t.is_alive()]:
            assert time.monotonic() < limit, left
            time.sleep(0.001)
        assert self.peak.risen() < BYTES


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("turns") / "bundle")


@pytest.mark.parametrize("number", seeds("turns", 4))
def test_turns_keep_their_contract(bundle: Path, number: int) -> None:
    machine = seed(number)(type("Turns", (Contract,), {"root": bundle}))
    quick = settings(
        max_examples=20,
        stateful_step_count=30,
        deadline=None,
        database=None,
        phases=(Phase.generate,),  # shrinking takes long where a call never ends
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=quick)
