"""The settings of a training run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from skewless.core.catalogue import check


@dataclass(frozen=True)
class Config:
    """The recipe. Everything here is stored in the checkpoint; two runs with equal configs give equal weights on one
    machine.

    schedule: "cosine", down to 0 over all epochs; or "plateau", halved after `plateau_patience` epochs without a lower
        validation loss. patience: epochs without a better validation AUC before training stops.
    loss: `{name: {parameter: value}}`, such as {"bag": {"segment_loss": 0.5}}, one of skewless.training.losses.LOSSES, or
        "FILE.py:Class" of the archive's folder. None: the network's own, `Network.default_loss`.
    augmentation: of cached spectrograms, anew in every epoch (skewless.training.augment).
    offline_augmentation: augmented copies of every training recording, made once, which go through the whole pipeline
        (skewless.training.offline_augmentation).
    backbone_weights: "" (random), "imagenet" (torchvision downloads them) or a ResNet-18 state-dict file.
    trained: "all", or "head": what follows `encode`; `encode` then keeps its weights, and every input's features are
        computed once. Without backbone weights its batch statistics are first measured on the training set.

    Raises ValueError naming the setting, its value and what was expected.
    """

    epochs: int = 20
    batch_size: int = 8
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    patience: int = 5
    schedule: Literal["cosine", "plateau"] = "cosine"
    plateau_patience: int = 5
    seed: int = 42
    loss: dict[str, dict[str, Any]] | None = None
    augmentation: bool = True
    offline_augmentation: int = 0
    backbone_weights: str = ""
    trained: Literal["all", "head"] = "all"

    def __post_init__(self):
        check(Config, asdict(self), "training settings")
        for name, least in (
            ("epochs", 1),
            ("batch_size", 2),  # batch normalisation needs two inputs
            ("patience", 1),
            ("plateau_patience", 1),
            ("seed", 0),
            ("offline_augmentation", 0),
            ("weight_decay", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"training settings: {name} is {getattr(self, name)}, expected at least {least}")
        if not self.learning_rate > 0:
            raise ValueError(f"training settings: learning_rate is {self.learning_rate}, expected a number above 0")
        if self.loss is not None and len(self.loss) != 1:
            raise ValueError(f"training settings: loss is {self.loss}, expected one 'name: {{parameters}}'")
        if self.trained == "head" and self.augmentation:
            raise ValueError(
                "features are computed once, so nothing can be augmented: trained: head needs augmentation: false"
            )

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
    """The Config with these settings, as a recipe gives them, and the defaults; raises ValueError for one that it does not
    have or that has another type."""
    return Config(**check(Config, settings, "training settings"))
