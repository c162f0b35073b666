"""From what a server received to a Request, or to a RequestError that says what to send instead."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# The field that carries the file: `body` is a raw request body, the others are form fields or gRPC inputs.
PAYLOAD_FIELDS = ("body", "data", "audio", "file")


class RequestError(Exception):
    """A request that gets an error for an answer: an HTTP status, and what to do about it."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status
        self.message = message


@dataclass(frozen=True)
class Request:
    """One recording to score. threshold: the caller's own, in [0, 1], or None for the archive's."""

    payload: bytes
    threshold: float | None = None


@dataclass(frozen=True)
class Limits:
    """What one request may ask for: the size of its file in bytes, and the duration of its recording in seconds."""

    max_bytes: int = 50_000_000
    max_duration_s: float = 4 * 3600.0


def parse_request(fields: Mapping[str, Any], headers: Mapping[str, str], limits: Limits) -> Request:
    """The Request in a server's form fields and headers.

    fields: name to bytes, bytearray or str (or an object, where a server parsed JSON).
    headers: name to text; names in any case.
    Raises RequestError: 400 without a file, with an empty one or with a bad threshold; 413 for one that is too
    large; 415 for text or JSON where audio is expected.
    """
    return Request(_payload(fields, limits), _threshold(fields, headers))


def _payload(fields: Mapping[str, Any], limits: Limits) -> bytes:
    named = [name for name in PAYLOAD_FIELDS if name in fields]
    if not named:
        raise RequestError(
            400,
            "the request carries no audio. Send the file as the raw body with 'Content-Type: application/octet-stream' "
            "(curl: -H 'Content-Type: application/octet-stream' --data-binary @FILE), or as the multipart form field "
            "'data' (curl: -F data=@FILE). A body sent without a content type is read as a form and lost.",
        )
    if len(named) > 1:
        raise RequestError(400, f"the request carries several files ({', '.join(named)}); send one file per request")
    payload = fields[named[0]]
    if not isinstance(payload, bytes | bytearray):
        raise RequestError(
            415,
            f"field '{named[0]}' holds text or JSON, expected the bytes of an audio file; send them as application/octet-stream",
        )
    if not payload:
        raise RequestError(400, "the audio is empty (0 bytes); send the bytes of an audio file")
    if len(payload) > limits.max_bytes:
        raise RequestError(
            413,
            f"the audio has {len(payload):,} bytes, at most {limits.max_bytes:,} are accepted; send a shorter or compressed file",
        )
    return bytes(payload)


def _threshold(fields: Mapping[str, Any], headers: Mapping[str, str]) -> float | None:
    given = [fields["threshold"]] if "threshold" in fields else []
    given += [value for name, value in headers.items() if name.lower() == "x-threshold"]
    values = [_probability(value) for value in given]
    if len(set(values)) > 1:
        raise RequestError(
            400, f"the threshold field says {values[0]} and X-Threshold says {values[1]}; send one of them"
        )
    return values[0] if values else None


def _probability(value: Any) -> float:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes | bytearray) else str(value)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    # NaN fails the comparison too.
    if not 0.0 <= number <= 1.0:
        raise RequestError(400, f"threshold is {text[:40]!r}, expected a number in [0, 1], such as 0.5")
    return number
