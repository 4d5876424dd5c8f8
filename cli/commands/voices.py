"""omniport voices"""

from __future__ import annotations

from ..common import JsonFlag, QuietFlag, log_console, print_json, print_line
from ..options import BundleArgument

NAME = "voices"
EXAMPLE = "omniport voices bundle"


def command(
    bundle: BundleArgument,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """List the voices of a bundle, one a line.

    The default voice comes first.
    """
    from omniport.runtime.bundle.reader import Bundle

    opened = Bundle.open(bundle)
    voices = list(opened.manifest.voices)
    if voices:
        default = opened.find_voice(None).name
        voices.sort(key=lambda voice: voice.name != default)
    if json:
        print_json(
            [
                {"name": voice.name, "default": index == 0, "bos_token": voice.bos_token, "file": voice.file}
                for index, voice in enumerate(voices)
            ]
        )
        return
    for voice in voices:
        print_line(voice.name)
    if not voices:
        log_console(quiet).print("no voices: this bundle writes text and does not speak")
