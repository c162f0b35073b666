"""The entry point that TorchServe loads from an archive."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Workers inherit the server's Python path. The archive's own code must win over any other of the same name on it.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from handler.forms import is_check, is_describe, request_of
from skewless.core import load_error

if TYPE_CHECKING:
    from handler.record import Record

_log = logging.getLogger(__name__)


class SkewlessHandler:
    """TorchServe's five verbs over a ModelService: `initialize` once, then for every batch `preprocess`, `inference` and
    `postprocess`, each of which hands a file on as soon as it is done, with `describe` for `GET /models/NAME?customized=true`."""

    record: Record | None = None

    def initialize(self, context: Any) -> None:
        """Load the archive and replay its references; what goes wrong is written down for whoever registers it."""
        with load_error.written_down(context.manifest["model"]):
            from skewless.core.numerics import choose_device
            from skewless.core.service import ModelService

            properties = context.system_properties
            load_error.check_own_code(properties["model_dir"])
            self.service = ModelService.load(properties["model_dir"], choose_device(properties.get("gpu_id")))
            if metrics := getattr(context, "metrics", None):
                from handler.record import Record

                self.record = Record(self.service, context.manifest["model"], metrics)

    def preprocess(self, requests: Sequence[Any]) -> Iterator[Any]:
        """Files to network inputs, or to what is wrong with each."""
        return self.service.prepare(requests)

    def inference(self, prepared: Iterable[Any]) -> Iterator[Any]:
        """Network inputs to outputs by name."""
        return self.service.infer(prepared)

    def postprocess(self, inferred: Iterable[Any]) -> Iterator[Any]:
        """Outputs to a status and a JSON body for each file."""
        return self.service.answer(inferred)

    def describe(self) -> dict[str, Any]:
        """The versioned metrics, the pipeline and the numeric policy in force."""
        return self.service.describe()

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[bytes]:
        """One batch: a dict of form fields per request in, one JSON body per request out, each with its own status."""
        from skewless.core.service import Response, answer_files

        began = time.monotonic()
        headers = [context.get_all_request_header(number) for number in range(len(data))]
        responses = {
            number: Response(200, self.describe()) for number, h in enumerate(headers) if is_describe(data[number], h)
        }
        asked = [number for number in range(len(data)) if number not in responses]
        requests = [request_of(data[number], headers[number], self.service.limits) for number in asked]
        answers = answer_files(
            requests, self.service.limits, lambda files: self.postprocess(self.inference(self.preprocess(files)))
        )
        responses |= zip(asked, answers, strict=True)
        bodies = [_written(context, number, responses[number]) for number in range(len(data))]
        # A health check asks for one reference again and again: counted, it would be most of what a quiet server decides.
        asking = [headers[number] for number in asked]
        users = [i for i, each in enumerate(asking) if not is_check(each)]
        if self.record and users:
            seconds = time.monotonic() - began
            self.record([requests[i] for i in users], [answers[i] for i in users], [asking[i] for i in users], seconds)
        return bodies


def _written(context: Any, number: int, response: Any) -> bytes:
    """One response as JSON, with its status set. A body that JSON cannot hold is that response's own error."""
    from skewless.core.request import RequestError
    from skewless.core.service import Response

    try:
        body = json.dumps(response.body, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        _log.exception("a response cannot be written as JSON")
        response = Response.of_error(
            RequestError(500, "this answer could not be written; the server's log has the reason")
        )
        body = json.dumps(response.body)
    context.set_response_content_type(number, "application/json")
    context.set_response_status(response.status, "" if response.status == 200 else "Refused", number)
    return body.encode()
