"""Replies end to end over fake graphs: events, conditioning, positions, limits, errors and reuse."""

from __future__ import annotations

import dataclasses
import gc
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from omniport.runtime import (
    AudioChunk,
    Done,
    Event,
    MediaError,
    OmniportError,
    OmniSession,
    PromptError,
    PromptTooLong,
    SamplingConfig,
    TextDelta,
    UnknownVoice,
    UsageError,
)
from omniport.runtime.reply_options import ReplyOptions
from support.bundles import CODES, edit, make_bundle
from support.fake_backend import FakeDecoder, FakeEncoder
from support.live_turns import Live

HELLO = [{"role": "user", "content": "Hello there"}]
GREEDY = SamplingConfig(max_new_tokens=40)


def split(events: Iterator[Event]) -> tuple[list[TextDelta], list[AudioChunk], Done]:
    listed = list(events)
    done = listed.pop()
    assert isinstance(done, Done)
    texts = [e for e in listed if isinstance(e, TextDelta)]
    chunks = [e for e in listed if isinstance(e, AudioChunk)]
    assert len(texts) + len(chunks) == len(listed)
    return texts, chunks, done


def test_a_spoken_reply(live: Live) -> None:
    codes = [k % CODES for k in range(30)]
    live.script("Grüße 你好", [*codes, 52])
    texts, chunks, done = split(live.session.reply(HELLO, talker=GREEDY, thinker=GREEDY))
    assert done.text == "Grüße 你好" == "".join(t.text for t in texts)
    assert done.token_ids == live.encode("Grüße 你好") == [t.token_id for t in texts]
    assert "" in [t.text for t in texts]  # the first bytes of a character
    assert done.codec_ids == codes
    assert [c.index for c in chunks] == list(range(len(chunks)))
    assert {c.sample_rate for c in chunks} == {24000}
    samples = np.concatenate([c.samples for c in chunks])
    assert samples.shape == (30 * 480,)
    assert samples.dtype == np.float32
    assert 0.05 < np.sqrt(np.mean(samples**2)) < 1


def test_stats(live: Live) -> None:
    live.script("hello", [*range(30), 52])
    _, _, done = split(live.session.reply(HELLO, talker=GREEDY))
    stats = done.stats
    assert (stats.backend, stats.text_tokens, stats.codec_tokens) == ("fake", 5, 30)
    assert stats.prompt_tokens == len(live.prompt(HELLO).token_ids)
    assert stats.audio_seconds == pytest.approx(0.6)
    assert stats.time_to_first_token is not None
    assert stats.time_to_first_audio is not None
    assert 0 < stats.time_to_first_token < stats.time_to_first_audio < stats.total_time
    assert {"preprocess", "prefill", "thinker", "talker", "dit", "bigvgan"} <= stats.busy.keys()
    assert all(0 < seconds <= stats.total_time for seconds in stats.busy.values())
    assert stats.real_time_factor == pytest.approx(stats.total_time / 0.6)
    assert stats.workers.keys() == {"thinker", "talker", "token2wav", "vocoder"}
    assert all(w.busy > 0 and w.waiting >= 0 and w.busy + w.waiting <= stats.total_time for w in stats.workers.values())
    assert stats.run_seconds.keys() == {"thinker", "talker", "dit", "bigvgan"}
    assert (stats.prefilled_tokens, stats.late_tokens, stats.reused_tokens) == (stats.prompt_tokens,) * 2 + (0,)
    assert stats.tokens_per_second is not None
    assert stats.codes_per_second is not None
    assert stats.peak_memory_bytes is not None
    assert stats.peak_memory_bytes > 1 << 20
    assert stats.solver == "rk4"


def test_speech_under_another_system_message_is_warned_of_once(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    own = live.session.manifest.chat.system_prompt
    for system in (own, f"{own} Be brief."):
        list(live.session.reply([{"role": "system", "content": system}, *HELLO]))
    brief = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *HELLO]
    list(live.session.reply(brief, speak=False))
    assert not caplog.records
    list(live.session.reply(brief))
    list(live.session.reply(brief))
    assert [record.message for record in caplog.records] == [caplog.records[0].message]
    assert "speech may be poor" in caplog.text


