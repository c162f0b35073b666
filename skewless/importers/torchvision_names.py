"""Weights of torchvision's own networks, under the names of `torchvision`: a body and one last linear layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeVar

Value = TypeVar("Value")


def split(names: Collection[str], body: Collection[str]) -> tuple[str, list[str]] | None:
    """What stands before every name of the body, such as "" or "model.", and the names that are none of the body's; None for
    names without that body."""
    first = next(iter(body))
    for name in names:
        prefix = name.removesuffix(first)
        if name.endswith(first) and all(prefix + each in names for each in body):
            return prefix, [each for each in names if each.removeprefix(prefix) not in body]
    return None


def last_layer(names: Collection[str]) -> str | None:
    """The layer whose weight and bias these names are; None for more than one layer."""
    layers = {name.rpartition(".")[0] for name in names}
    layer = layers.pop() if len(layers) == 1 else ""
    return layer if layer and set(names) == {f"{layer}.weight", f"{layer}.bias"} else None


def rename(weights: Mapping[str, Value], expected: Collection[str]) -> dict[str, Value]:
    """The weights by the names of a `torchvision` network, `expected`: whatever the file calls what holds the body, and the
    last layer (`fc`, `classifier.1`, `heads.head`). Weights of anything else stay as they are."""
    body = [name.removeprefix("backbone.") for name in expected if name.startswith("backbone.")]
    found = split(weights, body)
    layer = None if found is None else last_layer(found[1])
    if found is None or layer is None:
        return dict(weights)
    prefix, _ = found
    named = {f"backbone.{name}": weights[prefix + name] for name in body}
    return named | {f"classifier.{kind}": weights[f"{layer}.{kind}"] for kind in ("weight", "bias")}
