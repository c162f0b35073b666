"""One TorchServe 0.12: start it, find it again, stop it, and manage the models it serves.

Everything a server writes lies in its state directory (derived configuration, tokens, logs, process id, sockets,
unpacked archives), so servers with different state directories and ports do not know of each other.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil
import requests

from skewless import resources
from skewless.core import load_error, telemetry
from skewless.core.files import atomic
from skewless.errors import LoadError, ServerError, UsageError
from skewless.torchserve import launch
from skewless.torchserve.archive import name_and_version
from skewless.torchserve.audit import AUDIT

if TYPE_CHECKING:
    from skewless.packaging.signing import TrustedKeys

CONFIG = resources.CONFIG

LOAD_ERRORS = "load-errors"  # in the state directory: why workers could not load an archive
JOURNAL = "journal"  # in the state directory: what workers answered
RENEW_BEFORE_S = 60.0
LONGEST_SOCKET_PATH = 107  # bytes of sun_path on Linux, less the closing zero
SOCKET = ".ts.sock."  # what the names of the workers' sockets start with, in the state directory's tmp

# A state directory has this file; without it nothing in a folder is ours to change or remove.
MARKER = ".skewless-server"
_MARKED = "A server of skewless keeps its state in this folder, and removes it from here when it stops.\n"
# How far a server in the foreground is, and the answers that a health check has found right.
PHASE, HEALTH = "phase", "health.json"
# What was registered, scaled and default; the last rollout of each model; the gateway's own folder.
RECORD, ROLLOUTS, GATEWAY = "versions.json", "rollouts", "gateway"
# What a server writes into its state directory.
_STATE, _KEYS, _DERIVED, _TEMPORARY = "state.json", "key_file.json", "config.properties", "tmp"
_WRITTEN = {
    *(_STATE, _KEYS, _DERIVED, _TEMPORARY, LOAD_ERRORS, PHASE, HEALTH, "logs", "lock", MARKER),
    *(AUDIT, RECORD, JOURNAL, ROLLOUTS, GATEWAY),
}

# For how long TorchServe may still be unpacking an archive whose registration nobody waits for any more.
WITHDRAW_S = 10.0

TokenKind = Literal["inference", "management"]

# Servers that this process started, to be reaped when they end.
_CHILDREN: dict[int, subprocess.Popen] = {}


@dataclass(frozen=True)
class Server:
    """One running TorchServe. The URLs have no trailing slash; `grpc_address` is "host:port". trusted_keys: a file or folder of
    public keys with which archives have to be signed; None where any archive may be registered."""

    state_dir: Path
    model_store: Path
    pid: int
    inference_url: str
    management_url: str
    metrics_url: str
    grpc_address: str
    trusted_keys: Path | None = None

    @classmethod
    def start(
        cls,
        model_store: str | Path,
        state_dir: str | Path = ".server",
        config: str | Path = CONFIG,
        ports: launch.Ports = None,
        environment: Mapping[str, str] | None = None,
        timeout: float = 60.0,
        trusted_keys: str | Path | None = None,
    ) -> Server:
        """Start a server for the archives in `model_store`; return once it answers, with no model registered.

        `ports`: None for those in `config`, "free" for five free ones, or a mapping from names in launch.LISTENERS.
        `environment`: variables added for the server and its workers, such as OMP_NUM_THREADS.
        `trusted_keys`: None for those in the environment variable SKEWLESS_TRUSTED_KEYS, if any. Where there are some, archives
        without their signature are neither registered nor loaded. They are read whenever something is verified.
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
        temporary, logs, derived = state_dir / _TEMPORARY, state_dir / "logs", state_dir / _DERIVED
        if len(os.fsencode(temporary / f"{SOCKET}99999")) > LONGEST_SOCKET_PATH:
            raise UsageError(f"{state_dir}: too long a path for the workers' sockets; choose a shorter one")
        keys = _checked_keys(trusted_keys or os.environ.get(launch.TRUSTED_KEYS))
        command = launch.command(
            model_store, derived, temporary, properties.get("vmargs", ""), verifying=keys is not None
        )
        extra = {
            telemetry.JOURNAL: str(state_dir / JOURNAL),
            **(environment or {}),
            load_error.FOLDER: str(state_dir / LOAD_ERRORS),
        }
        extra |= {launch.TRUSTED_KEYS: str(keys), launch.PYTHON: sys.executable} if keys else {}

        _claim(state_dir)
        with _told_if_unwritable(state_dir), _lock(state_dir):
            if (running := cls._read(state_dir)) and running.process():
                raise UsageError(
                    f"a server is already running in {state_dir} (process {running.pid}); stop it with "
                    f"`skewless serve stop --state-dir {state_dir}`"
                )
            _end_workers(state_dir)
            _remove_leavings(state_dir)
            temporary.mkdir()
            logs.mkdir(exist_ok=True)
            (state_dir / LOAD_ERRORS).mkdir(exist_ok=True)
            derived.write_text("".join(f"{key}={value}\n" for key, value in properties.items()))
            with (logs / "console.log").open("wb") as console:
                child = subprocess.Popen(
                    command,
                    cwd=state_dir,  # where TorchServe writes key_file.json and logs
                    env=launch.environment(temporary, extra),
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
                trusted_keys=keys,
            )
            try:
                server._write()
            except BaseException:
                # Nobody would find it again.
                child.kill()
                _CHILDREN.pop(child.pid).wait()
                raise
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
            ours = {launch.MAIN_CLASS, str(self.state_dir / _DERIVED)} <= set(process.cmdline())
        except psutil.NoSuchProcess:
            return None
        return process if ours else None

    def stop(self, timeout: float = 30.0) -> None:
        """End the server and its workers, return when none is left; logs stay. Raises ServerError."""
        process = self.process()
        family = _workers(self.state_dir, process)
        if process:
            family.append(process)
            with contextlib.suppress(psutil.NoSuchProcess):
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

    def workers(self) -> list[psutil.Process]:
        """The workers' processes, with all that they started."""
        return _workers(self.state_dir)

    def token(self, kind: TokenKind) -> str:
        """The token for one API, renewed when it expires within RENEW_BEFORE_S. Keep it out of
        logs: whoever has it can use that API until it expires. Raises ServerError."""
        # One caller renews while others wait: a renewal ends the token before it.
        with _lock(self.state_dir):
            if not (self.state_dir / _KEYS).exists():
                raise ServerError("the server is still starting and has no tokens yet; try again in a few seconds")
            keys = json.loads((self.state_dir / _KEYS).read_text())
            expires = datetime.fromisoformat(keys[kind]["expiration time"])
            if (expires - datetime.now(UTC)).total_seconds() < RENEW_BEFORE_S:
                self._check_room(kind)
                answer = _send("GET", f"{self.management_url}/token", keys["API"]["key"], {"type": kind})
                if answer.status_code != 200:
                    raise ServerError(f"TorchServe did not renew the {kind} token: {_message(answer)}")
                keys = json.loads((self.state_dir / _KEYS).read_text())
        return keys[kind]["key"]

    def _check_room(self, kind: TokenKind) -> None:
        """Raise ServerError where a renewed token could not be written."""
        # TorchServe keeps its keys in this one file, and empties it first: without room for the new ones, all would be lost, the
        # key that renews them too.
        try:
            with tempfile.TemporaryFile(dir=self.state_dir, buffering=0) as file:
                file.write(bytes(4096))
        except OSError as error:
            raise ServerError(
                f"the {kind} token has to be renewed, and {self.state_dir} cannot be written: {error.strerror}; make room there"
            ) from error

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
            found = [self.manage("GET", each, expect=(200, 404)) for each in (path, f"{path}/all")]
            # Someone may have unregistered it in between.
            if any(answer.status_code == 404 for answer in found):
                continue
            default = found[0].json()[0]["modelVersion"]
            rows += [
                {
                    "name": version["modelName"],
                    "version": version["modelVersion"],
                    "default": version["modelVersion"] == default,
                    "archive": version["modelUrl"],
                    "workers": [worker["status"] for worker in version["workers"]],
                }
                for version in found[1].json()
            ]
        return rows

    def register(
        self, archive: str | Path, workers: int | None = None, default: bool = False, timeout: float = 600.0
    ) -> dict:
        """Load an archive from the model store; return its row of `models()` once all its workers are ready.

        A version that is registered already is not loaded again: with `default`, and nothing else, it becomes the default.
        `workers`: None for the archive's own setting. `default`: make this the version that unversioned requests
        get (a model's first version is in any case). A failure leaves the versions already serving as they are.
        `timeout`: in seconds, for TorchServe's answer. A registration that takes longer, or is interrupted, is taken back.
        Raises UsageError for a wrong archive, one without a trusted signature where that is needed, or a version that is
        registered already; LoadError, with the handler's
        own message, when a worker could not load it, which is then unregistered again; ServerError when TorchServe did not
        answer.
        """
        archive = Path(archive).resolve()
        name, version = name_and_version(archive)
        if archive.parent != self.model_store:
            raise UsageError(f"{archive} is not in the model store; put it into {self.model_store}")
        if workers is not None and workers < 1:
            raise UsageError(f"workers is {workers}; expected 1 or more")
        if keys := self.required_keys():
            from skewless.packaging.signing import verify_archive

            verify_archive(archive, keys)
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
        try:
            self._load(archive, path, workers, reason_file, timeout)
            if default:
                self.set_default(name, version)
            return self._row(name, version)
        except LoadError:
            self.manage("DELETE", path, expect=(200, 404))
            raise
        except UsageError:
            raise
        except ServerError as error:
            raise ServerError(f"{error}; {self._withdraw(path)}") from error
        except BaseException:
            # Interrupted: TorchServe goes on with what it was asked for.
            self._withdraw(path)
            raise

    def scale(self, name: str, version: str, workers: int, timeout: float = 600.0) -> dict:
        """Give a version so many workers; return its row of `models()` once all of them are ready.

        One that fails leaves the version with as many as it had. Raises UsageError for less than one worker, LoadError, with
        the handler's own message, when a worker could not load the archive, ServerError for a version that is unknown, and
        when the workers are not ready within `timeout` seconds.
        """
        if workers < 1:
            raise UsageError(f"workers is {workers}; expected 1 or more")
        path = f"/models/{name}/{version}"
        (before,) = self.manage("GET", path).json()
        reason_file = load_error.path(self.state_dir / LOAD_ERRORS, name, version)
        reason_file.unlink(missing_ok=True)
        try:
            self._scale(path, workers, workers)
            self._wait_until_loaded(path, reason_file, time.monotonic() + timeout, workers)
        except BaseException:
            self._scale(path, before["minWorkers"], before["maxWorkers"])
            raise
        return self._row(name, version)

    def required_keys(self) -> TrustedKeys | None:
        """The keys of which one has to have signed an archive: the server's, or else those of this process's environment, or
        none. Raises UsageError where they cannot be read."""
        source = self.trusted_keys or os.environ.get(launch.TRUSTED_KEYS)
        if not source:
            return None
        from skewless.packaging.signing import TrustedKeys

        return TrustedKeys.read(source)

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

    def _load(self, archive: Path, path: str, workers: int | None, reason_file: Path, timeout: float) -> None:
        """Have TorchServe register an archive, and wait until its workers are ready. Raises as `register` does."""
        deadline = time.monotonic() + timeout
        # Not synchronous: TorchServe has few threads for its connections, those of inference too, and a registration that it
        # answers at its end holds one of them, with every connection that this thread serves.
        url = {"url": archive.name, "synchronous": "false"}
        answer = self.manage("POST", "/models", url, expect=None, timeout=timeout)
        if 400 <= answer.status_code < 500:
            raise UsageError(f"TorchServe refused {archive.name}: {_message(answer)}")
        if answer.status_code >= 500:
            raise LoadError(f"{_message(answer)}: {self._why_not_unpacked(archive)}")
        self._wait_until_loaded(path, reason_file, deadline)
        if workers is not None:
            # The archive's minWorkers wins over a registration's initial_workers, so scale afterwards.
            self._scale(path, workers, workers)
            self._wait_until_loaded(path, reason_file, deadline, workers)

    def _scale(self, path: str, least: int, most: int) -> None:
        """Ask for other numbers of workers, and do not wait for them."""
        bounds: dict[str, str | int] = {"min_worker": least, "max_worker": most, "synchronous": "false"}
        self.manage("PUT", path, bounds, expect=(200, 202))

    def _why_not_unpacked(self, archive: Path) -> str:
        """What TorchServe leaves out when it says that it failed to save a model."""
        with zipfile.ZipFile(archive) as mar:
            try:
                damaged = mar.testzip()
            except (zipfile.BadZipFile, zlib.error) as error:
                damaged = str(error)
            size = sum(member.file_size for member in mar.infolist())
        if damaged:
            return f"the archive is damaged ({damaged}); copy it again, or build it again"
        free = shutil.disk_usage(self.state_dir).free
        return f"it unpacks to {size / 1e6:.0f} MB, and the disk of {self.state_dir} has {free / 1e6:.0f} MB free"

    def _wait_until_loaded(self, path: str, reason_file: Path, deadline: float, workers: int | None = None) -> None:
        """Return when every worker of a version is ready. Raises LoadError when one is not going to be, ServerError after
        the deadline. workers: how many there have to be; None for as many as the archive asks for."""
        begun: dict[str, int] = {}
        while True:
            (model,) = self.manage("GET", path).json()
            wanted = model["minWorkers"] if workers is None else workers
            states = [worker["status"] for worker in model["workers"]]
            if wanted < 1:
                raise LoadError(
                    "its model-config.yaml asks for no worker; set minWorkers to 1 or more, and build it again"
                )
            if len(states) == wanted and set(states) == {"READY"}:
                return
            # A worker that ended is started anew, again and again.
            ended = any(
                begun.setdefault(worker["id"], worker["pid"]) != worker["pid"] or not psutil.pid_exists(worker["pid"])
                for worker in model["workers"]
                if worker["pid"] > 0
            )
            if reason := load_error.read(reason_file):
                raise LoadError(reason)
            if ended:
                raise LoadError("the worker wrote down no reason: it was killed, or slower than its startupTimeout")
            if time.monotonic() > deadline:
                raise ServerError(
                    f"registering {path.removeprefix('/models/')} timed out, {', '.join(states) or 'no worker'}"
                )
            time.sleep(0.1)

    def _withdraw(self, path: str) -> str:
        """Unregister a version whose registration nobody waits for any more; in words, whether that worked."""
        deadline = time.monotonic() + WITHDRAW_S
        try:
            # While TorchServe unpacks the archive, it knows nothing of the version yet.
            while self.manage("DELETE", path, expect=(200, 404)).status_code == 404:
                if time.monotonic() > deadline:
                    return "it was not registered"
                time.sleep(0.2)
        except ServerError as error:
            return f"unregistering it failed, too: {error}"
        return "it was unregistered again"

    def _row(self, name: str, version: str) -> dict:
        for row in self.models():
            if (row["name"], row["version"]) == (name, version):
                return row
        raise ServerError(f"{name} {version} is not registered any more")

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
        file = state_dir / _STATE
        if not file.exists():
            return None
        try:
            state = {"trusted_keys": None} | json.loads(file.read_text()) | {"state_dir": state_dir}
            state["model_store"] = Path(state["model_store"])
            state["trusted_keys"] = state["trusted_keys"] and Path(state["trusted_keys"])
            return cls(**{field.name: state[field.name] for field in fields(cls)})
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{file} is not what `skewless serve start` writes; choose another --state-dir, or remove the file"
            ) from error

    def _write(self) -> None:
        state = asdict(self) | {"model_store": str(self.model_store)}
        state["trusted_keys"] = self.trusted_keys and str(self.trusted_keys)
        del state["state_dir"]
        with atomic(self.state_dir / _STATE) as unfinished:
            unfinished.write_text(json.dumps(state, indent=2) + "\n")


