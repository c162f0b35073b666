"""The gateway before a real TorchServe: which version answers whom, what is let in, and that nobody's request is lost."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import stat
import subprocess
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest
import requests
from google.protobuf import empty_pb2

from skewless.errors import ServerError, UsageError
from skewless.rollout import gateway as module
from skewless.rollout import run, state
from skewless.rollout.gateway import Gateway, Options, configuration
from skewless.torchserve import server as server_module
from skewless.torchserve.client import MESSAGES, SERVICE
from skewless.torchserve.server import Server
from tests.conftest import call_skewless
from tests.test_server import make_archive

# A handler that does what the first word of the file says, if its second word is this version.
ECHO = """
import hashlib, os, time

def handle(data, context):
    return None if data is None else [answer(fields, context, i) for i, fields in enumerate(data)]

def answer(fields, context, i):
    version = context.manifest["model"]["modelVersion"]
    file = bytes(fields.get("data", fields.get("body")) or b"")
    headers = {key.lower(): value for key, value in context.get_all_request_header(i).items()}
    word, asked, argument = (file[:500].decode("latin-1").split() + ["", "", ""])[:3]
    if word == "refuse":
        context.set_response_status(400, "Refused", i)
        return {"code": 400, "message": "refused"}
    if word == "long":
        return {"version": version, "long": "x" * int(argument)}
    if asked == version:
        if word == "wait":
            while not os.path.exists(argument):
                time.sleep(0.01)
        if word == "die":
            os._exit(1)
        if word == "die-once" and not os.path.exists(argument):
            open(argument, "w").close()
            os._exit(1)
    return {"version": version, "sha256": hashlib.sha256(file).hexdigest(), "id": headers.get("x-request-id")}
"""

needs_nginx = pytest.mark.skipif(
    shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") is None
    or not Path("/usr/lib/nginx/modules/ngx_http_lua_module.so").is_file(),
    reason="nginx or its Lua module is not installed: apt-get install nginx libnginx-mod-http-lua",
)
CALL = f"/{SERVICE}.InferenceAPIsService/Predictions"
MANAGEMENT = "/org.pytorch.serve.grpc.management.ManagementAPIsService/ListModels"


# --- without nginx ----------------------------------------------------------------------------------------------------


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The configuration that options give, on a machine with nginx."""
    monkeypatch.setattr(module, "_modules", lambda: [Path("/modules/ngx_http_lua_module.so")])
    return lambda state_dir="/srv/state", **options: configuration(Options(**options), Path(state_dir), 1_000_000)


def test_the_configuration_has_what_was_asked_for(written):
    plain = written()
    assert "@FOLDER@" not in plain and "@" not in plain.replace("@grpc_", "")
    assert "listen 127.0.0.1:8090;" in plain and "listen 127.0.0.1:7090 http2;" in plain
    assert "client_max_body_size 1000000;" in plain
    assert "multipart" not in plain and "limit_req" not in plain and "ssl" not in plain
    assert "keys = false" in plain and "hold_s = 30" in plain
    assert plain.count("        0.1% ") == 999

    full = written(
        host="::1",
        tls_cert=Path("/srv/cert.pem"),
        tls_key=Path("/srv/key.pem"),
        client_keys=Path("/srv/keys"),
        rate=2.5,
        multipart=True,
        hold_s=5,
    )
    assert "listen [::1]:8090 ssl;" in full and "listen [::1]:7090 ssl http2;" in full
    assert "ssl_certificate_key /srv/key.pem;" in full
    assert "limit_req_zone $http_authorization zone=clients:10m rate=150r/m;" in full
    assert "limit_req zone=clients burst=5 nodelay;" in full
    assert '"~*^multipart/form-data' in full and "keys = true" in full and "hold_s = 5" in full


@pytest.mark.parametrize("hostile", ["/srv/a b", "/srv/a;b", "/srv/$host", '/srv/"', "/srv/{", "/srv/a\nb", "/srv/#"])
def test_a_path_that_would_be_read_as_configuration_is_refused(written, hostile: str):
    with pytest.raises(UsageError, match="cannot stand in nginx's configuration"):
        written(state_dir=hostile)


