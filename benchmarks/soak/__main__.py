"""Serve archives to a hostile crowd among which canaries are asked, and count what went wrong.

    python -m benchmarks.soak --archive model_store/cough-1.0.mar --archive model_store/orca-1.0.mar --seconds 3600 --pace 0.8
    python -m benchmarks.soak --archive model_store/cough-1.0.mar --requests 10000 --bombs 1000
    python -m benchmarks.soak --archive model_store/cough-1.0.mar --repeat runs/soak/defects/001

Run it from the repository's root. It starts one TorchServe on 127.0.0.1, and asks it for the archives' own references, whose
answers are known: first a few callers alone, then as many as --concurrency says. Then most of these callers turn hostile:
damaged files, small files that ask for much, broken forms, JSON, headers and gRPC messages, slow callers, callers that leave.
Watches every answer, every worker's process and its memory. Writes soak.json, soak.md, soak.png, and the exact bytes of
what did harm under defects/. Exits with 1 when there is a defect. docs/reliability.md says what one is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import sys
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from benchmarks.command import scratch_folder
from benchmarks.load import WrongAnswer
from benchmarks.serving import machine, wait_until_quiet
from benchmarks.soak.canaries import WAYS, Archive
from benchmarks.soak.crowd import ALONE, COMPANY, CROWD, WARM_UP, Crowd, Phase
from benchmarks.soak.defects import Defects, kept_messages, verdict
from benchmarks.soak.figures import as_markdown, picture, summarize
from benchmarks.soak.hostile import Plan
from benchmarks.soak.messages import Wire
from benchmarks.soak.workers import Watch, Worker
from skewless.core.files import atomic
from skewless.errors import ServerError, UsageError
from skewless.torchserve.client import Client
from skewless.torchserve.server import Server

LONGEST_S = 6 * 3600.0  # where --seconds says nothing
WARM_UP_S = 5.0


def start(archives: Sequence[Archive], scratch: Path, stack: ExitStack) -> Server:
    """A TorchServe that serves the archives. Raises ServerError, LoadError or UsageError."""
    store = scratch / "store"
    store.mkdir()
    for archive in archives:
        shutil.copyfile(archive.path, store / archive.path.name)
    server = Server.start(store, scratch / "state", ports="free")
    stack.callback(server.stop)
    for archive in tqdm(archives, desc="register", unit="archive"):
        server.register(store / archive.path.name)
    wait_until_quiet(server.pid)
    return server


def load(paths: Sequence[Path], scratch: Path) -> list[Archive]:
    """Raises UsageError for archives without references, and for two of one name."""
    archives = [Archive.load(path, scratch / f"archive{n}") for n, path in enumerate(paths)]
    names = [archive.name for archive in archives]
    if len(set(names)) < len(names):
        raise UsageError(f"two archives are of one model: {', '.join(names)}; give one of each")
    return archives


def soak(args: argparse.Namespace, scratch: Path) -> int:
    """Run all phases, write and print. Raises UsageError, ServerError or LoadError."""
    about = machine()
    archives = load(args.archive, scratch)
    plan = Plan.make([archive.target for archive in archives], args.seed, args.requests, args.bombs)
    defects = Defects(args.out / "defects")
    canaries = max(1, args.concurrency // 4)
    hostile = args.concurrency - canaries
    seconds = LONGEST_S if args.seconds is None else args.seconds
    with ExitStack() as stack:
        server = start(archives, scratch, stack)
        crowd = Crowd(
            server,
            archives,
            plan,
            stack.enter_context(Client(server)),
            stack.enter_context(Wire.to(server)),
            Watch(server, [(archive.name, archive.version) for archive in archives]),
            defects,
            dict(args.worker_mb),
        )
        try:
            _phases(crowd, canaries, hostile, seconds, args.calm, args.pace)
        except ServerError as error:
            if not defects:
                raise
            print(f"ended early: {error}", file=sys.stderr)
        crowd.check_memory()
    given = {
        key: value
        for key, value in vars(args).items()
        if key in ("seconds", "requests", "bombs", "concurrency", "pace", "calm", "seed")
    }
    report = {"machine": about, "arguments": given, **summarize(crowd)}
    text = as_markdown(report)
    args.out.mkdir(parents=True, exist_ok=True)
    with atomic(args.out / "soak.json") as unfinished:
        unfinished.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    with atomic(args.out / "soak.md") as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    picture(report, args.out / "soak.png")
    print(text)
    return 1 if defects else 0


def _phases(crowd: Crowd, canaries: int, hostile: int, seconds: float, calm: float, pace: float | None) -> None:
    """Canaries alone, in the company of as many as the crowd has, then the crowd; and each once more when it is gone."""

    def run(name: str, callers: int, others: int, length: float, **paces: float) -> Phase:
        ended = len(crowd.plan) if others and len(crowd.plan) else None
        with tqdm(total=ended or round(length), desc=name, unit="request" if ended else "s") as progress:

            def show(elapsed: float) -> None:
                done = sum(len(phase.sent) for phase in crowd.phases) if ended else min(round(elapsed), round(length))
                progress.update(done - progress.n)
                progress.set_postfix(asked=crowd.asked, defects=len(crowd.defects))

            return crowd.run(name, callers, others, length, show, **paces)

    run(WARM_UP, canaries, 0, min(WARM_UP_S, calm))
    run(ALONE, canaries, 0, calm)
    run(COMPANY, canaries + hostile, 0, calm)
    if pace is None:
        run(CROWD, canaries, hostile, seconds)
    else:
        full = run("at full speed", canaries, hostile, calm)
        taken = full.ended - full.began
        run(
            CROWD,
            canaries,
            hostile,
            seconds,
            canary_pace=max(0.1, pace * len(full.canaries) / taken),
            hostile_pace=max(0.1, pace * len(full.sent) / taken),
        )
    after = Phase("afterwards", began=crowd.now())
    crowd.phases.append(after)
    for archive, way in itertools.product(crowd.archives, WAYS):
        after.canaries.append(crowd.ask(archive, way, 0))
    crowd.look()
    after.ended = crowd.now()


def repeat(args: argparse.Namespace, scratch: Path) -> int:
    """Send what was kept to a fresh server, all at once, and say what comes of it; 1 when it does harm again."""
    messages = kept_messages(args.repeat)
    archives = load(args.archive, scratch)
    if unknown := {message.model for message in messages} - {archive.name for archive in archives}:
        raise UsageError(f"{args.repeat} was sent to {', '.join(sorted(unknown))}; give an --archive of that model")
    harm = []
    with ExitStack() as stack:
        server = start(archives, scratch, stack)
        client = stack.enter_context(Client(server))
        wire = stack.enter_context(Wire.to(server))
        watch = Watch(server, [(archive.name, archive.version) for archive in archives])
        begun = time.monotonic()
        with ThreadPoolExecutor(len(messages)) as pool:
            answers = list(pool.map(wire.send, messages))
        for message, answer in zip(messages, answers, strict=True):
            reason = verdict(message, answer)
            said = f"{answer.status} after {answer.seconds:.1f} s: {json.dumps(answer.body)[:300]}"
            print(f"{message.model}, {message.kind}, {len(message.data):,} bytes: {said}")
            harm += [f"{message.model}, {message.kind}: {reason}"] if reason else []
        for archive, way in itertools.product(archives, WAYS):
            try:
                answer, _ = WAYS[way](client, archive, 0)
                if answer.status != 200:
                    harm.append(f"canary of {archive.name}, {way}: {answer.status}: {answer.body.get('message')}")
            except WrongAnswer as error:
                harm.append(f"canary of {archive.name}, {way}: {error}")
        died: list[Worker] = watch.look(time.monotonic() - begun)
        harm += [f"worker process {worker.pid} of {worker.model} ended" for worker in died]
        for worker in watch.workers:
            print(
                f"{worker.model}, worker {worker.pid}: {worker.idle / 1e6:.0f} MB idle, {worker.peak / 1e6:.0f} MB at most"
            )
    for each in harm:
        print(f"defect: {each}", file=sys.stderr)
    return 1 if harm else 0


def _bound(text: str) -> tuple[str, float]:
    name, _, megabytes = text.partition("=")
    try:
        value = float(megabytes)
    except ValueError:
        value = math.nan
    if not name or not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=MB, such as cough=1500")
    return name, value


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--archive", type=Path, action="append", required=True, help="a .mar to serve; one of each model may be given"
    )
    parser.add_argument("--seconds", type=float, help=f"of the hostile crowd, at most ({LONGEST_S:g} with --requests)")
    parser.add_argument("--requests", type=int, help="damaged files in all; other requests come in proportion")
    parser.add_argument("--bombs", type=int, help="of each bomb, in place of their proportion (with --requests)")
    parser.add_argument("--concurrency", type=int, default=16, help="callers at once, a quarter of them canaries' (16)")
    parser.add_argument(
        "--pace", type=float, help="as a part of the measured capacity, such as 0.8 (as fast as answered)"
    )
    parser.add_argument("--calm", type=float, default=30.0, help="seconds of each phase without a hostile crowd (30)")
    parser.add_argument(
        "--worker-mb", type=_bound, action="append", default=[], metavar="NAME=MB",
        help="the most that a worker of this model may have in memory; more is a defect",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the requests (0)")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="folder (%(default)s)")
    parser.add_argument(
        "--repeat", type=Path, metavar="FOLDER", help="send again what a defect's folder holds, no more"
    )
    args = parser.parse_args(argv)

    if not Path("/proc/self/status").is_file():
        parser.error("memory is read from /proc, which only Linux has")
    if missing := [str(path) for path in args.archive if not zipfile.is_zipfile(path)]:
        parser.error(f"no archive: {', '.join(missing)}; build one with `skewless build`")
    if args.repeat is None and args.seconds is None and args.requests is None:
        parser.error("give --seconds or --requests, so that there is an end")
    if args.bombs is not None and args.requests is None:
        parser.error("--bombs counts beside --requests; give both")
    for name, least in (("seconds", 1), ("requests", 1), ("bombs", 0), ("concurrency", 2), ("calm", 1), ("pace", 0.01)):
        value = getattr(args, name)
        if value is not None and not least <= value < math.inf:
            parser.error(f"--{name} is {value:g}, expected at least {least:g}")

    with scratch_folder(parser, wrong=ValueError) as scratch:
        code = (soak if args.repeat is None else repeat)(args, scratch)
    sys.exit(code)


if __name__ == "__main__":
    main()
