"""One file through two programs: the first line at which they part, training's value put in its place, the next line, and so on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from skewless.programs.match import RTOL, Comparison, Counterpart, Parting
from skewless.programs.program import Side
from skewless.programs.recorder import Place
from skewless.programs.trace import Event, Site, Trace
from skewless.programs.values import canonical
from skewless.programs.worker import ProgramError

# More lines than this are not one service that differs from its training, but two programs.
MOST_CAUSES = 40

Plan = dict[Place, dict[str, np.ndarray]]
# The scores of what a program returned, for its probability and decision.
Score = Callable[[np.ndarray], tuple[float, ...]]


@dataclass(frozen=True)
class Distance:
    """How far two programs' results are apart: the largest absolute difference, and that by training's largest number.

    None where they cannot be subtracted: another number of arrays, or of axes. rows: (training's, the candidate's) where the first axis
    has another length; then the difference is over the rows that both have.
    """

    largest: float | None
    relative: float | None
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Outcome:
    """What a program returned: its first array, and the scores that a network gives it."""

    array: np.ndarray | None
    scores: tuple[float, ...] | None = None
    refused: str = ""


@dataclass(frozen=True)
class Cause:
    """A line of the candidate that computes something training never has.

    parting: where. put_at: the line behind it at which training's value was put in place, None where it was this line itself. counterpart: what training does there, None where nothing of training's is like it.
    reference, candidate: the two values in question, None where they were too large to keep.
    pair: the candidate's event and training's. common: (the candidate's line, training's line) that last gave the same value.
    before, after: what the candidate returns with all causes before it put right, and with this one as well; None for after where
    training's value could not be put in place: `stopped` says why.
    times: (how often the line ran, how often training's did, training's line) where that is what differs.
    alone: what training returns when only this is done as the candidate does it; None where that cannot run.
    """

    parting: Parting
    put_at: Site | None
    counterpart: Counterpart | None
    reference: np.ndarray | None = field(repr=False)
    candidate: np.ndarray | None = field(repr=False)
    pair: tuple[Event, Event | None]
    common: tuple[Event | None, Event | None]
    before: Outcome
    after: Outcome | None
    alone: Outcome | None
    stopped: str = ""
    times: tuple[int, int, Site] | None = None
    alone_plan: Plan = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Compared:
    """One file. causes: in the order of the candidate's lines. same: whether the results agree once all causes are put right.

    first_same: whether they agree as they are. stopped: why the search ended before they agreed.
    """

    file: str
    training: Trace
    candidate: Trace
    reference_outcome: Outcome
    candidate_outcome: Outcome
    causes: tuple[Cause, ...]
    first_same: bool
    same: bool
    stopped: str = ""


class Search:
    """Looks for the causes of one file. score: of the network's input, for probabilities; None without a network."""

    def __init__(self, reference: Side, candidate: Side, *, rtol: float = RTOL, score: Score | None = None):
        self._reference, self._candidate, self._rtol, self._score = reference, candidate, rtol, score
        self._partial: set[Place] = set()
        self._left_out: set[Place] = set()

    def compare(self, name: str, reference: Trace, candidate: Trace, run: Callable[[Side, Plan], Trace]) -> Compared:
        """Compare two first runs on a file; `run` repeats one with values put in place. Raises ProgramError as it does."""
        comparison = Comparison(reference, candidate, self._rtol)
        first_same = comparison.outputs_same()
        target = self._outcome(reference)
        first = before = self._outcome(candidate)
        plan: Plan = {}
        causes: list[Cause] = []
        left: set[tuple[str, int]] = set()
        # Where the candidate's own parts were kept: what leads there still matters.
        self._partial, self._left_out = set(), set()
        stopped = ""
        rounds = 0
        while not comparison.outputs_same():
            rounds += 1
            if len(causes) == MOST_CAUSES or rounds == 4 * MOST_CAUSES:
                stopped = f"there are more than {MOST_CAUSES} such lines"
                break
            partings = comparison.partings(left)
            if not partings:
                stopped = stopped or "no line was found whose inputs training had and whose result it never has"
                break
            found = self._put_right(partings[0], left, comparison, plan, run)
            if isinstance(found, str):
                left.add(partings[0].site.whole)
                stopped = found
                causes.append(self._cause(comparison, partings[0], partings[0], None, before, None, run, stopped))
                continue
            parting, put_at, counterpart, new, after = found
            outcome = self._outcome(after)
            if _unmoved(before, outcome):
                # The line differs, and nothing that is returned depends on how.
                left.add(parting.site.whole)
            else:
                cause = self._cause(comparison, parting, put_at, counterpart, before, outcome, run, "")
                if causes and causes[-1].parting.site.whole == parting.site.whole and causes[-1].after is not None:
                    cause = self._together(causes.pop(), cause, run)
                causes.append(cause)
            plan, before = new, outcome
            if parting.site.whole in left:
                self._partial |= plan.keys() - comparison.put
            comparison = self._after(comparison, after, plan)
        return Compared(
            name, reference, candidate, target, first, tuple(causes), first_same, comparison.outputs_same(), stopped
        )

    def _put_right(
        self,
        parting: Parting,
        left: set[tuple[str, int]],
        comparison: Comparison,
        plan: Plan,
        run: Callable[[Side, Plan], Trace],
    ) -> tuple[Parting, Parting, Counterpart, Plan, Trace] | str:
        """(the line to name, the line at which training's value is put, what training does there, all put in place, the run with it).

        Usually both lines are the parting's. A line that gathers parts, such as a stack of segments, may gather another number of
        them: then the line is looked for that decided how many. And a line may have nothing like it in training, such as one that
        makes a segment too many: then training's value is put in place behind it. Otherwise the reason why there is none.
        """
        if _other_number(parting, comparison):
            for earlier in comparison.upstream(parting, left):
                fixed = self._fix(earlier, comparison, plan, run)
                if not isinstance(fixed, str) and not _parts_at(self._after(comparison, fixed[2], fixed[1]), parting):
                    return earlier, earlier, *fixed
        fixed = reason = self._fix(parting, comparison, plan, run)
        if not isinstance(fixed, str):
            for earlier in comparison.weaker(parting) if fixed[0].kind == "missing" else ():
                better = self._fix(earlier, comparison, plan, run)
                if not isinstance(better, str) and not _parts_at(
                    self._after(comparison, better[2], better[1]), parting
                ):
                    return earlier, earlier, *better
            return parting, parting, *fixed
        later_lines = comparison.downstream(parting)
        for later in later_lines:
            for new in _same_number(later, comparison):
                after = self._tried(run, {**plan, **new})
                if after is not None and self._far(comparison.reference, after) < float("inf"):
                    # The candidate's own parts are kept, so that whatever else is wrong with them is still found.
                    left.add(parting.site.whole)
                    end = later.events[0].number
                    between = [e for e in comparison.graph.behind(parting.events) if e.number < end]
                    self._left_out |= {(e.site, e.occurrence) for e in (*parting.events, *between)}
                    return parting, later, later.counterparts[0], {**plan, **new}, after
        for later in later_lines:
            fixed = self._fix(later, comparison, plan, run)
            if not isinstance(fixed, str):
                return parting, later, *fixed
        return reason if isinstance(reason, str) else ""

    def _tried(self, run: Callable[[Side, Plan], Trace], plan: Plan) -> Trace | None:
        try:
            return run(self._candidate, plan)
        except ProgramError:
            # Then the whole of training's value is tried.
            return None

    def _after(self, comparison: Comparison, run: Trace, plan: Plan) -> Comparison:
        return comparison.after(run, plan.keys() - self._partial, self._left_out)

    def _fix(
        self, parting: Parting, comparison: Comparison, plan: Plan, run: Callable[[Side, Plan], Trace]
    ) -> tuple[Counterpart, Plan, Trace] | str:
        """Put training's value in place of the line's, trying what training may do there from the most likely on."""
        reason = "training computes nothing like it"
        best: tuple[bool, Counterpart, Plan, Trace] | None = None
        for counterpart in parting.counterparts:
            new = _substitutes(parting, counterpart, comparison)
            if new is None:
                reason = "a value was too large to keep; give --memory more"
                continue
            try:
                after = run(self._candidate, {**plan, **new})
            except ProgramError as error:
                reason = f"training's value cannot be put in its place: {error}"
                continue
            following = self._after(comparison, after, {**plan, **new})
            same = following.outputs_same()
            if not same and _parts_at(following, parting):
                reason = "training's value in its place changes nothing"
                continue
            # One difference may hide another, so a value that is right need not bring the results together. One that takes them
            # much further apart is likely to be another line's.
            far = 0.0 if same else self._far(comparison.reference, after)
            near = far <= 2 * self._far(comparison.reference, comparison.candidate)
            nearer = best is not None and near and not best[0]
            done = best is not None and same and len(counterpart.missing) <= len(best[1].missing)
            if best is None or nearer or done:
                best = (near, counterpart, {**plan, **new}, after)
        return best[1:] if best else reason

    def _far(self, reference: Trace, candidate: Trace) -> float:
        distance = distance_of(self._outcome(reference, scored=False), self._outcome(candidate, scored=False))
        return float("inf") if distance.relative is None or distance.rows else distance.relative

    def _cause(
        self,
        comparison: Comparison,
        parting: Parting,
        put_at: Parting,
        counterpart: Counterpart | None,
        before: Outcome,
        after: Outcome | None,
        run: Callable[[Side, Plan], Trace],
        stopped: str,
    ) -> Cause:
        shown = counterpart or (put_at.counterparts[0] if put_at.counterparts else None)
        at = _clearest(comparison, put_at, shown)
        event = put_at.events[at]
        other = shown.events[at] if shown and shown.events else None
        theirs = shown.instead[at] if shown else None
        ours = event.outputs[0].digest
        if other is not None and len(other.outputs) == len(event.outputs):
            # Of the arrays that an object holds, the first that differs.
            pairs = [(o.digest, t.digest) for o, t in zip(event.outputs, other.outputs, strict=True)]
            ours, theirs = next(((o, t) for o, t in pairs if comparison.had(o) != t), pairs[0])
        inputs = comparison.graph.line_inputs(parting.events[0] if put_at is not parting else event)
        common = next((d for d in inputs if comparison.had(d)), None)
        had = comparison.had(common) if common else None
        alone = self._alone(comparison, put_at, counterpart) if counterpart else {}
        return Cause(
            parting,
            None if put_at is parting else put_at.site,
            shown,
            comparison.reference.arrays.get(theirs) if theirs else None,
            comparison.candidate.arrays.get(ours),
            (event, other),
            (
                comparison.graph.maker(common) if common else None,
                comparison.reference_graph.maker(had) if had else None,
            ),
            before,
            after,
            self._run_alone(alone, run) if counterpart else None,
            stopped,
            None if put_at is parting else _times(comparison, parting),
            alone,
        )

    def _together(self, first: Cause, second: Cause, run: Callable[[Side, Plan], Trace]) -> Cause:
        """Two causes within one statement, as one."""
        plan = {**first.alone_plan, **second.alone_plan}
        alone = self._run_alone(plan, run) if first.alone_plan and second.alone_plan else first.alone
        return replace(first, after=second.after, alone=alone, alone_plan=plan)

    def _alone(self, comparison: Comparison, parting: Parting, counterpart: Counterpart) -> Plan:
        """What to put into training's program, so that this one line computes what the candidate's does; empty where it has no such line."""
        plan: Plan = {}
        for n, event in enumerate(parting.events):
            other = (
                counterpart.events[n]
                if counterpart.events
                else comparison.reference_graph.maker(counterpart.instead[n])
            )
            if other is None:
                return {}
            pairs = [(o.path, e.digest) for o, e in zip(other.outputs, event.outputs, strict=False)]
            if len(other.outputs) != len(event.outputs):
                path = next(
                    (o.path for o in other.outputs if o.digest == counterpart.instead[n]), other.outputs[0].path
                )
                pairs = [(path, event.outputs[0].digest)]
            arrays = {path: comparison.candidate.arrays.get(digest) for path, digest in pairs}
            if any(array is None for array in arrays.values()):
                return {}
            for twin in comparison.reference_graph.twins(other):
                plan[twin.site, twin.occurrence] = {path: array for path, array in arrays.items() if array is not None}
        return plan

    def _run_alone(self, plan: Plan, run: Callable[[Side, Plan], Trace]) -> Outcome:
        """Training's program with the candidate's values at one line."""
        if not plan:
            return Outcome(None, refused="training has no line at which it can be done alone")
        try:
            return self._outcome(run(self._reference, plan))
        except ProgramError as error:
            return Outcome(None, refused=str(error))

    def _outcome(self, trace: Trace, *, scored: bool = True) -> Outcome:
        if not trace.outputs:
            return Outcome(None, refused=f"{trace.program} returns no array")
        array = trace.arrays.get(trace.outputs[0].digest)
        if array is None:
            return Outcome(None, refused="the result was too large to keep; give --memory more")
        array = array.reshape(trace.outputs[0].shape)
        if self._score is None or not scored:
            return Outcome(array)
        try:
            return Outcome(array, self._score(array))
        except ValueError as error:
            return Outcome(array, refused=str(error))


