"""What Wren sounds like: the first held-out question of each kind, its answer as FLAC, and a picture of one.

    python -m wren.samples BUNDLE [--out DIR]

The questions are those of `wren/questions` in their order, not chosen by how well they are said.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import soundfile  # type: ignore[import-untyped]
from omniport.export.evaluation import plots
from omniport.export.evaluation.hearing import Ear
from omniport.export.evaluation.questions import Answer, Question, answers, read_questions
from omniport.runtime import OmniSession
from PIL import Image

from wren import questions, sizes

OUT = Path("wren/samples")
#: the kind that the picture shows
SHOWN = "picture_spoken"
HEAD = """# What Wren sounds like

The first held-out question of each kind in `wren/questions`, and what it says in FP32 on ONNX Runtime (written by
`python -m wren.samples`, nothing chosen). "Heard" is what a recogniser of Wren's sentences hears.

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
    parts: list[dict[str, Any]] = list(answer.question.messages[-1]["content"])
    drawn = next(part["image"] for part in parts if part["type"] == "image")
    chart = plots.spectrogram_figure({f'"{answer.text}"': answer.samples}, sizes.RATE)
    chart.set_size_inches(8.4, 2.4)
    (axes,) = chart.axes
    beside = axes.inset_axes((-0.4, 0.0, 0.3, 1.0))
    beside.imshow(np.asarray(Image.open(drawn).convert("RGB")))
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
        for answer in answers(session, first_of_each_kind(found.questions)):
            kind = answer.question.kind
            file = args.out / f"{kind}.flac"
            soundfile.write(file, np.round(answer.samples * 32767).astype(np.int16), sizes.RATE)
            said, heard = answer.text, " ".join(ear.hear(answer.samples))
            lines.append(
                f"| {asked(answer.question)} | {said} | {heard} | {answer.voice} | [{file.name}]({file.name}) |"
            )
            if kind == SHOWN:
                picture(answer, args.out / "picture.png")
    (args.out / "README.md").write_text(HEAD + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
