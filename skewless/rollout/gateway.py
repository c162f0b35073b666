"""The gateway: nginx in front of one TorchServe, and what looks after it.

`run` starts nginx and stays with it: it renews TorchServe's token, tells nginx where TorchServe is and which rollouts
there are, and rotates the logs. nginx reads those two files for every request, so that a step of a rollout holds for the
very next one, and nothing is reloaded. deploy/gateway/README.md has the reasons.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import ipaddress
import json
import os
import re
import resource
import secrets
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import psutil

from skewless.core.files import atomic
from skewless.errors import ServerError, UsageError
from skewless.rollout.state import PARTS, exclusive, routes
from skewless.torchserve import launch
from skewless.torchserve.server import GATEWAY, LONGEST_SOCKET_PATH, Server

ACCESS_LOG = "access.jsonl"
TEMPLATE = Path(__file__).with_name("nginx.conf")

# Files in the gateway's folder that nginx.conf and gateway.lua know by these names.
_STATE, _PID, _ROUTES, _SERVER, _SECRET, _KEYS = "gateway.json", "nginx.pid", "routes", "server", "secret", "keys"
_SOCKET = "inside.sock"

LOG_BYTES = 64 * 2**20
LOGS_KEPT = 4
POLL_S = 0.5
# Between looks at the registered versions, and at the token.
LOOK_S = 2.0
# For how long a TorchServe that was started anew may take to have its versions back.
RETURN_S = 180.0
STOP_S = 30.0

_PLAIN_PATH = re.compile(r"[\w./+@,=-]+")
_KEY = re.compile(r"[A-Za-z0-9._~+/=-]{16,}")
_HASHED_KEY = re.compile(r"sha256:([0-9a-f]{64})")
# gRPC's statuses for what nginx itself refuses, and why.
_GRPC_ERRORS = {
    400: (3, "this is not a request that can be read"),
    401: (16, "send a key of yours as the metadata authorization: Bearer KEY"),
    404: (12, "the gateway knows no such call"),
    405: (12, "the gateway knows no such call"),
    413: (8, "the message is larger than the gateway takes"),
    415: (3, "this port speaks gRPC only"),
    429: (8, "too many requests a second; send it again later"),
    500: (13, "the gateway could not answer"),
    502: (14, "the gateway could not answer; send the request again later"),
    503: (14, "the gateway could not answer; send the request again later"),
    504: (4, "no answer came in time"),
}


@dataclass(frozen=True)
class Options:
    """How a gateway listens, and to whom.

    host: the address of both ports. port, grpc_port: 0 for a free one. tls_cert, tls_key: PEM files; both or none.
    client_keys: a file with a key in each line, as it is or as sha256:HEX; None lets everybody in. rate: requests a second of
    one client; None for any number. multipart: whether forms with files are let in. hold_s: for how long a request waits for a
    TorchServe that is away.
    """

    host: str = "127.0.0.1"
    port: int = 8090
    grpc_port: int = 7090
    tls_cert: Path | None = None
    tls_key: Path | None = None
    client_keys: Path | None = None
    rate: float | None = None
    multipart: bool = False
    hold_s: float = 30.0

    def check(self) -> None:
        """Raise UsageError for what nginx would not, or should not, do."""
        try:
            address = ipaddress.ip_address(self.host)
        except ValueError as error:
            raise UsageError(f"--host is {self.host!r}, expected an address such as 127.0.0.1 or 0.0.0.0") from error
        if not address.is_loopback and self.client_keys is None:
            raise UsageError(
                f"--host {self.host} lets other machines in; say which callers may ask with --client-keys FILE, a key in each "
                "line (`python -c 'import secrets; print(secrets.token_urlsafe(32))'` makes one)"
            )
        for name, port in (("--port", self.port), ("--grpc-port", self.grpc_port)):
            if not 0 <= port <= 65535:
                raise UsageError(f"{name} is {port}, expected 1 to 65535, or 0 for a free one")
        if self.port and self.port == self.grpc_port:
            raise UsageError(f"--port and --grpc-port are both {self.port}; REST and gRPC need a port each")
        if self.rate is not None and not 1 / 60 <= self.rate <= 100_000:
            raise UsageError(f"--rate is {self.rate:g}, expected 1/60 to 100,000 requests a second")
        if not 0 <= self.hold_s <= 240:
            raise UsageError(f"--hold is {self.hold_s:g}, expected 0 to 240 seconds")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise UsageError("--tls-cert and --tls-key belong together; give both, or none")
        if self.tls_cert and self.tls_key:
            try:
                ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
                    self.tls_cert, self.tls_key, password=_no_password
                )
            except (OSError, ssl.SSLError) as error:
                raise UsageError(
                    f"{self.tls_cert} and {self.tls_key} cannot be used for TLS: {error}; expected a certificate and its key, "
                    "without a password, as PEM"
                ) from error

    def key_digests(self) -> list[str] | None:
        """The SHA-256 of every client's key; None where no key is asked for. Raises UsageError for a wrong file."""
        if self.client_keys is None:
            return None
        try:
            text = self.client_keys.read_text(encoding="utf-8")
            exposed = self.client_keys.stat().st_mode & 0o077
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--client-keys {self.client_keys} cannot be read: {error}") from error
        digests = []
        for number, line in enumerate(text.splitlines(), 1):
            key = line.strip()
            if not key or key.startswith("#"):
                continue
            if hashed := _HASHED_KEY.fullmatch(key):
                digests.append(hashed[1])
            elif exposed:
                raise UsageError(
                    f"others may read the keys in {self.client_keys}; `chmod 600 {self.client_keys}`, or write them as sha256:HEX"
                )
            elif _KEY.fullmatch(key):
                digests.append(hashlib.sha256(key.encode()).hexdigest())
            else:
                raise UsageError(
                    f"{self.client_keys}: line {number} is no key; expected 16 or more letters, digits and . _ ~ + / = -, or "
                    "sha256: and 64 hexadecimal digits"
                )
        if not digests:
            raise UsageError(f"{self.client_keys} has no key; write one into each line")
        return digests

    @property
    def origin(self) -> str:
        """The host as it stands in a URL."""
        host = "127.0.0.1" if self.host == "0.0.0.0" else "::1" if self.host == "::" else self.host
        return f"[{host}]" if ":" in host else host


