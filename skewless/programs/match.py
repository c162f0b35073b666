"""Which values two traced programs have in common, and the first lines at which one of them computes something else."""

from __future__ import annotations

import copy
import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from skewless.programs.trace import Event, Item, Site, Trace, Value
from skewless.programs.values import canonical

# Of a number of float32's rounding steps in a row; half precision is at 5e-4, a standard deviation over n for n - 1 at 1 / 2n.
RTOL = 1e-5
# From this likeness on (Comparison._likeness) a line of training is tried; whether it is the one is found out by putting its value in place.
LIKELY = 3.4
# How many runs of one line are looked at to find the line of the other program that does the same.
_LOOKED_AT = 8


class Graph:
    """A trace's events as a graph: which event made a value first, and which ones used it."""

    def __init__(self, trace: Trace):
        self.trace = trace
        self._made: dict[str, Event] = {}
        # By statement: `x / x.abs().max()` makes the maximum itself, though the line before may have made it as well.
        self._made_within: dict[tuple[str, int], dict[str, Event]] = defaultdict(dict)
        self.used: dict[str, list[Event]] = defaultdict(list)
        for event in trace.events:
            inputs = {item.digest for item in event.inputs}
            for item in event.outputs:
                # An event that hands a value on, such as `.float()` of a float, has not made it.
                if item.digest not in inputs:
                    self._made.setdefault(item.digest, event)
                    self._made_within[event.site.whole].setdefault(item.digest, event)
            for digest in inputs:
                self.used[digest].append(event)

    def maker(self, digest: str) -> Event | None:
        return self._made.get(digest)

    def maker_for(self, digest: str, event: Event) -> Event | None:
        """Which event made a value for this one: one of the same statement, if there is one."""
        return self._made_within[event.site.whole].get(digest) or self._made.get(digest)

    def leading_to(self, items: Sequence[Item]) -> list[Event]:
        """The events that the items depend on, in order."""
        found: dict[int, Event] = {}
        waiting = [item.digest for item in items]
        seen = set(waiting)
        while waiting:
            event = self.maker(waiting.pop())
            if event is not None and event.number not in found:
                found[event.number] = event
                new = {item.digest for item in event.inputs} - seen
                seen |= new
                waiting += new
        return [found[number] for number in sorted(found)]

    def twins(self, event: Event) -> list[Event]:
        """The runs of the same line that gave the same: a window that is made anew for each segment."""
        outputs = [o.digest for o in event.outputs]
        return [e for e in self.trace.events if e.site == event.site and [o.digest for o in e.outputs] == outputs]

    def line_inputs(self, event: Event) -> dict[str, None]:
        """What the event's statement was given from elsewhere on the way to this event."""
        found: dict[str, None] = {}
        waiting, seen = [event], {event.number}
        while waiting:
            current = waiting.pop()
            for item in current.inputs:
                maker = self.maker(item.digest)
                if maker is None or maker.site.whole != event.site.whole or maker.number > current.number:
                    found[item.digest] = None
                elif maker.number not in seen:
                    seen.add(maker.number)
                    waiting.append(maker)
        return found

    def line_end(self, event: Event, wrong: Callable[[str], bool]) -> Event:
        """The last event of the same statement that computes on with the event's result, as long as that is wrong."""
        while True:
            following = [
                user
                for item in event.outputs
                for user in self.used[item.digest]
                if user.number > event.number
                and user.site.whole == event.site.whole
                and all(map(wrong, (o.digest for o in user.outputs)))
                and not {o.digest for o in user.outputs} & {o.digest for o in event.outputs}
            ]
            if not following:
                return event
            event = min(following, key=lambda each: each.number)

    def behind(self, events: Sequence[Event]) -> list[Event]:
        """The events that compute on with the results of some, in order."""
        reached = {o.digest for e in events for o in e.outputs}
        found = []
        for event in self.trace.events[min(e.number for e in events) + 1 :]:
            if any(item.digest in reached for item in event.inputs):
                found.append(event)
                reached |= {o.digest for o in event.outputs}
        return found


