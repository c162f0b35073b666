"""What the tests share: the command line, small trained models, and a TorchServe that serves them."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.demonstration import KEPT, ROOT, SMALL, Demonstration, trained

_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
# Two processes that compile librosa's functions for the first time, into one cache, crash: each test process has its own.
os.environ["NUMBA_CACHE_DIR"] = str(KEPT / f"numba-{_WORKER or 'alone'}")
if _WORKER:
    # One test process per core: more threads would only wait for each other.
    os.environ["OMP_NUM_THREADS"] = "1"

from skewless.cli import main
from skewless.packaging.build import build_archive
from skewless.torchserve.client import Client
from skewless.torchserve.server import Server

__all__ = ["OTHERS", "ROOT", "SERVED", "Demonstration", "call_skewless", "run_skewless", "until"]

# How far a served number may be from the evaluated one: half of what the exact tier allows. Convolutions by Winograd's
# algorithm round otherwise than PyTorch's, by some 1e-6 in a probability.
SERVED = 5e-5
OTHERS = tuple(name for name in SMALL if name != "cough")


def run_skewless(
    *arguments: object, check: bool = True, environment: Mapping[str, str] | None = None, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Run the command `skewless` as a user would, from the repository's root."""
    command = [sys.executable, "-m", "skewless", *map(str, arguments)]
    env = {**os.environ, **(environment or {})}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=env, timeout=timeout)
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result


def call_skewless(*arguments: object) -> subprocess.CompletedProcess[str]:
    """As `run_skewless`, unchecked and in this process, which spares the seconds that importing torch takes."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(list(map(str, arguments)))
        except SystemExit as ended:
            code = ended.code
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def until(condition: Callable[[], Any], what: str = "what was waited for has not come", seconds: float = 120) -> Any:
    """What `condition` returns, once that is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.1)
    return found


# What needs a trained model or a server takes minutes: tests that use one of these run in the second group.
_COSTLY = ("demonstration", "others", "server", "client")
# These modules share one server: with several test processes, they run in one of them.
_SERVED = (
    "test_api_description",
    "test_archives",
    "test_end_to_end",
    "test_from_other_apis",
    "test_other_archives",
    "test_score",
    "test_self_test",
)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "chain: needs a trained model or a server; the second, slower group")


def pytest_itemcollected(item: pytest.Item) -> None:
    if set(_COSTLY) & set(getattr(item, "fixturenames", ())):
        item.add_marker(pytest.mark.chain)


class _ByServer(LoadScopeScheduling):
    """A module's tests stay in one process, and so do the modules that share a server."""

    def _split_scope(self, nodeid: str) -> str:
        module = Path(nodeid.partition("::")[0]).stem
        return "served" if module in _SERVED else module


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    return _ByServer(config, log)


def _packaged(name: str, store: Path) -> Demonstration:
    made = trained(name, store)
    build_archive(made.definition, made.checkpoint, made.evaluation, "1.0", store)
    return made


@pytest.fixture(scope="session")
def demonstration(tmp_path_factory: pytest.TempPathFactory) -> Demonstration:
    """A small cough detector, in a store of this session."""
    store = tmp_path_factory.mktemp("store")
    return _packaged("cough", store)


@pytest.fixture(scope="session")
def others(
    demonstration: Demonstration, server: Server, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Demonstration]:
    """The other archives, by name, registered with the same server."""
    # Two at a time, each training with one thread: so both cores are busy, and neither waits for the other.
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: trained(name, demonstration.store), OTHERS))
    made = {name: _packaged(name, demonstration.store) for name in OTHERS}
    for one in made.values():
        server.register(one.archive, default=True)
    return made


@pytest.fixture(scope="session")
def server(demonstration: Demonstration, tmp_path_factory: pytest.TempPathFactory):
    """A TorchServe on free ports that serves the demonstration as the default version of `cough`."""
    running = Server.start(demonstration.store, tmp_path_factory.mktemp("server"), ports="free")
    try:
        running.register(demonstration.archive, default=True)
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="session")
def client(server: Server):
    with Client(server) as connected:
        yield connected
