"""The one rule for "these weights were never trained", which importing and packaging both ask."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from skewless.training.checkpoint import CheckpointError

# What findings call a network that is judged as one part.
WHOLE = "network"


class UntrainedError(CheckpointError):
    """Weights that no training has shaped, or a layer to be accepted as untrained that does not look so."""


@dataclass(frozen=True)
class Finding:
    """A layer, or a part of the network with several, and why its weights look untrained."""

    layer: str
    reason: str

    def __str__(self) -> str:
        return f"layer '{self.layer}' {self.reason}"


@dataclass(frozen=True)
class Findings:
    """findings: what no trained network has. notes: what is suspicious, and may be right."""

    findings: tuple[Finding, ...]
    notes: tuple[str, ...]


def untrained_layers(network: nn.Module) -> Findings:
    """The layers of a network that no training has shaped, by three signs:

    1. A batch normalisation whose running mean is still all 0 and variance all 1 never saw a batch: the first one moves
       both, and pretrained weights bring their own.
    2. A part whose batch normalisations all still have scale 1 and shift 0, and whose linear layers all still lie within
       PyTorch's initial range, never saw an optimizer step: the first one moves every shift. (Data that runs through a
       fresh network in training mode ends sign 1, and not this one.)
    3. A linear layer whose bias is exactly 0 throughout is as Keras and others draw it: the first optimizer step moves it.

    Signs 1 and 2 are looked for part by part: in a network's direct children such as `backbone` and `head`, because a
    fresh head spoils the answer however well the backbone is trained. A network with batch normalisations among its
    direct children is one part, called "network".

    A part without batch normalisation whose linear layers lie within the initial range is a note, as small steps may leave
    it there. `num_batches_tracked` is no sign: torchvision's ImageNet weights load with 0. No sign tells which data a part
    was trained on; a measured AUC does.
    """
    findings: list[Finding] = []
    notes: list[str] = []
    for path, module in _parts(network):
        part = path or WHOLE
        layers = [(name, layer, _tensors(layer)) for name, layer in module.named_modules(prefix=path)]
        norms = [(name, tensors) for name, _, tensors in layers if _is_norm(tensors)]
        linears = [tensors for _, layer, tensors in layers if _is_linear(layer, tensors)]
        unseen = [name for name, norm in norms if _all(norm["running_mean"], 0) and _all(norm["running_var"], 1)]
        affine = [norm for _, norm in norms if "weight" in norm and "bias" in norm]
        untouched = all(_all(norm["weight"], 1) and _all(norm["bias"], 0) for norm in affine)
        untouched = untouched and all(map(_in_initial_range, linears))
        if unseen:
            which = unseen[0] if len(unseen) == 1 else f"{unseen[0]} and {len(unseen) - 1} more"
            has = "has" if len(unseen) == 1 else "have"
            findings.append(
                Finding(part, f"never saw a batch: {which} still {has} running mean 0 and variance 1 throughout")
            )
        elif affine and untouched:
            findings.append(Finding(part, "never saw an optimizer step: every scale is still 1 and every shift 0"))
        elif linears and untouched:
            notes.append(f"{part} still looks like its random initial values: what it computes may mean nothing")
    for name, layer in network.named_modules():
        tensors = _tensors(layer)
        if _is_linear(layer, tensors) and "bias" in tensors and _all(tensors["bias"], 0):
            findings.append(Finding(name, "has a bias of exactly 0 throughout, as before the first step of training"))
    return Findings(tuple(findings), tuple(notes))


def require_trained(network: nn.Module, accepted: Collection[str] = (), recorded: Collection[str] = ()) -> list[str]:
    """Raise UntrainedError for a network with untrained layers; returns what there is to note.

    accepted: layers that somebody says are rightly so, such as a head that was trained without learning its bias.
    recorded: layers that were accepted before, when the checkpoint was made.
    Raises UntrainedError, too, for an accepted layer that looks trained.
    """
    found = untrained_layers(network)
    names = [finding.layer for finding in found.findings]
    if unknown := [name for name in accepted if name not in names]:
        there = f"these do: {', '.join(names)}" if names else "none does"
        raise UntrainedError(f"layer {', '.join(unknown)} is to be accepted, but does not look untrained; {there}")
    refused = [finding for finding in found.findings if finding.layer not in {*accepted, *recorded}]
    if refused:
        listed = "\n".join(f"  {finding}" for finding in refused)
        raise UntrainedError(
            f"these are not trained weights:\n{listed}\nGive the weights that training ended with: the trained model's "
            "state_dict(), loaded with strict=True wherever it passes through other code (strict=False leaves what does not "
            "match at its initial values). Where a layer is rightly so, such as a head whose bias was not learnt, accept it by "
            f"name: --accept-untrained {refused[0].layer}"
        )
    overruled = [f"accepted although it looks untrained: {finding}" for finding in found.findings]
    return [*overruled, *found.notes]


def _parts(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The parts that are judged on their own, by their paths in the network; "" is the whole network."""
    name, module = "", network
    children = dict(module.named_children())
    # A mere wrapper around one module, such as an exported program's.
    while len(children) == 1 and not _tensors(module):
        ((child, module),) = children.items()
        name = f"{name}.{child}".strip(".")
        children = dict(module.named_children())
    if not children or any(_is_norm(_tensors(child)) for child in children.values()):
        yield name, module
    else:
        yield from ((f"{name}.{child}".strip("."), part) for child, part in children.items())


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's own parameters and buffers: of an exported program they are all that is left of its layers."""
    own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    return {name: value.detach() for name, value in own.items()}


def _is_norm(tensors: dict[str, torch.Tensor]) -> bool:
    return "running_mean" in tensors and "running_var" in tensors


def _is_linear(module: nn.Module, tensors: dict[str, torch.Tensor]) -> bool:
    matrix = "weight" in tensors and tensors["weight"].ndim == 2
    return matrix and not isinstance(module, nn.Embedding | nn.EmbeddingBag)


def _all(values: torch.Tensor, initial: float) -> bool:
    return bool((values == initial).all())


def _in_initial_range(tensors: dict[str, torch.Tensor]) -> bool:
    # nn.Linear draws weights and biases from U(-1/sqrt(in_features), 1/sqrt(in_features)). float16 may round up.
    bound = tensors["weight"].shape[1] ** -0.5 * (1 + 2**-10)
    return all(bool((tensors[name].abs() <= bound).all()) for name in ("weight", "bias") if name in tensors)