class Values:
    """Looks a value up among those of a trace: equal, or within `rtol` of its largest number, or with its axes in another order."""

    def __init__(self, trace: Trace, rtol: float):
        self._trace, self._rtol = trace, rtol
        self._of_size: dict[int, list[Value]] = defaultdict(list)
        for value in trace.values.values():
            self._of_size[value.size].append(value)
        self._known: dict[str, str | None] = {}

    def find(self, value: Value, array: np.ndarray | None) -> str | None:
        """The digest of the trace's value that has the same numbers, None where it has none."""
        if value.digest not in self._known:
            self._known[value.digest] = self._find(value, array)
        return self._known[value.digest]

    def _find(self, value: Value, array: np.ndarray | None) -> str | None:
        if value.digest in self._trace.values:
            return value.digest
        near: list[tuple[float, str]] = []
        for other in self._of_size[value.size]:
            theirs = self._trace.arrays.get(other.digest)
            if value.shape == other.shape:
                if (distance := self._distance(value, array, other, theirs)) is not None:
                    near.append((distance, other.digest))
            elif sorted(value.shape) == sorted(other.shape) and self._transposed(value, array, other, theirs):
                near.append((0.0, other.digest))
        return min(near)[1] if near else None

    def _distance(
        self, value: Value, array: np.ndarray | None, other: Value, theirs: np.ndarray | None
    ) -> float | None:
        """The largest difference where the two agree, else None."""
        limit = self._rtol * max(other.largest, 1e-30)
        if value.finite != other.finite or abs(value.high - other.high) > limit or abs(value.low - other.low) > limit:
            return None
        with np.errstate(invalid="ignore"):
            distance = np.abs(value.sample - other.sample)
        if np.nanmax(distance, initial=0.0) > limit:
            return None
        if array is None or theirs is None:
            return float(np.nanmax(distance, initial=0.0))
        return largest_difference(theirs, array, limit)

    def _transposed(self, value: Value, array: np.ndarray | None, other: Value, theirs: np.ndarray | None) -> bool:
        limit = self._rtol * max(other.largest, 1e-30)
        alike = all(
            abs(a - b) <= limit
            for a, b in (
                (value.high, other.high),
                (value.low, other.low),
                (value.mean, other.mean),
                (value.rms, other.rms),
            )
        )
        if array is None or theirs is None or len(value.shape) > 5 or not alike:
            return False
        ours, theirs = canonical(array), canonical(theirs)
        return any(
            ours.transpose(axes).shape == theirs.shape
            and largest_difference(theirs, ours.transpose(axes), limit) is not None
            for axes in itertools.permutations(range(ours.ndim))
        )


def largest_difference(reference: np.ndarray, candidate: np.ndarray, limit: float) -> float | None:
    """The largest absolute difference of two arrays of one shape, None where it is above the limit. NaN equals NaN."""
    theirs, ours = canonical(reference).astype(np.float64), canonical(candidate).astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        distance = np.abs(theirs - ours)
    if np.isnan(distance).any() and not np.array_equal(np.isnan(theirs), np.isnan(ours)):
        return None
    largest = float(np.nanmax(distance, initial=0.0))
    return largest if largest <= limit else None


@dataclass(frozen=True)
class Counterpart:
    """What training does where the candidate first computes something that training never has.

    kind: "other": an event of training computes it otherwise; "missing": and training has done more before that, at `missing`;
    "extra": training does nothing there, and hands the candidate's input on. events: training's, one for each of the candidate's
    events, empty for "extra". instead: digests of training's values, one for each.
    """

    kind: Literal["other", "missing", "extra"]
    site: Site | None
    events: tuple[Event, ...]
    instead: tuple[str, ...]
    missing: tuple[Event, ...] = ()


@dataclass(frozen=True)
class Parting:
    """The first line of the candidate whose inputs training had, and whose result it never has.

    site: the first expression that gives such a result. events: the ends of its statement, one for each run. counterparts: what training
    may do there, the most likely first. unknown: whether an input was changed in a way that was not seen.
    """

    site: Site
    events: tuple[Event, ...]
    counterparts: tuple[Counterpart, ...]
    unknown: bool = False


