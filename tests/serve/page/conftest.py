"""The page in Debian's Chromium, driven by Playwright, with a microphone that plays a spoken question."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest
import soundfile
from support.bundles import make_bundle, make_manifest, write_manifest
from support.spoken_questions import ANSWERS, question

if TYPE_CHECKING:
    from support.browser import Tab
    from support.served import Served

#: where Debian and others put it
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
#: what the model says, of eight seconds: there is time to speak into it
SAID = "The quick brown fox jumps over the lazy dog."
CODES = 400
QUESTIONS = [question(answer).path for answer in ANSWERS]


def microphone(path: Path, questions: Sequence[Path]) -> Path:
    """Questions, and three seconds behind each, in a file."""
    sound = [np.zeros(48000)]
    for asked in questions:
        samples, rate = soundfile.read(asked)
        at = np.arange(round(len(samples) * 48000 / rate)) * rate / 48000
        sound += [np.interp(at, np.arange(len(samples)), samples), np.zeros(3 * 48000)]
    soundfile.write(path, np.concatenate([*sound, np.zeros(60 * 48000)]), 48000, subtype="PCM_16")
    return path


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Sequence[Path]], Any]]:
    """Browsers whose microphone plays questions."""
    if find_spec("playwright") is None:
        pytest.skip("the Python package playwright is not installed: run make serve-check, which installs it")
    if CHROMIUM is None:
        pytest.skip("there is no chromium on this machine: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    arguments = [
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        "--host-resolver-rules=MAP box.example 127.0.0.1",
        "--no-sandbox",
    ]
    with sync_playwright() as playwright:
        browsers = []

        def start(questions: Sequence[Path]) -> Any:
            path = microphone(tmp_path_factory.mktemp("microphone") / "questions.wav", questions)
            plays = f"--use-file-for-fake-audio-capture={path}%noloop"
            browsers.append(playwright.chromium.launch(executable_path=CHROMIUM, args=[*arguments, plays]))
            return browsers[-1]

        yield start
        for browser in browsers:
            browser.close()


@pytest.fixture(scope="module")
def chromium(launch: Callable[[Sequence[Path]], Any]) -> Any:
    """Its microphone plays a question, and while that is answered another one."""
    return launch(QUESTIONS)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Servers over fake graphs, which hear by the real detector of speech."""
    from support.served import Served

    made: list[Served] = []

    def start(**settings: Any) -> Served:
        root = make_bundle(tmp_path / f"bundle-{len(made)}")
        manifest = make_manifest()
        assert manifest.talker_sampling is not None
        write_manifest(
            root,
            msgspec.structs.replace(
                manifest,
                thinker_sampling=msgspec.structs.replace(manifest.thinker_sampling, max_new_tokens=64),
                talker_sampling=msgspec.structs.replace(manifest.talker_sampling, max_new_tokens=CODES),
            ),
        )
        made.append(Served(root, **settings).start())
        made[-1].live.script(SAID, [n % 40 for n in range(CODES)])
        return made[-1]

    yield start
    for served in made:
        served.close()


@pytest.fixture
def open_tab(chromium: Any) -> Iterator[Callable[..., Tab]]:
    from support.browser import Tab

    tabs: list[Tab] = []

    def open(url: str, **options: Any) -> Tab:
        tabs.append(Tab(chromium, url, **options))
        return tabs[-1]

    yield open
    for tab in tabs:
        tab.close()
