"""Storage of integer weights in graphs: names of their tensors, and INT4 packed two per byte."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def integers_name(weight: str) -> str:
    """Initializer that holds a weight's integers."""
    return f"{weight}.integers"


def scales_name(weight: str) -> str:
    """Initializer that holds a weight's scales."""
    return f"{weight}.scales"


def zero_points_name(weight: str) -> str:
    """Initializer that holds a weight's zero points, where it has any."""
    return f"{weight}.zero_points"


def offsets_name(weight: str) -> str:
    """Initializer that holds the offsets of a weight's zero points, where these are a separate product."""
    return f"{weight}.offsets"


def smoothed_name(name: str) -> str:
    """Initializer that holds what smoothing made of another one, or what divides the input of a weight."""
    return f"{name}.smooth"


def pack_int4(rows: NDArray[Any]) -> NDArray[np.uint8]:
    """Integers -8..7 as uint8, two a byte, the first in the low half (ONNX, TensorProto.raw_data); an even count."""
    flat: NDArray[np.uint8] = rows.reshape(-1).view(np.uint8) & np.uint8(0x0F)
    packed: NDArray[np.uint8] = flat[0::2] | (flat[1::2] << np.uint8(4))
    return packed