def distance_of(reference: Outcome, candidate: Outcome) -> Distance:
    """How far the first arrays of two results are apart."""
    if reference.array is None or candidate.array is None:
        return Distance(None, None)
    a, b = canonical(reference.array).astype(np.float64), canonical(candidate.array).astype(np.float64)
    rows = None
    if a.shape != b.shape:
        if a.ndim != b.ndim or not a.ndim or a.shape[1:] != b.shape[1:]:
            return Distance(None, None)
        rows = (a.shape[0], b.shape[0])
        shared = min(rows)
        a, b = a[:shared], b[:shared]
    with np.errstate(invalid="ignore"):
        apart = np.abs(a - b)
    largest = float(np.nanmax(apart, initial=0.0))
    scale = float(np.nanmax(np.abs(a), initial=0.0))
    return Distance(largest, largest / scale if scale else None, rows)


def _times(comparison: Comparison, parting: Parting) -> tuple[int, int, Site] | None:
    """How often a line ran, and how often that line of training did which gave the same in other runs; None where they are as many."""
    runs = [e for e in comparison.candidate.events if e.site == parting.events[0].site]
    same = [comparison.reference_graph.maker(had) for e in runs if (had := comparison.had(e.outputs[0].digest))]
    sites = [maker.site for maker in same if maker is not None]
    if not sites:
        return None
    theirs = max(sites, key=sites.count)
    count = sum(e.site == theirs for e in comparison.reference.events)
    return (len(runs), count, theirs) if len(runs) != count else None