class Comparison:
    """Two traces side by side. rtol: values closer than this share of the largest number are the same. put: where the candidate's run
    had a value of the reference put in place, so that it does not matter what led there. but: places that are not looked at any more."""

    def __init__(
        self,
        reference: Trace,
        candidate: Trace,
        rtol: float = RTOL,
        put: Collection[tuple[Site, int]] = (),
        but: Collection[tuple[Site, int]] = (),
    ):
        self.put, self._but = frozenset(put), frozenset(but)
        self.reference, self.candidate, self.rtol = reference, candidate, rtol
        self._theirs, self._ours = Values(reference, rtol), Values(candidate, rtol)
        self.graph, self.reference_graph = Graph(candidate), Graph(reference)

    def after(
        self, candidate: Trace, put: Collection[tuple[Site, int]], but: Collection[tuple[Site, int]]
    ) -> Comparison:
        """The same reference against another run of the candidate; what was found out about the reference is not found out again."""
        following = copy.copy(self)
        following.put, following._but = frozenset(put), frozenset(but)
        following.candidate = candidate
        following._ours, following.graph = Values(candidate, self.rtol), Graph(candidate)
        following.__dict__.pop("_unmatched", None)
        return following

    def had(self, digest: str) -> str | None:
        """The reference's digest of a value of the candidate, None where the reference never has it."""
        return self._theirs.find(self.candidate.values[digest], self.candidate.arrays.get(digest))

    def has(self, digest: str) -> str | None:
        """The candidate's digest of a value of the reference."""
        return self._ours.find(self.reference.values[digest], self.reference.arrays.get(digest))

    def outputs_same(self) -> bool:
        ours, theirs = self.candidate.outputs, self.reference.outputs
        if len(ours) != len(theirs):
            return False
        return all(self._same(a.digest, b.digest) for a, b in zip(theirs, ours, strict=True))

    def _same(self, reference: str, candidate: str) -> bool:
        if reference == candidate:
            return True
        a, b = self.reference.values[reference], self.candidate.values[candidate]
        if a.shape != b.shape:
            return self.had(candidate) == reference
        limit = self.rtol * max(a.largest, 1e-30)
        known = self.reference.arrays.get(reference), self.candidate.arrays.get(candidate)
        if known[0] is None or known[1] is None:
            return bool(np.max(np.abs(a.sample - b.sample), initial=0.0) <= limit)
        return largest_difference(known[0], known[1], limit) is not None

    def partings(self, but: Collection[tuple[str, int]] = ()) -> list[Parting]:
        """The lines at which the candidate parts from the reference, in order; without the statements `but`.

        Found backwards from the outputs: a value that the reference has is right, however it came about; one that it has not
        is followed to the event that made it, and from there to those of its inputs that the reference has not either.
        """
        wrong = [
            b.digest
            for n, b in enumerate(self.candidate.outputs)
            if n >= len(self.reference.outputs) or not self._same(self.reference.outputs[n].digest, b.digest)
        ]
        return self._partings(wrong, set(wrong), but)

    def _partings(self, waiting: list[str], outputs: set[str], but: Collection[tuple[str, int]]) -> list[Parting]:
        seen: set[str] = set()
        first: dict[int, Event] = {}
        unknown: set[tuple[str, int]] = set()
        while waiting:
            digest = waiting.pop()
            if digest in seen or (digest not in outputs and not self._wrong(digest)):
                continue
            seen.add(digest)
            event = self.graph.maker(digest)
            if event is None:
                continue
            new = [] if self.is_put(event) else [i.digest for i in event.inputs if self._wrong(i.digest)]
            made = {d: maker for d in new if (maker := self.graph.maker(d)) not in (None, event)}
            followed = [d for d, maker in made.items() if (maker.site, maker.occurrence) not in self._but]
            waiting += followed
            if not followed and event.site.whole not in but:
                first[event.number] = event
                if len(made) < len(set(new)):
                    unknown.add(event.site.whole)
        return self._by_statement(first.values(), unknown)

    def is_put(self, event: Event) -> bool:
        return (event.site, event.occurrence) in self.put

    def _wrong(self, digest: str) -> bool:
        return self.had(digest) is None

    def parting(self, events: tuple[Event, ...], unknown: bool = False) -> Parting:
        """A line with the runs in question: those of its statement's first expressions with a wrong result."""
        ends = {end.number: end for end in (self.graph.line_end(event, self._wrong) for event in events)}
        last = tuple(ends[number] for number in sorted(ends))
        return Parting(events[0].site, last, tuple(self._counterparts(last)), unknown)

    def _by_statement(self, events: Iterable[Event], unknown: Collection[tuple[str, int]] = ()) -> list[Parting]:
        """One parting for each statement, in order."""
        at: dict[tuple[str, int], list[Event]] = defaultdict(list)
        for event in sorted(events, key=lambda each: each.number):
            at[event.site.whole].append(event)
        found = [self.parting(tuple(runs), whole in unknown) for whole, runs in at.items()]
        return sorted(found, key=lambda parting: parting.events[0].number)

    def upstream(self, parting: Parting, but: Collection[tuple[str, int]]) -> list[Parting]:
        """Lines before a parting whose results the reference never has, though what was made of them it has, such as a shorter
        recording of which the first segments are the same. In order."""
        return self._by_statement(
            event
            for event in self.graph.leading_to([i for e in parting.events for i in e.inputs])
            if event.site.whole not in but
            and event.site.whole != parting.site.whole
            and any(self._wrong(o.digest) for o in event.outputs)
            and not any(self._wrong(i.digest) for i in event.inputs)
        )

    def weaker(self, parting: Parting) -> list[Parting]:
        """Lines that do what training does before a parting, with the same inputs, and another result, in order.

        Such as a trimming of silence that finds none: what it gives is a value that training had, one step before.
        """
        found = []
        for missing in parting.counterparts[0].missing if parting.counterparts else ():
            inputs = self.reference_graph.line_inputs(missing)
            for event in self.candidate.events:
                same = event.operation == missing.operation and event.number < parting.events[0].number
                if not same or not inputs or {self.had(d) for d in self.graph.line_inputs(event)} != set(inputs):
                    continue
                pairs = zip(event.outputs, missing.outputs, strict=False)
                if all(self.had(ours.digest) != theirs.digest for ours, theirs in pairs):
                    found.append(self.parting((event,)))
                    break
        return found

    def downstream(self, parting: Parting) -> list[Parting]:
        """The lines that compute on with a parting's results, in order, and lead to what is returned."""
        leading = self.graph.leading_to(self.candidate.outputs)
        # Also what only hands a value on, such as `np.array(picture)`: training's numbers may fit there and not before.
        needed = {i.digest for e in leading for i in e.inputs} | {item.digest for item in self.candidate.outputs}
        return self._by_statement(
            event
            for event in self.graph.behind(parting.events)
            if any(o.digest in needed and self._wrong(o.digest) for o in event.outputs)
        )

    # --- what the reference does there

    def _counterparts(self, events: tuple[Event, ...]) -> list[Counterpart]:
        at: dict[Site, list[Event]] = defaultdict(list)
        for event in self._unmatched:
            at[event.site].append(event)
        scores: list[tuple[float, Counterpart]] = []
        looked_at = events[:_LOOKED_AT]
        for site, others in at.items():
            if len(others) < len(events):
                continue
            best = [max(self._likeness(e, o) for o in others[: 4 * _LOOKED_AT]) for e in looked_at]
            score = sum(best) / len(best)
            if score >= LIKELY and (counterpart := self._paired(site, events, others)) is not None:
                # The nearest line of training explains least at once, and leaves the next difference to be found.
                scores.append((score - min(len(counterpart.missing), 5), counterpart))
        if (extra := self._extra(events)) is not None:
            scores.append(extra)
        found = [counterpart for _, counterpart in sorted(scores, key=lambda s: -s[0])[:5]]
        # The line that makes a result has that of training for its counterpart, however little they are alike.
        ours = [item.digest for item in self.candidate.outputs]
        if (
            len(events) == 1
            and (made := events[0].outputs[0].digest) in ours
            and ours.index(made) < len(self.reference.outputs)
        ):
            theirs = self.reference.outputs[ours.index(made)].digest
            maker = self.reference_graph.maker(theirs)
            if maker is not None and all(theirs not in c.instead for c in found):
                missing = self._missing(maker)
                found.append(Counterpart("missing" if missing else "other", maker.site, (maker,), (theirs,), missing))
        return found

    @functools.cached_property
    def _unmatched(self) -> list[Event]:
        """The reference's events on the way to its outputs whose results the candidate never has."""
        leading = self.reference_graph.leading_to(self.reference.outputs)
        return [e for e in leading if any(self.has(o.digest) is None for o in e.outputs)]

    def _likeness(self, event: Event, other: Event) -> float:
        """How likely it is that an event of the reference is what the candidate's event should have been."""
        score = 0.0
        ours = {had for d in self.graph.line_inputs(event) if (had := self.had(d)) is not None}
        theirs = {d for d in self.reference_graph.line_inputs(other) if self.has(d) is not None}
        if ours & theirs:
            score += 3 * len(ours & theirs) / len(ours | theirs) + 1
        elif not ours and not theirs:
            score += 2
        if event.operation == other.operation:
            score += 3
        elif event.operation.rpartition(".")[2] == other.operation.rpartition(".")[2]:
            # numpy.stack for torch.stack
            score += 2.5
        best = 0.0
        for a, b in zip(event.outputs, other.outputs, strict=False):
            best = max(best, self._value_likeness(self.candidate.values[a.digest], self.reference.values[b.digest]))
        return score + best

    @staticmethod
    def _value_likeness(ours: Value, theirs: Value) -> float:
        if ours.shape != theirs.shape:
            same_rank = len(ours.shape) == len(theirs.shape)
            return (
                1.0 if same_rank and sum(a != b for a, b in zip(ours.shape, theirs.shape, strict=True)) == 1 else -2.0
            )
        if ours.size == 1:
            near = abs(ours.sample[0] - theirs.sample[0]) / max(abs(ours.sample[0]), abs(theirs.sample[0]), 1e-30)
            return float(1 + 3 * max(0.0, 1 - near))
        with np.errstate(invalid="ignore", divide="ignore"):
            spread = float(np.std(ours.sample) * np.std(theirs.sample))
            related = (
                float(np.mean((ours.sample - ours.mean) * (theirs.sample - theirs.mean))) / spread
                if spread > 0
                else 0.0
            )
        # The same numbers in another order, such as blue first, have the same statistics.
        pairs = ((ours.low, theirs.low), (ours.high, theirs.high), (ours.mean, theirs.mean), (ours.rms, theirs.rms))
        if all(abs(a - b) <= 1e-3 * max(ours.largest, 1e-30) for a, b in pairs):
            related = 1.0
        return 2 + 3 * (min(1.0, abs(related)) if np.isfinite(related) else 0.0)

    def _paired(self, site: Site, events: tuple[Event, ...], others: list[Event]) -> Counterpart | None:
        left, chosen = list(others), []
        for n, event in enumerate(events):
            if not left:
                return None
            window = sorted(left, key=lambda o: abs(o.occurrence - n))[: 2 * _LOOKED_AT]
            best = max(window, key=lambda o: (self._likeness(event, o), -abs(o.occurrence - event.occurrence)))
            left.remove(best)
            chosen.append(best)
        instead = tuple(o.outputs[0].digest for o in chosen)
        missing = self._missing(chosen[0])
        return Counterpart("missing" if missing else "other", site, tuple(chosen), instead, missing)

    def _missing(self, event: Event) -> tuple[Event, ...]:
        """What the reference has done before the event that the candidate never has."""
        found: dict[tuple[str, int], Event] = {}
        waiting = [i.digest for i in event.inputs]
        seen: set[str] = set()
        while waiting:
            digest = waiting.pop()
            if digest in seen or self.has(digest) is not None:
                continue
            seen.add(digest)
            if (maker := self.reference_graph.maker_for(digest, event)) is not None and maker is not event:
                if maker.site.whole != event.site.whole:
                    found[maker.site.whole] = max(maker, found.get(maker.site.whole, maker), key=lambda e: e.number)
                waiting += [i.digest for i in maker.inputs]
        return tuple(sorted(found.values(), key=lambda e: e.number))

    def _extra(self, events: tuple[Event, ...]) -> tuple[float, Counterpart] | None:
        """Whether the reference goes on with the event's input where the candidate goes on with its output."""
        instead, scores = [], []
        for event in events:
            best: tuple[float, str] | None = None
            for item in event.inputs:
                had = self.had(item.digest)
                if had is None:
                    continue
                nexts = {e.operation for e in self.graph.used[event.outputs[0].digest]} - {event.operation}
                theirs = [o for o in self.reference_graph.used[had] if o.operation in nexts]
                if theirs and all(self.has(o.digest) is None for e in theirs for o in e.outputs):
                    score = (
                        6.0
                        + self._value_likeness(
                            self.candidate.values[event.outputs[0].digest], self.reference.values[had]
                        )
                        / 2
                    )
                    best = max(best or (score, had), (score, had))
            if best is None:
                return None
            scores.append(best[0])
            instead.append(best[1])
        return sum(scores) / len(scores), Counterpart("extra", None, (), tuple(instead))
