"""Talk to a bundle for hundreds of turns, with random pushes, cancels and sizes, and compare each with an oracle.

Usage: python -m benchmarks.soak BUNDLE [--turns 200] [--seed 0] [--context 700] [--json F]

The oracle of a turn is the same conversation, token for token, in new KV caches and with the workers one after the
other. A turn that was not cancelled has to give its text, codec tokens and sound. Memory and threads have to stay flat.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omniport.runtime import AudioChunk, Done, Event, OmniSession, SamplingConfig, TextDelta, TurnsDropped
from omniport.runtime.events import Stats
from omniport.runtime.generation.conversation import Conversation
from omniport.runtime.pipeline.reply import Reply
from omniport.runtime.pipeline.task import make_task
from omniport.runtime.reply_options import ReplyOptions

from benchmarks.harness import command_line


def soak(
    bundle: Path, turns: int, seed: int = 0, context: int = 700, progress: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Run; gives figures. AssertionError where a turn differs from its oracle.

    Args:
        context: capacity of the KV caches, small, so that the conversation outgrows them often.
    """
    session = OmniSession.open(bundle, backend="ort-cpu", threads=1, max_context=context)
    rng = np.random.default_rng(seed)
    memory: list[int] = []
    threads: list[int] = []
    counts = dict.fromkeys(("compared", "spoken", "cancelled", "dropped_turns", "samples"), 0)
    gc.collect()
    gc.freeze()  # what was there before is not looked at after every turn
    try:
        for k in range(turns):
            _turn(session, rng, counts)
            memory.append(resident_bytes())
            threads.append(threading.active_count())
            if progress is not None:
                progress(k + 1)
    finally:
        gc.unfreeze()
        session.close()
    quarter = turns // 4
    second, last = (statistics.median(memory[part]) for part in (slice(quarter, 2 * quarter), slice(-quarter, None)))
    return {
        "turns": turns,
        **counts,
        "memory_second_quarter": second,
        "memory_last_quarter": last,
        "memory_growth": last / second - 1,
        "threads_most": max(threads),
        "threads_first": threads[0],
    }


def resident_bytes() -> int:
    """Resident set of this process (Linux)."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _turn(session: OmniSession, rng: np.random.Generator, counts: dict[str, int]) -> None:
    speak = rng.random() < 0.3
    warm = rng.random() < 0.5
    options: dict[str, Any] = {
        "speak": bool(speak),
        "seed": int(rng.integers(1 << 30)),
        "thinker": SamplingConfig(max_new_tokens=int(rng.integers(1, 30)), temperature=1.0 if warm else 0.0),
        "talker": SamplingConfig(max_new_tokens=int(rng.choice([1, 5, 11, 12, 13])), temperature=1.0 if warm else 0.0),
    }
    if rng.random() < 0.1:
        session.reset()
    turn = session.turn(**options)
    _fill(turn, rng)
    if rng.random() < 0.1:  # before it is complete
        turn.cancel()
        counts["cancelled"] += 1
        return
    events = turn.commit()
    conversation = session._conversation
    if rng.random() < 0.2:
        _interrupt(turn, events, rng)
        counts["cancelled"] += 1
        return
    text, sound, done, dropped = _collect(events)
    wanted = _oracle(session, conversation, options)
    assert (done.token_ids, done.codec_ids) == (wanted[2].token_ids, wanted[2].codec_ids)
    assert text == done.text == wanted[2].text
    assert done.stats.prompt_tokens == wanted[2].stats.prompt_tokens
    if speak and done.codec_ids:
        assert len(sound) == len(wanted[1]) == 480 * len(done.codec_ids)
        scale = float(np.sqrt(np.mean(wanted[1] ** 2)))
        assert scale > 1e-4, "the oracle is silent: nothing is compared"
        assert float(np.abs(sound - wanted[1]).max()) < 1e-2 * scale
        counts["spoken"] += 1
        counts["samples"] += len(sound)
    counts["compared"] += 1
    counts["dropped_turns"] += dropped


def _fill(turn: Any, rng: np.random.Generator) -> None:
    for _ in range(int(rng.integers(1, 4))):
        kind = rng.random()
        if kind < 0.4:
            turn.push_text("words " * int(rng.integers(1, 20)))
        elif kind < 0.9:
            samples = (rng.standard_normal(int(rng.integers(800, 60000))) * 0.1).astype(np.float32)
            cut = int(rng.integers(1, len(samples)))
            for part in (samples[:cut], samples[cut:]):
                turn.push_audio(part, 16000)
        else:
            turn.push_image(rng.integers(0, 255, (56, 84, 3), np.uint8))


def _interrupt(turn: Any, events: Iterator[Event], rng: np.random.Generator) -> None:
    """Cancel from another thread at some moment of the reply."""
    timer = threading.Timer(float(rng.exponential(0.05)), turn.cancel)
    timer.start()
    for _ in events:
        pass
    timer.join()


def _collect(events: Iterator[Event]) -> tuple[str, NDArray[np.float32], Done, int]:
    text, sound, dropped = "", [np.zeros(0, np.float32)], 0
    done: Done | None = None
    for event in events:
        if isinstance(event, Done):
            done = event
        elif isinstance(event, AudioChunk):
            sound.append(event.samples)
        elif isinstance(event, TurnsDropped):
            dropped += event.turns
        elif isinstance(event, TextDelta):
            text += event.text
    assert done is not None
    return text, np.concatenate(sound), done, dropped


def _oracle(
    session: OmniSession, conversation: Conversation, options: dict[str, Any]
) -> tuple[str, NDArray[np.float32], Done, int]:
    """The same conversation up to the question, whole, in new caches, one worker after the other."""
    task = make_task(
        session.bundle,
        session.text_codec,
        session.backend,
        ReplyOptions(**options, threads=False),
        session.max_context,
        session._shared,
    )
    fresh = Conversation(session.bundle, session._new_cache, session.max_context)
    fresh.use(task.backend, task.timer)
    segments = conversation.entries.segments()[:-2]  # without the reply and what ends it
    fresh.begin_turn()
    for segment in segments:
        fresh.add(segment)
    reply = Reply(task, fresh, Stats(), time.perf_counter())
    return _collect(reply.events())


def main() -> None:
    """Parse, run, print."""
    parser = command_line(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--context", type=int, default=700)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    started = time.perf_counter()
    figures = soak(options.bundle, options.turns, options.seed, options.context)
    figures["seconds"] = round(time.perf_counter() - started, 1)
    text = json.dumps(figures, indent=2)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
