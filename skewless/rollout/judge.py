"""Whether a rollout may go on: the candidate against the baseline, by what has been seen so far."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from skewless.rollout.drift import Drift, between_samples, from_histogram
from skewless.rollout.evidence import REFUSED, Arm, Evidence, Pair, Sent
from skewless.rollout.policy import SHADOW, Policy
from skewless.rollout.sequential import Interval, differences, mean_interval
from skewless.rollout.state import Rollout

Action = Literal["step", "hold", "abort", "promote"]

# Requests of the baseline by which "slow" is defined, once and for all: later ones are compared by it.
LATENCY_BASIS = 200
SLOW = 95  # percentile


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
    def of(cls, rollout: Rollout, now: float | None = None) -> Progress:
        """Of a rollout's state. now: None for the present."""
        times = [_seconds(entry.time) for entry in rollout.history] or [_seconds(rollout.started)]
        # The shadow's requests and the split's are two experiments.
        splits = [_seconds(entry.time) for entry in rollout.history if entry.percent > 0]
        phase = splits[0] if rollout.percent and splits else _seconds(rollout.started)
        return cls(rollout.percent, rollout.step, phase, times[-1], time.time() if now is None else now)


class Count(NamedTuple):
    """n observations, s of which are what is counted."""

    n: int
    s: int

    def __str__(self) -> str:
        return f"{self.s / self.n:.2%} of {self.n:,}" if self.n else "none"


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
        said = f"{self.name}: {self.candidate} with the candidate"
        if self.baseline is None:
            return f"{said}; the rate is from {_percents(self.interval)}, and up to {self.high:.2%} is tolerated"
        return (
            f"{said}, {self.baseline} with the baseline; the difference is from {_percents(self.interval, '+')}, and "
            f"{self.tolerated} is tolerated"
        )

    @property
    def tolerated(self) -> str:
        """The tolerance in words."""
        if self.baseline is None or self.low == -1.0:
            return f"up to {self.high:.2%}"
        return _percents(Interval(self.low, self.high), "+")


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


def assess(state_dir: str | Path, rollout: Rollout, now: float | None = None) -> Verdict:
    """Judge a rollout by the logs of its server's state directory and by its policy file, or the defaults where it names none.

    Where a candidate is aborted in the shadow, the reasons say why the files that moved most did, of those that were kept.

    now: in seconds since 1970; None for the present. Raises UsageError for a wrong policy file.
    """
    policy = Policy.read(rollout.policy) if rollout.policy else Policy()
    evidence = evidence_of(state_dir, rollout)
    verdict = judge(evidence, policy, Progress.of(rollout, now))
    if verdict.action == "abort" and rollout.percent == 0:
        return replace(verdict, reasons=[*verdict.reasons, *_explained(evidence)])
    return verdict


def evidence_of(state_dir: str | Path, rollout: Rollout) -> Evidence:
    """What is known of a rollout's versions since it began."""
    since = _seconds(rollout.started)
    return Evidence.gather(state_dir, rollout.model, rollout.baseline, rollout.candidate, since)


def _explained(evidence: Evidence) -> list[str]:
    from skewless.rollout.shadow import explain

    try:
        return [str(each) for each in explain(evidence, count=3)]
    except Exception as error:
        # It runs both archives' code: whatever that does, the candidate has to be aborted.
        return [f"why the answers differ could not be found: {error or type(error).__name__}"]


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
    if progress.percent == 100:
        comparisons.append(_everybody(seen, policy, progress.step_started))
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
    """Each comparison's part of alpha (Bonferroni): those of the split, of the shadow, and of a step with everybody, where the
    policy has these."""
    count = 3 + len(_compared(classes)) + 3 * (SHADOW in policy.steps) + (policy.steps[-1] == 100)
    return policy.alpha / count


def _compared(classes: Sequence[str]) -> Sequence[str]:
    # Of two classes, one's rate says the other's.
    return classes[1:] if len(classes) == 2 else classes


def _shadowed(seen: Evidence, pairs: Sequence[Pair], policy: Policy) -> list[Comparison]:
    alpha = _share(policy, seen.classes)
    flipped = [pair.flipped for pair in pairs]
    flips = Count(len(flipped), sum(flipped))
    copies = seen.copies()
    timed = _timed(copies, policy)
    return [
        Comparison(
            "files answered otherwise", None, flips, mean_interval(flipped, alpha), 0.0, policy.max_flips, alpha
        ),
        _of_pairs(
            "failed requests", [(ours.failed, copy.failed) for ours, copy in copies], policy.max_error_increase, alpha
        ),
        _of_pairs("slow requests", timed, policy.max_slow_increase, alpha),
    ]