def test_a_path_that_is_too_long_for_a_socket_is_refused(written):
    with pytest.raises(UsageError, match="too long a path"):
        written(state_dir="/" + "x" * 100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "example.org"}, "expected an address"),
        ({"host": "0.0.0.0"}, "lets other machines in"),
        ({"host": "192.0.2.7"}, "lets other machines in"),
        ({"port": 70000}, "expected 1 to 65535"),
        ({"port": 8090, "grpc_port": 8090}, "need a port each"),
        ({"rate": 0.0}, "expected 1/60 to 100,000"),
        ({"rate": math.nan}, "expected 1/60 to 100,000"),
        ({"hold_s": -1.0}, "expected 0 to 240"),
        ({"tls_cert": Path("cert.pem")}, "belong together"),
        ({"tls_cert": Path("none.pem"), "tls_key": Path("none.pem")}, "cannot be used for TLS"),
    ],
)
def test_options_that_make_no_gateway_are_refused(options: dict, message: str):
    with pytest.raises(UsageError, match=message):
        Options(**options).check()


def test_client_keys_are_read_hashed_or_plain(tmp_path: Path):
    file = tmp_path / "keys"
    file.write_text("# ours\n0123456789abcdef\n\nsha256:" + "ab" * 32 + "\n")
    options = Options(client_keys=file)
    with pytest.raises(UsageError, match="others may read"):
        options.key_digests()
    file.chmod(0o600)
    assert options.key_digests() == ["9f9f5111f7b27a781f1f1ddde5ebc2dd2b796bfc7365c9c28b548e564176929f", "ab" * 32]
    for text, message in (
        ("short", "line 1 is no key"),
        ("# none\n", "has no key"),
        ("a key with spaces", "is no key"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=message):
            options.key_digests()
    with pytest.raises(UsageError, match="cannot be read"):
        Options(client_keys=tmp_path / "none").key_digests()


def test_logs_are_rotated_by_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    told: list[signal.Signals] = []

    class Told:
        def tell(self, number: signal.Signals) -> None:
            told.append(number)

    monkeypatch.setattr(module, "LOG_BYTES", 10)
    (tmp_path / "gateway").mkdir()
    keeper = module._Keeper(tmp_path, None, Options(), Told())
    log = tmp_path / "gateway" / "access.jsonl"
    for round_ in range(6):
        log.write_text(f"{round_}" * 5)
        keeper._rotate()
        assert log.exists()
        log.write_text(f"{round_}" * 11)
        keeper._rotate()
        assert not log.exists()
    assert told == [signal.SIGUSR1] * 6
    kept = {file.name: file.read_text()[0] for file in log.parent.iterdir()}
    assert kept == {"access.jsonl.1": "5", "access.jsonl.2": "4", "access.jsonl.3": "3", "access.jsonl.4": "2"}


def test_without_nginx_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module.shutil, "which", lambda *_, **__: None)
    with pytest.raises(UsageError, match="apt-get install nginx libnginx-mod-http-lua"):
        module._nginx()


# --- a real nginx and a real TorchServe -------------------------------------------------------------------------------


@dataclass
class Answer:
    """What a caller of either protocol has of an answer. status: REST's; over gRPC, 200 or the name of its status."""

    status: int | str
    headers: dict[str, str]
    body: dict

    @property
    def arm(self) -> str:
        return self.headers["x-skewless-arm"]


