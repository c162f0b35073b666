"""Load servers of one model in turn, check every answer, and compare throughput, latency, CPU time and memory.

    python -m benchmarks.serving --archive model_store/cough-1.0.mar --archive model_store/cough-1.0-onnx.mar \\
        --eager-archive model_store/cough-1.0-eager.mar --out runs/serving

Run it from the repository's root, on a machine that does nothing else. Every --archive is served by a TorchServe of its own,
over REST and gRPC; every peer (benchmarks/peers/) by REST, in an environment that is made on first use. All servers stay up
and are loaded in turn, A B C A B C, over several rounds; one that uses the processor while it is idle is paused meanwhile. The forward
pass of each archive's runtime on ready tensors, in this process, is measured in the same rounds.
Writes serving.json, serving.md and serving.png. Exits with 1 when a server failed or answered wrongly.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import requests
import torch
import yaml
from requests.adapters import HTTPAdapter
from tqdm import tqdm

from benchmarks.command import scratch_folder
from benchmarks.figures import GRPC, IN_PROCESS, REST, as_markdown, picture, summarize
from benchmarks.load import Cell, Lane, Load, Scores, WrongAnswer, deviation, run_cell
from benchmarks.peers.adapters import CORES, PEERS, Peer, PeerError, start, versions
from benchmarks.processes import cpu_seconds, pause, peak_bytes, resume
from benchmarks.uploads import KINDS, LONGEST_WHOLE, Upload, make_uploads
from skewless.core.files import atomic
from skewless.core.service import ModelService
from skewless.errors import ServerError
from skewless.torchserve.client import Answer, Client
from skewless.torchserve.server import Server, name_and_version, session

CONCURRENCIES = (1, 4, 16)
MIX = "mix"
IDLE_SECONDS = 5.0  # for which the cost of idle servers is measured
IDLE_CORES = 0.01  # a server that costs more while it is idle is paused while others are measured
SETTLE_SECONDS = 2.0  # for a server that was paused, before it is measured
NO_PEERS = "none"


@dataclass(frozen=True)
class Archive:
    """An unpacked archive in this process. inputs and expected: by kind, the network's input and the scores it must get."""

    name: str
    path: Path
    folder: Path
    service: ModelService
    inputs: Mapping[str, torch.Tensor]
    expected: dict[str, Scores]

    @classmethod
    def load(cls, path: Path, folder: Path, uploads: Sequence[Upload]) -> "Archive":
        """Unpack into `folder` and compute the expected scores. Raises ValueError for one that reads no recordings."""
        name, number = name_and_version(path)
        with zipfile.ZipFile(path) as packed:
            packed.extractall(folder)
        service = ModelService.load(folder, torch.device("cpu"), replay=False)
        if service.pipeline.reads != "audio":
            raise ValueError(f"{path} reads {service.pipeline.reads}, expected an archive that reads recordings")
        prepared = service.definition.prepared
        inputs = {upload.kind: prepared.run(upload.payload, **service.input_limits).data for upload in uploads}
        outputs = service.runtime(list(inputs.values()))
        scores = [service.postprocessor.scores(each) for each in outputs]
        return cls(f"skewless {name}-{number}", path, folder, service, inputs, dict(zip(inputs, scores, strict=True)))

    @property
    def checkpoint(self) -> str:
        return self.service.metrics["checkpoint_sha256"]

    @property
    def tolerances(self) -> dict[str, float]:
        """How far from the expected scores an answer of each tier may be: a decision-exact archive answers in two."""
        runtimes = [self.service.runtime, *([self.service.cascade.fast] if self.service.cascade else [])]
        return {runtime.tier: runtime.tolerance for runtime in runtimes}

    def read(self, kind: str, answer: Answer) -> Scores:
        """The scores of an answer to an upload of this kind. Raises WrongAnswer for one that is no prediction, is further
        from the expected scores than its own tier allows, or decides otherwise than these."""
        if answer.status != 200:
            raise WrongAnswer(f"{kind}: {answer.status}: {answer.body.get('message')}")
        scores, chosen = self.service.postprocessor.read(answer.body)
        expected, tier = self.expected[kind], answer.body["tier"]
        if tier not in self.tolerances:
            raise WrongAnswer(f"{kind}: answered in tier {tier!r}, expected one of {', '.join(self.tolerances)}")
        if not deviation(scores, expected) <= self.tolerances[tier]:
            raise WrongAnswer(
                f"{kind}: answered {list(scores)} in tier '{tier}', expected {list(expected)} within {self.tolerances[tier]:g}"
            )
        if chosen != self.service.postprocessor.choose(tuple(expected), answer.body["threshold_used"]):
            raise WrongAnswer(f"{kind}: decided otherwise than {list(expected)} does: {list(scores)}")
        return scores


