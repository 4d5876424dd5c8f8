"""omniport talk"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..common import JsonFlag, QuietFlag, log_console
from ..options import (
    BackendOption,
    BundleArgument,
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
    number,
    one_of,
    reply_options,
)

if TYPE_CHECKING:
    from omniport.runtime import OmniSession

    from .loop import Ears
    from .playback import Loudspeaker, Microphone
    from .view import View

NAME = "talk"
EXAMPLE = "omniport talk bundle --input-wav question.wav --output-wav reply.wav --push-to-talk"


def command(
    bundle: BundleArgument,
    voice: VoiceOption = None,
    text_only: Annotated[bool, typer.Option("--text-only", help="Show replies and do not speak them.")] = False,
    system: SystemOption = None,
    image: ImagesOption = None,
    video: VideosOption = None,
    max_pixels: MaxPixelsOption = None,
    fps: FpsOption = None,
    max_frames: MaxFramesOption = None,
    hands_free: Annotated[
        bool,
        typer.Option(
            "--hands-free/--push-to-talk",
            help="Speech begins a turn and silence ends it (the default); or the Enter key does both.",
        ),
    ] = True,
    barge_in: Annotated[
        bool,
        typer.Option(help="Speech cuts a reply off. Without it nothing is listened to while a reply is played."),
    ] = True,
    echo: Annotated[
        str,
        one_of(
            ("auto", "on", "off"),
            help="Take the loudspeaker out of what the microphone hears; auto: where speech cuts replies off.",
        ),
    ] = "auto",
    threshold: Annotated[float, number("P", 0.0, help="Probability from which sound is speech.")] = 0.5,
    silence_ms: Annotated[float, number("MS", 0.0, help="Silence that ends a turn, in milliseconds.")] = 600,
    input_wav: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Hear this recording, in real time, in place of a microphone.")
    ] = None,
    output_wav: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write what would have been played, when it would have been played."),
    ] = None,
    input_device: Annotated[
        str | None, typer.Option(metavar="NAME", help="Microphone: a number or a part of its name.")
    ] = None,
    output_device: Annotated[
        str | None, typer.Option(metavar="NAME", help="Loudspeaker: a number or a part of its name.")
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Encode again, at the end of a turn, what its loudest moment changes.")
    ] = False,
    solver: SolverOption = "auto",
    seed: SeedOption = 0,
    greedy: GreedyFlag = False,
    max_new_tokens: MaxNewTokensOption = None,
    max_speech: MaxSpeechOption = None,
    backend: BackendOption = "auto",
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Talk with a bundle: by microphone and loudspeaker, or through files.

    The model hears while you speak and answers as soon as you have spoken. A terminal shows what is heard, what is
    said and how long each stage took; elsewhere the replies' text goes to stdout and the rest to stderr.

    What --image and --video name is shown at the beginning of the first turn.

    With --input-wav the recording plays in real time and the command ends with the last reply. With a microphone it
    ends with Ctrl-C; with --push-to-talk also with q or the end of stdin.

    With --json, stdout carries one JSON object an event: ready, turn_began, turn_committed, turns_dropped, text_delta,
    audio_chunk, done with the measurements, and error.
    """
    check(text_only, voice, input_wav, output_wav, input_device, output_device)
    if echo == "on" and (text_only or input_wav is not None):
        refuse_echo()

    from omniport.runtime import Dialogue, HandsFree, OmniSession
    from omniport.runtime.live.vad import SpeechLimits

    from ..show_reply import MediaOptions
    from .loop import PushToTalk, Stage, Talk, read_keys

    limits = SpeechLimits(threshold=threshold, silence_ms=silence_ms)
    with ExitStack() as stack:
        microphone = open_microphone(stack, input_wav, input_device)
        session = stack.enter_context(OmniSession.open(bundle, backend=backend))
        session.reset(system)
        speaker = None if text_only else open_speaker(stack, session, output_wav, output_device)
        view = open_view(json, quiet)
        if echo == "on" or (echo == "auto" and hands_free and barge_in):
            cancel_echo(microphone, speaker, echo == "on", quiet)
        session.load()  # else the first reply waits for it
        options = reply_options(
            session.manifest,
            greedy=greedy,
            max_new_tokens=max_new_tokens,
            max_speech=max_speech,
            voice=voice,
            speak=not text_only,
            solver=solver,
            seed=seed,
            exact=exact,
        )
        heard = None if speaker is None else speaker.heard
        shown = MediaOptions(True, max_pixels, fps, max_frames).content("", [], image or [], video or [])
        stage = Stage(speaker, view)
        dialogue = stack.enter_context(Dialogue(session, stage.event, heard=heard, shown=shown, **options))
        ears: Ears
        if hands_free:
            ears = HandsFree(dialogue, limits=limits, barge_in=barge_in)
        else:
            ears = PushToTalk(dialogue, None if input_wav is not None else read_keys(), microphone.stop)
        stack.enter_context(view)
        view.ready(facts(session, bundle, voice, text_only), hint(hands_free, input_wav))
        Talk(ears, microphone, speaker, view, lasting=input_wav is None).run()


