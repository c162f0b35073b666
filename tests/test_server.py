"""A real TorchServe with an echo archive: every path into it, every way it refuses, and what it leaves behind."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from skewless.errors import ServerError, UsageError
from skewless.packaging.build import copy_code
from skewless.torchserve import launch, server
from skewless.torchserve.client import Client
from skewless.torchserve.server import Server
from tests.conftest import ROOT, run_skewless

AUDIO = bytes(range(256)) * 100

ECHO = """
import hashlib, os

def handle(data, context):
    return None if data is None else [answer(fields, context, i) for i, fields in enumerate(data)]

def answer(fields, context, i):
    if context.get_request_header(i, "describe"):
        return {"python_path": os.environ["PYTHONPATH"]}
    audio = fields.get("data", fields.get("body"))
    if not audio:
        context.set_response_status(400, "Refused", i)
        return {"code": 400, "message": "the request carries no audio"}
    return {
        "version": context.manifest["model"]["modelVersion"],
        "type": type(audio).__name__,
        "sha256": hashlib.sha256(audio).hexdigest(),
        "threshold": bytes(fields.get("threshold", b"none")).decode(),
    }
"""

pytestmark = pytest.mark.chain


def own_network(folder: Path, statement: str) -> None:
    (folder / "network.py").write_text(
        "import os\nfrom skewless.core.networks import Network\n\nclass Fault(Network):\n"
        f'    """(N, 3) to (N, 1)."""\n    def __init__(self):\n        {statement}\n'
    )
    (folder / "model.yaml").write_text(
        "network: {network.py:Fault: {}}\nruntime: {eager: {}}\nprecision: {}\nlimits: {}\n"
        "postprocess: {label_threshold: {threshold: 0.5, classes: [a, b], positive_field: b}}\n"
    )
    (folder / "metrics.json").write_text("{}")


# The message, and what of an archive that would else load is broken so.
BROKEN = {
    "DefinitionError: ": lambda folder: (folder / "pipeline.yaml").unlink(),
    # TorchServe rethrows a RuntimeError as "500 - Unknown exception" and keeps the version registered.
    "RuntimeError: wrong weights": lambda folder: own_network(folder, "raise RuntimeError('wrong weights')"),
    # TorchServe then looks for a built-in handler of that name, and that is the last exception in its log.
    "ModuleNotFoundError: No module named 'missing_package'": lambda folder: edit(
        folder / "skewless" / "core" / "service.py", "import json\n", "import json\nimport missing_package\n"
    ),
    "the worker wrote down no reason": lambda folder: own_network(folder, "os._exit(3)"),
}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def make_broken(store: Path, breaking: Callable[[Path], object]) -> Path:
    """An archive `echo-broken.mar` of the product's own handler and a folder in which something is broken."""
    folder = store.parent / "broken"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    copy_code(folder)
    shutil.copy(ROOT / "archive" / "talent" / "pipeline.yaml", folder)
    shutil.copy(ROOT / "archive" / "talent" / "model.yaml", folder)
    breaking(folder)
    return pack(store, "broken", folder / "handler" / "entry.py", folder)


def make_archive(store: Path, version: str, code: str) -> Path:
    """An archive `echo-VERSION.mar` in `store` whose handler is `code`."""
    handler = store.parent / "echo_handler.py"
    handler.write_text(code)
    return pack(store, version, handler)


def pack(store: Path, version: str, handler: Path, extra: Path | None = None) -> Path:
    config = store.parent / "model-config.yaml"
    config.write_text("minWorkers: 1\nmaxWorkers: 1\nbatchSize: 1\nstartupTimeout: 30\n")
    command = [sys.executable, "-m", "model_archiver.model_packaging", "--model-name", "echo", "--version", version]
    command += ["--handler", handler, "--config-file", config, "--export-path", store.parent, "--force"]
    command += ["--extra-files", extra] if extra else []
    subprocess.run(command, check=True, capture_output=True)
    return (store.parent / "echo.mar").rename(store / f"echo-{version}.mar")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("server")
    store = folder / "store"
    store.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        # As a developer's shell may have it: the working tree before everything else.
        patch.setenv("PYTHONPATH", str(ROOT))
        started = Server.start(store, folder / "state", ports="free")
    try:
        started.register(make_archive(store, "1.0", ECHO))
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="module")
def client(running: Server):
    with Client(running) as client:
        yield client


