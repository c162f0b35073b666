"""The settings of a training run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal


@dataclass(frozen=True)
class Config:
    """The recipe. Everything here is stored in the checkpoint; two runs with equal configs give equal weights on one
    machine.

    schedule: "cosine", down to 0 over all epochs; or "plateau", halved after `plateau_patience` epochs without a lower
        validation loss. patience: epochs without a better validation AUC before training stops.
    segment_loss: weight of a second loss on a recording's highest segment logit (max-pooling multiple-instance learning),
        beside the one on its bag logit; without it nothing trains the segment head.
    augmentation: of cached spectrograms (skewless.training.augment). copies: augmented copies of every training recording
        (skewless.training.offline_augmentation), which go through the whole pipeline.
    backbone_weights: "" (random), "imagenet" (torchvision downloads them) or a ResNet-18 state-dict file.
    trained: "all", or "head": what follows `encode`; `encode` then keeps its weights, and every input's features are
        computed once. Without backbone weights its batch statistics are first measured on the training set.
    """

    epochs: int = 20
    batch_size: int = 8
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    patience: int = 5
    schedule: Literal["cosine", "plateau"] = "cosine"
    plateau_patience: int = 5
    seed: int = 42
    segment_loss: float = 0.5
    augmentation: bool = True
    copies: int = 0
    backbone_weights: str = ""
    trained: Literal["all", "head"] = "all"

    def __post_init__(self):
        if self.segment_loss < 0 or self.copies < 0:
            raise ValueError(f"segment_loss {self.segment_loss}, copies {self.copies}: expected 0 or more")
        if not (self.learning_rate > 0 and self.weight_decay >= 0):
            raise ValueError(
                f"learning_rate {self.learning_rate}, weight_decay {self.weight_decay}: expected above 0, and 0 or more"
            )
        if self.trained == "head" and self.augmentation:
            raise ValueError(
                "features are computed once, so nothing can be augmented: trained: head needs augmentation: false"
            )
        if self.epochs < 1 or self.batch_size < 2 or min(self.patience, self.plateau_patience) < 1:
            raise ValueError(
                f"epochs {self.epochs}, batch_size {self.batch_size}, patience {self.patience}, plateau_patience "
                f"{self.plateau_patience}: expected at least 1, 2, 1 and 1"
            )
        for name, choices in (("schedule", ("cosine", "plateau")), ("trained", ("all", "head"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {' or '.join(choices)}")

    def rate(self, history: list[dict[str, float]]) -> float:
        """The learning rate of the epoch that follows `history`: a function of it alone, so that an interrupted run
        goes on as it would have.

        Cosine: I. Loshchilov, F. Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017, equation 5.
        """
        if self.schedule == "cosine":
            return 0.5 * self.learning_rate * (1 + math.cos(math.pi * len(history) / self.epochs))
        lowest, since, halvings = math.inf, 0, 0
        for epoch in history:
            since = 0 if epoch["val_loss"] < lowest else since + 1
            lowest = min(lowest, epoch["val_loss"])
            if since == self.plateau_patience:
                since, halvings = 0, halvings + 1
        return self.learning_rate * 0.5**halvings


def config_of(settings: Mapping[str, Any]) -> Config:
    """The Config with these settings and the defaults; raises ValueError for one that it does not have."""
    known = [f.name for f in fields(Config)]
    unknown = sorted(str(name) for name in settings if name not in known)
    if unknown:
        raise ValueError(f"unknown training setting {', '.join(unknown)}; there are: {', '.join(known)}")
    for name, value in settings.items():
        kind = type(getattr(Config, name))
        if type(value) is not kind and not (kind is float and type(value) is int):
            # YAML reads 1e-3, without a point, as text.
            raise ValueError(
                f"training setting {name} is {value!r}, expected {kind.__name__} (such as {getattr(Config, name)!r})"
            )
    return Config(**settings)
