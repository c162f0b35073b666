"""How often a rollout's judgement is wrong when it is asked after every request, and how soon it finds what is worse.

    python -m benchmarks.rollout_simulation

Simulated requests of two versions, judged by skewless.rollout.sequential as a rollout is; beside it the usual test of two rates,
made for one look, looked at as often. Three tables in Markdown, and a picture. Run it from the repository's root.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, norm
from tqdm import trange

from skewless.rollout.judge import LATENCY_BASIS, SLOW
from skewless.rollout.policy import Policy
from skewless.rollout.sequential import Floats, block_ends, differences, log_capital

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ENOUGH = 20  # requests in each arm, before the usual test is looked at
SIGMA = 0.4  # of the logarithm of a request's seconds
CLIENTS = 300  # of the third table

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Version:
    """What a version's requests are like. seconds: their median."""

    positive: float = 0.30
    errors: float = 0.001
    seconds: float = 0.1


@dataclass(frozen=True)
class Run:
    """One comparison of one run: of each request that counts, in their order, whether it was the candidate's, and whether what is
    counted happened. at: the number of each, from 1, among all requests."""

    candidate: Bools
    happened: Bools
    at: NDArray[np.int64]

    @classmethod
    def of(cls, candidate: Bools, happened: Bools, counted: Bools | None = None) -> Run:
        places = np.arange(len(candidate)) if counted is None else np.flatnonzero(counted)
        return cls(candidate[places], happened[places], places + 1)


def simulate(rng: np.random.Generator, requests: int, candidate: Version, share: float) -> dict[str, Run]:
    """The comparisons of a split, by name, for requests that do not depend on one another."""
    arm = rng.random(requests) < share
    baseline = Version()
    positive = rng.random(requests) < np.where(arm, candidate.positive, baseline.positive)
    failed = rng.random(requests) < np.where(arm, candidate.errors, baseline.errors)
    seconds = np.where(arm, candidate.seconds, baseline.seconds) * rng.lognormal(0, SIGMA, requests)
    # As skewless.rollout.judge has it: slower than 95 % of the baseline's first requests, which are not counted.
    seen = (~arm).cumsum()
    limit = np.percentile(seconds[~arm & (seen <= LATENCY_BASIS)], SLOW)
    return {
        "decisions": Run.of(arm, positive),
        "errors": Run.of(arm, failed),
        "latency": Run.of(arm, seconds > limit, seen > LATENCY_BASIS),
    }


def of_clients(rng: np.random.Generator, requests: int, share: float) -> dict[str, Run]:
    """The same decisions of equal versions, counted by request and by client: a client always has the same arm, and each has a
    rate of its own."""
    clients = rng.integers(CLIENTS, size=requests)
    arm = (rng.random(CLIENTS) < share)[clients]
    positive = rng.random(requests) < rng.beta(0.6, 1.4, CLIENTS)[clients]
    first = np.zeros(requests, bool)
    first[np.unique(clients, return_index=True)[1]] = True
    return {"request": Run.of(arm, positive), "client": Run.of(arm, positive, first)}


def over_a_day(rng: np.random.Generator, requests: int, share: float) -> dict[str, Run]:
    """Decisions of equal versions, whose rate rises and falls with the time of day, for both alike."""
    arm = rng.random(requests) < share
    rate = 0.3 + 0.25 * np.sin(np.linspace(0, 4 * np.pi, requests))
    return {"decisions": Run.of(arm, rng.random(requests) < rate)}


def exceeds(run: Run, alpha: float, tolerance: float = 0.0) -> float:
    """The request at which the interval of the difference is wholly above the tolerance for the first time; infinite for never."""
    values = (differences(run.candidate, run.happened) + 1) / 2
    found = np.flatnonzero(log_capital(values, (tolerance + 1) / 2) >= math.log(2 / alpha))
    if not len(found):
        return math.inf
    return float(run.at[block_ends(run.candidate)[found[0]]])


def differs(run: Run, alpha: float) -> float:
    """The request at which the interval leaves out 0 for the first time."""
    return min(exceeds(run, alpha), exceeds(Run(run.candidate, ~run.happened, run.at), alpha))


def differs_usually(run: Run, alpha: float) -> float:
    """The request at which the usual test of two rates says so for the first time, as if each look were the only one."""
    n1, n0 = run.candidate.cumsum(), (~run.candidate).cumsum()
    s1, s0 = (run.candidate & run.happened).cumsum(), (~run.candidate & run.happened).cumsum()
    pooled = (s0 + s1) / (n0 + n1)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.sqrt(pooled * (1 - pooled) * (1 / n0 + 1 / n1))
        z = np.abs(s1 / n1 - s0 / n0) / error
    found = np.flatnonzero((z > norm.isf(alpha / 2)) & (np.minimum(n0, n1) >= ENOUGH))
    return float(run.at[found[0]]) if len(found) else math.inf