def _other_number(parting: Parting, comparison: Comparison) -> bool:
    """Whether a line gathers more or fewer parts than training's line does."""
    for counterpart in parting.counterparts[:1]:
        for event, instead in zip(parting.events, counterpart.instead, strict=True):
            ours, theirs = (
                comparison.candidate.values[event.outputs[0].digest].shape,
                comparison.reference.values[instead].shape,
            )
            if ours != theirs and ours[1:] == theirs[1:]:
                return True
    return False


def _same_number(parting: Parting, comparison: Comparison) -> list[Plan]:
    """Ways to give a line that gathers parts as many as training has: its own as far as both have them, and training's for the rest."""
    found = []
    for counterpart in parting.counterparts:
        plan: Plan = {}
        for event, instead in zip(parting.events, counterpart.instead, strict=True):
            ours = comparison.candidate.arrays.get(event.outputs[0].digest)
            theirs = comparison.reference.arrays.get(instead)
            if ours is None or theirs is None:
                break
            ours, theirs = ours.reshape(event.outputs[0].shape), canonical(theirs)
            axis = next((at for at, length in enumerate(ours.shape) if length > 1), 0)
            shape = np.squeeze(ours).shape
            if shape[1:] != theirs.shape[1:] or shape[:1] == theirs.shape[:1] or not shape:
                break
            rest = theirs[shape[0] :]
            rest = rest.reshape(*ours.shape[:axis], rest.shape[0], *ours.shape[axis + 1 :]).astype(ours.dtype)
            kept = ours.take(range(min(shape[0], theirs.shape[0])), axis)
            plan[event.site, event.occurrence] = {event.outputs[0].path: np.concatenate([kept, rest], axis)}
        else:
            found.append(plan)
    return found


