"""What the network gets in training: cached inputs, augmented where the recipe says so, or features of a frozen encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from skewless.core.networks import Network
from skewless.training.augment import augment
from skewless.training.cache import Entry, StageCache

_SMALL = 4096  # values


class Inputs:
    """A training or validation entry as the network's input, or, once frozen, as its features.

    augmentation: whether an entry that is asked for with a generator is augmented.
    """

    def __init__(self, network: Network, cache: StageCache, augmentation: bool, device: torch.device):
        self._network, self._cache, self._device = network, cache, device
        self._augmentation = augmentation
        self._features: dict[Path, torch.Tensor] = {}
        self._small: dict[Path, torch.Tensor] = {}

    @property
    def frozen(self) -> bool:
        return bool(self._features)

    def __call__(self, entry: Entry, generator: torch.Generator | None = None) -> torch.Tensor:
        """`(S, ...)` on the device; augmented where a generator is given and the recipe says so."""
        if self.frozen:
            return self._features[entry.path]
        kept = self._small.get(entry.path)
        if kept is None:
            kept = self._cache.load(entry.path)
            # A row of features takes longer to find on disk than all the rest of its step.
            if kept.numel() <= _SMALL:
                self._small[entry.path] = kept
        if generator is not None and self._augmentation:
            kept = augment(kept, generator)
        return self._cache.finish(kept).to(self._device)

    def freeze(self, entries: Sequence[Entry]) -> None:
        """Encode every entry once; from here on features are what is given."""
        self._network.eval()
        features = {}
        for entry in tqdm(entries, desc="features", unit="file"):
            with torch.no_grad():
                features[entry.path] = self._network.encode(self(entry))
        self._features = features


def measure_batch_statistics(
    network: Network, inputs: Callable[[Entry], torch.Tensor], entries: Sequence[Entry], batch_size: int
) -> None:
    """Batch normalisation's running statistics as averages over one pass, for an encoder that is not trained."""
    layers = [m for m in network.modules() if isinstance(m, _BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    network.train()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # PyTorch then averages over all batches
    for start in tqdm(range(0, len(entries), batch_size), desc="batch statistics", unit="batch"):
        batch = torch.cat([inputs(entry) for entry in entries[start : start + batch_size]])
        if len(batch) > 1:
            with torch.no_grad():
                network.encode(batch)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
