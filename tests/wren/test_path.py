"""The way in training is the way in use: transformers' whole `generate`, fed by its own processor, row for row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.oracle import SYSTEM, Inputs, Reference, Reply, relative_rms

torch = pytest.importorskip("torch")

from wren import assemble, frame, media, restore, sizes, talker, thinker  # noqa: E402
from wren.prompts import Laid, Prompts, Turn  # noqa: E402
from wren.world import Clip, Picture  # noqa: E402

TOKENS, CODES = 6, 7
TOLERANCE = 2e-5


@dataclass
class Model:
    """The same random weights as a checkpoint that transformers loads, and as the parts in training."""

    checkpoint: Path
    reference: Reference
    prompts: Prompts
    thinker: Any
    speaker: talker.Speaker


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    work = tmp_path_factory.mktemp("wren")
    checkpoint = work / "checkpoint"
    think, speaker = thinker.build(work), talker.Speaker(work).eval()
    with torch.no_grad():  # never the likeliest: random weights answer with words alone, and with all their codes
        think.lm_head.weight[sizes.REGULAR_TOKENS :] *= 0.1
        speaker.talker.codec_head.weight[[talker.END, talker.OTHER]] *= 0.1
    # as stored: in BF16
    for part in (think, speaker):
        part.load_state_dict({name: value.bfloat16().float() for name, value in part.state_dict().items()})
    untrained = {k.removeprefix("token2wav."): v for k, v in whole(work).items() if k.startswith("token2wav.")}
    voices = {name: {"cond": torch.randn(1, 192), "ref_mel": torch.randn(1, 30, 80)} for name in sizes.REPLY_VOICES}
    assemble.write(checkpoint, think.state_dict(), speaker, untrained, voices)
    return Model(checkpoint, Reference(checkpoint), Prompts(work), think.eval(), speaker)


def whole(work: Path) -> dict[str, Any]:
    from transformers import AutoConfig, Qwen2_5OmniForConditionalGeneration

    config = AutoConfig.from_pretrained(frame.folder(work))
    return dict(Qwen2_5OmniForConditionalGeneration(config).state_dict())


def sound(seconds: float) -> Any:
    return np.random.default_rng(3).normal(0, 0.05, round(seconds * 16000)).astype(np.float32)


def conversations() -> dict[str, list[Turn]]:
    draw = np.random.default_rng(5)
    pixels, _ = media.picture(Picture((("red", "star"), ("blue", "heart"))), draw)
    frames, _ = media.clip(Clip("red", "star", "moves up", "apple"), draw, np.linspace(0, 1.9, 4))
    return {
        "typed": [Turn("Hello!", "Hello! How can I help you?"), Turn("What is two plus two?", "")],
        "spoken": [Turn("", "", sound=sound(1.27))],
        "picture": [
            Turn("What do you see?", "A red star and a blue heart.", picture=pixels),
            Turn("Say that again.", ""),
        ],
        "picture_spoken": [Turn("", "", picture=pixels, sound=sound(0.9))],
        "video": [Turn("What happens?", "", clip=(frames, sound(2.0)))],
        # the picture reaches further than the text behind it
        "short sound": [Turn("What happens?", "", clip=(frames, sound(0.3)))],
    }


def messages(turns: list[Turn]) -> list[dict[str, Any]]:
    """As a user of transformers gives them."""
    found: list[dict[str, Any]] = [{"role": "system", "content": [{"type": "text", "text": SYSTEM}]}]
    for turn in turns:
        parts = [("image", turn.picture), ("video", turn.clip), ("audio", turn.sound), ("text", turn.text or None)]
        content = [{"type": kind, kind: value} for kind, value in parts if value is not None]
        found.append({"role": "user", "content": content})
        if turn.answer:
            found.append({"role": "assistant", "content": turn.answer})
    return found


def inputs(model: Model, kind: str) -> Inputs:
    turns = conversations()[kind]
    return model.reference.inputs(messages(turns), use_audio_in_video=turns[-1].clip is not None)


def generate(model: Model, given: Inputs, voice: str) -> Reply:
    return model.reference.generate(
        given,
        np.zeros((2 * CODES, 80), np.float32),
        text_tokens=TOKENS,
        codec_tokens=CODES,
        stop=[-1],
        codec_stop=[sizes.CODEC_PAD, sizes.CODEC_END],
        voice=voice,
        padding=1,
    )


@pytest.fixture(scope="module")
def replies(model: Model) -> dict[str, tuple[Inputs, Reply]]:
    """Of each conversation: what transformers says. Its last token is never consumed, as an end would not be."""
    found = {}
    for number, kind in enumerate(conversations()):
        given = inputs(model, kind)
        found[kind] = given, generate(model, given, list(sizes.REPLY_VOICES)[number % 2])
    return found


KINDS = list(conversations())


def answered(model: Model, kind: str, given: Inputs, reply: Reply) -> Laid:
    """The conversation in training, with what transformers said as the answer that is learned."""
    laid = model.prompts.lay(conversations()[kind])
    n, count = len(given.token_ids), len(reply.token_ids)
    # what lay() appends for an answer has the positions behind the prompt: see the test of them
    positions = np.broadcast_to(given.next_position + np.arange(count), (3, count))
    ids = np.concatenate([laid.ids[:n], reply.token_ids])
    positions = np.concatenate([laid.positions[:, :n], positions], 1)
    return replace(laid, ids=ids, positions=positions, answers=[slice(n, n + count)])


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_those_of_transformers(model: Model, kind: str) -> None:
    given, turns = inputs(model, kind), conversations()[kind]
    laid = model.prompts.lay(turns)
    np.testing.assert_array_equal(laid.ids, given.token_ids)
    np.testing.assert_array_equal(laid.positions, given.positions)
    batch, _ = model.prompts.batch([laid])
    for name, value in given.features.items():
        if name in ("feature_attention_mask", "video_second_per_grid"):
            continue
        got, want = batch[name].numpy(), value.numpy()
        if name == "input_features":  # transformers' are 30 s long
            want = want[..., : got.shape[-1]]
            assert given.features["feature_attention_mask"].sum() == batch["feature_attention_mask"].sum()
        np.testing.assert_allclose(got, want, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_stand_where_generation_puts_them(model: Model, kind: str) -> None:
    given, turns = inputs(model, kind), conversations()[kind]
    laid = model.prompts.lay([*turns[:-1], replace(turns[-1], answer="A red star.")])
    (span,) = laid.answers[-1:]
    assert span.start == len(given.token_ids)
    count = span.stop - span.start
    assert model.prompts.codec.decode(laid.ids[span][:-1].tolist()) == "A red star."
    assert laid.ids[span][-1] == model.prompts.manifest.tokens.im_end
    want = np.broadcast_to(given.next_position + np.arange(count), (3, count))
    np.testing.assert_array_equal(laid.positions[:, span], want)


@pytest.mark.parametrize("kind", KINDS)
def test_the_thinker_is_fed_in_training_as_in_use(
    model: Model, replies: dict[str, tuple[Inputs, Reply]], kind: str
) -> None:
    given, reply = replies[kind]
    laid = answered(model, kind, given, reply)
    span = laid.answers[-1]
    # beside a longer row, so that it is padded as in a batch
    other = model.prompts.lay([Turn("Repeat after me: " + "apple " * 300, "Apple.")])
    batch, _ = model.prompts.batch([laid, other])
    with torch.no_grad():
        logits = model.thinker(**batch).logits[0, span.start - 1 : span.stop - 1].numpy()
    assert logits.argmax(-1).tolist() == reply.token_ids
    want = np.stack([reply.thinker.logits[i] for i in sorted(reply.thinker.logits)])
    assert relative_rms(logits, want) < TOLERANCE


def rows_of(model: Model, kind: str, given: Inputs, reply: Reply) -> tuple[Any, Any, Any]:
    """Rows, positions and logits of the talker in training, for what transformers said."""
    voice = list(sizes.REPLY_VOICES)[KINDS.index(kind) % 2]
    (heard,) = talker.listen(model.thinker, model.prompts, [answered(model, kind, given, reply)])
    fed = torch.tensor([talker.START, *reply.codec_ids[:-1]])
    with torch.no_grad():
        rows, positions = model.speaker.inputs(heard, voice, fed)
        logits = model.speaker.logits(model.speaker.hidden([(rows, positions)])[0, -len(fed) :])
    return rows.numpy(), positions.numpy(), logits.numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_the_talker_is_fed_in_training_as_in_use(
    model: Model, replies: dict[str, tuple[Inputs, Reply]], kind: str
) -> None:
    given, reply = replies[kind]
    assert len(reply.codec_ids) == CODES
    assert len(reply.token_ids) < CODES  # so that text end and text pad are fed, too
    rows, positions, logits = rows_of(model, kind, given, reply)
    # the first row is the padding's
    assert relative_rms(rows, reply.talker.embeds[1:]) < TOLERANCE
    np.testing.assert_array_equal(positions, reply.talker.positions[:, 1:])
    want = np.stack([reply.talker.logits[i] for i in sorted(reply.talker.logits)])
    codes = slice(sizes.FIRST_CODE, sizes.FIRST_CODE + sizes.CODES)
    assert relative_rms(logits[:, :-2], want[:, codes]) < TOLERANCE
    assert relative_rms(logits[:, -2], want[:, sizes.CODEC_END]) < TOLERANCE
    # one row of training stands for all that are never said
    never = np.delete(want, [*range(codes.start, codes.stop), sizes.CODEC_END], axis=1)
    assert relative_rms(logits[:, -1], np.log(np.exp(never).sum(1))) < TOLERANCE
    assert np.array_equal(want[:, codes].argmax(1), logits[:, :-2].argmax(1))


def test_parts_come_back_from_a_checkpoint(model: Model, tmp_path: Path) -> None:
    weights = restore.stored(model.checkpoint, tmp_path)
    assert weights.keys() == whole(tmp_path).keys()
    found, table = restore.part(weights, "thinker."), "model.language_model.embed_tokens.weight"
    for name, value in model.thinker.state_dict().items():
        kept = slice(sizes.REGULAR_TOKENS) if name == table else slice(None)  # the talker's rows lie behind
        assert torch.equal(found[name][kept], value[kept]), name
    assert restore.part(weights, "token2wav.code2wav_dit_model.").keys() == dict(dit_state()).keys()


def dit_state() -> Any:
    from wren import dit

    return dit.build(torch.zeros(sizes.MELS)).state_dict()
