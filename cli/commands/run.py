"""omniport run"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..common import JsonFlag, QuietFlag
from ..options import (
    BackendOption,
    BundleArgument,
    ComputeOption,
    FpsOption,
    GreedyFlag,
    ImagesOption,
    MaxFramesOption,
    MaxNewTokensOption,
    MaxPixelsOption,
    MaxSpeechOption,
    SeedOption,
    SolverOption,
    SystemOption,
    VideosOption,
    VoiceOption,
    reply_options,
)
from ..show_reply import MediaOptions, Replier, chat

NAME = "run"
EXAMPLE = "omniport run bundle --audio question.wav --image picture.png --speak reply.wav"


def command(
    bundle: BundleArgument,
    text: Annotated[str, typer.Option(help="What the user writes.")] = "",
    audio: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="Audio to send; may be repeated.")] = None,
    image: ImagesOption = None,
    video: VideosOption = None,
    use_audio_in_video: Annotated[bool, typer.Option(help="Listen to the sound of each video.")] = True,
    max_pixels: MaxPixelsOption = None,
    fps: FpsOption = None,
    max_frames: MaxFramesOption = None,
    system: SystemOption = None,
    voice: VoiceOption = None,
    speak: Annotated[Path | None, typer.Option(metavar="OUT.wav", help="Speak the reply into this WAV file.")] = None,
    solver: SolverOption = "rk4",
    seed: SeedOption = 0,
    greedy: GreedyFlag = False,
    max_new_tokens: MaxNewTokensOption = None,
    max_speech: MaxSpeechOption = None,
    backend: BackendOption = "auto",
    compute: ComputeOption = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Answer text, audio, images and video.

    The reply streams as text to stdout and, with --speak, as speech into a WAV file.

    Without --text, --audio, --image and --video it starts a conversation: one line of stdin is one turn.
    With --json, stdout carries one JSON object an event: text_delta, audio_chunk, and done with the measurements.
    """
    from omniport.runtime.errors import UsageError

    media = MediaOptions(use_audio_in_video, max_pixels, fps, max_frames)
    content = media.content(text, audio or [], image or [], video or [])
    if json and not content:
        raise UsageError("--json needs an input: give --text, --audio, --image or --video")
    if voice is not None and speak is None:
        raise UsageError("--voice is the voice of speech, and there is none: add --speak OUT.wav or drop --voice")

    from omniport.runtime import OmniSession

    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    with OmniSession.open(bundle, backend=backend, compute=compute) as session:
        if speak is not None:
            session.bundle.find_voice(voice)  # refused once and at the start, not at every turn of a conversation
        options = reply_options(
            session.manifest,
            greedy=greedy,
            max_new_tokens=max_new_tokens,
            max_speech=max_speech,
            voice=voice,
            seed=seed,
            solver=solver,
        )
        replier = Replier(session, options, json=json, quiet=quiet)
        if content:
            replier.reply([*messages, {"role": "user", "content": content}], speak)
        else:
            chat(replier, system, speak, media)
