"""What a network is: two halves, so that all rows of many recordings go through the costly one together."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import nn


class Network(nn.Module):
    """A network whose `encode` takes rows, such as segments or pictures, and whose `head` takes one recording's features.

    Example: 3 recordings of 4, 1 and 7 segments become one batch of 12 rows for `encode`, whose features are then handed
    to `head` in three parts of 4, 1 and 7.

    packages: the packages that compute the outputs, as pip names them.
    input_name: what exported graphs call the input; they call the outputs as `head` does.
    default_loss: the loss that trains it where a recipe names none; "classes" needs `logits`.
    """

    packages: ClassVar[tuple[str, ...]] = ("torch",)
    input_name: ClassVar[str] = "inputs"
    default_loss: ClassVar[str] = "classes"

    @abstractmethod
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Rows `(N, ...)` float32 to features `(N, F)`; in eval mode no row depends on another."""

    @abstractmethod
    def head(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """One recording's features `(S, F)` to its outputs by name."""

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Features `(N, F)` to logits `(N, C)`, for a loss on each row; `(N, 1)`: one logit, of the second of two classes.

        Raises NotImplementedError for a network that no such loss trains.
        """
        raise NotImplementedError(f"{type(self).__name__} has no logits for each row; give it a loss of its own")

    @property
    def files(self) -> tuple[str, ...]:
        """Files of the archive's folder that hold the network, such as "model.pt2"; empty where a class builds it."""
        return ()
