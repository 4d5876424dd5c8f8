"""The events of a reply: text, sound, dropped turns, and the measurements at the end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TextDelta:
    """Text that one thinker token completed. Empty while a multi-byte character is unfinished.

    A token comes late where its text may be the beginning of a tool call or of a stop string.

    Attributes:
        time: seconds from the question's end until it was ready.
    """

    text: str
    token_id: int
    time: float = 0.0


@dataclass(frozen=True)
class AudioChunk:
    """Consecutive samples of the spoken reply: float32 [n] in -1..1.

    Attributes:
        time: seconds from the question's end until it was ready.
    """

    samples: NDArray[np.float32]
    sample_rate: int
    index: int
    time: float = 0.0


@dataclass(frozen=True)
class ToolCallDelta:
    """The next piece of a tool call that is being written. The first one comes when the call's name is known.

    What is written counts as a call once its ``ToolCall`` comes. One that turns out to be no valid JSON, or that is
    never finished, gets none: it was text, and follows as ``TextDelta``.

    Attributes:
        id: of the call.
        arguments: the next piece of their JSON; may be empty.
        time: seconds from the question's end until it was ready.
    """

    id: str
    name: str
    arguments: str
    time: float = 0.0


@dataclass(frozen=True)
class ToolCall:
    """A complete tool call. It is never spoken.

    Attributes:
        id: made up for it, unique.
        name: what it calls, which need not be one of the tools that there are.
        arguments: a JSON object, as the model wrote it.
        time: seconds from the question's end until it was ready.
    """

    id: str
    name: str
    arguments: str
    time: float = 0.0


@dataclass(frozen=True)
class TurnsDropped:
    """The conversation outgrew the KV cache: its oldest turns after the system message are forgotten.

    Attributes:
        turns: how many, each a question with its reply.
        prefilled: tokens that had to be prefilled again.
        items: ids of the messages that are forgotten, see ``OmniSession.items``.
    """

    turns: int
    prefilled: int
    items: list[str] = field(default_factory=list)


@dataclass
class WorkerTime:
    """One worker of a reply.

    Attributes:
        busy: seconds at work. Workers that run at once share the processor: the seconds of all may exceed the wall's.
        waiting: seconds for input, for room to put its output, or for its turn.
    """

    busy: float = 0.0
    waiting: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """Tokens by what they stand for. The ends of a medium and the chat template are text."""

    text: int = 0
    audio: int = 0
    image: int = 0
    video: int = 0


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of one reply by modality, as servers bill them.

    Attributes:
        prompt: the whole conversation up to the reply.
        cached: those of them that were in the KV cache before the turn began, and did not have to be prefilled.
        text, codec: of the reply and of its speech.
    """

    prompt: TokenCounts = TokenCounts()
    cached: TokenCounts = TokenCounts()
    text: int = 0
    codec: int = 0


@dataclass(kw_only=True)
class Stats:
    """Measurements of one reply. Times are seconds since the question ended; None where a stage did not run.

    Attributes:
        backend: what ran the graphs.
        prompt_tokens: tokens of the whole conversation up to the reply.
        reused_tokens: those of them that were in the KV cache from before the turn.
        prefilled_tokens: those that were run for this turn, while it was being said and afterwards.
        late_tokens: those of them that were run after the question had ended.
        text_tokens, codec_tokens: tokens of the reply and of its speech.
        usage: the same by modality.
        tokens_per_second, codes_per_second: their number over the time from the question's end to the last of them.
        time_to_first_token, time_to_first_audio, total_time: seconds.
        queued: of these, seconds that the reply waited for its place, see ``OmniSession.open``: no work, and left out
            of the rates.
        real_time_factor: ``total_time`` per second of speech: below 1 speech is made faster than it is heard.
        underruns, underrun_seconds: how often and for how long a loudspeaker would have run dry, had it played from the
            first chunk on.
        busy: seconds in each stage, without waiting for a turn: preprocess, audio_encoder, vision_encoder, prefill,
            thinker, talker_prefill, talker, dit, bigvgan, load.
        run_seconds: seconds inside graph runs, by graph.
        workers: thinker, talker, token2wav (its DiT) and the vocoder beside it.
        solver: that the speech was made by; empty without speech.
        peak_memory_bytes: largest resident set of the process so far; None where the system does not tell.
    """

    backend: str = ""
    prompt_tokens: int = 0
    reused_tokens: int = 0
    prefilled_tokens: int = 0
    late_tokens: int = 0
    text_tokens: int = 0
    codec_tokens: int = 0
    usage: Usage = Usage()
    audio_seconds: float = 0.0
    tokens_per_second: float | None = None
    codes_per_second: float | None = None
    time_to_first_token: float | None = None
    time_to_first_audio: float | None = None
    total_time: float = 0.0
    queued: float = 0.0
    real_time_factor: float | None = None
    underruns: int = 0
    underrun_seconds: float = 0.0
    busy: dict[str, float] = field(default_factory=dict)
    run_seconds: dict[str, float] = field(default_factory=dict)
    workers: dict[str, WorkerTime] = field(default_factory=dict)
    solver: str = ""
    peak_memory_bytes: int | None = None


@dataclass(frozen=True)
class Done:
    """End of the reply.

    Attributes:
        text: what was said, without tool calls. Of a reply that was cancelled, the part that counts as said, see
            ``Turn.cancel``.
        token_ids: with those of tool calls, without the stop token or the stop string.
        codec_ids: without the stop code.
        finish_reason: ``stop``: the model ended, or wrote a stop string; ``tool_calls``: the model ended and has called
            tools; ``length``: ``max_new_tokens``; ``context``: the KV cache is full; ``cancelled``.
        speech_finish_reason: the same of the speech, without ``tool_calls``; None without speech.
        tool_calls: the complete ones.
    """

    text: str
    token_ids: list[int]
    codec_ids: list[int]
    stats: Stats
    finish_reason: str = "stop"
    speech_finish_reason: str | None = None
    tool_calls: list[ToolCall] = field(default_factory=list, kw_only=True)


#: what the thinker writes
TextEvent = TextDelta | ToolCallDelta | ToolCall
Event = TextEvent | AudioChunk | TurnsDropped | Done


def underruns(chunks: Iterable[tuple[float, float]]) -> tuple[int, float]:
    """How often a loudspeaker that starts with the first chunk runs dry, and for how many seconds in all.

    Args:
        chunks: for each, the seconds at which it was ready and the seconds that it lasts.
    """
    count, dry, end = 0, 0.0, None
    for ready, duration in chunks:
        if end is not None and ready > end:
            count += 1
            dry += ready - end
        end = max(ready, ready if end is None else end) + duration
    return count, dry
