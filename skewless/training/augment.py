"""Augmentation of scaled spectrograms, `(S, F, T)` in [-1, 1], where 80 dB span the range.

They come letterboxed out of the cache: gain and noise reach the padding, too.

Gain, background noise and SpecAugment's time and frequency masks (D. S. Park et al., "SpecAugment: A Simple Data
Augmentation Method for Automatic Speech Recognition", Interspeech 2019).
"""

from __future__ import annotations

import torch

_DB = 2.0 / 80.0  # one decibel, in scaled units


def augment(
    spectrograms: torch.Tensor,
    generator: torch.Generator,
    *,
    gain_db: float = 6.0,
    noise_db: float = 2.0,
    mask_frequency: int = 24,
    mask_time: int = 32,
) -> torch.Tensor:
    """A randomly changed float32 copy: one gain within +-`gain_db` for the whole recording, Gaussian noise of up to
    `noise_db` standard deviation, and per segment one frequency and one time mask of up to the given widths, filled
    with the floor. Stays within [-1, 1]."""
    x = spectrograms.float()
    segments, frequencies, times = x.shape
    x = x + (2 * torch.rand((), generator=generator) - 1) * gain_db * _DB
    x = x + torch.randn(x.shape, generator=generator) * torch.rand((), generator=generator) * noise_db * _DB
    x = x.clamp(-1.0, 1.0)
    x = x.masked_fill(_bands(segments, frequencies, mask_frequency, generator).unsqueeze(2), -1.0)
    return x.masked_fill(_bands(segments, times, mask_time, generator).unsqueeze(1), -1.0)


def _bands(segments: int, length: int, widest: int, generator: torch.Generator) -> torch.Tensor:
    """One random band per segment: `(segments, length)` bool."""
    width = torch.randint(0, widest + 1, (segments, 1), generator=generator)
    start = (torch.rand((segments, 1), generator=generator) * (length - width + 1)).long()
    position = torch.arange(length)
    return (position >= start) & (position < start + width)
