"""Two programs compared line by line: how many planted skews are found at the right line, and what tracing costs. Linux only.

    python -m benchmarks.planted_skews --out /tmp/planted

Every skew and every refactoring of tests/programs/realistic is compared with the training script that it was made from. Then training's programs
run with and without instrumentation, alternating in one process, on one long recording and on many short ones. Seconds are of
the function alone. Memory is the high-water mark of the resident memory of a process that only runs plainly, and of one that only traces. The seconds of a
comparison begin before both processes are started and end with the report.

Writes planted_skews.json and planted_skews.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from tqdm import tqdm

from benchmarks.command import scratch_folder
from benchmarks.processes import peak_bytes
from skewless.core.files import atomic
from skewless.programs.diff import diff
from skewless.programs.program import TracedFunction, function_of
from skewless.programs.worker import ProgramError
from tests.programs import inputs
from tests.programs.realistic.skews import REFACTORINGS, SKEWS, TRAIN, Skew, write

COUGH = TRAIN.parents[1] / "cough"
LONG_SECONDS, LONG_RATE, SHORT_SECONDS, SHORT_FILES = 17.5, 44100, 3.3, 50


@dataclass(frozen=True)
class Found:
    """What a comparison told of one edit of the training script.

    right: the lines that are right to name; named: those that were, in order, each as "file:line". agree: whether the results are the same once
    training's values are in place. relative: the largest difference of the results relative to training's largest number, None
    where their shapes differ. rows: training's number of segments and the service's, where they differ; relative is then over those
    that both have. relation: how the first named value differs from training's.
    """

    name: str
    kind: str
    right: tuple[str, ...]
    named: tuple[str, ...]
    agree: bool
    relative: float | None
    rows: tuple[int, ...]
    relation: str
    seconds: float

    @property
    def first_is_right(self) -> bool:
        return bool(self.named) and self.named[0] in self.right

    @property
    def besides(self) -> tuple[str, ...]:
        return tuple(line for line in self.named if line not in self.right)


@dataclass(frozen=True)
class Cost:
    """What tracing one program on some files costs.

    plain, traced: seconds of each round, all files together. service: what the program is compared with; lines: how many are
    named; comparison: seconds until they are.
    """

    program: str
    files: str
    plain: tuple[float, ...]
    traced: tuple[float, ...]
    plain_bytes: int
    traced_bytes: int
    service: str
    lines: int
    comparison: float

    @property
    def ratio(self) -> float:
        return statistics.median(t / p for t, p in zip(self.traced, self.plain, strict=True))


def find_planted(scratch: Path, edits: Sequence[Skew]) -> list[Found]:
    """Compare each edit with the training script, in two processes for all of them."""
    files = {
        "recording": inputs.recording(scratch / "recording.wav"),
        "picture": inputs.picture(scratch / "picture.jpg"),
    }
    found = []
    training = {name: function_of(f"{TRAIN}:{name}") for name in ("network_input", "picture_input")}
    with TracedFunction(training["network_input"]) as reference, TracedFunction(training["network_input"]) as candidate:
        for edit in tqdm(edits, desc="planted", unit="edit"):
            folder = scratch / edit.name
            folder.mkdir()
            module, right = write(edit, folder)
            began = time.perf_counter()
            reference.exchange(training[edit.function])
            candidate.exchange(function_of(f"{module}:{edit.function}"))
            report = diff(reference, candidate, [files[edit.input]], progress=False)
            seconds = time.perf_counter() - began
            causes, (file,) = report["causes"], report["files"]
            told = causes[0]["relation"] if causes else None
            found.append(
                Found(
                    edit.name,
                    edit.kind,
                    right,
                    tuple(f"{c['place']['file']}:{c['place']['line']}" for c in causes),
                    file["same_in_the_end"],
                    file["input_relative"],
                    tuple(file["rows"] or ()),
                    told["text"] if told else "",
                    seconds,
                )
            )
    return found


def cost(program: Path, service: Path, files: Sequence[Path], title: str, rounds: int) -> Cost:
    """Time a program with and without instrumentation, and a whole comparison with a service."""
    training = function_of(f"{program}:network_input")
    plain, traced = [], []
    bar = tqdm(total=rounds * len(files), desc=f"{program.parent.name}, {title}", unit="file")
    with TracedFunction(training) as child, bar:
        # The first run of each kind loads libraries.
        child.run(files[0], plain=True)
        child.run(files[0])
        for _ in range(rounds):
            seconds = {True: 0.0, False: 0.0}
            for file in files:
                for is_plain in seconds:
                    seconds[is_plain] += child.run(file, plain=is_plain).seconds
                bar.update()
            plain.append(seconds[True])
            traced.append(seconds[False])
    began = time.perf_counter()
    with TracedFunction(training) as ours, TracedFunction(function_of(f"{service}:network_input")) as theirs:
        report = diff(ours, theirs, files)
    whole = time.perf_counter() - began
    return Cost(
        f"{program.parent.name}/{program.name}",
        title,
        tuple(plain),
        tuple(traced),
        _peak(program, files, plain=True),
        _peak(program, files, plain=False),
        service.name,
        len(report["causes"]),
        whole,
    )


def _peak(program: Path, files: Sequence[Path], plain: bool) -> int:
    """Peak resident memory of a fresh process that runs the program on all files."""
    with TracedFunction(function_of(f"{program}:network_input")) as child:
        for file in files:
            child.run(file, plain=plain)
        (process,) = psutil.Process().children()
        return peak_bytes(process.pid)


def found_as_markdown(found: Sequence[Found]) -> str:
    planted = [each for each in found if each.kind != "refactoring"]
    kept = [each for each in found if each.kind == "refactoring"]
    first = sum(each.first_is_right for each in planted)
    agree = sum(each.agree for each in planted)
    alarms = sum(bool(each.named) for each in kept)
    lines = [
        f"Found at the right line first: {first} of {len(planted)}. Lines named besides: {sum(len(each.besides) for each in planted)}. "
        f"Results agree in the end: {agree} of {len(planted)}. False alarms on refactorings: {alarms} of {len(kept)}. "
        f"Median {statistics.median(each.seconds for each in found):.1f} s for each comparison.",
        "",
        "| skew | kind | right to name | named | first is right | named besides | agree in the end | change of the result | how the first value differs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for each in planted:
        change = "other shape" if each.relative is None else f"{each.relative:.1e}"
        if each.rows:
            change += f" over the segments that both have (training {each.rows[0]}, the service {each.rows[1]})"
        lines.append(
            f"| `{each.name}` | {each.kind} | {_lines(each.right)} | {_lines(each.named)} | {_yes(each.first_is_right)} "
            f"| {_lines(each.besides)} | {_yes(each.agree)} | {change} | {_cell(each.relation)} |"
        )
    lines += ["", "| refactoring | named | change of the result |", "|---|---|---|"]
    for each in kept:
        change = "other shape" if each.relative is None else f"{each.relative:.1e}"
        lines.append(f"| `{each.name}` | {_lines(each.named)} | {change} |")
    return "\n".join(lines) + "\n"


def cost_as_markdown(costs: Sequence[Cost]) -> str:
    lines = [
        f"Medians over {min(len(each.plain) for each in costs)} rounds or more, {psutil.cpu_count()} processors, "
        f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}, load {psutil.getloadavg()[0]:.1f}.",
        "",
        "| program | files | plain s | traced s | traced / plain | plain peak MB | traced peak MB | traced / plain | whole comparison s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for each in costs:
        lines.append(
            f"| `{each.program}` | {each.files} | {statistics.median(each.plain):.2f} | {statistics.median(each.traced):.2f} "
            f"| {each.ratio:.2f} | {each.plain_bytes / 1e6:.0f} | {each.traced_bytes / 1e6:.0f} "
            f"| {each.traced_bytes / each.plain_bytes:.2f} | {each.comparison:.1f} (`{each.service}`, lines named: {each.lines}) |"
        )
    return "\n".join(lines) + "\n"


def _lines(lines: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(lines)) or "none"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def save(folder: Path, found: Sequence[Found], costs: Sequence[Cost]) -> None:
    """Write what was measured so far as planted_skews.json and planted_skews.md."""
    data = {
        "planted": [{**asdict(each), "first_is_right": each.first_is_right, "besides": each.besides} for each in found],
        "costs": [{**asdict(each), "ratio": each.ratio} for each in costs],
    }
    text = found_as_markdown(found) + ("\n" + cost_as_markdown(costs) if costs else "")
    for name, content in (("planted_skews.json", json.dumps(data, indent=1) + "\n"), ("planted_skews.md", text)):
        with atomic(folder / name) as unfinished:
            unfinished.write_text(content, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.planted_skews", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for what is written")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these skews and refactorings alone, and no timing")
    parser.add_argument("--rounds", type=int, default=5, help="of the long recording; the short ones have 3 (5)")
    parser.add_argument("--files", type=int, default=SHORT_FILES, help=f"how many short recordings ({SHORT_FILES})")
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS of the programs (1)")
    args = parser.parse_args(argv)
    if min(args.rounds, args.files, args.threads) < 1:
        parser.error("--rounds, --files and --threads are at least 1")
    edits = [*SKEWS, *REFACTORINGS]
    if unknown := set(args.only or ()) - {edit.name for edit in edits}:
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(edit.name for edit in edits)}")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    with scratch_folder(parser, ProgramError) as scratch:
        found = find_planted(scratch, [edit for edit in edits if not args.only or edit.name in args.only])
        costs: list[Cost] = []
        save(args.out, found, costs)
        if not args.only:
            service, _ = write(next(skew for skew in SKEWS if skew.name == "filter_order"), scratch)
            long = [inputs.recording(scratch / "long.wav", LONG_RATE, LONG_SECONDS)]
            short = [inputs.recording(scratch / f"{n}.wav", seconds=SHORT_SECONDS, seed=n) for n in range(args.files)]
            one, many = f"one of {LONG_SECONDS} s", f"{args.files} of {SHORT_SECONDS} s"
            cough = COUGH / "precompute.py"
            for program, served, files, title, rounds in (
                (TRAIN, service, long, one, args.rounds),
                (cough, COUGH / "backend_onnx.py", long, one, args.rounds),
                (TRAIN, service, short, many, 3),
                (cough, COUGH / "backend_pytorch.py", short, many, 3),
            ):
                costs.append(cost(program, served, files, title, rounds))
                # What took minutes is kept whatever becomes of the rest.
                save(args.out, found, costs)
    print((args.out / "planted_skews.md").read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    main()
