"""Measure live turns: how soon text and sound come, what runs at once, and what the host code costs.

    python -m benchmarks.live BUNDLE [--reference CHECKPOINT] [--codes 500]

Writes docs/results/live.json and live.md. Everything runs in this process, one thing after the other, on the same
threads. ``--reference`` adds transformers' ``generate``, which gives its waveform when everything is done. Speech does
not end by itself here: stop tokens are suppressed on both sides, so that every reply has the same length.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import textwrap
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from omniport.runtime import AudioChunk, Done, Event, OmniSession, SamplingConfig, TextDelta
from omniport.runtime.backends.onnxruntime.packages import import_onnxruntime
from omniport.runtime.bench.reply_timing import QUESTION
from omniport.runtime.generation.sampling import Sampler
from omniport.runtime.prompt.builder import build_prompt
from omniport.runtime.system.host import cpu_name, physical_cores

from benchmarks.harness import RESULTS, command_line, record, table

TOKENS = 40
#: lengths of the spoken questions
SECONDS = (2, 10, 30)


def measure(options: argparse.Namespace, _: object) -> Iterator[dict[str, Any]]:
    """All figures, by name."""
    bundle, codes = options.bundle, options.codes
    session = OmniSession.open(bundle, backend="ort-cpu")
    figures: dict[str, Any] = {"environment": environment(), "codes": codes, "text_tokens": TOKENS}
    warm_up(session)
    figures["first_token"] = [first_token(session, length) for length in SECONDS]
    figures["reply"] = reply(session, codes)
    figures["overlap"] = overlap(bundle, max(36, codes // 8))
    soon = figures["reply"]["first_audio"]
    figures["ratios"] = {"first_audio_sooner_than_sequential": figures["reply"]["sequential_first_audio"] / soon}
    if options.reference is not None:
        figures["reference"] = of_reference(session, options.reference, codes)
        figures["ratios"]["first_audio_sooner_than_reference"] = figures["reference"]["waveform_after"] / soon
    figures["sampling"] = sampling(session)
    session.close()
    yield figures


def environment() -> dict[str, Any]:
    """What it ran on."""
    return {
        "processor": cpu_name(),
        "cores": physical_cores(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        "onnxruntime": import_onnxruntime().__version__,
    }


def talker_config(session: OmniSession, codes: int) -> SamplingConfig:
    """The bundle's own sampling, of ``codes`` codec tokens."""
    assert session.manifest.talker_sampling is not None
    return msgspec.structs.replace(session.manifest.talker_sampling, max_new_tokens=codes)


def ask(session: OmniSession, codes: int, **options: Any) -> Iterator[Event]:
    """The benchmark's spoken reply."""
    return session.reply(
        [{"role": "user", "content": QUESTION}],
        thinker=SamplingConfig(max_new_tokens=TOKENS),
        talker=talker_config(session, codes),
        ignore_stop=True,
        **options,
    )


def warm_up(session: OmniSession) -> None:
    """Load every graph and touch every weight."""
    samples = np.zeros(32000, np.float32)
    content = [{"type": "audio", "audio": (samples, 16000)}, {"type": "text", "text": QUESTION}]
    for _ in session.reply([{"role": "user", "content": content}], talker=talker_config(session, 26), ignore_stop=True):
        pass


def first_token(session: OmniSession, seconds: int, rounds: int = 3) -> dict[str, Any]:
    """Time to the first token after the question's end, for sound pushed while it was spoken and given at once."""
    rng = np.random.default_rng(seconds)
    samples = (0.1 * rng.standard_normal(16000 * seconds)).astype(np.float32)
    config = SamplingConfig(max_new_tokens=1)
    live: list[float] = []
    whole: list[float] = []
    late = total = 0
    for _ in range(rounds):
        session.reset()
        turn = session.turn(speak=False, thinker=config, ignore_stop=True)
        for start in range(0, len(samples), 1600):  # 100 ms
            turn.push_audio(samples[start : start + 1600], 16000)
        done = last(turn.commit())
        live.append(first(done.stats.time_to_first_token))
        late, total = done.stats.late_tokens, done.stats.prompt_tokens
        asked = [{"role": "user", "content": [{"type": "audio", "audio": (samples, 16000)}]}]
        done = last(session.reply(asked, speak=False, thinker=config, ignore_stop=True))
        whole.append(first(done.stats.time_to_first_token))
    return {
        "seconds_of_sound": seconds,
        "pushed": statistics.median(live),
        "at_once": statistics.median(whole),
        "ratio": statistics.median(whole) / statistics.median(live),
        "tokens_left_at_commit": late,
        "prompt_tokens": total,
    }


