"""Time an archive's network alone, without a server, and hold it against what the device can do.

    python -m benchmarks.forward model_store/cough-1.0-eager.mar --device cuda:0
    python -m benchmarks.forward model_store/cough-1.0.mar --eager-archive model_store/cough-1.0-eager.mar

Measured in turn in every round: the archive's own runtime with its own micro-batch; PyTorch's eager mode in float32 and in
bf16, with each batch whole; torch.compile of the float32 network. A call takes ready rows in the host's memory and ends when the outputs are there, so copies to and from a GPU are in it. TFLOP/s are the
direct convolutions' and products' operations, counted by torch.utils.flop_counter, divided by the seconds: an algorithm that
needs fewer, such as Winograd's, can come out above a ceiling. The ceilings are the rates of one large torch.matmul. A second
table starts from encoded recordings, which threads decode and preprocess while the network works.

Writes forward.json, forward.md and forward.png. Ratios are formed within a round, then the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

from skewless.core.files import atomic
from skewless.core.networks.with_stages import through
from skewless.core.numerics import NumericPolicy
from skewless.core.request import Request, RequestError
from skewless.core.runtimes import load_runtime
from skewless.core.runtimes.eager import EagerRuntime
from skewless.core.selftest.record import REFERENCES
from skewless.core.service import METRICS, Inferred, ModelService, Prepared
from skewless.packaging.probes import probes

CPU_BATCHES, GPU_BATCHES = (1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16, 32, 64, 128, 256)
CPU_MATMUL, GPU_MATMUL = 2048, 8192

# What lies beside the recordings in the references' folder: folders and records.
_RECORDS = ("", ".json", ".safetensors")


@dataclass(frozen=True)
class Variant:
    """A way to compute the network. service: with the runtime that is measured."""

    name: str
    service: ModelService

    def rows(self, payloads: Sequence[bytes], count: int) -> torch.Tensor:
        """So many rows as the runtime takes them, of these recordings in turn: `(count, ...)`."""
        found = torch.cat([self.service.definition.prepared(payload) for payload in payloads])
        return torch.cat([found] * -(-count // len(found)))[:count]


@dataclass(frozen=True)
class Measured:
    """Seconds of every round, by what was timed: (variant, batch) for the network, ceiling's name, and (variant, part) for
    recordings."""

    network: Mapping[tuple[str, int], list[float]]
    ceilings: Mapping[str, list[float]]
    recordings: Mapping[tuple[str, str], list[float]]


def load(path: Path, scratch: Path, device: torch.device) -> ModelService:
    """The service of a .mar, unpacked into `scratch`, or of an unpacked archive. Raises ValueError for anything else."""
    if path.is_file() and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as packed:
            packed.extractall(scratch)
        path = scratch
    if not (path / METRICS).is_file():
        raise ValueError(f"{path} is no archive and no unpacked one: expected a .mar, or a folder with {METRICS}")
    return ModelService.load(path, device, replay=False)


def recordings(service: ModelService) -> list[bytes]:
    """The archive's own references, or where it has none the probes that every archive of its kind is recorded with."""
    folder = service.definition.folder / REFERENCES
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in _RECORDS)
    return [path.read_bytes() for path in files] or list(probes(service.pipeline.reads).values())


def eager(service: ModelService, device: torch.device, precision: str, micro_batch: int) -> EagerRuntime:
    """PyTorch's eager mode of an eager archive, in another precision and with another micro-batch."""
    definition = service.definition
    ((name, given),) = definition.runtime.items()
    settings = {**(given or {}), "precision": precision, "micro_batch": micro_batch}
    runtime = load_runtime({name: settings}, definition.network, definition.folder, device, definition.absorbed)
    assert isinstance(runtime, EagerRuntime)
    return runtime