class Callers:
    """Calls a gateway by REST and gRPC, over connections that are kept."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.session = requests.Session()
        self.session.trust_env = False
        size = [(f"grpc.max_{way}_message_length", 80 * 2**20) for way in ("send", "receive")]
        # A channel of its own: others of this process would share its connection.
        self.channel = grpc.insecure_channel(
            gateway.grpc_address, options=[*size, ("grpc.use_local_subchannel_pool", 1)]
        )

    def rest(self, file: bytes, version: str = "", headers: dict | None = None, model: str = "echo") -> Answer:
        path = "/".join(filter(None, ("predictions", model, version)))
        typed = {"Content-Type": "application/octet-stream"} | (headers or {})
        answer = self.session.post(f"{self.gateway.rest_url}/{path}", file, headers=typed, timeout=300)
        return Answer(answer.status_code, {key.lower(): value for key, value in answer.headers.items()}, answer.json())

    def grpc(self, file: bytes, version: str = "", headers: dict | None = None, model: str = "echo", **more) -> Answer:
        request = MESSAGES["PredictionsRequest"](model_name=model, model_version=version, input={"data": file})
        return self.raw(request.SerializeToString(), headers, **more)

    def raw(self, message: bytes, headers: dict | None = None, call: str = CALL, **more) -> Answer:
        ask = self.channel.unary_unary(call, None, MESSAGES["PredictionResponse"].FromString)
        metadata = [(key.lower(), value) for key, value in (headers or {}).items()]
        try:
            reply, done = ask.with_call(message, metadata=metadata, timeout=300, **more)
            return Answer(200, dict(done.initial_metadata()), json.loads(reply.prediction))
        except grpc.RpcError as error:
            return Answer(error.code().name, dict(error.initial_metadata() or ()), {"message": error.details()})

    def close(self) -> None:
        self.session.close()
        self.channel.close()


PLAIN = Options(port=0, grpc_port=0)


class Place:
    """A server with two versions of `echo`, and one gateway at a time."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.options: Options | None = None
        self.gateway: Gateway

    def open(self, options: Options = PLAIN) -> Gateway:
        if self.options != options:
            self.close()
            self.gateway, self.options = Gateway.start(self.server.state_dir, options), options
        return self.gateway

    def close(self) -> None:
        if self.options:
            self.gateway.stop()
        self.options = None

    def split(self, percent: float, shadow: bool = False) -> None:
        """Put a rollout in force, whatever there was before."""
        shutil.rmtree(self.server.state_dir / state.ROLLOUTS, ignore_errors=True)
        if percent or shadow:
            # A test before this one may have killed its worker.
            while any(row["workers"] != ["READY"] for row in self.server.models()):
                time.sleep(0.1)
            state.start(self.server, "echo", "2.0", percent, shadow, None)
        module.follow(self.server.state_dir)

    def log(self, identity: str, count: int) -> list[dict]:
        """The `count` lines of the access log about a request, once they are there."""
        deadline = time.monotonic() + 30
        while True:
            lines = [json.loads(line) for line in self.gateway.access_log.read_text().splitlines()]
            found = [line for line in lines if line["id"] == identity]
            if len(found) >= count or time.monotonic() > deadline:
                assert len(found) == count, found
                return found
            time.sleep(0.02)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("gateway")
    store = folder / "store"
    store.mkdir()
    server = Server.start(store, folder / "state", ports="free")
    try:
        for version in ("1.0", "2.0"):
            server.register(make_archive(store, version, ECHO))
        here = Place(server)
        try:
            yield here
        finally:
            here.close()
    finally:
        Server.attach(folder / "state").stop()


@pytest.fixture
def callers(place: Place) -> Iterator[Callers]:
    """Of the plain gateway, without a rollout."""
    calling = Callers(place.open())
    place.split(0)
    yield calling
    calling.close()


PROTOCOLS = ("rest", "grpc")


def within_binomial(count: int, of: int, probability: float) -> bool:
    """Whether a count is within four standard deviations: 1 in 16,000 right ones is not."""
    return abs(count - of * probability) <= 4 * math.sqrt(of * probability * (1 - probability))


def loss(place: Place, during: Callable[[], object], threads: int = 2) -> Counter:
    """Statuses of what callers of both protocols were answered while something happened. Each asks again and again."""
    ending = threading.Event()
    statuses: Counter = Counter()

    def ask(protocol: str, number: int) -> None:
        calling = Callers(place.gateway)
        client = {"X-Client-Id": f"{protocol}-{number}"}
        try:
            while not ending.is_set():
                try:
                    statuses[protocol, getattr(calling, protocol)(b"hello", headers=client).status] += 1
                except requests.RequestException as error:
                    statuses[protocol, type(error).__name__] += 1
        finally:
            calling.close()

    asking = [threading.Thread(target=ask, args=(protocol, i)) for protocol in PROTOCOLS for i in range(threads)]
    for each in asking:
        each.start()
    try:
        during()
    finally:
        ending.set()
        for each in asking:
            each.join()
    return statuses


