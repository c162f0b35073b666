"""Other ways to serve the same model, for the serving benchmark: each a small server in a file of its own here.

A peer runs in an environment of its own, `runs/peers/NAME/environment`, made on first use from `NAME.txt` here. What the
running interpreter has (torch, and what the pipeline needs) is found there as well, behind the peer's own packages.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from benchmarks.peers.eager import FOLDER
from benchmarks.processes import stop_family
from skewless.torchserve.launch import free_ports, java_home
from skewless.torchserve.server import session

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENVIRONMENTS = ROOT / "runs" / "peers"
CORES = len(os.sched_getaffinity(0))


class PeerError(Exception):
    """A peer cannot be installed or started. The message says why."""


@dataclass(frozen=True)
class Start:
    """What a peer is started with. work: an empty folder for whatever it writes."""

    python: Path
    port: int
    work: Path


@dataclass(frozen=True)
class Peer:
    """One peer: how it is started, asked, and understood.

    settings: workers, batching and timeouts, and where they come from, for whoever reads the figures.
    command: its command line; the process stays in the foreground. ready: the path that answers 200 to GET once it serves.
    path, form_field: where an upload goes, as the file of this form field, or as the body where that is None.
    scores: the scores in the JSON of an answer.
    same_numbers: False for the one that computes the network's input differently.
    environment: variables added. networks: those it can run, by their names in model.yaml; empty for all.
    """

    name: str
    settings: str
    command: Callable[[Start], list[str]]
    ready: str
    path: str
    scores: Callable[[Any], list[float]]
    form_field: str | None = None
    same_numbers: bool = True
    environment: Callable[[], Mapping[str, str]] = dict
    networks: Sequence[str] = field(default=())


def _gunicorn(start: Start) -> list[str]:
    where = ["--bind", f"127.0.0.1:{start.port}", "--workers", str(GUNICORN_WORKERS), "--timeout", "120"]
    return [str(start.python), "-m", "gunicorn", "--no-control-socket", *where, "benchmarks.peers.documents:app"]


def _torchserve(start: Start) -> list[str]:
    store, config = start.work / "store", start.work / "config.properties"
    store.mkdir()
    pack = [str(start.python), "-m", "model_archiver.model_packaging", "--model-name", "plain", "--version", "1.0"]
    pack += ["--handler", str(HERE / "torchserve_plain.py"), "--export-path", str(store)]
    packed = subprocess.run(pack, capture_output=True, text=True, check=False)
    if packed.returncode != 0:
        raise PeerError(f"torch-model-archiver failed: {_last_lines(packed.stdout + packed.stderr)}")
    management, metrics, grpc_inference, grpc_management = free_ports(4)
    lines = [f"inference_address=http://127.0.0.1:{start.port}", f"management_address=http://127.0.0.1:{management}"]
    lines += [f"metrics_address=http://127.0.0.1:{metrics}", f"grpc_inference_port={grpc_inference}"]
    lines += [f"grpc_management_port={grpc_management}"]
    config.write_text("\n".join(lines) + "\n", encoding="utf-8")
    run = [str(start.python), "-m", "ts.model_server", "--start", "--foreground", "--ncs", "--disable-token-auth"]
    return [*run, "--model-store", str(store), "--models", "plain=plain.mar", "--ts-config", str(config)]


def _module(name: str) -> Callable[[Start], list[str]]:
    return lambda start: [str(start.python), "-m", f"benchmarks.peers.{name}", str(start.port)]


def _bentoml(start: Start) -> list[str]:
    where = ["--host", "127.0.0.1", "--port", str(start.port), "--timeout", "120"]
    return [str(start.python), "-m", "bentoml", "serve", "benchmarks.peers.bentoml:Recordings", *where]


# The description names no number, so it is gunicorn's advice (docs.gunicorn.org/en/stable/design.html, "How many workers?"),
# or that of the variable by which gunicorn is told another.
GUNICORN_WORKERS = int(os.environ.get("WEB_CONCURRENCY", 2 * CORES + 1))

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(
            "documents",
            f"gunicorn, {GUNICORN_WORKERS} sync workers (its advice is 2 x cores + 1), no batching",
            _gunicorn,
            ready="/health",
            path="/api/detect-cough",
            form_field="audio",
            scores=lambda body: [body["file_probability"]],
            same_numbers=False,
            networks=("attn_mil_resnet",),
        ),
        Peer(
            "torchserve_plain",
            f"TorchServe's defaults: {CORES} workers (one per core), batch size 1",
            _torchserve,
            ready="/ping",
            path="/predictions/plain",
            scores=lambda body: body["scores"],
            environment=lambda: {"JAVA_HOME": str(java_home())},
        ),
        Peer(
            "litserve",
            "1 worker, max_batch_size 8, batch_timeout 0.1 s, as its documentation's example",
            _module("litserve"),
            ready="/health",
            path="/predict",
            form_field="data",
            scores=lambda body: body["scores"],
        ),
        Peer(
            "bentoml",
            "1 worker, adaptive batching with its defaults: max_batch_size 100, max_latency_ms 60000",
            _bentoml,
            ready="/readyz",
            path="/predict",
            form_field="recordings",
            scores=lambda body: body[0]["scores"],
            environment=lambda: {"BENTOML_DO_NOT_TRACK": "True"},
        ),
        Peer(
            "ray_serve",
            f"1 replica of {CORES} processors, @serve.batch with its defaults: max_batch_size 10, wait 0.01 s",
            _module("ray_serve"),
            ready="/predict",
            path="/predict",
            scores=lambda body: body["scores"],
            environment=lambda: {"RAY_USAGE_STATS_ENABLED": "0"},
        ),
    )
}


@dataclass(frozen=True)
class Running:
    """A started peer. url: without a trailing slash."""

    peer: Peer
    process: subprocess.Popen
    url: str
    seconds_to_start: float

    def stop(self) -> None:
        """End the peer's processes, by their ids."""
        stop_family(self.process.pid)
        self.process.wait()


