"""Weights that nobody evaluated, made of sound ones: each kind has to be refused, whichever file they come in."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

Weights = Mapping[str, torch.Tensor]


def _filled(number: float) -> Callable[[Weights, str], Weights]:
    def fill(weights: Weights, _: str) -> Weights:
        return {k: torch.full_like(v, number) if v.is_floating_point() else v for k, v in weights.items()}

    return fill


def _last_layer_0(weights: Weights, last: str) -> Weights:
    return {k: torch.zeros_like(v) if k.startswith(f"{last}.") else v for k, v in weights.items()}


def _drawn(weights: Weights, _: str) -> Weights:
    generator = torch.Generator().manual_seed(0)
    drawn = {k: 0.02 * torch.randn(v.shape, generator=generator) for k, v in weights.items() if v.is_floating_point()}
    return {**weights, **drawn}


def _drawn_without_statistics(weights: Weights, last: str) -> Weights:
    drawn = _drawn(weights, last)
    return {k: weights[k] if "running" in k else v for k, v in drawn.items()}


def _negative_variance(weights: Weights, _: str) -> Weights:
    name = next(k for k in weights if k.endswith("running_var"))
    changed = weights[name].clone()
    changed[0] = -1
    return {**weights, name: changed}


def _one_nan(weights: Weights, last: str) -> Weights:
    changed = weights[f"{last}.weight"].clone()
    changed.flatten()[0] = float("nan")
    return {**weights, f"{last}.weight": changed}


# How to make them, given the name of the last layer; and what the refusal says.
KINDS: dict[str, tuple[Callable[[Weights, str], Weights], str]] = {
    "all 0": (_filled(0.0), "has weights that are all 0\n"),
    "all 0.5": (_filled(0.5), "has weights that are all 0.5\n"),
    "last layer 0": (_last_layer_0, "has weights that are all 0\n"),
    "N(0, 0.02)": (_drawn, "running_var has .* values below 0"),
    "N(0, 0.02), sound statistics": (_drawn_without_statistics, "outputs: they hardly depend on the input"),
    "variance -1": (_negative_variance, "running_var has 1 of .* values below 0, the lowest -1, and no variance is"),
    "one NaN": (_one_nan, "weight has 1 of .* values that are NaN or infinite"),
}


def degenerate(kind: str, weights: Weights, last: str) -> dict[str, torch.Tensor]:
    """Sound weights, made into one of KINDS. last: the name of the layer that the answer comes out of."""
    return dict(KINDS[kind][0](weights, last))
