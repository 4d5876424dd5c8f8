"""Measure what live sound loses by not knowing its loudest moment beforehand.

Usage: python scripts/measure_floor.py BUNDLE [--json F]

Whisper's log-mel is floored 8 (80 dB of power) under the loudest moment of the whole clip. A live turn uses the loudest
moment so far; ``exact=True`` encodes again what the final floor changes. Both are compared here on recordings of human
speech (Debian's alsa-utils) and on spoken sentences (espeak-ng), as they are and made quiet at the start.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omniport.runtime import Done, OmniSession, SamplingConfig
from omniport.runtime.media.audio import load_audio

RECORDINGS = Path("/usr/share/sounds/alsa")
SENTENCE = "Could you please tell me what the weather will be like tomorrow, and whether I should take an umbrella?"
RATE = 16000
TOKENS = 24
Samples = NDArray[np.float32]


def measure(bundle: Path) -> list[dict[str, Any]]:
    """A row for each clip and loudness."""
    session = OmniSession.open(bundle, backend="ort-cpu")
    rows = []
    for name, samples in clips():
        for label, heard in (
            ("as recorded", samples),
            ("2.2 s of faint noise before", np.concatenate([noise(2.2), samples])),
            ("first half 10 dB quieter", quieter(samples, 10)),
            ("first half 20 dB quieter", quieter(samples, 20)),
            ("first half 40 dB quieter", quieter(samples, 40)),
        ):
            rows.append({"clip": name, "loudness": label, **compare(session, heard)})
    session.close()
    return rows


def noise(seconds: float) -> Samples:
    """A quiet room: white noise of -66 dB."""
    return (5e-4 * np.random.default_rng(0).standard_normal(round(seconds * RATE))).astype(np.float32)


def quieter(samples: Samples, decibels: float) -> Samples:
    """The first half so much quieter."""
    gain = np.where(np.arange(len(samples)) < len(samples) // 2, 10.0 ** (-decibels / 20), 1.0)
    return (samples * gain).astype(np.float32)


def clips() -> Iterator[tuple[str, Samples]]:
    """Recordings of words, joined to one of some seconds, and a sentence."""
    names = [
        name
        for name in ("Front_Center", "Rear_Left", "Side_Right", "Front_Left")
        if (RECORDINGS / f"{name}.wav").exists()
    ]
    if names:
        words = [load_audio(str(RECORDINGS / f"{name}.wav"), RATE) for name in names]
        yield "recorded words", np.concatenate(words)
    if shutil.which("espeak-ng"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "said.wav"
            subprocess.run(["espeak-ng", "-s", "150", "-w", str(path), SENTENCE], check=True, capture_output=True)
            yield "spoken sentence", load_audio(str(path), RATE)


def compare(session: OmniSession, samples: Samples) -> dict[str, Any]:
    """Default against exact: embeddings of the sound, and the greedy reply."""
    (rows, ids), (exact_rows, exact_ids) = (answer(session, samples, exact) for exact in (False, True))
    energy = float(np.sqrt(np.mean(exact_rows**2)))
    assert energy > 1e-3, "the embeddings are silent"
    difference = np.sqrt(np.mean((rows - exact_rows) ** 2, axis=1)) / energy
    same = next((k for k, (a, b) in enumerate(zip(ids, exact_ids, strict=True)) if a != b), len(ids))
    return {
        "seconds": round(len(samples) / RATE, 2),
        "embeddings": len(rows),
        "embeddings_changed": int((difference > 1e-6).sum()),
        "rel_rms": float(np.sqrt(np.mean((rows - exact_rows) ** 2)) / energy),
        "rel_rms_worst": float(difference.max()),
        "greedy_tokens_equal": same,
        "greedy_tokens": len(exact_ids),
    }


def answer(session: OmniSession, samples: Samples, exact: bool) -> tuple[Samples, list[int]]:
    """Embeddings [n, H] of the sound as the thinker got them, and the ids of the reply."""
    session.reset()
    turn = session.turn(speak=False, thinker=SamplingConfig(max_new_tokens=TOKENS), exact=exact)
    for start in range(0, len(samples), 1600):
        turn.push_audio(samples[start : start + 1600], RATE)
    done = list(turn.commit())[-1]
    assert isinstance(done, Done)
    conversation = session._conversation
    assert conversation is not None
    media = [segment.rows for segment in conversation.turns[-1] if segment.rows is not None]
    return np.concatenate(media), done.token_ids


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| clip | loudness | embeddings changed | rel. RMS | worst embedding | greedy tokens equal |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['clip']}, {r['seconds']} s | {r['loudness']} | {r['embeddings_changed']} of {r['embeddings']} "
        f"| {r['rel_rms']:.2g} | {r['rel_rms_worst']:.2g} | {r['greedy_tokens_equal']} of {r['greedy_tokens']} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="Measure the floor of live sound.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = measure(options.bundle)
    if not rows:
        parser.error("there is no speech here: install the Debian packages alsa-utils and espeak-ng")
    print(table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
