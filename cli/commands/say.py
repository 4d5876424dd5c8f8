"""omniport say"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..common import JsonFlag, QuietFlag
from ..options import (
    BackendOption,
    BundleArgument,
    GreedyFlag,
    MaxSpeechOption,
    SeedOption,
    SolverOption,
    SystemOption,
    VoiceOption,
    reply_options,
)
from ..show_reply import Replier

NAME = "say"
EXAMPLE = 'omniport say bundle "The train leaves at noon." --speak train.wav'


def command(
    bundle: BundleArgument,
    text: Annotated[str, typer.Argument(help="What to say.")],
    speak: Annotated[Path, typer.Option(metavar="OUT.wav", help="WAV file to write.")],
    system: SystemOption = None,
    voice: VoiceOption = None,
    solver: SolverOption = "rk4",
    seed: SeedOption = 0,
    greedy: GreedyFlag = False,
    max_speech: MaxSpeechOption = None,
    backend: BackendOption = "auto",
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Speak a given text into a WAV file, word for word.

    The model reads it out as if it were its own reply; nothing is generated but the speech. Long texts are better said
    in parts.
    """
    from omniport.runtime import OmniSession

    with OmniSession.open(bundle, backend=backend) as session:
        options = reply_options(
            session.manifest, greedy=greedy, max_speech=max_speech, voice=voice, seed=seed, solver=solver, say=text
        )
        messages = [] if system is None else [{"role": "system", "content": system}]
        Replier(session, options, json=json, quiet=quiet).reply(messages, speak)