def _parts_at(comparison: Comparison, parting: Parting) -> bool:
    """Whether the programs still part at a line, with another value than one that was put there: behind that, training may do more."""
    return any(
        p.site.whole == parting.site.whole and not all(map(comparison.is_put, p.events)) for p in comparison.partings()
    )


def _unmoved(before: Outcome, after: Outcome) -> bool:
    if before.array is None or after.array is None:
        return False
    return before.array.shape == after.array.shape and np.array_equal(before.array, after.array, equal_nan=True)


def _substitutes(parting: Parting, counterpart: Counterpart, comparison: Comparison) -> Plan | None:
    plan: Plan = {}
    for n, event in enumerate(parting.events):
        digests = [(event.outputs[0].path, counterpart.instead[n])]
        if counterpart.events and len(counterpart.events[n].outputs) == len(event.outputs):
            digests = [(o.path, t.digest) for o, t in zip(event.outputs, counterpart.events[n].outputs, strict=True)]
        arrays = {path: comparison.reference.arrays.get(digest) for path, digest in digests}
        if any(array is None for array in arrays.values()):
            return None
        for twin in comparison.graph.twins(event):
            plan[twin.site, twin.occurrence] = {path: array for path, array in arrays.items() if array is not None}
    return plan


def _clearest(comparison: Comparison, parting: Parting, counterpart: Counterpart | None) -> int:
    """The run of the line at which the two values are furthest apart, as far as their samples tell."""
    if counterpart is None:
        return 0
    apart = []
    for event, instead in zip(parting.events, counterpart.instead, strict=True):
        ours, theirs = comparison.candidate.values[event.outputs[0].digest], comparison.reference.values[instead]
        same = ours.shape == theirs.shape
        apart.append(float(np.nanmax(np.abs(ours.sample - theirs.sample), initial=0.0)) if same else float("inf"))
    return int(np.argmax(apart))


def versions_apart(reference: Mapping[str, str], candidate: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(package, training's version, the candidate's) of the packages that both use in different versions."""
    return [
        (name, reference[name], candidate[name])
        for name in reference
        if candidate.get(name, reference[name]) != reference[name]
    ]
