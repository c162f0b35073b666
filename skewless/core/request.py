"""From what a server received to a Request, or to a RequestError that says what to send instead."""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a budget holds the limits that are defined here
    from skewless.core.budget import Budget

# The field that carries the one file: `body` is a raw request body, the others are form fields, gRPC inputs, JSON keys.
PAYLOAD_FIELDS = ("body", "data", "audio", "image", "file")
# The start of a field that carries one of several files; the rest is the name to answer it under.
BATCH_PREFIX = "files."
LONGEST_NAME = 200  # characters

_JSON_FORM = '{"image": "<base64>"} or {"files": {"NAME": "<base64>", ...}}, each with or without "threshold": 0.5'


class RequestError(Exception):
    """A request, or one file of it, that gets an error for an answer: an HTTP status, and what to do about it."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status
        self.message = message


class NoFileError(RequestError):
    """A request without a file; servers have advice of their own on how to send one."""

    def __init__(self, fields: Sequence[str]):
        seen = [repr(name[:40]) for name in fields[:8]]
        more = [f"and {len(fields) - len(seen):,} more"] if len(fields) > len(seen) else []
        self.received = f" The fields received are {', '.join(seen + more)}." if seen else ""
        super().__init__(
            400, f"the request carries no file; send it as one of {', '.join(PAYLOAD_FIELDS)}.{self.received}"
        )


@dataclass(frozen=True)
class Request:
    """One file to score.

    threshold: the caller's own, in [0, 1], or None for the archive's.
    budget: what the request that the file came in may take; None for one that nobody waits for beside others.
    """

    payload: bytes
    threshold: float | None = None
    budget: Budget | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class BatchRequest:
    """1 to `Limits.max_files` files to score, by the names to answer them under, with one threshold for all.

    A file that is empty, too large or not what its field promised is its own RequestError and leaves the others alone.
    """

    files: Mapping[str, bytes | RequestError]
    threshold: float | None = None


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    max_bytes: of one file. max_files: in one request. max_pixels: of one picture.
    max_duration_s: of one recording, and of all recordings of one request together.
    min_rate_hz, max_rate_hz: sampling rates in Hz. max_channels: of a recording.
    max_samples: what is kept of one recording in memory, all channels counted, at 4 bytes each.
    max_read_s: of processor time, to read all files of one request and compute the network's input.
    max_batch_s: of time, for all requests that a server answers together; files that the network has not been given by then
        are refused with 503. TorchServe kills a worker that takes longer than responseTimeout, with all its requests.
    """

    max_bytes: int = 50_000_000
    max_duration_s: float = 3600.0
    min_rate_hz: int = 1000
    max_rate_hz: int = 384_000
    max_channels: int = 8
    max_samples: int = 64_000_000
    max_pixels: int = 50_000_000
    max_files: int = 64
    max_read_s: float = 10.0
    max_batch_s: float = 60.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if type(value) not in (int, float) or not value > 0:
                raise ValueError(f"limit {name} is {value!r}, expected a positive number")
        if self.min_rate_hz > self.max_rate_hz:
            raise ValueError(
                f"limit min_rate_hz is {self.min_rate_hz}, expected at most max_rate_hz, {self.max_rate_hz}"
            )


