"""Rounding a waveform to integers, as a file of linear PCM does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from skewless.core.stages.stage import Signal, Stage, Tolerance


@dataclass(frozen=True)
class Pcm(Stage, name="pcm"):
    """Linear PCM: samples as integers of `bits` bits, and back to full scale 1. `(..., N)` float32 in, the same out.

    A sample x becomes an integer n of x 2^(bits - 1), clipped to [-2^(bits - 1), 2^(bits - 1) - 1]; the output is
    n / 2^(bits - 1). So it lies in [-1, 1 - 2^(1 - bits)], and samples above full scale are clipped.

    floor: the bits below the last one are dropped, as libsndfile writes float samples (src/pcm.c, f2les_clip_array and its
        like, which soundfile uses): x 2^31 is rounded to an integer first, half to even, and shifted right. So 0.9 of a step
        becomes 0, and -0.1 of a step becomes -1. With 32 bits nothing is dropped: it is the same as nearest.
    nearest: half to even, as FFmpeg writes float samples.
    truncate: towards zero, as a C cast does, and NumPy's `astype`.

    A float32 number has 24 significant bits, so `bits: 32` does little but clip. `peak_normalize` divides by the peak of the decoded
    recording, so a `pcm` in front of it does not change what it divides by.
    """

    unit: ClassVar[str] = "full scale"
    tolerance: ClassVar[Tolerance] = Tolerance(2e-6, 2e-4, "a sample near a step may round to the next one")

    bits: Literal[16, 24, 32]
    rounding: Literal["floor", "nearest", "truncate"]

    def __call__(self, signal: Signal) -> Signal:
        # Products and quotients with a power of two are exact in float32.
        steps = 2.0 ** (self.bits - 1)
        if self.rounding == "floor":
            integers = torch.floor(torch.round(signal.data * 2.0**31) / 2.0 ** (32 - self.bits))
        elif self.rounding == "nearest":
            integers = torch.round(signal.data * steps)
        else:
            integers = torch.trunc(signal.data * steps)
        # The highest of 32 bits is 2^31 - 1, whose nearest float32 is 2^31: the output is 1, as libsndfile reads it. Integers
        # have no negative zero, which the sum takes away.
        return signal.of(integers.clamp(-steps, steps - 1) / steps + 0.0)