def test_every_path_delivers_the_same_bytes(client: Client):
    expected = {"version": "1.0", "type": "bytearray", "sha256": hashlib.sha256(AUDIO).hexdigest()}
    plain, with_threshold = expected | {"threshold": "none"}, expected | {"threshold": "0.25"}
    fields = {"threshold": "0.25"}
    answers = {
        "raw": (client.predict_rest("echo", AUDIO), plain),
        "version": (client.predict_rest("echo", AUDIO, version="1.0"), plain),
        "form": (client.predict_rest("echo", AUDIO, multipart=True), plain),
        "form with a field": (client.predict_rest("echo", AUDIO, multipart=True, fields=fields), with_threshold),
        "gRPC": (client.predict_grpc("echo", AUDIO), plain),
        "gRPC version": (client.predict_grpc("echo", AUDIO, version="1.0"), plain),
        "gRPC with an input": (client.predict_grpc("echo", AUDIO, inputs=fields), with_threshold),
    }
    for path, (answer, body) in answers.items():
        assert (answer.status, answer.body) == (200, body), path


@pytest.mark.parametrize("content_type", ["audio/wav", "text/plain", "application/json"])
def test_a_body_stays_bytes_whatever_it_is_called(client: Client, content_type: str):
    answer = client.predict_rest("echo", b'{"a": 1}', headers={"Content-Type": content_type})
    assert (answer.status, answer.body["type"]) == (200, "bytearray")


def test_refusals_have_the_same_status_on_both_paths(client: Client):
    for answer in (client.predict_rest("echo", b""), client.predict_grpc("echo", b"")):
        assert (answer.status, answer.body["message"]) == (400, "the request carries no audio")
    for answer in (client.predict_rest("nobody", AUDIO), client.predict_grpc("nobody", AUDIO)):
        assert (answer.status, answer.body["message"]) == (404, "Model not found: nobody")
    for answer in (client.predict_rest("echo", AUDIO, version="9"), client.predict_grpc("echo", AUDIO, version="9")):
        assert (answer.status, answer.body["type"]) == (404, "ModelVersionNotFoundException")


def test_an_oversized_request_is_refused_and_the_server_stays_well(client: Client):
    too_much = bytes(64 * 2**20 + 1)
    assert client.predict_rest("echo", too_much).status == 413
    assert client.predict_grpc("echo", too_much).status == 413
    assert client.ping_rest().body == client.ping_grpc().body == {"status": "Healthy"}
    # Beyond the 50 MB that a handler accepts, so the refusal is the handler's.
    assert client.predict_rest("echo", bytes(51_000_000)).status == 200


def test_a_wrong_token_is_refused(running: Server):
    with Client(running.inference_url, running.grpc_address, lambda kind: "wrong") as stranger:
        rest, rpc = stranger.predict_rest("echo", AUDIO), stranger.predict_grpc("echo", AUDIO)
        assert (rest.status, rest.body["type"]) == (400, "InvalidKeyException")
        assert (rpc.status, rpc.body["type"]) == (403, "PERMISSION_DENIED")
        with pytest.raises(ValueError, match=r"Client\(server\)"):
            stranger.describe("echo")


def test_a_token_is_renewed_before_it_expires_and_stays_private(running: Server, client: Client, monkeypatch):
    old = {kind: running.token(kind) for kind in ("inference", "management")}
    assert old == {kind: running.token(kind) for kind in old}
    with monkeypatch.context() as patch:
        patch.setattr(server, "RENEW_BEFORE_S", 2 * 3600.0)
        new = {kind: running.token(kind) for kind in old}
    assert not set(old.values()) & set(new.values())
    assert client.predict_rest("echo", AUDIO).status == client.predict_grpc("echo", AUDIO).status == 200
    assert running.models()

    assert stat.S_IMODE(running.state_dir.stat().st_mode) == 0o700
    assert stat.S_IMODE((running.state_dir / "key_file.json").stat().st_mode) == 0o600
    logged = "".join(file.read_text(errors="replace") for file in (running.state_dir / "logs").iterdir())
    assert not [key for key in (*old.values(), *new.values()) if key in logged]


