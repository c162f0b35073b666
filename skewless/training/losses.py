"""What a network is trained to do: its loss on a batch of labelled inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from skewless.core.networks.attn_mil_resnet import AttnMILResNet


class Objective(Protocol):
    """loss(inputs, labels): inputs, each `(S_i, ...)` on the network's device; labels `(B,)` int64."""

    def loss(self, inputs: Sequence[torch.Tensor], labels: torch.Tensor) -> torch.Tensor: ...


class BagObjective:
    """Multiple-instance learning: one label for a bag of segments.

    Binary cross-entropy on the bag's logit and, weighted by `segment_loss`, on its highest segment logit. `counts` of
    training inputs per class balance the two.
    """

    def __init__(self, network: AttnMILResNet, counts: torch.Tensor, segment_loss: float):
        self._network, self._segment_loss = network, segment_loss
        self._pos_weight = counts[0] / counts[1]

    def loss(self, inputs: Sequence[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        x, mask = _collate(inputs)
        _, _, segment_logits, bag_logit = self._network(x, mask)
        highest = segment_logits.masked_fill(~mask, -torch.inf).amax(dim=1)
        loss = self._cross_entropy(bag_logit, labels)
        # In evaluation it would only shift what epochs are compared by.
        return loss + self._segment_loss * self._cross_entropy(highest, labels) if self._network.training else loss

    def _cross_entropy(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(logits, labels.float(), pos_weight=self._pos_weight)


class ClassObjective:
    """Cross-entropy of every segment with its recording's label, classes weighted by the inverse of their `counts`.

    frozen: the inputs are features, what `encode` gives; only what comes behind it is trained.
    """

    def __init__(self, network: nn.Module, counts: torch.Tensor, frozen: bool):
        self._network, self._frozen = network, frozen
        self._weights = counts.sum() / (len(counts) * counts)

    def loss(self, inputs: Sequence[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        x = torch.cat(list(inputs))
        labels = labels.repeat_interleave(torch.tensor([len(item) for item in inputs], device=labels.device))
        logits = self._network.logits(x if self._frozen else self._network.encode(x))
        if logits.shape[1] == 1:
            weights = self._weights[labels]
            return F.binary_cross_entropy_with_logits(logits[:, 0], labels.float(), weight=weights)
        # Not PyTorch's own mean, which divides by the weights: alone, every input would weigh the same.
        return F.cross_entropy(logits, labels, weight=self._weights, reduction="none").mean()


def objective_of(network: nn.Module, counts: torch.Tensor, segment_loss: float, frozen: bool) -> Objective:
    """counts: training inputs per class `(C,)`, on the network's device. Raises ValueError for a bag with a frozen encoder."""
    if not isinstance(network, AttnMILResNet):
        return ClassObjective(network, counts, frozen)
    if frozen:
        raise ValueError("this network is trained as a whole; choose trained: all")
    return BagObjective(network, counts, segment_loss)


def _collate(inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Recordings `(S_i, 3, 224, 224)` to one padded `(B, S, 3, 224, 224)` and its mask `(B, S)`."""
    x = nn.utils.rnn.pad_sequence(list(inputs), batch_first=True)
    lengths = torch.tensor([len(item) for item in inputs], device=x.device)
    return x, torch.arange(x.shape[1], device=x.device).unsqueeze(0) < lengths.unsqueeze(1)
