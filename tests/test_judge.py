"""The judgement of a rollout: intervals that hold under peeking, what is read of logs, and what a policy makes of it."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import zipfile
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from benchmarks import rollout_simulation
from skewless import resources
from skewless.core.definition import Definition
from skewless.core.pipeline import Pipeline
from skewless.core.stages import PipelineError
from skewless.errors import UsageError
from skewless.evaluation.evaluate import evaluate
from skewless.packaging.build import build_archive
from skewless.rollout import labels as labelling
from skewless.rollout.drift import between_samples, from_histogram, psi
from skewless.rollout.evidence import Evidence
from skewless.rollout.judge import LATENCY_BASIS, Count, Progress, as_text, assess, judge
from skewless.rollout.labels import by_labels, read_labels
from skewless.rollout.policy import Policy
from skewless.rollout.sequential import BETS, block_ends, differences, log_capital, mean_interval
from skewless.rollout.shadow import NETWORK, explain, prepared_for
from skewless.skew.measure import Comparator
from skewless.training.checkpoint import load_checkpoint
from skewless.training.manifest import read_manifest
from tests.conftest import call_skewless
from tests.tiny_model import TinyModel, recording, tiny_model  # noqa: F401

# --- intervals


def test_the_capital_is_what_bets_make_of_each_value():
    values, mean = np.array([0.5, 1.0, 0.0, 0.75]), 0.4
    for larger in (True, False):
        capital = np.zeros(4)
        for bet in BETS:
            own = 1.0
            for place, x in enumerate(values):
                own *= 1 - bet + bet * (x / mean if larger else (1 - x) / (1 - mean))
                capital[place] += own / len(BETS)
        assert log_capital(values, mean, larger) == pytest.approx(np.log(capital))


def test_an_interval_ends_where_the_capital_reaches_the_bound():
    values = np.random.default_rng(1).choice([-1.0, -0.5, 0.0, 1.0], 500)
    alpha = 0.01
    low, high = mean_interval(values, alpha, -1.0, 1.0)
    assert low < values.mean() < high
    for end, larger in ((low, True), (high, False)):
        capital = log_capital((values + 1) / 2, (end + 1) / 2, larger)[-1]
        assert capital == pytest.approx(math.log(2 / alpha), abs=1e-9)


def test_rates_intervals_are_like_those_of_another_implementation():
    """Of the same method with other bets, and of the mixture that is made for rates: nobody's is best at every number of values."""
    ville = pytest.importorskip("ville", reason="ville is not installed: pip install --no-deps ville==0.1.0")
    observations = (np.random.default_rng(3).random(3000) < 0.03).astype(float)
    others = [ville.BettingCS(alpha=0.05), ville.BernoulliCS(alpha=0.05, prior=(0.5, 0.5), intersect=False)]
    for other in others:
        other.update(observations)
    for n in (300, 1000, 3000):
        low, high = mean_interval(observations[:n], 0.05)
        for other in others:
            theirs = (other.lower_[n - 1], other.upper_[n - 1])
            assert low <= theirs[1] and high >= theirs[0]
            assert 0.75 < (high - low) / (theirs[1] - theirs[0]) < 1.3


def test_a_block_ends_with_the_first_request_of_the_other_arm():
    arms = [0, 0, 1, 1, 0, 1, 1, 1]
    happened = [1, 0, 1, 0, 1, 0, 1, 1]
    assert differences(arms, happened).tolist() == [1 - 1 / 2, 0 - 1]
    assert block_ends(arms).tolist() == [2, 4]
    for nothing in ([], [1], [0, 0, 0], [1, 1]):
        assert differences(nothing, nothing).tolist() == []


def test_nothing_seen_says_nothing_and_nonsense_is_refused():
    assert mean_interval([], 0.05) == (0, 1) and mean_interval([], 0.05, -1, 1) == (-1, 1)
    low, high = mean_interval([1.0] * 5, 0.05)
    assert 0 < low < high == 1
    with pytest.raises(ValueError, match="alpha is 0, expected a number between 0 and 1"):
        mean_interval([1.0], 0)
    for wrong in (1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"expected 0\.0 to 1\.0"):
            mean_interval([0.5, wrong], 0.05)


def test_looking_after_every_request_raises_no_more_false_alarms_than_alpha():
    """The usual test, at the same level each time, raises them in a third of the runs."""
    rng = np.random.default_rng(8)
    ours = usual = 0
    for _ in range(150):
        run = rollout_simulation.simulate(rng, 1500, rollout_simulation.Version(), 0.3)["decisions"]
        ours += math.isfinite(rollout_simulation.differs(run, 0.05))
        usual += math.isfinite(rollout_simulation.differs_usually(run, 0.05))
    assert ours <= 0.05 * 150 and usual > 0.2 * 150


def test_rates_that_change_for_both_versions_alike_raise_none():
    rng = np.random.default_rng(9)
    days = [rollout_simulation.over_a_day(rng, 2000, 0.5)["decisions"] for _ in range(100)]
    assert sum(math.isfinite(rollout_simulation.differs(day, 0.05)) for day in days) <= 5


def test_a_true_difference_stays_in_the_interval_and_another_does_not():
    rng = np.random.default_rng(5)
    alpha, better = 0.1, rollout_simulation.Version(positive=0.45)
    runs = [rollout_simulation.simulate(rng, 1500, better, 0.5)["decisions"] for _ in range(100)]
    # The baseline's rate is 0.30.
    missed = [rollout_simulation.exceeds(run, alpha, 0.15) for run in runs]
    assert np.isfinite(missed).mean() <= alpha
    assert np.isfinite([rollout_simulation.exceeds(run, alpha) for run in runs]).mean() > 0.8


def test_the_simulation_prints_its_tables_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    picture = tmp_path / "peeking.png"
    rollout_simulation.main(["--runs", "10", "--requests", "1000", "--picture", str(picture)])
    printed = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    for part in (
        "| confidence sequences |",
        "| the usual test at every look |",
        "| errors 0.1 % to 5 % |",
        "| the first request",
    ):
        assert part in printed
    with pytest.raises(SystemExit):
        rollout_simulation.main(["--runs", "0"])


