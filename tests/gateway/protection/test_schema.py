"""Requests that schemathesis derives from the OpenAPI schema: none is a server error."""

from __future__ import annotations

import os
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings

from deepseek_triton.gateway.app import create_app
from deepseek_triton.gateway.settings import GatewaySettings
from tests.support.gateway import MODEL, FakeBackend

pytestmark = pytest.mark.slow

NEEDS_REDIS = ("/v1/jobs", "/v1/files", "/v1/batches")
EXAMPLES = int(os.environ.get("SCHEMA_EXAMPLES", "8"))
# A schema of a fixture: its requests are made when the test runs, not whenever tests are collected.
schema: Any = schemathesis.pytest.from_fixture("gateway_schema")


@pytest.fixture
def gateway_schema(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The schema of a gateway that has neither keys nor Redis."""
    # requests reads all environment variables twice for each request, for proxies: a quarter of the test's time.
    monkeypatch.setattr("requests.sessions.get_environ_proxies", lambda *_, **__: {})
    return schemathesis.openapi.from_asgi("/openapi.json", create_app(GatewaySettings(), FakeBackend()))


@schema.parametrize()  # type: ignore[untyped-decorator]
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
def test_no_request_is_a_server_error(case: Any) -> None:
    if isinstance(case.body, dict) and len(case.body) % 4:  # most of them for a model that is there
        case.body["model"] = MODEL
    response = case.call()
    is_off = response.status_code == 503 and response.json()["error"]["code"] == "queue_off"  # there is no Redis here
    assert response.status_code < 500 or (is_off and case.path.startswith(NEEDS_REDIS)), response.text
    if response.status_code >= 400:
        assert set(response.json()) >= {"error"}