def variants(
    own: ModelService, weights: ModelService | None, device: torch.device, batches: Sequence[int], compiling: bool
) -> tuple[list[Variant], list[str]]:
    """What is measured, and why something is not. weights: the service of an eager archive."""
    found = [Variant(f"{own.runtime.name} {own.runtime.precision}, the archive's", own)]
    if weights is None:
        return found, ["eager is missing: this archive has no weights for it; give an --eager-archive"]
    for precision in EagerRuntime.precisions:
        runtime = eager(weights, device, precision, max(batches))
        found.append(Variant(f"eager {precision}", replace(weights, runtime=runtime)))
    if not compiling:
        return found, ["torch.compile is missing: --no-compile"]
    runtime = eager(weights, device, "fp32", max(batches))
    compiled = Variant("torch.compile fp32", replace(weights, runtime=runtime))
    # One program for each batch: PyTorch gives up after a few.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, len(batches) + 8)
    runtime.network.encode = torch.compile(runtime.network.encode, dynamic=False)  # type: ignore[method-assign]
    payloads = recordings(own)
    try:
        for batch in batches:
            compiled.service.runtime([compiled.rows(payloads, batch)])
    except Exception as error:  # it stops with whatever its compilers raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return found, [f"torch.compile is missing: it does not work here: {reason}"]
    return [*found, compiled], []


def flops_of_a_row(service: ModelService, payloads: Sequence[bytes]) -> int:
    """The operations of `encode` for one row, a multiplication and an addition as two; on the CPU, where nothing else runs.

    The network has random weights where the archive's are in a graph: that is the same work."""
    network = service.definition.build_network().eval()
    rows = Variant("", service).rows(payloads, 1).float()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.encode(through(service.definition.absorbed, rows))
    return counter.get_total_flops()