# --- distributions


def test_the_stability_index_by_hand():
    counts = np.array([10, 30, 60]), np.array([20, 30, 50])
    p, q = ((each + 0.5) / (each.sum() + 1.5) for each in counts)
    by_hand = sum((a - b) * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert psi(*counts) == pytest.approx(by_hand)
    assert psi(counts[0], counts[0]) == 0
    # Bins with few of what is compared with are joined with the next, and at the end with those before.
    split = np.array([4, 6, 0, 30, 55, 5]), np.array([3, 17, 0, 30, 44, 6])
    assert psi(*split) == pytest.approx(by_hand)


def test_too_few_values_have_no_stability_index():
    few = np.array([3, 2, 4, 0, 1, 5])
    assert psi(np.full(6, 100), few) is None and psi(np.zeros(6, int), np.full(6, 100)) is None
    rng = np.random.default_rng(6)
    found = [between_samples("", list(rng.random(40)), list(rng.random(40))) for _ in range(50)]
    assert np.mean([each.psi for each in found if each]) < 0.25
    assert between_samples("", list(rng.random(40)), list(rng.random(8))) is None


def test_drift_tells_a_moved_distribution_from_the_same_one():
    rng = np.random.default_rng(2)
    same, other, moved = rng.beta(2, 5, 2000), rng.beta(2, 5, 2000), rng.beta(4, 3, 2000)
    small, large = between_samples("", list(same), list(other)), between_samples("", list(moved), list(other))
    assert small and large and (small.verdict, large.verdict) == ("small", "large")
    assert small.p_value > 0.01 > 1e-6 > large.p_value and large.ks > 0.3 > small.ks
    edges = np.linspace(0, 1, 21)
    histogram = {"edges": edges.tolist(), "counts": np.histogram(other, edges)[0].tolist()}
    assert from_histogram("", list(same), histogram).verdict == "small"
    assert from_histogram("", list(moved), histogram).verdict == "large"
    assert from_histogram("", [], histogram) is None and from_histogram("", list(same), None) is None
    assert between_samples("", [], [0.5]) is None


# --- logs

START = 1_700_000_000.0


@dataclass(frozen=True)
class Behaviour:
    """How a version answers."""

    positive: float = 0.3
    errors: float = 0.001
    refused: float = 0.0
    seconds: float = 0.1


class Logs:
    """The access log and the journals of a server that two versions, 1.0 and 2.0, answered on."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "gateway").mkdir(parents=True)
        (folder / "journal").mkdir()
        self.access = folder / "gateway" / "access.jsonl"
        self.count = 0

    def journal(self, version: str) -> Path:
        return self.folder / "journal" / f"cough-{version}-77.jsonl"

    def request(self, arm: str, time: float, **more: Any) -> dict[str, Any]:
        """A line of the access log, answered."""
        version = more.pop("version", "1.0" if arm == "baseline" else "2.0")
        self.count += 1
        line = {"time": time, "id": f"r{self.count}", "client": f"c{self.count}", "protocol": "rest", "model": "cough"}
        line |= {"arm": arm, "version": version, "status": 200, "grpc_status": None, "request_s": 0.2}
        return line | {"upstream_s": 0.1, "bytes_in": 100} | more

    def answer(self, request: dict[str, Any], **more: Any) -> dict[str, Any]:
        """The journal's line of a request."""
        line = {"time": request["time"], "model": "cough", "version": request["version"], "id": request["id"]}
        line |= {"sha256": hashlib.sha256(request["id"].encode()).hexdigest(), "status": 200, "score": 0.2}
        return line | {"choice": "no", "threshold": 0.5, "truncated": False, "seconds": 0.1} | more

    def write(self, requests: list[dict[str, Any]], answers: list[dict[str, Any]]) -> None:
        with self.access.open("a") as file:
            file.writelines(json.dumps(each) + "\n" for each in requests)
        for version in ("1.0", "2.0"):
            with self.journal(version).open("a") as file:
                file.writelines(json.dumps(each) + "\n" for each in answers if each["version"] == version)

    def traffic(
        self,
        n: int,
        baseline: Behaviour = Behaviour(),
        candidate: Behaviour = Behaviour(),
        share: float = 0.5,
        seed: int = 0,
        start: float = START,
        shadow: bool = False,
        flips: float = 0.0,
    ) -> float:
        """n requests, one a second, of as many clients; with `shadow`, each copied. Returns the time after the last."""
        rng = np.random.default_rng(seed)
        requests, answers = [], []
        for number in range(n):
            time = start + number
            arm = "baseline" if shadow or rng.random() >= share else "candidate"
            how = candidate if arm == "candidate" else baseline
            sent, answer = self._one(rng, arm, how, time)
            requests.append(sent)
            answers += [answer] if answer else []
            if not shadow:
                continue
            copy, copied = self._one(rng, "shadow", candidate, time + 0.01)
            requests.append(copy | {"id": sent["id"], "client": sent["client"]})
            if answer and copied:
                kept = {key: answer[key] for key in ("id", "sha256", "choice", "score")}
                if rng.random() < flips:
                    kept |= {"choice": "yes" if answer["choice"] == "no" else "no", "score": 1 - answer["score"]}
                answers.append(copied | kept)
        self.write(requests, answers)
        return start + n

    def _one(
        self, rng: np.random.Generator, arm: str, how: Behaviour, time: float
    ) -> tuple[dict[str, Any], dict[str, Any] | None]:
        failed, refused = rng.random() < how.errors, rng.random() < how.refused
        seconds = how.seconds * float(rng.lognormal(0, 0.3))
        sent = self.request(arm, time, status=502 if failed else 415 if refused else 200, upstream_s=seconds)
        if failed:
            return sent, None
        if refused:
            return sent, self.answer(sent, status=415, score=None, choice=None, truncated=None)
        positive = rng.random() < how.positive
        score = float(rng.uniform(0.5, 1) if positive else rng.uniform(0, 0.5))
        return sent, self.answer(sent, score=score, choice="yes" if positive else "no")


@pytest.fixture
def logs(tmp_path: Path) -> Logs:
    return Logs(tmp_path)


def gathered(logs: Logs, since: float = 0.0) -> Evidence:
    return Evidence.gather(logs.folder, "cough", "1.0", "2.0", since)


def test_what_is_not_of_this_rollout_is_left_out(logs: Logs):
    ours = [logs.request("baseline", START), logs.request("candidate", START + 1)]
    others = [
        logs.request("baseline", START - 1),
        logs.request("explicit", START, version="2.0"),
        logs.request("baseline", START, version="0.9"),
        logs.request("candidate", START, model="orca"),
    ]
    logs.write([*ours, *others], [logs.answer(each) for each in (*ours, *others) if each["model"] == "cough"])
    evidence = gathered(logs, START - 0.5)
    assert [each.id for each in evidence.sent] == ["r1", "r2"]
    assert [[each.id for each in evidence.answered[arm]] for arm in ("baseline", "candidate", "shadow")] == [
        ["r1"],
        ["r2"],
        [],
    ]
    assert evidence.unreadable == 0 and evidence.source == "gateway" and evidence.classes == ("no",)


def test_lines_that_are_cut_or_damaged_are_told_from_those_that_are_being_written(logs: Logs):
    requests = [logs.request("baseline", START + n) for n in range(4)]
    logs.write(requests, [logs.answer(each) for each in requests])
    whole = logs.access.read_text()
    lines = whole.splitlines(keepends=True)
    # A line cut by a full disk, another kind of value, and a last one that nginx has not finished.
    logs.access.write_text(lines[0] + lines[1][:20] + "\n" + "[1, 2]\n" + "\n" + lines[2] + lines[3][:50])
    journal = logs.journal("1.0")
    journal.write_bytes(journal.read_bytes() + b'{"time": "noon"}\n\xff\xfe\n' + b'{"time": 1')
    evidence = gathered(logs)
    assert [each.id for each in evidence.sent] == ["r1", "r3"]
    assert [each.id for each in evidence.answered["baseline"]] == ["r1", "r3"]
    assert evidence.unreadable == 4


def test_rotated_files_are_read_once(logs: Logs):
    for number, name in enumerate(("access.jsonl.2.gz", "access.jsonl.1", "access.jsonl")):
        text = json.dumps(logs.request("baseline", START - number)) + "\n"
        opened = gzip.open if name.endswith(".gz") else open
        with opened(logs.access.with_name(name), "wt") as file:
            file.write(text)
    # Renamed while the folder is being listed: the same file under two names.
    logs.access.with_name("access.jsonl.3").hardlink_to(logs.access)
    for number, end in enumerate(("", ".1", ".2")):
        answer = logs.answer(logs.request("baseline", START), id=f"r{number + 1}")
        logs.journal("1.0").with_name(f"cough-1.0-77.jsonl{end}").write_text(json.dumps(answer) + "\n")
    evidence = gathered(logs)
    assert sorted(each.id for each in evidence.sent) == ["r1", "r2", "r3"]
    assert [each.time for each in evidence.sent] == sorted(each.time for each in evidence.sent)
    assert sorted(each.id for each in evidence.answered["baseline"]) == ["r1", "r2", "r3"]


def test_a_version_whose_name_begins_like_anothers_is_another(logs: Logs):
    sent = logs.request("baseline", START)
    logs.write([sent], [])
    logs.journal("1.0").with_name("cough-1.0-rc-5.jsonl").write_text(
        json.dumps(logs.answer(sent, version="1.0-rc")) + "\n"
    )
    assert gathered(logs).answered["baseline"] == ()


def test_the_first_file_of_a_client_counts_in_the_arm_that_answered_it(logs: Logs):
    clients = ["a", "b", "a", "a", "b", "c"]
    arms = ["baseline", "candidate", "baseline", "candidate", "candidate", "candidate"]
    requests = [logs.request(arm, START + n, client=c) for n, (c, arm) in enumerate(zip(clients, arms, strict=True))]
    logs.write(requests, [logs.answer(each) for each in requests])
    evidence = gathered(logs)
    assert [(theirs, each.id) for theirs, each in evidence.files("client")] == [
        (False, "r1"),
        (True, "r2"),
        (True, "r6"),
    ]
    assert [each.id for _, each in evidence.files("request")] == ["r1", "r2", "r3", "r4", "r5", "r6"]


def test_over_grpc_files_are_told_by_their_version_and_their_bytes(logs: Logs):
    """They come without an id: two callers send the same bytes, and of one the candidate's copy failed."""
    requests, answers = [], []
    for number, choice in enumerate(("yes", "no")):
        sent = logs.request("baseline", START + number, protocol="grpc", grpc_status=0)
        copy = logs.request("shadow", START + number, protocol="grpc", grpc_status=0, id=sent["id"])
        requests += [sent, copy]
        answers.append(logs.answer(sent, id=None, sha256="same"))
        answers.append(logs.answer(copy, id=None, sha256="same", choice=choice, score=0.9))
    refused = logs.request("baseline", START + 9, protocol="grpc", grpc_status=14)
    later = logs.request("candidate", START + 1000, protocol="grpc", grpc_status=0)
    answers.append(logs.answer(later, id=None, sha256="same", status=500, score=None, choice=None))
    logs.write([*requests, refused, later], answers)
    evidence = gathered(logs)
    assert [(pair.flipped, round(pair.dp or 0, 3)) for pair in evidence.pairs()] == [(True, 0.7), (False, 0.7)]
    assert [each.failed for each in evidence.requests("baseline")] == [False, False, True]
    # TorchServe said OK to what its worker could not do.
    assert [each.failed for each in evidence.requests("candidate")] == [True]
    assert [(ours.failed, copy.failed) for ours, copy in evidence.copies()] == [(False, False)] * 2
    assert len(evidence.answered["candidate"]) == 1 and len(evidence.answered["shadow"]) == 2


def test_an_answer_and_a_refusal_of_the_same_bytes_are_a_flip(logs: Logs):
    sent = logs.request("baseline", START)
    copy = logs.request("shadow", START, id=sent["id"])
    logs.write([sent, copy], [logs.answer(sent), logs.answer(copy, status=415, score=None, choice=None)])
    (pair,) = gathered(logs).pairs()
    assert pair.flipped and pair.dp is None


def test_a_failed_copy_is_a_failed_request_and_no_flip(logs: Logs):
    sent = logs.request("baseline", START)
    copy = logs.request("shadow", START, id=sent["id"])
    logs.write([sent, copy], [logs.answer(sent), logs.answer(copy, status=500, score=None, choice=None)])
    evidence = gathered(logs)
    (pair,) = evidence.pairs()
    assert not pair.flipped and pair.dp is None
    assert [(ours.failed, theirs.failed) for ours, theirs in evidence.copies()] == [(False, True)]


def test_a_file_that_failed_inside_of_a_request_with_several_is_that_requests_failure(logs: Logs):
    sent = logs.request("candidate", START)
    logs.write([sent], [logs.answer(sent), logs.answer(sent, status=500, score=None, choice=None, sha256="x")])
    assert [each.failed for each in gathered(logs).requests("candidate")] == [True]


def test_without_a_gateway_the_journals_are_what_there_is(logs: Logs):
    logs.traffic(40)
    logs.access.unlink()
    evidence = gathered(logs)
    assert evidence.source == "journal"
    assert len(evidence.requests("baseline")) == len(evidence.answered["baseline"]) > 5
    assert "no gateway logged requests" in as_text(judge(evidence, Policy(), progress()))


def test_a_folder_without_logs_has_no_evidence(tmp_path: Path):
    evidence = Evidence.gather(tmp_path, "cough", "1.0", "2.0")
    assert evidence.sent == () and evidence.source == "journal"
    assert judge(evidence, Policy(), progress()).action == "hold"


# --- policies


def policy_of(tmp_path: Path, text: str) -> Policy:
    (tmp_path / "policy.yaml").write_text(text)
    return Policy.read(tmp_path / "policy.yaml")


def test_a_policy_needs_only_what_is_other(tmp_path: Path):
    found = policy_of(tmp_path, "steps: [shadow, 10, 50]\nalpha: 0.01\nmax_dp: null\n")
    assert found == replace(Policy(), steps=("shadow", 10.0, 50.0), alpha=0.01)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: [5]", "unknown parameter stepz; it takes: steps, min_requests"),
        ("steps: [5, shadow]", r"steps is \[5.0, 'shadow'\], expected percentages, with or without one 'shadow'"),
        ("steps: [50, 5]", "expected rising percentages over 0 and up to 100"),
        ("steps: [0]", "expected rising percentages over 0"),
        ("steps: []", r"steps is \[\], expected percentages"),
        ("alpha: 1", "alpha is 1, expected a number between 0 and 1, such as 0.05"),
        ("alpha: '0.1'", "alpha is '0.1', expected a number"),
        ("unit: both", "unit is 'both', expected 'client' or 'request'"),
        ("min_requests: 0", "min_requests is 0 and max_hours 72, expected at least 1 and more than 0"),
        ("max_flips: 10", r"max_flips is 10, expected a number in \[0, 1\]"),
        ("max_error_increase: .nan", "max_error_increase is "),
        ("hold_psi: 0", "hold_psi is 0, expected more than 0, such as 0.25"),
        ("[5]", r"it is \[5\], expected keys and values"),
        ("a: [", "it is not YAML"),
    ],
)
def test_a_wrong_policy_is_refused_with_what_is_wrong(tmp_path: Path, text: str, message: str):
    with pytest.raises(UsageError, match=f"policy.yaml: .*{message}"):
        policy_of(tmp_path, text)


