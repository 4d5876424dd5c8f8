"""The boundary around other libraries' parsers.

Damaged input makes them raise anything: types that their pages do not name, MemoryError, RecursionError, and panics,
which are no Exception. Types are therefore not listed where such a parser is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import OmniportError


@contextmanager
def foreign(kind: type[OmniportError], problem: str, remedy: str) -> Iterator[None]:
    """Around another library's parser: whatever it raises becomes ``kind``, and our own errors pass.

    Args:
        problem: begins the message; the library's own words follow.
        remedy: ends it, as a sentence of its own where it begins with a capital.
    """
    try:
        yield
    except (OmniportError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split()).rstrip(".")[:500] or type(error).__name__
        raise kind(f"{problem}: {reason}{';' if remedy[:1].islower() else '.'} {remedy}") from error
