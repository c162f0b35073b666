"""One TorchServe 0.12: start it, find it again, stop it, and manage the models it serves.

Everything a server writes lies in its state directory (derived configuration, tokens, logs, process id, sockets,
unpacked archives), so servers with different state directories and ports do not know of each other.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import psutil
import requests

from skewless import resources
from skewless.core import load_error
from skewless.core.files import atomic
from skewless.errors import LoadError, ServerError, UsageError
from skewless.torchserve import launch
from skewless.torchserve.archive import name_and_version

CONFIG = resources.CONFIG

LOAD_ERRORS = "load-errors"  # in the state directory: why workers could not load an archive
RENEW_BEFORE_S = 60.0
LONGEST_SOCKET_PATH = 107  # bytes of sun_path on Linux, less the closing zero

TokenKind = Literal["inference", "management"]

# Servers that this process started, to be reaped when they end.
_CHILDREN: dict[int, subprocess.Popen] = {}


@dataclass(frozen=True)
class Server:
    """One running TorchServe. The URLs have no trailing slash; `grpc_address` is "host:port"."""

    state_dir: Path
    model_store: Path
    pid: int
    inference_url: str
    management_url: str
    metrics_url: str
    grpc_address: str

    @classmethod
    def start(
        cls,
        model_store: str | Path,
        state_dir: str | Path = ".server",
        config: str | Path = CONFIG,
        ports: launch.Ports = None,
        environment: Mapping[str, str] | None = None,
        timeout: float = 60.0,
    ) -> Server:
        """Start a server for the archives in `model_store`; return once it answers, with no model registered.

        `ports`: None for those in `config`, "free" for five free ones, or a mapping from names in launch.LISTENERS.
        `environment`: variables added for the server and its workers, such as OMP_NUM_THREADS.
        Raises UsageError for what the caller can mend, ServerError with the server's last words otherwise.
        """
        state_dir, model_store, config = Path(state_dir).resolve(), Path(model_store).resolve(), Path(config)
        if not model_store.is_dir():
            raise UsageError(f"{model_store}: no such model store; make the directory and put archives into it")
        if not config.is_file():
            raise UsageError(f"{config}: no such configuration file")
        properties = launch.with_ports(launch.read_properties(config), ports)
        if properties.get("disable_token_authorization", "false") != "false":
            raise UsageError(f"{config} disables token authorization; remove that line, tokens are required")
        temporary, logs, derived = state_dir / "tmp", state_dir / "logs", state_dir / "config.properties"
        if len(os.fsencode(temporary / ".ts.sock.99999")) > LONGEST_SOCKET_PATH:
            raise UsageError(f"{state_dir}: too long a path for the workers' sockets; choose a shorter one")

        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        state_dir.chmod(0o700)
        with _lock(state_dir):
            if (running := cls._read(state_dir)) and running.process():
                raise UsageError(
                    f"a server is already running in {state_dir} (process {running.pid}); stop it with "
                    f"`skewless serve stop --state-dir {state_dir}`"
                )
            _remove_leavings(state_dir)
            temporary.mkdir()
            logs.mkdir(exist_ok=True)
            (state_dir / LOAD_ERRORS).mkdir(exist_ok=True)
            derived.write_text("".join(f"{key}={value}\n" for key, value in properties.items()))
            with (logs / "console.log").open("wb") as console:
                child = subprocess.Popen(
                    launch.command(model_store, derived, temporary, properties.get("vmargs", "")),
                    cwd=state_dir,  # where TorchServe writes key_file.json and logs
                    env=launch.environment(
                        temporary, {**(environment or {}), load_error.FOLDER: str(state_dir / LOAD_ERRORS)}
                    ),
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    umask=0o077,
                )
            _CHILDREN[child.pid] = child
            grpc_host = properties.get("grpc_inference_address", "127.0.0.1")
            server = cls(
                state_dir=state_dir,
                model_store=model_store,
                pid=child.pid,
                inference_url=launch.client_host(properties["inference_address"]),
                management_url=launch.client_host(properties["management_address"]),
                metrics_url=launch.client_host(properties["metrics_address"]),
                grpc_address=launch.client_host(f"{grpc_host}:{properties['grpc_inference_port']}"),
            )
            server._write()
        try:
            server._wait_until_up(child, launch.ports_of(properties), timeout)
        except BaseException:
            server.stop()
            raise
        return server

    @classmethod
    def attach(cls, state_dir: str | Path = ".server") -> Server:
        """The server that runs in `state_dir`. Raises UsageError when none does."""
        state_dir = Path(state_dir).resolve()
        server = cls._read(state_dir)
        if server is None or server.process() is None:
            ended = "" if server is None else f" (process {server.pid} has ended, see {state_dir / 'logs'})"
            raise UsageError(
                f"no server is running in {state_dir}{ended}; start one with "
                f"`skewless serve start --state-dir {state_dir}`"
            )
        return server

    def process(self) -> psutil.Process | None:
        """Our process, or None when it has ended or its id has gone to another one."""
        try:
            process = psutil.Process(self.pid)
            ours = {launch.MAIN_CLASS, str(self.state_dir / "config.properties")} <= set(process.cmdline())
        except psutil.NoSuchProcess:
            return None
        return process if ours else None

    def stop(self, timeout: float = 30.0) -> None:
        """End the server and its workers, return when none is left; logs stay. Raises ServerError."""
        if process := self.process():
            family = [process, *process.children(recursive=True)]
            process.terminate()
            # A worker in a long computation notices only afterwards that its server is gone.
            for straggler in _wait_until_gone(family, timeout):
                with contextlib.suppress(psutil.NoSuchProcess):
                    straggler.kill()
            if left := _wait_until_gone(family, timeout):
                raise ServerError(f"processes {[each.pid for each in left]} do not end")
        if child := _CHILDREN.pop(self.pid, None):
            child.wait()
        with _lock(self.state_dir):
            # Unless another server has been started here in the meantime.
            if (found := self._read(self.state_dir)) is None or found.pid == self.pid:
                _remove_leavings(self.state_dir)

    def token(self, kind: TokenKind) -> str:
        """The token for one API, renewed when it expires within RENEW_BEFORE_S. Keep it out of
        logs: whoever has it can use that API until it expires."""
        # One caller renews while others wait: a renewal ends the token before it.
        with _lock(self.state_dir):
            if not (self.state_dir / "key_file.json").exists():
                raise ServerError("the server is still starting and has no tokens yet; try again in a few seconds")
            keys = json.loads((self.state_dir / "key_file.json").read_text())
            expires = datetime.fromisoformat(keys[kind]["expiration time"])
            if (expires - datetime.now(UTC)).total_seconds() < RENEW_BEFORE_S:
                answer = _send("GET", f"{self.management_url}/token", keys["API"]["key"], {"type": kind})
                if answer.status_code != 200:
                    raise ServerError(f"TorchServe did not renew the {kind} token: {_message(answer)}")
                keys = json.loads((self.state_dir / "key_file.json").read_text())
        return keys[kind]["key"]

    def status(self) -> dict:
        """Process id, addresses, TorchServe's word on its health, and `models()`."""
        health = _send("GET", f"{self.inference_url}/ping", self.token("inference"))
        return {
            "pid": self.pid,
            "health": health.json().get("status", _message(health)),
            "inference": self.inference_url,
            "management": self.management_url,
            "metrics": self.metrics_url,
            "grpc": self.grpc_address,
            "model_store": str(self.model_store),
            "models": self.models(),
        }

    def models(self) -> list[dict]:
        """Every registered version: its name, version, archive, workers' states, and whether it is the default."""
        rows = []
        for model in self.manage("GET", "/models").json()["models"]:
            path = f"/models/{model['modelName']}"
            default = self.manage("GET", path).json()[0]["modelVersion"]
            rows += [
                {
                    "name": version["modelName"],
                    "version": version["modelVersion"],
                    "default": version["modelVersion"] == default,
                    "archive": version["modelUrl"],
                    "workers": [worker["status"] for worker in version["workers"]],
                }
                for version in self.manage("GET", f"{path}/all").json()
            ]
        return rows

    def register(
        self, archive: str | Path, workers: int | None = None, default: bool = False, timeout: float = 600.0
    ) -> dict:
        """Load an archive from the model store; return its row of `models()` once all its workers are ready.

        A version that is registered already is not loaded again: with `default`, and nothing else, it becomes the default.
        `workers`: None for the archive's own setting. `default`: make this the version that unversioned requests
        get (a model's first version is in any case). A failure leaves the versions already serving as they are.
        Raises UsageError for a wrong archive or a version that is registered already; LoadError, with the handler's
        own message, when a worker could not load it, which is then unregistered again.
        """
        archive = Path(archive).resolve()
        name, version = name_and_version(archive)
        if archive.parent != self.model_store:
            raise UsageError(f"{archive} is not in the model store; put it into {self.model_store}")
        if workers is not None and workers < 1:
            raise UsageError(f"workers is {workers}; expected 1 or more")
        path = f"/models/{name}/{version}"
        # Asked beforehand: a registration that TorchServe refuses leaves its unpacked archive behind.
        if self.manage("GET", path, expect=(200, 404)).status_code == 200:
            if not default or workers is not None or self._row(name, version)["archive"] != archive.name:
                raise UsageError(
                    f"{name} {version} is registered already; build the archive with a new version, unregister this one, or "
                    "make it the default with nothing but --default"
                )
            self.set_default(name, version)
            return self._row(name, version)
        reason_file = load_error.path(self.state_dir / LOAD_ERRORS, name, version)
        reason_file.unlink(missing_ok=True)
        url = {"url": archive.name, "synchronous": "true"}
        answer = self.manage("POST", "/models", url, expect=None, timeout=timeout)
        if 400 <= answer.status_code < 500:
            raise UsageError(f"TorchServe refused {archive.name}: {_message(answer)}")
        if answer.status_code == 200 and workers is not None:
            # The archive's minWorkers wins over a registration's initial_workers, so scale afterwards.
            scale: dict[str, str | int] = {"min_worker": workers, "max_worker": workers, "synchronous": "true"}
            answer = self.manage("PUT", path, scale, expect=None, timeout=timeout)
        ready = answer.status_code == 200 and set(self._row(name, version)["workers"]) == {"READY"}
        if not ready:
            reason = load_error.read(reason_file) or (
                f"{_message(answer)}; the worker wrote down no reason: it was killed, or slower than its startupTimeout"
            )
            # TorchServe has removed the version itself after most exceptions, but not after a RuntimeError.
            self.manage("DELETE", path, expect=(200, 404))
            raise LoadError(reason)
        if default:
            self.set_default(name, version)
        return self._row(name, version)

    def set_default(self, name: str, version: str) -> None:
        """Make `version` the one that requests without a version get. Raises ServerError when it is unknown."""
        self.manage("PUT", f"/models/{name}/{version}/set-default")

    def unregister(self, name: str, version: str) -> None:
        """Remove one version. Raises ServerError when it is unknown, or the default one beside others."""
        self.manage("DELETE", f"/models/{name}/{version}")

    def manage(
        self,
        method: str,
        path: str,
        params: Mapping[str, str | int] | None = None,
        expect: tuple[int, ...] | None = (200,),
        timeout: float = 120.0,
    ) -> requests.Response:
        """Call the management API. Raises ServerError for a status outside `expect` (None: every status will do)."""
        answer = _send(method, self.management_url + path, self.token("management"), params, timeout)
        if expect is not None and answer.status_code not in expect:
            raise ServerError(f"{method} {path}: {_message(answer)}")
        return answer

    def _row(self, name: str, version: str) -> dict:
        return next(row for row in self.models() if (row["name"], row["version"]) == (name, version))

    def _wait_until_up(self, child: subprocess.Popen, ports: set[int], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not self._is_up(ports):
            ended = child.poll() is not None
            if ended or time.monotonic() > deadline:
                what = f"ended with status {child.returncode}" if ended else f"did not answer within {timeout:g} s"
                console = (self.state_dir / "logs" / "console.log").read_text().splitlines()
                words = [line for line in console if not line.startswith("\tat ")]
                raise ServerError("\n".join([f"TorchServe {what} while starting:", *words[-10:]]))
            time.sleep(0.1)

    def _is_up(self, ports: set[int]) -> bool:
        try:
            # That something answers is not enough: on a port that is taken, it would be another server.
            listening = psutil.Process(self.pid).net_connections("tcp")
            if not ports <= {each.laddr.port for each in listening if each.status == psutil.CONN_LISTEN}:
                return False
            answer = session().get(f"{self.inference_url}/ping", headers=bearer(self.token("inference")), timeout=5.0)
            return answer.ok
        except (psutil.NoSuchProcess, requests.RequestException):
            return False

    @classmethod
    def _read(cls, state_dir: Path) -> Server | None:
        file = state_dir / "state.json"
        if not file.exists():
            return None
        state = json.loads(file.read_text()) | {"state_dir": state_dir}
        state["model_store"] = Path(state["model_store"])
        return cls(**{field.name: state[field.name] for field in fields(cls)})

    def _write(self) -> None:
        state = asdict(self) | {"model_store": str(self.model_store)}
        del state["state_dir"]
        with atomic(self.state_dir / "state.json") as unfinished:
            unfinished.write_text(json.dumps(state, indent=2) + "\n")


def session() -> requests.Session:
    """A session that ignores proxies and ~/.netrc, which would take the place of the token."""
    new = requests.Session()
    new.trust_env = False
    return new


def bearer(token: str) -> dict[str, str]:
    """The header that carries a token."""
    return {"Authorization": f"Bearer {token}"}


def _send(
    method: str, url: str, token: str, params: Mapping[str, str | int] | None = None, timeout: float = 30.0
) -> requests.Response:
    try:
        with session() as connection:
            return connection.request(method, url, params=params, headers=bearer(token), timeout=timeout)
    except requests.RequestException as error:
        raise ServerError(f"{method} {url}: {error}") from error


def _message(answer: requests.Response) -> str:
    """What TorchServe says in an answer, success or not."""
    try:
        body = answer.json()
    except ValueError:
        return f"{answer.status_code} {answer.reason} {answer.text}".rstrip()
    return str(body.get("message") or body.get("status") or body) if isinstance(body, dict) else str(body)


@contextlib.contextmanager
def _lock(state_dir: Path) -> Iterator[None]:
    """Held by one thread of one process at a time, per state directory."""
    with (state_dir / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_leavings(state_dir: Path) -> None:
    """What an ended server leaves and the next must not find; TorchServe never removes unpacked archives."""
    for name in ("state.json", "key_file.json", "config.properties"):
        (state_dir / name).unlink(missing_ok=True)
    if (state_dir / "tmp").exists():
        shutil.rmtree(state_dir / "tmp")


def _wait_until_gone(processes: list[psutil.Process], timeout: float) -> list[psutil.Process]:
    """Those of `processes` that are left after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while (left := [process for process in processes if _is_alive(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _is_alive(process: psutil.Process) -> bool:
    try:
        # Where nobody reaps orphans (a container's first process), an ended one stays as a zombie.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