def test_a_policy_that_is_not_there(tmp_path: Path):
    with pytest.raises(UsageError, match=r"there is no policy .*nothing\.yaml"):
        Policy.read(tmp_path / "nothing.yaml")


# --- judgement

LOOSE = Policy(steps=("shadow", 50.0, 100.0), min_requests=200)


def progress(percent: float = 50.0, step: int = 1, hours: float = 1.0) -> Progress:
    return Progress(percent, step, START, START, START + 3600 * hours)


def test_equal_versions_step_and_are_promoted(logs: Logs):
    logs.traffic(1500, seed=4)
    evidence = gathered(logs)
    verdict = judge(evidence, LOOSE, progress())
    assert verdict.action == "step", verdict.reasons
    assert verdict.reasons[0] == "there are enough requests, and no comparison is beyond what is tolerated"
    assert [each.name for each in verdict.comparisons] == [
        "failed requests",
        "refused files",
        "slow requests",
        "files decided yes",
    ]
    assert judge(evidence, LOOSE, progress(percent=100, step=2)).action == "promote"
    assert all(each.interval.low < 0 < each.interval.high for each in verdict.comparisons)


def test_a_step_waits_for_its_own_requests(logs: Logs):
    before = logs.traffic(1000)
    logs.traffic(150, start=before, seed=1)
    at = replace(progress(), step_started=before)
    verdict = judge(gathered(logs), LOOSE, at)
    assert verdict.action == "hold"
    assert (
        verdict.reasons[0]
        == f"the candidate has answered {sum(1 for e in gathered(logs).after(before).sent if e.arm == 'candidate')} of the 200 requests that this step takes"
    )
    assert len(verdict.reasons) == 2, "the baseline has too few, too"
    # The comparisons go on with all of the split.
    assert sum(each.candidate.n for each in verdict.comparisons[:1]) > 400
    everybody = judge(gathered(logs), LOOSE, replace(at, percent=100.0, step=2))
    assert len(everybody.reasons) == 1 and everybody.action == "hold"


