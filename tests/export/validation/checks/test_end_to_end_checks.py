"""validate's conversations: the staged reference is transformers' generate, clean bundles pass, faults are named."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from omniport.export.checkpoint.checkpoint import Checkpoint
from omniport.export.evaluation.conversations import read_conversations, standard_conversations
from omniport.export.validation.checks import end_to_end as checks_module
from omniport.export.validation.checks.end_to_end import end_to_end_checks
from omniport.export.validation.checks.forced import decisions_check, ids_check
from omniport.export.validation.checks.preprocessing import equal_check, position_checks, preprocess_checks
from omniport.export.validation.context import Context
from omniport.export.validation.reference import Reference
from omniport.export.validation.reference_inputs import Processor
from omniport.export.validation.reference_reply import ReplyLimits, StagedReply, staged_replies
from omniport.export.validation.types import FAIL, NOT_RUN, PASS, Check
from omniport.runtime.backends import open_backend
from omniport.runtime.backends.base import Backend
from omniport.runtime.backends.onnxruntime.backend import OrtGraph
from omniport.runtime.bundle.manifest import SolverSpec
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import BackendError, UsageError
from omniport.runtime.generation.entries import Tokens
from omniport.runtime.pipeline import whole_reply
from omniport.runtime.prompt import builder as prompt_module
from omniport.runtime.prompt.builder import Prompt, build_prompt
from omniport.runtime.prompt.tokenizer import TextCodec
from omniport.runtime.speech import token2wav as token2wav_module
from support import oracle
from tokenizers.normalizers import Replace

pytestmark = pytest.mark.timeout(600)

Floats = NDArray[np.float32]
NOISE = np.random.default_rng(7).standard_normal((48, 80)).astype(np.float32)
NAMES = ("text", "mixed")


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def context(bundle: Bundle, tiny_checkpoint: Path) -> Iterator[Context]:
    checkpoint, backend = Checkpoint.open(tiny_checkpoint), open_backend("ort-cpu", bundle)
    graphs = bundle.manifest.graphs
    precision = {name: spec.precision for name, spec in graphs.items()}
    yield Context(
        bundle, checkpoint, backend, Reference(checkpoint), "quick", tuple(graphs), precision, lambda _line: None
    )
    backend.close()


def failed(checks: list[Check]) -> set[str]:
    """Stages of the failed checks, but for end_to_end, which fails with any of them."""
    return {check.stage for check in checks if check.status == FAIL} - {"end_to_end"}


def messages(checks: list[Check]) -> list[str]:
    return [f"{check.stage}, {check.name}: {check.message}" for check in checks if check.status != PASS]


# --- the staged reference ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def staged(context: Context, tmp_path_factory: pytest.TempPathFactory) -> dict[str, StagedReply]:
    processor = Processor(context.checkpoint)
    conversations = standard_conversations(tmp_path_factory.mktemp("media"), NAMES)
    inputs = [processor.inputs(conversation) for conversation in conversations]
    limits = ReplyLimits(8, 24, context.bundle.manifest.chat.stop, voice="Ethan")
    loaded: list[str] = []
    replies = staged_replies(context.reference, inputs, limits, NOISE, loaded.append)
    assert len(loaded) == 6  # each part once, for both conversations
    return dict(zip(NAMES, replies, strict=True))


@pytest.fixture(scope="module")
def whole(tiny_checkpoint: Path) -> oracle.Reference:
    return oracle.Reference(tiny_checkpoint)


@pytest.mark.parametrize("name", NAMES)
def test_staged_is_generate(whole: oracle.Reference, staged: dict[str, StagedReply], bundle: Bundle, name: str) -> None:
    got, manifest = staged[name], bundle.manifest
    assert manifest.codec is not None
    given = oracle.Inputs(
        got.inputs.text,
        got.inputs.token_ids,
        got.inputs.positions,
        got.inputs.next_position,
        dict(got.inputs.features),
        got.inputs.heard,
    )
    want = whole.generate(
        given,
        NOISE,
        text_tokens=8,
        codec_tokens=24,
        stop=manifest.chat.stop,
        codec_stop=manifest.codec.stop,
        voice="Ethan",
    )
    assert got.token_ids == want.token_ids
    assert got.codec_ids == want.codec_ids
    assert len(set(want.codec_ids)) >= 6
    assert got.thinker is not None
    assert got.talker is not None
    assert got.solve is not None
    assert got.waveform is not None
    np.testing.assert_array_equal(got.thinker.positions, want.thinker.positions)
    np.testing.assert_array_equal(got.talker.positions, want.talker.positions)
    for ours, theirs in (
        (got.thinker.embeds, want.thinker.embeds),
        (got.thinker.hidden, want.thinker.hidden),
        (got.talker.embeds, want.talker.embeds),
        (got.solve.mel, want.mel),
        (got.waveform, want.waveform),
    ):
        assert theirs.std() > 0.01
        assert oracle.relative_rms(ours, theirs) < 1e-5


def test_inputs_are_the_whole_models(whole: oracle.Reference, staged: dict[str, StagedReply], tmp_path: Path) -> None:
    """The processors' pieces, and get_rope_index without a model, against the oracle's own reading of the messages."""
    for conversation in standard_conversations(tmp_path, NAMES):
        turns = conversation.decoded()
        for message in turns:
            for part in message["content"]:
                if part["type"] == "video":
                    part["video"] = (part["video"].frames, part["video"].sound)
        want, got = whole.inputs(turns, conversation.heard), staged[conversation.name].inputs
        np.testing.assert_array_equal(got.token_ids, want.token_ids)
        np.testing.assert_array_equal(got.positions, want.positions)
        assert got.next_position == want.next_position
        assert got.features.keys() == want.features.keys()
        assert all((got.features[key] == want.features[key]).all() for key in want.features)


# --- a clean bundle ------------------------------------------------------------------------------------------------


def test_a_clean_bundle_passes(context: Context) -> None:
    checks = [*preprocess_checks(context), *position_checks(context), *end_to_end_checks(context)]
    assert not messages(checks)
    names = [(check.stage, check.name) for check in checks]
    assert len(set(names)) == len(names)
    stages = {check.stage for check in checks}
    graphs = set(context.bundle.manifest.graphs)
    assert stages == graphs | {"preprocess", "positions", "conditioning", "solver", "end_to_end"}
    for check in checks:
        assert check.limits.keys() == check.reasons.keys() <= check.figures.keys()
        assert check.figures
    wave = next(check for check in checks if check.name == "text: waveform")
    assert context.artifacts[wave.artifacts["reference"]].std() > 0.01
    assert wave.figures["codes"] == "its own, which are equal"


def test_the_users_conversations_are_added(context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks_module, "_QUICK", ())
    monkeypatch.setattr(checks_module, "_LENGTHS", {"quick": (4, 8)})
    clip = standard_conversations(tmp_path, ["video with sound"])[0].media[0]
    lines = [
        [{"role": "user", "content": "One word, please."}],
        [{"role": "user", "content": [{"type": "video", "video": Path(clip.source).name, "use_audio": True}]}],
        [
            {
                "role": "user",
                "content": [{"type": "video", "video": clip.source.name, "use_audio": use} for use in (True, False)],
            }
        ],
    ]
    data = tmp_path / "own.jsonl"
    data.write_text("\n\n".join(json.dumps({"messages": turns}) for turns in lines) + "\n")
    checks = list(end_to_end_checks(context, data))
    (skipped,) = (check for check in checks if check.status != PASS)
    assert (skipped.name, skipped.status) == ("own.jsonl:5", NOT_RUN)
    assert "one use_audio_in_video switch" in skipped.message
    names = {check.name for check in checks}
    assert {"own.jsonl:1: token ids", "own.jsonl:3: prompt", "own.jsonl:3: waveform"} <= names


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting property name"),
        ("[]", 'the key "messages"'),
        ('{"messages": [], "seed": 1}', "seed"),
        ('{"messages": [{"role": "robot", "content": "Hello"}]}', "robot"),
        ('{"messages": [{"role": "user", "content": [{"type": "audio", "audio": "no.wav"}]}]}', "does not exist"),
    ],
)
def test_bad_data_names_the_line(bundle: Bundle, tmp_path: Path, line: str, message: str) -> None:
    codec = TextCodec.from_file(bundle.path(bundle.manifest.tokenizer_file), bundle.manifest.tokens)
    data = tmp_path / "own.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "Hello"}]}\n\n' + line)
    with pytest.raises(UsageError, match=message) as caught:
        read_conversations(data, bundle.manifest, codec)
    assert f"{data}:3: " in str(caught.value)


def test_data_without_a_conversation_or_a_file(bundle: Bundle, tmp_path: Path) -> None:
    codec = TextCodec.from_file(bundle.path(bundle.manifest.tokenizer_file), bundle.manifest.tokens)
    with pytest.raises(UsageError, match="cannot read"):
        read_conversations(tmp_path / "none.jsonl", bundle.manifest, codec)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UsageError, match="holds no conversation"):
        read_conversations(tmp_path / "empty.jsonl", bundle.manifest, codec)


def test_a_backend_that_cannot_run_is_not_run(context: Context) -> None:
    class Absent(Backend):
        name = "absent"

        def graph(self, name: str) -> Any:
            raise BackendError("no such device here")

        def close(self) -> None: ...

    checks = list(end_to_end_checks(replace(context, backend=Absent())))
    (last,) = (check for check in checks if check.status != PASS)
    assert (last.stage, last.status) == ("end_to_end", NOT_RUN)
    assert "no such device here" in last.message


def test_a_prompt_without_room_is_not_run(context: Context) -> None:
    manifest = context.bundle.manifest
    kv = msgspec.structs.replace(manifest.kv, max_context=140)
    small = Bundle.open(context.bundle.root)
    small.manifest = msgspec.structs.replace(manifest, kv=kv)
    tight = replace(context, bundle=small)
    checks = [*position_checks(tight), *end_to_end_checks(tight)]
    assert {check.status for check in checks if check.name.startswith("text: prompt")} == {PASS}
    assert {check.status for check in checks if check.name in ("video: prompt", "audio and image")} == {NOT_RUN}
    assert not any(check.status == FAIL for check in checks), messages(checks)


# --- planted faults ------------------------------------------------------------------------------------------------


@pytest.fixture
def check_all(context: Context, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Check]]:
    """One short conversation, of which the reference's part is computed for the first fault only."""
    monkeypatch.setattr(checks_module, "_QUICK", ("audio and image",))
    monkeypatch.setattr(checks_module, "_LENGTHS", {"quick": (4, 8)})
    return lambda: list(end_to_end_checks(context))


