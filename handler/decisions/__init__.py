"""From a network's outputs to what the caller reads, by the names that a model-config.yaml uses."""

from __future__ import annotations

from typing import Any

from handler.decisions.bag_threshold import BagThreshold
from handler.definition import build

DECISIONS: dict[str, type[BagThreshold]] = {"bag_threshold": BagThreshold}


def build_decision(definition: Any) -> BagThreshold:
    """The decision of `{name: {parameter: value}}`; raises ValueError for an unknown one."""
    return build("decision", DECISIONS, definition)
