"""Requests as they travel, byte for byte but for the token: how one is sent, kept in a file, and sent again."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import grpc

from skewless.core.files import atomic
from skewless.torchserve.client import HTTP_STATUS, MAX_MESSAGE_BYTES, MESSAGES, NOT_FOUND, SERVICE, Answer
from skewless.torchserve.server import Server

HTTP, GRPC = "HTTP", "gRPC"
GOOD = "good"
# Statuses of requests without an answer: the server gave none, or the caller left before it came.
NO_ANSWER, LEFT = 0, 499
# Longer than any answer may take: a batch has at most its responseTimeout, and few batches wait before one.
PATIENCE_S = 300.0
_PIECES = 12  # of a body that is sent slowly
_NOT_JSON = 0


@dataclass(frozen=True)
class Message:
    """One request.

    kind, group: such as "WAV: bits flipped" of "mutated files". model: whom it is for, by name.
    data: over HTTP the whole request without its Authorization line; over gRPC the serialized PredictionsRequest.
    seconds: over which the data are sent, in pieces; 0 sends them at once. HTTP only.
    stop_after: how many bytes are sent before the caller closes the connection and leaves; None waits for the answer.
    owed: whether the server owes an answer. It does not to a caller that breaks HTTP itself or sends more than it takes.
    refused: whether nothing but a refusal is right; a file named GOOD among several is answered all the same.
    """

    kind: str
    group: str
    model: str
    protocol: str
    data: bytes
    seconds: float = 0.0
    stop_after: int | None = None
    owed: bool = True
    refused: bool = False

    def write(self, folder: Path, name: str) -> None:
        """Write `name`.bin, exactly what is sent, and `name`.json with the rest, into `folder`."""
        known = {key: value for key, value in asdict(self).items() if key != "data"}
        with atomic(folder / f"{name}.bin") as unfinished:
            unfinished.write_bytes(self.data)
        with atomic(folder / f"{name}.json") as unfinished:
            unfinished.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Message:
        """The message whose two files `write` made; `path` is that of its .json. Raises ValueError for another one."""
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            return cls(**known, data=path.with_suffix(".bin").read_bytes())
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no kept request with its .bin file beside it: {error}") from error


def grpc_data(model: str, version: str, inputs: Mapping[str, bytes]) -> bytes:
    """A serialized PredictionsRequest."""
    return MESSAGES["PredictionsRequest"](model_name=model, model_version=version, input=inputs).SerializeToString()


class Wire:
    """Sends messages to one server. May be used by several threads; to be closed, or used in a `with` statement.

    url: of the inference API. token: asked for every message, as `Server.token`.
    """

    def __init__(self, url: str, grpc_address: str, token: Callable[[], str], patience_s: float = PATIENCE_S) -> None:
        parts = urlsplit(url)
        assert parts.hostname and parts.port
        self._address = (parts.hostname, parts.port)
        self._token = token
        self._patience_s = patience_s
        self._channel = grpc.insecure_channel(
            grpc_address, options=[("grpc.max_send_message_length", 2 * MAX_MESSAGE_BYTES)]
        )
        # As bytes, so that what is no message can be sent, too.
        self._predict = self._channel.unary_unary(f"/{SERVICE}.InferenceAPIsService/Predictions")

    @classmethod
    def to(cls, server: Server) -> Wire:
        """A wire to a server of ours."""
        return cls(server.inference_url, server.grpc_address, lambda: server.token("inference"))

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._channel.close()

    def send(self, message: Message) -> Answer:
        """Send it and wait for the answer. Its status is NO_ANSWER where none came and LEFT where the caller left; its body
        is the answer's JSON object, or `{"code": 0, "message": text}` for a text that is none. Never contains the token."""
        token = self._token()
        started = time.perf_counter()
        status, text = (self._http if message.protocol == HTTP else self._grpc)(message, token)
        return Answer(status, _body(text.replace(token.encode(), b"TOKEN")), time.perf_counter() - started)

    def _http(self, message: Message, token: str) -> tuple[int, bytes]:
        line = message.data.find(b"\r\n") + 2
        data = message.data[:line] + f"Authorization: Bearer {token}\r\n".encode() + message.data[line:]
        if message.stop_after is not None:
            data = data[: len(data) - len(message.data) + message.stop_after]
        try:
            with socket.create_connection(self._address, self._patience_s) as connection:
                # A server that refuses early closes while the rest is under way: its answer may be there all the same.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    _send_over(connection, data, message.seconds)
                if message.stop_after is not None:
                    # A reset, which is what the server sees of a program that was killed.
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return LEFT, b"{}"
                answer = http.client.HTTPResponse(connection)
                answer.begin()
                return answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            return NO_ANSWER, _said(f"{type(error).__name__}: {error}")

    def _grpc(self, message: Message, token: str) -> tuple[int, bytes]:
        # A gRPC caller leaves by its deadline.
        patience = self._patience_s if message.stop_after is None else 0.05
        try:
            reply = self._predict(message.data, metadata=[("authorization", f"Bearer {token}")], timeout=patience)
        except grpc.RpcError as error:
            words = error.details() or ""
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                return (NO_ANSWER, _said(words)) if message.stop_after is None else (LEFT, b"{}")
            text, _, kind = words.partition("\n")
            kind = kind.rpartition(".")[2]
            status = 404 if kind in NOT_FOUND else HTTP_STATUS.get(error.code(), 500)
            # What REST answers 400 to, such as no model's name, arrives as INTERNAL, too.
            status = 400 if "BadRequestException" in words else status
            return status, json.dumps({"code": status, "type": kind or error.code().name, "message": text}).encode()
        text = MESSAGES["PredictionResponse"].FromString(reply).prediction
        code = _body(text).get("code")
        return (200 if code in (None, _NOT_JSON) else int(code)), text


def is_json(answer: Answer) -> bool:
    """Whether the answer was a JSON object."""
    return answer.body.get("code") != _NOT_JSON


def _send_over(connection: socket.socket, data: bytes, seconds: float) -> None:
    if not seconds:
        connection.sendall(data)
        return
    size = max(1, -(-len(data) // _PIECES))
    for start in range(0, len(data), size):
        connection.sendall(data[start : start + size])
        time.sleep(seconds / _PIECES)


def _said(text: str) -> bytes:
    return json.dumps({"message": text}).encode()


def _body(text: bytes) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        body = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        body = None
    if isinstance(body, dict):
        return body
    return {"code": _NOT_JSON, "message": text[:1000].decode("utf-8", "replace")}
