"""Whether a rollout may go on: the candidate against the baseline, by what has been seen so far."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from skewless.rollout.drift import Drift, between_samples, from_histogram
from skewless.rollout.evidence import REFUSED, Arm, Evidence, Pair
from skewless.rollout.policy import SHADOW, Policy
from skewless.rollout.sequential import Count, Interval, difference_interval, paired_difference_interval, rate_interval

Action = Literal["step", "hold", "abort", "promote"]

# Requests of the baseline by which "slow" is defined, once and for all: later ones are compared by it.
LATENCY_BASIS = 200
SLOW = 95  # percentile


class _Entry(Protocol):
    @property
    def time(self) -> str: ...
    @property
    def percent(self) -> float: ...


class _Rollout(Protocol):
    @property
    def model(self) -> str: ...
    @property
    def baseline(self) -> str: ...
    @property
    def candidate(self) -> str: ...
    @property
    def policy(self) -> str | None: ...
    @property
    def percent(self) -> float: ...
    @property
    def step(self) -> int: ...
    @property
    def started(self) -> str: ...
    @property
    def history(self) -> Sequence[_Entry]: ...


@dataclass(frozen=True)
class Progress:
    """Where a rollout is.

    percent: of the clients, 0 in the shadow. step: the place in the policy's steps, from 0. phase_started: when the shadow or the
    split began; step_started: when this step did; now. All in seconds since 1970.
    """

    percent: float
    step: int
    phase_started: float
    step_started: float
    now: float

    @classmethod
    def of(cls, rollout: _Rollout, now: float | None = None) -> Progress:
        """Of a rollout's state. now: None for the present."""
        times = [_seconds(entry.time) for entry in rollout.history] or [_seconds(rollout.started)]
        # The shadow's requests and the split's are two experiments.
        splits = [_seconds(entry.time) for entry in rollout.history if entry.percent > 0]
        phase = splits[0] if rollout.percent and splits else _seconds(rollout.started)
        return cls(rollout.percent, rollout.step, phase, times[-1], time.time() if now is None else now)


@dataclass(frozen=True)
class Comparison:
    """One comparison of the two arms.

    name: what is counted. baseline, candidate: how often; for files that both versions answered there is one count only.
    interval: of the difference of the two rates, or of the one rate; of all looks together it is wrong with a probability of at
    most `alpha`. low, high: the tolerance, which the difference must not be shown to be outside of.
    """

    name: str
    baseline: Count | None
    candidate: Count
    interval: Interval
    low: float
    high: float
    alpha: float

    @property
    def state(self) -> Literal["within", "beyond", "open"]:
        """Whether the whole interval is within the tolerance, or wholly outside; else there is more to be seen."""
        if self.interval.low > self.high or self.interval.high < self.low:
            return "beyond"
        return "within" if self.low <= self.interval.low and self.interval.high <= self.high else "open"

    def __str__(self) -> str:
        said = f"{self.name}: {_share_of(self.candidate)} with the candidate"
        if self.baseline is None:
            return f"{said}; the rate is from {_percents(self.interval)}, and up to {self.high:.2%} is tolerated"
        tolerated = f"up to {self.high:+.2%}" if self.low == -1.0 else _percents(Interval(self.low, self.high), "+")
        return (
            f"{said}, {_share_of(self.baseline)} with the baseline; the difference is from {_percents(self.interval, '+')}, and "
            f"{tolerated} is tolerated"
        )


@dataclass(frozen=True)
class Latency:
    """Seconds of the requests of one arm, for display; None without any."""

    arm: str
    p50: float | None
    p95: float | None


@dataclass(frozen=True)
class Verdict:
    """What is to be done, and why, in plain sentences; with all that it was decided on.

    largest_dp: of the shadowed files. unreadable: lines of logs.
    """

    action: Action
    reasons: list[str]
    comparisons: tuple[Comparison, ...] = ()
    drifts: tuple[Drift, ...] = ()
    latencies: tuple[Latency, ...] = ()
    largest_dp: float | None = None
    source: str = "gateway"
    unreadable: int = 0


