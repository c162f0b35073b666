"""Where two pipelines part, by how much, and what that does to the probability. Pure: bytes in, numbers out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.metrics import precision_recall_fscore_support, roc_auc_score

from skewless.core.pipeline import Pipeline
from skewless.core.postprocess import Postprocessor
from skewless.core.runtimes import Runtime
from skewless.core.service import Scored
from skewless.core.stages import InputError, Payload, PipelineError, Signal, Stage
from skewless.evaluation.metrics import at_threshold
from skewless.skew.align import Alignment, Row, align


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


@dataclass(frozen=True)
class Outcome:
    """What both pipelines hold after one row of the alignment, for one recording.

    tally is None where the two cannot be subtracted: another rank or unit, or one side has no output yet.
    """

    same: bool
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    tally: Tally | None


def compare(reference: tuple[str, Signal] | None, candidate: tuple[str, Signal] | None) -> Outcome:
    """Compare two outputs, each with its unit; None: nothing has been made yet.

    Same means the same shape and equal values, whatever the floating-point type.
    """
    if reference is None or candidate is None:
        return Outcome(False, tuple(side and tuple(side[1].data.shape) for side in (reference, candidate)), None)
    (unit, a), (other, b) = ((unit, signal.data) for unit, signal in (reference, candidate))
    shapes = tuple(a.shape), tuple(b.shape)
    comparable = a.ndim == b.ndim and unit == other
    tally = Tally.of(a, b) if comparable else None
    return Outcome(comparable and shapes[0] == shapes[1] and not tally.affected, shapes, tally)


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
    """One input through both pipelines and those between them.

    alone: the answer with one edit only, per edit; cumulative: with this edit and all before it. None where the
    mixed pipeline cannot run, with the reason in `failures` under ("alone" or "in_order", edit). inert: the edits that
    alone leave the network's input as it is, bit for bit.
    """

    name: str
    label: int | None
    reference: Scored
    candidate: Scored
    outcomes: tuple[Outcome, ...]
    alone: tuple[Scored | None, ...]
    cumulative: tuple[Scored | None, ...]
    failures: Mapping[tuple[str, int], str]
    inert: frozenset[int]

    def probability(self, score: Scored) -> float:
        """The probability in which changes are told: the only score, or the one of the class that the reference chooses."""
        return score.scores[max(range(len(score.scores)), key=self.reference.scores.__getitem__)]

    @property
    def change(self) -> float:
        return self.probability(self.candidate) - self.probability(self.reference)


class Comparator:
    """Runs recordings through a reference pipeline, a candidate, and every mixture that attribution needs."""

    def __init__(
        self,
        reference: Pipeline,
        candidate: Pipeline,
        runtime: Runtime,
        postprocessor: Postprocessor,
        **limits: float,
    ):
        """limits: `max_duration_s` and `max_pixels`, as Payload has them."""
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
            (tuple(p.stages.values()), list(t.values())) for p, t in ((self.reference, ours), (self.candidate, theirs))
        ]
        scores: dict[bytes, Scored] = {}
        reference, candidate = (
            _named(side, self._score, trace[-1], scores)
            for side, (_, trace) in zip(("reference", "candidate"), known, strict=True)
        )
        answers: dict[str, list[Scored | None]] = {"alone": [], "in_order": []}
        failures, inert = {}, set()
        for way, mixtures in (("alone", self._alone), ("in_order", self._cumulative)):
            for k, stages in enumerate(mixtures):
                try:
                    signal = self._run(stages, self._payload(payload), known)[-1]
                    score = self._score(signal, scores)
                    answers[way].append(score)
                    # One input, one Scored: `_score` does not make a second one.
                    if way == "alone" and score is reference:
                        inert.add(k)
                except (InputError, PipelineError) as error:
                    answers[way].append(None)
                    failures[way, k] = str(error)
        return Measurement(
            name,
            label,
            reference,
            candidate,
            tuple(self._outcomes(ours.values(), theirs.values())),
            tuple(answers["alone"]),
            tuple(answers["in_order"]),
            failures,
            frozenset(inert),
        )

    def traces(self, payload: bytes) -> tuple[dict[str, Signal], dict[str, Signal]]:
        """Every signal in the reference and in the candidate, by stage, in order; raises as `measure` does."""
        start = self._payload(payload)
        return tuple(
            dict(zip(p.stages, _named(side, self._run, tuple(p.stages.values()), start, []), strict=True))
            for side, p in (("reference", self.reference), ("candidate", self.candidate))
        )

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
                except InputError:
                    raise
                except Exception as error:  # stages in an order nobody meant can fail in any way
                    raise PipelineError(f"stage '{stage.name}' cannot run here: {error}") from error
                if not torch.isfinite(signals[-1].data).all():
                    raise InputError(f"stage '{stage.name}' gives values that are not finite")
        return signals

    def _score(self, signal: Signal, scores: dict[bytes, Scored]) -> Scored:
        """The network's answer; an input that is bit-identical to one already scored is not run again."""
        times = signal.metadata.get("segment_times_s")
        if times is not None and len(times) != len(signal.data):
            raise PipelineError(f"the pipeline gives {len(signal.data)} inputs for {len(times)} segments")
        tensor = signal.data.contiguous()
        key = hashlib.sha256(repr((tensor.dtype, tensor.shape, times)).encode() + tensor.numpy().tobytes()).digest()
        if key not in scores:
            try:
                (outputs,) = self._runtime([tensor])
            except RuntimeError as error:
                raise PipelineError(f"the network cannot take {tuple(tensor.shape)} {tensor.dtype}: {error}") from error
            scores[key] = Scored(
                self._postprocessor.scores(outputs), tuple(self._postprocessor.parts(outputs, signal.metadata))
            )
        return scores[key]

    def _outcomes(self, ours: Iterable[Signal], theirs: Iterable[Signal]) -> list[Outcome]:
        left, right = iter(ours), iter(theirs)
        a = b = None
        outcomes = []
        for row in self.alignment.rows:
            a = (row.reference[1].unit or a[0], next(left)) if row.reference else a
            b = (row.candidate[1].unit or b[0], next(right)) if row.candidate else b
            outcomes.append(compare(a, b))
        return outcomes


