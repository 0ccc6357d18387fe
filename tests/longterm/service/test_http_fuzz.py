"""The HTTP API under requests made from its own schema: whatever comes, no 5xx."""

import pytest

from holdfast.longterm.memory import Memory
from holdfast.longterm.retrieval.embed import Hash

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
from hypothesis import HealthCheck, Phase, settings  # noqa: E402

from holdfast.longterm.service.http import create_app  # noqa: E402

MEMORY = Memory(":memory:", embedder=Hash(32))
IDS = MEMORY.add([{"role": "user", "content": f"Note {i}."} for i in range(5)], session="s")
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", create_app(MEMORY))


@SCHEMA.parametrize()
@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)
def test_no_request_makes_the_server_fail(case):
    given = str((case.path_parameters or {}).get("id", ""))
    if given[-1:] in tuple("02468ace"):
        case.path_parameters["id"] = IDS[len(given) % 5]  # half of them ask for what there is
    response = case.call()
    case.validate_response(response, checks=[
        schemathesis.checks.not_a_server_error,
        schemathesis.specs.openapi.checks.status_code_conformance,
        schemathesis.specs.openapi.checks.content_type_conformance,
        schemathesis.specs.openapi.checks.response_schema_conformance,
    ])  # fmt: skip