def reply(session: OmniSession, codes: int) -> dict[str, Any]:
    """The streamed reply of ``codes`` codes, and the same with sound at the end, one worker after the other."""
    streamed, burnt = timed(ask(session, codes))
    stats = streamed.stats
    whole = last(ask(session, codes, threads=False, window="whole")).stats
    early = statistics.median(first_audio(session, codes) for _ in range(3))
    return {
        "codec_tokens": stats.codec_tokens,
        "audio_seconds": stats.audio_seconds,
        "first_token": stats.time_to_first_token,
        "first_audio": early,
        "first_audio_of_the_full_run": stats.time_to_first_audio,
        "sequential_first_audio": whole.time_to_first_audio,
        "total": stats.total_time,
        "real_time_factor": stats.real_time_factor,
        "underruns": stats.underruns,
        "underrun_seconds": stats.underrun_seconds,
        "busy_by_worker": {name: worker.busy for name, worker in stats.workers.items()},
        "waiting_by_worker": {name: worker.waiting for name, worker in stats.workers.items()},
        "busy_by_stage": stats.busy,
        "wall_over_busy": stats.total_time / sum(worker.busy for worker in stats.workers.values()),
        "cores_at_work": burnt / stats.total_time,
        "peak_memory_bytes": stats.peak_memory_bytes,
    }


def overlap(bundle: Path, codes: int) -> list[dict[str, Any]]:
    """The same windows with the workers at once and one after the other, by threads of an operator."""
    rows = []
    for threads in range(1, physical_cores() + 1):
        session = OmniSession.open(bundle, backend="ort-cpu", threads=threads)
        warm_up(session)
        at_once, burnt = timed(ask(session, codes))
        in_turn, burnt_in_turn = timed(ask(session, codes, threads=False))
        alone = {name: worker.busy for name, worker in in_turn.stats.workers.items()}
        rows.append(
            {
                "threads_of_an_operator": threads,
                "codes": codes,
                "at_once": at_once.stats.total_time,
                "in_turn": in_turn.stats.total_time,
                "ratio": at_once.stats.total_time / in_turn.stats.total_time,
                "busy_in_turn": alone,
                "share_of_longest_worker": max(alone.values()) / sum(alone.values()),
                "cores_at_work_at_once": burnt / at_once.stats.total_time,
                "cores_at_work_in_turn": burnt_in_turn / in_turn.stats.total_time,
                "host_share": 1 - sum(in_turn.stats.run_seconds.values()) / in_turn.stats.total_time,
            }
        )
        session.close()
    return rows


def timed(events: Iterator[Event]) -> tuple[Done, float]:
    """Run to the end; also the processor seconds of all threads."""
    burnt = time.process_time()
    done = last(events)
    return done, time.process_time() - burnt


def first_audio(session: OmniSession, codes: int) -> float:
    """Time to the first sample of a reply that is cut off there."""
    events = ask(session, codes)
    for event in events:
        if isinstance(event, AudioChunk):
            events.close()  # type: ignore[attr-defined]
            return event.time
    raise AssertionError("a spoken reply without sound")


def of_reference(session: OmniSession, checkpoint: Path, codes: int) -> dict[str, Any]:
    """transformers' generate on the same prompt: its waveform comes at the end."""
    from omniport.export.evaluation.transformers_rival import TransformersRival

    rival = TransformersRival(session.bundle, str(checkpoint), physical_cores())
    prompt = build_prompt([{"role": "user", "content": QUESTION}], session.manifest, session.text_codec)
    seconds, audio_seconds = rival.reply(prompt.token_ids, TOKENS, codes)
    return {name: version(name) for name in rival.libraries} | {
        "waveform_after": seconds,
        "audio_seconds": audio_seconds,
    }


def sampling(session: OmniSession, picks: int = 50) -> dict[str, float]:
    """Milliseconds to pick one token from the thinker's logits."""
    vocabulary = session.manifest.thinker.vocab_size
    logits = np.random.default_rng(0).standard_normal(vocabulary).astype(np.float32) * 3
    configs = {
        "greedy": SamplingConfig(),
        "top_k_40_top_p_0.8": SamplingConfig(temperature=0.9, top_k=40, top_p=0.8, repetition_penalty=1.05),
        "top_p_0.9": SamplingConfig(temperature=1.0, top_p=0.9),
    }
    out: dict[str, float] = {"vocabulary": vocabulary}
    for name, config in configs.items():
        sampler, times = Sampler(config, np.random.default_rng(0)), []
        for _ in range(picks):
            begin = time.perf_counter()
            sampler.pick(logits, [1, 2, 3])
            times.append(1e3 * (time.perf_counter() - begin))
        out[name] = statistics.median(times)
    return out


def last(events: Iterator[Event]) -> Done:
    """Run to the end."""
    done: Event | None = None
    texts = 0
    for done in events:
        texts += isinstance(done, TextDelta)
    assert isinstance(done, Done)
    assert texts
    return done


def first(seconds: float | None) -> float:
    """A time that was measured."""
    assert seconds is not None
    return seconds