@dataclass(frozen=True)
class Gateway:
    """One running gateway. pid: of the process that looks after nginx. rest_url has no trailing slash."""

    state_dir: Path = field(repr=False)
    pid: int
    rest_url: str
    grpc_address: str
    tls: bool

    @property
    def folder(self) -> Path:
        """Where it keeps everything."""
        return self.state_dir / GATEWAY

    @property
    def access_log(self) -> Path:
        """One JSON object for each request."""
        return self.folder / ACCESS_LOG

    @classmethod
    def start(cls, state_dir: str | Path, options: Options, timeout: float = 30.0) -> Gateway:
        """Start a gateway in the background; return once it listens.

        Raises UsageError for what the caller can mend, ServerError with the gateway's last words otherwise.
        """
        state_dir = Path(state_dir).resolve()
        # In this process first, where what is wrong can be told.
        _prepared(state_dir, options)
        folder = state_dir / GATEWAY
        console = folder / "console.log"
        with console.open("wb") as output:
            child = subprocess.Popen(
                [sys.executable, "-m", "skewless", "gateway", "run", *_arguments(state_dir, options)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=Path(__file__).resolve().parents[2],
            )
        deadline = time.monotonic() + timeout
        while True:
            found = cls._read(state_dir)
            if found and found.pid == child.pid and found.process():
                return found
            if child.poll() is not None or time.monotonic() > deadline:
                child.kill()
                child.wait()
                words = console.read_text(errors="replace").strip().splitlines()
                raise ServerError("\n".join(["the gateway ended while starting:", *words[-10:]]))
            time.sleep(0.05)

    @classmethod
    def attach(cls, state_dir: str | Path) -> Gateway:
        """The gateway that runs in `state_dir`. Raises UsageError when none does."""
        state_dir = Path(state_dir).resolve()
        found = cls._read(state_dir)
        if found and found.process():
            return found
        if (nginx := orphan(state_dir)) is not None:
            raise UsageError(
                f"nginx (process {nginx.pid}) still answers for {state_dir}, but the process that looks after it has ended; "
                "`skewless gateway start`, with the same options, takes it over, and `skewless gateway stop` ends it"
            )
        ended = "" if found is None else f" (process {found.pid} has ended, see {state_dir / GATEWAY / 'console.log'})"
        raise UsageError(
            f"no gateway is running in {state_dir}{ended}; start one with `skewless gateway start --state-dir {state_dir}`"
        )

    def process(self) -> psutil.Process | None:
        """The process that looks after nginx, or None when it has ended or its id has gone to another one."""
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            process = psutil.Process(self.pid)
            line = process.cmdline()
            if process.status() != psutil.STATUS_ZOMBIE and {"gateway", "run"} <= set(line):
                return process
        return None

    def stop(self, timeout: float = STOP_S + 15) -> None:
        """End the gateway once the requests under way are answered. Raises ServerError."""
        process = self.process()
        if process:
            process.terminate()
            try:
                process.wait(timeout)
            except psutil.TimeoutExpired as error:
                raise ServerError(f"process {self.pid} does not end, see {self.folder / 'console.log'}") from error

    @classmethod
    def _read(cls, state_dir: Path) -> Gateway | None:
        try:
            found = json.loads((state_dir / GATEWAY / _STATE).read_text())
            return cls(state_dir, **{each.name: found[each.name] for each in fields(cls) if each.name != "state_dir"})
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            file = state_dir / GATEWAY / _STATE
            raise UsageError(f"{file} is not what `skewless gateway` writes; remove it") from error

    def write(self) -> None:
        """Say where it is."""
        state = asdict(self)
        del state["state_dir"]
        with atomic(self.folder / _STATE) as unfinished:
            unfinished.write_text(json.dumps(state, indent=2) + "\n")


def run(state_dir: str | Path, options: Options, started: Callable[[Gateway], None]) -> None:
    """Be the gateway, until SIGTERM or SIGINT; `started` is called once it listens. SIGHUP reads the certificate again.

    Where the process that looked after a running nginx was killed, this one takes its place, and no connection is lost.
    Raises UsageError for what the caller can mend, ServerError when nginx ends.
    """
    state_dir = Path(state_dir).resolve()
    server = _prepared(state_dir, options)
    folder = state_dir / GATEWAY
    running = f"a gateway is running in {state_dir}; stop it with `skewless gateway stop --state-dir {state_dir}`"
    with exclusive(folder / "lock", running):
        nginx = _Nginx(folder)
        if options.port == 0 or options.grpc_port == 0:
            free = iter(launch.free_ports(2))
            options = Options(
                **{**vars(options), "port": options.port or next(free), "grpc_port": options.grpc_port or next(free)}
            )
        nginx.configure(configuration(options, state_dir, _max_body(server)))
        keeper = _Keeper(state_dir, server, options, nginx)
        keeper.look()
        ending: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda received, _: ending.append(received))
        signal.signal(signal.SIGHUP, lambda *_: nginx.tell(signal.SIGHUP))
        nginx.start()
        gateway = Gateway(
            state_dir,
            os.getpid(),
            f"{'https' if options.tls_cert else 'http'}://{options.origin}:{options.port}",
            f"{options.origin}:{options.grpc_port}",
            options.tls_cert is not None,
        )
        try:
            gateway.write()
            started(gateway)
            while not ending:
                if not nginx.process():
                    raise ServerError(f"nginx has ended: {nginx.last_words()}")
                keeper.look()
                time.sleep(POLL_S)
        finally:
            nginx.stop()
            (folder / _STATE).unlink(missing_ok=True)


