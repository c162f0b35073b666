"""New versions of a model on live traffic, from the build to the end of each rollout: one that is as good, four that are not.

    python -m benchmarks.rollout --demo runs/quickstart/cough --out runs/rollout

One TorchServe and one gateway on this machine; callers ask by REST and gRPC all the time. Version 1.0 serves. Each candidate is
built, signed and registered, then follows the policy by itself: a copy of the traffic, 5 %, 50 %, everybody. It exits with 1 where
one of them ends otherwise than it has to, where a caller was not answered, or where a client was answered by two versions within one step.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import yaml
from scipy import stats

from benchmarks.command import scratch_folder
from benchmarks.rollout.candidates import BASELINE, CANDIDATES, NAME, Candidate, build
from benchmarks.rollout.commands import skewless
from benchmarks.rollout.traffic import Asked, Recordings, Traffic
from skewless.torchserve.server import Server

# All candidates have the weights of the baseline, so hardly a file may be decided otherwise.
POLICY: dict[str, Any] = {"steps": ["shadow", 5, 50, 100], "min_requests": 150, "unit": "request", "max_flips": 0.03}
CLIENTS = 400
CALLERS = 4
# Of all binomial tests together: a correct split is called wrong once in a thousand runs.
ALPHA = 0.001


@dataclass(frozen=True)
class Ended:
    """How a rollout went. seconds: from its start to its end. steps: percent and when it began, of the state's history."""

    version: str
    title: str
    expected: str
    phase: str
    reasons: str
    as_expected: bool
    seconds: float
    requests: int
    steps: list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout", description=__doc__.split("\n")[0])
    parser.add_argument("--demo", type=Path, default=Path("runs/quickstart/cough"), help="what the quickstart left")
    parser.add_argument("--out", type=Path, default=Path("runs/rollout"), help="folder for the report")
    parser.add_argument("--only", nargs="*", metavar="VERSION", help="these candidates (all)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    missing = [name for name in ("corpus/manifest.csv", "evaluation/metrics.json") if not (args.demo / name).is_file()]
    if missing:
        parser.error(f"{args.demo} has no {missing[0]}; run ./scripts/quickstart.sh first, or give --demo")
    wanted = [each for each in CANDIDATES if args.only is None or each.version in args.only]
    args.out.mkdir(parents=True, exist_ok=True)
    with scratch_folder(parser) as scratch:
        ended, asked = _story(args.demo.resolve(), wanted, scratch, args.seed)
    report = _report(ended, asked)
    (args.out / "rollout.md").write_text(report["text"], encoding="utf-8")
    (args.out / "rollout.json").write_text(json.dumps(report["data"], indent=2), encoding="utf-8")
    with (args.out / "requests.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(each)) + "\n" for each in asked)
    print(report["text"])
    sys.exit(1 if report["data"]["problems"] else 0)


def _story(demo: Path, wanted: Sequence[Candidate], scratch: Path, seed: int) -> tuple[list[Ended], list[Asked]]:
    store, state_dir, key, policy = scratch / "store", scratch / "s", scratch / "key.pem", scratch / "policy.yaml"
    policy.write_text(yaml.safe_dump(POLICY), encoding="utf-8")
    public = Path(skewless("sign", "--new-key", key)["public"])
    build(demo, wanted, store, scratch, key)
    here: list[str | Path] = ["--state-dir", state_dir]
    # The bytes of the traffic are kept for as long as the comparison of the pipelines needs them: here the operator allows it.
    allowed = {"SKEWLESS_KEEP_UPLOADS": "200"}
    skewless(
        "serve",
        "start",
        "--model-store",
        store,
        "--ports",
        "free",
        "--trusted-keys",
        public,
        *here,
        environment=allowed,
    )
    try:
        skewless("versions", "register", store / f"{NAME}-{BASELINE}.mar", "--default", *here)
        gateway = skewless("gateway", "start", "--ports", "free", *here)
        recordings = Recordings(sorted((demo / "corpus" / "audio").iterdir())[:48])
        try:
            with Traffic(gateway["rest"], gateway["grpc"], NAME, recordings, CALLERS, CLIENTS, seed) as traffic:
                ended = [_rolled_out(each, store, policy, here, traffic) for each in wanted]
        finally:
            skewless("gateway", "stop", *here)
        return ended, sorted(traffic.asked, key=lambda each: each.time)
    finally:
        Server.attach(state_dir).stop()


def _rolled_out(candidate: Candidate, store: Path, policy: Path, here: list[str | Path], traffic: Traffic) -> Ended:
    """Register a candidate, follow the policy to its end, and take the version away that lost."""
    before = len(traffic.asked)
    skewless("versions", "register", store / f"{NAME}-{candidate.version}.mar", *here)
    started = time.time()
    skewless("rollout", "start", NAME, "--candidate", candidate.version, "--policy", policy, *here)
    state = skewless("rollout", "run", NAME, "--every", "5", *here, failing=None)
    history = state["history"]
    if state["phase"] == "promoted":
        # Back again, so that every candidate is compared with the same version.
        skewless("versions", "default", NAME, BASELINE, *here)
    skewless("versions", "retire", NAME, candidate.version, *here)
    reasons = history[-1]["why"]
    as_expected = state["phase"] == candidate.expected and candidate.because in reasons
    steps = [{"percent": each["percent"], "action": each["action"], "time": each["time"]} for each in history]
    print(f"{candidate.version} ({candidate.title}): {state['phase']}, {reasons}", flush=True)
    return Ended(
        *(candidate.version, candidate.title, candidate.expected, state["phase"], reasons, as_expected),
        *(time.time() - started, len(traffic.asked) - before, steps),
    )


def _report(ended: Sequence[Ended], asked: Sequence[Asked]) -> dict[str, Any]:
    """The story in figures: how each rollout ended, who was not answered, and how the clients were split."""
    failed = [each for each in asked if each.status != 200]
    # Between two rollouts the gateway leaves the choice to TorchServe, and says no version.
    mixed = [each for each in asked if each.status == 200 and each.said not in ("", each.version)]
    problems = [f"{each.version} was {each.phase}: {each.reasons}" for each in ended if not each.as_expected]
    problems += [f"{each.protocol} {each.status}: {each.message}" for each in failed[:10]]
    problems += [f"the gateway said {each.said}, {each.version} answered" for each in mixed[:10]]
    splits = [split for each in ended for split in _splits(each, asked)]
    problems += [f"a split is not as asked for: {split}" for split in splits if not split["correct"]]
    machine = f"{platform.machine()}, {psutil.cpu_count()} cores"
    protocols = Counter(each.protocol for each in asked)
    lines = [
        f"{machine}. {len(asked):,} requests ({', '.join(f'{count:,} {name}' for name, count in sorted(protocols.items()))}) of "
        f"{CLIENTS} clients, {CALLERS} at once: {len(failed)} failed.",
        "",
        "| version | what is other than in 1.0 | ended | after | because |",
        "|---|---|---|---|---|",
        *(
            f"| {e.version} | {e.title} | {e.phase} | {e.seconds:.0f} s, {e.requests:,} requests | {e.reasons} |"
            for e in ended
        ),
        "",
        "| version | asked for | clients seen | with the candidate | p of the binomial test | clients of two versions | REST and gRPC apart |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {s['version']} | {s['percent']:g} % | {s['clients']} | {s['share']:.1%} | {s['p']:.3f} | {s['torn']} | {s['apart']} |"
            for s in splits
        ),
    ]
    data = {
        "machine": machine,
        "policy": POLICY,
        "ended": [asdict(e) for e in ended],
        "splits": splits,
        "problems": problems,
        "requests": len(asked),
        "failed": len(failed),
        "seconds": _seconds(asked),
    }
    text = "\n".join([*lines, "", *(f"PROBLEM: {problem}" for problem in problems)]).rstrip() + "\n"
    return {"text": text, "data": data}


def _splits(ended: Ended, asked: Sequence[Asked]) -> list[dict[str, Any]]:
    """For each step in which some clients went to the candidate: how many, and whether each stayed with its version."""
    found = []
    times = [_time(step["time"]) for step in ended.steps]
    for number, step in enumerate(ended.steps[:-1]):
        if not 0 < step["percent"] < 100:
            continue
        versions: dict[str, set[str]] = defaultdict(set)
        by_protocol: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        for each in asked:
            # A second on either side belongs to the change of the split.
            if times[number] + 1 < each.time < times[number + 1] - 1 and each.status == 200:
                versions[each.client].add(each.version)
                by_protocol[each.client][each.protocol].add(each.version)
        with_candidate = sum(ended.version in each for each in versions.values())
        test = stats.binomtest(with_candidate, len(versions), step["percent"] / 100) if versions else None
        torn = sum(len(each) > 1 for each in versions.values())
        apart = sum(len(each) == 2 and each["rest"] != each["grpc"] for each in by_protocol.values())
        p = test.pvalue if test else 0.0
        row = {
            "version": ended.version,
            "percent": step["percent"],
            "clients": len(versions),
            "p": p,
            "torn": torn,
            "apart": apart,
        }
        row |= {"share": with_candidate / max(1, len(versions))}
        found.append(row | {"correct": p > ALPHA and not torn and not apart})
    return found


def _seconds(asked: Sequence[Asked]) -> dict[str, dict[str, float]]:
    """Median and 99th percentile of the callers' seconds, by the arm that answered."""
    found: dict[str, list[float]] = defaultdict(list)
    for each in asked:
        found[each.arm or "none"].append(each.seconds)
    return {arm: dict(zip(("p50", "p99"), _percentiles(values), strict=True)) for arm, values in found.items()}


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    ordered = sorted(values)
    return ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]


def _time(iso: str) -> float:
    return datetime.fromisoformat(iso).timestamp()


if __name__ == "__main__":
    main()
