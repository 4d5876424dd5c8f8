"""What flite speaks for Wren: formats, levels, going on after a stop."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from wren import sizes, speech_data

needs_flite = pytest.mark.skipif(not shutil.which("flite"), reason="flite is not installed (apt-get install flite)")


@needs_flite
def test_speech_is_equal_twice_levelled_and_whole_codes_long() -> None:
    first, second = (speech_data.speak("Seven plus four is eleven.", "slt", 1.0, sizes.RATE) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert len(first) % sizes.SAMPLES_PER_CODE == 0
    assert np.abs(first).max() <= speech_data.PEAK
    faster = speech_data.speak("Seven plus four is eleven.", "slt", 1.25, sizes.RATE)
    assert 0.7 < len(faster) / len(first) < 0.9


@needs_flite
def test_a_run_that_stopped_in_the_middle_of_a_line_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentences = [("One.", "train", 1.0), ("Two.", "held_out", 1.0)]
    speech_data.speak_all(tmp_path, "Chelsie", "slt", sentences[:1], sizes.RATE)
    index = tmp_path / "speech" / "Chelsie" / "index.jsonl"
    whole = index.read_text()
    index.write_text(whole + json.dumps({"text": "Two."})[:9])
    speech_data.speak_all(tmp_path, "Chelsie", "slt", sentences, sizes.RATE)
    assert capsys.readouterr().out.splitlines() == [f"{n} of {n} spoken, 0.0 min left" for n in (1, 2)]
    utterances = speech_data.spoken(tmp_path, "Chelsie")
    assert [(u.text, u.split) for u in utterances] == [("One.", "train"), ("Two.", "held_out")]
    assert index.read_text().startswith(whole)
    assert [len(speech_data.sound_of(tmp_path, u)) for u in utterances] == [u.samples for u in utterances]


def test_disturbing_is_seeded_and_clips_nothing() -> None:
    sound = np.sin(np.arange(8000) / 20).astype(np.float32)
    first, second, other = (speech_data.disturb(sound, np.random.default_rng(s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)
    for made in (first, other):
        assert made.dtype == np.float32
        assert 10 ** (-24 / 20) - 1e-3 <= np.abs(made).max() <= 10 ** (-4 / 20) + 1e-3


def test_sentences_are_spoken_side_by_side_and_kept_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(2, timeout=30)

    def speak(text: str, voice: str, speed: float, rate: int) -> speech_data.Sound:
        together.wait()  # breaks if one is spoken alone
        return np.full(1, int(text), np.float32)

    monkeypatch.setattr(speech_data, "speak", speak)
    monkeypatch.setattr(speech_data, "usable_cpus", lambda: {0, 1})
    wanted = [(str(number), "train", 1.0) for number in range(2 * speech_data.TOGETHER)]
    assert np.concatenate(list(speech_data.sounds(wanted, "slt", sizes.RATE))).tolist() == list(range(len(wanted)))