def orphan(state_dir: Path) -> psutil.Process | None:
    """A gateway's nginx whose other process has been killed."""
    found = Gateway._read(state_dir)
    return None if found is None or found.process() else _nginx_of(state_dir / GATEWAY)


def stop(state_dir: str | Path) -> int:
    """End the gateway of a state directory, also where only its nginx is left, once the requests under way are answered.

    Returns its process id. Raises UsageError where none runs, ServerError where it does not end.
    """
    state_dir = Path(state_dir).resolve()
    if (nginx := orphan(state_dir)) is not None:
        _Nginx(state_dir / GATEWAY).stop()
        (state_dir / GATEWAY / _STATE).unlink(missing_ok=True)
        return nginx.pid
    running = Gateway.attach(state_dir)
    running.stop()
    return running.pid


def follow(state_dir: Path) -> None:
    """Have the gateway follow the rollouts as they are now, from its next request on."""
    folder = state_dir / GATEWAY
    if folder.is_dir():
        # Whoever comes later has read what is newer.
        with _waiting(folder / "routes.lock"):
            _replace(folder / _ROUTES, routes(state_dir))


def configuration(options: Options, state_dir: Path, max_body: int) -> str:
    """nginx's configuration. No name of a model, a version or a client is in it. Raises UsageError for a path that it could
    not be written with."""
    folder = state_dir / GATEWAY
    code = TEMPLATE.parent
    for path in (folder, code, options.tls_cert, options.tls_key):
        if path and not _PLAIN_PATH.fullmatch(str(path.absolute())):
            raise UsageError(
                f"{path} cannot stand in nginx's configuration; choose a path of letters, digits and . _ - + @ , ="
            )
    if len(os.fsencode(folder / _SOCKET)) > LONGEST_SOCKET_PATH:
        raise UsageError(f"{state_dir}: too long a path for the gateway's socket; choose a shorter one")
    host = f"[{options.host}]" if ":" in options.host else options.host
    tls, listen_tls = [], ""
    if options.tls_cert and options.tls_key:
        listen_tls = " ssl"
        tls = [
            f"        ssl_certificate {options.tls_cert.absolute()};",
            f"        ssl_certificate_key {options.tls_key.absolute()};",
            "        ssl_protocols TLSv1.2 TLSv1.3;",
            "        ssl_session_cache shared:tls:1m;",
            "        ssl_session_tickets off;",
        ]
    limit = f"            limit_req zone=clients burst={max(1, round(2 * (options.rate or 0)))} nodelay;"
    # Whoever may choose its key chooses none, so it counts by the key that it is let in with, or by its address.
    counted = "$http_authorization" if options.client_keys else "$binary_remote_addr"
    values = {
        "USER": "user root;" if os.geteuid() == 0 else "",
        # A request takes up to six connections: in, inside, to TorchServe, and those of its copy.
        "FILES": str(min(16384, resource.getrlimit(resource.RLIMIT_NOFILE)[1])),
        "WORKERS": str(min(4, len(os.sched_getaffinity(0)))),
        "FOLDER": str(folder),
        "MODULES": "\n".join(f"load_module {path};" for path in _modules()),
        "MAX_BODY": str(max_body),
        "CODE": str(code),
        "TOKEN_FILE": str(state_dir / "key_file.json"),
        "HOLD_S": f"{options.hold_s:g}",
        "KEYS": "true" if options.client_keys else "false",
        "MULTIPART": r'        "~*^multipart/form-data\s*;" 1;' if options.multipart else "",
        "OR_MULTIPART": ", or as multipart/form-data" if options.multipart else "",
        "RATE": f"{options.rate or 0:g}",
        "RATE_ZONE": (
            f"    limit_req_zone {counted} zone=clients:10m rate={round(60 * options.rate)}r/m;\n    limit_req_status 429;"
            if options.rate
            else ""
        ),
        "RATE_LIMIT": limit if options.rate else "",
        "REST_LISTEN": f"{host}:{options.port}{listen_tls}",
        "GRPC_LISTEN": f"{host}:{options.grpc_port}{listen_tls} http2",
        "TLS": "\n".join(tls),
        "GRPC_ERRORS": _grpc_errors(),
        "THOUSANDTHS": "".join(f"        {100 / PARTS:g}% {part};\n" for part in range(PARTS - 1))
        + f"        * {PARTS - 1};",
    }
    return re.sub(r"@([A-Z_]+)@", lambda found: values[found[1]], TEMPLATE.read_text(encoding="utf-8"))


