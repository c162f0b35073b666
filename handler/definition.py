"""Definitions in a model-config.yaml: one `name: {parameter: value}` chooses a class and its arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")

_KEYS = ("network", "runtime", "decision", "precision", "limits")


def read_config(path: Path) -> dict[str, Any]:
    """A model-config.yaml; raises ValueError when it is not YAML or lacks one of our keys. TorchServe has its own."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    missing = [key for key in _KEYS if not isinstance(config, dict) or key not in config]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}; archive/cough/model-config.yaml shows all of them")
    return config


def build(kind: str, registry: Mapping[str, Callable[..., T]], definition: Any, *given: Any) -> T:
    """What `definition` asks for, made from the `given` arguments and its parameters.

    Raises ValueError naming the kind for a malformed definition, a name that is not in the registry, or parameters
    that it does not take.
    """
    if not isinstance(definition, Mapping) or len(definition) != 1:
        raise ValueError(f"{kind} is {definition!r}, expected one 'name: {{parameters}}'")
    ((name, params),) = definition.items()
    if name not in registry:
        raise ValueError(f"unknown {kind} '{name}'; there are: {', '.join(sorted(registry))}")
    try:
        return registry[name](*given, **params)
    except TypeError as error:
        raise ValueError(f"{kind} '{name}': {error}") from error
