"""A first stage list for a program: which of our stages compute the values that its trace shows."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import yaml

from skewless.core.pipeline import Pipeline
from skewless.core.stages import InputError, Payload, PipelineError, Signal, Stage
from skewless.core.stages.decode import Decode
from skewless.core.stages.network_input import Replicate
from skewless.core.stages.segment import Segment
from skewless.errors import UsageError
from skewless.programs.match import RTOL, Graph
from skewless.programs.proposals import Evidence, Proposal, decoders, propose
from skewless.programs.trace import Event, Site, Trace, Value
from skewless.programs.values import SAMPLE, canonical

# A stage's result is the program's value where no number differs by more than RTOL of the largest one: float32 rounding. It is close
# to it, such as another decoder's or another filter's design, where the difference's RMS is within this share of the value's
# standard deviation.
CLOSE = 1e-3
# How many stages in a row may have results that the program never has, such as within one call of librosa.load.
_SILENT = 3
# Beyond these many, further ones are not tried.
_MOST_TRIED = 40
# How many events of the program after a value are looked at for what comes next.
_AHEAD = 60


@dataclass(frozen=True)
class Recognised:
    """A stage, and the lines of the program that it stands for.

    largest, relative: how far its result is from the program's value at most, and that by the value's largest number; None where the
    program never has its result. note: what of its parameters the trace does not show.
    """

    stage: Stage
    lines: tuple[Site, ...]
    largest: float | None
    relative: float | None
    note: str = ""


@dataclass(frozen=True)
class Draft:
    """A stage list for a program.

    text: the YAML, with what is not recognised as comments in its place. recognised: in order. unrecognised: the lines on the way to the
    output that no stage stands for, in order. coverage: the share of those lines that stages stand for. closeness: the
    largest absolute difference of the pipeline's output to the program's, and that by the output's largest number; None where
    something is not recognised, so that the pipeline as a whole is another one.
    """

    text: str
    recognised: tuple[Recognised, ...]
    unrecognised: tuple[Site, ...]
    coverage: float
    closeness: tuple[float, float] | None
    notes: tuple[str, ...] = ()

    def as_text(self) -> str:
        """What was recognised, for the terminal."""
        return "\n".join(_told(self))


def draft(trace: Trace, file: Path) -> Draft:
    """Write a stage list for what a trace of a user's function shows. file: the one it was traced on.

    Stages of our catalogue are proposed from the encoded file on, with parameters from the traced calls, the source and the
    values. Each is run on the draft's own previous result, and accepted where its result is one that the program has (RTOL, or
    CLOSE). What lies between two recognised values is left open, and the draft goes on behind it with the program's value.

    Only what this one file shows is drafted: a program may treat another one otherwise. The first array that the function returns
    is the network's input. Raises UsageError for another file than the traced one, and for a function that returned no array.
    """
    if file.name != trace.file:
        raise UsageError(f"the trace is one of {trace.file}, not of {file.name}; name the file that was traced")
    if not trace.outputs:
        raise UsageError(f"{trace.program} returned no array: a pipeline ends with the network's input")
    try:
        payload = file.read_bytes()
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error}") from error
    found = _Drafting(trace, payload, Graph(trace).leading_to(trace.outputs[:1])).draft()
    if found.recognised:
        return found
    # Where a value's origin was not seen, such as a list of single numbers, any of the events may be on the way.
    return _Drafting(trace, payload, list(trace.events)).draft()


@dataclass(frozen=True)
class _Hit:
    """Traced values that have a result's numbers. of: their digests, those of the first segment (or of the whole) first, which are
    `first` many. rows: how many segments. largest, relative: difference. tight: whether it is rounding. theirs: the program's numbers
    in our layout, None where it has another one."""

    of: tuple[str, ...]
    first: int
    rows: int
    largest: float
    relative: float
    tight: bool
    theirs: np.ndarray | None


@dataclass(frozen=True)
class _Found:
    """Stages whose last result the program has."""

    proposals: tuple[Proposal, ...]
    signal: Signal
    hit: _Hit
    order: int


@dataclass
class _Now:
    """How far the draft has come. live: the digests of the program that have the signal's numbers; first: that of the first segment."""

    signal: Signal
    live: tuple[str, ...]
    covered: set[str] = field(default_factory=set)


