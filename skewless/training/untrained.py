"""The one rule for "no training left these weights", which importing and packaging both ask.

What no network can compute with, such as NaN or a negative variance, `skewless.training.checkpoint.network_of` refuses
before; nobody can accept that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from skewless.core.networks import Network
from skewless.training.checkpoint import CheckpointError, shortened

# What findings call a network that is judged as one part, and what it answers.
WHOLE, OUTPUTS = "network", "outputs"

# By how much a network's outputs have to differ between inputs: of a logit, and of a probability's log-odds. Trained
# networks are at 1 and more, random ones of standard deviation 0.02 below 0.001.
MIN_OUTPUT_RANGE = 0.01

_SHOWN = 5  # findings of one kind, in a message
_ROWS = 8  # of the recording that is made of each input
_FEWEST = 1024  # weights of a layer whose standard deviation says something


class UntrainedError(CheckpointError):
    """Weights that no training has left, or a layer to be accepted as untrained that does not look so."""


@dataclass(frozen=True)
class Finding:
    """A layer, a part of the network with several, or "outputs", and why its weights look untrained.

    final: whether nobody can accept it.
    """

    layer: str
    reason: str
    final: bool = False

    def __str__(self) -> str:
        return f"layer '{self.layer}' {self.reason}" if self.layer != OUTPUTS else f"{OUTPUTS}: {self.reason}"


@dataclass(frozen=True)
class Findings:
    """findings: what no trained network has. notes: what is suspicious, and may be right."""

    findings: tuple[Finding, ...]
    notes: tuple[str, ...]


def untrained_layers(network: nn.Module) -> Findings:
    """The layers of a network that no training has left as they are, by these signs:

    1. A batch normalisation whose running mean is still all 0 and variance all 1 never saw a batch: the first one moves
       both, and pretrained weights bring their own.
    2. A part whose batch normalisations all still have scale 1 and shift 0, and whose linear layers all still lie within
       PyTorch's initial range, never saw an optimizer step: the first one moves every shift. (Data that runs through a
       fresh network in training mode ends sign 1, and not this one.)
    3. A linear layer whose bias is exactly 0 throughout is as Keras and others draw it: the first optimizer step moves it.
    4. A layer whose weights are all the same number, 0 or another: all its units compute the same. Scales and shifts of a
       normalisation are no such weights: all 1 is right in a frozen layer.
    5. A part in whose normalisations the scales lie around 0, in every one between a quarter and three quarters of them
       negative: training starts from 1. (Residual branches may start from 0, and then end with both signs; their part
       has other normalisations, too.)

    Signs 1, 2 and 5 are looked for part by part: in a network's direct children such as `backbone` and `head`, because a
    fresh head spoils the answer however well the backbone is trained. A network with batch normalisations among its
    direct children is one part, called "network".

    Notes: a part without batch normalisation whose linear layers lie within the initial range, as small steps may leave
    it there; a part whose layers all have the same standard deviation, as one distribution gives it; a batch normalisation
    whose scales are all 0, which is how some residual branches start.

    `num_batches_tracked` is no sign: torchvision's ImageNet weights load with 0. What no sign tells: on which data a part
    was trained; a single weight that is another; random weights whose spread differs from layer to layer, under
    normalisations that are sound. A measured AUC does.
    """
    findings: list[Finding] = []
    notes: list[str] = []
    for path, module in _parts(network):
        part = path or WHOLE
        layers = [(name, layer, _tensors(layer)) for name, layer in module.named_modules(prefix=path)]
        norms = [(name, tensors) for name, _, tensors in layers if _is_norm(tensors)]
        linears = [tensors for _, layer, tensors in layers if _is_linear(layer, tensors)]
        scales = [
            tensors["weight"] for _, _, tensors in layers if _is_scale(tensors) and tensors["weight"].numel() >= 16
        ]
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
        if scales and all(0.25 <= float((scale < 0).double().mean()) <= 0.75 for scale in scales):
            findings.append(
                Finding(
                    part, "has scales around 0 in every normalisation, about half of them negative: drawn at random"
                )
            )
        elif (spread := _common_spread(module)) is not None:
            notes.append(
                f"all layers of {part} spread their weights alike (standard deviation {spread:.2g}), as if drawn at random"
            )
        if closed := [name for name, norm in norms if "weight" in norm and _all(norm["weight"], 0)]:
            notes.append(f"scales are all 0, so that nothing of the input comes through, in {shortened(closed)}")
    for name, layer in network.named_modules():
        tensors = _tensors(layer)
        if (constant := _constant(layer)) is not None:
            findings.append(Finding(name or WHOLE, f"has weights that are all {constant:g}"))
        elif _is_linear(layer, tensors) and "bias" in tensors and _all(tensors["bias"], 0):
            findings.append(Finding(name, "has a bias of exactly 0 throughout, as before the first step of training"))
    return Findings(tuple(findings), tuple(notes))


def require_trained(
    network: nn.Module,
    accepted: Collection[str] = (),
    recorded: Collection[str] = (),
    inputs: Sequence[torch.Tensor] | None = None,
) -> list[str]:
    """Raise UntrainedError for weights that no training has left; returns what there is to note.

    accepted: layers that somebody says are rightly so, such as a head that was trained without learning its bias, or
        "outputs".
    recorded: layers that were accepted before, when the checkpoint was made.
    inputs: what the pipeline gives for generated files, each `(S, ...)`. The outputs of `network`, then a Network, have to
        be finite, which nobody can overrule, and to differ by at least MIN_OUTPUT_RANGE. None: it is not run.
    Raises UntrainedError, too, for an accepted layer that looks trained.
    """
    found = untrained_layers(network)
    if inputs is not None and isinstance(network, Network):
        answers = _unlike_answers(network, inputs)
        found = Findings((*found.findings, *answers.findings), (*found.notes, *answers.notes))
    names = list(dict.fromkeys(finding.layer for finding in found.findings))
    if unknown := [name for name in accepted if name not in names]:
        there = f"these do: {shortened(names)}" if names else "none does"
        raise UntrainedError(f"layer {', '.join(unknown)} is to be accepted, but does not look untrained; {there}")
    refused = [f for f in found.findings if f.final or f.layer not in {*accepted, *recorded}]
    if refused:
        advice = (
            "Give the weights that training ended with: the trained model's state_dict(), loaded with strict=True wherever it "
            "passes through other code (strict=False leaves what does not match at its initial values)."
        )
        if not any(finding.final for finding in refused):
            advice += (
                " Where a layer is rightly so, such as a head whose bias was not learnt, accept it by name: "
                f"--accept-untrained {refused[0].layer}"
            )
        raise UntrainedError(f"these are not trained weights:\n{_listed(refused)}\n{advice}")
    overruled = [f"accepted although it looks untrained: {finding}" for finding in found.findings]
    return [*overruled, *found.notes]


def _unlike_answers(network: Network, inputs: Sequence[torch.Tensor]) -> Findings:
    """Whether the outputs tell the inputs apart. Raises CheckpointError for a network that does not take the inputs."""
    different: list[torch.Tensor] = []
    for x in inputs:
        if len(x) and not any(torch.equal(x, other) for other in different):
            different.append(x)
    if len(different) < 2:
        note = f"the network was not tried: the pipeline makes {len(different)} different inputs of the generated files"
        return Findings((), (note,))
    answers: dict[str, list[torch.Tensor]] = {}
    for x in different:
        # Always as many rows: an output such as attention depends on their number.
        rows = torch.arange(_ROWS) % len(x)
        try:
            with torch.inference_mode():
                outputs = network.head(network.encode(x)[rows])
        except (RuntimeError, ValueError, LookupError, TypeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(
                f"the network does not take what the pipeline gives, {tuple(x.shape)}: {reason}; give the pipeline that the "
                "weights were trained behind"
            ) from error
        for name, value in outputs.items():
            if not value.isfinite().all():
                reason = f"{name} is NaN or infinite for a generated file"
                return Findings((Finding(OUTPUTS, reason, final=True),), ())
            answers.setdefault(name, []).append(value.double().flatten())
    stacked = [torch.stack(values) for values in answers.values() if len({len(value) for value in values}) == 1]
    widest = max((_range(values) for values in stacked), default=MIN_OUTPUT_RANGE)
    if widest >= MIN_OUTPUT_RANGE:
        return Findings((), ())
    reason = (
        f"they hardly depend on the input: for {len(different)} generated files that have nothing in common they are at most "
        f"{widest:.1e} apart, in logits or log-odds, expected {MIN_OUTPUT_RANGE} or more"
    )
    return Findings((Finding(OUTPUTS, reason),), ())


def _range(values: torch.Tensor) -> float:
    """How far one output's `(N, K)` values lie apart between the N inputs, the largest of K: of probabilities, in log-odds."""
    if values.min() >= 0 and values.max() <= 1:
        # To float32's nearest neighbours of 0 and 1.
        values = torch.logit(values.clamp(2.0**-126, 1 - 2.0**-24))
    return float((values.amax(dim=0) - values.amin(dim=0)).max()) if values.numel() else 0.0