def assert_nothing_lost(statuses: Counter) -> None:
    assert set(statuses) == {("rest", 200), ("grpc", 200)}, statuses


pytestmark = pytest.mark.chain


@needs_nginx
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_answer_says_which_version_and_arm_it_is_of(place: Place, callers: Callers, protocol: str):
    ask = getattr(callers, protocol)
    plain = ask(b"hello")
    assert (plain.status, plain.body["version"], plain.arm) == (200, "1.0", "baseline")
    assert "x-skewless-version" not in plain.headers
    other = ask(b"hello", version="2.0")
    assert (other.status, other.body["version"]) == (200, "2.0")
    assert (other.arm, other.headers["x-skewless-version"]) == ("explicit", "2.0")

    place.split(100)
    identity = f"mine-{protocol}:1"
    tried = ask(b"hello", headers={"X-Request-Id": identity, "X-Client-Id": "somebody"})
    assert (tried.status, tried.body["version"]) == (200, "2.0")
    assert (tried.arm, tried.headers["x-skewless-version"]) == ("candidate", "2.0")
    assert tried.headers["x-request-id"] == identity
    assert protocol == "grpc" or tried.body["id"] == identity
    # A version that is asked for stays what was asked for.
    assert ask(b"hello", version="1.0").body["version"] == "1.0"

    (line,) = place.log(identity, 1)
    assert {key: type(value) for key, value in line.items()} == {
        "time": float,
        "id": str,
        "client": str,
        "protocol": str,
        "model": str,
        "arm": str,
        "version": str,
        "status": int,
        "grpc_status": type(None) if protocol == "rest" else int,
        "request_s": float,
        "upstream_s": float,
        "bytes_in": int,
    }
    what = (line["protocol"], line["model"], line["arm"], line["version"], line["status"])
    assert what == (protocol, "echo", "candidate", "2.0", 200)
    assert abs(line["time"] - time.time()) < 60 and "somebody" not in json.dumps(line)


@needs_nginx
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_request_id_is_made_where_there_is_none_that_is_one(callers: Callers, protocol: str):
    ids = [
        getattr(callers, protocol)(b"hello", headers=given).headers["x-request-id"]
        for given in ({}, {"X-Request-Id": "a b"})
    ]
    assert len(set(ids)) == 2 and all(len(each) == 32 for each in ids)


@needs_nginx
def test_clients_are_split_in_proportion_and_stay_where_they_are(place: Place, callers: Callers):
    clients = [str(uuid.UUID(int=number)) for number in range(2000)]

    def arms(protocol: str, some: list[str]) -> dict[str, str]:
        with ThreadPoolExecutor(8) as pool:
            ask = getattr(callers, protocol)
            return dict(
                zip(some, pool.map(lambda client: ask(b"x", headers={"X-Client-Id": client}).arm, some), strict=True)
            )

    place.split(20)
    first = arms("rest", clients)
    assert within_binomial(Counter(first.values())["candidate"], 2000, 0.2), Counter(first.values())
    some = clients[:300]
    assert arms("rest", some) == arms("grpc", some) == {client: first[client] for client in some}
    # Upwards nobody goes back, and downwards nobody joins.
    place.split(40)
    more = arms("grpc", some)
    assert within_binomial(Counter(more.values())["candidate"], 300, 0.4)
    assert all(more[client] == "candidate" for client in some if first[client] == "candidate")
    place.split(0.1)
    assert within_binomial(Counter(arms("rest", some).values())["candidate"], 300, 0.001)


@needs_nginx
def test_a_client_is_its_header_else_its_cookie_else_its_address(place: Place, callers: Callers):
    place.split(50)
    for number in range(8):
        name = f"client-{number}"
        by_header = callers.rest(b"x", headers={"X-Client-Id": name}).arm
        assert callers.rest(b"x", headers={"Cookie": f"a=b; skewless_client={name}"}).arm == by_header
        assert callers.rest(b"x", headers={"X-Client-Id": name, "Cookie": "skewless_client=other"}).arm == by_header
    by_address = callers.rest(b"x", headers={"X-Client-Id": "127.0.0.1"}).arm
    assert callers.rest(b"x").arm == callers.grpc(b"x").arm == by_address


