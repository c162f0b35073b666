"""Call a TorchServe over REST and gRPC and get the same kind of answer from both."""

from __future__ import annotations

import base64
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import grpc
import requests
from google.protobuf import descriptor_pb2, descriptor_pool, empty_pb2, message_factory
from grpc_tools import protoc
from requests.adapters import HTTPAdapter

from skewless.torchserve.server import Server, bearer, session

PROTO = Path(__file__).resolve().parent / "inference.proto"
SERVICE = "org.pytorch.serve.grpc.inference"
MAX_MESSAGE_BYTES = 64 * 2**20  # max_request_size in config.properties; TorchServe only drops the call beyond it

# In the name of a form field these arrive as spaces or %22.
FORM_MANGLES = '",:;=\t\r\n'

# TorchServe's own table from HTTP to gRPC, read backwards; it uses INTERNAL for what is not in it.
HTTP_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 413,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
WORKER_DIED = "Worker died."
# What REST answers 404 to arrives as INTERNAL over gRPC.
NOT_FOUND = ("ModelNotFoundException", "ModelVersionNotFoundException")


@dataclass(frozen=True)
class Answer:
    """HTTP status (over gRPC: what REST would have said), JSON body, and seconds from sending to the last byte.

    A body that is not a JSON object, such as an error without one, becomes {"code": status, "message": text}; so do
    a server that cannot be reached (503) and one that does not answer in time (504).
    """

    status: int
    body: dict[str, Any]
    seconds: float