def test_a_request_survives_a_renewal_under_way(running: Server):
    tokens = iter(["outdated", running.token("inference")] * 2)
    with Client(running.inference_url, running.grpc_address, lambda kind: next(tokens)) as late:
        assert late.predict_rest("echo", AUDIO).status == late.predict_grpc("echo", AUDIO).status == 200


def test_archives_come_from_the_model_store_only(running: Server):
    archive = running.model_store / "echo-1.0.mar"
    for url in ("http://127.0.0.1:1/echo.mar", "HTTPS://127.0.0.1:1/echo.mar", f"file://{archive}"):
        with pytest.raises(ServerError, match="does not match any allowed URL"):
            running.manage("POST", "/models", {"url": url})
    with pytest.raises(ServerError, match="Relative path is not allowed"):
        running.manage("POST", "/models", {"url": f"../{archive.parent.name}/{archive.name}"})


def test_workers_see_the_archive_before_the_working_tree(client: Client):
    described = client.describe("echo")
    assert described["modelVersion"] == "1.0"
    assert str(ROOT) not in described["customizedMetadata"]["python_path"].split(os.pathsep)
    assert "customizedMetadata" not in client.describe("echo", "1.0", customized=False)


def test_metrics_are_in_prometheus_format(client: Client):
    assert client.predict_rest("echo", AUDIO, version="1.0").status == 200
    assert re.search(
        r'^ts_inference_requests_total\{model_name="echo",model_version="1\.0".*\} \d', client.metrics(), re.MULTILINE
    )


@pytest.mark.parametrize("reason", BROKEN)
def test_an_archive_that_does_not_load_leaves_the_old_version_serving(running: Server, client: Client, reason: str):
    archive = make_broken(running.model_store, BROKEN[reason])
    before = running.models()
    done = run_skewless("register", archive, "--default", "--state-dir", running.state_dir, check=False)
    assert done.returncode == 1, done.stderr
    assert reason in done.stderr.splitlines()[0]
    assert "Traceback" not in done.stderr
    assert running.models() == before
    assert client.predict_rest("echo", AUDIO).body["version"] == "1.0"


def test_a_new_version_becomes_the_default_only_when_asked(running: Server, client: Client):
    second = make_archive(running.model_store, "2.0", ECHO)
    done = run_skewless("register", second, "--state-dir", running.state_dir, check=False)
    assert (done.returncode, done.stdout) == (0, "echo 2.0 registered, not the default version, workers READY\n")
    assert client.predict_rest("echo", AUDIO).body["version"] == "1.0"
    assert client.predict_grpc("echo", AUDIO, version="2.0").body["version"] == "2.0"

    again = run_skewless("register", second, "--state-dir", running.state_dir, check=False)
    assert again.returncode == 2
    assert "echo 2.0 is registered already" in again.stderr
    switched = run_skewless("register", second, "--default", "--state-dir", running.state_dir, check=False)
    assert (switched.returncode, switched.stdout) == (0, "echo 2.0 registered, default version, workers READY\n")
    assert client.predict_rest("echo", AUDIO).body["version"] == "2.0"
    running.set_default("echo", "1.0")
    running.unregister("echo", "2.0")

    row = running.register(second, workers=2, default=True)
    assert (row["default"], row["workers"]) == (True, ["READY", "READY"])
    assert client.predict_rest("echo", AUDIO).body["version"] == "2.0"
    running.set_default("echo", "1.0")
    running.unregister("echo", "2.0")


def test_register_refuses_what_is_no_archive_of_the_store(running: Server, tmp_path: Path):
    stray = tmp_path / "echo-1.0.mar"
    stray.write_bytes((running.model_store / "echo-1.0.mar").read_bytes())
    broken = running.model_store / "broken.mar"
    broken.write_bytes(stray.read_bytes()[:100])
    for archive, reason in (
        (stray, "is not in the model store"),
        (broken, "is not a model archive"),
        (tmp_path / "none.mar", "no such archive"),
    ):
        done = run_skewless("register", archive, "--state-dir", running.state_dir, check=False)
        assert done.returncode == 2
        assert reason in done.stderr
    with pytest.raises(UsageError, match="workers is 0"):
        running.register(running.model_store / "echo-1.0.mar", workers=0)


