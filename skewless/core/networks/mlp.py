"""A multilayer perceptron for one class against another, with the layers in Keras' customary order."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from skewless.core.networks.network import Network


class MLP(Network):
    """A logit from a vector of features: each hidden layer is Linear, ReLU, Dropout, BatchNorm (the last: no BatchNorm).

    State-dict keys: `hidden.K.linear.*` and `hidden.K.norm.*` for the K-th hidden layer, counted from 0, and `output.*`.
    A Keras `Dense` kernel is the transpose of a `linear.weight`; gamma, beta, moving_mean and moving_variance are a norm's
    weight, bias, running_mean and running_var.

    Batch normalisation has Keras' epsilon 1e-3 and its momentum 0.99, which torch writes 0.01. In training torch averages
    the unbiased variance of a batch of n where Keras averages the biased one: n / (n - 1) apart. Weights start as Keras
    starts them: uniform after X. Glorot, Y. Bengio, "Understanding the difficulty of training deep feedforward neural
    networks", AISTATS 2010, equation 16; biases at zero.

    inputs: features per input. hidden: units per hidden layer. dropout: the share of each hidden layer's units that is
    dropped in training. Raises ValueError for a dropout without its layer, or no layer at all.
    """

    packages: ClassVar[tuple[str, ...]] = ("torch",)
    input_name: ClassVar[str] = "features"

    def __init__(
        self,
        inputs: int = 37,
        hidden: tuple[int, ...] = (256, 128, 64, 32),
        dropout: tuple[float, ...] = (0.3, 0.3, 0.2, 0.2),
    ):
        super().__init__()
        if not hidden or len(hidden) != len(dropout):
            raise ValueError(
                f"hidden {list(hidden)} and dropout {list(dropout)}: expected one dropout per hidden layer"
            )
        sizes = [inputs, *hidden]
        self.hidden = nn.ModuleList(
            _Layer(sizes[k], sizes[k + 1], dropout[k], norm=k + 1 < len(hidden)) for k in range(len(hidden))
        )
        self.output = nn.Linear(sizes[-1], 1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Standardised features `(N, inputs)` to the last hidden layer `(N, hidden[-1])`."""
        for layer in self.hidden:
            x = layer(x)
        return x

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """The last hidden layer `(N, hidden[-1])` to logits `(N, 1)` of the second class."""
        return self.output(features)

    def head(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """One input's last hidden layer `(1, hidden[-1])` to its outputs: logit `()` and probability `()` of the second
        class."""
        logit = self.logits(features)[0, 0]
        return {"logit": logit, "probability": torch.sigmoid(logit)}


class _Layer(nn.Module):
    def __init__(self, inputs: int, units: int, dropout: float, norm: bool):
        super().__init__()
        self.linear = nn.Linear(inputs, units)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.BatchNorm1d(units, eps=1e-3, momentum=0.01) if norm else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.dropout(torch.relu(self.linear(x))))
