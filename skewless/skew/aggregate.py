"""All recordings of a skew report together: from measurements to plain JSON types."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import precision_recall_fscore_support

from skewless.core.align import Alignment
from skewless.core.service import Scored
from skewless.evaluation.metrics import at_threshold, auc
from skewless.skew.measure import Measurement, Tally, first_divergence


def summarize(
    alignment: Alignment,
    measurements: Sequence[Measurement],
    threshold: float,
    classes: Sequence[str] = ("negative", "positive"),
) -> dict[str, Any]:
    """All recordings together, in plain JSON types: stages, first divergence, edits, decisions, recordings.

    What an edit does to the probability is told in two ways: alone, applied to the reference without the others; and in
    order, as the step from all edits before it to those and itself. The steps add up to the whole change. An edit after
    which some recording cannot run has no step of its own and is counted with the next edit that has one. The interaction
    is the whole change less the changes by each edit alone. Raises ValueError without recordings.
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
        in_order = [(m, *step) for m, chain in zip(measurements, chains, strict=True) if (step := chain[k]) is not None]
        edits.append(
            {
                "edit": str(edit),
                "kind": edit.kind,
                "stage": edit.stage,
                "changes": {name: list(pair) for name, pair in edit.changes.items()},
                "alone": _effect(alone, threshold),
                "inputs_changed_alone": len(alone) - sum(k in m.without_effect for m in measurements),
                "in_order": _effect(in_order, threshold) if own[k] else None,
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
            _recording_summary(alignment, m, threshold, classes, first, chain)
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
        "unit": row.first[1].unit or "as before",
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
    """The answers before and after each edit, in order; None for an edit that has no step of its own."""
    chain: list[tuple[Scored, Scored] | None] = []
    before = m.reference
    for after, has_step in zip(m.cumulative, own, strict=True):
        if after is None or not has_step:
            chain.append(None)
        else:
            chain.append((before, after))
            before = after
    return chain


def _interaction(m: Measurement) -> float | None:
    """The whole change less those of each edit alone; None where one of them cannot run alone."""
    alone = [score for score in m.alone if score is not None]
    if len(alone) < len(m.alone):
        return None
    return m.change - sum(m.probability(score) - m.probability(m.reference) for score in alone)


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
                "auc": auc(labels, scores),
                **at_threshold(labels, scores[:, 0], threshold),
            }
        else:
            chosen = [answer.chosen(threshold) for answer in answers]
            figures = precision_recall_fscore_support(labels, chosen, average="macro", zero_division=0.0)
            found[side] = {
                "auc": auc(labels, scores),
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
) -> dict[str, Any]:
    sides = {"reference": m.reference, "candidate": m.candidate}
    return {
        "name": m.name,
        "label": None if m.label is None else classes[m.label],
        "probability": {side: m.probability(score) for side, score in sides.items()},
        "chosen": {side: classes[score.chosen(threshold)] for side, score in sides.items()},
        "change": m.change,
        "alone": [None if s is None else m.probability(s) - m.probability(m.reference) for s in m.alone],
        "in_order": [None if step is None else m.probability(step[1]) - m.probability(step[0]) for step in chain],
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
