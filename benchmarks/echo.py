"""Measure echo cancellation beside a loudspeaker, in synthetic rooms; writes docs/results/echo.md.

    python -m benchmarks.echo [--replies 50] [--interruptions 24]

Replies are spoken by flite. A loudspeaker bends them a little, a room (exponentially decaying noise behind the direct
sound) and a delay bring them into the microphone, with noise at -65 dBFS. Somebody who interrupts speaks by espeak-ng.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omniport.runtime.live.echo import RATE, EchoCanceller
from omniport.runtime.live.vad import CHUNK, SileroVad, SpeechGate, SpeechLimits
from omniport.runtime.media.audio import load_audio, resample

from benchmarks.harness import command_line, record, table

Samples = NDArray[np.float32]

#: Hz of replies, and of the microphone
PLAYED, RECORDED = 24_000, 48_000
DELAYS_MS = (20, 100, 300)
RT60 = (0.2, 0.4, 0.6)
#: RMS of an echo, and of somebody as loud, -26 dBFS; room and converters' noise
LEVEL, NOISE = 0.05, 10 ** (-65 / 20)
#: how much louder than the echo the person is, dB
LOUDER = (6, 0, -6)
#: seconds before a reply, and after which an echo counts as converged
GAP, CONVERGED = 1.0, 3.0
REPLIES = (
    "The lighthouse on the far island was built by hand, stone upon stone.",
    "I can see a red car, two bicycles and a dog that waits for somebody.",
    "First heat the oven, then mix the flour with the butter until it is smooth.",
    "It will rain in the afternoon, so take an umbrella with you.",
    "No, the number that you want is written on the box.",
)
VOICES = ("slt", "rms", "awb")
WORDS = ("Wait a moment, please.", "What about tomorrow?", "No, tell me something else.")


def speak(command: list[str], rate: int) -> Samples:
    """What a synthesiser says, trimmed; an RMS of ``LEVEL``."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        subprocess.run([*command, file.name], check=True, capture_output=True)
        sound = load_audio(file.name, rate)
    (at,) = np.nonzero(np.abs(sound) > 0.05 * np.abs(sound).max())
    sound = sound[at[0] : at[-1]]
    levelled: Samples = (sound * (LEVEL / np.sqrt(np.mean(sound**2)))).astype(np.float32)
    return levelled


def reply_sound(number: int) -> Samples:
    """A reply at 24 kHz."""
    text, voice = REPLIES[number % len(REPLIES)], VOICES[number % len(VOICES)]
    return speak(["flite", "-voice", voice, "-t", text, "-o"], PLAYED)


def person(number: int) -> Samples:
    """Somebody who interrupts, at the microphone's rate."""
    return speak(["espeak-ng", "-s", "150", WORDS[number % len(WORDS)], "-w"], RECORDED)


def room(rng: np.random.Generator, rt60: float, direct_db: float) -> NDArray[np.float64]:
    """An impulse response: the direct sound, and noise that decays by 60 dB in ``rt60``, ``direct_db`` below it."""
    time = np.arange(round(rt60 * RECORDED)) / RECORDED
    rings = rng.standard_normal(len(time)) * 10 ** (-3 * time / rt60) * (time > 0.002)
    rings *= 10 ** (-direct_db / 20) / np.sqrt(np.sum(rings**2))
    rings[0] = 1
    response: NDArray[np.float64] = rings / np.sqrt(np.sum(rings**2))
    return response


def through(sound: NDArray[Any], response: NDArray[np.float64], delay_ms: float = 0) -> NDArray[np.float64]:
    """Sound as it arrives at the microphone, of the same length."""
    size = 1 << (len(sound) + len(response) - 2).bit_length()
    arrived = np.fft.irfft(np.fft.rfft(sound, size) * np.fft.rfft(response, size), size)
    return np.concatenate([np.zeros(round(delay_ms * RECORDED / 1000)), arrived])[: len(sound)]


def echo_of(played: Samples, rng: np.random.Generator, rt60: float, direct_db: float, delay_ms: float) -> Samples:
    """What the microphone hears of a loudspeaker that bends loud samples, and of the room's noise."""
    sound = resample(played, PLAYED, RECORDED)
    bent = np.tanh(4 * sound) / 4
    heard = through(bent, room(rng, rt60, direct_db), delay_ms)
    return (heard + NOISE * rng.standard_normal(len(heard))).astype(np.float32)


