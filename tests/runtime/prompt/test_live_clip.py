"""Live clips against whole ones: resampling, log-mel, pieces and positions, however the media are cut."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from omniport.runtime.bundle.manifest import AudioFrontend
from omniport.runtime.media.audio import ResampleStream, resample
from omniport.runtime.media.log_mel import LogMelStream, log_mel
from omniport.runtime.prompt.positions import Layout, SoundVideo, grid_positions, video_times
from support.live_turns import Live, pieces

RATE = 16000
FRONTEND = AudioFrontend()


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
def test_resampling_in_pieces_is_exact(rate: int) -> None:
    rng = np.random.default_rng(rate)
    samples = rng.standard_normal(2 * rate + 123).astype(np.float32)
    for most in (700, 9000):
        stream = ResampleStream(rate, RATE)
        got = [stream.push(samples[part]) for part in pieces(rng, len(samples), most)]
        whole = resample(samples, rate, RATE)
        np.testing.assert_array_equal(np.concatenate([*got, stream.finish()]), whole)
        assert np.std(whole) > 0.3


@pytest.mark.parametrize("samples", [1, 159, 201, 480, 31999, 32000, 32040, 32041, 64123])
def test_log_mel_in_pieces_is_exact(samples: int) -> None:
    rng = np.random.default_rng(samples)
    clip = (rng.standard_normal(samples) * np.linspace(0.01, 1, samples)).astype(np.float32)
    whole = log_mel(clip, FRONTEND)
    for most in (90, 5000, samples + 1):
        stream = LogMelStream(FRONTEND)
        blocks = [block for part in pieces(rng, samples, most) for block in stream.push(clip[part])]
        blocks += stream.finish()
        mel = np.concatenate([block.mel(stream.peak) for block in blocks], axis=1)
        np.testing.assert_array_equal(mel, whole)
        assert [block.power.shape[0] for block in blocks[:-1]] == [200] * (len(blocks) - 1)
    assert whole.std() > 0.01 or samples < 160


def test_the_floor_of_a_block_is_that_of_the_sound_so_far() -> None:
    quiet = np.random.default_rng(0).standard_normal(3 * 32000).astype(np.float32) * 1e-6
    loud = quiet.copy()
    loud[-16000:] += np.sin(np.arange(16000)).astype(np.float32)
    blocks = []
    for cut in (500, 96000):  # a block does not depend on how much came with it
        stream = LogMelStream(FRONTEND)
        blocks.append([b for i in range(0, 96000, cut) for b in stream.push(loud[i : i + cut])] + stream.finish())
    assert [b.peak for b in blocks[0]] == [b.peak for b in blocks[1]]
    first, peak = blocks[0][0], blocks[0][-1].peak
    assert first.peak < peak - 5
    assert first.changes(peak)
    assert not first.changes(first.peak)
    np.testing.assert_array_equal(first.mel(peak), log_mel(loud, FRONTEND)[:, :200])
    assert not np.array_equal(first.mel(first.peak), first.mel(peak))
    stream = LogMelStream(FRONTEND)
    again = stream.push(quiet) + stream.finish()
    assert not again[0].changes(stream.peak), "a clip of even loudness needs no correction"


@pytest.fixture
def layout(live: Live) -> Layout:
    return Layout(live.session.manifest, live.session.text_codec)


def lay(layout: Layout, feed: list[tuple[int, int]], grids: int, sound: int, step: float) -> NDArray[np.int64]:
    """A video of ``grids`` 2x1 patches every ``step`` s and ``sound`` audio tokens, fed by (grids, tokens) so far."""
    times = video_times(grids + 1, step, layout.manifest)
    grid = grid_positions((grids, 4, 2), times[:grids], 2)
    both = SoundVideo(layout)
    pieces = [p for seen, heard in feed for p in both.advance(grid[:, : 2 * seen], int(times[seen]), heard)]
    pieces += both.advance(grid, None, sound, ended=True)
    both.close()
    for kind, total in (("video", 2 * grids), ("audio", sound)):
        parts = [(piece.part.start, piece.part.stop) for piece in pieces if piece.kind == kind]
        assert [a for a, _ in parts] == [0, *(b for _, b in parts[:-1])]
        assert parts[-1][1] == total
    made = layout.segment()
    return np.concatenate([made.ids[None], made.positions])


@pytest.mark.parametrize("step", [1.0, 0.4, 1.4, 4.4, 5.0])
@pytest.mark.parametrize(("grids", "sound"), [(1, 1), (5, 120), (7, 30), (2, 300), (6, 150)])
def test_a_video_with_sound_in_pieces_is_exact(layout: Layout, grids: int, sound: int, step: float) -> None:
    rng = np.random.default_rng(grids * 1000 + sound)
    whole = lay(layout, [], grids, sound, step)
    for _ in range(20):
        count = int(rng.integers(1, 12))
        seen = np.sort(rng.integers(0, grids + 1, count))
        heard = np.sort(rng.integers(0, sound + 1, count))
        feed = [(int(a), int(b)) for a, b in zip(seen, heard, strict=True)]
        np.testing.assert_array_equal(lay(layout, feed, grids, sound, step), whole)