def test_a_step_that_takes_too_long_ends_the_rollout(logs: Logs):
    logs.traffic(20)
    verdict = judge(gathered(logs), LOOSE, progress(hours=73))
    assert verdict.action == "abort"
    assert verdict.reasons[0] == "the step has taken 73.0 hours, and at most 72 are allowed"
    assert "of the 200 requests that this step takes" in verdict.reasons[1]


@pytest.mark.parametrize(
    ("worse", "name"),
    [
        (Behaviour(errors=0.06), "failed requests"),
        (Behaviour(seconds=0.16), "slow requests"),
        (Behaviour(positive=0.6), "files decided yes"),
        (Behaviour(positive=0.05), "files decided yes"),
        (Behaviour(refused=0.12), "refused files"),
        # Better in what many look at, and another decision rate.
        (Behaviour(seconds=0.05, errors=0.0, positive=0.6), "files decided yes"),
    ],
)
def test_a_candidate_that_is_worse_is_aborted_and_told_why(logs: Logs, worse: Behaviour, name: str):
    logs.traffic(1500, candidate=worse, seed=6)
    verdict = judge(gathered(logs), LOOSE, progress())
    assert verdict.action == "abort"
    (reason,) = verdict.reasons
    assert reason.startswith(f"beyond what is tolerated: {name}: ")
    (found,) = (each for each in verdict.comparisons if each.state == "beyond")
    assert found.name == name
    for count in (found.baseline, found.candidate):
        assert f"{count.s / count.n:.2%} of {count.n:,}" in reason
    assert f"from {found.interval.low:+.2%} to {found.interval.high:+.2%}" in reason


