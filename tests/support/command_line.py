"""`omniport` run in this process: the ``omniport`` fixture's type, and what a refusal looks like."""

from __future__ import annotations

from collections.abc import Callable

#: (arguments) -> exit code, stdout, stderr
Omniport = Callable[..., tuple[int, str, str]]


def refused(result: tuple[int, str, str], *words: str) -> str:
    """Assert exit code 2, an empty stdout, no traceback, and the words in the message; gives the message."""
    code, out, err = result
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    for word in words:
        assert word in err
    return err