def check(
    text_only: bool,
    voice: str | None,
    input_wav: Path | None,
    output_wav: Path | None,
    input_device: str | None,
    output_device: str | None,
) -> None:
    """Refuse options that do not go together.

    Raises:
        UsageError: saying which.
    """
    from omniport.runtime.errors import UsageError

    if text_only and voice is not None:
        raise UsageError("--voice is the voice of speech, and --text-only asks for none: drop one of them")
    if text_only and (output_wav is not None or output_device is not None):
        raise UsageError("--output-wav and --output-device are for speech, and --text-only asks for none: drop one")
    if output_wav is not None and input_wav is None:
        raise UsageError(
            "--output-wav needs --input-wav: a talk by microphone has no end at which the file would be complete"
        )
    if input_wav is not None and input_device is not None:
        raise UsageError("--input-wav takes the place of a microphone: drop --input-device or --input-wav")
    if output_wav is not None and output_device is not None:
        raise UsageError("--output-wav takes the place of a loudspeaker: drop --output-device or --output-wav")
    if input_wav is not None and output_wav is not None and input_wav.resolve() == output_wav.resolve():
        raise UsageError(f"{output_wav} is the recording itself: give --output-wav another name")


def open_microphone(stack: ExitStack, input_wav: Path | None, device: str | None) -> Microphone:
    """A recording that plays in real time, or a device.

    Raises:
        MediaError: the recording cannot be read. UsageError: no device.
    """
    if input_wav is None:
        from .audio_devices import DeviceMicrophone

        return stack.enter_context(DeviceMicrophone(device))
    from omniport.runtime.media.audio import load_audio

    from .playback import WavMicrophone

    return WavMicrophone(load_audio(input_wav), 16_000)


def open_speaker(
    stack: ExitStack, session: OmniSession, output_wav: Path | None, device: str | None
) -> Loudspeaker | None:
    """A file that keeps a loudspeaker's time, or a device; None for a bundle that cannot speak, which is refused later.

    Raises:
        UsageError: the file cannot be written, or no device.
    """
    vocoder = session.manifest.vocoder
    if vocoder is None:
        return None
    if output_wav is not None:
        from .playback import WavLoudspeaker

        return stack.enter_context(WavLoudspeaker(output_wav, vocoder.sample_rate))
    from .audio_devices import DeviceLoudspeaker

    return stack.enter_context(DeviceLoudspeaker(vocoder.sample_rate, device))


def refuse_echo() -> None:
    """Raises:
    UsageError: nothing can echo.
    """
    from omniport.runtime.errors import UsageError

    raise UsageError("--echo on needs a microphone and a loudspeaker: drop it, or --text-only and --input-wav")


def cancel_echo(microphone: Microphone, speaker: Loudspeaker | None, must: bool, quiet: bool) -> None:
    """Let the microphone be cleaned of the loudspeaker's sound, where both are devices.

    Raises:
        UsageError: it ``must`` be, and the package is not installed. Else a line on stderr says so.
    """
    from omniport.runtime.errors import UsageError

    from .audio_devices import DeviceLoudspeaker, DeviceMicrophone

    if not isinstance(microphone, DeviceMicrophone) or not isinstance(speaker, DeviceLoudspeaker):
        return
    try:
        microphone.cancel_echo(speaker)
    except UsageError as error:
        if must:
            raise
        advice = "Until then use headphones, or --no-barge-in: an echo would cut replies off"
        log_console(quiet).print(f"{error}. {advice}", markup=False)


def open_view(json: bool, quiet: bool) -> View:
    """JSON, a live view where stdout is a terminal, or plain lines."""
    import sys

    from .view import JsonView, LiveView, PlainView

    if json:
        return JsonView()
    return LiveView() if sys.stdout.isatty() and not quiet else PlainView(quiet)


def facts(session: OmniSession, bundle: Path, voice: str | None, text_only: bool) -> dict[str, Any]:
    """What talks."""
    spoken = None if text_only else session.bundle.find_voice(voice).name
    return {"bundle": bundle.resolve().name, "voice": spoken, "backend": session.backend.name}


def hint(hands_free: bool, input_wav: Path | None) -> str:
    """How to use it, in a line."""
    if input_wav is not None:
        return f"hearing {input_wav}"
    if hands_free:
        return "speak; silence ends your turn, and your voice cuts a reply off. Ctrl-C leaves"
    return "Enter begins your turn, Enter ends it; q Enter, or Ctrl-C, leaves"
