"""Conversations as the thinker reads them, laid out by the product's own runtime: ids, TMRoPE positions, media.

So what Wren is trained on is what the runtime gives it, token for token; that the runtime's prompts are those of
transformers' processor is the runtime's own tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from omniport.runtime.media.image import VisionInput, image_input, video_input
from omniport.runtime.media.log_mel import audio_tokens, mel_filters
from omniport.runtime.prompt import chat_template
from omniport.runtime.prompt.builder import Media
from omniport.runtime.prompt.positions import Layout, SoundVideo, grid_positions, video_times
from omniport.runtime.prompt.tokenizer import TextCodec
from torch import Tensor
from torch.nn import functional

from wren import frame, sizes

Floats = NDArray[np.float32]


FFT, HOP = 400, 160
WINDOW = torch.hann_window(FFT)
NO_NAME = -1  # of a name that is not told
SEEN = 0.1  # share of a token's pixels that a shape has to cover
FILTERS = torch.tensor(mel_filters(128, FFT, sizes.QUESTION_RATE), dtype=torch.float32)


def mel_of_question(sound: Floats) -> Floats:
    """[n] at 16 kHz -> [128, frames], as the runtime computes it, ten times as fast: one product in float32."""
    frames = -(-len(sound) // HOP)
    start = torch.from_numpy(sound[1 : FFT // 2 + 1][::-1].copy())
    padded = functional.pad(torch.cat([start, torch.from_numpy(sound)]), (0, 2 * FFT))
    power = torch.stft(padded, FFT, HOP, window=WINDOW, center=False, return_complex=True).abs().square()
    mel = (FILTERS @ power).clamp(min=1e-10).log10()
    floored: Floats = ((torch.maximum(mel, mel.max() - 8) + 4) / 4)[:, :frames].numpy()
    return floored


@dataclass(frozen=True, eq=False)
class Turn:
    """A question and its answer, ready to be laid out.

    Attributes:
        text: the question; empty if it is spoken.
        sound: of the question, float32 [n] at 16 kHz.
        picture: uint8 [h, w, 3].
        clip: frames uint8 [F, h, w, 3] and sound float32 [n] at 16 kHz.
        said: the words of the sound, or of the clip's.
        names: colour and shape of what is seen; of what moves in a clip the direction as well.
        places: which of ``names`` each pixel shows, counted from 1 (0: none); [h, w] of a picture, [F, h, w] of a clip.
    """

    text: str
    answer: str
    sound: Floats | None = None
    picture: NDArray[np.uint8] | None = None
    clip: tuple[NDArray[np.uint8], Floats] | None = None
    said: str = ""
    names: Sequence[tuple[str, ...]] = ()
    places: NDArray[np.uint8] | None = None


@dataclass(eq=False)
class Laid:
    """A conversation of tokens [S]; ``answers`` are the spans that the model has to say, each with its end.

    Each sound has its mel, and the ids of the words that it says; each picture or clip the ids [tokens, 3] of the
    colour and the shape that most of a token's pixels show, and of the direction that it moves in (-1: it does not).
    """

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    answers: list[slice]
    mels: list[Floats] = field(default_factory=list)
    said: list[list[int]] = field(default_factory=list)
    pictures: list[VisionInput] = field(default_factory=list)
    clips: list[VisionInput] = field(default_factory=list)
    seen: list[NDArray[np.int64]] = field(default_factory=list)


class Prompts:
    """Lays out conversations."""

    def __init__(self, work: Path) -> None:
        self.manifest = frame.manifest(work)
        self.codec = TextCodec.from_file(frame.folder(work) / "tokenizer.json", self.manifest.tokens)

    def lay(self, turns: Sequence[Turn], system: str | None = None) -> Laid:
        """Lay out turns behind a system prompt (the speech prompt if None); the last one's answer may be empty."""
        layout = Layout(self.manifest, self.codec)
        laid = Laid(np.zeros(0, np.int64), np.zeros((3, 0), np.int64), [])
        chat_template.begin_message(layout, "system")
        layout.text(system or self.manifest.chat.system_prompt)
        chat_template.end_message(layout)
        for turn in turns:
            chat_template.begin_message(layout, "user")
            self._media(layout, turn, laid)
            layout.text(turn.text)
            chat_template.end_message(layout)
            chat_template.begin_reply(layout)
            begin = layout.length
            if turn.answer:
                layout.text(turn.answer)
                layout.control(self.manifest.tokens.im_end)
                laid.answers.append(slice(begin, layout.length))
                layout.text("\n")
        layout.flush()
        segment = layout.segment()
        laid.ids, laid.positions = segment.ids, segment.positions
        return laid

    def _media(self, layout: Layout, turn: Turn, laid: Laid) -> None:
        manifest, tokens = self.manifest, self.manifest.tokens
        if turn.picture is not None:
            laid.pictures.append(image_input(turn.picture, manifest.vision))
            laid.seen.append(self._named(turn, laid.pictures[-1].grid_thw))
            Media(layout).image(laid.pictures[-1])
        if turn.clip is not None:
            frames, sound = turn.clip
            vision = video_input(frames, manifest.vision)
            laid.clips.append(vision)
            laid.seen.append(self._named(turn, vision.grid_thw))
            laid.mels.append(mel_of_question(sound))
            laid.said.append(self.codec.encode(turn.said))
            times = video_times(vision.grid_thw[0], 1.0, manifest)
            both = SoundVideo(layout)
            grid = grid_positions(vision.grid_thw, times, manifest.vision.merge_size)
            both.advance(grid, None, audio_tokens(laid.mels[-1].shape[1]), ended=True)
            both.close()
        if turn.sound is not None:
            laid.mels.append(mel_of_question(turn.sound))
            laid.said.append(self.codec.encode(turn.said))
            layout.control(tokens.audio_bos)
            layout.line(np.full(audio_tokens(laid.mels[-1].shape[1]), tokens.audio))
            layout.control(tokens.audio_eos)

    def _named(self, turn: Turn, grid: Sequence[int]) -> NDArray[np.int64]:
        """Ids [tokens, 3] of the colour, shape and direction of each token; ``grid`` counts patches."""
        nothing, merge = self.manifest.tokens.image, self.manifest.vision.merge_size
        words = [[self._word(word) for word in name] for name in turn.names]
        names = [[*ids, NO_NAME][:3] for ids in ([nothing, nothing], *words)]
        times, rows, columns = grid[0], grid[1] // merge, grid[2] // merge
        if turn.places is None:
            return np.tile(names[0], (times * rows * columns, 1))
        places = turn.places.reshape(
            times, -1, rows, turn.places.shape[-2] // rows, columns, turn.places.shape[-1] // columns
        )
        shares = np.stack([(places == i).mean((1, 3, 5)) for i in range(1, len(names))])
        best = np.where(shares.max(0) >= SEEN, shares.argmax(0) + 1, 0)
        return np.array(names)[best.reshape(-1)]

    def _word(self, word: str) -> int:
        """The one token of a word inside a sentence."""
        (token,) = self.codec.encode(f" {word}")
        return token

    def batch(self, rows: Sequence[Laid]) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs of transformers' thinker and labels [B, S] (-100 where nothing is asked).

        Rows are padded behind, where no token looks: they need no mask, without which attention is faster.
        """
        width = max(len(row.ids) for row in rows)
        ids = torch.full((len(rows), width), self.manifest.tokens.endoftext)
        labels = torch.full_like(ids, -100)
        positions = torch.zeros((3, len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            n = len(row.ids)
            ids[i, :n] = torch.from_numpy(row.ids)
            positions[:, i, :n] = torch.from_numpy(row.positions)
            for span in row.answers:
                labels[i, span] = ids[i, span]
        inputs = {"input_ids": ids, "position_ids": positions}
        mels = [torch.from_numpy(mel) for row in rows for mel in row.mels]
        if mels:
            longest = max(mel.shape[1] for mel in mels)
            inputs["input_features"] = torch.stack([functional.pad(m, (0, longest - m.shape[1])) for m in mels])
            lengths = torch.tensor([m.shape[1] for m in mels])
            inputs["feature_attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        for name, grid, seen in (
            ("pixel_values", "image_grid_thw", [p for row in rows for p in row.pictures]),
            ("pixel_values_videos", "video_grid_thw", [c for row in rows for c in row.clips]),
        ):
            if seen:
                patches = [np.reshape(s.patches, (-1, s.patches.shape[-1])) for s in seen]
                inputs[name] = torch.from_numpy(np.concatenate(patches))
                inputs[grid] = torch.tensor([s.grid_thw for s in seen])
        return inputs, labels
