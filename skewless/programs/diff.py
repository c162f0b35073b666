"""Two programs on several files: every line at which they part, in plain JSON types, for the terminal and the page."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from skewless.errors import UsageError
from skewless.programs.causes import Cause, Compared, Outcome, Plan, Score, Search, distance_of, versions_apart
from skewless.programs.match import RTOL
from skewless.programs.program import Side
from skewless.programs.relation import describe
from skewless.programs.trace import Call, Event, Site, Swallowed, Trace
from skewless.programs.worker import ProgramError

_ARRAY = re.compile(r"<[^<>]*>")
# Their arguments say how numbers are laid out, which another layout at the next line takes back.
_LAYOUT = {"view", "reshape", "permute", "transpose", "unsqueeze", "squeeze", "expand", "expand_dims", "flatten"}
# Of so few numbers, such as the coefficients of two filters, another shape says more than how they would fit each other.
FEW = 64


def diff(
    reference: Side,
    candidate: Side,
    files: Sequence[Path],
    *,
    rtol: float = RTOL,
    score: Score | None = None,
    threshold: float | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Find the lines at which `candidate` computes something else than `reference` (training) on the files.

    rtol: values closer than this share of training's largest number are the same. score: the scores that a network gives what
    the programs return, and threshold, of its decision; without it no probabilities are told.

    Returns plain JSON types (docs/find-the-line.md has an example). A file on which one of the two raises is listed with the reason. Raises
    UsageError when there is no file, and when none can be compared.
    """
    if not files:
        raise UsageError("there is no file to compare on; name at least one recording or picture")
    search = Search(reference, candidate, rtol=rtol, score=score)
    compared: list[Compared] = []
    unreadable = []
    bar = tqdm(files, desc="comparing", unit="file", disable=not progress)
    for file in bar:
        runs = 0

        def run(side: Side, plan: Plan, file: Path = file) -> Trace:
            nonlocal runs
            runs += 1
            bar.set_postfix_str(f"{file.name}, run {runs}")
            return side.run(file, plan)

        try:
            compared.append(search.compare(file.name, run(reference, {}), run(candidate, {}), run))
        except ProgramError as error:
            unreadable.append({"file": file.name, "reason": str(error)})
    if not compared:
        reasons = "\n".join(f"  {each['file']}: {each['reason']}" for each in unreadable)
        raise UsageError(f"none of the {len(files)} files can be compared:\n{reasons}")
    return {
        "reference": reference.name,
        "candidate": candidate.name,
        "rtol": rtol,
        "threshold": threshold,
        "files_compared": len(compared),
        "files_same": sum(each.first_same for each in compared),
        "files_same_in_the_end": sum(each.same for each in compared),
        "causes": _causes(compared, rtol, threshold),
        "files": [_file(each, threshold) for each in compared],
        "unreadable": unreadable,
        "calls": _calls(compared),
        "only_called": _only_called(compared),
        "swallowed": {
            "reference": _swallowed([each.training for each in compared]),
            "candidate": _swallowed([each.candidate for each in compared]),
        },
        "settings": _settings(compared[0].training, compared[0].candidate),
        "versions": {
            "reference": dict(compared[0].training.versions),
            "candidate": dict(compared[0].candidate.versions),
            "apart": [
                list(each) for each in versions_apart(compared[0].training.versions, compared[0].candidate.versions)
            ],
        },
        "notes": {
            "reference": sorted({note for each in compared for note in each.training.notes}),
            "candidate": sorted({note for each in compared for note in each.candidate.notes}),
        },
        "sources": {
            "reference": dict(compared[0].training.sources),
            "candidate": dict(compared[0].candidate.sources),
        },
    }


# --- causes


def _causes(compared: Sequence[Compared], rtol: float, threshold: float | None) -> list[dict[str, Any]]:
    """One entry for each line of the candidate and what training does there, in the order in which they were met."""
    found: dict[tuple[str, int], list[tuple[Compared, Cause]]] = defaultdict(list)
    for each in compared:
        for cause in each.causes:
            found[cause.parting.site.whole].append((each, cause))
    ordered = sorted(found.values(), key=lambda each: min(c.parting.events[0].number for _, c in each))
    return [_cause(each, rtol, threshold) for each in ordered]


