"""One recording through two pipelines: where their outputs differ, by how much, and what that does to the probability."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Unpack

import numpy as np
import torch

from skewless.core.align import Row, align
from skewless.core.numerics import all_finite
from skewless.core.pipeline import Pipeline
from skewless.core.postprocess import Postprocessor
from skewless.core.runtimes import Runtime
from skewless.core.service import Scored
from skewless.core.stages import InputError, InputLimits, Payload, PipelineError, Signal, Stage


class Tally:
    """Absolute differences between tensors: count, sum, maximum, and a histogram that gives percentiles."""

    # A bin is one value of float32's upper 16 bits, so bins are 2^-7 wide relative to their value.
    _SHIFT = 16

    def __init__(self):
        self.values, self.affected, self.total, self.maximum = 0, 0, 0.0, 0.0
        # Only bins that hold something: a full histogram for every stage of every recording would be gigabytes.
        self._codes, self._counts = np.zeros(0, np.uint16), np.zeros(0, np.int64)

    @classmethod
    def of(cls, a: torch.Tensor, b: torch.Tensor) -> Tally:
        """The differences of two tensors of one rank over the part that both have (the start of each dimension)."""
        shared = tuple(slice(min(m, n)) for m, n in zip(a.shape, b.shape, strict=True))
        distance = (a[shared].double() - b[shared].double()).abs().numpy().ravel()
        tally = cls()
        if distance.size:
            tally.values, tally.affected = distance.size, int(np.count_nonzero(distance))
            tally.total, tally.maximum = float(distance.sum()), float(distance.max())
            counts = np.bincount(distance.astype(np.float32).view(np.uint32) >> cls._SHIFT)
            tally._codes = np.flatnonzero(counts).astype(np.uint16)
            tally._counts = counts[tally._codes]
        return tally

    def add(self, other: Tally) -> None:
        self.values += other.values
        self.affected += other.affected
        self.total += other.total
        self.maximum = max(self.maximum, other.maximum)
        codes, counts = (np.concatenate(pair) for pair in ((self._codes, other._codes), (self._counts, other._counts)))
        self._codes, places = np.unique(codes, return_inverse=True)
        self._counts = np.bincount(places, weights=counts, minlength=len(self._codes)).astype(np.int64)

    def percentile(self, percent: float) -> float:
        """The value that `percent` % of the differences do not exceed, to within 0.8 % of itself."""
        place = int(np.searchsorted(np.cumsum(self._counts), percent / 100 * self.values))
        return float((self._codes[place : place + 1].astype(np.uint32) << self._SHIFT).view(np.float32)[0])

    def summary(self) -> dict[str, Any] | None:
        """max, mean, p99 in the tensors' unit, the share of values affected, their number; None without values."""
        if not self.values:
            return None
        return {
            "max": self.maximum,
            "mean": self.total / self.values,
            "p99": self.percentile(99),
            "affected": self.affected,
            "share_affected": self.affected / self.values,
            "values": self.values,
        }


class Output(NamedTuple):
    """What a stage gave, with the unit of its values, such as "dB". A stage that passes values on keeps their unit."""

    signal: Signal
    unit: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.signal.data.shape)


@dataclass(frozen=True)
class Outcome:
    """What both pipelines hold after one row of the alignment, for one recording.

    tally is None where the two cannot be subtracted: another rank or unit, or one side has no output yet.
    """

    same: bool
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    tally: Tally | None


def compare(reference: Output | None, candidate: Output | None) -> Outcome:
    """Compare what the two pipelines hold; None for one that has no output yet.

    Same means the same shape and equal values, whatever the floating-point type.
    """
    if reference is None or candidate is None:
        return Outcome(False, (reference and reference.shape, candidate and candidate.shape), None)
    shapes = reference.shape, candidate.shape
    if len(shapes[0]) != len(shapes[1]) or reference.unit != candidate.unit:
        return Outcome(False, shapes, None)
    tally = Tally.of(reference.signal.data, candidate.signal.data)
    return Outcome(shapes[0] == shapes[1] and not tally.affected, shapes, tally)