def test_worse_by_less_than_is_tolerated_goes_on(logs: Logs):
    logs.traffic(3000, candidate=Behaviour(positive=0.45), seed=6)
    assert judge(gathered(logs), LOOSE, progress()).action == "abort"
    tolerant = replace(LOOSE, max_decision_change=0.2)
    assert judge(gathered(logs), tolerant, progress()).action == "step"


def test_fewer_failures_and_faster_answers_are_never_held_against_a_candidate(logs: Logs):
    logs.traffic(1500, baseline=Behaviour(errors=0.1, seconds=0.3), candidate=Behaviour(errors=0, seconds=0.05))
    assert judge(gathered(logs), LOOSE, progress()).action == "step"


def test_within_tolerance_takes_more_than_nothing_wrong(logs: Logs):
    strict = replace(LOOSE, step_when="within_tolerance", max_decision_change=0.12, max_error_increase=0.02)
    end = logs.traffic(600, seed=4)
    verdict = judge(gathered(logs), strict, progress())
    assert verdict.action == "hold" and "not yet shown to be within what is tolerated: " in verdict.reasons[0]
    assert judge(gathered(logs), replace(strict, step_when="nothing_wrong"), progress()).action == "step"
    logs.traffic(7000, seed=5, start=end)
    verdict = judge(gathered(logs), strict, progress())
    assert verdict.action == "step" and verdict.reasons[0] == "every comparison is within what is tolerated"


def test_the_shadow_is_judged_by_the_same_bytes(logs: Logs):
    logs.traffic(700, shadow=True, flips=0.01)
    at = progress(percent=0, step=0)
    good = judge(gathered(logs), LOOSE, at)
    assert good.action == "step", good.reasons
    assert [each.name for each in good.comparisons] == ["files answered otherwise", "failed requests", "slow requests"]
    assert good.largest_dp is not None and good.largest_dp > 0.01
    bounded = judge(gathered(logs), replace(LOOSE, max_dp=0.01), at)
    assert bounded.action == "abort"
    assert bounded.reasons == [
        f"the probability of a shadowed file moved by {good.largest_dp:.4g}, and at most 0.01 is tolerated"
    ]


@pytest.mark.parametrize(
    ("worse", "flips", "name"),
    [
        (Behaviour(), 0.3, "files answered otherwise"),
        (Behaviour(errors=0.08), 0.0, "failed requests"),
        (Behaviour(seconds=0.2), 0.0, "slow requests"),
    ],
)
def test_a_worse_candidate_does_not_leave_the_shadow(logs: Logs, worse: Behaviour, flips: float, name: str):
    logs.traffic(1200, candidate=worse, flips=flips, shadow=True)
    verdict = judge(gathered(logs), LOOSE, progress(percent=0, step=0))
    assert verdict.action == "abort" and verdict.reasons[0].startswith(f"beyond what is tolerated: {name}: ")


def test_the_split_is_judged_without_the_shadows_answers(logs: Logs):
    """In the shadow the candidate failed often, which was mended; and it is another experiment."""
    split = logs.traffic(600, candidate=Behaviour(errors=0.5), shadow=True)
    logs.traffic(1200, start=split, seed=3)
    at = replace(progress(), phase_started=split, step_started=split)
    verdict = judge(gathered(logs), LOOSE, at)
    assert verdict.action == "step"
    counted = verdict.comparisons[0]
    assert counted.candidate.n + counted.baseline.n == 1200


def test_a_large_drift_holds_where_the_policy_says_so(logs: Logs):
    logs.traffic(1500, candidate=Behaviour(positive=0.6))
    tolerant = replace(LOOSE, max_decision_change=1.0)
    assert judge(gathered(logs), tolerant, progress()).action == "step"
    verdict = judge(gathered(logs), replace(tolerant, hold_psi=0.1), progress())
    assert verdict.action == "hold"
    assert (
        "the population stability index of the candidate's probabilities against the baseline's is 0."
        in verdict.reasons[0]
    )


def test_slow_is_what_the_baselines_first_requests_say(logs: Logs):
    """Later requests are all slower, of both versions: that is nobody's fault."""
    even = Behaviour(seconds=0.1)
    end = logs.traffic(2 * LATENCY_BASIS, even, even)
    slow = Behaviour(seconds=0.3)
    logs.traffic(1200, slow, slow, start=end, seed=2)
    verdict = judge(gathered(logs), replace(LOOSE, min_requests=400), progress())
    (found,) = (each for each in verdict.comparisons if each.name == "slow requests")
    # The first ones of the baseline say what slow is, and what came meanwhile is left out with them.
    seen = gathered(logs).requests("baseline")
    assert found.baseline.n == len(seen) - LATENCY_BASIS
    assert found.candidate.s > 400 and found.baseline.s > 400 and found.state != "beyond"