def ceilings(device: torch.device, size: int, policy: NumericPolicy) -> dict[str, Callable[[], None]]:
    """By name, one product of two `size` x `size` matrices: float32, bf16, and on CUDA float32 with inputs rounded to TF32."""
    matrices = {
        kind: torch.rand(size, size, device=device).to(kind) for kind in (torch.float32, torch.bfloat16)
    }  # torch.rand: products of zeros take less power, and so run faster

    def product(kind: torch.dtype) -> None:
        torch.matmul(matrices[kind], matrices[kind])

    def rounded() -> None:
        replace(policy, tf32=True).apply()
        try:
            product(torch.float32)
        finally:
            policy.apply()

    found: dict[str, Callable[[], None]] = {
        "matmul fp32": lambda: product(torch.float32),
        "matmul bf16": lambda: product(torch.bfloat16),
    }
    return found | ({"matmul TF32": rounded} if device.type == "cuda" else {})


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall seconds until the device has done it."""
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    found: Sequence[Variant],
    payloads: Sequence[bytes],
    batches: Sequence[int],
    files: int,
    rounds: int,
    matmul: int,
    device: torch.device,
) -> Measured:
    """Everything in turn, round by round. Round 0 warms up."""
    tops = ceilings(device, matmul, found[0].service.policy)
    rows = {(v.name, b): v.rows(payloads, b) for v in found for b in batches}
    requests = [Request(payload) for payload in (list(payloads) * -(-files // len(payloads)))[:files]]
    prepared = {v.name: _prepared(v.service, requests) for v in found}
    measured = Measured({}, {}, {})

    def note(where: Any, key: Any, number: int, work: Callable[[], object]) -> None:
        taken = seconds(work, device)
        if number:
            where.setdefault(key, []).append(taken)

    for number in range(rounds + 1):
        for name, product in tops.items():
            note(measured.ceilings, name, number, product)
        for batch in batches:
            for v in found:
                note(measured.network, (v.name, batch), number, partial(v.service.runtime, [rows[v.name, batch]]))
        for v in found:
            parts: dict[str, Callable[[], object]] = {
                "prepare": partial(_prepared, v.service, requests),
                "network": partial(_inferred, v.service, prepared[v.name]),
                "whole": partial(_whole, v.service, requests),
            }
            for part, work in parts.items():
                note(measured.recordings, (v.name, part), number, work)
    return measured


def _prepared(service: ModelService, requests: Sequence[Request]) -> list[Prepared | RequestError]:
    return list(service.prepare(requests))


def _inferred(service: ModelService, prepared: Sequence[Prepared | RequestError]) -> None:
    _through(service.infer(prepared))


def _whole(service: ModelService, requests: Sequence[Request]) -> None:
    _through(service.infer(service.prepare(requests)))


def _through(inferred: Iterable[Inferred | RequestError]) -> None:
    for each in inferred:
        if isinstance(each, RequestError):
            raise each


def _ratio(reference: Sequence[float], times: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(reference, times, strict=True))


def summarize(
    found: Sequence[Variant], payloads: Sequence[bytes], measured: Measured, flops: int, files: int, matmul: int
) -> dict[str, Any]:
    """The figures, as plain values. Rates are of the median seconds; ratios are to the reference, eager fp32 if measured."""
    names = [v.name for v in found]
    reference = next((name for name in names if name == "eager fp32"), names[0])
    scores = {
        v.name: torch.tensor([each.scores for each in v.service.score(payloads)], dtype=torch.float64) for v in found
    }
    network = [
        {
            "variant": name,
            "batch": batch,
            "seconds": (middle := statistics.median(times)),
            "rows_per_s": batch / middle,
            "tflop_per_s": batch * flops / middle / 1e12,
            "times_as_fast": _ratio(measured.network[reference, batch], times),
        }
        for (name, batch), times in measured.network.items()
    ]
    wholes = []
    for name in names:
        parts = {part: measured.recordings[name, part] for part in ("prepare", "network", "whole")}
        middles = {f"{part}_s": statistics.median(times) for part, times in parts.items()}
        wholes.append(
            {
                "variant": name,
                "recordings": files,
                **middles,
                "recordings_per_s": files / middles["whole_s"],
                "whole_to_network": _ratio(parts["whole"], parts["network"]),
                "max_abs_dp": float((scores[name] - scores[reference]).abs().max()),
            }
        )
    return {
        "reference": reference,
        "gflop_per_row": flops / 1e9,
        "matmul": matmul,
        "ceilings_tflop_per_s": {n: 2 * matmul**3 / statistics.median(t) / 1e12 for n, t in measured.ceilings.items()},
        "network": sorted(network, key=lambda row: (row["batch"], names.index(row["variant"]))),
        "recordings": wholes,
    }


def as_markdown(report: Mapping[str, Any]) -> str:
    """Two tables below what was measured where."""
    tops = report["ceilings_tflop_per_s"]
    fp32 = tops["matmul fp32"]
    size = report["matmul"]
    lines = [
        f"{report['device']}, {report['threads']} threads, {report['rounds']} rounds, load average {report['load_average']:.1f}. "
        f"{report['gflop_per_row']:.3f} GFLOP for a row. Ceilings in TFLOP/s, {size} x {size} x {size}: "
        + ", ".join(f"{name} {value:.3f}" for name, value in tops.items())
        + ".",
        *report["notes"],
        "",
        f"| batch | network | s | rows/s | TFLOP/s | of matmul fp32 | times as fast as {report['reference']} |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {row['batch']} | {row['variant']} | {row['seconds']:.4f} | {row['rows_per_s']:.1f} | {row['tflop_per_s']:.3f} "
            f"| {row['tflop_per_s'] / fp32:.0%} | {row['times_as_fast']:.2f} |"
            for row in report["network"]
        ),
        "",
        f"{report['recordings'][0]['recordings']} encoded recordings. Whole / network near 1: decoding and preprocessing are "
        "hidden behind the network.",
        "",
        "| network | network alone s | prepare alone s | whole s | recordings/s | whole / network | max abs dp |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {row['variant']} | {row['network_s']:.3f} | {row['prepare_s']:.3f} | {row['whole_s']:.3f} "
            f"| {row['recordings_per_s']:.1f} | {row['whole_to_network']:.2f} | {row['max_abs_dp']:.1e} |"
            for row in report["recordings"]
        ),
    ]
    return "\n".join(lines) + "\n"


def picture(report: Mapping[str, Any], path: Path) -> None:
    """TFLOP/s over the batch, with the ceilings as lines; both axes logarithmic."""
    figure = Figure(figsize=(8.5, 4.8), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["variant"] for row in report["network"]):
        mine = [(row["batch"], row["tflop_per_s"]) for row in report["network"] if row["variant"] == name]
        axes.plot(*zip(*mine, strict=True), marker="o", label=name)
    for number, (name, value) in enumerate(report["ceilings_tflop_per_s"].items()):
        style = ("--", ":", "-.")[number]
        axes.axhline(value, color="0.4", linestyle=style, linewidth=1, label=f"{name}, {value:.3g}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    batches = sorted({row["batch"] for row in report["network"]})
    axes.set_xticks(batches, [str(batch) for batch in batches])
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter("{x:g}")
    axes.set_xlabel("rows in a batch")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"The network alone on {report['device']}", fontsize=10, loc="left")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    with atomic(path) as unfinished:
        figure.savefig(unfinished, dpi=110, format="png", metadata={"Software": None})


def run(args: argparse.Namespace) -> str:
    """Measure, write the files, and return the tables. Raises ValueError for archives that cannot be measured."""
    device = args.device
    with ExitStack() as stack:
        own = load(args.archive, Path(stack.enter_context(tempfile.TemporaryDirectory())), device)
        weights = own if own.runtime.name == EagerRuntime.name else None
        if args.eager_archive:
            weights = load(args.eager_archive, Path(stack.enter_context(tempfile.TemporaryDirectory())), device)
            if weights.runtime.name != EagerRuntime.name:
                raise ValueError(f"--eager-archive {args.eager_archive} has the runtime '{weights.runtime.name}'")
            if weights.metrics["checkpoint_sha256"] != own.metrics["checkpoint_sha256"]:
                raise ValueError("these archives are not of one checkpoint, so they cannot be compared")
        payloads = recordings(own)
        found, notes = variants(own, weights, device, args.batches, not args.no_compile)
        load_average = os.getloadavg()[0]
        measured = measure(found, payloads, args.batches, args.recordings, args.rounds, args.matmul, device)
        report = {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "rounds": args.rounds,
            "load_average": load_average,
            "notes": notes,
            **summarize(found, payloads, measured, flops_of_a_row(own, payloads), args.recordings, args.matmul),
        }
    text = as_markdown(report)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, content in (("forward.json", json.dumps(report, indent=2) + "\n"), ("forward.md", text)):
        with atomic(args.out / name) as unfinished:
            unfinished.write_text(content, encoding="utf-8")
    picture(report, args.out / "forward.png")
    return text


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.forward", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("archive", type=Path, help="a .mar, or the folder of an unpacked one")
    parser.add_argument(
        "--eager-archive",
        type=Path,
        help="an archive of the same checkpoint with the runtime eager, where that is another",
    )
    parser.add_argument("--device", default="cpu", help="such as cuda:0 (%(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", help="rows at once (1 to 32 on a CPU, 1 to 256 on a GPU)")
    parser.add_argument(
        "--recordings", type=int, default=16, help="encoded recordings of the second table (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument(
        "--matmul", type=int, help=f"side of the ceilings' matrices ({CPU_MATMUL}; {GPU_MATMUL} on a GPU)"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes")
    parser.add_argument("--out", type=Path, default=Path("runs/forward"), help="folder (%(default)s)")
    args = parser.parse_args(argv)
    try:
        args.device = torch.device(args.device)
        # Raises where there is no such device.
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(
            f"--device is {args.device}, expected cpu, or cuda:0 where there is one: {str(error).splitlines()[0]}"
        )
    if args.device.type not in ("cpu", "cuda"):
        parser.error(f"--device is {args.device}, expected cpu, or cuda:0 where there is one")
    on_gpu = args.device.type == "cuda"
    args.batches = sorted(set(args.batches or (GPU_BATCHES if on_gpu else CPU_BATCHES)))
    args.matmul = args.matmul or (GPU_MATMUL if on_gpu else CPU_MATMUL)
    for name in ("rounds", "recordings", "matmul"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}, expected at least 1")
    if args.batches[0] < 1:
        parser.error(f"--batches has {args.batches[0]}, expected numbers from 1")
    try:
        print(run(args))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
