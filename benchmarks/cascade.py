"""Time a decision-exact archive against its own exact network, for more and for fewer recordings that both have to run.

    python -m benchmarks.cascade model_store/cough-1.0.mar --recordings FOLDER

Run it from the repository's root. In every round each threshold's run stands beside a run of the exact network alone on the
same recordings; ratios are of one round, in CPU seconds, so that what else the machine does touches both alike. First the
networks by themselves, at thresholds over which the share of repeated recordings varies; then, at the archive's threshold,
all from the encoded file to the answer. Decisions are compared with the exact network's each time.
"""

import argparse
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tqdm import trange

from benchmarks.runtimes import load
from skewless.core.cascade import Cascade
from skewless.core.request import Request
from skewless.core.service import ModelService

THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)


def measure(archive: Path, folder: Path | None, rounds: int, scratch: Path) -> str:
    """The tables, in Markdown. folder: recordings of any format that the archive reads; None takes its references.

    scratch: an empty folder to unpack the archive into. Raises ValueError for an archive that is not decision-exact.
    """
    service, payloads = load(archive, scratch, torch.device("cpu"))
    if service.cascade is None:
        raise ValueError(f"{archive} is not decision-exact; build one with `skewless build --decision-exact`")
    if folder is not None:
        payloads = [path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()]
    inputs = [service.definition.prepared.run(payload, **service.input_limits).data for payload in payloads]
    fast, exact = service.cascade.fast, service.cascade.exact
    lines = [
        f"{len(inputs)} recordings, {sum(map(len, inputs))} rows, {torch.get_num_threads()} threads, {rounds} rounds; fast "
        f"{fast.name} {fast.precision}, exact {exact.name} {exact.precision}, margin {service.cascade.margin:.4f}",
        "| threshold | repeated | CPU s, exact | CPU s, both | times as fast | other decisions |",
        "|---|---|---|---|---|---|",
    ]
    for threshold in sorted({*THRESHOLDS, service.threshold}):
        share, other = _decisions(service, service.cascade, inputs, threshold)
        alone, both = _interleaved(
            rounds, partial(exact, inputs), partial(service.cascade, inputs, [threshold] * len(inputs))
        )
        lines.append(f"| {threshold:g} | {100 * share:.1f} % | {_figures(alone, both)} | {other} |")
    requests = [Request(payload) for payload in payloads]
    single = replace(service, cascade=None)
    alone, both = _interleaved(rounds, lambda: single.predict(requests), lambda: service.predict(requests))
    lines += [
        "",
        "From file to answer, at the archive's threshold:",
        "",
        "| CPU s, exact | CPU s, both | times as fast |",
    ]
    lines += ["|---|---|---|", f"| {_figures(alone, both)} |"]
    return "\n".join(lines)


def _decisions(
    service: ModelService, cascade: Cascade, inputs: Sequence[torch.Tensor], threshold: float
) -> tuple[float, int]:
    """The share of recordings that both networks ran, and how many decisions are not the exact network's."""
    given = cascade(inputs, [threshold] * len(inputs))
    scores_of, choose = service.postprocessor.scores, service.postprocessor.choose
    other = sum(
        choose(scores_of(each.outputs), threshold) != choose(scores_of(outputs), threshold)
        for each, outputs in zip(given, cascade.exact(inputs), strict=True)
    )
    return sum(each.runtime is cascade.exact for each in given) / len(given), other


def _interleaved(rounds: int, *tasks: Callable[[], object]) -> tuple[list[float], ...]:
    """CPU seconds of each task in every round; round 0 warms up."""
    seconds: tuple[list[float], ...] = tuple([] for _ in tasks)
    for number in trange(rounds + 1, desc="rounds", leave=False):
        for task, times in zip(tasks, seconds, strict=True):
            started = time.process_time()
            task()
            if number:
                times.append(time.process_time() - started)
    return seconds


def _figures(alone: Sequence[float], both: Sequence[float]) -> str:
    ratio = statistics.median(a / b for a, b in zip(alone, both, strict=True))
    return f"{statistics.median(alone):.3f} | {statistics.median(both):.3f} | {ratio:.2f}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.cascade", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("archive", type=Path, help="a decision-exact one")
    parser.add_argument("--recordings", type=Path, metavar="DIR", help="(the archive's references)")
    parser.add_argument("--rounds", type=int, default=5, help="(5)")
    args = parser.parse_args(argv)
    if not zipfile.is_zipfile(args.archive):
        parser.error(f"no archive: {args.archive}")
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}, expected at least 1")
    if args.recordings is not None and not args.recordings.is_dir():
        parser.error(f"--recordings is {args.recordings}, expected a folder")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            print(measure(args.archive, args.recordings, args.rounds, Path(scratch)))
        except ValueError as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