@needs_nginx
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_large_files_and_answers_arrive_whole(place: Place, callers: Callers, protocol: str):
    place.split(100)
    file = os.urandom(2**20) * 50
    assert getattr(callers, protocol)(file).body["sha256"] == hashlib.sha256(file).hexdigest()
    assert len(getattr(callers, protocol)(b"long any 5000000").body["long"]) == 5_000_000


@needs_nginx
def test_what_is_too_large_is_refused(callers: Callers):
    too_much = bytes(64 * 2**20 + 1)
    answer = callers.rest(too_much)
    assert (answer.status, answer.body["code"]) == (413, 413)
    assert callers.grpc(too_much).status == "RESOURCE_EXHAUSTED"
    assert callers.rest(b"x").status == callers.grpc(b"x").status == 200


@needs_nginx
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("waits", ["wait", "die"])
def test_the_shadow_delays_nobody(place: Place, callers: Callers, tmp_path: Path, protocol: str, waits: str):
    """The candidate waits for a file that is made when the callers have their answers, or dies of every request."""
    place.split(0, shadow=True)
    opened = tmp_path / "opened"
    ids = [f"{protocol}-{waits}-{number}" for number in range(4 if waits == "wait" else 1)]
    for identity in ids:
        answer = getattr(callers, protocol)(f"{waits} 2.0 {opened}".encode(), headers={"X-Request-Id": identity})
        assert (answer.status, answer.body["version"], answer.arm) == (200, "1.0", "baseline")
        assert not opened.exists()
    opened.touch()
    for identity in ids:
        answered, copied = sorted(place.log(identity, 2), key=lambda line: line["arm"])
        assert (answered["arm"], answered["version"], answered["status"]) == ("baseline", "1.0", 200)
        assert (copied["arm"], copied["version"], copied["client"]) == ("shadow", "2.0", answered["client"])
        well = (200, None) if protocol == "rest" else (200, 0)
        died = (500, None) if protocol == "rest" else (200, 13)
        assert (copied["status"], copied["grpc_status"]) == (well if waits == "wait" else died)


@needs_nginx
def test_nothing_else_is_reached(place: Place, callers: Callers):
    url, session = callers.gateway.rest_url, callers.session
    token = {"Authorization": f"Bearer {place.server.token('management')}"}
    paths = [
        "/",
        "/models",
        "/models/echo",
        "/token?type=inference",
        "/metrics",
        "/api-description",
        "/inside",
        "/copy/rest",
    ]
    paths += [
        "/predictions/",
        "/predictions/echo/1.0/more",
        "/predictions/..%2fmodels",
        "/torchserve/models",
        "/shadow/rest",
    ]
    paths += [
        "/explanations/echo",
        "/v1/models/echo:predict",
        "/grpc/predictions",
        "/grpc/torchserve/x",
        "/predictions/a%20b",
    ]
    for path in paths:
        for method in ("GET", "POST", "PUT", "DELETE"):
            answer = session.request(
                method, url + path, headers=token | {"Content-Type": "application/json"}, timeout=30
            )
            assert (answer.status_code, answer.json()["code"]) == (404, 404), (method, path)
    assert session.get(f"{url}/ping", timeout=30).json() == {"status": "Healthy"}
    assert session.get(f"{url}/predictions/echo", headers={"Content-Type": "audio/wav"}, timeout=30).status_code == 405
    assert callers.raw(b"", call=MANAGEMENT).status == "UNIMPLEMENTED"
    assert callers.raw(b"", call=f"/{SERVICE}.InferenceAPIsService/StreamPredictions").status == "UNIMPLEMENTED"
    ping = callers.channel.unary_unary(
        f"/{SERVICE}.InferenceAPIsService/Ping", None, MESSAGES["TorchServeHealthResponse"].FromString
    )
    assert json.loads(ping(empty_pb2.Empty().SerializeToString()).health) == {"status": "Healthy"}


