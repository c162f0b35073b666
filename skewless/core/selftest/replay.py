"""Replaying the record on the device and with the numeric policy that will serve."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from skewless.core.cascade import Cascade, apart
from skewless.core.definition import Definition
from skewless.core.numerics import reader_threads
from skewless.core.pipeline import Pipeline
from skewless.core.runtimes import Runtime
from skewless.core.selftest.compare import StageDiffersError, compare_stages
from skewless.core.selftest.record import ENTRIES, KINDS, REFERENCES, VALUES, kind
from skewless.core.versions import changed_versions, library_versions


class SelfTestError(ValueError):
    """The archive does not reproduce its references here: one line, naming the first stage that differs."""


@dataclass(frozen=True)
class SelfTest:
    """A passed replay: how many recordings, the largest |dp| from evaluation's probabilities (None for an archive without
    references), and how long it took.

    max_dp_fast: of a decision-exact archive, the largest |dp| between its two networks on the references."""

    recordings: int
    max_dp: float | None
    seconds: float
    max_dp_fast: float | None = None


def self_test(
    definition: Definition, runtime: Runtime, metrics: Mapping[str, Any], cascade: Cascade | None = None
) -> SelfTest:
    """Replay an unpacked archive's references.

    Raises SelfTestError for the first stage, in the pipeline's order, whose output is further from its record than the
    stage's tolerance; then for a pipeline, post-processing, own code or weights that are not the ones built, however
    small their effect; then for network outputs or probabilities that differ by more than the runtime's tolerance; then for
    a fast network whose probabilities differ by more than its own tolerance, or from the exact one's by more than the margin.
    """
    started = time.perf_counter()
    folder = definition.folder / REFERENCES
    recorded = json.loads((folder / KINDS).read_text(encoding="utf-8"))
    replay = _Replay(folder, load_file(folder / VALUES), recorded["library_versions"], definition)
    files = recorded["recordings"]
    with reader_threads(1) as readers:
        inputs = dict(zip(files, readers.map(replay.prepared, files, files.values()), strict=True))
    _check_definition(definition, metrics)
    _check_weights(definition.folder, metrics)
    outputs = dict(zip(inputs, runtime(list(inputs.values())), strict=True))
    allowed = runtime.tolerance
    for file, output in outputs.items():
        replay.check_outputs(file, output, allowed)
    max_dp = None
    entries = json.loads((folder / ENTRIES).read_text(encoding="utf-8"))
    for entry in entries:
        scores = definition.postprocessor.scores(outputs[entry["file"]])
        for probability, evaluated in zip(scores, entry["scores"], strict=True):
            dp = abs(probability - evaluated)
            if not dp <= allowed:
                difference = f"probability {probability:.6f}, evaluated {evaluated:.6f}, allowed difference {allowed:g}"
                raise replay.error("network", entry["file"], difference)
            max_dp = max(max_dp or 0.0, dp)
    max_dp_fast = replay.check_cascade(cascade, entries, inputs, outputs) if cascade else None
    return SelfTest(len(inputs), max_dp, time.perf_counter() - started, max_dp_fast)


@dataclass(frozen=True)
class _Replay:
    """The record in `folder`: values by "file/stage", and the versions of the packages that computed them."""

    folder: Path
    values: Mapping[str, torch.Tensor]
    versions: Mapping[str, str]
    definition: Definition

    def prepared(self, file: str, kinds: Mapping[str, str]) -> torch.Tensor:
        """What the runtime takes of one recording: every stage of the pipeline compared with its record, and the stages that
        serving computes together compared with the same ones by themselves."""
        values = {stage: self.values[f"{file}/{stage}"] for stage in kinds}
        payload, prepared = (self.folder / file).read_bytes(), self.definition.prepared
        last = prepared.last_stage
        try:
            plain = dict(compare_stages(self.definition.pipeline, payload, kinds, values))[last]
        except StageDiffersError as found:
            raise self.error(found.stage, file, found.difference) from None
        fast = prepared.run(payload).data
        self.check_fast(file, plain, fast)
        return fast

    def check_fast(self, file: str, plain: torch.Tensor, fast: torch.Tensor) -> None:
        """Raise SelfTestError unless the steps that serving runs give the bits of the plain stages."""
        last = self.definition.prepared.last_stage
        if kind(fast) != kind(plain):
            raise self.error(last, file, f"computed together with others it gives {kind(fast)}, not {kind(plain)}")
        if not torch.equal(fast, plain):
            largest = float((fast.double() - plain.double()).abs().max())
            away = f"computed together with others it is up to {largest:.1e} away from the plain stages, expected 0"
            raise self.error(last, file, away)

    def check_outputs(self, file: str, outputs: Mapping[str, torch.Tensor], allowed: float) -> None:
        """Raise SelfTestError for the first of the network's outputs that is too far from its record."""
        for name, value in outputs.items():
            expected = self.values[f"{file}/network/{name}"]
            # Relative for large logits. The logistic function's slope is at most a quarter, so four times a
            # probability's tolerance is its logit's.
            worst = float(((value.double() - expected).abs() / (1 + expected.abs())).max())
            if not worst <= 4 * allowed:
                raise self.error("network", file, f"{name} is off by {worst:.1e}, allowed {4 * allowed:g}")

    def check_cascade(
        self,
        cascade: Cascade,
        entries: Sequence[Mapping[str, Any]],
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, Mapping[str, torch.Tensor]],
    ) -> float | None:
        """The largest |dp| between the two networks. Raises SelfTestError for the first reference on which the fast one is
        further from evaluation than its tolerance, or from the exact one than the margin."""
        files = [entry["file"] for entry in entries]
        largest = None
        scores_of = self.definition.postprocessor.scores
        for entry, output in zip(entries, cascade.fast([inputs[file] for file in files]), strict=True):
            scores = scores_of(output)
            for other, of, allowed in (
                (entry["scores"], "evaluation", cascade.fast.tolerance),
                (scores_of(outputs[entry["file"]]), "the exact network", cascade.margin),
            ):
                dp = apart(scores, other)
                if not dp <= allowed:
                    difference = (
                        f"|dp| {dp:.4f} from {of}, allowed {allowed:.4f}; build the archive on such a processor"
                    )
                    raise self.error("fast network", entry["file"], difference)
            largest = max(largest or 0.0, dp)
        return largest

    def error(self, stage: str, file: str, difference: str) -> SelfTestError:
        changed = changed_versions(self.versions, library_versions(self.definition.packages))
        return SelfTestError(
            f"self-test: stage '{stage}' differs on {file}: {difference}; {changed or 'versions as built'}"
        )


def _check_definition(definition: Definition, metrics: Mapping[str, Any]) -> None:
    if differences := definition.pipeline.diff(Pipeline.from_dict(metrics["pipeline"], definition.folder)):
        raise SelfTestError(
            f"self-test: stage '{differences[0].stage}' is not as built ('there'): {'; '.join(map(str, differences))}"
        )
    if definition.postprocess != metrics["postprocess"]:
        raise SelfTestError(
            f"self-test: the post-processing is {definition.postprocess}, built with {metrics['postprocess']}"
        )
    if changed := [
        f for f in {**definition.code, **metrics["code"]} if definition.code.get(f) != metrics["code"].get(f)
    ]:
        raise SelfTestError(f"self-test: {', '.join(sorted(changed))} is not the file that the archive was built with")


def _check_weights(root: Path, metrics: Mapping[str, Any]) -> None:
    for name, built in metrics["weights_sha256"].items():
        now = hashlib.sha256((root / name).read_bytes()).hexdigest()
        if now != built:
            raise SelfTestError(
                f"self-test: stage 'network' is not as built: {name} has SHA-256 {now[:12]}, built with {built[:12]}"
            )
