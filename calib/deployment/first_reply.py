"""One short spoken reply from a bundle on the machine that it is for: does it answer, and how soon."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
from omniport.runtime.bundle.manifest import SamplingConfig
from omniport.runtime.errors import CheckFailed
from omniport.runtime.events import AudioChunk, Done
from omniport.runtime.session import OmniSession

from .deploy_record import FirstReply

_QUESTION = "Hello! Please say in one sentence who you are."
#: text tokens, and codec tokens: 2 s of speech
_TOKENS, _CODES = 24, 100


def measure_first_reply(bundle: Path, backend: str = "auto") -> FirstReply:
    """Ask a warm session for two seconds of speech.

    Raises:
        BackendError, BundleError: the bundle cannot run here.
        CheckFailed: no text, or speech that is not finite.
    """
    import numpy as np

    with OmniSession.open(bundle, backend=backend) as session:
        talker = session.manifest.talker_sampling
        speaks = talker is not None
        short = None if talker is None else msgspec.structs.replace(talker, max_new_tokens=_CODES)
        for _ in range(2):  # the first one loads every graph and compiles what is compiled late
            first_audio, heard = None, 0.0
            # stop tokens are ignored: the length of what is measured is always the same
            for event in session.reply(
                [{"role": "user", "content": _QUESTION}],
                thinker=SamplingConfig(max_new_tokens=_TOKENS),
                talker=short,
                speak=speaks,
                ignore_stop=True,
            ):
                if isinstance(event, AudioChunk):
                    if not np.isfinite(event.samples).all():
                        raise CheckFailed(f"{bundle} speaks samples that are not finite: omniport validate tells where")
                    first_audio = event.time if first_audio is None else first_audio
                    heard += len(event.samples) / event.sample_rate
        assert isinstance(event, Done)
        stats = event.stats
        if stats.time_to_first_token is None or (speaks and first_audio is None):
            raise CheckFailed(f"{bundle} gave no {'speech' if stats.time_to_first_token else 'text'} to a question")
        return FirstReply(
            backend=session.backend.name,
            first_token_seconds=stats.time_to_first_token,
            first_audio_seconds=first_audio,
            seconds=stats.total_time,
            speech_seconds=heard,
            peak_memory_bytes=stats.peak_memory_bytes or 0,
        )


def measure_alone(bundle: Path, backend: str) -> FirstReply:
    """As `measure_first_reply`, in a process of its own, whose memory is that of the reply alone.

    Raises:
        CheckFailed: it does not answer; says what that process said last.
    """
    command = [sys.executable, "-m", __name__, str(bundle), backend]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise CheckFailed(f"{bundle} does not answer: {said[-1] if said else f'exit code {done.returncode}'}")
    return msgspec.json.decode(done.stdout, type=FirstReply)


if __name__ == "__main__":
    sys.stdout.write(msgspec.json.encode(measure_first_reply(Path(sys.argv[1]), sys.argv[2])).decode())