def install(name: str) -> Path:
    """The Python of a peer's environment, made anew where its packages or the running interpreter are others. Raises PeerError."""
    folder = ENVIRONMENTS / name / "environment"
    python, made_from = folder / "bin" / "python", folder / "made-from.txt"
    requirements = HERE / f"{name}.txt"
    site = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    wanted = "\n".join([sys.version, *site, requirements.read_text(encoding="utf-8")])
    if made_from.is_file() and made_from.read_text(encoding="utf-8") == wanted:
        return python
    if folder.exists():
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", str(folder)])
    found = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    # Python appends the lines of a .pth file to its path: what is installed here comes first. pip sees them, too, and does
    # not install what is there already.
    lines = "".join(f"{each}\n" for each in dict.fromkeys(site))
    Path(found.stdout.strip(), "running_interpreter.pth").write_text(lines, encoding="utf-8")
    _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(requirements)])
    made_from.write_text(wanted, encoding="utf-8")
    return python


def start(peer: Peer, archive: Path, work: Path, timeout: float = 180.0) -> Running:
    """Install a peer if need be, start it for an unpacked archive with an eager network, and return once it is ready.

    work: an empty folder. Raises PeerError with the reason, and then leaves no process behind.
    """
    python = install(peer.name)
    begun = time.monotonic()
    (port,) = free_ports(1)
    home = work / "home"
    home.mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}",
        # What it leaves in its user's home and in temporary folders goes with the work folder.
        "HOME": str(home),
        "TMPDIR": str(work),
        FOLDER: str(archive),
        **peer.environment(),
    }
    command = peer.command(Start(python, port, work))
    log = work / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=work,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    running = Running(peer, process, f"http://127.0.0.1:{port}", 0.0)
    try:
        with session() as connection:
            while not _answers(connection, running.url + peer.ready):
                if process.poll() is not None:
                    raise PeerError(f"ended with status {process.returncode}: {_last_lines(log.read_text())}")
                if time.monotonic() - begun > timeout:
                    raise PeerError(f"was not ready within {timeout:g} s: {_last_lines(log.read_text())}")
                time.sleep(0.2)
    except BaseException:
        running.stop()
        raise
    return Running(peer, process, running.url, time.monotonic() - begun)


def versions(name: str) -> list[str]:
    """The packages that a peer's requirements pin."""
    return (HERE / f"{name}.txt").read_text(encoding="utf-8").split("\n")[:-1]


def _answers(connection: requests.Session, url: str) -> bool:
    try:
        return connection.get(url, timeout=5.0).status_code == 200
    except requests.RequestException:
        return False


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PeerError(f"{' '.join(command[1:4])} failed: {_last_lines(done.stdout + done.stderr)}")


def _last_lines(text: str, count: int = 3) -> str:
    return " | ".join([line.strip() for line in text.splitlines() if line.strip()][-count:])[-600:]