def _split(seen: Evidence, policy: Policy) -> list[Comparison]:
    alpha = _share(policy, seen.classes)
    requests = sorted((*seen.requests("baseline"), *seen.requests("candidate")), key=lambda each: each.time)
    files = seen.files(policy.unit)
    refused = [(theirs, each.status in REFUSED) for theirs, each in files]
    decided = [(theirs, each.choice) for theirs, each in files if each.choice is not None]
    found = [
        _of_arms(
            "failed requests",
            [(each.arm == "candidate", each.failed) for each in requests],
            -1.0,
            policy.max_error_increase,
            alpha,
        ),
        _of_arms("refused files", refused, -policy.max_refusal_change, policy.max_refusal_change, alpha),
        _of_arms("slow requests", _slow(requests, policy), -1.0, policy.max_slow_increase, alpha),
    ]
    tolerated = policy.max_decision_change
    for name in _compared(seen.classes):
        chosen = [(theirs, choice == name) for theirs, choice in decided]
        found.append(_of_arms(f"files decided {name}", chosen, -tolerated, tolerated, alpha))
    return found


def _everybody(seen: Evidence, policy: Policy, since: float) -> Comparison:
    """The candidate's failures where no baseline is left to compare with at the same time: against what the baseline's rate may
    have been before."""
    alpha = _share(policy, seen.classes)
    failed = [each.failed for each in seen.requests("candidate") if each.time >= since]
    before = [each.failed for each in seen.requests("baseline")]
    high = min(1.0, mean_interval(before, alpha).high + policy.max_error_increase)
    count = Count(len(failed), sum(failed))
    return Comparison("failed requests of everybody", None, count, mean_interval(failed, alpha), 0.0, high, alpha)


def _of_arms(name: str, happened: Sequence[tuple[bool, bool]], low: float, high: float, alpha: float) -> Comparison:
    """happened: in their order, whether each was the candidate's, and whether what is counted did."""
    arms = [[each for theirs, each in happened if theirs is arm] for arm in (False, True)]
    ours, theirs = (Count(len(arm), sum(arm)) for arm in arms)
    values = differences([theirs for theirs, _ in happened], [each for _, each in happened])
    return Comparison(name, ours, theirs, mean_interval(values, alpha, -1.0, 1.0), low, high, alpha)


def _of_pairs(name: str, happened: Sequence[tuple[bool, bool]], high: float, alpha: float) -> Comparison:
    """happened: of each request, whether what is counted did with the baseline, and with the candidate's copy."""
    ours, theirs = (Count(len(happened), sum(each)) for each in (zip(*happened, strict=True) if happened else ((), ())))
    values = [int(copy) - int(original) for original, copy in happened]
    return Comparison(name, ours, theirs, mean_interval(values, alpha, -1.0, 1.0), -1.0, high, alpha)


def _slow(requests: Sequence[Sent], policy: Policy) -> list[tuple[bool, bool]]:
    """Of each request whether it was the candidate's, and whether it took longer than a time which the baseline's first ones set;
    those are not counted.

    A time set by what is counted would move, and with it what "slow" means. Where both versions are as fast as each other, both
    rates are the same, whatever that time is.
    """
    timed = [(each.arm == "candidate", each.seconds) for each in requests if each.seconds is not None]
    limit, place = _limit([None if theirs else seconds for theirs, seconds in timed], policy)
    return [(theirs, seconds > limit) for theirs, seconds in timed[place:]]


def _timed(copies: Sequence[tuple[Sent, Sent]], policy: Policy) -> list[tuple[bool, bool]]:
    """As `_slow`, of both answers to the same request."""
    timed = [
        (ours.seconds, copy.seconds) for ours, copy in copies if ours.seconds is not None and copy.seconds is not None
    ]
    limit, place = _limit([ours for ours, _ in timed], policy)
    return [(ours > limit, copy > limit) for ours, copy in timed[place:]]


def _limit(seconds: Sequence[float | None], policy: Policy) -> tuple[float, int]:
    """The time that is slow, by the first of the given ones, and the place after these; all places, while there are too few."""
    basis = min(LATENCY_BASIS, max(20, policy.min_requests // 2))
    places = [place for place, each in enumerate(seconds) if each is not None][:basis]
    if len(places) < basis:
        return np.inf, len(seconds)
    return float(np.percentile([each for place in places if (each := seconds[place]) is not None], SLOW)), places[
        -1
    ] + 1


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
    rows = [["comparison", "baseline", "candidate", "difference or rate", "tolerated", ""]]
    for each in verdict.comparisons:
        ours = "" if each.baseline is None else str(each.baseline)
        shown = _percents(each.interval, "" if each.baseline is None else "+")
        rows.append([each.name, ours, str(each.candidate), shown, each.tolerated, each.state])
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


def _percents(interval: Interval, sign: str = "") -> str:
    return f"{interval.low:{sign}.2%} to {interval.high:{sign}.2%}"
