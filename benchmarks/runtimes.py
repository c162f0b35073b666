"""Time the networks of archives of one checkpoint side by side, and compare their probabilities with the first one's.

    python -m benchmarks.runtimes model_store/cough-1.0.mar model_store/cough-1.0-int8.mar

Run it from the repository's root. Every round runs each archive once on the same 32 rows, such as segments, of the first
archive's references, so that what else the machine does touches all alike; ratios are of one round. The preprocessing is
not timed.
"""

import argparse
import os
import statistics
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import trange

from skewless.core.numerics import choose_device
from skewless.core.selftest.record import REFERENCES
from skewless.core.service import ModelService

ROWS = 32

# What lies beside the recordings in the references' folder: folders and records.
_RECORDS = ("", ".json", ".safetensors")


def load(archive: Path, folder: Path, device: torch.device) -> tuple[ModelService, list[bytes]]:
    """Unpack an archive into `folder`; returns its service and its reference recordings."""
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
    files = sorted(path for path in (folder / REFERENCES).iterdir() if path.suffix not in _RECORDS)
    return ModelService.load(folder, device, replay=False), [path.read_bytes() for path in files]


def measure(archives: Sequence[Path], rounds: int, device: torch.device, scratch: Path) -> str:
    """The table, in Markdown. scratch: an empty folder to unpack the archives into.

    Raises ValueError for archives of different checkpoints: their probabilities cannot be compared.
    """
    loaded = [load(path, scratch / str(number), device) for number, path in enumerate(archives)]
    services = [service for service, _ in loaded]
    first, recordings = loaded[0]
    if len({service.metrics["checkpoint_sha256"] for service in services}) > 1:
        raise ValueError("these archives are not of one checkpoint, so their probabilities cannot be compared")
    inputs = [first.definition.prepared(recording) for recording in recordings]
    rows = torch.cat(inputs)
    rows = torch.cat([rows] * -(-ROWS // len(rows)))[:ROWS]

    scores = [[first.postprocessor.scores(outputs) for outputs in service.runtime(inputs)] for service in services]
    seconds: list[list[float]] = [[] for _ in services]
    # Round 0 warms up.
    for number in trange(rounds + 1, desc="rounds"):
        for service, times in zip(services, seconds, strict=True):
            started = time.perf_counter()
            service.runtime([rows])
            if number:
                times.append(time.perf_counter() - started)

    lines = [
        f"{tuple(rows.shape)} float32, device {device}, {torch.get_num_threads()} threads, {rounds} rounds, "
        f"load {os.getloadavg()[0]:.1f}",
        "| archive | runtime | precision | MB | median s | min s | times as fast | max abs dp |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for path, service, times, given in zip(archives, services, seconds, scores, strict=True):
        ratio = statistics.median(a / b for a, b in zip(seconds[0], times, strict=True))
        apart = (torch.tensor(given, dtype=torch.float64) - torch.tensor(scores[0], dtype=torch.float64)).abs().max()
        lines.append(
            f"| {path.stem} | {service.runtime.name} | {service.runtime.precision} | {path.stat().st_size / 1e6:.1f} "
            f"| {statistics.median(times):.3f} | {min(times):.3f} | {ratio:.2f} | {apart:.1e} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.runtimes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "archives", type=Path, nargs="+", help="such as model_store/*.mar, the one to compare with first"
    )
    parser.add_argument("--rounds", type=int, default=9, help="(9)")
    parser.add_argument("--gpu", type=int, help="number of a CUDA device (the CPU)")
    args = parser.parse_args(argv)
    if missing := [str(path) for path in args.archives if not zipfile.is_zipfile(path)]:
        parser.error(f"no archive: {', '.join(missing)}")
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}, expected at least 1")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            print(measure(args.archives, args.rounds, choose_device(args.gpu), Path(scratch)))
        except ValueError as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