def assess(state_dir: str | Path, rollout: _Rollout, now: float | None = None) -> Verdict:
    """Judge a rollout by the logs of its server's state directory and by its policy file, or the defaults where it names none.

    now: in seconds since 1970; None for the present. Raises UsageError for a wrong policy file.
    """
    policy = Policy.read(rollout.policy) if rollout.policy else Policy()
    started = _seconds(rollout.started)
    evidence = Evidence.gather(state_dir, rollout.model, rollout.baseline, rollout.candidate, started)
    return judge(evidence, policy, Progress.of(rollout, now))


def judge(evidence: Evidence, policy: Policy, progress: Progress) -> Verdict:
    """What a rollout's evidence says under a policy.

    evidence: since the rollout's start. "abort" where a comparison's interval is wholly beyond its tolerance, or the step has
    taken too long; "hold" until there are enough requests, and where the policy says so; else "step", or "promote" after the
    last step. It may be asked as often as one likes: the probability that a candidate that is within all tolerances is ever
    aborted by a comparison is at most `policy.alpha`.
    """
    seen = evidence.after(progress.phase_started)
    shadow = progress.percent == 0
    arm: Arm = "shadow" if shadow else "candidate"
    pairs = seen.pairs() if shadow else []
    comparisons = _shadowed(seen, pairs, policy) if shadow else _split(seen, policy)
    found_dps = [pair.dp for pair in pairs if pair.dp is not None]
    largest = max(found_dps, default=None)
    drifts = _drifts(seen, arm)
    return Verdict(
        *_decide(seen, policy, progress, comparisons, drifts, largest, arm),
        comparisons=tuple(comparisons),
        drifts=tuple(drifts),
        latencies=tuple(_latency(seen, each) for each in ("baseline", arm)),
        largest_dp=largest,
        source=evidence.source,
        unreadable=evidence.unreadable,
    )


def _decide(
    seen: Evidence,
    policy: Policy,
    progress: Progress,
    comparisons: Sequence[Comparison],
    drifts: Sequence[Drift],
    largest_dp: float | None,
    arm: Arm,
) -> tuple[Action, list[str]]:
    beyond = [f"beyond what is tolerated: {each}" for each in comparisons if each.state == "beyond"]
    if largest_dp is not None and policy.max_dp is not None and largest_dp > policy.max_dp:
        beyond.append(
            f"the probability of a shadowed file moved by {largest_dp:.4g}, and at most {policy.max_dp:g} is tolerated"
        )
    if beyond:
        return "abort", beyond
    last = progress.step >= len(policy.steps) - 1
    waiting = _waiting(seen, policy, progress, comparisons, drifts, arm)
    hours = (progress.now - progress.step_started) / 3600
    if waiting and hours > policy.max_hours:
        return "abort", [
            f"the step has taken {hours:.1f} hours, and at most {policy.max_hours:g} are allowed",
            *waiting,
        ]
    if waiting:
        return "hold", waiting
    shown = [str(each) for each in comparisons]
    if policy.step_when == "within_tolerance":
        return ("promote" if last else "step"), ["every comparison is within what is tolerated", *shown]
    return ("promote" if last else "step"), [
        "there are enough requests, and no comparison is beyond what is tolerated",
        *shown,
    ]