class Client:
    """`Client(server)`, or `Client(inference_url, grpc_address, token)` for a server known by its addresses only.

    `token("inference")` is called for every request and returns the key to send. May be used by several threads.
    """

    def __init__(
        self,
        server: Server | str,
        grpc_address: str | None = None,
        token: Callable[[Literal["inference"]], str] | None = None,
    ) -> None:
        self._server: Server | None = None
        if isinstance(server, Server):
            if grpc_address is not None or token is not None:
                raise ValueError("grpc_address and token come with the server; give them with an inference URL only")
            self._server, url, grpc_address, token = server, server.inference_url, server.grpc_address, server.token
        elif grpc_address is None or token is None:
            raise ValueError("an inference URL needs a grpc_address and a token function beside it")
        else:
            url = server.rstrip("/")
        self._url = url
        self._token: Callable[[Literal["inference"]], str] = token
        self._session = session()
        self._session.mount("http://", HTTPAdapter(pool_maxsize=64))
        self._channel = grpc.insecure_channel(
            grpc_address,
            options=[
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ],
        )
        self._ping = self._rpc("Ping", empty_pb2.Empty, MESSAGES["TorchServeHealthResponse"])
        self._predict = self._rpc("Predictions", MESSAGES["PredictionsRequest"], MESSAGES["PredictionResponse"])

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._session.close()
        self._channel.close()

    def predict_rest(
        self,
        model: str,
        payload: bytes,
        version: str | None = None,
        fields: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        multipart: bool = False,
        json_key: str | None = None,
        timeout: float = 120.0,
    ) -> Answer:
        """POST a file: as the body (application/octet-stream unless `headers` say otherwise), with `multipart` as the
        file `data` of a form beside `fields`, or with `json_key`, such as "image", in base64 under that key of a JSON
        object beside `fields`. `version` None asks for the default version.

        Raises ValueError for a form and JSON at once, and for fields without either.
        """
        if multipart and json_key:
            raise ValueError("multipart and json_key are two ways to send one file; choose one")
        if fields and not multipart and not json_key:
            raise ValueError("fields travel in a form or in JSON only; add multipart=True or a json_key")
        if multipart:
            how = _form({"data": payload}, fields)
        elif json_key:
            how = {"json": {json_key: _base64(payload)} | dict(fields or {})}
        else:
            how = {"data": payload, "headers": {"Content-Type": "application/octet-stream"}}
        return self._post(model, version, headers, timeout, how)

    def predict_batch_rest(
        self,
        model: str,
        files: Mapping[str, bytes],
        version: str | None = None,
        fields: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        as_json: bool = False,
        timeout: float = 120.0,
    ) -> Answer:
        """POST several files, each under the name that its answer gets: as the files `files.NAME` of a form, or in
        base64 in the JSON object `files`, beside `fields`.

        Raises ValueError for a name that would arrive as another one in a form.
        """
        if as_json:
            how = {"json": {"files": {name: _base64(data) for name, data in files.items()}} | dict(fields or {})}
        elif wrong := [name for name in files if set(name) & set(FORM_MANGLES) or name != name.rstrip()]:
            raise ValueError(
                f"TorchServe would read {wrong[0]!r} as another name (it replaces {FORM_MANGLES!r}, and cuts spaces at "
                "the end); choose one without, or as_json=True"
            )
        else:
            how = _form({f"files.{name}": data for name, data in files.items()}, fields)
        return self._post(model, version, headers, timeout, how)

    def predict_grpc(
        self,
        model: str,
        payload: bytes,
        version: str | None = None,
        inputs: Mapping[str, str | bytes] | None = None,
        timeout: float = 120.0,
    ) -> Answer:
        """Send a file as the input `data` beside `inputs`.

        TorchServe drops the status a handler sets when it answers over gRPC, so a body with an error's `code` gives
        the answer its status.
        """
        return self._predict_inputs(model, version, {"data": payload}, inputs, timeout)

    def predict_batch_grpc(
        self,
        model: str,
        files: Mapping[str, bytes],
        version: str | None = None,
        inputs: Mapping[str, str | bytes] | None = None,
        timeout: float = 120.0,
    ) -> Answer:
        """Send several files as the inputs `files.NAME` beside `inputs`; status as `predict_grpc`."""
        return self._predict_inputs(
            model, version, {f"files.{name}": data for name, data in files.items()}, inputs, timeout
        )

    def ping_rest(self, timeout: float = 30.0) -> Answer:
        """TorchServe's health: {"status": "Healthy"} when every model has a worker, or "Unhealthy"."""
        return self._authorised(lambda token: self._http("GET", "/ping", headers=bearer(token), timeout=timeout))

    def ping_grpc(self, timeout: float = 30.0) -> Answer:
        """As `ping_rest`."""
        return self._authorised(lambda token: self._call(self._ping, empty_pb2.Empty(), "health", token, timeout))

    def describe(self, model: str, version: str | None = None, customized: bool = True) -> dict:
        """What the management API knows of one version (None: the default one).

        `customized` asks the handler too; its answer is under "customizedMetadata". Raises ServerError.
        """
        path = f"/models/{model}" + (f"/{version}" if version else "")
        return self._known_server().manage("GET", path, {"customized": str(customized).lower()}).json()[0]

    def metrics(self) -> str:
        """All metrics in Prometheus' text format; this port asks for no token."""
        answer = self._session.get(f"{self._known_server().metrics_url}/metrics", timeout=30.0)
        answer.raise_for_status()
        return answer.text

    def _known_server(self) -> Server:
        if self._server is None:
            raise ValueError("this client knows the inference addresses only; make it with Client(server)")
        return self._server

    def _authorised(self, send: Callable[[str], Answer]) -> Answer:
        token = self._token("inference")
        answer = send(token)
        if "Token Authorization failed" in str(answer.body.get("message")):
            # Someone else may have renewed the token while the request was under way.
            renewed = self._token("inference")
            if renewed != token:
                answer = send(renewed)
        return answer

    def _post(
        self, model: str, version: str | None, headers: Mapping[str, str] | None, timeout: float, how: dict[str, Any]
    ) -> Answer:
        path = f"/predictions/{model}" + (f"/{version}" if version else "")
        sent = how.pop("headers", {}) | dict(headers or {})
        return self._authorised(
            lambda token: self._http("POST", path, headers=sent | bearer(token), timeout=timeout, **how)
        )

    def _predict_inputs(
        self,
        model: str,
        version: str | None,
        files: dict[str, bytes],
        inputs: Mapping[str, str | bytes] | None,
        timeout: float,
    ) -> Answer:
        named = {key: value.encode() if isinstance(value, str) else value for key, value in (inputs or {}).items()}
        request = MESSAGES["PredictionsRequest"](model_name=model, model_version=version or "", input=files | named)
        answer = self._authorised(lambda token: self._call(self._predict, request, "prediction", token, timeout))
        code = answer.body.get("code")
        return answer if code is None else Answer(int(code), answer.body, answer.seconds)

    def _http(self, method: str, path: str, **how: Any) -> Answer:
        started = time.perf_counter()
        try:
            answer = self._session.request(method, self._url + path, **how)
        except (requests.Timeout, requests.ConnectionError) as error:
            status = 504 if isinstance(error, requests.Timeout) else 503
            body = {"code": status, "type": type(error).__name__, "message": str(error)}
            return Answer(status, body, time.perf_counter() - started)
        seconds = time.perf_counter() - started
        return Answer(answer.status_code, _body(answer.content, answer.status_code, answer.reason), seconds)

    def _call(self, rpc: Callable, request: Any, field: str, token: str, timeout: float) -> Answer:
        started = time.perf_counter()
        try:
            reply = rpc(request, metadata=[("authorization", f"Bearer {token}")], timeout=timeout)
        except grpc.RpcError as error:
            seconds = time.perf_counter() - started
            # Details are a message and, on a line of its own, the name of a Java class.
            message, _, kind = (error.details() or error.code().name).partition("\n")
            kind = kind.rpartition(".")[2]
            status = 404 if kind in NOT_FOUND else HTTP_STATUS.get(error.code(), 500)
            # A worker that the kernel killed, for want of memory perhaps, is 507 to REST: no request was too large.
            status = 507 if (status, message) == (413, WORKER_DIED) else status
            return Answer(status, {"code": status, "type": kind or error.code().name, "message": message}, seconds)
        seconds = time.perf_counter() - started
        content = getattr(reply, field)
        return Answer(200, _body(content, 200, "OK"), seconds)

    def _rpc(self, name: str, request: Any, reply: Any) -> Callable:
        return self._channel.unary_unary(
            f"/{SERVICE}.InferenceAPIsService/{name}",
            request_serializer=request.SerializeToString,
            response_deserializer=reply.FromString,
        )


