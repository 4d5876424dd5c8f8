"""Sizes of speech windows: one place, from which the planner, the engines' profiles and the command line take them."""

from __future__ import annotations

import ast

import pytest
from omniport.cli.main import app
from omniport.export.planning import plan
from omniport.export.tensorrt import profiles
from omniport.runtime.bundle.manifest import AudioFrontend, DitGeometry, VocoderGeometry
from omniport.runtime.errors import UsageError
from omniport.runtime.generation import decoder, encoders
from omniport.runtime.speech import windows
from omniport.runtime.speech.windows import SpeechWindows, checked_windows, vocoder_lengths, window_codes
from support.paths import REPOSITORY
from typer.testing import CliRunner

DIT, VOCODER = DitGeometry(), VocoderGeometry()


def test_a_window_is_solved_with_what_its_blocks_see() -> None:
    assert (DIT.block_codes, DIT.look_back_codes, DIT.look_ahead_codes) == (12, 24, 12)
    assert window_codes(48, DIT) == windows.STREAM_CODES == 84
    assert window_codes(windows.BEHIND_CODES, DIT) == 276


def test_a_streamed_window_fits_what_engines_have_at_least() -> None:
    new = SpeechWindows().chunks[-1]
    assert max(SpeechWindows().chunks) == new
    assert new * DIT.repeats + 2 * VOCODER.context_frames <= windows.STREAM_CODES * DIT.repeats


def test_the_planner_s_figures_are_the_runtime_s() -> None:
    assert plan.FIRST_CODES == 24
    assert (SpeechWindows().chunks[-1], windows.BEHIND_CODES) == (plan.NEW_CODES, plan.NEW_CODES_BEHIND)
    assert (DIT.codec_hz, DIT.repeats) == (plan.CODES_PER_SECOND, plan.FRAMES_PER_CODE)
    assert VOCODER.context_frames == plan.VOCODER_CONTEXT
    assert plan.PREFILL_ROWS == decoder.PREFILL_CHUNK
    assert encoders.AUDIO_CHUNKS * AudioFrontend().chunk_frames == plan.AUDIO_ROWS
    assert profiles.STREAM_CODES is windows.STREAM_CODES


@pytest.mark.parametrize("file", ["export/planning/plan.py", "export/tensorrt/profiles.py"])
def test_nobody_copies_the_figures(file: str) -> None:
    """Each is derived: none of the numbers stands in the text."""
    tree = ast.parse((REPOSITORY / file).read_text())
    numbers = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, int)}
    assert not numbers & {24, 48, 84, 240, 276, 34}


def test_help_says_how_many_codes_are_enough_to_stream() -> None:
    """A copy: the command line loads nothing of the runtime to show its help."""
    result = CliRunner().invoke(app, ["build", "--help"])
    assert f"{windows.STREAM_CODES} are enough to stream" in " ".join(result.output.split())


def test_lengths_of_the_vocoder_are_few() -> None:
    assert vocoder_lengths(SpeechWindows(), 34, DIT) == (48, 96, 154)
    assert vocoder_lengths(SpeechWindows((12,)), 34, DIT) == (48, 72, 82)
    assert vocoder_lengths(SpeechWindows(), 20, DIT) == (45, 89, 137)


def test_windows_of_other_geometry_are_refused() -> None:
    assert checked_windows("whole", DIT, VOCODER, shared=False) == (SpeechWindows(), 34)
    assert checked_windows("stream", DIT, VOCODER, shared=True) == (SpeechWindows(behind=windows.BEHIND_CODES), 34)
    wide = DitGeometry(block_size=32)
    with pytest.raises(UsageError, match=r"SpeechWindows.chunks is \(12, 24, 48\); multiples of 16 codes"):
        checked_windows("stream", wide, VOCODER, shared=False)
