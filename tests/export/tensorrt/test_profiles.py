"""Optimization profiles: which shapes an engine takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from omniport.cli.main import app
from omniport.export.tensorrt.profiles import EngineLimits, Limits, graph_dims, limits_of, make_profiles
from omniport.runtime.bundle.graph_spec import DimRange, GraphSpec
from omniport.runtime.errors import UsageError
from support.bundles import make_manifest
from support.onnx_graphs import plain_model, put_graphs, spec, tensor
from typer.testing import CliRunner


def vision_spec() -> GraphSpec:
    inputs = (tensor("patches", "frames", "4*units", 1176), tensor("valid", "windows", 64))
    dims = {
        "frames": DimRange(1, 1, 384),
        "units": DimRange(1, 256, 16384),
        "windows": DimRange(1, 16, 1200),
        "tokens": DimRange(1, 256, 32768),
    }
    return spec("vision_encoder", inputs, (tensor("embeds", "tokens", 64),), dims)


def test_profiles_of_the_vision_encoder() -> None:
    (profile,) = make_profiles(vision_spec(), graph_dims(vision_spec(), Limits(max_units=1024)))
    assert profile.dims["units"] == DimRange(1, 256, 1024)
    assert profile.dims["windows"] == DimRange(1, 16, 256)  # a strip of one row fills a window to a quarter
    assert profile.dims["frames"].max == 8
    assert profile.inputs["patches"].min == (1, 4, 1176)
    assert profile.inputs["patches"].opt == (1, 1024, 1176)
    assert profile.inputs["patches"].max == (8, 4096, 1176)
    small = graph_dims(vision_spec(), Limits(max_units=16))
    assert small["units"] == DimRange(1, 16, 16)
    assert small["tokens"].max == 128


def test_profiles_of_audio_and_speech() -> None:
    audio = spec("audio_encoder", (tensor("mel", "chunks", 128, 200),), (), {"chunks": DimRange(1, 1, 150)})
    assert graph_dims(audio, Limits())["chunks"] == DimRange(1, 1, 32)
    dit = spec("dit", (tensor("codes", "batch", "codes"),), (), {"codes": DimRange(1, 60, 4096)})
    vocoder = spec("bigvgan", (tensor("mel", "batch", 80, "frames"),), (), {"frames": DimRange(2, 116, 8192)})
    assert graph_dims(dit, Limits()) == dit.dims
    assert graph_dims(vocoder, Limits()) == vocoder.dims
    assert graph_dims(dit, Limits(max_codes=84))["codes"] == DimRange(1, 60, 84)
    assert graph_dims(vocoder, Limits(max_codes=84))["frames"] == DimRange(2, 116, 168)


def test_a_streamed_window_fits_what_max_codes_asks_for_at_least() -> None:
    from omniport.export.tensorrt.profiles import STREAM_CODES
    from omniport.runtime.bundle.manifest import DitGeometry, VocoderGeometry

    dit, vocoder = DitGeometry(), VocoderGeometry()
    block = dit.block_size // dit.repeats
    assert 48 + (dit.look_back_blocks + dit.look_ahead_blocks) * block == STREAM_CODES
    assert 48 * dit.repeats + 2 * vocoder.context_frames <= STREAM_CODES * dit.repeats


def test_profiles_of_a_cache_that_grows_add_up() -> None:
    inputs = (tensor("x", "batch", "new_tokens", 8), tensor("past_key_0", "batch", 2, "past", 8))
    dims = {
        "batch": DimRange(1, 1, 1),
        "new_tokens": DimRange(1, 1, 512),
        "live": DimRange(1, 1024, 8192),
        "past": DimRange(0, 1023, 8191),
    }
    made = graph_dims(spec("thinker", inputs, (), dims), Limits())
    assert made["live"].max == made["past"].max + made["new_tokens"].max
    assert make_profiles(spec("thinker", inputs, (), dims), made)[0].inputs["past_key_0"].min == (1, 2, 0, 8)
    capped = graph_dims(spec("thinker", inputs, (), dims), Limits(max_context=1000))
    assert capped["past"] == DimRange(0, 999, 999)


def test_every_class_of_images_has_a_profile() -> None:
    limits = Limits()
    dims = graph_dims(vision_spec(), limits)
    made = make_profiles(vision_spec(), dims, limits.image_classes)
    assert [profile.dims["units"] for profile in made] == [
        DimRange(1, 256, 334),  # 0.25 megapixels; best at those the graph names
        DimRange(1, 668, 1337),  # 1 megapixel
        DimRange(1, 2340, 4096),  # 3.2 megapixels
    ]
    assert [profile.dims["windows"] for profile in made] == [
        DimRange(1, 16, 84),
        DimRange(1, 49, 335),
        DimRange(1, 169, 1024),
    ]
    for profile in made:
        assert profile.inputs["patches"].max == (8, 4 * profile.dims["units"].max, 1176)
        assert profile.dims["tokens"].max == 8 * profile.dims["units"].max
        assert profile.dims["frames"] == DimRange(1, 1, 8)
    assert len({profile.name for profile in made}) == 3
    assert dict(made[-1].dims) | {name: made[-1].dims[name] for name in dims} == made[-1].dims
    assert {name: (span.min, span.max) for name, span in made[-1].dims.items()} == {
        name: (span.min, span.max) for name, span in dims.items()
    }, "the last class takes everything"


@pytest.mark.parametrize(
    ("limits", "most"),
    [
        (Limits(max_units=1337), [334, 1337]),
        (Limits(max_units=334), [334]),
        (Limits(max_units=100), [100]),
        (Limits(image_classes=()), [4096]),
        (Limits(image_classes=(1, 2, 5000)), [1, 2, 4096]),
    ],
)
def test_classes_below_the_largest_image(limits: Limits, most: list[int]) -> None:
    dims = graph_dims(vision_spec(), limits)
    made = make_profiles(vision_spec(), dims, limits.image_classes)
    assert [profile.dims["units"].max for profile in made] == most
    for profile in made:
        for shapes in profile.inputs.values():
            assert all(a <= b <= c for a, b, c in zip(shapes.min, shapes.opt, shapes.max, strict=True))


def test_classes_are_those_of_images_alone() -> None:
    dims = {"batch": DimRange(1, 1, 1), "codes": DimRange(1, 60, 4096)}
    dit = spec("dit", (tensor("codes", "batch", "codes"),), (), dims)
    assert [profile.name for profile in make_profiles(dit, dit.dims, (334, 1337))] == ["all"]


def test_classes_in_pixels() -> None:
    manifest = make_manifest()
    square = (manifest.vision.patch_size * manifest.vision.merge_size) ** 2
    assert limits_of(manifest, EngineLimits()) == Limits(), "what the command builds is what the library builds"
    made = limits_of(
        manifest, EngineLimits(max_pixels=10 * square, image_classes=(4 * square + 1, 2 * square, 2 * square))
    )
    assert made.image_classes == (2, 4)
    with pytest.raises(UsageError, match=rf"--image-classes {square - 1}: at least {square}"):
        limits_of(manifest, EngineLimits(max_pixels=10 * square, image_classes=(2 * square, square - 1)))


def test_classes_on_the_command_line(tmp_path: Path) -> None:
    root = put_graphs(tmp_path / "bundle", plain_model("dit"))
    for text in ("many", "1e6", "-5", "262144;1048576"):
        line = ["build", str(root), "--target", "rtx-4090", f"--image-classes={text}"]
        result = CliRunner().invoke(app, line)
        assert isinstance(result.exception, UsageError), text
        assert "numbers of pixels" in str(result.exception)
    assert not (root / "engines").exists()