@dataclass
class Servers:
    """What is measured, what is known of it, and what could not be started."""

    lanes: list[Lane]
    settings: dict[str, dict[str, Any]]
    missing: dict[str, str]
    pids: dict[str, int]


def load_archives(
    paths: Sequence[Path], eager: Path | None, scratch: Path, uploads: Sequence[Upload]
) -> tuple[list[Archive], Archive | None]:
    """The archives, and the one with an eager network: `eager`, else the first of them that has one. Raises ValueError."""
    archives = [Archive.load(path, scratch / f"archive{n}", uploads) for n, path in enumerate(paths)]
    names = [archive.name for archive in archives]
    if len(set(names)) < len(names):
        raise ValueError(f"two archives have one name and version: {', '.join(names)}")
    if eager is None:
        weights = next((archive for archive in archives if archive.service.runtime.name == "eager"), None)
    else:
        weights = Archive.load(eager, scratch / "eager", uploads)
        if weights.service.runtime.name != "eager":
            raise ValueError(
                f"--eager-archive {eager} has the runtime '{weights.service.runtime.name}', expected 'eager'; build it with "
                "`skewless build --runtime eager`"
            )
    for other in [*archives, *([weights] if weights else [])]:
        if other.checkpoint != archives[0].checkpoint:
            raise ValueError(
                f"{other.path} is not of the same checkpoint as {archives[0].path}, so their answers cannot be compared"
            )
    return archives, weights


def floor_lane(archive: Archive, threads: int) -> Lane:
    """The runtime's forward pass on ready tensors, in this process."""

    def send(upload: Upload) -> Scores:
        torch.set_num_threads(threads)
        (outputs,) = archive.service.runtime([archive.inputs[upload.kind]])
        return archive.service.postprocessor.scores(outputs)

    return Lane(
        f"forward pass {archive.name.removeprefix('skewless ')}",
        IN_PROCESS,
        send,
        archive.expected,
        archive.expected,
        archive.service.runtime.tolerance,
        time.process_time,
        lambda: None,
        most=1,
    )


def start_archive(
    archive: Archive, reference: dict[str, Scores], scratch: Path, stack: ExitStack
) -> tuple[list[Lane], dict[str, Any], int]:
    """A TorchServe of its own with the archive's own settings: its two lanes, what is known of it, its process id."""
    store = scratch / "store"
    store.mkdir(parents=True)
    shutil.copyfile(archive.path, store / archive.path.name)
    begun = time.monotonic()
    server = Server.start(store, scratch / "state", ports="free")
    stack.callback(server.stop)
    row = server.register(store / archive.path.name, default=True)
    taken = time.monotonic() - begun
    client = stack.enter_context(Client(server))
    service = archive.service
    senders = {
        REST: lambda upload: archive.read(upload.kind, client.predict_rest(row["name"], upload.payload)),
        GRPC: lambda upload: archive.read(upload.kind, client.predict_grpc(row["name"], upload.payload)),
    }
    lanes = [
        Lane(
            archive.name,
            protocol,
            send,
            archive.expected,
            reference,
            max(archive.tolerances.values()),
            lambda: cpu_seconds(server.pid),
            lambda: peak_bytes(server.pid),
        )
        for protocol, send in senders.items()
    ]
    config = yaml.safe_load((archive.folder / "model-config.yaml").read_text(encoding="utf-8"))
    settings = {
        "runtime": dict(service.definition.runtime),
        "tier": service.tier,
        "threads": service.policy.threads or "PyTorch's choice",
        "torchserve": config,
        "workers": len(row["workers"]),
        "library_versions": service.metrics["library_versions"],
        "seconds_to_start": taken,
    }
    return lanes, settings, server.pid


