"""The figures of a deployment as rows: planned beside measured."""

from __future__ import annotations

from collections.abc import Iterator

from rich.filesize import decimal

from .deploy_record import Deployment

#: what a cell says of what nothing has measured
NOT_RUN = "not run"


def compared(record: Deployment) -> Iterator[tuple[str, str, str]]:
    """(what, planned, measured) of every figure that was planned; `NOT_RUN` where only the device can tell."""
    expected, reply = record.plan.expected, record.reply
    for name, planned in expected.weights.items():
        found = record.written.get(name)
        yield f"{name}, weights and graph", decimal(planned), NOT_RUN if found is None else decimal(found)
    yield "most on the disk while it was made", decimal(expected.peak_disk_bytes), decimal(record.peak_disk_bytes)
    yield (
        "memory of weights, caches and activations",
        decimal(expected.memory_bytes),
        NOT_RUN if reply is None else f"{decimal(reply.peak_memory_bytes)} (the whole process)",
    )
    yield (
        "first text of a reply",
        f"{expected.first_token_seconds:.2f} s after a spoken question",
        NOT_RUN if reply is None else f"{reply.first_token_seconds:.2f} s after a written one",
    )
    if expected.first_audio_seconds is None or expected.work_per_second_of_speech is None:
        return
    spoken = reply is not None and reply.first_audio_seconds is not None
    yield (
        "first sound",
        f"{expected.first_audio_seconds:.2f} s after a spoken question",
        f"{reply.first_audio_seconds:.2f} s after a written one" if reply is not None and spoken else NOT_RUN,
    )
    work = None if reply is None else reply.work_per_second
    yield (
        "work for a second of speech",
        f"{expected.work_per_second_of_speech:.2f} s",
        NOT_RUN if work is None else f"{work:.2f} s, all of a reply of 2 s",
    )
