"""Schemathesis over /openapi.json: what a document allows, and what it forbids. It is no part of the `test` extra."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from support.served import Served

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed: run make serve-check")
checks = pytest.importorskip("schemathesis.checks", reason="schemathesis is not installed: run make serve-check")
openapi = pytest.importorskip(
    "schemathesis.specs.openapi.checks", reason="schemathesis is not installed: run make serve-check"
)

#: what every answer has to pass. A body may be all that its schema asks for and hold sound that is none, so `positive
#: data acceptance` is not among them; what a schema forbids has to be refused.
CHECKS = [
    checks.not_a_server_error,
    openapi.status_code_conformance,
    openapi.content_type_conformance,
    openapi.response_headers_conformance,
    openapi.response_schema_conformance,
    openapi.negative_data_rejection,
    openapi.unsupported_method,
]
#: drains the server
DRAIN = "/v1/omniport/drain"


@pytest.fixture(scope="module")
def described(served: Served) -> Any:
    return schemathesis.openapi.from_url(f"{served.url}/openapi.json").exclude(path=DRAIN)


@schemathesis.pytest.from_fixture("described").parametrize()
@settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_what_is_served_is_what_is_described(served: Served, case: Any) -> None:
    case.call_and_validate(checks=CHECKS, timeout=30)
    assert served.service.state == "ready"
