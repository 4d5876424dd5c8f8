"""What Wren sounds like: the first held-out question of each kind, its answer as FLAC, and a picture of the demo's.

    python -m wren.samples BUNDLE [--out DIR]

The questions are those of `wren/questions` in their order, not chosen by how well they are said.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import soundfile  # type: ignore[import-untyped]
from omniport.export.evaluation import plots
from omniport.export.evaluation.hearing import Ear
from omniport.export.evaluation.questions import Answer, Question, answers, read_questions
from omniport.runtime import OmniSession
from PIL import Image

from wren import questions, sizes

OUT = Path("wren/samples")
#: what the picture shows: the question of the demo, kHz at most
SHOWN = Question(
    [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": questions.OUT / "demo.png"},
                {"type": "audio", "audio": questions.OUT / "demo.flac"},
            ],
        }
    ],
    "A red triangle and a blue square.",
    "demo",
)
HIGHEST = 8
HEAD = """# What Wren sounds like

The demo's question, then the first held-out one of each kind in `wren/questions`, and what Wren says in FP32 on ONNX
Runtime (written by `python -m wren.samples`, nothing chosen). "Heard" is what a recogniser of its sentences hears.

| asked | said | heard | voice | sound |
|---|---|---|---|---|
"""


def asked(question: Question) -> str:
    """The question in words, its media by their names."""
    turns = []
    for message in question.messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        shown = [p["text"] if p["type"] == "text" else f"`{Path(p[p['type']]).name}`" for p in parts]
        turns.append(("" if message["role"] == "user" else "→ ") + " ".join(shown))
    return " ".join(turns)


def first_of_each_kind(found: tuple[Question, ...]) -> list[Question]:
    return list({question.kind: question for question in reversed(found)}.values())[::-1]


def picture(answer: Answer, path: Path) -> None:
    """The question's picture, and the spectrogram of the answer."""
    title = f'"{questions.DEMO_ASKED}" asked aloud, "{answer.text}" said'
    chart = plots.spectrogram_figure({title: answer.samples}, sizes.RATE)
    chart.set_size_inches(8.4, 2.4)
    (axes,) = chart.axes
    axes.set_ylim(0, HIGHEST)
    beside = axes.inset_axes((-0.4, 0.0, 0.3, 1.0))
    beside.imshow(np.asarray(Image.open(questions.OUT / "demo.png").convert("RGB")))
    beside.set_axis_off()
    plots.write(chart, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    lines = []
    with OmniSession.open(args.bundle) as session:
        found = read_questions(questions.OUT / "questions.jsonl", session.manifest, session.text_codec)
        ear = Ear(found.grammar)
        for answer in answers(session, [SHOWN, *first_of_each_kind(found.questions)]):
            kind = answer.question.kind
            if answer.question is SHOWN:
                picture(answer, args.out / "picture.png")
            file = args.out / f"{kind}.flac"
            soundfile.write(file, np.round(answer.samples * 32767).astype(np.int16), sizes.RATE)
            said, heard = answer.text, " ".join(ear.hear(answer.samples))
            lines.append(
                f"| {asked(answer.question)} | {said} | {heard} | {answer.voice} | [{file.name}]({file.name}) |"
            )
    (args.out / "README.md").write_text(HEAD + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