@needs_nginx
@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        (None, 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=b", 415),
        ("MULTIPART/form-data; boundary=b", 415),
        ("text/plain", 415),
        ("audio/wav", 200),
        ("Application/JSON; charset=utf-8", 200),
        ("image/svg+xml", 200),
    ],
)
def test_forms_are_not_let_in(callers: Callers, content_type: str | None, status: int):
    assert callers.rest(b"a&a&a", headers={"Content-Type": content_type}).status == status


@needs_nginx
def test_refusals_of_the_model_pass_through(place: Place, callers: Callers):
    refused = callers.rest(b"refuse")
    assert (refused.status, refused.body) == (400, {"code": 400, "message": "refused"})
    assert callers.grpc(b"refuse").body == refused.body
    unknown = callers.rest(b"x", model="nobody")
    assert (unknown.status, unknown.body["message"]) == (404, "Model not found: nobody")
    assert callers.rest(b"x", version="9").status == 404
    assert callers.grpc(b"x", model="nobody").body["message"].startswith("Model not found: nobody")


@needs_nginx
def test_messages_that_are_none_are_refused(callers: Callers):
    whole = MESSAGES["PredictionsRequest"](model_name="echo", input={"data": b"x"}).SerializeToString()
    wrong = [
        b"",
        b"\x0a",
        b"\x0a\x7fecho",
        whole[:-1],
        b"\xff" * 20,
        whole + b"\x0b",
        b"\x0a\x04ec ho",
        b"\x0a\x06../../",
    ]
    # Length 2^35, a name with a line break, more fields than anybody has inputs.
    wrong += [b"\x0a\x80\x80\x80\x80\x80\x01x", b"\x0a\x06a\r\nb: c", whole + b"\x18\x01" * 5000]
    for message in wrong:
        assert callers.raw(message).status == "INVALID_ARGUMENT", message[:20]
    assert callers.grpc(bytes(5000), compression=grpc.Compression.Gzip).status == "UNIMPLEMENTED"
    # Fields in another order, and one that nobody knows.
    turned = whole[6:] + b"\x98\x06\x01" + whole[:6]
    assert callers.raw(turned).body["version"] == "1.0"


@needs_nginx
@pytest.mark.parametrize("name", ["a$host", "echo;return", 'echo"', "echo{}", "echo\nreturn", "échо", "a" * 5000])
def test_hostile_model_names_reach_no_configuration(place: Place, callers: Callers, name: str):
    assert callers.rest(b"x", model=name).status in (400, 404, 414)
    assert callers.grpc(b"x", model=name).status in ("INVALID_ARGUMENT", "INTERNAL")
    assert callers.rest(b"x").status == 200


@needs_nginx
def test_every_step_of_a_rollout_under_load_loses_nothing(place: Place, callers: Callers):
    percents = [5.0, 50.0, 25.0, 100.0, 0.1, 75.0] * 3

    def steps() -> None:
        place.split(0, shadow=True)
        for percent in percents:
            run.step(place.server.state_dir, "echo", percent, "test")
            time.sleep(0.1)
        run.abort(place.server.state_dir, "echo", "test")

    statuses = loss(place, steps)
    assert_nothing_lost(statuses)
    assert callers.rest(b"x").body["version"] == "1.0"


@needs_nginx
def test_a_step_holds_for_the_very_next_request(place: Place, callers: Callers):
    place.split(0, shadow=True)
    for percent, version in [(100.0, "2.0"), (0.0, "1.0")] * 10:
        run.step(place.server.state_dir, "echo", percent, "test")
        assert callers.rest(b"x").body["version"] == callers.grpc(b"x").body["version"] == version


@needs_nginx
def test_renewals_of_the_token_under_load_lose_nothing(place: Place, callers: Callers, monkeypatch: pytest.MonkeyPatch):
    place.split(50)
    tokens = set()

    def renew() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(server_module, "RENEW_BEFORE_S", 2 * 3600.0)
            for _ in range(40):
                tokens.add(place.server.token("inference"))
                time.sleep(0.05)

    statuses = loss(place, renew)
    assert_nothing_lost(statuses)
    assert len(tokens) == 40
    # Nobody outside ever has the token.
    for file in place.gateway.folder.glob("*"):
        assert file.is_dir() or stat.S_ISSOCK(file.stat().st_mode) or not tokens & set(file.read_text().split('"'))


