"""A decoding child, some of whose files do what hostile ones may do to a decoder. Run as a script."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import numpy as np
from omniport.serve.media import decoding_child, decoding_messages
from omniport.serve.media.decoding_messages import Asked

_decode, _send = decoding_child.decode, decoding_messages.send
COMMAND = (sys.executable, __file__)


def decode(asked: Asked, data: bytes) -> Any:
    """By the first word of the file."""
    word = data.partition(b" ")[0]
    if word == b"hang":
        time.sleep(600)
    if word == b"crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if word == b"exit":
        os._exit(0)
    if word == b"bomb":
        return [np.zeros(1 << 27, np.uint8) for _ in range(200)]
    if word == b"chatter":
        os.write(1, b"written to stdout by a library")
        return np.zeros((2, 2, 3), np.uint8)
    if word == b"raise":
        raise KeyError("what it holds")
    if word == b"environment":
        raise decoding_child.MediaError(" ".join(os.environ))
    return data[4:] if word == b"lie" else _decode(asked, data)


def send(file: Any, record: Any, data: Any = b"") -> None:
    """Also what a child that was taken over may answer: bytes as they are."""
    if isinstance(record, bytes):
        file.write(record)
        file.flush()
        os._exit(0)
    _send(file, record, data)


if __name__ == "__main__":
    decoding_child.decode = decode
    decoding_messages.send = send
    decoding_child.main()
