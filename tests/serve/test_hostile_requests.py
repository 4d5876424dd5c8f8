"""Bodies with anything anywhere: each gets an answer or an error of the client's, and the next one is served."""

from __future__ import annotations

import random

import pytest
from support.hostile import BODIES, mutated
from support.served import Served


@pytest.mark.parametrize("path", BODIES)
def test_anything_anywhere(served: Served, path: str) -> None:
    rng, http = random.Random(path), served.http()
    statuses = set()
    for _ in range(150):
        body = mutated(BODIES[path], rng)
        response = http.post(path, content=body)
        statuses.add(response.status_code)
        assert response.status_code in (200, 400, 404), body
        assert b"internal_error" not in response.content, body
        if response.status_code != 200:
            assert response.json()["error"].keys() == {"message", "type", "param", "code"}
    assert {200, 400} <= statuses
    assert served.quiet()
    assert http.post(path, json=BODIES[path]).status_code == 200