def _waiting(
    seen: Evidence,
    policy: Policy,
    progress: Progress,
    comparisons: Sequence[Comparison],
    drifts: Sequence[Drift],
    arm: Arm,
) -> list[str]:
    """Why the step cannot end yet, in sentences."""
    reasons = []
    step = seen.after(progress.step_started)
    # With everybody at the candidate, the baseline has no more requests.
    for name, each in (("candidate", arm), *((("baseline", "baseline"),) if progress.percent < 100 else ())):
        count = sum(sent.arm == each for sent in step.sent)
        if count < policy.min_requests:
            reasons.append(
                f"the {name} has answered {count:,} of the {policy.min_requests:,} requests that this step takes"
            )
    if policy.step_when == "within_tolerance":
        reasons += [
            f"not yet shown to be within what is tolerated: {each}" for each in comparisons if each.state == "open"
        ]
    live = [drift for drift in drifts if drift.ks is not None]
    if policy.hold_psi is not None and live and live[0].psi >= policy.hold_psi:
        reasons.append(
            f"the population stability index of {live[0].between} is {live[0].psi:.3f}, and a step does not end from "
            f"{policy.hold_psi:g} on"
        )
    return reasons


def _share(policy: Policy, classes: Sequence[str]) -> float:
    """Each comparison's part of alpha (Bonferroni): those of the split, and of the shadow where there is one."""
    count = 3 + len(_compared(classes)) + (3 if SHADOW in policy.steps else 0)
    return policy.alpha / count


def _compared(classes: Sequence[str]) -> Sequence[str]:
    # Of two classes, one's rate says the other's.
    return classes[1:] if len(classes) == 2 else classes


def _shadowed(seen: Evidence, pairs: Sequence[Pair], policy: Policy) -> list[Comparison]:
    alpha = _share(policy, seen.classes)
    flips = Count(len(pairs), sum(pair.flipped for pair in pairs))
    return [
        Comparison("files answered otherwise", None, flips, rate_interval(flips, alpha), 0.0, policy.max_flips, alpha),
        _paired("failed requests", *_failures(seen, "shadow"), -1.0, policy.max_error_increase, alpha),
        _paired("slow requests", *_slow(seen, "shadow", policy), -1.0, policy.max_slow_increase, alpha),
    ]


def _split(seen: Evidence, policy: Policy) -> list[Comparison]:
    alpha = _share(policy, seen.classes)
    if policy.unit == "client":
        arms = [seen.first_of_clients("baseline"), seen.first_of_clients("candidate")]
    else:
        arms = [list(seen.answered["baseline"]), list(seen.answered["candidate"])]
    tolerated = policy.max_decision_change
    decisions = []
    for name in _compared(seen.classes):
        chosen = [[each.choice == name for each in arm if each.choice is not None] for arm in arms]
        decisions.append(_independent(f"files decided {name}", *_counts(chosen), -tolerated, tolerated, alpha))
    refused = _counts([[each.status in REFUSED for each in arm] for arm in arms])
    return [
        _independent("failed requests", *_failures(seen, "candidate"), -1.0, policy.max_error_increase, alpha),
        _independent("refused files", *refused, -policy.max_refusal_change, policy.max_refusal_change, alpha),
        _independent("slow requests", *_slow(seen, "candidate", policy), -1.0, policy.max_slow_increase, alpha),
        *decisions,
    ]


def _independent(name: str, ours: Count, theirs: Count, low: float, high: float, alpha: float) -> Comparison:
    return Comparison(name, ours, theirs, difference_interval(ours, theirs, alpha), low, high, alpha)


def _paired(name: str, ours: Count, theirs: Count, low: float, high: float, alpha: float) -> Comparison:
    return Comparison(name, ours, theirs, paired_difference_interval(ours, theirs, alpha), low, high, alpha)


def _counts(arms: Sequence[Sequence[bool]]) -> tuple[Count, Count]:
    """Of the baseline and of the other arm."""
    ours, theirs = (Count(len(each), sum(each)) for each in arms)
    return ours, theirs


def _failures(seen: Evidence, arm: Arm) -> tuple[Count, Count]:
    counts = []
    for each in ("baseline", arm):
        requests = seen.requests(each)
        failed = sum(request.failed for request in requests) + seen.silent_failures(each)
        counts.append(Count(len(requests), min(failed, len(requests))))
    return counts[0], counts[1]