def test_text_only(live: Live) -> None:
    live.script("hi")
    texts, chunks, done = split(live.session.reply(HELLO, speak=False))
    assert (done.text, chunks, done.codec_ids) == ("hi", [], [])
    assert len(texts) == 2
    assert live.decoder("talker").calls == []
    assert (done.stats.time_to_first_audio, done.stats.real_time_factor) == (None, None)


def test_the_solver_of_a_reply_is_told(live: Live) -> None:
    live.script("hello", [*range(30), 52])
    pace = live.session._shared.pace
    assert pace.evaluation == np.inf
    for asked, used in (("auto", "rk4"), ("faster", "faster")):  # graphs that are fakes take no time
        assert split(live.session.reply(HELLO, talker=GREEDY, solver=asked))[2].stats.solver == used  # type: ignore[arg-type]
        assert 0 < pace.evaluation < 1
        pace.evaluation = np.inf
    assert split(live.session.reply(HELLO, solver="auto", speak=False))[2].stats.solver == ""


def test_sound_leaves_before_the_text_is_complete(live: Live) -> None:
    live.script("a" * 300, [k % CODES for k in range(250)] + [52])
    long = SamplingConfig(max_new_tokens=400)
    kinds = [type(e) for e in live.session.reply(HELLO, talker=long, thinker=long)]
    first_sound = kinds.index(AudioChunk)
    # The thinker is held back 64 tokens ahead of the talker, and the talker a window ahead of the sound.
    assert TextDelta in kinds[first_sound:]
    assert kinds.count(TextDelta) == 300


def test_windows_agree_and_whole_comes_at_the_end(live: Live) -> None:
    live.script("hello", [*range(30), 52])
    _, stream, _ = split(live.session.reply(HELLO, talker=GREEDY, seed=3))
    texts, whole, done = split(live.session.reply(HELLO, talker=GREEDY, seed=3, window="whole"))
    assert len(stream) == 2
    assert len(whole) == 1
    assert len(texts) == 5
    np.testing.assert_array_equal(np.concatenate([c.samples for c in stream]), whole[0].samples)
    assert done.codec_ids == list(range(30))


# --- what the talker is given -------------------------------------------------------------------------------------


def expected_talker_embeds(live: Live, prompt: Any, token_ids: list[int], codes: list[int]) -> NDArray[np.float32]:
    """Every embedding the talker should have been fed, built as the reference builds whole tensors: rows [n, E].

    ``token_ids``: everything the thinker generated, stop token included; ``codes``: everything the talker picked.
    """
    bundle, manifest = live.bundle, live.bundle.manifest
    text, codec = manifest.text_tokens, manifest.codec
    assert text is not None
    assert codec is not None
    thinker, talker = bundle.embedding("thinker"), bundle.embedding("talker")
    count = len(prompt.token_ids)
    hidden = np.stack(live.decoder("thinker").hidden_rows)
    assert len(hidden) == count + len(token_ids) - 1  # the last generated token is not consumed
    prompt_embeds = thinker.rows(prompt.token_ids)
    prompt_embeds[prompt.media_mask] = 0
    reply = hidden[count:] + thinker.rows(token_ids[:-1])
    chelsie = bundle.find_voice(None).bos_token
    opening = np.concatenate([hidden[:count] + prompt_embeds, thinker.rows([chelsie]), reply[:1]])
    opening[-2] += talker.rows([codec.pad])[0]
    opening[-1] += talker.rows([codec.bos])[0]
    tail = np.concatenate([reply[1:], thinker.rows([text.eos]), np.repeat(thinker.rows([text.pad]), 100, axis=0)])
    return np.concatenate([opening, talker.rows(codes) + tail[: len(codes)]])


def fed(decoder: FakeDecoder, key: str) -> NDArray[Any]:
    return np.concatenate([call[key] for call in decoder.calls], axis=1 if key == "inputs_embeds" else 2)


