"""The benchmark of rollouts: what it says of callers that were not answered, and of a split that is not as asked for."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from benchmarks.rollout.__main__ import Ended, _report
from benchmarks.rollout.candidates import CANDIDATES, NAME, _write_definition
from benchmarks.rollout.traffic import Asked
from skewless import resources
from skewless.core.definition import Definition

START = 1_800_000_000.0


def at(seconds: float) -> str:
    return datetime.fromtimestamp(START + seconds, UTC).isoformat()


STEPS = [
    {"percent": 0.0, "action": "start", "time": at(0)},
    {"percent": 50.0, "action": "step", "time": at(100)},
    {"percent": 100.0, "action": "step", "time": at(200)},
    {"percent": 100.0, "action": "promote", "time": at(300)},
]
PROMOTED = Ended("2.0", "as good", "promoted", "promoted", "enough", True, 300.0, 400, STEPS)


def asked(number: int, seconds: float, version: str, protocol: str = "rest", status: int = 200) -> Asked:
    arm = "candidate" if version == "2.0" else "baseline"
    return Asked(START + seconds, f"client-{number}", protocol, status, arm, version, version, 0.1, "")


# Of 100 clients 50 with each version, each asking by REST and by gRPC.
HALVED = [
    asked(number, 110 + number / 2, "2.0" if number < 50 else "1.0", protocol)
    for number in range(100)
    for protocol in ("rest", "grpc")
]


def test_a_rollout_as_it_should_be_has_no_problem():
    report = _report([PROMOTED], HALVED)
    assert report["data"]["problems"] == [] and "PROBLEM" not in report["text"]
    (split,) = report["data"]["splits"]
    assert (split["clients"], split["share"], split["torn"], split["apart"]) == (100, 0.5, 0, 0)
    assert "200 requests (100 grpc, 100 rest)" in report["text"] and ": 0 failed." in report["text"]


@pytest.mark.parametrize(
    ("ended", "sent", "problem"),
    [
        (PROMOTED, [*HALVED, asked(3, 150, "2.0", status=503)], "rest 503: "),
        (PROMOTED, [*HALVED, replace(asked(3, 150, "2.0"), said="1.0")], "the gateway said 1.0, 2.0 answered"),
        (PROMOTED, [*HALVED, asked(3, 150, "1.0")], "a split is not as asked for: "),
        (PROMOTED, [each for each in HALVED if each.version == "1.0"], "a split is not as asked for: "),
        (PROMOTED, [], "a split is not as asked for: "),
        (replace(PROMOTED, phase="aborted", as_expected=False), HALVED, "2.0 was aborted: enough"),
    ],
    ids=["failed", "another version", "two versions", "not half", "nobody", "ended otherwise"],
)
def test_a_problem_is_told(ended: Ended, sent: list[Asked], problem: str):
    (found,) = _report([ended], sent)["data"]["problems"]
    assert found.startswith(problem)


def test_a_client_may_change_where_the_split_changes():
    changed = [asked(70, 100.5, "1.0"), asked(70, 199.5, "2.0"), asked(70, 250, "2.0")]
    assert _report([PROMOTED], [*HALVED, *changed])["data"]["problems"] == []


def test_candidates_differ_in_what_they_say(tmp_path: Path):
    ours = Definition.read(resources.ARCHIVES / NAME)
    for candidate in CANDIDATES:
        folder = tmp_path / candidate.version / NAME
        _write_definition(candidate, folder)
        theirs = Definition.read(folder)
        assert bool(ours.pipeline.diff(theirs.pipeline)) == bool(candidate.pipeline)
        assert (ours.limits, ours.runtime, ours.precision) != (
            theirs.limits,
            theirs.runtime,
            theirs.precision,
        ) or candidate.pipeline