def test_servers_live_side_by_side_and_leave_nothing_running(running: Server, tmp_path: Path):
    state = ["--state-dir", tmp_path / "state"]
    start = ["start", *state, "--model-store", running.model_store, "--ports", "free"]
    assert run_skewless("serve", "status", *state, check=False).returncode == 1
    assert run_skewless("serve", "stop", *state, check=False).returncode == 2

    done = run_skewless("serve", *start, check=False)
    assert done.returncode == 0, done.stderr
    second = Server.attach(tmp_path / "state")
    try:
        assert second.register(running.model_store / "echo-1.0.mar")["workers"] == ["READY"]
        with Client(second) as client:
            assert client.predict_rest("echo", AUDIO).status == 200
        shown = run_skewless("serve", "status", *state, check=False)
        assert (shown.returncode, "echo 1.0, default: workers READY" in shown.stdout) == (0, True)
        again = run_skewless("serve", *start, check=False)
        assert again.returncode == 2
        assert "is already running" in again.stderr
        assert "skewless serve stop --state-dir" in again.stderr

        processes = [second.process(), *second.process().children(recursive=True)]
        assert len(processes) == 2
    finally:
        done = run_skewless("serve", "stop", *state, check=False)
    assert done.returncode == 0, done.stderr
    assert not [each for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
    assert sorted(file.name for file in second.state_dir.iterdir()) == [
        ".skewless-server",
        "load-errors",
        "lock",
        "logs",
    ]
    assert running.status()["health"] == "Healthy"


def test_a_start_that_fails_says_why_and_leaves_nothing_running(running: Server, tmp_path: Path):
    with pytest.raises(UsageError, match="no such model store"):
        Server.start(tmp_path / "none", tmp_path / "state")
    with pytest.raises(UsageError, match="too long a path"):
        Server.start(running.model_store, tmp_path / ("x" * 100))
    ports = launch.with_ports(launch.read_properties(server.CONFIG), "free")
    free = {name: int(re.search(r"\d+$", ports[key]).group()) for name, key in launch.LISTENERS.items()}
    # gRPC opens last: until then the other server answers on its port.
    taken = free | {"grpc_inference": int(running.grpc_address.rpartition(":")[2])}
    with pytest.raises(ServerError, match=r"(?s)ended with status 1.*Failed to bind to address"):
        Server.start(running.model_store, tmp_path / "state", ports=taken)
    with pytest.raises(UsageError, match="no server is running"):
        Server.attach(tmp_path / "state")


def test_ports_are_taken_from_the_mapping(tmp_path: Path):
    properties = launch.read_properties(server.CONFIG)
    moved = launch.with_ports(properties, {"inference": 18080, "grpc_inference": 17070})
    changed = {key: value for key, value in moved.items() if properties[key] != value}
    assert changed == {"inference_address": "http://127.0.0.1:18080", "grpc_inference_port": "17070"}
    assert len(launch.ports_of(launch.with_ports(properties, "free"))) == 5
    with pytest.raises(UsageError, match="expected names from"):
        launch.with_ports(properties, {"rest": 1})
    with pytest.raises(UsageError, match="gives no port for metrics_address"):
        launch.with_ports(properties | {"metrics_address": "http://127.0.0.1"}, None)
    assert launch.client_host("http://0.0.0.0:8080") == "http://127.0.0.1:8080"
    assert launch.client_host("[::]:7070") == "127.0.0.1:7070"


def test_a_java_that_is_too_old_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    java.write_text(
        "#!/bin/sh\necho '    java.home = /old' >&2\necho '    java.specification.version = '$VERSION >&2\n"
    )
    java.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    monkeypatch.setenv("VERSION", "17")
    assert launch.java_home() == Path("/old")
    monkeypatch.setenv("VERSION", "1.8")
    assert (launch.java_home() / "bin" / "java").is_file()
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ServerError, match=r"Java 17 or later; found .*, version 1\. "):
        launch.java_home()
