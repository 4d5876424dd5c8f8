"""Time a whole spoken reply: first token, first sound, everything."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import suppress

import msgspec

from ..backends.base import Backend
from ..bundle.manifest import SamplingConfig
from ..bundle.parts import PARTS
from ..bundle.reader import Bundle
from ..errors import UsageError
from ..events import AudioChunk, Done, Event
from ..prompt.builder import build_prompt
from ..session import OmniSession
from ..speech.ode import with_method
from ..speech.ode_methods import Solver
from ..speech.windows import Window
from .results import Figure, Timing
from .roofline import spread
from .workloads import Rival, Sizes

CHEAPER: tuple[Solver, ...] = ("midpoint", "fast")
QUESTION = "Tell me in a few sentences what you can hear and see, and how you answer."

Chunks = tuple[tuple[float, float], ...]


def measure_reply(
    bundle: Bundle, backend: Backend, sizes: Sizes, rival: Rival | None, rounds: int
) -> tuple[tuple[Figure, ...], Chunks]:
    """First token, first sound and total of a streamed reply, beside the rival's; and when each piece was ready.

    Once with the reference's solver, and with `midpoint` and `fast` where the bundle has them, which the rival has not.

    Speech does not end by itself on random weights: stop tokens are suppressed on both sides, so that every reply has
    the same length.
    """
    with OmniSession(bundle, backend) as session:
        for _ in ask(session, sizes, "rk4", codes=26):  # loads every graph and touches every weight
            pass
        replies: dict[Solver, list[tuple[dict[str, float], Chunks]]] = {solver: [] for solver in _solvers(bundle)}
        theirs = []
        ids = build_prompt([{"role": "user", "content": QUESTION}], session.manifest, session.text_codec).token_ids
        for _ in range(rounds):
            for solver, timed in replies.items():
                timed.append(_timed(ask(session, sizes, solver)))
            if rival is not None:
                theirs.append(rival.reply(ids, sizes.text_tokens, sizes.speech_codes)[0])
    chunks = replies["rk4"][0][1]
    seconds = sum(duration for _, duration in chunks)
    figures = [figure for solver, timed in replies.items() for figure in _figures(solver, timed, theirs, seconds)]
    return tuple(figures), chunks


def _solvers(bundle: Bundle) -> Iterator[Solver]:
    """The reference's, and the cheaper ones whose time points the bundle's DiT has."""
    yield "rk4"
    assert bundle.manifest.solver is not None
    for solver in CHEAPER:
        with suppress(UsageError):
            with_method(bundle.manifest.solver, solver)
            yield solver


def _figures(
    solver: Solver, replies: list[tuple[dict[str, float], Chunks]], theirs: list[float], seconds: float
) -> list[Figure]:
    figures = []
    for name in ("first token", "first sound", "total"):
        ours = [times[name] for times, _ in replies]
        compared = bool(theirs) and name != "first token"
        figures.append(
            Figure(
                name=name if solver == "rk4" else f"{name}, {solver}",
                size=round(seconds),
                of="seconds of speech",
                count=seconds if name == "total" else 1,
                unit="s of sound" if name == "total" else "reply",
                seconds=spread(ours),
                reference=spread(theirs) if compared else None,
                faster=_ratios(theirs, ours) if compared else None,
                values={key: statistics.median(times[key] for times, _ in replies) for key in _EXTRA}
                if name == "total"
                else {},
            )
        )
    return figures


_EXTRA = ("underruns", "peak_memory_bytes", "dit_seconds", "bigvgan_seconds", "talker_seconds", "thinker_seconds")


def _ratios(theirs: list[float], ours: list[float]) -> Timing:
    return spread([a / b for a, b in zip(theirs, ours, strict=True)])


def _timed(events: Iterator[Event]) -> tuple[dict[str, float], Chunks]:
    chunks: list[tuple[float, float]] = []
    for event in events:
        if isinstance(event, AudioChunk):
            chunks.append((event.time, len(event.samples) / event.sample_rate))
    assert isinstance(event, Done)
    stats = event.stats
    assert stats.time_to_first_token is not None
    busy = {f"{part.name}_seconds": stats.busy.get(part.name, 0.0) for part in PARTS.values() if not part.media}
    return {
        "first token": stats.time_to_first_token,
        "first sound": chunks[0][0],
        "total": stats.total_time,
        "underruns": stats.underruns,
        "peak_memory_bytes": stats.peak_memory_bytes or 0,
        **busy,
    }, tuple(chunks)


def ask(
    session: OmniSession, sizes: Sizes, solver: Solver, codes: int | None = None, window: Window = "stream"
) -> Iterator[Event]:
    """The spoken reply that is measured; of ``codes`` codes if not of as many as ``sizes`` says."""
    config = session.manifest.talker_sampling
    assert config is not None
    return session.reply(
        [{"role": "user", "content": QUESTION}],
        thinker=SamplingConfig(max_new_tokens=sizes.text_tokens),
        talker=msgspec.structs.replace(config, max_new_tokens=codes or sizes.speech_codes),
        solver=solver,
        window=window,
        ignore_stop=True,
    )