@pytest.mark.parametrize("stop", [True, False], ids=["stop token", "max_new_tokens"])
@pytest.mark.parametrize("length", [2, 3, 6])
@pytest.mark.parametrize("speech", [1, 4, 12])
def test_talker_conditioning(live: Live, length: int, stop: bool, speech: int) -> None:
    text = "abcdef"[: length - 1] if stop else "abcdef"[:length]
    live.script(text, [*range(speech), 52], stop=stop)
    prompt = live.prompt(HELLO)
    _, _, done = split(live.session.reply(HELLO, thinker=SamplingConfig(max_new_tokens=length), talker=GREEDY))
    assert done.text == text
    generated = done.token_ids + ([live.stop] if stop else [])
    assert len(generated) == length
    found = fed(live.decoder("talker"), "inputs_embeds")[0]
    expected = expected_talker_embeds(live, prompt, generated, done.codec_ids)
    assert done.codec_ids == list(range(speech))
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_talker_positions_continue_the_prompt(live: Live) -> None:
    live.script("abc", [1, 2, 3, 52])
    prompt = live.prompt(HELLO)
    list(live.session.reply(HELLO, talker=GREEDY))
    count = len(prompt.token_ids)
    thinker, talker = (fed(live.decoder(name), "position_ids")[:, 0] for name in ("thinker", "talker"))
    np.testing.assert_array_equal(thinker, np.tile(np.arange(count + 3), (3, 1)))
    np.testing.assert_array_equal(talker, np.tile(np.arange(count + 2 + 3), (3, 1)))


def test_one_token_says_nothing(live: Live) -> None:
    for config, script in ((SamplingConfig(max_new_tokens=1), "a"), (GREEDY, "")):
        live.script(script)
        _, chunks, done = split(live.session.reply(HELLO, thinker=config))
        assert (done.text, done.codec_ids, chunks) == (script, [], [])
        starts = [int(call["write_index"][0]) for call in live.decoder("talker").calls]
        assert set(starts) == {0}, "the talker may read the prompt ahead, no more"


def test_talker_that_stops_at_once(live: Live) -> None:
    live.script("abc", [50])
    texts, chunks, done = split(live.session.reply(HELLO, talker=GREEDY))
    assert (done.text, done.codec_ids, chunks, len(texts)) == ("abc", [], [], 3)


def test_talker_that_ends_before_the_text(live: Live) -> None:
    live.script("a" * 200, [1, 2, 52])  # more than the talker's queue holds
    long = SamplingConfig(max_new_tokens=400)
    texts, chunks, done = split(live.session.reply(HELLO, talker=GREEDY, thinker=long))
    assert (len(texts), len(chunks), done.codec_ids) == (200, 1, [1, 2])
    assert done.text == "a" * 200


def test_talker_limit(live: Live) -> None:
    live.script("abc", [*range(30)])
    _, chunks, done = split(live.session.reply(HELLO, talker=SamplingConfig(max_new_tokens=7)))
    assert done.codec_ids == list(range(7))
    assert sum(len(c.samples) for c in chunks) == 7 * 480


def test_a_reply_that_ignores_stops_goes_on_to_its_limits(live: Live) -> None:
    """Speech never picks a code that ends it, or one that stands for no sound; the bundle stays as it was."""
    live.script("abc", [1, 2, 52, 50, 3])
    before = live.bundle.manifest
    limits = SamplingConfig(max_new_tokens=9), SamplingConfig(max_new_tokens=14)
    texts, _, done = split(live.session.reply(HELLO, thinker=limits[0], talker=limits[1], ignore_stop=True))
    assert (len(done.token_ids), len(texts), done.finish_reason) == (9, 9, "length")
    assert (len(done.codec_ids), done.speech_finish_reason) == (14, "length")
    assert max(done.codec_ids) <= CODES
    assert live.bundle.manifest is before
    _, _, done = split(live.session.reply(HELLO, thinker=limits[0], talker=limits[1]))
    assert (done.text, done.codec_ids, done.finish_reason) == ("abc", [1, 2], "stop")


def test_options_of_a_reply_are_one_set() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(ReplyOptions)}
    for method, more in ((OmniSession.reply, {"messages"}), (OmniSession.turn, set())):
        parameters = inspect.signature(method).parameters
        given = {name: p.default for name, p in parameters.items() if name not in more | {"self"}}
        assert given == {name: fields[name] for name in given}
        assert fields.keys() - given.keys() <= {"exact", "tools"}


