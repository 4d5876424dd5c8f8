"""Show the whole way on random weights: checkpoint, export, parity with PyTorch, a spoken reply to a spoken question.

Usage: python -m scripts.demo [--out demo]

Everything is made on the spot and nothing is downloaded. A second run keeps the checkpoint and the graphs.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from omniport.cli.commands.validate import print_report
from omniport.cli.common import log_console, print_table, progress_bar
from omniport.cli.options import reply_options
from omniport.cli.show_reply import Replier

from scripts.sample_media import QUESTION, make_media

if TYPE_CHECKING:
    from omniport.export.validation.types import ValidationReport
    from omniport.runtime.events import Stats

MAX_NEW_TOKENS = 48
#: random weights rarely end a reply by themselves
MAX_SPEECH_SECONDS = 6.0


def prepare(out: Path) -> tuple[Path, Path]:
    """Make the checkpoint (kept if there) and export it; returns (checkpoint, bundle)."""
    from omniport.export.exporter import export_checkpoint
    from omniport.export.synthetic.make_checkpoint import make_checkpoint

    checkpoint, bundle = out / "checkpoint", out / "bundle"
    with progress_bar(quiet=False) as progress:
        if not checkpoint.exists():
            make_checkpoint(checkpoint, "tiny", seed=0)
        export_checkpoint(str(checkpoint), bundle, precision="fp32", max_context=2048, progress=progress)
    return checkpoint, bundle


def check(bundle: Path, checkpoint: Path) -> ValidationReport:
    """Every graph against its PyTorch module."""
    from omniport.export.validation.validate import validate
    from omniport.runtime.bundle.parts import PARTS

    with progress_bar(quiet=False) as progress:
        return validate(bundle, checkpoint, graphs=tuple(PARTS), progress=progress)[0]


def answer(bundle: Path, media: dict[str, Path], speech: Path) -> Stats:
    """Ask the spoken question about the picture; text goes to the terminal, speech to ``speech``."""
    from omniport.runtime import OmniSession

    content = [{"type": "image", "image": media["image"]}, {"type": "audio", "audio": media["audio"]}]
    with OmniSession.open(bundle) as session:
        options = reply_options(session.manifest, max_new_tokens=MAX_NEW_TOKENS, max_speech=MAX_SPEECH_SECONDS)
        replier = Replier(session, options, quiet=True)
        return replier.reply([{"role": "user", "content": content}], speech).stats


def seconds(value: float | None) -> str:
    """A duration for the table."""
    return "-" if value is None else f"{value:.3f} s"


def main() -> int:
    """Run the demo; exit code 1 when a graph is not equal to PyTorch within its tolerance."""
    parser = argparse.ArgumentParser(description="Export a random-weight model, check it, and let it answer.")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything the demo makes")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    log, start = log_console(), time.perf_counter()

    log.print("1. a tiny checkpoint with random weights, exported to six ONNX graphs", style="bold")
    checkpoint, bundle = prepare(out)
    log.print("2. every graph against PyTorch", style="bold")
    parity = check(bundle, checkpoint)
    log.print("3. sample media", style="bold")
    media = make_media(out / "media")
    log.print(f'4. the spoken question "{QUESTION}" about {media["image"]}', style="bold")
    log.print("The weights are random: the text is gibberish and the speech is noise. The path is the real one.")
    speech = out / "reply.wav"
    stats = answer(bundle, media, speech)

    print_table(
        "Reply",
        ("what", "measured"),
        [
            ("speech", f"{speech}, {stats.audio_seconds:.2f} s (noise: the weights are random)"),
            ("backend", stats.backend),
            ("prompt, text, codec tokens", f"{stats.prompt_tokens}, {stats.text_tokens}, {stats.codec_tokens}"),
            ("time to first token (TTFT)", seconds(stats.time_to_first_token)),
            ("time to first audio (TTFA)", seconds(stats.time_to_first_audio)),
            ("real-time factor (RTF)", "-" if stats.real_time_factor is None else f"{stats.real_time_factor:.3f}"),
            ("whole demo", seconds(time.perf_counter() - start)),
        ],
    )
    print_report(parity)
    return 0 if parity.ok else 1


if __name__ == "__main__":
    sys.exit(main())
