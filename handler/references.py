"""What every stage and the network gave when the archive was built, and the replay that a worker must pass to serve.

An archive's `references/` holds recordings (evaluation's own, with the probabilities it measured, and synthetic probes)
and a compact record of every stage's output for each: shape, type, statistics and a fixed subsample of values.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from handler.definition import read_config
from handler.pipeline import Pipeline
from handler.stages import Signal

if TYPE_CHECKING:
    from handler.service import ModelService

_SAMPLES = 256
_PACKAGES = (
    *("torch", "torchaudio", "torchvision", "numpy", "scipy", "soundfile", "av"),
    *("librosa", "numba", "soxr", "pillow"),
)


class SelfTestError(ValueError):
    """The archive does not reproduce its references here: one line, naming the first stage that differs."""


@dataclass(frozen=True)
class SelfTest:
    """A passed replay: how many recordings, the largest |dp| from evaluation's probabilities, and how long it took."""

    recordings: int
    max_dp: float
    seconds: float


def library_versions() -> dict[str, str]:
    """The versions of everything that computes a number."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def record(service: ModelService, folder: Path) -> None:
    """Write `stages.json` and `stages.safetensors`: what each stage and the network give for every recording there."""
    recordings = (p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".json", ".safetensors"))
    files = sorted(p.relative_to(folder).as_posix() for p in recordings)
    shapes: dict[str, dict[str, Any]] = {}
    values: dict[str, torch.Tensor] = {}
    for file in files:
        shapes[file] = {}
        for stage, signal in service.pipeline.steps((folder / file).read_bytes()):
            shapes[file][stage] = _kind(signal.data)
            values[f"{file}/{stage}"] = _summary(signal.data)
        (outputs,) = service.runtime([signal.data])
        values |= {f"{file}/network/{name}": value.double() for name, value in outputs.items()}
    save_file(values, folder / "stages.safetensors")
    versions = {"library_versions": library_versions(), "recordings": shapes}
    (folder / "stages.json").write_text(json.dumps(versions, indent=1) + "\n", encoding="utf-8")


def self_test(service: ModelService, root: Path) -> SelfTest:
    """Replay an unpacked archive's references on the device and with the policy that will serve.

    Raises SelfTestError for the first stage, in the pipeline's order, whose output is further from its record than the
    stage's tolerance; then for a pipeline file, a decision or weights that are not the ones built, however small their effect; then
    for network outputs or probabilities that differ by more than the runtime's tolerance.
    """
    started = time.perf_counter()
    folder = root / "references"
    recorded = json.loads((folder / "stages.json").read_text(encoding="utf-8"))
    values = load_file(folder / "stages.safetensors")
    inputs = {
        file: _replay(service.pipeline, folder, file, shapes, values, recorded["library_versions"])
        for file, shapes in recorded["recordings"].items()
    }
    _check_definition(service.pipeline, service.metrics)
    _check_decision(root, service.metrics)
    _check_weights(root, service.metrics)
    outputs = dict(zip(inputs, service.runtime(list(inputs.values())), strict=True))
    allowed = service.runtime.tolerance
    for file, output in outputs.items():
        for name, value in output.items():
            expected = values[f"{file}/network/{name}"]
            # Relative for large logits. The logistic function's slope is at most a quarter, so four times a
            # probability's tolerance is its logit's.
            worst = float(((value.double() - expected).abs() / (1 + expected.abs())).max())
            if not worst <= 4 * allowed:
                difference = f"{name} is off by {worst:.1e}, allowed {4 * allowed:g}"
                raise _error("network", file, difference, recorded["library_versions"])
    max_dp = 0.0
    for entry in json.loads((folder / "references.json").read_text(encoding="utf-8")):
        scores = service.decision.scores(outputs[entry["file"]])
        for probability, evaluated in zip(scores, entry["scores"], strict=True):
            max_dp = max(max_dp, abs(probability - evaluated))
            if not max_dp <= allowed:
                difference = f"probability {probability:.6f}, evaluated {evaluated:.6f}, allowed difference {allowed:g}"
                raise _error("network", entry["file"], difference, recorded["library_versions"])
    return SelfTest(len(inputs), max_dp, time.perf_counter() - started)


def _replay(
    pipeline: Pipeline,
    folder: Path,
    file: str,
    shapes: Mapping[str, Any],
    values: Mapping[str, torch.Tensor],
    versions: Mapping[str, str],
) -> torch.Tensor:
    """The network's input for one recording, every stage on the way compared with its record."""
    steps = pipeline.steps((folder / file).read_bytes())
    expected = iter(shapes.items())
    signal, tolerance = Signal(None), None
    for name, signal in steps:
        recorded_name, kind = next(expected, (None, None))
        if name != recorded_name:
            raise _error(name, file, f"built with '{recorded_name}' in this place", versions)
        if _kind(signal.data) != kind:
            raise _error(name, file, f"{_kind(signal.data)}, built with {kind}", versions)
        tolerance = pipeline.stages[name].tolerance or tolerance
        now, then = _summary(signal.data), values[f"{file}/{name}"]
        unit = float(then.abs().max()) or 1.0 if tolerance.relative else 1.0
        difference = (now - then).abs() / unit
        mean, largest = float(difference.mean()), float(difference.max())
        if not (mean <= tolerance.mean and largest <= tolerance.largest):
            raise _error(
                name,
                file,
                f"mean difference {mean:.1e} and largest {largest:.1e} {tolerance.unit}, allowed {tolerance.mean:g} and "
                f"{tolerance.largest:g} ({tolerance.why})",
                versions,
            )
    if (missing := next(expected, None)) is not None:
        raise _error(missing[0], file, "built with this stage, which is missing now", versions)
    return signal.data