def interval(count: int, runs: int) -> str:
    """A share of runs with its 95 % interval (Clopper and Pearson)."""
    low = beta.ppf(0.025, count, runs - count + 1) if count else 0.0
    high = beta.ppf(0.975, count + 1, runs - count) if count < runs else 1.0
    return f"{count / runs:.2%} ({low:.2%} to {high:.2%})"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000, help="of equal versions")
    parser.add_argument("--requests", type=int, default=10_000, help="in a run")
    parser.add_argument("--alpha", type=float, default=0.05)
    parser.add_argument("--share", type=float, default=0.5, help="of the requests, for the candidate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("docs", "rollout-peeking.png"))
    args = parser.parse_args(argv)
    if args.runs < 1 or args.requests < 4 * LATENCY_BASIS or not 0 < args.share < 1:
        parser.error(f"expected at least 1 run, {4 * LATENCY_BASIS} requests and a share between 0 and 1")
    rng = np.random.default_rng(args.seed)
    each = args.alpha / 3  # three comparisons share alpha
    ours, usual = _equal(rng, args, each)
    print(
        f"Equal versions, {args.runs:,} runs of {args.requests:,} requests, a look after each, alpha {args.alpha:g}:\n"
    )
    print("| method | false alarms (95 % interval) |\n|---|---|")
    for name, found in (("confidence sequences", ours), ("the usual test at every look", usual)):
        print(f"| {name} | {interval(int(np.isfinite(found).sum()), args.runs)} |")
    print("\nWorse candidates, requests of both arms until it is shown:\n")
    print(
        "| candidate | any difference: median (90 % of runs) | beyond the default tolerance: median (90 % of runs) |\n|---|---|---|"
    )
    for row in _worse(rng, args, each):
        print(row)
    print("\nEqual versions, whose requests are not alike:\n")
    print("| what is counted | false alarms (95 % interval) |\n|---|---|")
    said = {
        "request": f"every request of {CLIENTS} clients, each with a rate and an arm of its own",
        "client": "the first request of each of these clients",
        "decisions": "every request, the rate of both versions between 5 % and 55 % over the day",
    }
    for what, count in _alarms(rng, args, each).items():
        print(f"| {said[what]} | {interval(count, args.runs)} |")
    _draw(args, ours, usual)


def _equal(rng: np.random.Generator, args: argparse.Namespace, alpha: float) -> list[Floats]:
    """At which request each run raises its first false alarm, by our method and by the usual one."""
    found: list[list[float]] = [[], []]
    for _ in trange(args.runs, desc="equal versions", unit="run"):
        runs = simulate(rng, args.requests, Version(), args.share).values()
        for test, each in zip((differs, differs_usually), found, strict=True):
            each.append(min(test(run, alpha) for run in runs))
    return [np.array(each) for each in found]


def _worse(rng: np.random.Generator, args: argparse.Namespace, alpha: float) -> Iterator[str]:
    policy, equal = Policy(), Version()
    tolerances = {
        "decisions": policy.max_decision_change,
        "errors": policy.max_error_increase,
        "latency": policy.max_slow_increase,
    }
    for name, kind, candidate in (
        ("decision rate 30 % to 36 %", "decisions", replace(equal, positive=0.36)),
        ("decision rate 30 % to 45 %", "decisions", replace(equal, positive=0.45)),
        ("errors 0.1 % to 1 %", "errors", replace(equal, errors=0.01)),
        ("errors 0.1 % to 5 %", "errors", replace(equal, errors=0.05)),
        ("latency + 20 %", "latency", replace(equal, seconds=1.2 * equal.seconds)),
        ("latency + 50 %", "latency", replace(equal, seconds=1.5 * equal.seconds)),
    ):
        found: list[list[float]] = [[], []]
        for _ in trange(max(1, args.runs // 5), desc=name, unit="run"):
            run = simulate(rng, args.requests, candidate, args.share)[kind]
            for tolerance, each in zip((0.0, tolerances[kind]), found, strict=True):
                each.append(exceeds(run, alpha, tolerance))
        yield f"| {name} | {' | '.join(_soon(each, args.requests) for each in found)} |"


def _soon(found: Sequence[float], requests: int) -> str:
    median, most = np.quantile(found, [0.5, 0.9], method="higher")
    said = [f"{each:,.0f}" if np.isfinite(each) else f"over {requests:,}" for each in (median, most)]
    return f"{said[0]} ({said[1]})"


def _alarms(rng: np.random.Generator, args: argparse.Namespace, alpha: float) -> dict[str, int]:
    """Runs with a false alarm where requests depend on one another, by what is counted."""
    alarms: dict[str, int] = {}
    for _ in trange(args.runs, desc="clients and days", unit="run"):
        runs = of_clients(rng, args.requests, args.share) | over_a_day(rng, args.requests, args.share)
        for what, run in runs.items():
            alarms[what] = alarms.get(what, 0) + math.isfinite(differs(run, alpha))
    return alarms


def _draw(args: argparse.Namespace, ours: Floats, usual: Floats) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for found, name in ((usual, "the usual test, looked at after every request"), (ours, "confidence sequences")):
        at = np.arange(1, args.requests + 1)
        axes.plot(at, 100 * np.searchsorted(np.sort(found), at, side="right") / len(found), label=name)
    axes.axhline(100 * args.alpha, color="gray", linestyle=":", label=f"alpha, {100 * args.alpha:g} %")
    axes.set(xscale="log", xlim=(10, args.requests), ylim=(0, None))
    axes.set(xlabel="requests so far", ylabel="runs with a false alarm so far, %")
    axes.set_title(f"Two equal versions, {args.runs:,} runs")
    axes.legend()
    figure.savefig(args.picture, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