def first_divergence(rows: Sequence[Row], outcomes: Sequence[Outcome]) -> int | None:
    """The row at which two runs part, judged by outputs: None when the last outputs and all paired ones are the same.

    It is the first row where both pipelines have a stage and the outputs differ, or, where stages that only one of them
    has come directly before it and already make the difference, the first of those.
    """
    for at, (row, outcome) in enumerate(zip(rows, outcomes, strict=True)):
        if not outcome.same and (row.paired or at == len(rows) - 1):
            while at > 0 and not rows[at - 1].paired and not outcomes[at - 1].same:
                at -= 1
            return at
    return None


@dataclass(frozen=True)
class Measurement:
    """One input through the reference, the candidate, and the mixtures of both.

    alone: per edit, the answer with that edit only; cumulative: with that edit and all before it. None where the
    mixture cannot run, with the reason in `failures` under ("alone" or "in_order", the edit's number).
    without_effect: the numbers of the edits that alone leave the network's input as it is, bit for bit.
    """

    name: str
    label: int | None
    reference: Scored
    candidate: Scored
    outcomes: tuple[Outcome, ...]
    alone: tuple[Scored | None, ...]
    cumulative: tuple[Scored | None, ...]
    failures: Mapping[tuple[str, int], str]
    without_effect: frozenset[int]

    def probability(self, score: Scored) -> float:
        """The probability in which changes are told: the only score, or the one of the class that the reference chooses."""
        return score.scores[max(range(len(score.scores)), key=self.reference.scores.__getitem__)]

    @property
    def change(self) -> float:
        return self.probability(self.candidate) - self.probability(self.reference)