def _check_definition(pipeline: Pipeline, metrics: Mapping[str, Any]) -> None:
    differences = pipeline.diff(Pipeline.from_dict(metrics["pipeline"]))
    if differences:
        first = differences[0]
        raise SelfTestError(
            f"self-test: stage '{first.stage}' is not as built ('there'): {'; '.join(map(str, differences))}"
        )


def _check_decision(root: Path, metrics: Mapping[str, Any]) -> None:
    now = read_config(root / "model-config.yaml")["decision"]
    if now != metrics["decision"]:
        raise SelfTestError(f"self-test: the decision is {now}, built with {metrics['decision']}")


def _check_weights(root: Path, metrics: Mapping[str, Any]) -> None:
    for name, built in metrics["weights_sha256"].items():
        now = hashlib.sha256((root / name).read_bytes()).hexdigest()
        if now != built:
            raise SelfTestError(
                f"self-test: stage 'network' is not as built: {name} has SHA-256 {now[:12]}, built with {built[:12]}"
            )


def _error(stage: str, file: str, difference: str, versions: Mapping[str, str]) -> SelfTestError:
    now = library_versions()
    changed = [f"{name} {versions.get(name)} then, {now[name]} now" for name in now if versions.get(name) != now[name]]
    return SelfTestError(
        f"self-test: stage '{stage}' differs on {file}: {difference}; {', '.join(changed) or 'versions as built'}"
    )


def _kind(data: torch.Tensor) -> str:
    return f"{tuple(data.shape)} {str(data.dtype).removeprefix('torch.')}"


def _summary(data: torch.Tensor) -> torch.Tensor:
    """Mean, standard deviation, minimum, maximum and values at fixed places, in float64."""
    flat = data.detach().flatten().double()
    # In integers: the float32 of a linspace rounds differently from one processor to the next.
    count = min(_SAMPLES, len(flat))
    places = torch.arange(count) * (len(flat) - 1) // max(count - 1, 1)
    statistics = torch.stack([flat.mean(), flat.std(correction=0), flat.min(), flat.max()])
    return torch.cat([statistics, flat[places]])