class _Drafting:
    def __init__(self, trace: Trace, payload: bytes, events: list[Event]):
        self._trace, self._payload = trace, payload
        self._graph = Graph(trace)
        self._output = trace.outputs[0]
        self._events = events
        self._known = _Known(trace, self._events)
        self._evidence = Evidence(trace, self._events)
        self._stages: list[tuple[int, Recognised]] = []
        self._done: set[int] = set()
        self._open: list[Event] = []
        self._decoded: dict[Stage, Signal | None] = {}

    def draft(self) -> Draft:
        now = _Now(Signal(Payload(self._payload)), ())
        while self._output.digest not in now.live:
            found = self._next(now, _SILENT if not self._open else 2)
            if found is not None:
                now = self._accept(now, found)
            elif (skipped := self._skip(now)) is not None:
                now = skipped
            else:
                break
        self._finish(now)
        return self._written(self._output.digest in now.live)

    # --- one step

    def _next(self, now: _Now, silent: int) -> _Found | None:
        frontier: list[tuple[tuple[Proposal, ...], Signal]] = [((), now.signal)]
        for _ in range(silent):
            found: list[_Found] = []
            further: list[tuple[tuple[Proposal, ...], Signal]] = []
            for before, signal in frontier:
                settled: set[type[Stage]] = set()
                for proposal in self._proposals(signal, now):
                    if type(proposal.stage) in settled:
                        continue
                    after = self._run(proposal.stage, signal)
                    if after is None or not _changed(signal, after):
                        continue
                    hit = self._known.hit(after, now.covered)
                    if hit is not None and self._leads_on(proposal.stage, after):
                        found.append(_Found((*before, proposal), after, hit, len(found)))
                        # Of segments there may be more with another tail; of the others, what stands for most came first.
                        if hit.tight and not _coarse(hit.relative) and not isinstance(proposal.stage, Segment):
                            settled.add(type(proposal.stage))
                    else:
                        further.append(((*before, proposal), after))
            if found:
                return self._best(found)
            frontier = further[:_MOST_TRIED]
        return None

    def _proposals(self, signal: Signal, now: _Now) -> Iterator[Proposal]:
        if _starts(signal):
            yield from decoders(self._evidence)
            return
        later = self._later(now.live)
        given = self._trace.arrays.get(now.live[0]) if now.live and signal is now.signal else None
        seen = set()
        for proposal in propose(signal, self._evidence, later, given):
            if proposal.stage not in seen:
                seen.add(proposal.stage)
                yield proposal

    def _run(self, stage: Stage, signal: Signal) -> Signal | None:
        if not _starts(signal):
            return _run(stage, signal)
        if stage not in self._decoded:
            self._decoded[stage] = _run(stage, signal)
        return self._decoded[stage]

    def _leads_on(self, stage: Stage, after: Signal) -> bool:
        """Whether segments may be those of the output: frames of which only levels are taken are cut out in the same way."""
        shape = self._output.shape
        return not isinstance(stage, Segment) or len(shape) < 3 or len(after.data) in (1, *shape)

    def _best(self, found: Sequence[_Found]) -> _Found:
        """Of what the program computes first, the stage that stands for most of it."""
        first = min(found, key=lambda each: self._known.number(each.hit))
        same = [f for f in found if [type(p.stage) for p in f.proposals] == [type(p.stage) for p in first.proposals]]

        def rank(each: _Found) -> tuple[float, ...]:
            hit = each.hit
            # Parameters with few digits come first; those with more are right only where they are clearly nearer.
            return not hit.tight, -hit.rows, -self._known.number(hit), _coarse(hit.relative), each.order

        return min(same, key=rank)

    def _later(self, live: Sequence[str]) -> list[Event]:
        """The events that follow from the first of these values, in order."""
        if not live:
            return self._events[:_AHEAD]
        reached, found = {live[0]}, []
        # What follows from all segments together follows from the first one, too.
        for event in self._trace.events:
            if any(item.digest in reached for item in event.inputs):
                reached.update(item.digest for item in event.outputs)
                found.append(event)
        return found[:_AHEAD]

    def _accept(self, now: _Now, found: _Found) -> _Now:
        events = self._between(found.hit.of, now.covered)
        lines = _lines(events)
        at = self._known.number(found.hit)
        *silent, last = found.proposals
        self._stages += [(at, Recognised(p.stage, lines, None, None, p.note)) for p in silent]
        self._stages.append((at, Recognised(last.stage, lines, found.hit.largest, found.hit.relative, last.note)))
        self._done.update(event.number for event in events)
        covered = now.covered | set(found.hit.of) | {i.digest for e in events for i in e.outputs}
        signal, theirs = found.signal, found.hit.theirs
        if not found.hit.tight and theirs is not None:
            # From the program's own numbers on, so that what is close does not add up to what is not.
            signal = signal.of(torch.from_numpy(theirs.copy()).to(signal.data.dtype))
        return _Now(signal, found.hit.of, covered)

    def _between(self, digests: Iterable[str], covered: set[str]) -> list[Event]:
        """The events that made these values of covered ones."""
        waiting, found = list(digests), dict[int, Event]()
        while waiting:
            digest = waiting.pop()
            event = None if digest in covered else self._graph.maker(digest)
            if event is not None and event.number not in found and event.number not in self._done:
                found[event.number] = event
                waiting += [item.digest for item in event.inputs]
        return [found[number] for number in sorted(found)]

    # --- what is not recognised

    def _skip(self, now: _Now) -> _Now | None:
        """Leave the next line open, and go on with what the program has behind it."""
        live = set(now.live)
        open_ = {event.number for event in self._open}
        event = next(
            (
                e
                for e in self._events
                if e.number not in self._done | open_ and (not live or any(i.digest in live for i in e.inputs))
            ),
            None,
        )
        if event is None:
            return None
        runs = [e for e in self._events if e.site == event.site and e.operation == event.operation]
        self._open += [e for e in runs if e.number not in open_]
        digests = tuple(item.digest for e in runs for item in e.outputs)
        signal = self._given(now.signal, runs)
        # Side branches, such as a maximum, come together with what they are of.
        return _Now(signal, (*digests, *now.live), now.covered | set(digests))

    def _given(self, signal: Signal, runs: Sequence[Event]) -> Signal:
        """The signal with the program's values in place of its data, where they can be its data."""
        arrays = [self._trace.arrays.get(event.outputs[0].digest) for event in runs]
        kept = [canonical(a).astype(np.float32) for a in arrays if a is not None and a.size > 1]
        if len(kept) < len(runs) or len({a.shape for a in kept}) > 1:
            return signal
        if _starts(signal):
            return signal
        segments = len(signal.data) if "segment_times_s" in signal.metadata else 1
        if segments > 1:
            data = np.stack(kept) if len(kept) == segments else kept[0]
            return signal.of(torch.from_numpy(data)) if len(data) == segments else signal
        data = kept[0]
        if "num_samples" not in signal.metadata or "segment_times_s" in signal.metadata:
            shape = _channels_first(data) if signal.data.ndim == 4 else data
            return signal.of(torch.from_numpy(np.ascontiguousarray(shape[None])))
        if len(kept) > 1 or data.ndim > 2:
            return signal
        wave = data[None] if data.ndim == 1 else data.T if data.shape[0] > data.shape[1] else data
        rate = self._rate(signal, wave.shape[1])
        return signal.of(
            torch.from_numpy(np.ascontiguousarray(wave)),
            rate=rate,
            num_samples=wave.shape[1],
            peak=float(np.abs(wave).max()),
        )

    def _rate(self, signal: Signal, samples: int) -> int:
        """The rate of so many samples: one that the source names and that fits, else the rate before."""
        before, rate = signal.metadata["num_samples"], signal.sampling_rate
        named = (int(n) for n in self._evidence.named("") if 1000 <= n <= 400_000)
        return next((n for n in named if n != rate and abs(before * n / rate - samples) <= 1), rate)

    # --- what is written

    def _finish(self, now: _Now) -> None:
        last, data = self._graph.maker(self._output.digest), now.signal.data
        # One channel is an axis that a network wants, and no number of it differs.
        if last is not None and last.number in self._done and data.ndim == 3 and len(self._output.shape) >= 4:
            self._stages.append((last.number, Recognised(Replicate(1), (), 0.0, 0.0)))

    def _written(self, reached: bool) -> Draft:
        missing = [event for event in self._events if event.number not in self._done]
        lines: dict[tuple[str, int], list[Event]] = defaultdict(list)
        for event in missing:
            lines[event.site.file, event.site.line].append(event)
        unrecognised = sorted(lines.values(), key=lambda events: self._place(events[0]))
        sites = [max((e.site for e in events), key=lambda site: len(site.text)) for events in unrecognised]
        on_the_way = {(e.site.file, e.site.line) for e in self._events}
        coverage = 1 - len(lines) / len(on_the_way) if on_the_way else float(reached)
        drafted = Draft(
            "",
            tuple(r for _, r in self._stages),
            tuple(sites),
            coverage,
            None,
            tuple(self._notes(reached and not sites)),
        )
        if reached and not sites:
            drafted = replace(drafted, closeness=self._closeness())
        opened = [(self._place(events[0]), site) for events, site in zip(unrecognised, sites, strict=True)]
        return replace(drafted, text=self._yaml(drafted, opened))

    def _place(self, event: Event) -> int:
        """Where an event belongs: a constant is used later than it is made."""
        used = [e.number for item in event.outputs for e in self._graph.used[item.digest]]
        return event.number if event.inputs else min(used, default=event.number)

    def _pipeline(self) -> Pipeline:
        return Pipeline(Path(self._trace.program.partition(":")[0]).stem or "draft", [r.stage for _, r in self._stages])

    def _closeness(self) -> tuple[float, float] | None:
        theirs = self._trace.arrays.get(self._output.digest)
        if theirs is None:
            return None
        ours, theirs = canonical(self._pipeline()(self._payload).numpy()), canonical(theirs)
        apart = [
            float(np.abs(view.astype(np.float64) - theirs).max()) for view in _views(ours) if view.shape == theirs.shape
        ]
        largest = min(apart)
        return largest, largest / max(float(np.abs(theirs).max()), 1e-30)

    def _notes(self, whole: bool) -> Iterator[str]:
        for _, recognised in self._stages:
            if recognised.note:
                yield f"{recognised.stage.name}: {recognised.note}"
        for each in self._trace.swallowed:
            yield f"{each.site} swallowed {each.exception} ({each.message}): what it kept from running is not in the list"
        if len(self._trace.outputs) > 1:
            yield f"{self._trace.program} returns {len(self._trace.outputs)} arrays; the draft is of the first"
        decoded = self._decoded.get(Decode())
        if decoded is not None and len(decoded.data) == 1:
            yield "the recording has one channel: what the program does with several is not seen"
        if whole and self._stages:
            try:
                ours = tuple(self._pipeline()(self._payload).shape)
            except (InputError, PipelineError):
                return
            if ours != self._output.shape:
                yield f"the program returns the shape {self._output.shape}, the pipeline {ours}: the same numbers"

    def _yaml(self, drafted: Draft, opened: Sequence[tuple[int, Site]]) -> str:
        lines = [f"# {line}" for line in _told(drafted, self._trace)]
        lines += [f"name: {Path(self._trace.program.partition(':')[0]).stem or 'draft'}", "stages:"]
        waiting = list(opened)
        for number, recognised in self._stages:
            while waiting and waiting[0][0] < number:
                lines.append(_left_open(waiting.pop(0)[1]))
            lines.append(_entry(recognised))
        lines += [_left_open(site) for _, site in waiting]
        if not self._stages:
            lines[lines.index("stages:")] = "stages: []"
        return "\n".join(lines) + "\n"


