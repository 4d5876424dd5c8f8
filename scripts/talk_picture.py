"""Draw docs/images/talk.svg: what ``omniport talk`` shows while a bundle hears a recording.

Usage: python -m scripts.talk_picture BUNDLE RECORDING OUT.svg

The recording plays in real time; the picture is the view after its last reply. ``make demo`` leaves a bundle and a
recording behind.
"""

from __future__ import annotations

import argparse
import io
import re
import tempfile
from pathlib import Path

from omniport.cli.options import reply_options
from omniport.cli.talk.command import facts
from omniport.cli.talk.loop import Stage, Talk
from omniport.cli.talk.playback import WavLoudspeaker, WavMicrophone
from omniport.cli.talk.view import LiveView, render
from omniport.runtime import Dialogue, HandsFree, OmniSession
from omniport.runtime.media.audio import load_audio
from rich.console import Console


def main() -> None:
    """Hear, answer, draw."""
    parser = argparse.ArgumentParser(description="Draw the view of omniport talk.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("recording", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    console = Console(record=True, width=104, file=io.StringIO(), highlight=False)
    view = LiveView(console)  # not entered: what it prints is recorded, its panel is drawn once, at the end
    with tempfile.TemporaryDirectory() as folder, OmniSession.open(options.bundle) as session:
        vocoder = session.manifest.vocoder
        assert vocoder is not None, "this picture is of a bundle that speaks"
        replies = reply_options(session.manifest, max_speech=4.0)
        with WavLoudspeaker(Path(folder) / "reply.wav", vocoder.sample_rate) as speaker:
            stage = Stage(speaker, view)
            dialogue = Dialogue(session, stage.event, heard=speaker.heard, **replies)
            view.ready(facts(session, options.bundle, None, False), "")
            with HandsFree(dialogue) as ears:
                microphone = WavMicrophone(load_audio(options.recording), 16_000)
                Talk(ears, microphone, speaker, view, lasting=False).run()
    console.print(render(view.scene))
    drawn = console.export_svg(title="omniport talk", clear=False, unique_id="talk")
    # the reader's own monospace font: a picture fetches nothing
    options.out.write_text(re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
