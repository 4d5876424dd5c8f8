"""What OpenAPI's document of a server says about an answer."""

from __future__ import annotations

from typing import Any

import httpx


def check_documented(document: dict[str, Any], method: str, path: str, response: httpx.Response) -> None:
    """The status, the media type and the headers are among those that the document names."""
    told = document["paths"][path][method.lower()]["responses"]
    assert str(response.status_code) in told, (method, path, response.status_code, response.text[:200])
    answer = told[str(response.status_code)]
    assert response.headers["content-type"].partition(";")[0] in answer["content"], (method, path, response.headers)
    needed = {name for name, header in answer["headers"].items() if header.get("required")}
    assert needed <= {*response.headers}


def references(value: object) -> set[str]:
    """All that a document refers to."""
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*map(references, value.values()))
    return set().union(*map(references, value)) if isinstance(value, list) else set()
