"""How long an archive takes from its registration to the first answer, and what its idle worker holds in memory. Linux only.

    python -m benchmarks.startup model_store/cough-1.0.mar model_store/orca-1.0.mar

A TorchServe of its own, on free ports, loads one archive at a time, and each answers one of its own references. Beside them
two workers run a handler that returns what it is sent: the memory that TorchServe's worker takes by itself.

RSS: resident memory, pages that processes share included. USS: what ending this worker would free, because no other process
has it. PSS: the USS and a share of the pages that are shared, equal for each process that has them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.command import scratch_folder
from skewless.errors import ServerError, UsageError
from skewless.torchserve.client import Client
from skewless.torchserve.server import Server, name_and_version

BARE = "bare"
_HANDLER = """\
class Bare:
    def initialize(self, context):
        pass

    def handle(self, data, context):
        return [bytes(row.get("data") or row["body"]) for row in data]
"""


@dataclass(frozen=True)
class Memory:
    """Of one process, in bytes."""

    rss: int
    uss: int
    pss: int

    @classmethod
    def of(cls, pid: int) -> Memory:
        found = psutil.Process(pid).memory_full_info()
        return cls(found.rss, found.uss, found.pss)


@dataclass(frozen=True)
class Start:
    """One registration. seconds: until the first answer was read. self_test_s: of these, the replay of the references."""

    seconds: float
    self_test_s: float
    memory: Memory


def measure(archives: Sequence[Path], rounds: int, scratch: Path) -> str:
    """A Markdown table: medians over `rounds` registrations of each archive, in turn.

    Raises UsageError for archives without a recording to send, LoadError for one that does not load, ServerError for one
    that does not answer.
    """
    store = scratch / "store"
    store.mkdir()
    payloads = [_payload(archive) for archive in archives]
    served = [shutil.copyfile(archive, store / f"{number}.mar") for number, archive in enumerate(archives)]
    bare = _bare_archive(scratch, store)
    server = Server.start(store, scratch / "state", ports="free")
    try:
        server.register(bare, workers=2)
        taken: list[list[Start]] = [[] for _ in served]
        with Client(server) as client:
            _answered(client, BARE, b"sent")
            for _ in range(rounds):
                for path, payload, starts in zip(served, payloads, taken, strict=True):
                    starts.append(_start(server, client, path, payload))
        idle = Memory.of(_worker(server, BARE))
    finally:
        server.stop()
    lines = [
        f"{rounds} rounds, {psutil.cpu_count()} processors, load {psutil.getloadavg()[0]:.1f}",
        "| worker | archive MB | s to the first answer | of these self-test | RSS MB | USS MB | PSS MB | RSS above bare |",
        "|---|---|---|---|---|---|---|---|",
        f"| {BARE} | | | | {_mb(idle.rss)} | {_mb(idle.uss)} | {_mb(idle.pss)} | |",
    ]
    for archive, starts in zip(archives, taken, strict=True):
        seconds = statistics.median(start.seconds for start in starts)
        tested = statistics.median(start.self_test_s for start in starts)
        rss, uss, pss = (
            statistics.median(getattr(start.memory, name) for start in starts) for name in ("rss", "uss", "pss")
        )
        lines.append(
            f"| {archive.stem} | {archive.stat().st_size / 1e6:.1f} | {seconds:.1f} | {tested:.1f} "
            f"| {_mb(rss)} | {_mb(uss)} | {_mb(pss)} | {_mb(rss - idle.rss)} |"
        )
    return "\n".join(lines)


def _start(server: Server, client: Client, archive: Path, payload: bytes) -> Start:
    name, version = name_and_version(archive)
    begun = time.perf_counter()
    server.register(archive, workers=None)
    _answered(client, name, payload)
    seconds = time.perf_counter() - begun
    described = client.describe(name, version)["customizedMetadata"]
    told = json.loads(described) if isinstance(described, str) else described
    found = Start(seconds, told["self_test"]["seconds"], Memory.of(_worker(server, name)))
    server.unregister(name, version)
    return found


def _answered(client: Client, name: str, payload: bytes) -> None:
    answer = client.predict_rest(name, payload)
    if answer.status != 200:
        raise ServerError(f"{name} answered {answer.status}: {answer.body.get('message')}")


def _worker(server: Server, name: str) -> int:
    """The process of a model's first worker."""
    return server.manage("GET", f"/models/{name}").json()[0]["workers"][0]["pid"]


def _payload(archive: Path) -> bytes:
    """The first recording that the archive carries, a reference or else a probe."""
    with zipfile.ZipFile(archive) as packed:
        carried = sorted(name for name in packed.namelist() if name.startswith("references/"))
        carried = [name for name in carried if not name.endswith((".json", ".safetensors", "/"))]
        if not carried:
            raise UsageError(f"{archive} carries no recording to send; build it with other --references than none")
        return packed.read(carried[0])


def _bare_archive(scratch: Path, store: Path) -> Path:
    handler = scratch / "handler.py"
    handler.write_text(_HANDLER, encoding="utf-8")
    command = [sys.executable, "-m", "model_archiver.model_packaging", "--model-name", BARE, "--version", "1.0"]
    command += ["--handler", str(handler), "--export-path", str(store)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode != 0:
        raise ServerError(f"torch-model-archiver failed:\n{made.stdout}{made.stderr}")
    return store / f"{BARE}.mar"


def _mb(size: float) -> str:
    return f"{size / 1e6:.0f}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.startup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("archives", type=Path, nargs="+", metavar="ARCHIVE", help="such as model_store/*.mar")
    parser.add_argument("--rounds", type=int, default=3, help="registrations of each (3)")
    args = parser.parse_args(argv)
    if not Path("/proc/self/smaps").is_file():
        parser.error("memory is read from /proc, which only Linux has")
    if missing := [str(path) for path in args.archives if not zipfile.is_zipfile(path)]:
        parser.error(f"no archive: {', '.join(missing)}; build one with `skewless build`")
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}, expected at least 1")
    with scratch_folder(parser) as scratch:
        print(measure(args.archives, args.rounds, scratch))


if __name__ == "__main__":
    main()