def test_repetition_penalty_sees_the_prompt_ids(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, list[int]]] = []
    from omniport.runtime.generation.sampling import Sampler

    pick = Sampler.pick

    def spy(self: Sampler, logits: Any, history: Any) -> int:
        seen.append((len(logits), list(history)))
        return pick(self, logits, history)

    monkeypatch.setattr(Sampler, "pick", spy)
    live.script("ab", [5, 6, 52])
    prompt = live.prompt(HELLO).token_ids.tolist()
    list(live.session.reply(HELLO, talker=GREEDY))
    thinker = [history for size, history in seen if size != 64]
    talker = [history for size, history in seen if size == 64]
    a, b = live.encode("ab")
    assert thinker == [prompt, [*prompt, a], [*prompt, a, b]]
    opening = [53] * len(prompt) + [50, 51]
    assert talker == [opening, [*opening, 5], [*opening, 5, 6]]


def test_seed_streams_are_separate(live: Live) -> None:
    loose = SamplingConfig(max_new_tokens=30, temperature=1.0, top_p=0.95)

    def ids(seed: int, talker: SamplingConfig) -> tuple[list[int], list[int]]:
        _, _, done = split(live.session.reply(HELLO, thinker=loose, talker=talker, seed=seed))
        return done.token_ids, done.codec_ids

    first = ids(1, loose)
    assert first == ids(1, loose)
    assert first[0] == ids(1, GREEDY)[0]
    assert first[0] != ids(2, loose)[0]
    assert len(set(first[0])) > 5
    assert len(set(first[1])) > 5


def test_voices_change_what_is_heard(live: Live) -> None:
    live.script("abc", [1, 2, 52])
    samples = {}
    for voice in (None, "Chelsie", "Ethan"):
        _, chunks, _ = split(live.session.reply(HELLO, voice=voice, talker=GREEDY))
        samples[voice] = chunks[0].samples
    np.testing.assert_array_equal(samples[None], samples["Chelsie"])
    assert np.abs(samples["Ethan"] - samples["Chelsie"]).max() > 1e-3


# --- media and prefill --------------------------------------------------------------------------------------------


def test_media_embeddings_go_to_their_places(live: Live) -> None:
    rng = np.random.default_rng(0)
    sound = (rng.standard_normal(16000 * 5 + 800).astype(np.float32) * 0.1, 16000)
    pictures = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((56, 84), (84, 56))]
    content: list[dict[str, Any]] = [{"type": "image", "image": p} for p in pictures]
    content += [{"type": "audio", "audio": sound}, {"type": "text", "text": "what?"}]
    messages = [{"role": "user", "content": content}]
    live.script("abc", [1, 2, 52])
    _, _, done = split(live.session.reply(messages, talker=GREEDY))
    prompt = live.prompt(messages)
    encoders = {name: live.backend.graphs[f"{name}_encoder"] for name in ("audio", "vision")}
    assert all(isinstance(graph, FakeEncoder) for graph in encoders.values())
    embeds = live.bundle.embedding("thinker").rows(prompt.token_ids)
    assert [len(graph.calls) for graph in encoders.values()] == [1, 2]  # type: ignore[attr-defined]
    for span in prompt.media:
        if span.vision is not None:
            feeds: dict[str, Any] = {name: getattr(span.vision, name) for name in ("patches", "grid_hw")}
            feeds |= {name: getattr(span.vision, name) for name in ("window_index", "window_valid")}
            embeds[span.indices] = encoders["vision"].run(feeds)["embeds"]
        else:
            assert span.chunks is not None
            assert span.frames is not None
            assert span.frames.tolist() == [200, 200, 105]
            rows = encoders["audio"].run({"mel": span.chunks, "frames": span.frames})["embeds"]
            embeds[span.indices] = np.concatenate([rows[0], rows[1], rows[2][:26]])
    found = fed(live.decoder("thinker"), "inputs_embeds")[0]
    np.testing.assert_array_equal(found[: len(embeds)], embeds)
    assert prompt.media_mask.sum() > 100
    # ... and the talker sees hidden states alone there
    talker = fed(live.decoder("talker"), "inputs_embeds")[0]
    generated = [*done.token_ids, live.stop]
    np.testing.assert_allclose(talker, expected_talker_embeds(live, prompt, generated, done.codec_ids), atol=1e-6)
    assert done.stats.busy["audio_encoder"] > 0
    assert done.stats.busy["vision_encoder"] > 0


