"""What TensorFlow's own resizing gives: writes tensorflow_resize.npz, which tests/test_resize.py reads.

TensorFlow is not among this project's packages. In a virtual environment of its own, in the repository's root:

    python3 -m venv tf && tf/bin/pip install tensorflow-cpu==2.21.0 && tf/bin/python tests/oracles/tensorflow_resize.py
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

DATA = Path(__file__).with_suffix(".npz")
METHODS = ("bilinear", "nearest", "bicubic", "lanczos3", "lanczos5", "area", "gaussian", "mitchellcubic")
# Height and width before and after: enlarged, reduced, one of each, by whole numbers, the same, from and to one pixel.
SIZES = (
    ((6, 7), (13, 11)),
    ((31, 23), (7, 5)),
    ((31, 23), (9, 29)),
    ((30, 40), (10, 8)),
    ((100, 3), (12, 7)),
    ((12, 9), (12, 9)),
    ((1, 5), (4, 1)),
    ((2, 3001), (1, 224)),
)


def picture(size: tuple[int, int]) -> np.ndarray:
    """Noise of whole levels `(height, width)`, no two places alike."""
    return np.random.default_rng(size).integers(0, 256, size).astype(np.float32)


def name_of(method: str, antialias: bool, before: tuple[int, int], after: tuple[int, int]) -> str:
    return f"{method}-{antialias}-{before[0]}x{before[1]}-{after[0]}x{after[1]}"


def main() -> None:
    import tensorflow as tf

    found = {}
    for method, antialias in itertools.product(METHODS, (False, True)):
        # As in tf.data's pipelines of files: where TensorFlow knows a picture's size beforehand, it leaves one of the wanted size
        # alone, which for the kernels that smooth is another picture.
        @tf.function(input_signature=[tf.TensorSpec((1, None, None, 1)), tf.TensorSpec(2, tf.int32)])
        def resize(given, size, method=method, antialias=antialias):
            return tf.image.resize(given, size, method=method, antialias=antialias)

        for before, after in SIZES:
            resized = resize(picture(before)[None, ..., None], after)
            found[name_of(method, antialias, before, after)] = resized.numpy()[0, ..., 0]
    np.savez_compressed(DATA, **found)
    print(f"{DATA}: {len(found)} pictures by TensorFlow {tf.__version__}")


if __name__ == "__main__":
    main()