def test_two_classes_take_one_comparison_and_three_take_three(logs: Logs):
    requests = [logs.request(("baseline", "candidate")[n % 2], START + n) for n in range(90)]
    choices = ["a", "b", "c"]
    logs.write(requests, [logs.answer(each, choice=choices[n // 2 % 3]) for n, each in enumerate(requests)])
    verdict = judge(gathered(logs), LOOSE, progress())
    assert [each.name for each in verdict.comparisons[3:]] == [f"files decided {name}" for name in choices]
    # alpha is shared by these three, three others of the split, three of the shadow, and one of the last step.
    assert [each.alpha for each in verdict.comparisons] == pytest.approx([0.05 / 10] * 6)
    without = judge(gathered(logs), replace(LOOSE, steps=(50.0,)), progress())
    assert [each.alpha for each in without.comparisons] == pytest.approx([0.05 / 6] * 6)


def test_clients_that_send_much_count_once_unless_the_policy_says_otherwise(logs: Logs):
    """One caller of the candidate sends the same positive file again and again: that is no decision rate."""
    arms = ("baseline", "candidate")
    requests = [logs.request(arms[n % 2], START + n) for n in range(60)]
    requests += [logs.request(arms[n % 2], START + n, **({"client": "often"} if n % 2 else {})) for n in range(60, 460)]
    choices = ["yes" if n >= 60 and n % 2 else ("yes", "no")[n // 2 % 2] for n in range(460)]
    logs.write(requests, [logs.answer(each, choice=choice) for each, choice in zip(requests, choices, strict=True)])
    lenient = replace(LOOSE, max_decision_change=0.1, min_requests=10)
    (clients,) = (c for c in judge(gathered(logs), lenient, progress()).comparisons if c.name == "files decided yes")
    assert (clients.baseline, clients.candidate) == (Count(230, 115), Count(31, 16))
    verdict = judge(gathered(logs), replace(lenient, unit="request"), progress())
    assert verdict.action == "abort" and "files decided yes" in verdict.reasons[0]


def test_with_everybody_at_the_candidate_its_failures_still_count(logs: Logs):
    end = logs.traffic(1000)
    logs.traffic(300, candidate=Behaviour(errors=0.3), share=1.0, start=end)
    at = replace(progress(percent=100, step=2), step_started=end)
    verdict = judge(gathered(logs), LOOSE, at)
    assert verdict.action == "abort"
    (reason,) = verdict.reasons
    assert "failed requests of everybody" in reason
    logs.access.write_text("")
    end = logs.traffic(1000, start=START)
    logs.traffic(300, share=1.0, start=end)
    assert judge(gathered(logs), LOOSE, at).action == "promote"


def test_a_whole_verdict_is_plain_data_and_text(logs: Logs):
    logs.traffic(900, shadow=True, flips=0.02)
    verdict = judge(gathered(logs), LOOSE, progress(percent=0, step=0))
    assert json.loads(json.dumps(asdict(verdict), allow_nan=False))["action"] == "step"
    text = as_text(verdict)
    assert text.startswith("step: there are enough requests")
    for part in (
        "files answered otherwise",
        "baseline: p50 0.",
        "shadow: p50",
        "largest change",
        "stability index 0.0",
    ):
        assert part in text


@dataclass(frozen=True)
class Entry:
    time: str
    percent: float


@dataclass(frozen=True)
class Rollout:
    """As skewless.rollout.state has it."""

    model: str
    baseline: str
    candidate: str
    percent: float
    step: int
    started: str
    policy: str | None
    history: tuple[Entry, ...]


def iso(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).isoformat(timespec="milliseconds")


def test_a_rollouts_state_says_what_is_judged(logs: Logs, tmp_path: Path):
    split = logs.traffic(600, candidate=Behaviour(errors=0.5), shadow=True)
    step = logs.traffic(300, start=split, seed=3)
    logs.traffic(500, start=step, seed=4)
    (tmp_path / "policy.yaml").write_text("{steps: [shadow, 10, 50], min_requests: 200}")
    history = (Entry(iso(START), 0.0), Entry(iso(split), 10.0), Entry(iso(step), 50.0))
    rollout = Rollout("cough", "1.0", "2.0", 50.0, 2, iso(START), str(tmp_path / "policy.yaml"), history)
    now = step + 600
    assert Progress.of(rollout, now) == Progress(50.0, 2, split, step, now)
    assert assess(logs.folder, rollout, now).action == "promote"
    shadow = replace(rollout, percent=0.0, step=0, history=history[:1])
    assert Progress.of(shadow, now) == Progress(0.0, 0, START, START, now)
    assert assess(logs.folder, shadow, now).action == "abort"
    wrong = replace(rollout, policy=str(tmp_path / "missing.yaml"))
    with pytest.raises(UsageError, match="there is no policy"):
        assess(logs.folder, wrong)


# --- labels that come later


def write_labels(folder: Path, text: str) -> Path:
    path = folder / "labels.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_area_under_the_curve_is_another_librarys_and_its_interval_holds():
    rng = np.random.default_rng(4)
    true = 0.760  # of scores that are normal and one apart: Phi(1 / sqrt(2))
    inside = []
    for _ in range(300):
        truth = rng.random(150) < 0.4
        # Rounded, so that some are equal.
        scores = np.round(rng.standard_normal(150) + truth, 1)
        area, (low, high) = labelling.auc_interval(truth.astype(int), scores)
        assert area == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
        inside.append(low <= true <= high)
    assert 0.9 < np.mean(inside) < 0.99
    assert labelling.auc_interval(np.array([1, 0, 0]), np.array([0.3, 0.5, 0.1])) == (0.5, (0, 1))


def test_labels_are_joined_by_the_requests_id(logs: Logs):
    logs.traffic(400, candidate=Behaviour(positive=0.5), seed=3)
    evidence = gathered(logs)
    answers = [each for arm in evidence.answered.values() for each in arm if each.score is not None]
    # The candidate is always right, the baseline in six of seven.
    other = {"yes": "no", "no": "yes"}
    wrong = {each.id for each in answers if each.version == "1.0" and int(each.id[1:]) % 7 == 0}
    rows = [f"{each.id},{other[each.choice] if each.id in wrong else each.choice}" for each in answers]
    path = write_labels(logs.folder, "\n".join(["request_id,label", *rows, "nobody,yes", "no-one,0"]))
    labels = by_labels(evidence, path)
    ours, theirs = labels.arms
    assert (ours.arm, theirs.arm, ours.files + theirs.files) == ("baseline", "candidate", len(answers))
    assert theirs.accuracy == theirs.auc == 1.0 and 0.5 < ours.accuracy < 1
    assert ours.accuracy_interval.low < ours.accuracy < ours.accuracy_interval.high
    assert ours.auc_interval.low < ours.auc < ours.auc_interval.high
    assert labels.unknown == ("nobody", "no-one")
    text = labelling.as_text(labels)
    assert "2 labels are of no file that an arm answered: nobody, no-one" in text
    assert f"candidate (2.0): {theirs.files} labelled files, accuracy 1.0000" in text


def test_labels_are_joined_by_bytes(logs: Logs):
    upload = b"an upload"
    (logs.folder / "upload.wav").write_bytes(upload)
    digest = hashlib.sha256(upload).hexdigest()
    requests = [logs.request(arm, START + n) for n, arm in enumerate(("baseline", "candidate", "baseline"))]
    answers = [logs.answer(each, sha256=digest if n < 2 else "other") for n, each in enumerate(requests)]
    logs.write(requests, [*answers, logs.answer(requests[0], sha256=digest)])
    for text in ("file,label\nupload.wav,no", f"sha256,label\n{digest},0", f"\ufefflabel,sha256\nno,{digest}\nyes,f00"):
        labels = by_labels(replace(gathered(logs), classes=("no", "yes")), write_labels(logs.folder, text))
        assert [(each.files, each.accuracy, each.auc) for each in labels.arms] == [(1, 1.0, None)] * 2
    assert labels.unknown == ("f00",)


def test_a_label_of_a_request_with_several_files_is_of_none(logs: Logs):
    sent = logs.request("candidate", START)
    logs.write([sent], [logs.answer(sent, sha256="a"), logs.answer(sent, sha256="b")])
    labels = by_labels(gathered(logs), write_labels(logs.folder, "request_id,label\nr1,no"))
    assert labels.ambiguous == ("r1",) and labels.unknown == () and labels.arms[0].files == 0
    assert "use sha256: r1" in labelling.as_text(labels)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,label\nr1,yes", r"has the columns id, label; expected label and one of request_id, sha256, file"),
        ("request_id,sha256,label\nr1,a,yes", "expected label and one of"),
        ("", "has the columns none"),
        ("request_id,label\n", "has no rows"),
        ("request_id,label\nr1,maybe", "line 2: label is 'maybe', expected one of no, yes, or its number from 0"),
        ("request_id,label\nr1,2", "line 2: label is '2', expected one of"),
        ("request_id,label\nr1", "line 2: label is None, expected one of"),
        ("request_id,label\n,yes", "line 2: request_id is empty"),
        ("request_id,label\nr1,yes\nr1,no", "line 3: r1 has another label above; give each file one"),
        ("file,label\nmissing.wav,yes", "line 2: missing.wav cannot be read: No such file"),
    ],
)
def test_wrong_labels_are_refused_with_their_line(tmp_path: Path, text: str, message: str):
    with pytest.raises(UsageError, match=message):
        read_labels(write_labels(tmp_path, text), ("no", "yes"))


def test_labels_that_are_no_text(tmp_path: Path):
    (tmp_path / "labels.csv").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "labels.csv", tmp_path / "missing.csv", tmp_path):
        with pytest.raises(UsageError, match=str(path)):
            read_labels(path, ("no", "yes"))


# --- why shadowed files are answered otherwise


def altered(archive: Path, store: Path, version: str, edit: tuple[str, str] = ("", "")) -> Path:
    """The archive as another version, with something else in its pipeline.yaml."""
    target = store / f"tiny-{version}.mar"
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(target, "w") as copy:
        for info in source.infolist():
            data = source.read(info)
            if info.filename == "MAR-INF/MANIFEST.json":
                manifest = json.loads(data)
                manifest["model"]["modelVersion"] = version
                data = json.dumps(manifest).encode()
            if info.filename == "pipeline.yaml" and edit[0]:
                assert data.count(edit[0].encode()) == 1
                data = data.replace(*(each.encode() for each in edit))
            copy.writestr(info, data)
    return target


@pytest.mark.chain
def test_the_worst_files_name_the_first_stage_that_differs(
    tiny_model: TinyModel,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    definition, store = tiny_model.definition, tmp_path / "store"
    recordings = read_manifest(tiny_model.manifest, tiny_model.manifest.parent, definition.classes)
    checkpoint, device = load_checkpoint(tiny_model.checkpoint), torch.device("cpu")
    evaluate(definition, checkpoint, tiny_model.checkpoint, recordings, "test", tmp_path / "test", device, references=3)
    built = build_archive(tiny_model.archive, tiny_model.checkpoint, tmp_path / "test", "1.0", store).path
    altered(built, store, "2.0", ("f_max: 4000.0", "f_max: 3000.0"))
    altered(built, store, "3.0")
    altered(built, store, "4.0", ("size: 224", "size: 112"))
    logs = Logs(tmp_path / "state")
    (logs.folder / "state.json").write_text(json.dumps({"model_store": str(store)}))
    kept = logs.folder / "journal" / "kept"
    kept.mkdir()
    for version in ("2.0", "3.0", "4.0"):
        requests, answers = [], []
        for number, moved in enumerate((0.1, 0.4, 0.3, 0.0)):
            upload = recording(1, number)
            digest = hashlib.sha256(upload).hexdigest()
            if number != 2:  # of which the bytes were not kept
                (kept / digest).write_bytes(upload)
            sent = logs.request("baseline", START + number, model="tiny")
            copy = logs.request("shadow", START + number, id=sent["id"], version=version, model="tiny")
            requests += [sent, copy]
            answers.append(logs.answer(sent, sha256=digest, model="tiny", score=0.2))
            answers.append(logs.answer(copy, sha256=digest, model="tiny", score=0.2 + moved))
        logs.access.write_text("".join(json.dumps(each) + "\n" for each in requests))
        for each in ("1.0", version):
            lines = [json.dumps(answer) + "\n" for answer in answers if answer["version"] == each]
            (logs.folder / "journal" / f"tiny-{each}-7.jsonl").write_text("".join(lines))
        evidence = Evidence.gather(logs.folder, "tiny", "1.0", version)
        assert evidence.classes == ("tone", "noise") and set(evidence.histograms) == {"1.0", version}
        worst = explain(evidence)
        assert [round(each.candidate - each.baseline, 6) for each in worst] == [0.4, 0.1]
        if version == "2.0":
            assert [each.stage for each in worst] == ["mel", "mel"]
            assert worst[0].definition == "f_max 4000.0 → 3000.0" and worst[0].largest > 0 and worst[0].preprocessing
            assert f"{worst[0].sha256[:12]}: 0.2000 to 0.6000; first differs at 'mel' (" in str(worst[0])
        elif version == "4.0":
            assert [each.stage for each in worst] == ["letterbox", "letterbox"]
            assert worst[0].preprocessing and "size 224 → 112" in str(worst[0])
            with monkeypatch.context() as patch:
                # This network takes pictures of every size; one that was made a graph of for 224 does not.
                patch.setattr(Comparator, "_score", Mock(side_effect=PipelineError("the network cannot take it")))
                worst = explain(evidence)
            assert [(each.stage, each.preprocessing) for each in worst] == [("letterbox", None)] * 2
            assert "(size 224 → 112)" in str(worst[0]) and str(worst[0]).endswith(
                "; the baseline's network cannot take what the candidate's pipeline gives"
            )
        else:
            assert [(each.stage, each.preprocessing) for each in worst] == [(NETWORK, 0.0)] * 2
            assert "both networks take the same input" in str(worst[0])
        assert len(explain(evidence, count=1)) == 1
    (store / "tiny-4.0.mar").unlink()
    with pytest.raises(UsageError, match=r"the archive of tiny 4\.0 is not in the model store any more; put it back"):
        explain(evidence)
    for path in kept.iterdir():
        path.unlink()
    assert explain(evidence) == []


def test_a_network_that_computes_stages_itself_takes_the_candidates_stages_before_them():
    baseline = Definition.read(resources.ARCHIVES / "cough")
    assert [stage.name for stage in baseline.absorbed] == ["replicate", "standardize"]
    written = baseline.pipeline.to_dict()
    skewed = Pipeline.from_dict(
        written | {"stages": [each for each in written["stages"] if "peak_normalize" not in each]}
    )
    assert list(prepared_for(baseline, skewed).stages) == [
        name for name in baseline.prepared.stages if name != "peak_normalize"
    ]
    other_end = Pipeline.from_dict(written | {"stages": written["stages"][:-1]})
    with pytest.raises(
        UsageError, match=r"itself \(replicate, standardize\), and the candidate ends with others \(cast"
    ):
        prepared_for(baseline, other_end)


# --- on the command line


def test_labels_and_explanations_have_commands(logs: Logs):
    logs.traffic(60, shadow=True)
    history = [{"time": iso(START), "action": "start", "percent": 0.0, "why": "asked for"}]
    state = {"model": "cough", "baseline": "1.0", "candidate": "2.0", "percent": 0.0, "shadow": True, "phase": "shadow"}
    state |= {"step": 0, "started": iso(START), "policy": None, "history": history, "pending": None}
    (logs.folder / "rollouts").mkdir()
    (logs.folder / "rollouts" / "cough.json").write_text(json.dumps(state))
    path = write_labels(logs.folder, "request_id,label\nr1,yes\nr3,no\nx,no")
    done = call_skewless("rollout", "label", "cough", path, "--state-dir", logs.folder)
    assert done.returncode == 0 and "baseline (1.0): 2 labelled files" in done.stdout, done.stderr
    assert "1 labels are of no file that an arm answered: x" in done.stdout
    done = call_skewless("rollout", "explain", "cough", "--state-dir", logs.folder)
    assert (done.returncode, done.stdout.strip()) == (0, "no file that was kept got another probability")
    for command in (("label", "orca", path), ("explain", "orca"), ("label", "cough", logs.folder / "none.csv")):
        done = call_skewless("rollout", *command, "--state-dir", logs.folder)
        assert done.returncode == 2 and (
            "orca has had no rollout" in done.stderr or "none.csv cannot be read" in done.stderr
        )


def test_an_abort_in_the_shadow_says_what_could_be_found_out(
    logs: Logs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    logs.traffic(600, shadow=True, flips=0.4)
    rollout = Rollout("cough", "1.0", "2.0", 0.0, 0, iso(START), None, (Entry(iso(START), 0.0),))
    assert len(assess(logs.folder, rollout, START + 900).reasons) == 1, "nothing was kept"
    monkeypatch.setattr("skewless.rollout.shadow.explain", lambda evidence, count: ["the first", "the second"])
    verdict = assess(logs.folder, rollout, START + 900)
    assert verdict.action == "abort" and verdict.reasons[1:] == ["the first", "the second"]

    def fails(evidence: Evidence, count: int) -> None:
        raise RuntimeError("the archive's code is broken")

    monkeypatch.setattr("skewless.rollout.shadow.explain", fails)
    verdict = assess(logs.folder, rollout, START + 900)
    assert verdict.action == "abort"
    assert verdict.reasons[1:] == ["why the answers differ could not be found: the archive's code is broken"]
