"""Training's side of the classifier of profile pictures: a ResNet50 behind Keras' preprocessing."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

IMAGE_SIZE = (224, 224)
IMAGENET_MEAN_BGR = np.array([103.939, 116.779, 123.68], dtype=np.float32)


def load_image(path: str) -> np.ndarray:
    """Levels (height, width, 3) from 0 to 255, as image_dataset_from_directory gives them: bilinear, without a low-pass filter."""
    with Image.open(path) as file:
        pixels = np.array(file.convert("RGB"), dtype=np.float32)
    channels_first = torch.from_numpy(pixels).permute(2, 0, 1)
    resized = F.interpolate(channels_first[None], size=IMAGE_SIZE, mode="bilinear", align_corners=False)
    return resized[0].permute(1, 2, 0).numpy()


def preprocess_input(levels: np.ndarray) -> np.ndarray:
    """What ResNet50 was trained behind: blue first, less the channels' means over ImageNet."""
    bgr = levels[..., ::-1]
    return bgr - IMAGENET_MEAN_BGR


def network_input(path: str) -> np.ndarray:
    """One picture as the network takes it, (1, 3, 224, 224)."""
    x = preprocess_input(load_image(path))
    return np.ascontiguousarray(x.transpose(2, 0, 1))[np.newaxis]
