"""GET /openapi.json: the endpoints as OpenAPI describes them, from the records that requests are decoded into."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ..service import Service
from .access import OPEN
from .api_errors import ErrorBody
from .routing import JSON, Body, Operation, json_response

Schema = dict[str, Any]
_REFERENCES = "#/components/schemas/{name}"
#: errors that every operation may give: another page or name, too much announced, too many requests, anything else
_ALWAYS = (403, 413, 429, 500)
#: those of an operation that reads a body
_READING = (400, 408)
_MEANINGS: Mapping[int, str] = {
    200: "a success",
    202: "taken",
    400: "a value that cannot be",
    401: "the key is missing or wrong",
    403: "a page or a name that may not call",
    404: "there is no such model",
    408: "the request did not arrive in time",
    413: "too large",
    429: "no place is free",
    500: "an error of the server's",
    503: "loading or draining",
}
#: a success beyond JSON, whose text or sound has no schema
_PLAIN: Schema = {"type": "string"}
_REQUEST_ID: Schema = {"required": True, "schema": {"type": "string"}, "description": "the log has it, too"}
_AGAIN: Schema = {"schema": {"type": "integer"}, "description": "seconds after which it may go better"}
_KEYS: Mapping[str, Schema] = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "api-key": {"type": "apiKey", "in": "header", "name": "api-key"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}


def openapi(service: Service, operations: Sequence[Operation]) -> Operation:
    """The operation that gives the document; it is among those that are described."""

    async def get_openapi(request: Request, service: Service) -> Response:
        """This document."""
        return json_response(document)

    described = Operation(method="GET", path="/openapi.json", endpoint=get_openapi, prefixed=False)
    document = describe([*operations, described], keys=bool(service.settings.keys))
    return described


def describe(operations: Iterable[Operation], *, keys: bool) -> Schema:
    """The document.

    Args:
        keys: requests need one.
    """
    operations = list(operations)
    records = [operation.body.record for operation in operations if operation.body is not None]
    _, schemas = msgspec.json.schema_components([*records, ErrorBody], ref_template=_REFERENCES)
    paths: dict[str, Schema] = {}
    for operation in operations:
        path = operation.name.replace(":path}", "}")
        paths.setdefault(path, {})[operation.method.lower()] = _operation(operation, schemas, keys)
    components: Schema = {"schemas": schemas}
    if keys:
        components["securitySchemes"] = _KEYS
    info = {"title": "omniport serve", "version": version("omniport")}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": components}


def _operation(operation: Operation, schemas: Mapping[str, Schema], keys: bool) -> Schema:
    told: Schema = {
        "operationId": operation.endpoint.__name__,
        "summary": (operation.endpoint.__doc__ or "").partition("\n")[0],
        "responses": _responses(operation, keys),
    }
    if names := re.findall(r"{(\w+):path}", operation.path):
        told["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            for name in names
        ]
    if operation.body is not None:
        content = {operation.body.media_type: {"schema": _body(operation.body, schemas)}}
        told["requestBody"] = {"required": True, "content": content}
    if keys and operation.path not in OPEN:
        told["security"] = [{name: []} for name in _KEYS]
    return told


def _body(body: Body, schemas: Mapping[str, Schema]) -> Schema:
    """The record's schema, with what is read apart from it."""
    record = schemas[body.record.__name__]
    properties, required = {**record["properties"], **body.more}, [*record["required"], *body.needed]
    if body.nulls:
        absent: Schema = {"type": "null"}
        properties = {
            name: schema if name in required or schema == {} else {"anyOf": [schema, absent]}
            for name, schema in properties.items()
        }
    return {**record, "properties": properties, "required": required}


def _responses(operation: Operation, keys: bool) -> Schema:
    answers = {kind: {"schema": {"type": "object"} if kind == JSON else _PLAIN} for kind in operation.answers}
    told = {str(operation.status): _response(operation.status, answers)}
    errors = {*_ALWAYS, *operation.fails, *(_READING if operation.body is not None else ())}
    if keys and operation.path not in OPEN:
        errors.add(401)
    failed = {JSON: {"schema": {"$ref": _REFERENCES.format(name=ErrorBody.__name__)}}}
    return told | {str(status): _response(status, failed) for status in sorted(errors)}


def _response(status: int, content: Schema) -> Schema:
    headers = {"x-request-id": _REQUEST_ID}
    if status in (429, 503):
        headers["retry-after"] = _AGAIN
    return {"description": _MEANINGS[status], "headers": headers, "content": content}