@needs_nginx
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_request_whose_worker_dies_is_sent_again_once(place: Place, callers: Callers, tmp_path: Path, protocol: str):
    ask = getattr(callers, protocol)
    # Large enough for a file of nginx's.
    file = f"die-once 1.0 {tmp_path / 'died'} ".encode() + os.urandom(3_000_000)
    answer = ask(file)
    assert (answer.status, answer.body.get("sha256")) == (200, hashlib.sha256(file).hexdigest())
    assert (tmp_path / "died").exists()
    # One that kills every worker is given up.
    poison = ask(b"die 1.0 x")
    assert poison.status == (500 if protocol == "rest" else "INTERNAL")
    assert "Worker died." in poison.body["message"]
    assert ask(b"x").status == 200


@needs_nginx
def test_a_server_that_is_killed_and_started_anew_loses_nothing(place: Place):
    """On other ports, as `--ports free` has it. The gateway finds it again, and its versions are waited for."""
    # A machine may take its time: how long a start takes is not what is tested.
    place.open(Options(port=0, grpc_port=0, hold_s=240.0))
    place.split(50)

    def restart() -> None:
        place.server.process().kill()
        again = Server.start(place.server.model_store, place.server.state_dir, ports="free")
        assert again.inference_url != place.server.inference_url
        place.server = again
        for version in ("1.0", "2.0"):
            again.register(again.model_store / f"echo-{version}.mar")
        time.sleep(1.0)

    assert_nothing_lost(loss(place, restart, threads=1))


@needs_nginx
def test_whoever_looks_after_nginx_may_be_killed(place: Place, callers: Callers):
    def kill_and_start() -> None:
        psutil.Process(place.gateway.pid).kill()
        time.sleep(0.3)
        with pytest.raises(UsageError, match=r"nginx \(process \d+\) still answers"):
            Gateway.attach(place.server.state_dir)
        assert callers.rest(b"x").status == callers.grpc(b"x").status == 200
        rest, rpc = (int(each.rpartition(":")[2]) for each in (place.gateway.rest_url, place.gateway.grpc_address))
        again = Gateway.start(place.server.state_dir, Options(port=rest, grpc_port=rpc))
        assert (again.rest_url, again.grpc_address) == (place.gateway.rest_url, place.gateway.grpc_address)
        place.gateway = again

    kill_and_start()
    fresh = Callers(place.gateway)
    assert fresh.rest(b"x").status == fresh.grpc(b"x").status == 200
    fresh.close()

    psutil.Process(place.gateway.pid).kill()
    time.sleep(0.3)
    done = call_skewless("gateway", "stop", "--state-dir", place.server.state_dir)
    assert (done.returncode, done.stdout.startswith("stopped process")) == (0, True), done.stderr
    place.options = None
    assert not module.orphan(place.server.state_dir)


@needs_nginx
def test_a_server_that_stays_away_is_told_as_503(place: Place):
    place.open(Options(port=0, grpc_port=0, hold_s=0.2))
    calling = Callers(place.gateway)
    place.server.process().send_signal(signal.SIGKILL)
    psutil.wait_procs([psutil.Process(place.server.pid)] if psutil.pid_exists(place.server.pid) else [], timeout=10)
    try:
        answer = calling.rest(b"x")
        assert (answer.status, answer.headers["retry-after"]) == (503, "5")
        assert answer.body == {"code": 503, "message": "TorchServe does not answer; send the request again later"}
        assert calling.grpc(b"x").status == "UNAVAILABLE"
        assert calling.session.get(f"{place.gateway.rest_url}/ping", timeout=30).status_code == 503
    finally:
        calling.close()
        place.server = Server.start(place.server.model_store, place.server.state_dir, ports="free")
        for version in ("1.0", "2.0"):
            place.server.register(place.server.model_store / f"echo-{version}.mar")
        place.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    how = [
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
    ]
    named = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", key, "-out", cert]
    subprocess.run(["openssl", *how, *named], check=True, capture_output=True)
    return cert, key


