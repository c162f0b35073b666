"""Measure every runtime with several micro-batches and numbers of workers, side by side, and choose one."""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from skewless import __version__
from skewless.core.cores import available_cores, cpu_quota
from skewless.core.definition import Definition
from skewless.core.networks import Network
from skewless.core.numerics import TOLERANCES
from skewless.core.runtimes import RUNTIMES, RuntimeSettings, runtime_settings
from skewless.core.selftest.record import ENTRIES, REFERENCES
from skewless.core.service import METRICS
from skewless.core.versions import library_versions
from skewless.errors import CheckFailedError, UsageError
from skewless.packaging.build import TUNING, copy_definition, evaluated
from skewless.packaging.execution import Execution
from skewless.training.checkpoint import load_checkpoint, network_of, trained
from skewless.tuning import configuration
from skewless.tuning.worker import MICRO_BATCHES, Crew, Done, Setup, Task, crew_of

REFERENCE = "eager"
# Closer than this to the fastest is as fast: less than what a quiet machine differs by from minute to minute.
MARGIN = 0.03
# Rounds of one candidate that differ by a larger factor say that the machine was busy with something else.
STEADY = 1.2
RULE = (
    f"of those whose median ratio to {REFERENCE} is within {MARGIN:.0%} of the highest, the one with the fewest workers, then "
    "with the smallest micro-batch, which take the least memory; then the fastest"
)
# Each worker holds the model and all that computes it: hundreds of MB.
_MOST_WORKERS = 8


@dataclass(frozen=True)
class Candidate:
    """A runtime's name, how many rows it computes at once, how many workers there are, and the threads of each."""

    runtime: str
    micro_batch: int
    workers: int
    threads: int

    def __str__(self) -> str:
        return f"{self.runtime}, micro-batch {self.micro_batch}, {self.workers} x {self.threads} threads"


@dataclass(frozen=True)
class Measured:
    """A candidate's figures, medians over the rounds.

    rows_per_s: of all workers together. seconds: for one pass over the references. ratio: its rows per second as a multiple
    of the reference's in the same round. variation: its fastest round as a multiple of its slowest. max_dp: the largest
    difference of a score from the reference's.
    """

    candidate: Candidate
    rows_per_s: float
    seconds: float
    ratio: float
    variation: float
    max_dp: float


@dataclass(frozen=True)
class Excluded:
    """What was not measured, and why. candidate: None for all of a runtime's."""

    runtime: str
    reason: str
    candidate: Candidate | None = None


