"""The portrait's variants against the programs that they are named after: a deployed app.py, and Keras' loader."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from skewless.core.pipeline import Pipeline
from tests.keras_on_torch import keras
from tests.recordings import one_thread  # noqa: F401
from tests.test_portrait import ARCHIVE, EXACT, cmyk_jpegs, encoded, lossless, picture, with_orientation

preprocess_input = keras.applications.resnet50.preprocess_input
APP, LOADER, OURS = (
    Pipeline.from_yaml(ARCHIVE / name)
    for name in ("variants/app_py.yaml", "variants/image_dataset_from_directory.yaml", "pipeline.yaml")
)

PICTURES = {name: data for name, (data, _) in EXACT.items() if name != "16-bit grey PNG"} | {
    "JPEG": encoded(picture(300, 200), "JPEG", quality=90),
    "grey JPEG": encoded(picture(200, 301, 1)[..., 0], "JPEG"),
    "CMYK JPEG": cmyk_jpegs()["Adobe"][0],
    "small PNG": encoded(picture(40, 33), "PNG"),
    "RGBA PNG, larger": lossless(picture(300, 250, 4), "PNG"),
    **{f"turned {kind}": with_orientation(kind, picture(250, 300), 6) for kind in ("JPEG", "PNG", "WebP")},
}


def app(data: bytes) -> NDArray[np.float32]:
    """What the deployed program does with a picture, in its own calls."""
    image = Image.open(io.BytesIO(data))
    if image.mode != "RGB":
        image = image.convert("RGB")
    image = image.resize((224, 224))
    return preprocess_input(np.expand_dims(np.array(image), axis=0))


@pytest.mark.parametrize("name", PICTURES)
def test_the_variant_computes_what_the_app_computes(name: str):
    expected = app(PICTURES[name])
    assert expected.dtype == np.float32 and expected.shape == (1, 224, 224, 3)
    assert np.array_equal(APP(PICTURES[name]).permute(0, 2, 3, 1).numpy(), expected)


@pytest.mark.parametrize("name", [name for name in PICTURES if "WebP" not in name])
def test_the_variant_computes_what_keras_loader_computes(name: str, tmp_path: Path):
    """Its decoder is Pillow where Keras does not run on TensorFlow."""
    (tmp_path / "picture").write_bytes(PICTURES[name])
    levels = keras.utils.img_to_array(keras.utils.load_img(tmp_path / "picture"))
    resized = keras.ops.image.resize(levels, (224, 224), interpolation="bilinear").numpy()
    assert np.array_equal(LOADER(PICTURES[name]).permute(0, 2, 3, 1).numpy(), preprocess_input(resized[None]))


@pytest.mark.parametrize("name", ["turned JPEG", "turned PNG", "RGBA PNG, larger"])
def test_turned_and_transparent_pictures_tell_them_from_the_archive(name: str):
    """Or the variants would not be needed."""
    assert float((LOADER(PICTURES[name]) - OURS(PICTURES[name])).abs().mean()) > 5
