"""The profile pictures' service after the first correction: the means are subtracted, but red stays first."""

import numpy as np
from serve import load_img

MEAN = (123.68, 116.779, 103.939)


def network_input(data: bytes) -> np.ndarray:
    levels = np.array(load_img(data), dtype=np.float32)
    for channel in range(3):
        levels[:, :, channel] -= MEAN[channel]
    return np.moveaxis(levels, -1, 0)[None]
