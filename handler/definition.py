"""Definitions in a model-config.yaml: one `name: {parameter: value}` chooses a class and its arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


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
