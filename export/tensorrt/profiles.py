"""Optimization profiles: the ranges of shapes that an engine accepts, from a graph's spec.

The vision encoder has a profile for each class of images, the other graphs one. A second one (new_tokens = 1) for the
decoders was measured and rejected: there the builder keeps weights once for each profile (docs/build.md has the
figures).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
from omniport.runtime.bundle.engines import Profile, ShapeRange
from omniport.runtime.bundle.graph_spec import DimRange, GraphSpec
from omniport.runtime.bundle.manifest import DitGeometry, Manifest
from omniport.runtime.errors import UsageError
from omniport.runtime.generation.encoders import AUDIO_CHUNKS, VISION_FRAMES
from omniport.runtime.speech.windows import STREAM_CODES

#: pixels of the largest image of each class; what is larger is one class more
IMAGE_CLASSES = (1 << 18, 1 << 20)
#: embeddings of squares of 28 pixels in each
_CLASS_UNITS = tuple(pixels // 28**2 for pixels in IMAGE_CLASSES)


@dataclass(frozen=True)
class EngineLimits:
    """What a user asks engines for, where that is less than the bundle allows.

    Attributes:
        max_context: capacity of the KV cache in tokens; the bundle's by default.
        max_pixels: of the largest image.
        max_codes: codec tokens of the longest window of speech; what the bundle allows by default.
        image_classes: pixels of the largest image of each class below ``max_pixels``.
    """

    max_context: int | None = None
    max_pixels: int = 3_211_264
    max_codes: int | None = None
    image_classes: Sequence[int] = IMAGE_CLASSES


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """`EngineLimits` in the graphs' units.

    Attributes:
        max_units: embeddings of the largest image; 4,096 are 3.2 megapixels in squares of 28 pixels.
        image_classes: embeddings of the largest image of each class below ``max_units``.
    """

    max_context: int | None = None
    max_units: int = 4096
    max_codes: int | None = None
    image_classes: tuple[int, ...] = _CLASS_UNITS


def limits_of(manifest: Manifest, asked: EngineLimits) -> Limits:
    """The limits asked for, with the images' sizes in embeddings.

    Raises:
        UsageError: not one embedding's worth of pixels, or too few codes to stream.
    """
    if asked.max_codes is not None and asked.max_codes < STREAM_CODES:
        raise UsageError(
            f"--max-codes {asked.max_codes}: at least {STREAM_CODES} was expected, a window of streamed speech"
        )
    square = (manifest.vision.patch_size * manifest.vision.merge_size) ** 2
    classes = (("--image-classes", edge) for edge in asked.image_classes)
    for option, pixels in (("--max-pixels", asked.max_pixels), *classes):
        if pixels < square:
            raise UsageError(f"{option} {pixels}: at least {square} was expected, the pixels of one embedding")
    return Limits(
        max_context=asked.max_context,
        max_units=asked.max_pixels // square,
        max_codes=asked.max_codes,
        image_classes=tuple(sorted({edge // square for edge in asked.image_classes})),
    )


def graph_dims(spec: GraphSpec, limits: Limits) -> dict[str, DimRange]:
    """Range of every symbolic dimension of a graph under the limits.

    Raises:
        UsageError: a limit that the graph cannot take.
    """
    dims = dict(spec.dims)
    if "chunks" in dims:
        dims["chunks"] = _capped(dims["chunks"], AUDIO_CHUNKS)
    if "units" in dims:
        _limit_vision(dims, limits)
    elif limits.max_codes is not None:
        for name, most in (("codes", limits.max_codes), ("frames", DitGeometry().repeats * limits.max_codes)):
            if name in dims:
                dims[name] = _capped(dims[name], most)
    _limit_cache(spec, dims, limits)
    return dims


def _limit_cache(spec: GraphSpec, dims: dict[str, DimRange], limits: Limits) -> None:
    if "capacity" in dims and limits.max_context is not None:
        span = spec.dims["capacity"]
        if not 64 <= limits.max_context <= span.max:
            raise UsageError(
                f"--max-context {limits.max_context}: 64 to {span.max} was expected, which {spec.name} was exported "
                "for. Export with a larger --max-context first"
            )
        dims["capacity"] = DimRange(limits.max_context, limits.max_context, limits.max_context)
    if "live" in dims and "capacity" in dims:
        dims["live"] = _capped(dims["live"], dims["capacity"].max)
    if "past" in dims:  # a cache that grows: what was there and what is new add up at every end of the range
        if limits.max_context is not None:
            dims["past"] = _capped(dims["past"], limits.max_context - 1)
        live = dims["live"]
        dims["live"] = DimRange(live.min, live.opt, dims["past"].max + dims["new_tokens"].max)


def _limit_vision(dims: dict[str, DimRange], limits: Limits) -> None:
    dims["frames"] = _capped(dims["frames"], VISION_FRAMES)
    _cap_units(dims, limits.max_units)


def _cap_units(dims: dict[str, DimRange], most: int) -> None:
    units = dims["units"] = _capped(dims["units"], most)
    # a window covers 4 x 4 units; the longest strip of units fills its windows to a quarter
    dims["windows"] = _capped(dims["windows"], max(1, -(-units.max // 4)))
    if "tokens" in dims:
        dims["tokens"] = _capped(dims["tokens"], units.max * dims["frames"].max)


def fixed_dims(dims: Mapping[str, DimRange]) -> dict[str, int]:
    """Dimensions that have their value before parsing: TensorRT wants a cache of static length."""
    return {"capacity": dims["capacity"].max} if "capacity" in dims else {}


def make_profiles(
    spec: GraphSpec, dims: Mapping[str, DimRange], image_classes: Sequence[int] = ()
) -> tuple[Profile, ...]:
    """The profiles of a graph's engine: the first that takes a shape is the one made for it, and the last takes all.

    Args:
        image_classes: embeddings of the largest image of each class, ascending. Those of ``dims`` or more are left out.
    """
    edges = [units for units in image_classes if units < dims["units"].max] if "units" in dims else []
    if not edges:
        return (_profile("all", spec, dims),)
    least, found = 1, []
    for most in (*edges, dims["units"].max):
        found.append(_profile(f"images of up to {most}", spec, _image_class(dims, least, most)))
        least = most
    return tuple(found)


def _image_class(dims: Mapping[str, DimRange], least: int, most: int) -> dict[str, DimRange]:
    """Dimensions of images of up to ``most`` embeddings, best at those in the middle between there and ``least``."""
    found = dict(dims)
    _cap_units(found, most)
    best = max(found["units"].opt, math.isqrt(least * most))
    side = math.isqrt(best - 1) + 1  # of a square image
    for name, opt in (("units", best), ("windows", (-(-side // 4)) ** 2), ("tokens", best)):
        if name in found:
            span = found[name]
            found[name] = DimRange(span.min, min(max(opt, span.min), span.max), span.max)
    return found


def _profile(name: str, spec: GraphSpec, dims: Mapping[str, DimRange]) -> Profile:
    inputs = {
        tensor.name: ShapeRange(
            min=tensor.sized(dims, "min"), opt=tensor.sized(dims, "opt"), max=tensor.sized(dims, "max")
        )
        for tensor in spec.inputs
        if any(isinstance(dim, str) for dim in tensor.shape)
    }
    return Profile(name=name, dims=dict(dims), inputs=inputs)


def _capped(span: DimRange, most: int) -> DimRange:
    return DimRange(min(span.min, most), min(span.opt, most), min(span.max, most))
