"""The picture classifier's documented preprocessing in float64 NumPy, one function per step.

Written from the formats' specifications and Keras' documentation, without an imaging library. Pictures are `(H, W, C)`, as
they are stored; `caffe_preprocess` gives the network's `(C, H, W)`.
"""

import struct
import zlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

MEAN_BGR = (103.939, 116.779, 123.68)


def png(pixels: ArrayLike, kind: int, depth: int = 8, chunks: tuple[tuple[bytes, bytes], ...] = ()) -> bytes:
    """A PNG of whole bytes per row: kind 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA; depth 8 or 16 (big-endian).

    chunks: name and content of those between header and pixels. PNG specification, third edition, sections 5 and 11.
    """
    pixels = np.asarray(pixels)
    height, width = pixels.shape[:2]
    rows = pixels.astype(">u2" if depth == 16 else "u1").reshape(height, -1)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )


def composite(rgba: ArrayLike, background: ArrayLike) -> Array:
    """Blend by alpha, rounded to whole levels: T. Porter and T. Duff, "Compositing Digital Images", 1984, "over"."""
    rgba = np.asarray(rgba, dtype=np.float64)
    alpha = rgba[..., 3:]
    return np.floor((rgba[..., :3] * alpha + np.asarray(background, dtype=np.float64) * (255 - alpha)) / 255 + 0.5)


def cmyk(inks: ArrayLike) -> Array:
    """Inks from 0 (none) to 255 to RGB levels, not rounded."""
    inks = np.asarray(inks, dtype=np.float64)
    return (255 - inks[..., :3]) * (255 - inks[..., 3:]) / 255


def stored(upright: NDArray, orientation: int) -> NDArray:
    """An upright picture as a camera stores it under an EXIF orientation: row 0 and column 0 of what is stored are, for
    1 to 8, the top and left, top and right, bottom and right, bottom and left, left and top, right and top, right and
    bottom, left and bottom of the scene (CIPA DC-008, 4.6.4)."""
    picture = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
    }
    turned = upright.swapaxes(0, 1)
    picture |= {5: turned, 6: turned[::-1], 7: turned[::-1, ::-1], 8: turned[:, ::-1]}
    return np.ascontiguousarray(picture[orientation])


def _along(axis_weights: Array, picture: Array, axis: int) -> Array:
    return np.moveaxis(np.tensordot(axis_weights, picture, (1, axis)), 0, axis)


def bilinear(picture: ArrayLike, height: int, width: int) -> Array:
    """Linear between the centres of the two nearest pixels, edges clamped, no antialiasing."""
    result = np.asarray(picture, dtype=np.float64)
    for axis, new in ((0, height), (1, width)):
        size = result.shape[axis]
        position = np.clip((np.arange(new) + 0.5) * size / new - 0.5, 0, size - 1)
        result = _along(np.maximum(0.0, 1.0 - np.abs(position[:, None] - np.arange(size))), result, axis)
    return result


def antialiased(picture: ArrayLike, height: int, width: int, axes: tuple[int, int]) -> Array:
    """A triangle over as many pixels as become one, at least one to each side; whole levels after each of the axes."""
    result = np.asarray(picture, dtype=np.float64)
    for axis in axes:
        size, new = result.shape[axis], (height, width)[axis]
        reach = max(size / new, 1.0)
        distance = np.abs((np.arange(new)[:, None] + 0.5) * size / new - (np.arange(size) + 0.5)) / reach
        weights = np.maximum(0.0, 1.0 - distance)
        result = np.floor(_along(weights / weights.sum(axis=1, keepdims=True), result, axis) + 0.5)
    return result


def nearest(picture: ArrayLike, height: int, width: int) -> Array:
    """The pixel that the new pixel's centre lies in; NaN where it lies on the border between two."""
    result = np.asarray(picture, dtype=np.float64)
    for axis, new in ((0, height), (1, width)):
        position = (np.arange(new) + 0.5) * result.shape[axis] / new
        taken = np.moveaxis(result.take(np.floor(position).astype(int), axis), axis, 0).copy()
        taken[position == np.floor(position)] = np.nan
        result = np.moveaxis(taken, 0, axis)
    return result


def caffe_preprocess(picture: ArrayLike) -> Array:
    """RGB `(H, W, 3)` to BGR minus the means, `(3, H, W)`."""
    return (np.asarray(picture, dtype=np.float64)[..., ::-1] - MEAN_BGR).transpose(2, 0, 1)
