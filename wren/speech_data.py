"""Sentences spoken by flite: replies in two voices at 24 kHz, questions in two at 16 kHz and several speeds.

Every utterance is a file of its own, named by its text and speed, and a line of its voice's index (formats: sizes.py).
What is there is not spoken again, so a run that stopped goes on, and a wider world only adds.

    python -m wren.speech_data replies [--work DIR]
    python -m wren.speech_data questions [--work DIR]
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import soundfile  # type: ignore[import-untyped]
import soxr  # type: ignore[import-untyped]
from numpy.typing import NDArray
from omniport.runtime.system.host import usable_cpus

from wren import sentences, sizes

Sound = NDArray[np.float32]

FLITE_RATE = 16000
LEVEL = 0.1  # RMS of the loud samples
PEAK = 0.9  # no sample is louder: nothing clips
TOGETHER = 64  # sentences: a run that is stopped loses no more
CHUNK = 1000  # sentences of one voice, before the next voice speaks as many
SHOWN_EVERY = 500  # sentences
SILENCE_BEFORE, SILENCE_AFTER = 0.04, 0.08  # seconds that stay


@dataclass(frozen=True)
class Utterance:
    """One line of a voice's index."""

    text: str
    voice: str
    speed: float
    split: str
    file: str
    samples: int
    rate: int


def speak(text: str, voice: str, speed: float = 1.0, rate: int = FLITE_RATE) -> Sound:
    """What flite says, [n] at ``rate``: trimmed, levelled, and at 24 kHz a whole number of codes long."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        stretch = ["--setf", f"duration_stretch={1 / speed:.4f}"]
        subprocess.run(["flite", "-voice", voice, *stretch, "-t", text, "-o", file.name], check=True)
        sound, own_rate = soundfile.read(file.name, dtype="float32")
    if own_rate != rate:
        sound = soxr.resample(sound, own_rate, rate)
    sound = level(trim(sound, rate))
    if rate == sizes.RATE:
        sound = np.pad(sound, (0, -len(sound) % sizes.SAMPLES_PER_CODE))
    return sound.astype(np.float32)


def sounds(wanted: Sequence[tuple[str, str, float]], voice: str, rate: int) -> Iterator[Sound]:
    """What flite says of every (text, split, speed), in their order: as many at once as there are cores."""
    with ThreadPoolExecutor(len(usable_cpus())) as pool:
        for at in range(0, len(wanted), TOGETHER):
            some = wanted[at : at + TOGETHER]
            yield from pool.map(lambda one: speak(one[0], voice, one[2], rate), some)


def trim(sound: Sound, rate: int) -> Sound:
    """Without the silence at both ends, but for a little."""
    loud = np.flatnonzero(np.abs(sound) > 0.01 * np.abs(sound).max())
    first, last = loud[0] - round(SILENCE_BEFORE * rate), loud[-1] + round(SILENCE_AFTER * rate)
    return sound[max(0, first) : last]


def level(sound: Sound) -> Sound:
    """All utterances equally loud, however much silence they hold."""
    loud = sound[np.abs(sound) > 0.02 * np.abs(sound).max()]
    sound = sound * (LEVEL / np.sqrt(np.mean(loud**2)))
    return sound * min(1.0, PEAK / np.abs(sound).max())


def disturb(sound: Sound, draw: np.random.Generator) -> Sound:
    """A question as a room and a microphone give it: 4 to 24 dB down from full scale, noise 12 to 40 dB below it.

    The noise is between white and brown: its spectrum falls with a power of the frequency between 0 and 2.
    """
    fast = 1 << len(sound).bit_length()  # a power of two: other lengths take ten times as long
    spectrum = np.fft.rfft(draw.standard_normal(fast))
    spectrum[1:] /= np.arange(1, len(spectrum)) ** draw.uniform(0, 1)
    noise = np.fft.irfft(spectrum)[: len(sound)]
    ratio = 10 ** (-draw.uniform(12, 40) / 20)
    noisy = sound + noise * (ratio * np.std(sound) / np.std(noise))
    return (noisy * (10 ** (-draw.uniform(4, 24) / 20) / np.abs(noisy).max())).astype(np.float32)


def spoken(work: Path, voice: str) -> list[Utterance]:
    """What is spoken already, in the order in which it was."""
    index = work / "speech" / voice / "index.jsonl"
    if not index.exists():
        return []
    # the last line may be half written yet: it has no end
    return [Utterance(**json.loads(line)) for line in index.read_text().splitlines(True) if line.endswith("\n")]


def sound_of(work: Path, utterance: Utterance) -> NDArray[np.int16]:
    """int16 [n]"""
    return soundfile.read(work / "speech" / utterance.voice / utterance.file, dtype="int16")[0]


class Progress:
    """How many of all sentences are spoken, and how long the others will take. What was there already took no time."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.spoken = total, 0, 0
        self.begin = time.monotonic()

    def spoke(self) -> None:
        self.done, self.spoken = self.done + 1, self.spoken + 1
        if self.done % SHOWN_EVERY == 0 or self.done == self.total:
            left = (time.monotonic() - self.begin) / self.spoken * (self.total - self.done)
            print(f"{self.done} of {self.total} spoken, {left / 60:.1f} min left", flush=True)