def _cause(found: Sequence[tuple[Compared, Cause]], rtol: float, threshold: float | None) -> dict[str, Any]:
    _, clearest = max(found, key=lambda each: _how_far(each[1]))
    site = clearest.parting.site
    counterpart = clearest.counterpart.site if clearest.counterpart else None
    event, other = clearest.pair
    if clearest.times is not None:
        counterpart = clearest.times[2]
    last, theirs = clearest.common
    return {
        "kind": "number" if clearest.times else clearest.counterpart.kind if clearest.counterpart else "unlike",
        "place": {**(_place(site) or {}), "text": event.site.text if event.site.whole == site.whole else site.text},
        "operation": event.operation,
        "counterpart": _place(counterpart),
        "counterpart_operation": other.operation if other else None,
        "put_right_at": _place(clearest.put_at),
        "last_common": {
            "candidate": _place(last.site if last else None),
            "reference": _place(theirs.site if theirs else None),
        },
        "missing": [_place(e.site) for e in clearest.counterpart.missing]
        if clearest.counterpart and clearest.times is None
        else [],
        "value": {
            "candidate": None if clearest.times else _value(event),
            "reference": None if clearest.times else _value(other),
        },
        "relation": _relation(clearest, rtol),
        "arguments": [] if clearest.times else _arguments(event.call, other.call if other else None),
        "files": len({each.file for each, _ in found}),
        "runs": max(len(c.parting.events) for _, c in found),
        "changed_unseen": any(c.parting.unknown for _, c in found),
        "stopped": next((c.stopped for _, c in found if c.stopped), ""),
        "effect": {
            "alone": _effect([(f.reference_outcome, c.alone) for f, c in found], threshold),
            "in_order": _effect([(c.after, c.before) for _, c in found], threshold),
        },
    }


def _relation(cause: Cause, rtol: float) -> dict[str, Any] | None:
    """How the candidate's value differs from training's; None where one was not kept, or is a few numbers of another shape."""
    a, b = cause.reference, cause.candidate
    if cause.times is not None:
        ours, theirs, _ = cause.times
        text = f"the service's line runs {ours} times and training's {theirs} times"
        numbers = {"candidate": ours, "reference": theirs}
        return {"kind": "number", "text": text, "numbers": numbers, "largest": None, "relative": None}
    if a is None or b is None or (max(a.size, b.size) < FEW and np.squeeze(a).shape != np.squeeze(b).shape):
        return None
    described = describe(a, b, rtol=rtol)
    return {
        "kind": described.kind,
        "text": described.text,
        "numbers": described.numbers,
        "largest": described.largest,
        "relative": described.relative,
    }


def _how_far(cause: Cause) -> float:
    return (distance_of(cause.after, cause.before).largest or 0.0) if cause.after else 0.0


def _effect(pairs: Sequence[tuple[Outcome | None, Outcome | None]], threshold: float | None) -> dict[str, Any] | None:
    """What the second of each pair is away from the first: the network's input, and its probability; None without a pair."""
    known = [
        (a, b) for a, b in pairs if a is not None and b is not None and a.array is not None and b.array is not None
    ]
    refused = next((b.refused for _, b in pairs if b is not None and b.refused), "")
    if not known:
        return {"files": 0, "refused": refused} if refused else None
    far = [distance_of(a, b) for a, b in known]
    largest = [d.largest for d in far if d.largest is not None]
    relative = [d.relative for d in far if d.relative is not None]
    rows = next((d.rows for d in far if d.rows), None)
    scored = [(a.scores, b.scores) for a, b in known if a.scores is not None and b.scores is not None]
    moved = [_moved(a, b) for a, b in scored]
    return {
        "files": len(known),
        "input_largest": max(largest) if largest else None,
        "input_relative": max(relative) if relative else None,
        "rows": list(rows) if rows else None,
        "dp_mean": float(np.mean(np.abs(moved))) if moved else None,
        "dp_largest": float(np.max(np.abs(moved))) if moved else None,
        "flips": sum(_chosen(a, threshold) != _chosen(b, threshold) for a, b in scored) if scored else None,
        "refused": refused,
    }


def _moved(before: tuple[float, ...], after: tuple[float, ...]) -> float:
    """The change of the only score, or of that of the class chosen before."""
    at = max(range(len(before)), key=before.__getitem__)
    return after[at] - before[at]


def _chosen(scores: tuple[float, ...], threshold: float | None) -> int:
    if len(scores) == 1:
        return int(scores[0] >= (0.5 if threshold is None else threshold))
    return max(range(len(scores)), key=scores.__getitem__)


def _arguments(ours: Call | None, theirs: Call | None) -> list[dict[str, Any]]:
    """The arguments in which two calls of one function differ; arrays are compared elsewhere."""
    if ours is None or theirs is None or ours.function != theirs.function:
        return []
    names = dict.fromkeys((*theirs.arguments, *ours.arguments))
    return [
        {
            "function": ours.function,
            "argument": name,
            "reference": theirs.arguments.get(name),
            "candidate": ours.arguments.get(name),
            "given": {"reference": name in theirs.given, "candidate": name in ours.given},
        }
        for name in names
        if _apart(theirs.arguments.get(name), ours.arguments.get(name))
    ]