def _slow(seen: Evidence, arm: Arm, policy: Policy) -> tuple[Count, Count]:
    """Requests that took longer than a time which was set by the baseline's first ones; those are not counted.

    A time set by what is counted would move, and with it what "slow" means. Where both versions are as fast as each other, both
    rates are the same, whatever that time is.
    """
    basis = min(LATENCY_BASIS, max(20, policy.min_requests // 2))
    timed = {
        each: [(request.time, request.seconds) for request in seen.requests(each) if request.seconds is not None]
        for each in ("baseline", arm)
    }
    first = timed["baseline"][:basis]
    if len(first) < basis:
        return Count(0, 0), Count(0, 0)
    limit = float(np.percentile([seconds for _, seconds in first], SLOW))
    later = [[seconds > limit for time, seconds in timed[each] if time > first[-1][0]] for each in ("baseline", arm)]
    return _counts(later)


def _drifts(seen: Evidence, arm: Arm) -> list[Drift]:
    ours, theirs = (
        [each.score for each in seen.answered[name] if each.score is not None] for name in ("baseline", arm)
    )
    evaluated = seen.histograms
    found = [
        between_samples("the candidate's probabilities against the baseline's", theirs, ours),
        from_histogram("the candidate's probabilities against its evaluation's", theirs, evaluated.get(seen.candidate)),
        from_histogram("the baseline's probabilities against its evaluation's", ours, evaluated.get(seen.baseline)),
    ]
    return [drift for drift in found if drift is not None]


def _latency(seen: Evidence, arm: Arm) -> Latency:
    seconds = [request.seconds for request in seen.requests(arm) if request.seconds is not None]
    if not seconds:
        return Latency(arm, None, None)
    p50, p95 = np.percentile(seconds, [50, SLOW])
    return Latency(arm, float(p50), float(p95))


def as_text(verdict: Verdict) -> str:
    """The verdict for a terminal."""
    lines = [f"{verdict.action}: {verdict.reasons[0]}", *(f"  {reason}" for reason in verdict.reasons[1:]), ""]
    rows = [["comparison", "baseline", "candidate", "difference", "tolerated", ""]]
    for each in verdict.comparisons:
        single = each.baseline is None
        rows.append(
            [
                each.name,
                "" if each.baseline is None else _share_of(each.baseline),
                _share_of(each.candidate),
                "" if single else _percents(each.interval, "+"),
                f"up to {each.high:.2%}"
                if single or each.low == -1.0
                else _percents(Interval(each.low, each.high), "+"),
                each.state,
            ]
        )
        if single:
            rows[-1][3] = _percents(each.interval)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for latency in verdict.latencies:
        if latency.p50 is not None:
            lines.append(f"{latency.arm}: p50 {latency.p50:.3f} s, p95 {latency.p95:.3f} s")
    if verdict.largest_dp is not None:
        lines.append(f"the largest change of a shadowed file's probability is {verdict.largest_dp:.4g}")
    for drift in verdict.drifts:
        ks = "" if drift.ks is None else f", Kolmogorov-Smirnov {drift.ks:.3f} (p {drift.p_value:.2g})"
        lines.append(f"{drift.between}: stability index {drift.psi:.3f}, {drift.verdict}{ks}, of {drift.n:,}")
    if verdict.source == "journal":
        lines.append(
            "no gateway logged requests: these are the workers' own journals, without requests that killed one"
        )
    if verdict.unreadable:
        lines.append(f"{verdict.unreadable:,} lines of the logs cannot be read")
    return "\n".join(lines)


def _seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()


def _share_of(count: Count) -> str:
    return f"{count.rate:.2%} of {count.n:,}" if count.n else "none"


def _percents(interval: Interval, sign: str = "") -> str:
    return f"{interval.low:{sign}.2%} to {interval.high:{sign}.2%}"
