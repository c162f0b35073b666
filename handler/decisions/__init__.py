"""From a network's outputs to what the caller reads, by the names that a model-config.yaml uses."""

from __future__ import annotations

from typing import Any

from handler.decisions.bag_threshold import BagThreshold
from handler.decisions.class_probabilities import ClassProbabilities
from handler.decisions.decision import Decision, Part
from handler.decisions.label_threshold import LabelThreshold
from handler.decisions.seconds_vote import SecondsVote
from handler.definition import build

__all__ = ["DECISIONS", "Decision", "Part", "build_decision"]

DECISIONS: dict[str, type[Decision]] = {
    "bag_threshold": BagThreshold,
    "class_probabilities": ClassProbabilities,
    "label_threshold": LabelThreshold,
    "seconds_vote": SecondsVote,
}


def build_decision(definition: Any) -> Decision:
    """The decision of `{name: {parameter: value}}`; raises ValueError for an unknown one."""
    return build("decision", DECISIONS, definition)