class _Nginx:
    """The nginx of a gateway's folder, whoever started it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._command = [_nginx(), "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
        self._child: subprocess.Popen | None = None

    def configure(self, text: str) -> None:
        """Write the configuration. Raises UsageError for one that nginx refuses, with its words."""
        with atomic(self._folder / "nginx.conf") as unfinished:
            unfinished.write_text(text, encoding="utf-8")
        done = subprocess.run([*self._command, "-t"], capture_output=True, text=True, check=False)
        if done.returncode:
            raise UsageError(f"nginx does not take the gateway's configuration: {done.stderr.strip()}")

    def start(self) -> None:
        """Run it, or have one that runs already read the configuration. Raises ServerError with its words if it ends."""
        if running := self.process():
            running.send_signal(signal.SIGHUP)
            return
        (self._folder / _PID).unlink(missing_ok=True)
        # A socket that a killed nginx left behind.
        (self._folder / _SOCKET).unlink(missing_ok=True)
        with (self._folder / "nginx.log").open("wb") as output:
            self._child = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Without them glibc keeps what large requests took, hundreds of megabytes, for the next ones.
                env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"},
                # A signal from the keyboard is for the process that looks after it.
                start_new_session=True,
                umask=0o077,
            )
        # It writes its process id when it listens.
        while not self.process():
            if self._child.poll() is not None:
                raise ServerError(f"nginx does not start: {self.last_words()}")
            time.sleep(0.02)

    def process(self) -> psutil.Process | None:
        """Its main process, or None when it has ended."""
        return _nginx_of(self._folder)

    def tell(self, number: signal.Signals) -> None:
        """Send it a signal, if it runs."""
        if running := self.process():
            with contextlib.suppress(psutil.NoSuchProcess):
                running.send_signal(number)

    def stop(self) -> None:
        """End it, when the requests under way are answered or STOP_S have passed."""
        running = self.process()
        if running is None and self._child and self._child.poll() is None:
            # Somebody removed the file with its process id.
            running = psutil.Process(self._child.pid)
        if running:
            family = [running, *running.children()]
            for number in (signal.SIGQUIT, signal.SIGTERM, signal.SIGKILL):
                for process in family if number == signal.SIGKILL else [running]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.send_signal(number)
                if not psutil.wait_procs(family, timeout=STOP_S if number == signal.SIGQUIT else 5.0)[1]:
                    break
        if self._child:
            self._child.wait()

    def last_words(self) -> str:
        """The end of what it wrote about errors."""
        lines: list[str] = []
        for name in ("error.log", "nginx.log"):
            with contextlib.suppress(OSError):
                lines += (self._folder / name).read_text(errors="replace").splitlines()[-3:]
        return " ".join(lines[-3:]) or "it said nothing"


def _nginx_of(folder: Path) -> psutil.Process | None:
    """The main process of a folder's nginx."""
    try:
        process = psutil.Process(int((folder / _PID).read_text()))
        ours = str(folder / "nginx.conf") in " ".join(process.cmdline())
        return process if ours and process.status() != psutil.STATUS_ZOMBIE else None
    except (OSError, ValueError, psutil.NoSuchProcess, psutil.AccessDenied):
        return None


