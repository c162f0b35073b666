"""What training minimises, by the names that recipes use: `loss: {bag: {segment_loss: 0.5}}`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from skewless.core.catalogue import Catalogue
from skewless.core.networks import Network


@dataclass(frozen=True)
class Batch:
    """Labelled recordings, on the network's device.

    inputs: the network's input of each recording, `(S_i, ...)`, or with `frozen` the features that `encode` gave for it,
        `(S_i, F)`. labels: the number of each recording's class, `(B,)` int64. counts: training recordings per class,
        `(C,)` float32, to balance classes with.
    """

    inputs: Sequence[torch.Tensor]
    labels: torch.Tensor
    counts: torch.Tensor
    frozen: bool = False

    def features(self, network: Network) -> torch.Tensor:
        """The features of all rows of all recordings, one after the other: `(N, F)`."""
        rows = torch.cat(list(self.inputs))
        return rows if self.frozen else network.encode(rows)

    @property
    def lengths(self) -> torch.Tensor:
        """Rows per recording, `(B,)`."""
        return torch.tensor([len(item) for item in self.inputs], device=self.labels.device)

    @property
    def row_labels(self) -> torch.Tensor:
        """Every row's label: its recording's, `(N,)`."""
        return self.labels.repeat_interleave(self.lengths)


class Loss(ABC):
    """A loss: `loss(network, batch)` is the number that training makes smaller, a tensor `()`.

    Its constructor's arguments are its parameters, and a recipe gives them. In a Python file of the archive's folder, named in
    the recipe as `loss: {losses.py:Focal: {gamma: 2.0}}`:

        @dataclass(frozen=True)
        class Focal(Loss):
            '''Focal loss of every row's logits `(N, C)` with its recording's label.'''

            gamma: float = 2.0

            def __call__(self, network: Network, batch: Batch) -> torch.Tensor:
                logs = torch.log_softmax(network.logits(batch.features(network)), dim=1)
                chosen = logs.gather(1, batch.row_labels.unsqueeze(1)).squeeze(1)
                return (-((1 - chosen.exp()) ** self.gamma) * chosen).mean()

    It is called in training mode for every batch, and in evaluation mode for each validation recording.

    trains_encoder: True for a loss that cannot be computed from features alone; `trained: head` is refused with it.
    """

    trains_encoder: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, network: Network, batch: Batch) -> torch.Tensor:
        """The loss of a batch, `()`."""


LOSSES: Catalogue[Loss] = Catalogue(
    "loss",
    Loss,
    {
        "bag": "skewless.training.losses:BagLoss",
        "classes": "skewless.training.losses:ClassLoss",
    },
)


@dataclass(frozen=True)
class BagLoss(Loss):
    """Multiple-instance learning: one label for a bag of segments.

    Binary cross-entropy on the bag's logit `(B,)` and, weighted by `segment_loss`, on its highest segment logit (max-pooling);
    without it nothing trains the segment head. Training recordings per class balance the two. For networks that are called as
    `network(x, mask)` with `(B, S, ...)` and `(B, S)` and have `pool`, such as AttnMILResNet; ValueError for another.
    """

    trains_encoder: ClassVar[bool] = True

    segment_loss: float = 0.5

    def __post_init__(self):
        if self.segment_loss < 0:
            raise ValueError(f"segment_loss is {self.segment_loss}, expected 0 or more")

    def __call__(self, network: Network, batch: Batch) -> torch.Tensor:
        if not hasattr(network, "pool"):
            raise ValueError(f"loss 'bag' is for networks that pool segments, which {type(network).__name__} does not")
        if len(batch.counts) != 2:
            raise ValueError(f"loss 'bag' tells two classes apart, the post-processing has {len(batch.counts)}")
        x, mask = _padded(batch)
        _, _, segment_logits, bag_logit = network(x, mask)
        loss = _binary_cross_entropy(bag_logit, batch)
        # In evaluation it would only shift what epochs are compared by.
        if not network.training:
            return loss
        highest = segment_logits.masked_fill(~mask, -torch.inf).amax(dim=1)
        return loss + self.segment_loss * _binary_cross_entropy(highest, batch)


def _padded(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Recordings `(S_i, ...)` as one padded `(B, S, ...)` and its mask `(B, S)`."""
    x = nn.utils.rnn.pad_sequence(list(batch.inputs), batch_first=True)
    return x, torch.arange(x.shape[1], device=x.device).unsqueeze(0) < batch.lengths.unsqueeze(1)


def _binary_cross_entropy(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    weight = batch.counts[0] / batch.counts[1]
    return F.binary_cross_entropy_with_logits(logits, batch.labels.float(), pos_weight=weight)


@dataclass(frozen=True)
class ClassLoss(Loss):
    """Cross-entropy of every row's logits `(N, C)` with its recording's label, classes weighted by the inverse of how many
    training recordings they have. `(N, 1)`: binary cross-entropy with the second class."""

    def __call__(self, network: Network, batch: Batch) -> torch.Tensor:
        weights = batch.counts.sum() / (len(batch.counts) * batch.counts)
        logits, labels = network.logits(batch.features(network)), batch.row_labels
        if logits.ndim != 2 or logits.shape[1] not in ((1, 2) if len(weights) == 2 else (len(weights),)):
            raise ValueError(f"the network's logits are {tuple(logits.shape)}, for {len(weights)} classes")
        if logits.shape[1] == 1:
            return F.binary_cross_entropy_with_logits(logits[:, 0], labels.float(), weight=weights[labels])
        # Not PyTorch's own mean, which divides by the weights: alone, every input would weigh the same.
        return F.cross_entropy(logits, labels, weight=weights, reduction="none").mean()