class _Known:
    """The values that a program has on the way to its output."""

    def __init__(self, trace: Trace, events: Sequence[Event]):
        self._trace = trace
        self._numbers: dict[str, int] = {}
        for event in events:
            for item in event.outputs:
                self._numbers.setdefault(item.digest, event.number)
        for item in trace.outputs[:1]:
            self._numbers.setdefault(item.digest, len(trace.events))
        self._of_shape: dict[tuple[int, ...], list[Value]] = defaultdict(list)
        self._samples: dict[tuple[int, ...], np.ndarray] = {}
        for digest in self._numbers:
            value = trace.values[digest]
            if value.size > 1 and value.finite:
                self._of_shape[value.shape].append(value)

    def number(self, hit: _Hit) -> int:
        """The event that made the last of a hit's values of the first segment."""
        return max(self._numbers[digest] for digest in hit.of[: hit.first])

    def hit(self, signal: Signal, but: set[str]) -> _Hit | None:
        """The values with a signal's numbers: of every segment, of all together, or both."""
        data = signal.data.numpy()
        spread = float(np.std(data, dtype=np.float64))
        if "segment_times_s" not in signal.metadata or len(data) == 1:
            # Programs may take the levels of a waveform as they are stored.
            waveform = signal.rate is not None and data.ndim == 2
            return self._near(data, but, spread, _FULL_SCALES if waveform else (1.0,))
        rows = len(data)
        whole = self._near(data, but, spread)
        # Most results that are none of the program's are none in the first segment.
        parts = itertools.takewhile(bool, (self._near(row, but, spread) for row in data))
        known = [part for part in parts if part is not None]
        if len(known) < rows:
            return whole and replace(whole, rows=rows)
        tight = all(part.tight for part in known)
        hits = [*known, *([whole] if whole and whole.tight >= tight else [])]
        of = tuple(digest for hit in hits for digest in hit.of)
        largest, relative = max(h.largest for h in known), max(h.relative for h in known)
        theirs = [h.theirs for h in known if h.theirs is not None]
        return _Hit(
            of, known[0].first, rows, largest, relative, tight, np.stack(theirs) if len(theirs) == rows else None
        )

    def _near(self, data: np.ndarray, but: set[str], spread: float, scales: Sequence[float] = (1.0,)) -> _Hit | None:
        found: list[tuple[bool, float, float, str, bool]] = []
        for (at, view), scale in itertools.product(enumerate(_views(canonical(data))), scales):
            scaled = view * np.float32(scale) if scale != 1 else view
            for value in self._alike(scaled, spread * scale):
                near = None if value.digest in but else self._distance(scaled, value, spread * scale)
                if near is not None:
                    found.append((*near, value.digest, at == 0 and scale == 1))
        if not found:
            return None
        # Where some are the same, those that are only close are other values, such as the same in half precision.
        tight = any(each[0] for each in found)
        best = min(each[2] for each in found if each[0] == tight)
        kept = [each for each in found if each[0] == tight and (tight or each[2] <= 1.5 * best)]
        closest = min(kept, key=lambda each: each[2])
        # The last one is what the program goes on with.
        kept.sort(key=lambda each: -self._numbers[each[3]])
        of = tuple(dict.fromkeys(each[3] for each in kept))
        array = self._trace.arrays.get(kept[0][3]) if kept[0][4] else None
        theirs = None if array is None else array.reshape(data.shape)
        return _Hit(of, len(of), 1, closest[1], closest[2], tight, theirs)

    def _alike(self, ours: np.ndarray, spread: float) -> list[Value]:
        """The values of this shape whose samples are near ours; of a value, the whole decides."""
        values = self._of_shape.get(ours.shape, [])
        if not values:
            return []
        if ours.shape not in self._samples:
            self._samples[ours.shape] = np.stack([value.sample for value in values])
        samples = self._samples[ours.shape]
        apart = np.sqrt(np.mean(np.square(samples - _sample(ours)), axis=1))
        # A sample may hit a rare large difference.
        allowed = 20 * CLOSE * np.maximum(np.sqrt(np.mean(np.square(samples), axis=1)), spread)
        return [values[at] for at in np.flatnonzero(apart <= allowed)]

    def _distance(self, ours: np.ndarray, value: Value, spread: float) -> tuple[bool, float, float] | None:
        """(the same, largest difference, that by the largest number) of a value that is at least close. spread: the standard
        deviation of our result, of all segments together: a quiet one may differ as much as a loud one."""
        theirs = self._trace.arrays.get(value.digest)
        x, y = (_sample(ours), value.sample) if theirs is None else (ours.astype(np.float64), canonical(theirs))
        apart = np.abs(x - y)
        largest, size = float(apart.max()), max(value.largest, 1e-30)
        if largest <= RTOL * size:
            return True, largest, largest / size
        allowed = CLOSE * max(float(np.std(y)), spread)
        return (False, largest, largest / size) if 0 < _rms(apart) <= allowed else None


