"""What TorchServe makes of a request: form fields, headers, and what it loses on the way."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from skewless.core.request import BatchRequest, Limits, NoFileError, Request, RequestError, parse_request

_log = logging.getLogger(__name__)

# A form spends less than this on a field beside its value: boundary, names, content type.
_PART_OVERHEAD = 4096


def is_describe(fields: Mapping[str, Any], headers: Mapping[str, Any]) -> bool:
    """Whether this is `GET /models/NAME?customized=true`, which arrives as a request of its own with this header."""
    # A prediction always has a field, if only an empty body: its caller cannot turn it into this by a header.
    return headers.get("describe") == "True" and not fields


def is_check(headers: Mapping[str, Any]) -> bool:
    """Whether a health check asks (`skewless serve health`), and not a user."""
    return any(name.lower() == "x-skewless-check" for name in headers)


def request_of(
    fields: Mapping[str, Any], headers: Mapping[str, Any], limits: Limits
) -> Request | BatchRequest | RequestError:
    """The request in TorchServe's fields and headers, or what is wrong with it."""
    # Beside the headers proper, TorchServe puts a dict for every form field into the same mapping.
    texts = {name: value for name, value in headers.items() if isinstance(value, str)}
    try:
        _refuse_lost_fields(fields, texts)
        return parse_request(fields, texts, limits)
    except NoFileError as error:
        return RequestError(error.status, _NO_FILE + error.received)
    except RequestError as error:
        return error
    except Exception:
        # A fault of ours, which must not take the rest of the batch with it.
        _log.exception("a request could not be read")
        return RequestError(500, "this request could not be read; the server's log has the reason")


_NO_FILE = (
    "the request carries no file. Send it as the raw body with 'Content-Type: application/octet-stream' "
    "(curl: -H 'Content-Type: application/octet-stream' --data-binary @FILE), or as the multipart form field "
    "'data' (curl: -F data=@FILE). A body sent without a content type is read as a form and lost."
)


def _refuse_lost_fields(fields: Mapping[str, Any], headers: Mapping[str, str]) -> None:
    # TorchServe keeps the last of several form fields of one name. That the others were sent shows in the length alone.
    if repeated := [name for name in ("files", "files[]") if name in fields]:
        raise RequestError(
            400,
            f"the field '{repeated[0]}' can carry only one file: of several fields with one name TorchServe delivers "
            "the last. Give each file a name of its own (curl: -F files.1=@FILE -F files.2=@FILE)",
        )
    sent = {name.lower(): value for name, value in headers.items()}
    if not sent.get("content-type", "").lower().startswith("multipart/form-data"):
        return
    if not re.fullmatch(r"[0-9]{1,18}", sent.get("content-length", "")):
        return
    arrived = sum(len(value) for value in fields.values() if isinstance(value, bytes | bytearray))
    if int(sent["content-length"]) - arrived > _PART_OVERHEAD * (len(fields) + 1):
        raise RequestError(
            400,
            f"of the form's {int(sent['content-length']):,} bytes only {arrived:,} arrived: of several fields with one "
            "name TorchServe delivers the last. Give each file a name of its own "
            "(curl: -F files.1=@FILE -F files.2=@FILE)",
        )
