"""Post-processing of windows: each rule of the orca systems against a second statement of it, at its thresholds, and by hand."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from skewless.core.errors import DefinitionError
from skewless.core.postprocess import Part, Postprocessor, build_postprocessor

CASES = 400
NAMES = {"positive_field": "orcaDetected", "classes": ["other", "call"]}
RULES: dict[str, dict[str, Any]] = {
    "seconds_vote": {"threshold": 0.5, "min_positive_s": 3},
    "windows_vote": {"threshold": 0.5, "min_positive_windows": 3},
    "top_windows_mean": {"threshold": 0.6, "top": 2, "window_threshold": 0.5},
    "positive_windows_mean": {"threshold": 0.6, "window_threshold": 0.5},
}


def rule(name: str, **changes: Any) -> Postprocessor:
    return build_postprocessor({name: {**RULES[name], **NAMES, **changes}})


def outputs(windows: Any) -> dict[str, torch.Tensor]:
    """A network's, with these probabilities of a call; none for no window, as a runtime gives them."""
    calls = torch.tensor(windows, dtype=torch.float32)
    return {"class_probabilities": torch.stack([1 - calls, calls], dim=1)} if len(calls) else {}


def metadata(windows: int) -> dict[str, Any]:
    times = [(float(k), k + 2.0) for k in range(windows)]
    return {"segment_times_s": times, "duration_s": windows + 1.5, "analyzed_s": windows + 1.0, "truncated": False}


def answer(of: Postprocessor, windows: Any, threshold: float | None = None) -> dict[str, Any]:
    return of(outputs(windows), metadata(len(windows)), of.threshold if threshold is None else threshold)


