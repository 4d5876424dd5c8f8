"""The page in a browser: it talks, is interrupted, chats, shows, asks for the key, and says what is wrong."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable

import numpy as np
import pytest
import soundfile
from support.browser import Tab
from support.served import Served

from .conftest import CODES, QUESTIONS, SAID

pytestmark = pytest.mark.browser
Serve = Callable[..., Served]
Open = Callable[..., Tab]
KEY = "sk/right+1="  # no name of a subprotocol could be so
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True}
NO_MICROPHONE = """
navigator.mediaDevices.getUserMedia = () => Promise.reject(new DOMException("none", "NotFoundError"));
"""


def test_a_spoken_question_is_answered_and_the_answer_interrupted(serve: Serve, open_tab: Open) -> None:
    tab = open_tab(serve().url)
    tab.page.click("#talk-start")
    first = tab.until("response.output_audio.delta")["item_id"]
    assert tab.page.inner_text("#talk-state") == "Speaking. Talk to interrupt."
    speech = tab.until("input_audio_buffer.speech_started", 2)
    tab.until("conversation.item.retrieved")
    began = next(event["at"] for event in tab.came if event["type"] == "response.output_audio.delta")
    (cut,) = tab.told("conversation.item.truncate")
    assert cut["item_id"] == first
    assert tab.page.inner_text("#talk-state") != "Listening.", "somebody speaks"
    assert cut["at"] - speech["at"] < 0.5, "at once"
    assert 300 < cut["audio_end_ms"] <= (cut["at"] - began) * 1000 + 50, "what was played, and not what was sent"
    assert not [e for e in tab.told("omniport.playback") if e["item_id"] == first and e["at"] > cut["at"]]

    model = tab.page.locator("#talk-log .model").first
    model.locator(".unheard").wait_for()
    rest = model.locator(".unheard").inner_text().partition("heard:")[2]
    assert rest
    assert SAID.endswith(rest.strip())
    assert model.locator(".note").inner_text() == "interrupted"

    second = tab.until("response.done", 2)["response"]
    assert second["status"] == "completed"
    tab.page.wait_for_timeout(1500)
    assert [e for e in tab.told("omniport.playback") if e["item_id"] == second["output"][0]["id"]], "it is played"
    assert tab.page.locator("#talk-log .model .said").nth(1).inner_text() == SAID
    tab.until("conversation.item.input_audio_transcription.completed", 2)
    assert tab.page.locator("#talk-log .user .said").all_inner_texts() == [SAID, SAID], "as the fake model hears"
    tab.page.click("#talk-start")
    assert tab.page.inner_text("#talk-start") == "Start"


def test_a_lost_connection_is_taken_up(serve: Serve, open_tab: Open) -> None:
    served = serve()
    tab = open_tab(served.url)
    tab.page.click("#talk-start")
    first = tab.until("response.output_audio.delta")["item_id"]
    tab.page.wait_for_timeout(800)
    served.drop()
    session = tab.until("session.created", 2)["session"]["omniport"]
    assert session["resumed"]
    assert tab.until("conversation.item.truncated")["item_id"] == first, "what was not heard is not said"
    assert tab.page.is_hidden("#notice")
    tab.page.locator("#talk-log .model").first.locator(".unheard").wait_for()
    assert tab.until("response.created", 2), "the next question is heard and answered"
    tab.page.click("#talk-start")
    due = time.monotonic() + 5
    while served.service.realtime.open + served.service.realtime.kept and time.monotonic() < due:
        tab.page.wait_for_timeout(50)
    assert not served.service.realtime.kept, "who presses Stop has left"


def test_a_lost_connection_that_nobody_keeps(serve: Serve, open_tab: Open) -> None:
    served = serve(resume_seconds=0.0)
    tab = open_tab(served.url)
    tab.page.click("#talk-start")
    tab.until("input_audio_buffer.speech_started")
    served.drop()
    tab.page.locator("#notice", has_text="connection was lost").wait_for()
    assert tab.page.inner_text("#talk-start") == "Start"


def test_the_microphone_arrives_at_its_own_pace(serve: Serve, open_tab: Open) -> None:
    """What the server gets is as long as the question."""
    tab = open_tab(serve().url)
    tab.page.click("#talk-start")
    tab.until("input_audio_buffer.speech_stopped")
    frames = [base64.b64decode(event["audio"]) for event in tab.told("input_audio_buffer.append")]
    assert {len(frame) for frame in frames} == {1920}, "40 ms of 24 kHz"
    heard = np.frombuffer(b"".join(frames), "<i2") / 32768
    asked, rate = soundfile.read(QUESTIONS[0])
    loud = np.flatnonzero(np.abs(heard) > 0.05)
    said = np.flatnonzero(np.abs(asked) > 0.05)
    assert (loud[-1] - loud[0]) / 24000 == pytest.approx((said[-1] - said[0]) / rate, abs=0.3)


def test_the_camera_is_seen_while_somebody_speaks(serve: Serve, open_tab: Open) -> None:
    tab = open_tab(serve().url)
    tab.page.check("#camera")
    tab.page.click("#talk-start")
    began = tab.until("input_audio_buffer.speech_started")["at"]
    ended = tab.until("input_audio_buffer.speech_stopped")["at"]
    assert tab.until("response.done")["response"]["status"] != "failed"
    pictures = [event["at"] for event in tab.told("input_image_buffer.append") if event["at"] < ended + 1]
    assert began <= pictures[0] < began + 0.3
    assert pictures[-1] < ended + 0.1
    assert len(pictures) == pytest.approx((ended - began) * 2, abs=2)
    assert not [event for event in tab.came if event["type"] == "error"]


def test_a_turn_by_the_keyboard_with_the_camera(serve: Serve, open_tab: Open) -> None:
    tab = open_tab(serve().url)
    page = tab.page
    page.check("text=Push to talk")
    page.check("#camera")
    page.focus("#talk-start")
    page.keyboard.press("Enter")
    page.wait_for_selector("#push:enabled")
    tab.until("session.updated", 2)
    page.focus("#push")
    page.keyboard.down("Space")
    page.wait_for_timeout(1300)
    assert page.get_attribute("#push", "aria-pressed") == "true"
    page.keyboard.up("Space")
    tab.until("response.output_audio.delta")
    pictures = tab.told("input_image_buffer.append")
    assert 2 <= len(pictures) <= 4, "two a second"
    assert all(event["image"].startswith("data:image/jpeg;base64,") for event in pictures)
    assert [event["type"] for event in tab.sent if "commit" in event["type"] or "response" in event["type"]] == [
        "input_audio_buffer.commit",
        "response.create",
    ]
    page.wait_for_timeout(600)
    page.keyboard.press("Space")  # a tap: the reply ends, the next turn begins
    tab.until("conversation.item.truncated")
    page.wait_for_timeout(600)
    assert page.get_attribute("#push", "aria-pressed") == "true"
    page.keyboard.press("Space")
    tab.until("response.created", 2)
    page.click("text=Chat")
    page.wait_for_timeout(200)
    page.click("text=Talk")
    assert page.inner_text("#talk-start") == "Start", "nothing listens unseen"
    assert not page.is_checked("#camera")


def test_a_chat_with_a_picture(serve: Serve, open_tab: Open) -> None:
    served = serve()
    tab = open_tab(served.url + "#chat")
    page = tab.page
    page.set_input_files("#files", str(QUESTIONS[0].parent / "demo.png"))
    page.locator("#attached img").wait_for()
    with page.expect_request("**/v1/chat/completions") as asked:
        page.focus("#message")
        page.keyboard.type("What do you see?")
        page.keyboard.press("Enter")
    body = asked.value.post_data_json
    assert [part["type"] for part in body["messages"][0]["content"]] == ["image_url", "text"]
    assert body["audio"]["format"] == "pcm16"
    page.locator("#chat-log audio").wait_for()
    assert page.inner_text("#chat-log .model .said") == SAID
    assert page.locator("#chat-log .user img").count() == 1
    page.wait_for_timeout(300)
    assert page.evaluate("document.querySelector('#chat-log audio').duration") == pytest.approx(CODES / 50, abs=0.5)

    page.uncheck("#aloud")
    with page.expect_request("**/v1/chat/completions") as asked:
        page.fill("#message", "And now?")
        page.click("#send")
    body = asked.value.post_data_json
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]
    assert body["messages"][1]["content"] == SAID
    assert "audio" not in body
    page.locator("#chat-log .model[aria-busy]").wait_for(state="detached")
    page.locator("#send:enabled").wait_for()
    page.click("#chat-clear")
    assert not page.locator("#chat-log li").count()


def test_what_fails_in_a_chat_can_be_sent_again(serve: Serve, open_tab: Open) -> None:
    served = serve()
    tab = open_tab(served.url + "#chat")
    served.service.state = "draining"
    tab.page.fill("#message", "Hello")
    tab.page.click("#send")
    tab.page.locator("#notice", has_text="not ready").wait_for()
    assert tab.page.input_value("#message") == "Hello"
    assert not tab.page.locator("#chat-log li").count()
    served.service.state = "ready"
    tab.page.click("#send")
    tab.page.locator("#chat-log .model .said", has_text=SAID).wait_for()
    assert tab.page.is_hidden("#notice")


def test_the_status_on_a_phone(serve: Serve, open_tab: Open) -> None:
    tab = open_tab(serve().url, **PHONE)
    page = tab.page
    page.click("text=Chat")
    page.fill("#message", "Hello")
    page.click("#send")
    page.locator("#chat-log audio").wait_for()
    page.click("text=Status")
    page.locator("#stages tbody tr", has_text="dit").wait_for()
    assert "ready" in page.inner_text("#tiles")
    assert page.locator("#plots svg").count() == 4
    page.wait_for_timeout(4500)
    memory = page.locator("#plots .plot", has_text="Memory").locator(".line").get_attribute("d")
    assert memory.count("L") >= 1, "a line over time"
    for screen in ("talk", "chat", "status"):
        page.click(f'nav a[href="#{screen}"]')
        page.locator(f'nav a[href="#{screen}"][aria-current=page]').wait_for()  # the one before is hidden
        assert tab.fits()
        controls = page.locator("button:visible, select:visible, nav a:visible")
        # at once: which there are may change in between
        heights = controls.evaluate_all("found => found.map(each => each.getBoundingClientRect().height)")
        assert heights
        assert min(heights) >= 32, "a thumb meets it"
    assert (
        not page.locator("button, input, select, textarea")
        .filter(visible=True)
        .evaluate_all(
            "all => all.filter(e => !(e.labels?.length || e.textContent.trim() || e.ariaLabel)).map(e => e.id)"
        )
    )


def test_a_key_is_asked_for(serve: Serve, open_tab: Open) -> None:
    tab = open_tab(serve(keys=(KEY,)).url)
    page = tab.page
    page.locator("#settings[open]").wait_for()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    page.locator("#key-told", has_text="does not take this key").wait_for()
    page.fill("#key", KEY)
    page.keyboard.press("Enter")
    page.locator("#model", has_text="tiny").wait_for()
    assert page.is_hidden("#notice")
    assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
    page.click("#talk-start")
    tab.until("session.created")


def test_what_is_wrong_is_said_with_what_to_do(serve: Serve, open_tab: Open) -> None:
    served = serve(no_auth=True, sessions=1)
    none = open_tab(served.url, before=NO_MICROPHONE)
    none.page.click("#talk-start")
    none.page.locator("#notice", has_text="No microphone was found. Plug one in").wait_for()

    insecure = open_tab(served.url.replace("127.0.0.1", "box.example"))
    insecure.page.click("#talk-start")
    insecure.page.locator("#notice", has_text="--tls-self-signed").wait_for()
    insecure.page.click("text=Chat")
    insecure.page.fill("#message", "Hello")
    insecure.page.click("#send")
    insecure.page.locator("#chat-log audio[autoplay]").wait_for()

    one = open_tab(served.url)
    one.page.click("#talk-start")
    one.until("session.created")
    other = open_tab(served.url)
    other.page.click("#talk-start")
    other.page.locator("#notice", has_text="all its places are in use").wait_for()
    other.complaints = [text for text in other.complaints if "WebSocket" not in text]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(serve: Serve, open_tab: Open, scheme: str) -> None:
    """WCAG's contrast of 4.5 for the colours that text has."""
    tab = open_tab(serve().url, color_scheme=scheme)
    pairs = [("ink", "ground"), ("ink", "surface"), ("ink", "raised"), ("ink", "mine"), ("faint", "ground")]
    pairs += [("faint", "surface"), ("faint", "mine"), ("on-accent", "accent"), ("warning-ink", "warning")]
    style = "getComputedStyle(document.documentElement)"
    for ink, ground in pairs:
        colours = [tab.page.evaluate(f"{style}.getPropertyValue('--{name}')") for name in (ink, ground)]
        assert contrast(*colours) >= 4.5, (ink, ground)
    tab.page.click("text=Chat")
    shown = tab.page.evaluate("getComputedStyle(document.querySelector('#message'), '::placeholder').color")
    assert contrast(hexadecimal(shown), tab.page.evaluate(f"{style}.getPropertyValue('--surface')")) >= 4.5, shown


def hexadecimal(colour: str) -> str:
    """Of ``rgb(1, 2, 3)``."""
    return "#" + "".join(f"{int(value):02x}" for value in colour[4:-1].split(","))


def contrast(first: str, second: str) -> float:
    def luminance(colour: str) -> float:
        channels = np.array([int(colour.strip()[at : at + 2], 16) for at in (1, 3, 5)]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ (0.2126, 0.7152, 0.0722))

    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)
