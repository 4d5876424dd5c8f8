"""/openapi.json describes every endpoint as it is; the fuzzing of it is in test_schemathesis.py."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from omniport.serve.http.chat_request import ChatRequest
from starlette.routing import Route
from support.documented import check_documented, references
from support.hostile import BODIES
from support.served import Served

#: what a body may have that is no field of the record it is read into
APART = {"n", "logit_bias", "user", "metadata", "response_format"}


@pytest.fixture(scope="module")
def document(served: Served) -> dict[str, Any]:
    response = served.http().get("/openapi.json")
    assert response.headers["content-type"] == "application/json"
    value: dict[str, Any] = response.json()
    return value


def test_every_endpoint_is_described(served: Served, document: dict[str, Any]) -> None:
    pages = {"/", "/page/{name}"}
    there = {
        (method, route.path.replace(":path}", "}"))
        for route in served.app.routes
        if isinstance(route, Route) and route.path not in pages
        for method in (route.methods or ())
        if method != "HEAD"
    }
    told = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert told <= there
    assert {(method, path.removeprefix("/v1")) for method, path in told} == {
        (method, path.removeprefix("/v1")) for method, path in there
    }
    names = [operation["operationId"] for methods in document["paths"].values() for operation in methods.values()]
    assert len(names) == len(set(names))
    assert all(operation["summary"] for methods in document["paths"].values() for operation in methods.values())


def test_references_lead_somewhere(document: dict[str, Any]) -> None:
    for reference in references(document):
        held: Any = document
        for key in reference.removeprefix("#/").split("/"):
            held = held[key]


def test_a_body_is_described_as_it_is_read(document: dict[str, Any]) -> None:
    content = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]
    schema = content["application/json"]["schema"]
    assert {*schema["properties"]} >= {*ChatRequest.__struct_fields__} | APART
    assert schema["required"] == ["messages"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["n"]["anyOf"][0] == {"const": 1}
    form = document["paths"]["/v1/audio/transcriptions"]["post"]["requestBody"]["content"]
    assert form["multipart/form-data"]["schema"]["required"] == ["file"]


@pytest.mark.parametrize("path", BODIES)
def test_every_field_alone_with_what_it_may_not_be(served: Served, document: dict[str, Any], path: str) -> None:
    """No value of a field, whatever it is, gives an answer that is not described."""
    http = served.http()
    content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    tried = set()
    for field in content["schema"]["properties"]:
        for value in (None, True, -1, 1e300, "\U0001f600", [None], {}):
            response = http.post(path, json={**BODIES[path], field: value})
            check_documented(document, "POST", path, response)
            tried.add(response.status_code)
    assert {200, 400} <= tried
    assert 500 not in tried


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/metrics", "/v1/omniport/capacity", "/v1/models"])
def test_answers_without_a_body(served: Served, document: dict[str, Any], path: str) -> None:
    http = served.http()
    check_documented(document, "GET", path, http.get(path))
    too_much = http.get(path, headers={"content-length": "999999999999"})
    assert too_much.status_code == 413
    check_documented(document, "GET", path, too_much)
    elsewhere = http.get(path, headers={"host": "elsewhere.example"})
    assert elsewhere.status_code == 403
    check_documented(document, "GET", path, elsewhere)


def test_keys_are_told_where_they_are_wanted(root: Any) -> None:
    with Served(root, keys=("sk-1",)) as served:
        document = served.http().get("/openapi.json", headers={"api-key": "sk-1"}).json()
        assert {*document["components"]["securitySchemes"]} == {"bearer", "api-key", "x-api-key"}
        assert "security" not in document["paths"]["/health"]["get"]
        assert document["paths"]["/version"]["get"]["security"]
        refused = served.http().get("/version")
        assert refused.status_code == 401
        check_documented(document, "GET", "/version", refused)


def test_an_error_is_what_the_document_says(served: Served, document: dict[str, Any]) -> None:
    details = document["components"]["schemas"]["ErrorDetails"]["properties"]
    told = served.http().get("/v1/models/other").json()["error"]
    assert told.keys() == details.keys()
    assert msgspec.json.encode(document)
