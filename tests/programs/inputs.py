"""Recordings and pictures for the programs beside this file, made in code: each call with the same arguments writes the same file."""

from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import ExifTags, Image


def recording(path: Path, rate: int = 22050, seconds: float = 3.3, channels: int = 2, seed: int = 0) -> Path:
    """Write a 16-bit WAV file with what preprocessing reacts to, and return its path.

    Bursts of noise and tones over the whole band, the loudest near full scale in all channels at once (sums of them overflow
    16 bits), quiet ones, pauses of one or two quantisation steps (more than 80 dB below), rumble at 25 Hz, a DC offset, and channels
    that differ. The first and the last tenth are pauses.

    With the defaults every skew of recordings in realistic/skews.py changes the result. One channel does not excite `first_channel`
    (and `int16_overflow` fails), 16,000 Hz not `other_resampler`, ten seconds or more, which fill all segments, not `padded_tail`.
    """
    rng = np.random.default_rng(seed)
    count = round(rate * seconds)
    time = np.arange(count) / rate
    shared = np.zeros(count)
    begin = 0.1 * seconds
    loudness = 0.9
    while begin < 0.85 * seconds:
        length = rng.uniform(0.1, 0.25)
        inside = (time >= begin) & (time < begin + length)
        envelope = np.exp(-(time[inside] - begin) / (0.3 * length)) * loudness
        tone = np.sin(2 * np.pi * rng.uniform(120, 0.4 * rate) * time[inside])
        shared[inside] = envelope * (0.5 * tone + 0.5 * rng.uniform(-1, 1, inside.sum()))
        shared[inside] += 0.05 * loudness * np.sin(2 * np.pi * 25 * time[inside])
        begin += length + rng.uniform(0.1, 0.35)
        loudness = 0.9 if loudness < 0.1 else loudness * 0.35
    shared *= 0.9 / np.abs(shared).max()
    gains = 1.0 - 0.15 * np.arange(channels)
    waveform = shared[:, None] * gains + rng.normal(0, 1.0 / 32768, (count, channels)) + 12 / 32768
    soundfile.write(path, np.clip(waveform, -1, 1), rate, subtype="PCM_16")
    return path


def picture(path: Path, width: int = 301, height: int = 217, orientation: int = 6, seed: int = 0) -> Path:
    """Write a colour picture of odd size, and return its path.

    orientation: EXIF's; 6 says that the picture has to be turned by 90 degrees, 1 that it is upright. The format is that of the path's suffix: ".jpg" or ".png". Fine noise and edges, colours that differ, no symmetry.
    """
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    pixels = np.stack([200 * x, 150 * y**2, 90 + 60 * np.sin(25 * x * y)], axis=-1)
    pixels[height // 5 : height // 2, width // 7 : width // 3] = (250, 40, 10)
    pixels += rng.normal(0, 12, pixels.shape)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options: dict[str, Any] = {"quality": 95} if path.suffix == ".jpg" else {}
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, exif=exif, **options)
    return path


if __name__ == "__main__":
    # python tests/programs/inputs.py recording.wav [CHANNELS]
    import sys

    recording(Path(sys.argv[1]), channels=int(sys.argv[2]) if len(sys.argv) > 2 else 1)
