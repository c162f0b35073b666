"""From a network's outputs to what the caller reads, by the names that a model-config.yaml uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from handler.decisions.bag_threshold import BagThreshold

DECISIONS: dict[str, type[BagThreshold]] = {"bag_threshold": BagThreshold}


def build_decision(definition: Mapping[str, Mapping[str, Any]]) -> BagThreshold:
    """The decision of `{name: {parameter: value}}`; raises ValueError for an unknown one."""
    if not isinstance(definition, Mapping) or len(definition) != 1:
        raise ValueError(f"decision is {definition!r}, expected one 'name: {{parameters}}'")
    ((name, params),) = definition.items()
    if name not in DECISIONS:
        raise ValueError(f"unknown decision '{name}'; there are: {', '.join(sorted(DECISIONS))}")
    try:
        return DECISIONS[name](**params)
    except TypeError as error:
        raise ValueError(f"decision '{name}': {error}") from error
