"""Every method of `resize` against the library that it is named after: TensorFlow's recorded outputs, Pillow, and Keras."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from skewless.core.stages import PipelineError, Signal
from skewless.core.stages.image import Resize
from tests.keras_on_torch import keras
from tests.oracles import tensorflow_resize as tensorflow
from tests.test_portrait import PIPELINE, encoded, picture, same_as_the_plain_stages

PILLOW = {
    "pil_nearest": Image.Resampling.NEAREST,
    "pil_box": Image.Resampling.BOX,
    "pil_bilinear": Image.Resampling.BILINEAR,
    "pil_hamming": Image.Resampling.HAMMING,
    "pil_bicubic": Image.Resampling.BICUBIC,
    "pil_lanczos": Image.Resampling.LANCZOS,
}
WITHOUT_A_CHOICE = ("nearest", "area", *PILLOW)
WAYS = [(m, a) for m in tensorflow.METHODS for a in (False, True) if not a or m not in WITHOUT_A_CHOICE]


def resized(pixels: NDArray[Any], method: str, size: tuple[int, int], antialias: bool = False) -> NDArray[np.float32]:
    """Of a picture `(H, W)` or `(H, W, C)`, likewise."""
    planes = pixels[..., None] if pixels.ndim == 2 else pixels
    data = torch.from_numpy(planes.astype(np.float32)).permute(2, 0, 1)[None].contiguous()
    result = Resize(*size, method, antialias)(Signal(data)).data
    assert result.dtype == torch.float32 and result.shape == (1, planes.shape[2], *size)
    return result[0].permute(1, 2, 0).numpy().reshape(*size, *pixels.shape[2:])


@pytest.fixture(scope="module")
def recorded() -> dict[str, NDArray[np.float32]]:
    with np.load(tensorflow.DATA) as data:
        return dict(data)


@pytest.mark.parametrize(("method", "antialias"), WAYS)
@pytest.mark.parametrize(("before", "after"), tensorflow.SIZES)
def test_as_tensorflow_does(recorded, method: str, antialias: bool, before: tuple[int, int], after: tuple[int, int]):
    expected = recorded[tensorflow.name_of(method, antialias, before, after)]
    # Of 255 levels; sums in another order. 2.7e-4 measured.
    assert np.abs(resized(tensorflow.picture(before), method, after, antialias) - expected).max() <= 4e-4


def test_the_recorded_outputs_tell_all_ways_apart(recorded):
    """Or a mistaken name would pass."""
    found = [recorded[tensorflow.name_of(*way, (31, 23), (7, 5))] for way in WAYS]
    apart = [np.abs(a - b).max() for i, a in enumerate(found) for b in found[:i]]
    assert min(apart) > 1


@pytest.mark.parametrize("method", ["nearest", "area"])
def test_where_tensorflow_has_no_choice_antialias_changes_nothing(recorded, method: str):
    for size in tensorflow.SIZES:
        plain, smooth = (recorded[tensorflow.name_of(method, antialias, *size)] for antialias in (False, True))
        assert np.array_equal(plain, smooth)


@pytest.mark.parametrize("method", PILLOW)
@pytest.mark.parametrize("size", [(224, 224), (7, 31), (301, 11), (97, 64)])
def test_as_pillow_does(method: str, size: tuple[int, int]):
    pixels = picture(97, 64)
    expected = Image.fromarray(pixels).resize(size[::-1], PILLOW[method])
    assert np.array_equal(resized(pixels, method, size), np.asarray(expected))


def test_pillow_resizes_by_bicubic_unless_told_otherwise():
    pixels = picture(97, 64)
    assert np.array_equal(
        resized(pixels, "pil_bicubic", (50, 80)), np.asarray(Image.fromarray(pixels).resize((80, 50)))
    )


@pytest.mark.parametrize(("method", "antialias"), [("bilinear", False), ("bilinear", True), ("nearest", False)])
def test_as_keras_does_on_pytorch(method: str, antialias: bool):
    pixels = picture(97, 64).astype(np.float32)
    expected = keras.ops.image.resize(pixels, (50, 80), interpolation=method, antialias=antialias).numpy()
    assert np.array_equal(resized(pixels, method, (50, 80), antialias), expected)


def test_keras_on_pytorch_has_another_bicubic():
    """What the importer's note on such a layer says."""
    pixels = picture(97, 64).astype(np.float32)
    other = keras.ops.image.resize(pixels, (50, 80), interpolation="bicubic").numpy()
    assert np.abs(resized(pixels, "bicubic", (50, 80)) - other).max() > 1


@pytest.mark.parametrize("method", WITHOUT_A_CHOICE)
def test_antialias_is_refused_where_there_is_no_choice(method: str):
    with pytest.raises(PipelineError, match=f"antialias is true, expected false: {method} has no choice"):
        Resize(224, 224, method, antialias=True)


@pytest.mark.parametrize("method", [*tensorflow.METHODS, *PILLOW])
def test_a_served_picture_is_resized_as_in_training(method: str):
    data = encoded(picture(300, 200), "PNG")
    for antialias in (False,) if method in WITHOUT_A_CHOICE else (False, True):
        resize = dataclasses.replace(PIPELINE.stages["resize"], method=method, antialias=antialias)
        same_as_the_plain_stages(data, PIPELINE.replace(resize=resize))