def _sample(numbers: np.ndarray) -> np.ndarray:
    """The numbers that a Value of them has as its sample."""
    flat = numbers.reshape(-1)
    return flat[np.linspace(0, flat.size - 1, min(SAMPLE, flat.size)).astype(np.int64)].astype(np.float64)


# Full scale of integers, for programs that take the levels as they are stored.
_FULL_SCALES = (1.0, 2.0**15, 2.0**31, 2.0**23, 2.0**7)


def _coarse(relative: float) -> float:
    return 0.0 if relative < 0.2 * RTOL else relative


def _rms(numbers: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(numbers))))


def _views(array: np.ndarray) -> list[np.ndarray]:
    """The same numbers as programs lay them out: channels last, and blue first."""
    if array.ndim == 2 and len(array) <= 8:
        return [array, array.T]
    if array.ndim == 3 and len(array) == 3:
        last = np.moveaxis(array, 0, -1)
        return [array, last, array[::-1], last[..., ::-1]]
    return [array, np.moveaxis(array, 1, -1)] if array.ndim == 4 else [array]


def _channels_first(data: np.ndarray) -> np.ndarray:
    return np.moveaxis(data, -1, 0) if data.ndim == 3 and data.shape[-1] <= 4 < data.shape[0] else data


def _starts(signal: Signal) -> bool:
    return isinstance(signal.data, Payload)