def clean(recorded: Samples, played: Samples, delay_ms: float = 0) -> Samples:
    """Through the canceller as devices hand sound over: the microphone every 10 ms, the loudspeaker every 20 ms."""
    canceller = EchoCanceller(RECORDED, PLAYED, delay_ms=delay_ms)
    near, far = RECORDED // 100, PLAYED // 50
    out = []
    for number in range(len(recorded) // near):
        given = played[number // 2 * far : (number // 2 + 1) * far] if number % 2 == 0 else played[:0]
        out.append(canceller.clean(recorded[number * near : (number + 1) * near], given))
    return np.concatenate(out)


def beginnings(sound: Samples) -> list[float]:
    """Seconds at which hands-free mode, with its defaults, finds a beginning of speech."""
    detector, gate = SileroVad(), SpeechGate(SpeechLimits())
    edges = [gate.push(detector(chunk)) for chunk in sound[: len(sound) // CHUNK * CHUNK].reshape(-1, CHUNK)]
    return [(number + 1) * CHUNK / RATE for number, edge in enumerate(edges) if edge == "start"]


def conversation(count: int, first: int = 0) -> tuple[Samples, list[float]]:
    """Replies with silence between, and the seconds at which they begin."""
    silence = np.zeros(round(GAP * PLAYED), np.float32)
    sounds, begins, length = [silence], [], len(silence)
    for number in range(first, first + count):
        reply = reply_sound(number)
        begins.append(length / PLAYED)
        sounds += [reply, silence]
        length += len(reply) + len(silence)
    return np.concatenate(sounds), begins


def erle(recorded: Samples, cleaned: Samples) -> float:
    """How far the echo is down, dB, once the canceller has converged."""
    heard = resample(recorded, RECORDED, RATE)[: len(cleaned)]
    behind = round(CONVERGED * RATE)
    return float(10 * np.log10(np.mean(heard[behind:] ** 2) / np.mean(np.square(cleaned[behind:]) + 1e-12)))


def quiet(count: int, rt60: float, delay_ms: float, direct_db: float, seed: int) -> dict[str, Any]:
    """Replies that nobody interrupts: what is left of their echo, and what is taken for speech."""
    played, _ = conversation(count, seed)
    recorded = echo_of(played, np.random.default_rng(seed), rt60, direct_db, delay_ms)
    cleaned = clean(recorded, played)
    false = len(beginnings(cleaned))
    return {"rt60": rt60, "delay_ms": delay_ms, "replies": count, "erle": erle(recorded, cleaned), "false": false}


def interrupted(louder: float, rt60: float, delay_ms: float, seed: int) -> float | None:
    """Seconds from somebody's first word in the middle of a second reply until it is noticed; None if it is not."""
    rng = np.random.default_rng(seed)
    played, begins = conversation(2, seed)
    recorded = echo_of(played, rng, rt60, 6.0, delay_ms)
    at = round((begins[1] + rng.uniform(0.7, 1.5)) * RECORDED)
    said = through(person(seed), room(rng, rt60, 6.0)) * 10 ** (louder / 20)
    recorded[at : at + len(said)] += said[: len(recorded) - at].astype(np.float32)
    after = [time - at / RECORDED for time in beginnings(clean(recorded, played))]
    return next((time for time in after if time > 0), None)


def measure(options: argparse.Namespace, _: object) -> Iterator[dict[str, Any]]:
    """Everything that the page shows."""
    places = list(product(RT60, DELAYS_MS))
    each = -(-options.replies // len(places))
    rooms = [quiet(each, rt60, delay, 6.0, number) for number, (rt60, delay) in enumerate(places)]
    result: dict[str, Any] = {"rooms": rooms, "hard": quiet(each, 0.7, 100, 0.0, 99), "interruptions": {}}
    yield result
    each = -(-options.interruptions // len(LOUDER))
    for louder in LOUDER:
        result["interruptions"][str(louder)] = [
            interrupted(louder, *places[number % len(places)], number) for number in range(each)
        ]
        yield result


def page(result: dict[str, Any]) -> str:
    """docs/results/echo.md."""
    rooms, hard = result["rooms"], result["hard"]
    lines = ["# Echo cancellation", ""]
    lines += ["Made by `python -m benchmarks.echo`. Replies of flite, delayed and filtered by synthetic rooms whose"]
    lines += ["reverberation lies 6 dB below the direct sound, through a mild loudspeaker non-linearity, are what the"]
    lines += [
        "microphone hears, beside noise at -65 dBFS. Each row begins with a fresh canceller, without a hint of the"
    ]
    lines += [
        f"delay. ERLE is how far the echo is down after {CONVERGED:g} s, false what hands-free mode takes for speech."
    ]
    lines += ["", "## Nobody speaks", ""]
    rows = [[r["rt60"], r["delay_ms"], r["replies"], f"{r['erle']:.1f}", r["false"]] for r in rooms]
    lines += table(["RT60, s", "delay, ms", "replies", "ERLE, dB", "false"], rows)
    lines += [
        "",
        f"Together: {sum(r['false'] for r in rooms)} false interruptions in {sum(r['replies'] for r in rooms)}",
    ]
    lines += [f"replies, and an echo that is down by {min(r['erle'] for r in rooms):.1f} dB or more.", ""]
    lines += [f"A hall (RT60 of {hard['rt60']:g} s, reverberation as loud as the direct sound, a delay of"]
    lines += [f"{hard['delay_ms']} ms): {hard['erle']:.1f} dB, {hard['false']} false in {hard['replies']} replies."]
    lines += ["", "## Somebody interrupts", "", "A sentence of espeak-ng, in the middle of the second reply.", ""]
    heads = [
        "louder than the echo by, dB",
        "interruptions",
        "heard within 0.6 s",
        "median, s",
        "slowest, s",
        "not heard",
    ]
    rows = []
    for louder, times in result["interruptions"].items():
        heard = sorted(time for time in times if time is not None)
        named = [f"{np.median(heard):.2f}", f"{heard[-1]:.2f}"] if heard else ["-", "-"]
        rows.append([louder, len(times), sum(t <= 0.6 for t in heard), *named, len(times) - len(heard)])
    return "\n".join([*lines, *table(heads, rows)]) + "\n"


def main() -> None:
    """The command."""
    parser = command_line(__doc__)
    parser.add_argument("--replies", type=int, default=50)
    parser.add_argument("--interruptions", type=int, default=24)
    record("echo", page, measure, parser)


if __name__ == "__main__":
    main()