def recordings(seed: int, fewest: int) -> list[np.ndarray]:
    """Windows' probabilities of some recordings, most of them near 0 or 1, in runs as calls come: float32, as a network's."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(CASES):
        calling = np.repeat(rng.random(20) < rng.uniform(0, 0.5), rng.integers(1, 4, 20))[: rng.integers(fewest, 31)]
        found.append(np.where(calling, rng.beta(3, 1, len(calling)), rng.beta(1, 6, len(calling))).astype(np.float32))
    return found


@dataclass(frozen=True)
class Told:
    """What a system says of a recording."""

    positive: bool
    confidence: float
    pieces: list[float]


def production(windows: np.ndarray) -> Told:
    """The means of two neighbouring windows, the first and the last window beside them; three above 0.5, and their mean in
    percent."""
    series = pd.Series(windows.astype(float))
    seconds = pd.concat([series.rolling(2).mean().fillna(series.iloc[0]), series.tail(1)], ignore_index=True)
    above = seconds[seconds > 0.5]
    return Told(len(above) >= 3, 0.0 if above.empty else above.mean() * 100, seconds.tolist())


def first_port(windows: np.ndarray) -> Told:
    """Three windows above 0.5, and their mean in percent."""
    above = windows[windows > 0.5].astype(float)
    return Told(above.size >= 3, float(above.mean()) * 100 if above.size else 0.0, windows.tolist())


def top_two(windows: np.ndarray) -> Told:
    """The mean of the two highest windows, from 0.6 on; nothing of no window."""
    if not len(windows):
        return Told(False, 0.0, [])
    mean = float(np.partition(windows, len(windows) - min(2, len(windows)))[-2:].astype(float).mean())
    return Told(mean >= 0.6, mean, windows.tolist())


def mean_of_positive(windows: np.ndarray) -> Told:
    """The mean of the windows above 0.5, from 0.6 on; nothing of no window."""
    above = windows[windows > 0.5].astype(float)
    mean = float(above.mean()) if above.size else 0.0
    return Told(len(windows) > 0 and mean >= 0.6, mean, windows.tolist())


SYSTEMS: dict[str, tuple[Callable[[np.ndarray], Told], int]] = {
    # Of no window, production has no answer to compare with.
    "seconds_vote": (production, 1),
    "windows_vote": (first_port, 0),
    "top_windows_mean": (top_two, 0),
    "positive_windows_mean": (mean_of_positive, 0),
}


@pytest.mark.parametrize("name", RULES)
def test_each_rule_says_what_its_system_says(name):
    """Decision, confidence and pieces of 400 random recordings. Sums are in another order: 1e-12 of a percent apart at most."""
    system, fewest = SYSTEMS[name]
    ours, seen = rule(name), Counter()
    for windows in recordings(7, fewest):
        told, body = system(windows), answer(ours, windows)
        (score,) = ours.scores(outputs(windows))
        assert body["orcaDetected"] is bool(told.positive)
        assert body["global_confidence"] == pytest.approx(told.confidence, abs=1e-11)
        pieces = body["seconds" if name == "seconds_vote" else "windows"]
        assert [piece["confidence"] for piece in pieces] == pytest.approx(told.pieces, abs=1e-12)
        assert [piece["positive"] for piece in pieces] == [confidence > 0.5 for confidence in told.pieces]
        assert [tuple(part) for part in ours.parts(outputs(windows), metadata(len(windows)))] == [
            (piece["start_s"], piece["end_s"], piece["confidence"]) for piece in pieces
        ]
        assert ours.read(body) == ((score,), int(told.positive))
        assert ours.choose((score,), ours.threshold) == told.positive
        json.dumps(body, allow_nan=False)
        seen[told.positive] += 1
    assert min(seen[True], seen[False]) > 50


def test_the_rules_decide_differently():
    """So the comparison above tells them apart: how many of 400 recordings each decides otherwise than production."""
    found = recordings(7, 1)
    decided = {name: [answer(rule(name), windows)["orcaDetected"] for windows in found] for name in RULES}
    differ = {
        name: sum(a != b for a, b in zip(decided[name], decided["seconds_vote"], strict=True))
        for name in RULES
        if name != "seconds_vote"
    }
    assert min(differ.values()) > 5
    assert decided["top_windows_mean"] != decided["positive_windows_mean"]


# Thresholds

EIGHTHS = [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875]


@pytest.mark.parametrize("threshold", EIGHTHS)
@pytest.mark.parametrize("name", RULES)
def test_at_equality(name, threshold):
    """Votes count what is strictly above the threshold; means are positive at it. Multiples of 1/8 are exact."""
    windows = [threshold] * 4
    of = rule(name, window_threshold=0.0) if "mean" in name else rule(name)
    below, above = (float(np.nextafter(np.float32(threshold), np.float32(end))) for end in (0, 1))
    at_equality = "mean" in name
    for value, positive in ((below, False), (threshold, at_equality), (above, True)):
        windows = [value] * 4
        body = answer(of, windows, threshold)
        (score,) = of.scores(outputs(windows))
        assert body["orcaDetected"] is positive
        assert of.choose((score,), threshold) == positive == of.read(body)[1]
        assert of.settled((score,), threshold, 0.0) and not of.settled((score,), threshold, 1e-6)


@pytest.mark.parametrize("name", ["top_windows_mean", "positive_windows_mean"])
def test_a_mean_reaches_every_threshold_from_0_to_itself(name):
    of = rule(name)
    for value in (0.0, 0.25, 1.0):
        for threshold in (0.0, 0.25, 0.5, 1.0):
            mean = value if name == "top_windows_mean" or value > 0.5 else 0.0
            assert answer(of, [value], threshold)["orcaDetected"] is (mean >= threshold)
            assert answer(of, [], threshold)["orcaDetected"] is False


def test_what_is_at_the_threshold_of_a_piece_is_not_in_the_mean():
    """In all systems a piece is positive strictly above its threshold."""
    assert answer(rule("positive_windows_mean"), [0.5, 0.75])["global_confidence"] == 0.75
    assert answer(rule("positive_windows_mean"), [0.5])["global_confidence"] == 0.0
    assert answer(rule("windows_vote"), [0.5, 0.75])["global_confidence"] == 75.0
    assert answer(rule("seconds_vote"), [0.5, 0.75])["positive_seconds"] == [1.0, 2.0]
    assert answer(rule("seconds_vote"), [0.5, 0.75])["global_confidence"] == 68.75


def test_a_request_moves_the_threshold_of_the_decision_alone():
    body = answer(rule("positive_windows_mean"), [0.25, 0.625, 0.875], 0.875)
    assert (body["threshold_used"], body["window_threshold"], body["positive_windows"]) == (0.875, 0.5, [1.0, 2.0])
    assert (body["global_confidence"], body["orcaDetected"]) == (0.75, False)


# By hand


def test_the_response_of_a_vote_of_windows():
    body = answer(rule("windows_vote", min_positive_windows=2), [0.75, 0.25, 0.875], 0.5)
    assert body == {
        "global_confidence": 81.25,
        "deciding_confidence": 0.75,
        "orcaDetected": True,
        "threshold_used": 0.5,
        "min_positive_windows": 2,
        "positive_windows": [0.0, 2.0],
        "windows": [
            {"start_s": 0.0, "end_s": 2.0, "confidence": 0.75, "positive": True},
            {"start_s": 1.0, "end_s": 3.0, "confidence": 0.25, "positive": False},
            {"start_s": 2.0, "end_s": 4.0, "confidence": 0.875, "positive": True},
        ],
        "duration_s": 4.5,
        "analyzed_s": 4.0,
        "truncated": False,
    }


def test_the_response_of_a_mean_of_windows():
    body = answer(rule("top_windows_mean"), [0.75, 0.25, 0.5])
    assert body == {
        "global_confidence": 0.625,
        "orcaDetected": True,
        "threshold_used": 0.6,
        "window_threshold": 0.5,
        "positive_windows": [0.0],
        "windows": [
            {"start_s": 0.0, "end_s": 2.0, "confidence": 0.75, "positive": True},
            {"start_s": 1.0, "end_s": 3.0, "confidence": 0.25, "positive": False},
            {"start_s": 2.0, "end_s": 4.0, "confidence": 0.5, "positive": False},
        ],
        "duration_s": 4.5,
        "analyzed_s": 4.0,
        "truncated": False,
    }


@pytest.mark.parametrize(("top", "mean"), [(1, 0.875), (2, 0.75), (3, 0.625), (4, 0.5), (9, 0.5)])
def test_the_highest_windows_or_all_of_them(top, mean):
    assert answer(rule("top_windows_mean", top=top), [0.125, 0.875, 0.375, 0.625])["global_confidence"] == mean


def test_windows_of_any_length_are_counted():
    """Where nothing is averaged over seconds, they need not be of 2 s."""
    facts = metadata(2) | {"segment_times_s": [(0.0, 3.0), (0.5, 3.5)]}
    for name in ("windows_vote", "top_windows_mean", "positive_windows_mean"):
        assert rule(name).parts(outputs([0.5, 0.25]), facts) == [Part(0.0, 3.0, 0.5), Part(0.5, 3.5, 0.25)]
    with pytest.raises(ValueError, match=r"seconds_vote takes windows of 2 s"):
        rule("seconds_vote").parts(outputs([0.5, 0.25]), facts)


@pytest.mark.parametrize("name", RULES)
def test_evaluation_does_not_move_a_systems_threshold(name):
    assert not rule(name).tuned
    assert rule(name).without_windows


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "windows_vote",
            {"min_positive_windows": 0},
            "min_positive_windows is 0, expected a whole number of at least 1",
        ),
        ("windows_vote", {"threshold": -0.5}, r"threshold is -0\.5"),
        ("top_windows_mean", {"top": 0}, "top is 0, expected a whole number of at least 1"),
        ("top_windows_mean", {"window_threshold": 1.5}, r"window_threshold is 1\.5, expected a number in \[0, 1\]"),
        ("top_windows_mean", {"threshold": 60.0}, r"threshold is 60\.0, expected a number in \[0, 1\]"),
        ("positive_windows_mean", {"top": 2}, "unknown parameter top"),
        ("positive_windows_mean", {"classes": ["call"]}, r"classes is \['call'\]"),
    ],
)
def test_wrong_parameters_are_refused(name, changes, message):
    with pytest.raises(DefinitionError, match=message):
        rule(name, **changes)
