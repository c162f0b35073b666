"""The methods of `tf.image.resize` that PyTorch does not have, with the weights that TensorFlow's kernels on the CPU give.

A new pixel is a weighted mean of neighbouring ones, first along columns, then along rows. The weights are made in float32, in
TensorFlow's order, because a place in a large picture has few digits left there: scale_and_translate_op.cc, sampling_kernels.h,
resize_bicubic_op.cc and resize_area_op.cc of TensorFlow 2.21.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float32]


class Kernel(NamedTuple):
    """What a neighbour counts, by its distance in pixels; nothing beyond `radius`."""

    radius: float
    weigh: Callable[[Array], Array]


def _lanczos(radius: int) -> Kernel:
    """C. E. Duchon, "Lanczos Filtering in One and Two Dimensions", 1979."""
    return Kernel(radius, lambda x: np.sinc(x) * np.sinc(x / np.float32(radius)))


def _keys(x: Array) -> Array:
    """R. G. Keys, "Cubic Convolution Interpolation for Digital Image Processing", 1981: his a is -0.5."""
    near, far = ((1.5 * x - 2.5) * x) * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, far)


def _mitchell(x: Array) -> Array:
    """D. P. Mitchell and A. N. Netravali, "Reconstruction Filters in Computer Graphics", 1988: B and C are 1/3."""
    near, far = (7 / 6 * x - 2) * x * x + 8 / 9, ((-7 / 18 * x + 2) * x - 10 / 3) * x + 16 / 9
    return np.where(x < 1, near, far)


KERNELS = {
    "lanczos3": _lanczos(3),
    "lanczos5": _lanczos(5),
    # The standard deviation is half a pixel.
    "gaussian": Kernel(1.5, lambda x: np.exp(-2 * x * x)),
    "mitchellcubic": Kernel(2, _mitchell),
}


class Windows(NamedTuple):
    """Along one axis: each new pixel is the sum of `weights` `(after, span)` times the old ones from `starts` `(after,)` on.

    A window reaches over the picture's end only with weights of 0.
    """

    starts: NDArray[np.intp]
    weights: Array


def windows(before: int, after: int, method: str, antialias: bool) -> Windows:
    """From `before` pixels to `after`, by bicubic, area or one of KERNELS.

    antialias: stretch the kernel with the reduction. bicubic here has none; area always averages all that is covered.
    """
    if method == "area":
        return _area(before, after)
    if method == "bicubic":
        return _bicubic(before, after)
    return _kernel(before, after, KERNELS[method], antialias)


def _kernel(before: int, after: int, kernel: Kernel, antialias: bool) -> Windows:
    inverse = np.float32(1) / (np.float32(after) / np.float32(before))
    stretch = np.float32(max(float(inverse), 1.0) if antialias else 1.0)
    reach = np.float32(kernel.radius) * stretch
    places = (np.arange(after, dtype=np.float32) + np.float32(0.5)) * inverse
    first = np.clip(np.ceil(places - reach - np.float32(0.5)).astype(np.intp), 0, before - 1)
    last = np.clip(np.floor(places + reach - np.float32(0.5)).astype(np.intp), 0, before - 1)
    sources = first[:, None] + np.arange(int((last - first).max()) + 1)
    distances = np.abs((sources.astype(np.float32) + np.float32(0.5) - places[:, None]) / stretch)
    weights = np.where((sources <= last[:, None]) & (distances <= kernel.radius), kernel.weigh(distances), 0)
    return Windows(first, _to_one(weights))


# TensorFlow looks the bicubic kernel up, at distances rounded to this many steps per pixel.
_STEPS = 1024


def _bicubic(before: int, after: int) -> Windows:
    scale = np.float32(before) / np.float32(after)
    places = (np.arange(after, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    below = np.floor(places)
    offset = np.rint((places - below) * np.float32(_STEPS))
    first = below.astype(np.intp) - 1
    sources = first[:, None] + np.arange(4)
    distances = np.abs(np.arange(-1, 3) - offset[:, None] / np.float32(_STEPS)).astype(np.float32)
    weights = np.where((sources >= 0) & (sources < before), _keys(distances), 0)
    return _inside(Windows(first, _to_one(weights)), before)


def _area(before: int, after: int) -> Windows:
    """Each old pixel counts as much of it as the new one covers."""
    scale = np.float32(before) / np.float32(after)
    starts = np.arange(after, dtype=np.float32) * scale
    ends = np.arange(1, after + 1, dtype=np.float32) * scale
    first = np.floor(starts).astype(np.intp)
    sources = first[:, None] + np.arange(int((np.ceil(ends) - first).max()))
    covered = np.minimum(sources + 1, ends[:, None]) - np.maximum(sources, starts[:, None])
    return _inside(Windows(first, np.maximum(covered, 0).astype(np.float32) / scale), before)


def _to_one(weights: NDArray) -> Array:
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _inside(given: Windows, before: int) -> Windows:
    """The same weights, in windows that begin at the first pixel or behind it."""
    outside = np.minimum(given.starts, 0)
    weights = np.stack([np.roll(row, shift) for row, shift in zip(given.weights, outside, strict=True)])
    return Windows(given.starts - outside, weights)


def resize(picture: torch.Tensor, height: int, width: int, method: str, antialias: bool) -> torch.Tensor:
    """`(N, C, H, W)` float32 to `(N, C, height, width)`, by one of the methods of `windows`."""
    rows = windows(picture.shape[2], height, method, antialias)
    lower = torch.stack([w @ picture[:, :, s : s + len(w)] for s, w in _each(rows, picture.shape[2])], dim=2)
    columns = windows(picture.shape[3], width, method, antialias)
    return torch.stack([lower[..., s : s + len(w)] @ w for s, w in _each(columns, picture.shape[3])], dim=3)


def _each(given: Windows, before: int) -> list[tuple[int, torch.Tensor]]:
    return [
        (int(start), torch.from_numpy(weights[: before - start].copy()))
        for start, weights in zip(given.starts, given.weights, strict=True)
    ]