def start_peer(
    peer: Peer, weights: Archive, uploads: Sequence[Upload], scratch: Path, stack: ExitStack
) -> tuple[Lane, dict[str, Any], int]:
    """A peer in an environment of its own: its lane, what is known of it, its process id. Raises PeerError."""
    network = next(iter(weights.service.definition.network))
    if peer.networks and network not in peer.networks:
        raise PeerError(f"runs {', '.join(peer.networks)} only; this archive's network is {network}")
    scratch.mkdir()
    running = start(peer, weights.folder, scratch)
    stack.callback(running.stop)
    connection = stack.enter_context(session())
    connection.mount("http://", HTTPAdapter(pool_maxsize=64))

    def send(upload: Upload) -> Scores:
        how: dict[str, Any] = {"data": upload.payload, "headers": {"Content-Type": "application/octet-stream"}}
        if peer.form_field:
            file = f"recording.{KINDS[upload.kind].container}"
            how = {"files": {peer.form_field: (file, upload.payload, "application/octet-stream")}}
        answer = connection.post(running.url + peer.path, timeout=120.0, **how)
        if answer.status_code != 200:
            raise WrongAnswer(f"{answer.status_code}: {answer.text[:200]}")
        return peer.scores(answer.json())

    expected = weights.expected
    if not peer.same_numbers:
        try:
            expected = {upload.kind: send(upload) for upload in uploads}
        except (WrongAnswer, requests.RequestException) as error:
            raise PeerError(f"did not answer: {error}") from error
    pid = running.process.pid
    lane = Lane(
        peer.name,
        REST,
        send,
        expected,
        weights.expected,
        weights.service.runtime.tolerance,
        lambda: cpu_seconds(pid),
        lambda: peak_bytes(pid),
    )
    settings = {
        "settings": peer.settings,
        "packages": versions(peer.name),
        "held_to": "the in-process scores" if peer.same_numbers else "its own first answers",
        "threads": "PyTorch's choice",
        "seconds_to_start": running.seconds_to_start,
    }
    return lane, settings, pid


def wait_until_quiet(pid: int, timeout: float = 60.0) -> None:
    """Return once the processes have used less than a fifth of a core for a second, as all workers have loaded; else after
    `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        before = cpu_seconds(pid)
        time.sleep(1.0)
        if cpu_seconds(pid) - before < 0.2:
            return


def start_all(
    archives: Sequence[Archive],
    weights: Archive | None,
    peers: Sequence[Peer],
    uploads: Sequence[Upload],
    scratch: Path,
    stack: ExitStack,
) -> Servers:
    """Start every server. Peers that cannot be started are missing, with the reason.

    Raises ServerError, LoadError or UsageError for an archive that cannot be served.
    """
    threads = torch.get_num_threads()
    # Of a decision-exact archive, what runs depends on the recordings: it has no forward pass of its own.
    candidates = [*archives, *([weights] if weights else [])]
    floors = {archive.name: archive for archive in candidates if not archive.service.cascade}
    found = Servers([], {}, {}, {})
    for number, archive in enumerate(tqdm(archives, desc="start archives", unit="server")):
        reference = weights.expected if weights else archive.expected
        lanes, settings, pid = start_archive(archive, reference, scratch / f"s{number}", stack)
        found.lanes += lanes
        found.settings[archive.name], found.pids[archive.name] = settings, pid
    for peer in (progress := tqdm(peers, desc="start peers", unit="server")):
        progress.set_postfix_str(peer.name)
        assert weights is not None
        try:
            lane, settings, pid = start_peer(peer, weights, uploads, scratch / peer.name, stack)
        except PeerError as error:
            found.missing[peer.name] = str(error)
            continue
        found.lanes.append(lane)
        found.settings[peer.name], found.pids[peer.name] = settings, pid
    for pid in found.pids.values():
        wait_until_quiet(pid)
    found.lanes += [floor_lane(archive, archive.service.policy.threads or threads) for archive in floors.values()]
    return found


def warm_up(servers: Servers, load: Load, seconds: float, segments: dict[str, int]) -> list[str]:
    """Load every lane once, unmeasured, its answers checked. Returns what failed; a peer that did is missing from then on."""
    failed = []
    for lane in tqdm(list(servers.lanes), desc="warm up", unit="server"):
        most = min(load.concurrency, lane.most)
        cell = run_cell(lane, Load(load.name, load.uploads, most), seconds, segments, -1)
        if cell.failure:
            servers.lanes.remove(lane)
            servers.missing[lane.name] = f"failed while warming up: {cell.failure}"
            failed.append(f"{lane.name}: {cell.failure}")
    return failed


def measure_idle(servers: Servers) -> None:
    """Write down what every server's processes use while nobody asks them, in cores, and which are too busy for that."""
    before = {name: cpu_seconds(pid) for name, pid in servers.pids.items()}
    time.sleep(IDLE_SECONDS)
    for name, pid in servers.pids.items():
        used = (cpu_seconds(pid) - before[name]) / IDLE_SECONDS
        servers.settings[name] |= {"idle_cores": round(used, 4), "paused_when_idle": used > IDLE_CORES}


