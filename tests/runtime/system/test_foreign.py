"""Parsers of others raise anything; all of it becomes one error of ours, and our own pass."""

from __future__ import annotations

import pytest
from omniport.runtime.errors import BundleError, CheckpointError
from omniport.runtime.system.foreign import foreign


class Panic(BaseException):
    """As pyo3's PanicException: no Exception."""


@pytest.mark.parametrize("error", [ValueError("a\nb."), MemoryError(), RecursionError("deep"), Panic("at x.rs:1")])
def test_whatever_is_raised(error: BaseException) -> None:
    with pytest.raises(BundleError) as caught, foreign(BundleError, "cannot read f", "Copy it again."):
        raise error
    words = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    assert str(caught.value) == f"cannot read f: {words}. Copy it again."
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), CheckpointError("ours")])
def test_what_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, foreign(BundleError, "cannot read f", "copy it again"):
        raise error
    assert caught.value is error
