"""Requests made from the server's own OpenAPI document: none of them is an error of the server's."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from skewless.torchserve.server import Server, bearer

# The document leaves open what a model's name is, and of which kind a body: `*/*`.
_BINARY = {"type": "string", "format": "binary"}
_BODIES: dict[str, Any] = {
    "application/octet-stream": {"schema": _BINARY},
    "application/json": {"schema": {"anyOf": [{"type": "object"}, {"properties": {"data": {"type": "string"}}}, {}]}},
    "multipart/form-data": {
        "schema": {"type": "object", "properties": {"data": _BINARY, "threshold": {"type": "string"}}}
    },
    "text/plain": {"schema": {"type": "string"}},
}
# TorchServe's own parser of forms answers 500 to a field without a name, before any handler sees it.
_PARSER = '"type": "ErrorDataDecoderException"'
EXAMPLES = 50  # of each operation


def described(url: str, token: str) -> dict[str, Any]:
    """The OpenAPI document of the inference API."""
    answer = requests.options(f"{url}/", headers=bearer(token), timeout=30)
    assert answer.status_code == 200
    return answer.json()


def with_models(document: dict[str, Any], model: str, version: str) -> dict[str, Any]:
    """The document with a registered model and one that is none, and bodies of the kinds that callers send."""
    filled = copy.deepcopy(document)
    for path in filled["paths"].values():
        for operation in path.values():
            for parameter in operation.get("parameters", []):
                known = {"model_name": [model, model, "nobody"], "model_version": [version, version, "9"]}
                if parameter["name"] in known:
                    parameter["schema"] = {"type": "string", "enum": known[parameter["name"]]}
            if "requestBody" in operation:
                operation["requestBody"]["content"] = _BODIES
    return filled


def answers_to(document: dict[str, Any], url: str, token: str) -> Counter[tuple[str, int]]:
    """How often each path gave each status. Fails at an error of the server's that is neither "busy" nor its form parser's."""
    found: Counter[tuple[str, int]] = Counter()
    for result in schemathesis.openapi.from_dict(document).get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=EXAMPLES,
            derandomize=True,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(operation.as_strategy())
        def ask(case: schemathesis.Case) -> None:
            answer = case.call(base_url=url, headers=bearer(token), timeout=120)
            found[case.path, answer.status_code] += 1
            expected = answer.status_code < 500 or answer.status_code == 503 or _PARSER in answer.text
            assert expected, (case.as_curl_command(), answer.text[:500])

        ask()
    return found


@pytest.mark.chain
def test_no_described_request_is_an_error_of_the_server(server: Server):
    token = server.token("inference")
    document = described(server.inference_url, token)
    predictions = "/predictions/{model_name}"
    assert {"/ping", predictions, f"{predictions}/{{model_version}}"} <= set(document["paths"])
    found = answers_to(with_models(document, "cough", "1.0"), server.inference_url, token)
    assert found["/ping", 200] and found[predictions, 404]
    # Refused by the handler itself, and not before.
    assert found[predictions, 400] + found[predictions, 415] > EXAMPLES // 4
    assert server.status()["health"] == "Healthy"