@contextmanager
def awake(server: str, paused: Mapping[str, int]) -> Iterator[None]:
    """Let a server that is paused while it is idle run for a while."""
    if server not in paused:
        yield
        return
    resume(paused[server])
    time.sleep(SETTLE_SECONDS)
    try:
        yield
    finally:
        pause(paused[server])


def measure(
    servers: Servers, loads: Sequence[Load], rounds: int, seconds: float, segments: dict[str, int]
) -> tuple[list[Cell], list[float]]:
    """All lanes under one load after the other, then the next load, then the next round; and the load average of each
    round. Servers that cost something while they are idle are paused meanwhile."""
    plan = [(load, lane) for load in loads for lane in servers.lanes if load.concurrency <= lane.most]
    paused = {name: servers.pids[name] for name, known in servers.settings.items() if known["paused_when_idle"]}
    for pid in paused.values():
        pause(pid)
    cells, averages = [], []
    with tqdm(total=rounds * len(plan), desc="measure", unit="cell") as progress:
        for number in range(rounds):
            for load, lane in plan:
                progress.set_postfix_str(f"{lane.name}, {load.name}, {load.concurrency} at once")
                with awake(lane.server, paused):
                    cells.append(run_cell(lane, load, seconds, segments, number))
                progress.update()
            averages.append(os.getloadavg()[0])
    return cells, averages


