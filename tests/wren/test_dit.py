"""What the DiT is taught with."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from wren import codes, corpus, dit, sizes  # noqa: E402

WIDTH = sizes.FRAMES_PER_CODE * sizes.MELS
CODEBOOK = {
    "mean": torch.zeros(WIDTH),
    "basis": torch.randn(WIDTH, 4, generator=torch.Generator().manual_seed(1)),
    "centres": torch.randn(sizes.CODES, 4, generator=torch.Generator().manual_seed(0)),
}


def reply(text: str, voice: str, frames: int) -> corpus.Reply:
    draw = np.random.default_rng(frames)
    mel = torch.from_numpy(draw.normal(size=(frames, sizes.MELS)).astype(np.float32))
    return corpus.Reply(text, voice, "train", np.zeros(frames * sizes.HOP, np.int16), mel)


@pytest.fixture(scope="module")
def examples() -> dit.Examples:
    lengths = {"Goodbye.": 62, "I do not know.": 94, **{f"{i}.": 210 + 2 * i for i in range(12)}}
    replies = [reply(text, voice, frames) for text, frames in lengths.items() for voice in sizes.REPLY_VOICES]
    with pytest.MonkeyPatch.context() as patched:  # the world gives few of these answers
        patched.setattr(dit.sentences, "often", lambda count, answers: [])
        return dit.Examples(replies, CODEBOOK)


def test_whole_batches_hold_replies_that_are_shorter_than_a_piece(examples: dit.Examples) -> None:
    """Pieces of `FRAMES` leave them out; "I do not know." was never learned, and said badly."""
    shortest = min(len(r.mel) for r in examples.by_length)
    seen = set()
    for step in range(60):
        mel, said, reference, speaker = examples.whole(step)
        frames = mel.shape[1]
        assert frames % 2 == 0
        assert said.shape == (len(mel), frames // 2)
        assert len(reference) == len(speaker) == len(mel)
        begins = {tuple(r.mel[0].tolist()): r for r in examples.by_length}
        drawn = [begins[tuple(row[0].tolist())] for row in mel]  # every one from its beginning
        assert frames == min(len(r.mel) for r in drawn) // 2 * 2
        assert torch.equal(said[0], codes.encode(drawn[0].mel, CODEBOOK)[: frames // 2])
        seen |= {r.text for r in drawn}
    assert shortest < dit.FRAMES
    assert {"Goodbye.", "I do not know."} <= seen
    assert "I do not know." not in {r.text for r in examples.crops.replies}