@dataclass(frozen=True)
class Tuning:
    """What was found, and what was chosen by RULE. configuration: what is written. written: the files; empty for a trial."""

    measured: Sequence[Measured]
    excluded: Sequence[Excluded]
    chosen: Measured
    configuration: Mapping[str, Any]
    about: Mapping[str, Any]
    written: Sequence[Path] = ()

    def document(self) -> dict[str, Any]:
        """What tuning.json holds: no date and no path, figures to four digits."""
        candidates: list[dict[str, Any]] = [
            {**asdict(each.candidate), **{k: float(f"{v:.4g}") for k, v in asdict(each).items() if k != "candidate"}}
            for each in self.measured
        ]
        for each in self.excluded:
            candidates.append({"runtime": each.runtime} | (asdict(each.candidate) if each.candidate else {}))
            candidates[-1]["excluded"] = each.reason
        return {"configuration": self.configuration, "rule": RULE, **self.about, "candidates": candidates}

    def text(self) -> str:
        """A table, the fastest first, and what was chosen."""
        head = ["runtime", "micro-batch", "workers x threads", "rows/s", "ratio", "seconds", "max abs dp", ""]
        rows = [
            [
                each.candidate.runtime,
                str(each.candidate.micro_batch),
                f"{each.candidate.workers} x {each.candidate.threads}",
                f"{each.rows_per_s:.1f}",
                f"{each.ratio:.2f}",
                f"{each.seconds:.3f}",
                f"{each.max_dp:.1e}",
                "chosen" if each is self.chosen else "",
            ]
            for each in sorted(self.measured, key=lambda each: -each.ratio)
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        table = [head, ["-" * width for width in widths], *rows]
        lines = [f"| {' | '.join(c.ljust(w) for c, w in zip(row, widths, strict=True))} |".rstrip(" ") for row in table]
        machine = self.about["machine"]
        lines += ["", f"{machine['cpu']}, {machine['available_cores']} cores; {self.about['workload']}"]
        lines += [f"ratio: rows/s as a multiple of {self.about['reference']}, median of {self.about['rounds']} rounds"]
        unsteady = max(each.variation for each in self.measured)
        if unsteady > STEADY:
            lines.append(
                f"note: from round to round the same candidate's rows/s differ by up to a factor of {unsteady:.2f}; something "
                "else used the processor, and another run may choose otherwise: run it again on a quiet machine"
            )
        lines += [f"left out: {each.candidate or each.runtime}: {each.reason}" for each in self.excluded]
        lines += [f"rule: {RULE}", f"chosen: {self.chosen.candidate}"]
        lines += [f"written: {path}" for path in self.written]
        return "\n".join(lines if self.written else [*lines, "nothing was written"])


def choose(measured: Sequence[Measured]) -> Measured:
    """The best of them by RULE; the same figures give the same choice, in whatever order."""
    fastest = max(each.ratio for each in measured)
    near = [each for each in measured if each.ratio >= (1 - MARGIN) * fastest]
    return min(
        near,
        key=lambda each: (each.candidate.workers, each.candidate.micro_batch, -each.ratio, each.candidate.runtime),
    )


def tune(
    archive: Path,
    checkpoint_path: Path,
    evaluation: Path,
    *,
    workers: int | None = None,
    rounds: int = 5,
    dry_run: bool = False,
    cell_seconds: float = 0.3,
) -> Tuning:
    """Measure on this machine's CPU, choose, and write the choice into the folder `archive`, unless `dry_run`.

    archive: a definition; its model.yaml and model-config.yaml get the choice, and tuning.json the figures. evaluation: what
    `skewless evaluate` wrote for this checkpoint; its references are what is computed. workers: only this many; None for one,
    and for one per core, at most 8. rounds: each measures every candidate in turn, after a first one that does not count.
    cell_seconds: how long one measurement lasts at least.

    Only the network is measured, in float32, behind the stages that model.yaml has the runtime absorb. Each worker has the
    cores divided by the workers as its threads. A candidate whose scores differ from eager mode's by more than the exact
    tier's tolerance is left out, as is a runtime that cannot execute the network.
    Raises UsageError, BuildError or CheckpointError for what does not fit together, and CheckFailedError where eager mode
    itself does not give the recorded scores.
    """
    checkpoint = load_checkpoint(checkpoint_path)
    definition = trained(Definition.read(archive), checkpoint)
    counts, cores = _counts(workers), available_cores()
    _, settings = runtime_settings(definition.runtime)
    if settings.precision != "fp32":
        raise UsageError(
            f"{archive} runs in {settings.precision}, whose numbers are others; only fp32 is measured: take `precision` out "
            "of model.yaml's runtime first"
        )
    if not (evaluation / METRICS).is_file():
        raise UsageError(f"there is no {evaluation / METRICS}; run `skewless evaluate` first")
    evaluated(evaluation, checkpoint_path)
    # Before minutes of measuring.
    configuration.rewritten(archive, _entry(definition, REFERENCE, 1), cores, 1)
    entries = json.loads((evaluation / REFERENCES / ENTRIES).read_text(encoding="utf-8"))
    references = tuple(evaluation / REFERENCES / entry["file"] for entry in entries)

    with tempfile.TemporaryDirectory(prefix="skewless-") as scratch, ExitStack() as stack:
        folders, excluded = _stage(definition, network_of(checkpoint, definition), Path(scratch))
        crews: dict[int, Crew] = {}
        for count in counts:
            crews[count] = stack.enter_context(crew_of(count, Setup(folders, references, cores // count)))
            excluded += [Excluded(name, reason) for name, reason in crews[count].faults.items() if count == counts[0]]
        loaded = [name for name in folders if all(name not in crew.faults for crew in crews.values())]
        candidates = [
            Candidate(name, size, count, cores // count)
            for count in counts
            for name in loaded
            for size in MICRO_BATCHES
        ]
        reference = Candidate(REFERENCE, RuntimeSettings.micro_batch, counts[0], cores // counts[0])
        # First in each round: the others are compared with it.
        candidates.sort(key=lambda each: each != reference)
        recorded = [tuple(entry["scores"]) for entry in entries]
        measured, failed = _measure(candidates, crews, recorded, rounds, cell_seconds)
        rows = crews[counts[0]].rows
    chosen = choose(measured)
    written: dict[str, Any] = {
        "network": definition.network,
        "runtime": _entry(definition, chosen.candidate.runtime, chosen.candidate.micro_batch),
        "threads": chosen.candidate.threads,
        "workers": chosen.candidate.workers,
    }
    about = {
        "reference": str(reference),
        "rounds": rounds,
        "workload": f"{len(references)} references, {rows} rows in a pass",
        "machine": machine(),
        "versions": {"skewless": __version__}
        | library_versions(package for name in RUNTIMES for package in RUNTIMES[name].packages),
    }
    tuning = Tuning(measured, [*excluded, *failed], chosen, written, about)
    if dry_run:
        return tuning
    texts = configuration.rewritten(archive, written["runtime"], written["threads"], written["workers"])
    configuration.write(texts, archive / TUNING, tuning.document())
    return replace(tuning, written=[*texts, archive / TUNING])


def machine() -> dict[str, Any]:
    """The processor, its caches, and how much of it this process may use."""
    cpuinfo, caches = Path("/proc/cpuinfo"), Path("/sys/devices/system/cpu/cpu0/cache")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "host_cores": os.cpu_count(),
        "cpu_quota": cpu_quota(),
        "available_cores": available_cores(),
        "caches": {
            f"L{_line(each / 'level')} {_line(each / 'type')}": _line(each / "size")
            for each in sorted(caches.glob("index*"))
        },
    }


def _line(path: Path) -> str:
    """What a file of the kernel's says; empty where a virtual machine does not have it."""
    return path.read_text(encoding="ascii").strip() if path.is_file() else ""


def _counts(workers: int | None) -> list[int]:
    cores = available_cores()
    if workers is None:
        return sorted({1, min(cores, _MOST_WORKERS)})
    if workers > cores:
        raise UsageError(
            f"--workers is {workers}, expected at most {cores}: so many cores may be used here, and each worker needs one"
        )
    return [workers]


def _entry(definition: Definition, runtime: str, micro_batch: int) -> dict[str, Any]:
    """The `runtime` entry of a model.yaml. It absorbs the stages that the definition has absorbed."""
    absorb = list(runtime_settings(definition.runtime)[1].absorb)
    return {runtime: {"micro_batch": micro_batch, **({"absorb": absorb} if absorb else {})}}


def _stage(definition: Definition, network: Network, scratch: Path) -> tuple[dict[str, Path], list[Excluded]]:
    """A folder for each runtime that can be written here, and the others with the reason."""
    folders, excluded = {}, []
    for name in RUNTIMES:
        folder = scratch / name
        chosen = replace(definition, runtime=_entry(definition, name, 1))
        folder.mkdir()
        copy_definition(chosen, folder)
        try:
            Execution(name).write(network, chosen, folder)
        except ValueError as error:
            excluded.append(Excluded(name, str(error)))
            continue
        folders[name] = folder
    return folders, excluded


def _measure(
    candidates: Sequence[Candidate],
    crews: Mapping[int, Crew],
    recorded: Sequence[tuple[float, ...]],
    rounds: int,
    cell_seconds: float,
) -> tuple[list[Measured], list[Excluded]]:
    """Round by round, each candidate in turn; the first of them is the reference."""
    reference, *_ = candidates
    left, excluded = list(candidates), []
    passes: dict[Candidate, int] = dict.fromkeys(candidates, 1)
    rates: dict[Candidate, list[float]] = {each: [] for each in candidates}
    worst: dict[Candidate, float] = {}
    expected: tuple[tuple[float, ...], ...] = ()
    with tqdm(total=len(candidates) * (rounds + 1), desc="tuning", unit="cell") as bar:
        # The first is for warming up, for the scores, and to see how long a pass takes.
        for number in range(rounds + 1):
            for each in tuple(left):
                crew = crews[each.workers]
                done = crew.run(Task(each.runtime, each.micro_batch, passes[each]))
                bar.update()
                reason = next((one for one in done if isinstance(one, str)), "")
                finished = [one for one in done if isinstance(one, Done)]
                if number == 0 and not reason:
                    if each == reference:
                        expected = finished[0].scores
                        _check_recorded(expected, recorded)
                    worst[each] = float(np.max([_difference(one.scores, expected) for one in finished]))
                    if not worst[each] <= TOLERANCES["exact"]:
                        reason = (
                            f"a score is off by {worst[each]:.1e} from {REFERENCE}'s, allowed {TOLERANCES['exact']:g}"
                        )
                if reason:
                    if each == reference:
                        raise CheckFailedError(f"{each}, which the others are compared with, failed: {reason}")
                    left.remove(each)
                    excluded.append(Excluded(each.runtime, reason, each))
                    bar.total -= rounds - number
                    continue
                took = max(one.ended for one in finished) - min(one.started for one in finished)
                if number == 0:
                    passes[each] = max(1, round(cell_seconds / took))
                else:
                    rates[each].append(passes[each] * each.workers * crew.rows / took)
    measured = []
    for each in left:
        rate = statistics.median(rates[each])
        ratio = statistics.median(a / b for a, b in zip(rates[each], rates[reference], strict=True))
        seconds = each.workers * crews[each.workers].rows / rate
        variation = max(rates[each]) / min(rates[each])
        measured.append(Measured(each, rate, seconds, ratio, variation, worst[each]))
    return measured, excluded


def _difference(scores: Sequence[tuple[float, ...]], expected: Sequence[tuple[float, ...]]) -> float:
    """The largest absolute difference; NaN where a score is."""
    return float(np.abs(np.subtract(scores, expected)).max())


def _check_recorded(scores: Sequence[tuple[float, ...]], recorded: Sequence[tuple[float, ...]]) -> None:
    off = _difference(scores[: len(recorded)], recorded)
    if not off <= TOLERANCES["exact"]:
        raise CheckFailedError(
            f"{REFERENCE} gives the references other scores than the evaluation recorded, by {off:.1e}, allowed "
            f"{TOLERANCES['exact']:g}: weights, libraries or code are not the evaluation's; evaluate again"
        )