def page(figures: dict[str, Any]) -> str:
    """docs/results/live.md."""
    reply, environment, picks = figures["reply"], figures["environment"], figures["sampling"]
    reference, ratios = figures.get("reference"), figures["ratios"]
    after = {
        "streamed": (reply["first_audio"], reply["total"]),
        "one worker after the other, sound at the end": (reply["sequential_first_audio"],) * 2,
    }
    sooner = f"{ratios['first_audio_sooner_than_sequential']:.1f} times sooner than from the same graphs in turn"
    if reference is not None:
        after[f"transformers {reference['transformers']}, `generate`"] = (reference["waveform_after"],) * 2
        sooner = f"{ratios['first_audio_sooner_than_reference']:.1f} times sooner than transformers', and {sooner}"
    busy = ", ".join(f"{name} {seconds:.1f}" for name, seconds in reply["busy_by_worker"].items())
    parts: list[str | list[str]] = [
        "# Live turns, measured",
        "Made by `python -m benchmarks.live`: do not edit by hand. A random-weight checkpoint (`make-checkpoint "
        "--size small`: the 3B's layer widths, four layers a stack) in FP32 on "
        f"{environment['processor']}, {environment['cores']} cores, ONNX Runtime {environment['onnxruntime']}; "
        "everything in one process, one thing after the other.",
        "## First sound",
        f"A reply of {figures['text_tokens']} text tokens and {figures['codes']} codes "
        f"({reply['audio_seconds']:.0f} s of speech):",
        table(
            ("way", "first sound after", "everything after"),
            ((way, *(f"{seconds:.1f} s" for seconds in times)) for way, times in after.items()),
        ),
        f"The first sound comes {sooner}. Windows with context solve more mel than the whole at once does, so the last "
        f"sound is later. The real-time factor is {reply['real_time_factor']:.1f}: this model is too large for these "
        f"cores, and a loudspeaker would have run dry {reply['underruns']} times.",
        "## First token",
        "Sound pushed in pieces of 100 ms while it is spoken, against the same sound in one message; from the "
        "question's end.",
        _first_tokens(figures["first_token"]),
        "A piece of 2 s is complete 12.5 ms after its end: of 2 s of sound, all of the sound is left.",
        "## Workers at once",
        f"Of the streamed reply of {figures['codes']} codes: wall time over the workers' busy times "
        f"{reply['wall_over_busy']:.2f}; {reply['cores_at_work']:.2f} cores at work; busy seconds {busy}. Busy times "
        "of workers that share cores grow, so the rows below compare with the same work done in turn.",
        _overlaps(figures["overlap"]),
        "No more can be gained than the longest worker leaves: token2wav, which is the DiT, and the vocoder are most "
        "of the work. With two threads, operators already keep both cores at work. The host's share is the time "
        f"outside graph runs of the workers in turn. Picking one of {picks['vocabulary']} tokens takes "
        f"{picks['greedy']:.2f} ms greedily, {picks['top_k_40_top_p_0.8']:.1f} ms with top-k 40 and top-p 0.8, "
        f"{picks['top_p_0.9']:.1f} ms with top-p 0.9.",
        *_soaked(json.loads((RESULTS / "live-soak.json").read_text(encoding="utf-8"))),
    ]
    filled = [textwrap.fill(part, 120) if isinstance(part, str) else "\n".join(part) for part in parts]
    return "\n\n".join(filled) + "\n"


def _soaked(found: dict[str, Any]) -> list[str]:
    """What `benchmarks.soak` measured."""
    return [
        "## Many turns",
        f"`python -m benchmarks.soak` on Wren, the small trained model: {found['turns']} turns with random pushes, "
        f"sizes and cancels in {found['seconds']:.0f} s, {found['spoken']} of them spoken. {found['compared']} replies "
        "equal "
        f"their oracle's in text, codec tokens and sound (the same conversation in new caches, one worker after the "
        f"other); {found['cancelled']} were cancelled, {found['dropped_turns']} early turns left the context. Memory "
        f"grew by {found['memory_growth']:.1%} from the second quarter to the last, threads by "
        f"{found['threads_most'] - found['threads_first']}.",
    ]


def _first_tokens(rows: list[dict[str, Any]]) -> list[str]:
    return table(
        ("sound", "pushed", "at once", "ratio", "tokens left at commit"),
        (
            (
                f"{r['seconds_of_sound']} s",
                f"{r['pushed']:.2f} s",
                f"{r['at_once']:.2f} s",
                f"{r['ratio']:.1f}",
                f"{r['tokens_left_at_commit']} of {r['prompt_tokens']}",
            )
            for r in rows
        ),
    )


def _overlaps(rows: list[dict[str, Any]]) -> list[str]:
    columns = ("ratio", "longest worker's share", "cores at work, in turn", "host's share")
    return table(
        ("threads of an operator", "codes", "at once", "in turn", *columns),
        (
            (
                r["threads_of_an_operator"],
                r["codes"],
                f"{r['at_once']:.1f} s",
                f"{r['in_turn']:.1f} s",
                f"{r['ratio']:.2f}",
                f"{r['share_of_longest_worker']:.2f}",
                f"{r['cores_at_work_in_turn']:.2f}",
                f"{100 * r['host_share']:.1f} %",
            )
            for r in rows
        ),
    )


def main() -> None:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--codes", type=int, default=500)
    record("live", page, measure, parser)


if __name__ == "__main__":
    main()