def parse_request(fields: Mapping[str, Any], headers: Mapping[str, str], limits: Limits) -> Request | BatchRequest:
    """The request in a server's form fields and headers.

    fields: name to bytes, bytearray or str (or an object, where a server parsed JSON). One file is in one of
    PAYLOAD_FIELDS, several are in `files.NAME` each; a JSON object in one of PAYLOAD_FIELDS carries them in base64.
    headers: name to text; names in any case.
    Raises RequestError: 400 without a file, with an empty one, with one file beside several, with too many or wrongly
    named ones, with JSON or base64 that is not what it should be, or with a bad threshold; 413 for one that is too
    large; 415 for text where a file is expected.
    """
    name, batch = _choose(fields, limits)
    source, document = fields, {}
    read: Callable[[str, Any, Limits], bytes] = _file
    if name is not None and _is_json(fields[name]):
        source = document = _json_fields(fields[name], limits)
        read = _base64_file
        name, batch = _choose(document, limits)
    if name is not None:
        return Request(read(name, source[name], limits), _threshold(fields, document, headers))
    files: dict[str, bytes | RequestError] = {}
    for each in batch:
        try:
            files[each] = read(BATCH_PREFIX + each, source[BATCH_PREFIX + each], limits)
        except RequestError as error:
            files[each] = error
    return BatchRequest(files, _threshold(fields, document, headers))


def _choose(fields: Mapping[str, Any], limits: Limits) -> tuple[str | None, list[str]]:
    """The one field with a file, or the names of a batch: never both, never neither."""
    single = [name for name in PAYLOAD_FIELDS if name in fields]
    batch = [name.removeprefix(BATCH_PREFIX) for name in fields if name.startswith(BATCH_PREFIX)]
    if single and batch:
        raise RequestError(
            400,
            f"the request carries '{single[0]}', which is for one file, and {len(batch):,} named ones; "
            "send one file, or name all of them files.1, files.2 and so on",
        )
    if len(single) > 1:
        raise RequestError(
            400,
            f"the request carries several files ({', '.join(single)}); send one, or name them files.1, files.2 and so on",
        )
    if len(batch) > limits.max_files:
        raise RequestError(
            400, f"the request carries {len(batch):,} files, at most {limits.max_files:,} are accepted; send several"
        )
    for name in batch:
        _check_name(name)
    if not single and not batch:
        raise NoFileError(list(fields))
    return (single[0] if single else None), batch


def _check_name(name: str) -> None:
    # Half of a surrogate pair, which JSON can spell, is no text: many a client could not read the answer.
    unwritable = any(unicodedata.category(character) in ("Cc", "Cs") for character in name[:LONGEST_NAME])
    if not name or len(name) > LONGEST_NAME or unwritable:
        raise RequestError(
            400,
            f"a file of the batch is named {name[:40]!r} ({len(name):,} characters), expected 1 to {LONGEST_NAME} "
            "characters without control characters",
        )


