"""The profile pictures' service as it was deployed first: no preprocess_input."""

from io import BytesIO

import numpy as np
from PIL import Image


def load_img(data: bytes) -> Image.Image:
    """A picture of 224 x 224, as keras.utils.load_img gives it: the nearest pixels."""
    picture = Image.open(BytesIO(data))
    if picture.mode != "RGB":
        picture = picture.convert("RGB")
    return picture.resize((224, 224), Image.Resampling.NEAREST)


def network_input(data: bytes) -> np.ndarray:
    img_array = np.asarray(load_img(data), dtype=np.float32)
    img_array = np.expand_dims(img_array, axis=0)
    return img_array.transpose(0, 3, 1, 2)
