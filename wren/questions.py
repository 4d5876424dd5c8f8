"""The question set that comes with Wren: held-out questions of every kind, drawn and not chosen, with their media.

Beside it lies a set to calibrate with, of questions from training, with the answers as replies.

    python -m wren.questions [--work DIR] [--out DIR]

Format: `omniport.export.evaluation.questions`. What is asked after a first turn has the right first answer before it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import soundfile  # type: ignore[import-untyped]
from PIL import Image

from wren import media, sizes, speech_data, world
from wren.conversations import Conversations
from wren.grammar import reply_grammar
from wren.prompts import Turn
from wren.world import Kind, Picture

OUT = Path("wren/questions")
CALIBRATED: dict[Kind, int] = {"typed": 12, "spoken": 4, "picture": 5, "video": 1, "second_turn": 2}
# What the demo shows: a picture of the held-out ones, and a question on it.
DEMO, DEMO_ASKED = Picture((("red", "triangle"), ("blue", "square"))), "What do you see?"
COUNTS: dict[Kind, int] = {
    "typed": 40, "spoken": 16, "picture": 30, "picture_spoken": 10, "video": 8, "second_turn": 16,
}  # fmt: skip


class Writer:
    """Writes questions and their media to a folder; ``answer``: what their right answers are called there."""

    def __init__(self, out: Path, answer: str) -> None:
        self.out, self.answer, self.lines = out, answer, list[str]()
        out.mkdir(parents=True)

    def add(self, kind: Kind, turns: list[Turn]) -> None:
        messages: list[dict[str, Any]] = []
        for number, turn in enumerate(turns):
            content = self._content(f"{kind}-{len(self.lines):03d}-{number}", turn)
            messages.append({"role": "user", "content": content})
            if number < len(turns) - 1:
                messages.append({"role": "assistant", "content": turn.answer})
        kinds = {"kind": kind} if self.answer == "answer" else {}
        self.lines.append(json.dumps({**kinds, "messages": messages, self.answer: turns[-1].answer}))

    def draw(self, conversations: Conversations, counts: dict[Kind, int], name: str) -> None:
        """Draw questions, and write the file of that name."""
        for kind, count in counts.items():
            draw = np.random.default_rng((12, world.KINDS.index(kind)))
            for _ in range(count):
                self.add(kind, conversations.question(kind, draw))
        (self.out / name).write_text("\n".join(self.lines) + "\n")

    def _content(self, name: str, turn: Turn) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = []
        if turn.picture is not None:
            Image.fromarray(turn.picture).save(self.out / f"{name}.png", optimize=True)
            parts.append({"type": "image", "image": f"{name}.png"})
        if turn.clip is not None:
            media.write_clip(self.out / f"{name}.mkv", *turn.clip)
            parts.append({"type": "video", "video": f"{name}.mkv", "use_audio": True})
        if turn.sound is not None:
            pcm = np.round(np.clip(turn.sound, -1, 1) * 32767).astype(np.int16)
            soundfile.write(self.out / f"{name}.flac", pcm, sizes.QUESTION_RATE)
            parts.append({"type": "audio", "audio": f"{name}.flac"})
        return [*parts, {"type": "text", "text": turn.text}] if turn.text else parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=sizes.WORK)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    conversations = Conversations(args.work, "held_out", whole_clips=True)
    Writer(args.out, "answer").draw(conversations, COUNTS, "questions.jsonl")
    trained = Conversations(args.work, "train", whole_clips=True)
    Writer(args.out / "calib", "reply").draw(trained, CALIBRATED, "calib.jsonl")
    assert world.split_of("picture", DEMO.shapes) == "held_out"
    pixels, _ = media.picture(DEMO, np.random.default_rng(1))
    Image.fromarray(pixels).save(args.out / "demo.png", optimize=True)
    spoken = next(u for u in conversations.utterances[DEMO_ASKED] if u.voice == "slt")
    soundfile.write(args.out / "demo.flac", speech_data.sound_of(args.work, spoken), sizes.QUESTION_RATE)
    (args.out / "questions.gram").write_text(reply_grammar())


if __name__ == "__main__":
    main()