def test_long_prompts_are_prefilled_in_chunks(live: Live) -> None:
    messages = [{"role": "user", "content": "x" * 1200}]
    live.script("abc", [1, 52])
    _, _, done = split(live.session.reply(messages, talker=GREEDY))
    assert done.text == "abc"
    sizes = [call["inputs_embeds"].shape[1] for call in live.decoder("thinker").calls]
    assert sizes[:2] == [512, 512]
    assert 0 < sizes[2] < 512
    assert sizes[3:] == [1, 1, 1]
    assert sum(sizes[:3]) == done.stats.prompt_tokens
    starts = [int(call["write_index"][0]) for call in live.decoder("talker").calls]
    assert starts == [0, 512, 1024, done.stats.prompt_tokens, done.stats.prompt_tokens + 2]


def test_prompt_too_long(tmp_path: Path) -> None:
    live = Live(make_bundle(tmp_path / "b", max_context=80))
    base = len(live.prompt([{"role": "user", "content": "x"}]).token_ids)

    def ask(size: int, speak: bool) -> Any:
        return live.session.reply([{"role": "user", "content": "x" * (1 + size - base)}], speak=speak)

    for size, speak in ((80, False), (79, True), (80, True)):
        with pytest.raises(PromptTooLong, match=rf"{size} tokens.*holds 80.*--max-context"):
            ask(size, speak)
    with pytest.raises(PromptTooLong, match=r"81 tokens.*holds 80"):
        ask(81, False)
    live.script("abcdef", [1, 2, 3])
    # 79 tokens leave room for one: it is consumed to pick a second, and the reply ends there.
    _, _, done = split(ask(79, False))
    assert done.text == "ab"
    # 78 and two rows fill the talker's cache: one code can still be picked.
    _, chunks, done = split(ask(78, True))
    assert (done.text, done.codec_ids) == ("abc", [1])
    assert sum(len(c.samples) for c in chunks) == 480


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"thinker": {"temperature": 0.5}}, UsageError, "thinker is a dict; a SamplingConfig was expected"),
        ({"talker": {}}, UsageError, "talker is a dict; a SamplingConfig was expected"),
        ({"voice": "Zoe"}, UnknownVoice, "Chelsie, Ethan"),
        ({"window": "half"}, UsageError, "stream, whole"),
        ({"seed": -1}, UsageError, "seed is -1"),
        ({"seed": 1.5}, UsageError, "seed is 1.5"),
        ({"noise": np.zeros((4, 79), np.float32)}, UsageError, r"\[T, 80\]"),
        ({"thinker": SamplingConfig(max_new_tokens=0)}, UsageError, "thinker.max_new_tokens"),
        ({"talker": SamplingConfig(temperature=-1.0)}, UsageError, "talker.temperature"),
        ({"messages": []}, PromptError, "no messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "nowhere.png"}]}]},
            MediaError,
            "nowhere",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "audio", "audio": (np.full(999, np.nan), 16000)}]}]},
            MediaError,
            "(?i)nan|finite",
        ),
    ],
)
def test_bad_input_is_refused_at_once(live: Live, options: dict[str, Any], error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        live.session.reply(**{"messages": HELLO, **options})
    assert live.decoder("thinker").calls == []
    live.script("fine", [1, 52])
    assert split(live.session.reply(HELLO, talker=GREEDY))[2].text == "fine"


def test_a_bundle_without_talker_says_so(tmp_path: Path) -> None:
    live = Live(make_bundle(tmp_path / "b", speak=False))
    with pytest.raises(UsageError, match=r"cannot speak.*speak=False"):
        live.session.reply(HELLO)
    live.script("hi")
    assert split(live.session.reply(HELLO, speak=False))[2].text == "hi"


@pytest.mark.parametrize(("graph", "options"), [("thinker", {"speak": False}), ("dit", {}), ("bigvgan", {})])
def test_a_bundle_with_some_graphs_only(root: Path, graph: str, options: dict[str, Any]) -> None:
    edit(root, lambda m: m["graphs"].pop(graph))
    with pytest.raises(UsageError, match=rf"'{graph}'.*export it again"):
        Live(root).session.reply(HELLO, **options)


def test_media_without_its_encoder(root: Path) -> None:
    edit(root, lambda m: m["graphs"].pop("vision_encoder"))
    content = [{"type": "image", "image": np.zeros((56, 56, 3), np.uint8)}]
    with pytest.raises(UsageError, match="the image needs the graph 'vision_encoder'"):
        Live(root).session.reply([{"role": "user", "content": content}])


# --- the session afterwards ---------------------------------------------------------------------------------------


def test_usable_after_an_error_in_the_middle(live: Live) -> None:
    live.script("hello", [*range(30), 52])
    good = split(live.session.reply(HELLO, talker=GREEDY))
    events = live.session.reply(HELLO, talker=GREEDY, noise=np.zeros((50, 80), np.float32))
    with pytest.raises(UsageError, match="noise has 50 mel frames"):
        list(events)
    again = split(live.session.reply(HELLO, talker=GREEDY))
    assert again[2].token_ids == good[2].token_ids
    np.testing.assert_array_equal(again[1][0].samples, good[1][0].samples)


def test_code_without_sound(live: Live) -> None:
    live.script("hello", [1, 2, CODES + 5])
    config = SamplingConfig(max_new_tokens=9)
    live.decoder("talker")  # suppressed in this bundle, so a manifest that does not suppress it is needed
    edit(live.bundle.root, lambda m: m["codec"].update(suppress=[51]))
    other = Live(live.bundle.root)
    other.script("hello", [1, 2, CODES + 5])
    with pytest.raises(OmniportError, match=f"codec token {CODES + 5}"):
        list(other.session.reply(HELLO, talker=config))


def test_abandoned_replies_give_their_caches_back(live: Live) -> None:
    live.script("hello", [*range(30), 52])
    made: list[int] = []
    for name in ("thinker", "talker"):
        graph = live.decoder(name)
        new = graph.new_cache
        graph.new_cache = lambda capacity, new=new: (made.append(capacity), new(capacity))[1]  # type: ignore[method-assign,misc]
    for count in (0, 1, 3, 6):
        events = live.session.reply(HELLO, talker=GREEDY)
        for _ in range(count):
            next(events)
        del events
        gc.collect()
    assert split(live.session.reply(HELLO, talker=GREEDY))[2].text == "hello"
    assert made == [2048, 2048]


def test_two_replies_at_once_do_not_mix(live: Live) -> None:
    loose = SamplingConfig(max_new_tokens=20, temperature=1.0)
    other = [{"role": "user", "content": "Something else entirely"}]
    alone = [split(live.session.reply(m, thinker=loose, talker=loose)) for m in (HELLO, other)]
    streams = [live.session.reply(m, thinker=loose, talker=loose) for m in (HELLO, other)]
    listed: list[list[Event]] = [[], []]
    for _ in range(200):
        for stream, events in zip(streams, listed, strict=True):
            events.extend([e for e in [next(stream, None)] if e is not None])
    for events, (_, chunks, done) in zip(listed, alone, strict=True):
        _, mixed, last = split(iter(events))
        assert (last.token_ids, last.codec_ids) == (done.token_ids, done.codec_ids)
        assert len(done.token_ids) > 3
        np.testing.assert_array_equal(
            np.concatenate([c.samples for c in mixed]), np.concatenate([c.samples for c in chunks])
        )


def test_closing(live: Live) -> None:
    live.script("hello", [1, 52])
    with live.session as session:
        events = session.reply(HELLO, talker=GREEDY)
        next(events)
    session.close()
    assert live.backend.closed
    with pytest.raises(UsageError, match="session is closed"):
        session.reply(HELLO)
    _, _, done = split(events)
    assert done.finish_reason == done.speech_finish_reason == "cancelled"


def test_unfinished_character_at_the_end(live: Live) -> None:
    half = live.encode("你")[:2]
    for stop in (True, False):
        live.decoder("thinker").script = [*live.encode("a"), *half] + ([live.stop] if stop else [])
        config = SamplingConfig(max_new_tokens=9 if stop else 3)
        texts, _, done = split(live.session.reply(HELLO, thinker=config, speak=False))
        assert done.text == "a\ufffd" == "".join(t.text for t in texts)
        assert done.token_ids == [*live.encode("a"), *half]