def _form(files: Mapping[str, bytes], fields: Mapping[str, str] | None) -> dict[str, Any]:
    # The file name is there for the parser, which takes a part without one for text; the handler never sees it.
    parts = {name: ("file", data, "application/octet-stream") for name, data in files.items()}
    return {"files": parts, "data": dict(fields or {})}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _body(content: bytes | str, status: int, reason: str) -> dict[str, Any]:
    try:
        body = json.loads(content)
    except ValueError:
        text = content if isinstance(content, str) else content.decode("utf-8", "replace")
        return {"code": status, "message": text or reason}
    return body if isinstance(body, dict) else {"code": status, "message": json.dumps(body)}


def _messages(proto: Path) -> dict[str, Any]:
    """The message classes of a .proto file by their short names.

    Compiled into a pool of its own, so neither the current directory nor sys.path nor another inference.proto matters.
    """
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder, "descriptors")
        with resources.as_file(resources.files("grpc_tools") / "_proto") as well_known:
            where = [f"-I{proto.parent}", f"-I{well_known}"]
            how = ["--include_imports", f"--descriptor_set_out={compiled}"]
            if protoc.main(["protoc", *where, *how, str(proto)]) != 0:
                raise RuntimeError(f"{proto} does not compile; protoc's message is above")
        files = descriptor_pb2.FileDescriptorSet.FromString(compiled.read_bytes()).file
    pool = descriptor_pool.DescriptorPool()
    for file in files:
        pool.Add(file)
    names = [f"{file.package}.{message.name}" for file in files for message in file.message_type]
    return {
        name.rpartition(".")[2]: message_factory.GetMessageClass(pool.FindMessageTypeByName(name)) for name in names
    }


MESSAGES = _messages(PROTO)