def _is_json(value: Any) -> bool:
    if not isinstance(value, bytes | bytearray):
        return isinstance(value, dict | list)
    # Content decides, because gRPC inputs have no content type and REST callers forget it. It is safe: no audio or
    # image format starts with a bracket (as the size of an MP4's first box, it would be over 1 GB).
    return value[:64].lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[")


def _json_fields(value: bytes | bytearray | dict | list, limits: Limits) -> dict[str, Any]:
    """A JSON request under the names that a form would have: `files.NAME` for the files of a batch."""
    document = value if isinstance(value, dict | list) else _parse_json(value, limits)
    if not isinstance(document, dict):
        raise RequestError(400, f"the request is a JSON array, expected {_JSON_FORM}")
    if unknown := [key for key in document if key not in (*PAYLOAD_FIELDS, "files", "threshold")]:
        raise RequestError(400, f"the JSON object has the unknown key {unknown[0][:40]!r}, expected {_JSON_FORM}")
    if not set(document) - {"threshold"}:
        raise RequestError(400, f"the JSON object carries no file, expected {_JSON_FORM}")
    files = document.get("files", {})
    if not isinstance(files, dict):
        raise RequestError(400, f"the key 'files' is {_kind(files)}, expected {_JSON_FORM}")
    if "files" in document and not files:
        raise RequestError(400, f"the key 'files' is empty, expected {_JSON_FORM}")
    single = {key: content for key, content in document.items() if key != "files"}
    return single | {BATCH_PREFIX + name: content for name, content in files.items()}


def _parse_json(value: bytes | bytearray, limits: Limits) -> Any:
    # Every value needs a comma or a bracket, and base64 has none: refused before a parser makes objects of them all.
    # The names of a full batch may consist of them.
    many = limits.max_files * (LONGEST_NAME + 2) + 100
    if (marks := sum(value.count(mark) for mark in (b",", b"{", b"["))) > many:
        raise RequestError(
            400, f"the JSON has {marks:,} commas and brackets, at most {many:,} make sense in {_JSON_FORM}"
        )
    try:
        # Not strict: base64 may come with its line breaks.
        return json.loads(value.decode("utf-8-sig"), strict=False, object_pairs_hook=_unique)
    except RecursionError:
        reason = "its brackets are nested too deeply"
    except ValueError as error:
        reason = str(error)
    raise RequestError(400, f"the request starts like JSON but is not: {reason[:100]}; expected {_JSON_FORM}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # json would keep the last of them and lose a file.
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise RequestError(400, f"the JSON has the key {key[:40]!r} twice in one object; use each key once")
        seen[key] = value
    return seen


def _kind(value: Any) -> str:
    kinds = {str: "a string", list: "an array", dict: "an object", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _base64_file(key: str, value: Any, limits: Limits) -> bytes:
    expected = "expected a string with the file's bytes in base64 (A-Z, a-z, 0-9, +, /, padded with =)"
    if not isinstance(value, str):
        raise RequestError(400, f"the key '{key}' is {_kind(value)}, {expected}")
    start = re.match(r"\s*data:([^,]{0,200}),", value, re.IGNORECASE)
    if start and not start[1].lower().endswith(";base64"):
        raise RequestError(400, f"the key '{key}' is a data URL without ';base64' before its comma, {expected}")
    text = (value[start.end() :] if start else value).strip(" \t\r\n")
    # Line breaks, as mail and command lines put them. A space inside is refused: it is what a + becomes in a form.
    packed = text.encode("utf-8", "replace").translate(None, b"\t\r\n")
    # The size that it will decode to, before it does.
    refuse_large(len(packed) // 4 * 3 - packed[-2:].count(b"="), limits)
    try:
        return _file(key, base64.b64decode(packed, validate=True), limits)
    except binascii.Error as error:
        # Python's words name no character, such as the - and _ of the url-safe alphabet.
        wrong = re.search(r"[^A-Za-z0-9+/=\t\r\n]", text)
        reason = f"{wrong[0]!r} at position {wrong.start():,}" if wrong else str(error)
    raise RequestError(400, f"the key '{key}' is not base64 ({reason}), {expected}")


def _file(name: str, value: Any, limits: Limits) -> bytes:
    if not isinstance(value, bytes | bytearray):
        raise RequestError(
            415, f"field '{name}' holds text, expected the bytes of a file; send them as application/octet-stream"
        )
    if not value:
        raise RequestError(400, "the file is empty (0 bytes); send the bytes of a file")
    refuse_large(len(value), limits)
    return bytes(value)


def refuse_large(size: int, limits: Limits) -> None:
    """Raise RequestError 413 for a file of more bytes than the limits allow."""
    if size > limits.max_bytes:
        raise RequestError(
            413,
            f"the file has {size:,} bytes, at most {limits.max_bytes:,} are accepted; send a smaller or compressed file",
        )


def _threshold(fields: Mapping[str, Any], document: Mapping[str, Any], headers: Mapping[str, str]) -> float | None:
    given = [("the threshold field", fields["threshold"])] if "threshold" in fields else []
    given += [("the JSON's threshold", document["threshold"])] if "threshold" in document else []
    given += [("X-Threshold", value) for name, value in headers.items() if name.lower() == "x-threshold"]
    values = [(source, _probability(value)) for source, value in given]
    if len({value for _, value in values}) > 1:
        said = " and ".join(f"{source} says {value}" for source, value in values)
        raise RequestError(400, f"{said}; send one of them")
    return values[0][1] if values else None


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