class Comparator:
    """Runs recordings through a reference pipeline, a candidate, and the mixtures of both that show what each edit does."""

    def __init__(
        self,
        reference: Pipeline,
        candidate: Pipeline,
        runtime: Runtime,
        postprocessor: Postprocessor,
        **limits: Unpack[InputLimits],
    ):
        """limits: `max_duration_s`, `max_pixels` and the others, as Payload has them."""
        self.alignment = align(reference, candidate)
        self.reference, self.candidate = reference, candidate
        self._runtime, self._postprocessor, self._limits = runtime, postprocessor, limits
        count = len(self.alignment.edits)
        self._alone = [self.alignment.stages(frozenset({k})) for k in range(count)]
        self._cumulative = [self.alignment.stages(frozenset(range(k + 1))) for k in range(count)]
        self._pipelines = [reference, candidate, *(Pipeline("mixed", list(s)) for s in self._alone + self._cumulative)]

    def measure(self, name: str, payload: bytes, label: int | None = None) -> Measurement:
        """Compare one encoded recording.

        Raises InputError, naming the side, when the reference or the candidate cannot read it, and PipelineError when
        one of the two cannot run at all.
        """
        ours, theirs = self.traces(payload)
        known = [
            (tuple(pipeline.stages.values()), [output.signal for output in trace.values()])
            for pipeline, trace in ((self.reference, ours), (self.candidate, theirs))
        ]
        scores: dict[bytes, Scored] = {}
        reference, candidate = (
            _named(side, self._score, trace[-1], scores)
            for side, (_, trace) in zip(("reference", "candidate"), known, strict=True)
        )
        answers: dict[str, list[Scored | None]] = {"alone": [], "in_order": []}
        failures, without_effect = {}, set()
        for way, mixtures in (("alone", self._alone), ("in_order", self._cumulative)):
            for k, stages in enumerate(mixtures):
                try:
                    signal = self._run(stages, self._payload(payload), known)[-1]
                    score = self._score(signal, scores)
                    answers[way].append(score)
                    # One input, one Scored: `_score` does not make a second one.
                    if way == "alone" and score is reference:
                        without_effect.add(k)
                except (InputError, PipelineError) as error:
                    answers[way].append(None)
                    failures[way, k] = str(error)
        return Measurement(
            name,
            label,
            reference,
            candidate,
            tuple(self.outcomes(ours, theirs)),
            tuple(answers["alone"]),
            tuple(answers["in_order"]),
            failures,
            frozenset(without_effect),
        )

    def traces(self, payload: bytes) -> tuple[dict[str, Output], dict[str, Output]]:
        """Every stage's output in the reference and in the candidate, in order; raises as `measure` does."""
        start = self._payload(payload)
        ours, theirs = (
            _with_units(pipeline, _named(side, self._run, tuple(pipeline.stages.values()), start, []))
            for side, pipeline in (("reference", self.reference), ("candidate", self.candidate))
        )
        return ours, theirs

    def _payload(self, payload: bytes) -> Payload:
        # One head for all, so that a shared prefix of two pipelines has one result; more of it changes no output.
        return Payload(payload, lambda rate: max(p.head_s(rate) for p in self._pipelines), **self._limits)

    def _run(
        self, stages: tuple[Stage, ...], payload: Payload, known: list[tuple[tuple[Stage, ...], list[Signal]]]
    ) -> list[Signal]:
        """Run stages, starting from the longest prefix among the known traces."""
        signals: list[Signal] = []
        for others, trace in known:
            shared = next((k for k, (a, b) in enumerate(zip(stages, others, strict=False)) if a != b), None)
            shared = min(len(stages), len(others)) if shared is None else shared
            signals = max(signals, trace[:shared], key=len)
        signals = list(signals)
        with torch.no_grad():
            for stage in stages[len(signals) :]:
                try:
                    signals.append(stage(signals[-1] if signals else Signal(payload)))
                except (InputError, PipelineError):
                    raise
                except Exception as error:  # stages in an order nobody meant can fail in any way
                    raise PipelineError(f"stage '{stage.name}' cannot run here: {error}") from error
                if not all_finite(signals[-1].data):
                    raise InputError(f"stage '{stage.name}' gives values that are not finite")
        return signals

    def _score(self, signal: Signal, scores: dict[bytes, Scored]) -> Scored:
        """The network's answer; an input that is bit-identical to one already scored is not run again."""
        times = signal.metadata.get("segment_times_s")
        if times is not None and len(times) != len(signal.data):
            raise PipelineError(f"the pipeline gives {len(signal.data)} inputs for {len(times)} segments")
        self._postprocessor.require_windows(len(signal.data))
        tensor = signal.data.contiguous()
        key = hashlib.sha256(repr((tensor.dtype, tensor.shape, times)).encode() + tensor.numpy().tobytes()).digest()
        if key not in scores:
            # Numbers of a pipeline that nobody trained with can be refused in any way.
            try:
                (outputs,) = self._runtime([tensor])
            except Exception as error:
                raise PipelineError(f"the network cannot take {tuple(tensor.shape)} {tensor.dtype}: {error}") from error
            if not all(map(all_finite, outputs.values())):
                raise PipelineError("the network gives values that are NaN or infinite for what the pipeline gives")
            try:
                parts = tuple(self._postprocessor.parts(outputs, signal.metadata))
                scores[key] = Scored(self._postprocessor.scores(outputs), parts)
            except Exception as error:
                raise PipelineError(f"the post-processing cannot take what the network gives: {error}") from error
        return scores[key]

    def outcomes(self, ours: Mapping[str, Output], theirs: Mapping[str, Output]) -> list[Outcome]:
        """What both hold after each row of the alignment, by the two traces of `traces`."""
        left, right = iter(ours.values()), iter(theirs.values())
        a = b = None
        outcomes = []
        for row in self.alignment.rows:
            a = next(left) if row.reference else a
            b = next(right) if row.candidate else b
            outcomes.append(compare(a, b))
        return outcomes


def _with_units(pipeline: Pipeline, signals: Sequence[Signal]) -> dict[str, Output]:
    """A pipeline's signals by stage, each with its unit."""
    outputs, unit = {}, ""
    for (key, stage), signal in zip(pipeline.stages.items(), signals, strict=True):
        unit = stage.unit or unit
        outputs[key] = Output(signal, unit)
    return outputs


def _named(side: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call, and name the side in what is raised."""
    try:
        return function(*args)
    except InputError as error:
        raise InputError(f"{side}: {error}", error.kind) from error
    except PipelineError as error:
        raise PipelineError(f"{side} pipeline: {error}") from error