def _listed(findings: Sequence[Finding]) -> str:
    """One line for each, and of many for the same reason only for the first."""
    lines, seen, total = [], Counter[str](), Counter(finding.reason for finding in findings)
    for finding in findings:
        seen[finding.reason] += 1
        if seen[finding.reason] <= _SHOWN:
            lines.append(f"  {finding}")
        if seen[finding.reason] == _SHOWN < total[finding.reason]:
            lines.append(f"  and {total[finding.reason] - _SHOWN} more layers alike")
    return "\n".join(lines)


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


def _is_scale(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether this is a normalisation's scale and shift, whatever it normalises over."""
    both = "weight" in tensors and "bias" in tensors
    return both and tensors["weight"].ndim == 1 and tensors["weight"].shape == tensors["bias"].shape


def _matrices(module: nn.Module) -> Iterator[torch.Tensor]:
    """A module's own weights that inputs are multiplied with: kernels and matrices, not scales, shifts and constants."""
    own = {name: value.detach() for name, value in module.named_parameters(recurse=False)}
    for name, value in own.items():
        # A scale for each channel may be stored as (C, 1, 1).
        many = (
            value.ndim >= 2 and "bias" not in name and ("weight" in name or sum(size > 1 for size in value.shape) >= 2)
        )
        affine = name == "weight" and "bias" in own and own["bias"].shape == value.shape
        if many and value.numel() > 1 and value.is_floating_point() and not affine:
            yield value


def _constant(module: nn.Module) -> float | None:
    """The one number that one of the module's weights consists of; None for others."""
    for weight in _matrices(module):
        if _all(weight, first := weight.flatten()[0].item()):
            return first
    return None


def _common_spread(module: nn.Module) -> float | None:
    """The standard deviation that all layers' weights share to a tenth; None where they differ, or are few."""
    large = [w for layer in module.modules() for w in _matrices(layer) if w.numel() >= _FEWEST]
    spreads = [float(weight.std()) for weight in large]
    alike = len(spreads) >= 4 and max(spreads) <= 1.1 * min(spreads)
    return spreads[0] if alike and min(spreads) > 0 else None