@needs_nginx
@needs_nginx
def test_an_nginx_whose_process_id_is_lost_is_ended_too(tmp_path: Path):
    nginx = module._Nginx(tmp_path)
    nginx.configure(f"daemon off; pid {tmp_path}/nginx.pid; events {{}}")
    nginx.start()
    child = nginx._child
    (tmp_path / "nginx.pid").unlink()
    nginx.stop()
    assert child.poll() is not None


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed: apt-get install openssl")
def test_tls_keys_rates_and_forms_by_option(place: Place, certificate: tuple[Path, Path], tmp_path: Path):
    cert, key = certificate
    keys = tmp_path / "keys"
    keys.write_text("".join(f"our-client-key-000{number}\n" for number in range(1, 5)))
    keys.chmod(0o600)
    options = Options(port=0, grpc_port=0, tls_cert=cert, tls_key=key, client_keys=keys, rate=1 / 60, multipart=True)
    place.open(options)
    place.split(0)
    calling = Callers(place.gateway)
    calling.session.verify = str(cert)
    credentials = grpc.ssl_channel_credentials(cert.read_bytes())
    calling.channel = grpc.secure_channel(place.gateway.grpc_address, credentials)
    try:
        assert place.gateway.rest_url.startswith("https://")
        with pytest.raises(requests.exceptions.SSLError):
            requests.get(f"{place.gateway.rest_url}/ping", timeout=30)
        for wrong in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": f"Bearer {place.server.token('inference')}"},
        ):
            refused = calling.rest(b"x", headers=wrong)
            assert (refused.status, refused.body["code"], refused.headers["www-authenticate"]) == (401, 401, "Bearer")
            assert calling.grpc(b"x", headers=wrong).status == "UNAUTHENTICATED"
        first = {"Authorization": "Bearer our-client-key-0001"}
        statuses = Counter(calling.rest(b"x", headers=first).status for _ in range(12))
        assert statuses == {200: 2, 429: 10}
        second = {"Authorization": "Bearer our-client-key-0002"}
        assert calling.grpc(b"x", headers=second).status == 200
        form = calling.session.post(
            f"{place.gateway.rest_url}/predictions/echo", files={"data": b"x"}, headers=second, timeout=30
        )
        assert form.status_code == 200
        keys.write_text("our-client-key-0004\nour-client-key-0005\n")
        read, deadline = place.gateway.folder / "keys", time.monotonic() + 60
        while (
            hashlib.sha256(b"our-client-key-0005").hexdigest() not in read.read_text() and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        for number, status in ((3, "UNAUTHENTICATED"), (4, 200), (5, 200)):
            key_now = {"Authorization": f"Bearer our-client-key-000{number}"}
            assert calling.grpc(b"x", headers=key_now).status == status
        for each in ("our-client-key-0001", "our-client-key-0002"):
            assert each not in (place.gateway.folder / "keys").read_text() + place.gateway.access_log.read_text()
    finally:
        calling.close()
        place.close()


@needs_nginx
def test_a_second_gateway_and_a_taken_port_are_refused(place: Place, callers: Callers):
    running = place.gateway
    state_dir = place.server.state_dir
    again = call_skewless("gateway", "start", "--ports", "free", "--state-dir", state_dir)
    assert (again.returncode, f"(process {running.pid}, {running.rest_url})" in again.stderr) == (2, True), again.stderr
    shown = call_skewless("gateway", "status", "--state-dir", state_dir)
    assert (shown.returncode, running.rest_url in shown.stdout) == (0, True)

    place.close()
    assert call_skewless("gateway", "status", "--state-dir", state_dir).returncode == 1
    assert call_skewless("gateway", "stop", "--state-dir", state_dir).returncode == 2
    port = place.server.inference_url.rpartition(":")[2]
    with pytest.raises(ServerError, match="Address already in use"):
        Gateway.start(state_dir, Options(port=int(port), grpc_port=0))
    assert not [
        each for each in psutil.process_iter(["cmdline"]) if str(running.folder) in " ".join(each.info["cmdline"] or [])
    ]


@needs_nginx
def test_a_gateway_needs_a_server(tmp_path: Path):
    done = call_skewless("gateway", "start", "--ports", "free", "--state-dir", tmp_path / "state")
    assert (done.returncode, "no server is running" in done.stderr) == (2, True)
    assert not (tmp_path / "state").exists()
