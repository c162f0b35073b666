#!/usr/bin/env python3
"""Time the networks of archives of one checkpoint side by side, and compare their probabilities with the first one's.

Every round runs each archive once on the same 32 segments of its references, so that what else the machine does
touches all alike; ratios are of one round. The preprocessing is not timed.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import trange

from skewless.core.numerics import choose_device
from skewless.core.service import ModelService

SEGMENTS = 32

# What lies beside the recordings in `references`: folders and records.
_RECORDS = ("", "json", "safetensors")


def load(archive: Path, device: torch.device) -> tuple[ModelService, list[bytes]]:
    """An archive's service and its reference recordings."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
        recordings = [
            p.read_bytes() for p in sorted(Path(folder, "references").iterdir()) if p.suffix[1:] not in _RECORDS
        ]
        return ModelService.unproven(folder, device), recordings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "archives", type=Path, nargs="+", help="such as model_store/*.mar, the one to compare with first"
    )
    parser.add_argument("--rounds", type=int, default=9, help="(9)")
    parser.add_argument("--gpu", type=int, help="number of a CUDA device (the CPU)")
    args = parser.parse_args()
    if missing := [str(path) for path in args.archives if not zipfile.is_zipfile(path)]:
        parser.error(f"no archive: {', '.join(missing)}")
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}, expected at least 1")
    device = choose_device(args.gpu)
    loaded = [load(path, device) for path in args.archives]
    first, recordings = loaded[0]
    if len({service.metrics["checkpoint_sha256"] for service, _ in loaded}) > 1:
        parser.error("these archives are not of one checkpoint, so their probabilities cannot be compared")
    inputs = [first.pipeline(recording) for recording in recordings]
    segments = torch.cat(inputs)
    segments = segments.repeat(-(-SEGMENTS // len(segments)), 1, 1, 1)[:SEGMENTS]

    probabilities = [[first.postprocessor.scores(o) for o in service.runtime(inputs)] for service, _ in loaded]
    seconds: list[list[float]] = [[] for _ in loaded]
    # Round 0 warms up.
    for number in trange(args.rounds + 1, desc="rounds"):
        for (service, _), times in zip(loaded, seconds, strict=True):
            started = time.perf_counter()
            service.runtime([segments])
            if number:
                times.append(time.perf_counter() - started)

    threads = torch.get_num_threads()
    load_average = os.getloadavg()[0]
    print(
        f"{tuple(segments.shape)} float32, device {device}, {threads} threads, {args.rounds} rounds, load {load_average:.1f}"
    )
    print("| archive | runtime | precision | MB | median s | min s | times as fast | max abs. dp |")
    print("|---|---|---|---|---|---|---|---|")
    for path, (service, _), times, given in zip(args.archives, loaded, seconds, probabilities, strict=True):
        ratio = statistics.median(a / b for a, b in zip(seconds[0], times, strict=True))
        apart = max(abs(a - b) for a, b in zip(probabilities[0], given, strict=True))
        runtime = service.runtime
        print(
            f"| {path.stem} | {runtime.name} | {runtime.precision} | {path.stat().st_size / 1e6:.1f} "
            f"| {statistics.median(times):.3f} | {min(times):.3f} | {ratio:.2f} | {apart:.1e} |"
        )


if __name__ == "__main__":
    main()