def speak_all(
    work: Path,
    voice: str,
    flite_voice: str,
    sentences: Iterable[tuple[str, str, float]],
    rate: int,
    progress: Progress | None = None,
) -> None:
    """Speak every (text, split, speed) that is not yet in ``speech/VOICE``. One process at a time may, on all cores."""
    wanted = list(sentences)
    folder = work / "speech" / voice
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "index.jsonl").open("a+b") as index:
        fcntl.flock(index, fcntl.LOCK_EX)
        index.seek(0)
        index.truncate(index.read().rfind(b"\n") + 1)  # a stopped run may have left half a line
        there = {(u.text, u.speed) for u in spoken(work, voice)}
        todo = [s for s in dict.fromkeys(wanted) if (s[0], s[2]) not in there]
        progress = progress or Progress(len(wanted))
        progress.done += len(wanted) - len(todo)
        for (text, split, speed), sound in zip(todo, sounds(todo, flite_voice, rate), strict=True):
            name = hashlib.blake2s(f"{speed} {text}".encode(), digest_size=8).hexdigest() + ".flac"
            soundfile.write(folder / name, np.round(sound * 32767).astype(np.int16), rate)
            line = asdict(Utterance(text, voice, speed, split, name, len(sound), rate))
            index.write(json.dumps(line).encode() + b"\n")
            index.flush()
            progress.spoke()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["replies", "questions"])
    parser.add_argument("--work", type=Path, default=sizes.WORK)
    args = parser.parse_args()
    if args.what == "replies":
        train, held_out = (sentences.reply_sentences(split) for split in ("train", "held_out"))
        voices, speeds, rate = sizes.REPLY_VOICES, sizes.REPLY_SPEEDS, sizes.RATE
    else:
        train, held_out = (sentences.question_sentences(split) for split in ("train", "held_out"))
        train = [*sentences.clip_words(), *train]
        voices = {voice: voice for voice in sizes.QUESTION_VOICES}
        speeds, rate = sizes.QUESTION_SPEEDS, sizes.QUESTION_RATE
    # what the speech parts are trained with and heard by comes first, so that they need not wait for the rest
    first = sizes.SPEECH_REPLIES
    ordered = [(t, "train") for t in train[:first]] + [(t, "held_out") for t in held_out]
    ordered += [(t, "train") for t in train[first:]]
    progress = Progress(len(ordered) * len(voices))
    for at in range(0, len(ordered), CHUNK):
        for voice, flite_voice in voices.items():
            some = [(text, split, speed_of(text, voice, speeds)) for text, split in ordered[at : at + CHUNK]]
            speak_all(args.work, voice, flite_voice, some, rate, progress)


def speed_of(text: str, voice: str, speeds: tuple[float, ...]) -> float:
    """One of the speeds, by the text's hash: each sentence is spoken at one speed by each voice."""
    digest = hashlib.blake2s(f"{voice} {text}".encode(), digest_size=4).digest()
    return speeds[int.from_bytes(digest, "little") % len(speeds)]


if __name__ == "__main__":
    main()
