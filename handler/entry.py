"""TorchServe's entry point, and the only file that knows TorchServe: its calling convention, headers and statuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# Workers inherit the server's Python path. The archive's own code must win over any other `handler` on it.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from handler.precision import choose_device
from handler.request import BatchRequest, Limits, Request, RequestError, parse_request
from handler.service import ModelService, Response

_service: ModelService | None = None


def handle(data: list[dict[str, Any]] | None, context: Any) -> list[bytes] | None:
    """Called once with `data` None when the worker starts, then with one dict of form fields per request in a batch."""
    global _service
    if data is None:
        properties = context.system_properties
        _service = ModelService.load(properties["model_dir"], choose_device(properties.get("gpu_id")))
        return None
    headers = [context.get_all_request_header(i) for i in range(len(data))]
    # `GET /models/NAME?customized=true` arrives as a request of its own with this header.
    responses = {i: Response(200, _service.describe()) for i, h in enumerate(headers) if _is_describe(data[i], h)}
    asked = [i for i in range(len(data)) if i not in responses]
    requests = [_parse(data[i], headers[i], _service.limits) for i in asked]
    responses |= zip(asked, _service.predict(requests), strict=True)
    for i, response in responses.items():
        context.set_response_content_type(i, "application/json")
        context.set_response_status(response.status, "" if response.status == 200 else "Refused", i)
    return [json.dumps(responses[i].body, allow_nan=False).encode() for i in range(len(data))]


def _is_describe(fields: dict[str, Any], headers: dict[str, Any]) -> bool:
    # A prediction always has a field, if only an empty body: its caller cannot turn it into this by a header.
    return headers.get("describe") == "True" and not fields


def _parse(fields: dict[str, Any], headers: dict[str, Any], limits: Limits) -> Request | BatchRequest | RequestError:
    # Beside the headers proper, TorchServe puts a dict for every form field into the same mapping.
    texts = {name: value for name, value in headers.items() if isinstance(value, str)}
    try:
        return parse_request(fields, texts, limits)
    except RequestError as error:
        return error
