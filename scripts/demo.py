"""Show the whole way: checkpoint, export, parity with PyTorch, and a spoken reply to a spoken question on a picture.

Usage: python -m scripts.demo [--out demo] [--random]

The checkpoint is Wren, this repository's small trained model, whose answer is right and can be heard; with --random,
or while Wren's checkpoint is not there, one with random weights, whose speech is noise. Nothing is downloaded. A second
run keeps the graphs.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omniport.cli.commands.validate import print_report
from omniport.cli.common import log_console, print_table, progress_bar
from omniport.cli.options import reply_options
from omniport.cli.show_reply import Replier

from scripts.sample_media import QUESTION, make_media

if TYPE_CHECKING:
    from omniport.export.validation.types import ValidationReport
    from omniport.runtime.events import Done

WREN = Path(__file__).resolve().parents[1] / "wren"
#: what is asked about wren/questions/demo.png in demo.flac, and the right answer
WREN_QUESTION, WREN_ANSWER = "What do you see?", "A red triangle and a blue square."
MAX_NEW_TOKENS = 48
#: random weights rarely end a reply by themselves
MAX_SPEECH_SECONDS = 6.0


@dataclass(frozen=True)
class Subject:
    """What is asked, and of which checkpoint. ``answer``: the right one; empty for random weights."""

    checkpoint: Path
    picture: Path
    sound: Path
    question: str
    answer: str = ""

    @property
    def content(self) -> list[dict[str, Any]]:
        """The question as the runtime takes it."""
        return [{"type": "image", "image": self.picture}, {"type": "audio", "audio": self.sound}]


def trained(out: Path) -> Subject:
    """Wren, with a question that it was not trained on."""
    media = out / "media"
    media.mkdir(parents=True, exist_ok=True)
    picture, sound = (Path(shutil.copy(WREN / "questions" / name, media)) for name in ("demo.png", "demo.flac"))
    return Subject(WREN / "checkpoint", picture, sound, WREN_QUESTION, WREN_ANSWER)


def untrained(out: Path) -> Subject:
    """A tiny checkpoint with random weights (kept if there)."""
    from omniport.export.synthetic.make_checkpoint import make_checkpoint

    checkpoint = out / "checkpoint"
    if not checkpoint.exists():
        make_checkpoint(checkpoint, "tiny", seed=0)
    media = make_media(out / "media")
    return Subject(checkpoint, media["image"], media["audio"], QUESTION)


def export(subject: Subject, bundle: Path) -> None:
    """Export the checkpoint."""
    from omniport.export.exporter import export_checkpoint

    with progress_bar(quiet=False) as progress:
        export_checkpoint(str(subject.checkpoint), bundle, precision="fp32", max_context=2048, progress=progress)


def check(bundle: Path, checkpoint: Path) -> ValidationReport:
    """Every graph against its PyTorch module."""
    from omniport.export.validation.validate import validate
    from omniport.runtime.bundle.parts import PARTS

    with progress_bar(quiet=False) as progress:
        return validate(bundle, checkpoint, graphs=tuple(PARTS), progress=progress)[0]


def answer(bundle: Path, subject: Subject, speech: Path) -> Done:
    """Ask; text goes to the terminal, speech to ``speech``."""
    from omniport.runtime import OmniSession

    with OmniSession.open(bundle) as session:
        options = reply_options(session.manifest, max_new_tokens=MAX_NEW_TOKENS, max_speech=MAX_SPEECH_SECONDS)
        replier = Replier(session, options, quiet=True)
        return replier.reply([{"role": "user", "content": subject.content}], speech)


def draw(speech: Path, title: str) -> Path:
    """A spectrogram of the reply beside it."""
    import soundfile  # type: ignore[import-untyped]
    from omniport.export.evaluation import plots

    samples, rate = soundfile.read(speech, dtype="float32")
    path = speech.with_suffix(".png")
    plots.write(plots.spectrogram_figure({title: samples}, rate), path)
    return path


def heard(speech: Path) -> str | None:
    """What a recogniser of Wren's sentences hears; None where there is no recogniser."""
    import soundfile
    from omniport.export.evaluation.hearing import Ear
    from omniport.runtime.errors import UsageError

    try:
        ear = Ear((WREN / "questions" / "questions.gram").read_text())
    except UsageError:
        return None
    samples, rate = soundfile.read(speech, dtype="float32")
    return " ".join(ear.hear(samples, rate))


def seconds(value: float | None) -> str:
    """A duration for the table."""
    return "-" if value is None else f"{value:.3f} s"


def main() -> int:
    """Run the demo; exit code 1 when a graph is not equal to PyTorch within its tolerance, or an answer is wrong."""
    parser = argparse.ArgumentParser(description="Export a model, check it, and let it answer.")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything the demo makes")
    parser.add_argument("--random", action="store_true", help="random weights instead of Wren: gibberish and noise")
    args = parser.parse_args()
    random = args.random or not (WREN / "checkpoint").exists()
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    log, start = log_console(), time.perf_counter()

    what = "a tiny checkpoint with random weights" if random else "Wren, a very small trained model,"
    log.print(f"1. {what} exported to six ONNX graphs", style="bold")
    subject, bundle = (untrained if random else trained)(out), out / "bundle"
    export(subject, bundle)
    log.print("2. every graph against PyTorch", style="bold")
    parity = check(bundle, subject.checkpoint)
    log.print(f"3. a picture ({subject.picture}) and a spoken question ({subject.sound})", style="bold")
    log.print(f'   question: "{subject.question}"')
    if random:
        log.print("   The weights are random: the text is gibberish and the speech is noise. The path is the real one.")
    speech = out / "reply.wav"
    done = answer(bundle, subject, speech)
    picture = draw(speech, done.text if subject.answer else "noise: the weights are random")

    stats, rows = done.stats, list[tuple[str, str]]()
    right = not subject.answer or done.text == subject.answer
    if subject.answer:
        rows.append(("answer", f"{done.text} ({'right' if right else f'wrong: {subject.answer}'})"))
        if (words := heard(speech)) is not None:
            rows.append(("a recogniser hears", words))
    rows += [
        ("speech", f"{speech}, {stats.audio_seconds:.2f} s; its spectrogram: {picture}"),
        ("backend", stats.backend),
        ("prompt, text, codec tokens", f"{stats.prompt_tokens}, {stats.text_tokens}, {stats.codec_tokens}"),
        ("time to first token (TTFT)", seconds(stats.time_to_first_token)),
        ("time to first audio (TTFA)", seconds(stats.time_to_first_audio)),
        ("real-time factor (RTF)", "-" if stats.real_time_factor is None else f"{stats.real_time_factor:.3f}"),
        ("whole demo", seconds(time.perf_counter() - start)),
    ]
    print_table("Reply", ("what", "measured"), rows)
    print_report(parity)
    return 0 if parity.ok and right else 1


if __name__ == "__main__":
    sys.exit(main())