def _apart(ours: str | None, theirs: str | None) -> bool:
    """Whether two arguments differ. Arrays are values, and compared elsewhere."""
    if (ours or "").startswith("<") or (theirs or "").startswith("<"):
        return False
    return _ARRAY.sub("<>", ours or "") != _ARRAY.sub("<>", theirs or "") or (ours is None) != (theirs is None)


# --- the programs beside each other


def _file(each: Compared, threshold: float | None) -> dict[str, Any]:
    far = distance_of(each.reference_outcome, each.candidate_outcome)
    a, b = each.reference_outcome.scores, each.candidate_outcome.scores
    return {
        "file": each.file,
        "same": each.first_same,
        "same_in_the_end": each.same,
        "stopped": each.stopped,
        "input_largest": far.largest,
        "input_relative": far.relative,
        "rows": list(far.rows) if far.rows else None,
        "shapes": {
            "reference": [list(item.shape) for item in each.training.outputs],
            "candidate": [list(item.shape) for item in each.candidate.outputs],
        },
        "scores": {"reference": a and list(a), "candidate": b and list(b)},
        "flipped": _chosen(a, threshold) != _chosen(b, threshold) if a and b else None,
        "refused": each.reference_outcome.refused or each.candidate_outcome.refused,
        "causes": [_place(cause.parting.site) for cause in each.causes],
        "seconds": {"reference": each.training.seconds, "candidate": each.candidate.seconds},
    }


def _calls(compared: Sequence[Compared]) -> list[dict[str, Any]]:
    """Functions that both call, with other arguments: the n-th different call of one against the n-th of the other."""
    found: dict[tuple[str, str, str | None, str | None], dict[str, Any]] = {}
    for each in compared:
        ours, theirs = _by_function(each.candidate), _by_function(each.training)
        for function in theirs:
            for (site, call), (at, other) in zip(theirs[function], ours.get(function, []), strict=False):
                if _ranks(call) != _ranks(other):
                    continue
                for one in _arguments(other, call):
                    key = (function, one["argument"], one["reference"], one["candidate"])
                    found.setdefault(
                        key, {**one, "places": {"reference": _place(site), "candidate": _place(at)}, "files": 0}
                    )["files"] += 1
    return list(found.values())


def _ranks(call: Call) -> list[int]:
    """The numbers of axes of the arrays that a call is given: a padding of pictures is no padding of a recording."""
    return [found.count(",") for text in call.arguments.values() for found in _ARRAY.findall(text)]


def _by_function(trace: Trace) -> dict[str, list[tuple[Site, Call]]]:
    """Each function's calls, once for each line."""
    found: dict[str, dict[Site, Call]] = defaultdict(dict)
    for event in trace.events:
        if event.call is not None and event.call.function.rpartition(".")[2] not in _LAYOUT:
            found[event.call.function].setdefault(event.site, event.call)
    return {function: list(calls.items()) for function, calls in found.items()}


def _only_called(compared: Sequence[Compared]) -> dict[str, list[str]]:
    ours = {function for each in compared for function in _by_function(each.candidate)}
    theirs = {function for each in compared for function in _by_function(each.training)}
    return {"reference": sorted(theirs - ours), "candidate": sorted(ours - theirs)}


def _swallowed(traces: Sequence[Trace]) -> list[dict[str, Any]]:
    found: dict[tuple[Site, str, str], list[Swallowed]] = defaultdict(list)
    for trace in traces:
        for each in trace.swallowed:
            found[each.site, each.exception, each.message].append(each)
    return [
        {
            "place": _place(site),
            "exception": kind,
            "message": message,
            "files": len(all_),
            "count": sum(each.count for each in all_),
        }
        for (site, kind, message), all_ in found.items()
    ]


def _settings(reference: Trace, candidate: Trace) -> list[dict[str, str]]:
    """Names that both programs give a number, a flag or a text, and another one."""
    ours, theirs = _by_name(candidate), _by_name(reference)
    return [
        {
            "name": name,
            "reference": theirs[name][1],
            "candidate": ours[name][1],
            "reference_place": theirs[name][0],
            "candidate_place": ours[name][0],
        }
        for name in theirs
        if name in ours and ours[name][1] != theirs[name][1]
    ]


def _by_name(trace: Trace) -> dict[str, tuple[str, str]]:
    found = {}
    for key, value in trace.settings.items():
        place, _, name = key.rpartition(" ")
        found[name] = (place, value)
    return found


def _place(site: Site | None) -> dict[str, Any] | None:
    if site is None:
        return None
    return {"file": site.file, "line": site.line, "text": site.text, "function": site.function}


def _value(event: Event | None) -> dict[str, Any] | None:
    if event is None:
        return None
    item = event.outputs[0]
    return {"kind": item.kind, "shape": list(item.shape), "dtype": item.dtype}