def _checked_keys(source: str | Path | None) -> Path | None:
    """The absolute path of trusted keys that can be read; None where there are to be none. Raises UsageError."""
    if not source:
        return None
    from skewless.packaging.signing import TrustedKeys

    return TrustedKeys.read(Path(source).resolve()).source


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
    try:
        descriptor = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        # A disk that has become read-only stops neither a running server nor whoever needs its token.
        descriptor = os.open(state_dir / "lock", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _claim(state_dir: Path) -> None:
    """Make a state directory, or see that it is one. Raises UsageError for any other folder, and then changes nothing."""
    if state_dir.exists() and not state_dir.is_dir():
        raise UsageError(f"{state_dir} is a file; choose another --state-dir")
    with _told_if_unwritable(state_dir):
        found = {path.name for path in state_dir.iterdir()} if state_dir.exists() else set()
        # Servers of before the marker left just this behind, running or stopped.
        unmarked = {"lock", "logs", LOAD_ERRORS} <= found <= _WRITTEN
        if found and MARKER not in found and not unmarked:
            raise UsageError(
                f"{state_dir} holds files of others, such as {min(found - _WRITTEN or found)}, and a server's folder is made "
                "private and cleared; choose a new or an empty folder as --state-dir"
            )
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        state_dir.chmod(0o700)
        (state_dir / MARKER).write_text(_MARKED)


@contextlib.contextmanager
def _told_if_unwritable(state_dir: Path) -> Iterator[None]:
    """An OSError, such as of a full disk, as a UsageError that says what was to be written."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"the server's folder {state_dir} cannot be written: {error.strerror or error}; make room there, or choose another "
            "--state-dir"
        ) from error


def _remove_leavings(state_dir: Path) -> None:
    """What an ended server leaves and the next must not find; TorchServe never removes unpacked archives."""
    for name in (_STATE, _KEYS, _DERIVED, PHASE, HEALTH):
        (state_dir / name).unlink(missing_ok=True)
    if (state_dir / _TEMPORARY).exists():
        shutil.rmtree(state_dir / _TEMPORARY)


def _workers(state_dir: Path, server: psutil.Process | None = None) -> list[psutil.Process]:
    """The workers of a state directory, whether or not their server has ended, with all that they and `server` started."""
    # By their sockets: a server that ends meanwhile has no children any more.
    socket = str(state_dir / _TEMPORARY / SOCKET)
    found = {each.pid: each for each in psutil.process_iter() if _has_argument(each, socket)}
    for each in [*found.values(), *([server] if server else [])]:
        found |= {child.pid: child for child in _descendants(each)}
    return list(found.values())


def _has_argument(process: psutil.Process, start: str) -> bool:
    try:
        return any(argument.startswith(start) for argument in process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        # It has ended; workers are found by their sockets.
        return []


def _end_workers(state_dir: Path) -> None:
    """Kill workers whose server was killed: whoever waited for them has been told, and they hold memory."""
    orphans = _workers(state_dir)
    for orphan in orphans:
        with contextlib.suppress(psutil.NoSuchProcess):
            orphan.kill()
    _wait_until_gone(orphans, timeout=30.0)


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
