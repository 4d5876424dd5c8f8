"""Measure the word error rate of a spoken reply with the user's speech recogniser."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import unicodedata
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray
from omniport.runtime.bundle.manifest import SamplingConfig
from omniport.runtime.bundle.parts import PARTS
from omniport.runtime.errors import OmniportError, UsageError
from omniport.runtime.events import AudioChunk, Done
from omniport.runtime.session import OmniSession
from omniport.runtime.system.files import scratch_folder

from ...evaluation.plots import wav_file
from ..context import Context
from ..types import PASS, Check

_QUESTION = "Say in one short sentence what the sea looks like."
_TIMEOUT = 300.0


def parse_command(command: str) -> list[str]:
    """The words of a recogniser's command line; no shell runs it.

    Raises:
        UsageError: nothing to run, unbalanced quotes, or a program that is not there.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(
            f"the recogniser command {command!r} cannot be read: {error}. Quote it as for a shell"
        ) from error
    if not words or shutil.which(words[0]) is None:
        what = f"{words[0]!r} is no program on the PATH" if words else "it is empty"
        raise UsageError(
            f"the recogniser command {command!r} cannot be run: {what}. Give a command that takes the path of a WAV "
            "file as its last argument and prints the text it hears"
        )
    return words


def asr_checks(
    context: Context,
    command: str,
    *,
    text_tokens: int = 48,
    codec_tokens: int = 1500,
    timeout: float = _TIMEOUT,
) -> Iterator[Check]:
    """Speak a short greedy reply, let ``command`` recognise it, and state the word error rate. A figure, no limit.

    Args:
        command: program and arguments; the path of a 16-bit mono WAV file is appended. The text is read from stdout.
        text_tokens, codec_tokens: longest reply.
        timeout: seconds that the recogniser may take.

    Yields:
        one check of stage ``speech``: ``not_run`` where the bundle cannot reply in speech or the recogniser fails.

    Raises:
        UsageError: ``command`` cannot be run.
    """
    program = parse_command(command)
    name = f"spoken reply heard by {command}"
    needed = (graph for graph, part in PARTS.items() if part.speaks or part.decodes)
    if missing := [graph for graph in needed if graph not in context.graphs]:
        why = f"{', '.join(missing)}: not in the bundle, or left out by --graphs"
        yield Check.not_run("speech", name, why)
        return
    context.progress("speech: a reply for the recogniser")
    try:
        text, samples, rate = _reply(context, text_tokens, codec_tokens)
    except OmniportError as error:
        yield Check.failed("speech", name, f"there is no spoken reply: {error}")
        return
    if not words(text) or not samples.size:
        why = f"the reply {text!r} has {len(words(text))} words and {samples.size} samples: nothing to recognise"
        yield Check.not_run("speech", name, why)
        return
    context.artifacts["speech/asr/reply.wav"] = samples
    context.progress(f"speech: {program[0]}")
    heard, problem = _recognise(program, samples, rate, timeout)
    if problem:
        why = f"the recogniser command {command!r} {problem}"
        yield Check.not_run("speech", name, why)
        return
    yield Check(
        stage="speech",
        name=name,
        status=PASS,
        figures={
            "word_error_rate": word_error_rate(words(heard), words(text)),
            "words": len(words(text)),
            "text": text,
            "heard": heard,
            "seconds": samples.size / rate,
        },
        message="a figure without a limit",
        artifacts={"reply": "speech/asr/reply.wav"},
    )


def words(text: str) -> list[str]:
    """Words in lower case without punctuation, compatibility forms made one (NFKC); of any script that uses spaces."""
    folded = (
        unicodedata.normalize("NFKC", text).casefold().replace("'", "").replace("\N{RIGHT SINGLE QUOTATION MARK}", "")
    )
    kept = (c if unicodedata.category(c)[0] in "LMN" else " " for c in folded)
    return "".join(kept).split()


def word_error_rate(heard: Sequence[str], spoken: Sequence[str]) -> float:
    """Insertions, deletions and substitutions (Levenshtein) over the number of spoken words (1 if none)."""
    row = list(range(len(spoken) + 1))
    for i, word in enumerate(heard, 1):
        previous, row[0] = row[0], i
        for j, wanted in enumerate(spoken, 1):
            substituted = previous + (word != wanted)
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, substituted)
    return row[-1] / max(1, len(spoken))


def _reply(context: Context, text_tokens: int, codec_tokens: int) -> tuple[str, NDArray[np.float32], int]:
    """Text, samples float32 [n] and sample rate of a reply with greedy text, speech sampled as the bundle says."""
    talker = context.bundle.manifest.talker_sampling or SamplingConfig()
    talker = msgspec.structs.replace(talker, max_new_tokens=codec_tokens)
    text, rate, chunks = "", 0, [np.zeros(0, np.float32)]
    for event in OmniSession(context.bundle, context.backend).reply(
        [{"role": "user", "content": _QUESTION}],
        thinker=SamplingConfig(max_new_tokens=text_tokens),
        talker=talker,
        window="whole",
        threads=False,
    ):
        if isinstance(event, AudioChunk):
            chunks.append(event.samples)
            rate = event.sample_rate
        elif isinstance(event, Done):
            text = event.text
    return text, np.concatenate(chunks), rate


def _recognise(program: Sequence[str], samples: NDArray[np.float32], rate: int, timeout: float) -> tuple[str, str]:
    """(text on stdout, what went wrong)."""
    with scratch_folder("omniport-asr-") as folder:
        path = folder / "reply.wav"
        path.write_bytes(wav_file(samples, rate))
        try:
            done = subprocess.run(
                [*program, str(path)], capture_output=True, timeout=timeout, check=False, stdin=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired:
            return "", f"did not end within {timeout:g} s"
        except OSError as error:
            return "", f"could not be started: {error.strerror or error}"
    if done.returncode != 0:
        complaint = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        return "", f"ended with code {done.returncode}: {complaint[0] if complaint else 'nothing on stderr'}"
    return done.stdout.decode(errors="replace").strip(), ""
