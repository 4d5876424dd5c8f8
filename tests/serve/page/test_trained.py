"""The trained model in the page: a spoken question is answered in the right words, which are heard, on a phone's width.

What it looks like is left in build/page, to be looked at.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.browser import Tab
from support.paths import REPOSITORY
from support.served import ServedSession, served_alike
from support.spoken_questions import ANSWERS, Listener

from .conftest import QUESTIONS

pytestmark = pytest.mark.browser
SEEN = REPOSITORY / "build" / "page"
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "device_scale_factor": 2}


@pytest.fixture(scope="module")
def wren(wren_bundle: Path) -> Iterator[ServedSession]:
    with served_alike(wren_bundle, model="Wren", no_auth=True) as served:
        yield served


@pytest.fixture(scope="module")
def chromium(launch: Callable[[Sequence[Path]], Any]) -> Any:
    """Its microphone plays one question."""
    return launch(QUESTIONS[:1])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_spoken_question(wren: ServedSession, listener: Listener, open_tab: Callable[..., Tab], scheme: str) -> None:
    SEEN.mkdir(parents=True, exist_ok=True)
    tab = open_tab(wren.url, color_scheme=scheme, **PHONE)
    page = tab.page

    def look(screen: str) -> None:
        assert tab.fits()
        page.screenshot(path=SEEN / f"{screen}-{scheme}.png")

    page.click("#talk-start")
    tab.until("response.done", seconds=60)
    assert page.inner_text("#talk-log .model .said") == ANSWERS[0]
    deltas = [event["delta"] for event in tab.came if event["type"] == "response.output_audio.delta"]
    assert listener.hears(b"".join(map(base64.b64decode, deltas)), ANSWERS[0])
    page.wait_for_timeout(500)
    look("talk")
    page.click("#talk-start")

    page.click('nav a[href="#chat"]')
    page.set_input_files("#files", [str(QUESTIONS[0]), str(QUESTIONS[0].parent / "picture-057-0.png")])
    look("chat-files")
    page.click("#attached button >> nth=1")
    page.click("#send")
    page.locator("#chat-log audio").wait_for()
    assert page.inner_text("#chat-log .model .said") == ANSWERS[0]
    page.wait_for_timeout(300)
    look("chat")
    page.click('nav a[href="#status"]')
    page.wait_for_timeout(6500)
    look("status")
    page.locator("#plots").evaluate("plots => plots.scrollIntoView({block: 'end'})")
    look("plots")
    page.click('nav a[href="#talk"]')
    page.click("#settings-open")
    look("settings")