def shifted(*arguments: Any, **options: Any) -> Prompt:
    """Height and width of pictures change places."""
    prompt = build_prompt(*arguments, **options)
    return replace(prompt, tokens=replace(prompt.tokens, positions=prompt.position_ids[[0, 2, 1]]))


def one_late(*arguments: Any, **options: Any) -> Prompt:
    """The reply starts one position too late."""
    prompt = build_prompt(*arguments, **options)
    return replace(prompt, tokens=replace(prompt.tokens, advance=prompt.next_position + 1))


@pytest.mark.parametrize("fault", [shifted, one_late])
def test_wrong_positions(
    context: Context,
    check_all: Callable[[], list[Check]],
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[..., Prompt],
) -> None:
    monkeypatch.setattr(whole_reply, "build_prompt", fault)
    checks = check_all()
    assert failed(checks) == {"positions"}, messages(checks)
    wrong = {check.name for check in position_checks(context) if check.status == FAIL}
    assert wrong >= {"image: prompt", "mixed: prompt"}


def test_media_not_zeroed(check_all: Callable[[], list[Check]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokens, "media_mask", property(lambda self: np.zeros(len(self), np.bool_)))
    checks = check_all()
    assert failed(checks) == {"conditioning"}, messages(checks)
    (check,) = (check for check in checks if check.stage == "conditioning" and check.status == FAIL)
    assert check.name == "audio and image: rows into the talker"
    assert "of media, 0 of" in check.message


def test_wrong_runge_kutta(check_all: Callable[[], list[Check]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of the classic rule, 1/6 and 1/3, with the 3/8 rule's stages."""

    def wrong(spec: SolverSpec, velocity: Any, initial: Floats) -> Floats:
        state, grid = initial, np.asarray(spec.grid, np.float32)
        for i, (t1, t2, t3, t4) in enumerate(spec.stages):
            step = grid[i + 1] - grid[i]
            k1 = velocity(t1, state)
            k2 = velocity(t2, state + step * k1 / np.float32(3))
            k3 = velocity(t3, state + step * (k2 - k1 / np.float32(3)))
            k4 = velocity(t4, state + step * (k1 - k2 + k3))
            state = state + step * (k1 + 2 * k2 + 2 * k3 + k4) / np.float32(6)
        return state

    monkeypatch.setattr(token2wav_module, "solve", wrong)
    checks = check_all()
    assert failed(checks) == {"solver"}, messages(checks)
    assert any(check.name == "a known flow" and check.status == FAIL for check in checks)


def test_guidance_with_the_wrong_sign(check_all: Callable[[], list[Check]], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the DiT's graph gives, bent away from the guided velocity: the graph is at fault, not the solver."""
    run = OrtGraph.run

    def wrong(graph: OrtGraph, *call: Any) -> Any:
        outputs = run(graph, *call)
        if graph.spec.name == "dit":  # p + (p - n)/2 became p - (p - n)/2, for an n of 0
            outputs["velocity"] = outputs["velocity"] / 3
        return outputs

    monkeypatch.setattr(OrtGraph, "run", wrong)
    checks = check_all()
    assert failed(checks) == {"dit"}, messages(checks)


@pytest.mark.parametrize("name", ["audio_encoder", "vision_encoder", "thinker", "talker", "bigvgan"])
def test_a_wrong_graph_is_named(
    check_all: Callable[[], list[Check]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run = OrtGraph.run

    def wrong(graph: OrtGraph, *call: Any) -> Any:
        outputs = run(graph, *call)
        if graph.spec.name == name:
            outputs = {key: np.ascontiguousarray(value[..., ::-1]) for key, value in outputs.items()}
        return outputs

    monkeypatch.setattr(OrtGraph, "run", wrong)
    checks = check_all()
    assert failed(checks) == {name}, messages(checks)


def test_wrong_pixels_and_mel(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    from omniport.export.validation.checks import preprocessing as module
    from omniport.runtime.media import image as vision

    build, mel = vision._build, module.log_mel

    def darker(*arguments: Any) -> Any:
        made = build(*arguments)
        return replace(made, patches=made.patches * np.float32(0.999), window_index=made.window_index[::-1])

    monkeypatch.setattr(vision, "_build", darker)
    monkeypatch.setattr(module, "log_mel", lambda *arguments: mel(*arguments) * np.float32(1.001))
    wrong = {check.name.split(",")[0] for check in preprocess_checks(context) if check.status == FAIL}
    assert wrong == {"log-mel", "pixels", "windows"}


def test_wrong_token_ids(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = TextCodec.encode
    monkeypatch.setattr(prompt_module.TextCodec, "encode", lambda self, text: encode(self, text.lower()))
    checks = list(preprocess_checks(context))
    assert {check.name for check in checks if check.status == FAIL} >= {"text: token ids", "turns: token ids"}


def test_a_tokenizer_that_reads_otherwise(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen in no conversation: capital letters with a dot, and an added token that is left out."""
    loaded = TextCodec.from_file

    def other(*arguments: Any) -> TextCodec:
        codec = loaded(*arguments)
        codec._tokenizer.normalizer = Replace("\u0130", "I")
        codec._special |= {codec._tokenizer.token_to_id("<|fim_pad|>")}
        return codec

    monkeypatch.setattr(TextCodec, "from_file", other)
    wrong = {check.name for check in preprocess_checks(context) if check.status == FAIL}
    assert wrong == {"a wide text: token ids", "a wide text: read back", "added tokens: read back"}


# --- judging -------------------------------------------------------------------------------------------------------


def test_equal_check_needs_a_reference_that_varies() -> None:
    constant = np.zeros(4, np.int64)
    assert "constant" in equal_check("positions", "x", constant, constant).message
    ramp = np.arange(4)
    assert equal_check("positions", "x", ramp, ramp).status == PASS
    assert (
        "the first at [2]: 0, the reference has 2" in equal_check("positions", "x", ramp * [1, 1, 0, 1], ramp).message
    )
    assert "shape (3,)" in equal_check("positions", "x", ramp[:3], ramp).message


@pytest.mark.parametrize(
    ("got", "precision", "status"),
    [
        ([3, 1, 2], "float32", PASS),
        ([3, 0, 2], "float32", FAIL),  # a near tie
        ([3, 0, 2], "float16", PASS),
        ([3, 2, 2], "float16", FAIL),  # not a tie
        ([3], "float16", FAIL),  # ends where the reference goes on
        ([3, 1, 2, 2], "float16", FAIL),  # goes on where the reference ends
    ],
)
def test_ids_may_part_only_where_the_reference_is_undecided(got: list[int], precision: str, status: str) -> None:
    scores = np.asarray([[0, 0, 0, 9, -5], [7.0, 7.01, 0, 0, -5], [0, 0, 9, 0, -5], [0, 0, 0, 0, 9]], np.float32)
    check = ids_check("x", got, [3, 1, 2], scores, (4,), precision)
    assert check.status == status, check.message
    assert bool(check.message) == (status == FAIL)
    if got == [3, 0, 2]:
        assert check.figures["first_difference"] == 1
        assert check.figures["choice_gap"] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("never_said", [0, 100_000])
def test_how_undecided_the_reference_is_depends_on_no_token_that_is_never_said(never_said: int) -> None:
    """100,000 flat logits beside five make their deviation small: 7 nats seemed undecided, and 1 decided."""
    scores = np.zeros((2, 5 + never_said), np.float32)
    scores[:, :5] = [[0, 9.0, 8.0, 2.0, -5], [0, 0, 0, 0, 12]]
    for got, status in ((2, PASS), (3, FAIL)):
        assert ids_check("x", [got], [1], scores, (4,), "int4").status == status


def test_replies_that_prove_nothing() -> None:
    scores = np.asarray([[0, 9.0]], np.float32)
    check = ids_check("x", [], [], scores, (1,), "float32")
    assert (check.status, check.message) == (NOT_RUN, "the reference's reply is empty: there is nothing to compare")
    assert ids_check("x", [0], [], scores, (1,), "float32").status == FAIL
    silent = ids_check("x", [0], [0], np.zeros((2, 2), np.float32), (1,), "float32")
    assert silent.status == FAIL
    assert "silent" in silent.message
    assert decisions_check("x", {"token": ([], []), "codec": ([], [])}).status == NOT_RUN
    assert decisions_check("x", {"token": ([3], [3]), "codec": ([], [])}).status == PASS
    assert decisions_check("x", {"token": ([3], [3]), "codec": ([4], [])}).status == FAIL