def _named(side: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call, and name the side in what is raised."""
    try:
        return function(*args)
    except InputError as error:
        raise InputError(f"{side}: {error}", error.kind) from error
    except PipelineError as error:
        raise PipelineError(f"{side} pipeline: {error}") from error


def summarize(
    alignment: Alignment,
    measurements: Sequence[Measurement],
    threshold: float,
    classes: Sequence[str] = ("negative", "positive"),
) -> dict[str, Any]:
    """All recordings together, in plain JSON types: stages, first divergence, attribution, decisions, recordings.

    Attribution counts along two ways, both as changes of the probability: each edit alone on the reference, and all
    edits in pipeline order, whose increments add up to the whole change. An edit after which some recording cannot run
    has no increment of its own: it counts with the next edit that has one. Interaction is the whole change less all
    the changes alone. Raises ValueError without recordings.
    """
    if not measurements:
        raise ValueError("there is no recording to compare")
    firsts = [first_divergence(alignment.rows, m.outcomes) for m in measurements]
    stages = [_stage_summary(alignment, at, measurements, firsts) for at in range(len(alignment.rows))]
    own = [all(m.cumulative[k] is not None for m in measurements) for k in range(len(alignment.edits))]
    chains = [_chain(m, own) for m in measurements]
    edits = []
    for k, edit in enumerate(alignment.edits):
        alone = [(m, m.reference, score) for m in measurements if (score := m.alone[k]) is not None]
        edits.append(
            {
                "edit": str(edit),
                "kind": edit.kind,
                "stage": edit.stage,
                "changes": {name: list(pair) for name, pair in edit.changes.items()},
                "alone": _effect(alone, threshold),
                "inputs_changed_alone": len(alone) - sum(k in m.inert for m in measurements),
                "in_order": _effect([(m, *chain[k]) for m, chain in zip(measurements, chains, strict=True)], threshold)
                if own[k]
                else None,
                "counted_with": None if own[k] else own.index(True, k),
                "cannot_run": {
                    way: dict(Counter(m.failures[way, k] for m in measurements if (way, k) in m.failures))
                    for way in ("alone", "in_order")
                },
            }
        )
    interactions = [i for m in measurements if (i := _interaction(m)) is not None]
    return {
        "threshold": threshold,
        "classes": list(classes),
        "recordings_compared": len(measurements),
        "inputs_identical": sum(m.outcomes[-1].same for m in measurements),
        "first_divergence": _first_summary(stages, firsts),
        "stages": stages,
        "edits": edits,
        "together": _effect([(m, m.reference, m.candidate) for m in measurements], threshold),
        "interaction": {
            "mean": float(np.mean(interactions)) if interactions else None,
            "mean_abs": float(np.mean(np.abs(interactions))) if interactions else None,
            "max_abs": float(np.max(np.abs(interactions))) if interactions else None,
            "recordings": len(interactions),
        },
        "metrics": _metrics(measurements, threshold, classes),
        "recordings": [
            _recording_summary(alignment, m, threshold, classes, first, chain, own)
            for m, first, chain in zip(measurements, firsts, chains, strict=True)
        ],
    }


def _stage_summary(
    alignment: Alignment, at: int, measurements: Sequence[Measurement], firsts: Sequence[int | None]
) -> dict[str, Any]:
    row, outcomes = alignment.rows[at], [m.outcomes[at] for m in measurements]
    tally = Tally()
    for outcome in outcomes:
        if outcome.tally:
            tally.add(outcome.tally)
    shapes = Counter(o.shapes for o in outcomes if o.shapes[0] != o.shapes[1])
    return {
        "stage": row.label,
        "reference": row.reference and row.reference[0],
        "candidate": row.candidate and row.candidate[0],
        "definition": alignment.definition(row),
        "edit": row.edit,
        "same": all(o.same for o in outcomes),
        "recordings_differing": sum(not o.same for o in outcomes),
        "recordings_diverging_here_first": firsts.count(at),
        "unit": (row.reference or row.candidate)[1].unit or "as before",
        "difference": tally.summary(),
        "shapes": [
            {"reference": a and list(a), "candidate": b and list(b), "recordings": count}
            for (a, b), count in shapes.most_common()
        ],
    }


def _first_summary(stages: list[dict[str, Any]], firsts: Sequence[int | None]) -> dict[str, Any] | None:
    found = [at for at in firsts if at is not None]
    if not found:
        return None
    at = min(found)
    seen = (s["stage"] for s in stages[at:] if s["reference"] and s["candidate"] and not s["same"])
    return {
        "row": at,
        "stage": stages[at]["stage"],
        "definition": stages[at]["definition"],
        "recordings": found.count(at),
        "seen_at": next(seen, None),
    }


def _chain(m: Measurement, own: Sequence[bool]) -> list[tuple[Scored, Scored] | None]:
    """(before, after) of every edit in order that has an increment of its own."""
    chain, before = [], m.reference
    for k, after in enumerate(m.cumulative):
        chain.append((before, after) if own[k] else None)
        before = after if own[k] else before
    return chain


def _interaction(m: Measurement) -> float | None:
    if any(p is None for p in m.alone):
        return None
    return m.change - sum(m.probability(score) - m.probability(m.reference) for score in m.alone)


def _effect(pairs: Sequence[tuple[Measurement, Scored, Scored]], threshold: float) -> dict[str, Any]:
    """Mean, mean absolute and largest change of the probability, and how many decisions change, of (recording, answer
    before, answer after)."""
    changes = np.array([m.probability(after) - m.probability(before) for m, before, after in pairs])
    return {
        "mean": float(changes.mean()) if pairs else None,
        "mean_abs": float(np.abs(changes).mean()) if pairs else None,
        "max_abs": float(np.abs(changes).max()) if pairs else None,
        "flips": sum(before.chosen(threshold) != after.chosen(threshold) for _, before, after in pairs),
        "recordings": len(pairs),
    }


def _metrics(measurements: Sequence[Measurement], threshold: float, classes: Sequence[str]) -> dict[str, Any] | None:
    """AUC and the metrics of the decisions, both ways; None unless every class occurs. With more than two classes the
    means over each against the rest."""
    if {m.label for m in measurements} != set(range(len(classes))):
        return None
    labels = np.array([m.label for m in measurements])
    found = {}
    for side in ("reference", "candidate"):
        answers = [getattr(m, side) for m in measurements]
        scores = np.array([answer.scores for answer in answers])
        if len(classes) == 2:
            found[side] = {
                "auc": float(roc_auc_score(labels, scores[:, 0])),
                **at_threshold(labels, scores[:, 0], threshold),
            }
        else:
            chosen = [answer.chosen(threshold) for answer in answers]
            figures = precision_recall_fscore_support(labels, chosen, average="macro", zero_division=0.0)
            found[side] = {
                "auc": float(roc_auc_score(np.eye(len(classes))[labels], scores, average="macro")),
                "accuracy": float(np.mean(chosen == labels)),
                **dict(zip(("precision", "recall", "f1"), map(float, figures[:3]), strict=True)),
            }
    return found


def _recording_summary(
    alignment: Alignment,
    m: Measurement,
    threshold: float,
    classes: Sequence[str],
    first: int | None,
    chain: Sequence[tuple[Scored, Scored] | None],
    own: Sequence[bool],
) -> dict[str, Any]:
    sides = {"reference": m.reference, "candidate": m.candidate}
    return {
        "name": m.name,
        "label": None if m.label is None else classes[m.label],
        "probability": {side: m.probability(score) for side, score in sides.items()},
        "chosen": {side: classes[score.chosen(threshold)] for side, score in sides.items()},
        "change": m.change,
        "alone": [None if s is None else m.probability(s) - m.probability(m.reference) for s in m.alone],
        "in_order": [
            m.probability(chain[k][1]) - m.probability(chain[k][0]) if own[k] else None for k in range(len(chain))
        ],
        "interaction": _interaction(m),
        "first_divergence": None if first is None else alignment.rows[first].label,
        "segments": {
            side: {
                "probabilities": [p.probability for p in s.parts],
                "times_s": [[p.start_s, p.end_s] for p in s.parts],
            }
            for side, s in sides.items()
        },
        "stages": [
            {
                "stage": row.label,
                "same": o.same,
                "shapes": [shape and list(shape) for shape in o.shapes],
                "difference": o.tally and o.tally.summary(),
            }
            for row, o in zip(alignment.rows, m.outcomes, strict=True)
        ],
    }