class _Keeper:
    """What has to be done while nginx runs, a little at every look."""

    def __init__(self, state_dir: Path, server: Server, options: Options, nginx: _Nginx) -> None:
        self._state_dir, self._options, self._nginx = state_dir, options, nginx
        self._folder = state_dir / GATEWAY
        self._server = server
        self._registered: list[tuple[str, str]] = []
        self._anew_since = 0.0
        self._looked = 0.0
        self._said: dict[str, str] = {}
        self._certificate = self._of_certificate()

    def look(self) -> None:
        """Everything once. What fails is said, once, and tried again at the next look."""
        self._try("rollouts", lambda: follow(self._state_dir))
        self._try("TorchServe", self._follow_server)
        self._try("client keys", self._follow_keys)
        self._try("logs", self._rotate)
        if (now := self._of_certificate()) != self._certificate:
            self._certificate = now
            print("the certificate has changed: nginx reads it again", flush=True)
            self._nginx.tell(signal.SIGHUP)

    def _try(self, what: str, action: Callable[[], None]) -> None:
        try:
            action()
        except (ServerError, OSError, ValueError) as error:
            if self._said.get(what) != str(error):
                print(f"{what}: {error}", file=sys.stderr, flush=True)
            self._said[what] = str(error)
        else:
            if self._said.pop(what, None):
                print(f"{what}: well again", file=sys.stderr, flush=True)

    def _follow_server(self) -> None:
        now = time.monotonic()
        try:
            server = Server.attach(self._state_dir)
        except UsageError:
            # Its port may be another's by now.
            self._write_server(away=True)
            raise
        anew = server.pid != self._server.pid
        if anew:
            self._server, self._anew_since = server, now
        elif self._looked and now - self._looked < LOOK_S:
            return
        # Its address first: until it has its versions back, requests for those that it had are held.
        self._write_server()
        self._looked = now
        server.token("inference")
        found = [(row["name"], row["version"]) for row in server.models()]
        coming_back = self._anew_since and now - self._anew_since < RETURN_S and set(self._registered) - set(found)
        if not coming_back:
            self._anew_since = 0.0
            self._registered = found
            self._write_server()

    def _follow_keys(self) -> None:
        if (digests := self._options.key_digests()) is not None:
            _replace(self._folder / _KEYS, "\n".join(digests) + "\n")

    def _write_server(self, away: bool = False) -> None:
        lines = [f"registered {name} {version}" for name, version in self._registered]
        if not away:
            lines += [f"rest {self._server.inference_url.rpartition('/')[2]}", f"grpc {self._server.grpc_address}"]
        _replace(self._folder / _SERVER, "".join(f"{line}\n" for line in lines))

    def _rotate(self) -> None:
        grown = [
            file
            for name in (ACCESS_LOG, "error.log")
            if (file := self._folder / name).exists() and file.stat().st_size > LOG_BYTES
        ]
        for file in grown:
            for number in range(LOGS_KEPT - 1, 0, -1):
                older = file.with_name(f"{file.name}.{number}")
                if older.exists():
                    older.replace(file.with_name(f"{file.name}.{number + 1}"))
            file.replace(file.with_name(f"{file.name}.1"))
        if grown:
            self._nginx.tell(signal.SIGUSR1)

    def _of_certificate(self) -> list[int]:
        files = [file for file in (self._options.tls_cert, self._options.tls_key) if file]
        return [file.stat().st_mtime_ns if file.exists() else 0 for file in files]