def machine() -> dict[str, Any]:
    """What the figures depend on beside the servers."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    packages = ("torch", "torchserve", "numpy", "soundfile", "av", "requests", "grpcio")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "cpu": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": CORES,
        "memory_mb": round(psutil.virtual_memory().total / 1e6),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "threads": torch.get_num_threads(),
        "environment": {
            name: os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ
        },
        "load_average_before": os.getloadavg()[0],
        "commit": commit.stdout.strip(),
    }


def run(args: argparse.Namespace, peers: Sequence[Peer], scratch: Path) -> int:
    """Measure, write and print. Raises ValueError, UsageError, ServerError or LoadError."""
    about = machine()
    uploads = make_uploads()
    archives, weights = load_archives(args.archive, args.eager_archive, scratch, uploads)
    if peers and weights is None:
        raise ValueError(
            "the peers run the eager network, and no --archive has its weights; give --eager-archive, one of the same "
            f"checkpoint built with `skewless build --runtime eager`, or `--peers {NO_PEERS}`"
        )
    names = [*(archive.name for archive in archives), *(peer.name for peer in peers)]
    reference = args.reference or ("documents" if "documents" in names else names[0])
    if reference not in names:
        raise ValueError(f"--reference is {reference!r}, expected one of: {', '.join(names)}")
    segments = {kind: len(inputs) for kind, inputs in archives[0].inputs.items()}
    longest = [upload for upload in uploads if upload.kind == LONGEST_WHOLE]
    loads = [*(Load(MIX, uploads, concurrency) for concurrency in args.concurrency), Load(LONGEST_WHOLE, longest, 1)]

    with ExitStack() as stack:
        servers = start_all(archives, weights, peers, uploads, scratch, stack)
        failed = warm_up(servers, Load(MIX, uploads, max(args.concurrency)), args.warm_up, segments)
        if not servers.lanes:
            raise ServerError("\n".join(["no server is left to measure, all failed while warming up:", *failed]))
        measure_idle(servers)
        cells, averages = measure(servers, loads, args.rounds, args.seconds, segments)

    rows = summarize(cells, reference)
    table = as_markdown(rows, reference)
    notes = [f"`{name}` is missing: {reason}" for name, reason in servers.missing.items()]
    head = (
        f"{about['cpu']}, {about['cores']} cores, {args.rounds} rounds of at least {args.seconds:g} s per cell, load average "
        f"{about['load_average_before']:.1f} before. Idle, in cores: "
        + ", ".join(
            f"{name} {known['idle_cores']:.3f}{' (paused while others are measured)' if known['paused_when_idle'] else ''}"
            for name, known in servers.settings.items()
        )
        + "."
    )
    text = "\n".join([head, *notes, "", table])
    report = {
        "machine": {**about, "load_average_after_each_round": averages},
        "rounds": args.rounds,
        "seconds": args.seconds,
        "reference": reference,
        "uploads": [
            {"kind": u.kind, "bytes": len(u.payload), "segments": segments[u.kind], "made": KINDS[u.kind].description()}
            for u in uploads
        ],
        "servers": servers.settings,
        "missing": servers.missing,
        "rows": rows,
        "cells": [vars(cell) for cell in cells],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    with atomic(args.out / "serving.json") as unfinished:
        unfinished.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    with atomic(args.out / "serving.md") as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    picture(rows, args.out / "serving.png")
    print(text)
    failed += [
        f"{cell.name}, {cell.load}, {cell.concurrency} at once: {cell.failure}" for cell in cells if cell.failure
    ]
    for failure in failed:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--archive", type=Path, action="append", required=True, help="a .mar to serve; several may be given"
    )
    parser.add_argument(
        "--eager-archive", type=Path, help="a .mar of the same checkpoint with the runtime eager, for the peers (the "
        "first --archive that has it)"
    )  # fmt: skip
    parser.add_argument("--peers", default=",".join(PEERS), help=f"separated by commas, or '{NO_PEERS}' (%(default)s)")
    parser.add_argument(
        "--reference",
        help="the server that ratios are formed with, by its name in the table ('documents', else the first)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="(5)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each cell, at least (20)")
    parser.add_argument("--warm-up", type=float, default=10.0, help="seconds for each server, at least (10)")
    parser.add_argument(
        "--concurrency", default=",".join(map(str, CONCURRENCIES)), help="callers at once (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/serving"), help="folder (%(default)s)")
    args = parser.parse_args(argv)

    if not Path("/proc/self/status").is_file():
        parser.error("memory is read from /proc, which only Linux has")
    given = [*args.archive, *([args.eager_archive] if args.eager_archive else [])]
    if missing := [str(path) for path in given if not zipfile.is_zipfile(path)]:
        parser.error(f"no archive: {', '.join(missing)}; build one with `skewless build`")
    chosen = [] if args.peers == NO_PEERS else args.peers.split(",")
    if unknown := [name for name in chosen if name not in PEERS]:
        parser.error(f"--peers names {unknown[0]!r}, expected some of {','.join(PEERS)}, or '{NO_PEERS}'")
    try:
        args.concurrency = [int(text) for text in args.concurrency.split(",")]
    except ValueError:
        parser.error(f"--concurrency is {args.concurrency!r}, expected numbers separated by commas, such as 1,4,16")
    if min(args.concurrency) < 1:
        parser.error(f"--concurrency has {min(args.concurrency)}, expected at least 1")
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}, expected at least 1")
    for name in ("seconds", "warm_up"):
        if not 0 <= getattr(args, name) < float("inf"):
            parser.error(
                f"--{name.replace('_', '-')} is {getattr(args, name):g}, expected a number of seconds, 0 or more"
            )

    with scratch_folder(parser, wrong=ValueError) as scratch:
        code = run(args, [PEERS[name] for name in chosen], scratch)
    sys.exit(code)


if __name__ == "__main__":
    main()
