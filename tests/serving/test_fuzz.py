"""The endpoint's own paths, fuzzed from their OpenAPI description."""

from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from rayrlhf.serving.endpoint import create_app
from rayrlhf.serving.store import Store
from rayrlhf.serving.votes import Votes
from tests.serving.engines import TOKEN, endpoint

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
HEAD = {"authorization": f"Bearer {TOKEN}"}
OWN = ("/v1/score", "/v1/votes", "/admin/weights")


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", OWN)
def test_own_paths(tmp_path: Path, store: Store, path: str, mode: GenerationMode) -> None:
    app = create_app(endpoint(tmp_path, votes=Votes(store, max_votable=10)), TOKEN)
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers=HEAD)
    sent = 0

    @given(case=schema[path]["POST"].as_strategy(generation_mode=mode))
    @settings(
        max_examples=60,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def send(case: schemathesis.Case) -> None:
        nonlocal sent
        case.call_and_validate(headers=HEAD, checks=CHECKS)
        sent += 1

    send()
    assert sent >= 30