def _prepared(state_dir: Path, options: Options) -> Server:
    """See that a gateway can be started, and write what it reads. Raises UsageError."""
    options.check()
    digests = options.key_digests()
    server = Server.attach(state_dir)
    # Everything that could be refused, before anything is written.
    configuration(options, state_dir, _max_body(server))
    _nginx()
    running = Gateway._read(state_dir)
    if running and running.process() and running.pid != os.getpid():
        raise UsageError(
            f"a gateway is running in {state_dir} already (process {running.pid}, {running.rest_url}); stop it with "
            f"`skewless gateway stop --state-dir {state_dir}`"
        )
    folder = state_dir / GATEWAY
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        (folder / "temp").mkdir(exist_ok=True)
        if not (folder / _SECRET).exists():
            # Without it, who knows a client's id would find it in the log.
            _replace(folder / _SECRET, secrets.token_hex(32))
        if digests is not None:
            _replace(folder / _KEYS, "\n".join(digests) + "\n")
        follow(state_dir)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror}; make room there") from error
    return server


def _replace(file: Path, text: str) -> None:
    """Write a file that nginx reads, if it is to have another content."""
    if file.exists() and file.read_text(encoding="utf-8") == text:
        return
    with atomic(file) as unfinished:
        unfinished.touch(mode=0o600)
        unfinished.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _waiting(file: Path) -> Iterator[None]:
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _arguments(state_dir: Path, options: Options) -> list[str]:
    """The options as a command line."""
    given: dict[str, object] = {
        "--state-dir": state_dir,
        "--host": options.host,
        "--port": options.port,
        "--grpc-port": options.grpc_port,
        "--tls-cert": options.tls_cert and options.tls_cert.absolute(),
        "--tls-key": options.tls_key and options.tls_key.absolute(),
        "--client-keys": options.client_keys and options.client_keys.absolute(),
        "--rate": options.rate,
        "--hold": options.hold_s,
    }
    line = [str(part) for name, value in given.items() if value is not None for part in (name, value)]
    return [*line, "--multipart"] if options.multipart else line


def _max_body(server: Server) -> int:
    """The largest request that TorchServe takes, in bytes."""
    properties = launch.read_properties(server.state_dir / "config.properties")
    return int(properties.get("max_request_size", "6553500"))


def _nginx() -> str:
    # Debian keeps it where only root looks.
    found = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if found is None:
        raise UsageError("nginx is not installed; `apt-get install nginx libnginx-mod-http-lua`")
    return found


def _modules() -> list[Path]:
    """The files of the modules that gateway.lua needs, in their order. Raises UsageError where they are not installed."""
    shown = subprocess.run([_nginx(), "-V"], capture_output=True, text=True, check=False).stderr
    folder = re.search(r"--modules-path=(\S+)", shown)
    found = [
        Path(folder[1] if folder else "/usr/lib/nginx/modules", f"{name}.so")
        for name in ("ndk_http_module", "ngx_http_lua_module")
    ]
    if missing := [path for path in found if not path.is_file()]:
        raise UsageError(f"nginx has no module {missing[0]}; `apt-get install libnginx-mod-http-lua`")
    return found


def _grpc_errors() -> str:
    places = "".join(
        f"        error_page {status} = @grpc_{status};\n"
        f"        location @grpc_{status} {{\n"
        "            add_header X-Request-Id $id always;\n"
        f'            add_header grpc-status {code} always;\n            add_header grpc-message "{message}" always;\n'
        "            return 200;\n        }\n"
        for status, (code, message) in _GRPC_ERRORS.items()
    )
    return places.rstrip("\n")


def _no_password(*_: object) -> bytes:
    # Instead of asking at the terminal.
    raise ssl.SSLError("the key has a password")