def _run(stage: Stage, signal: Signal) -> Signal | None:
    """The stage's result, None where it does not take the signal."""
    try:
        with torch.no_grad():
            after = stage(signal)
    except (InputError, PipelineError, ValueError, RuntimeError, IndexError):
        return None
    return after if after.data.numel() and bool(torch.isfinite(after.data).all()) else None


def _changed(before: Signal, after: Signal) -> bool:
    if _starts(before) or before.data.shape != after.data.shape or before.data.dtype != after.data.dtype:
        return True
    return not torch.equal(before.data, after.data)


def _lines(events: Iterable[Event]) -> tuple[Site, ...]:
    """One site for each line, the one with most of its text."""
    found: dict[tuple[str, int], Site] = {}
    for event in events:
        key = event.site.file, event.site.line
        found[key] = max(found.get(key, event.site), event.site, key=lambda site: len(site.text))
    return tuple(found[key] for key in sorted(found))


def _entry(recognised: Recognised) -> str:
    params = yaml.safe_dump(recognised.stage.params(), sort_keys=False, default_flow_style=True, width=10**6).strip()
    text = f"{recognised.stage.name}: {params}"
    where = ", ".join(map(str, recognised.lines[:4])) + (", ..." if len(recognised.lines) > 4 else "")
    return f"  - {text}" + (f"  # {where}" if where else "")


def _left_open(site: Site) -> str:
    return f"  # not recognised: {site}  {site.text}"


def _told(drafted: Draft, trace: Trace | None = None) -> Iterator[str]:
    if trace is not None:
        yield f"Drafted from one run of {trace.program} on {trace.file}. What the program does with other files is not seen here."
    stages, missing = len(drafted.recognised), len(drafted.unrecognised)
    yield f"{stages} stage{'s' * (stages != 1)} recognised; they stand for {drafted.coverage:.0%} of the lines on the way to the output."
    if missing:
        yield f"{missing} line{'s' * (missing != 1)} on the way to the output not recognised: the list is not the program yet."
        if trace is None:
            yield from (f"  {site}  {site.text}" for site in drafted.unrecognised)
    elif drafted.closeness is not None:
        largest, relative = drafted.closeness
        yield f"Largest difference of its output to the program's: {largest:.3g}, {relative:.2g} of the largest number."
    else:
        yield "Its output was not compared with the program's: the array was too large to keep."
    for each in drafted.recognised:
        if each.relative is not None and each.relative > RTOL:
            yield f"{each.stage.name} is close, not the same: up to {each.largest:.3g}, {each.relative:.2g} of the largest number."
    yield from drafted.notes
