"""Small synthetic recordings and images for the self-test, each of which is sensitive to other stages: an impulse shows a
filter's response, clipped noise where a filter overshoots."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from typing import Unpack

import numpy as np
import scipy.signal
import soundfile
import torch
from PIL import Image

from skewless.core.numerics import all_finite
from skewless.core.pipeline import Pipeline
from skewless.core.stages import InputError, InputLimits, PipelineError

SECONDS = 2.5  # a second window, so that what couples windows shows

# Noise under every signal: a bin without any holds nothing but rounding, which differs from processor to processor.
_FLOOR = 1e-2

_STEREO = "impulse.wav"


def probes(reads: str) -> dict[str, bytes]:
    """File name to bytes, for a pipeline that reads "audio" or "image"; the same bytes every time.

    Raises ValueError for anything else.
    """
    made = {"audio": recordings, "image": images}.get(reads)
    if made is None:
        raise ValueError(
            f"the pipeline's first stage reads {reads!r}, expected 'audio' or 'image': set `reads` in the stage's class"
        )
    return made()


def try_probes(pipeline: Pipeline, **limits: Unpack[InputLimits]) -> tuple[dict[str, bytes], dict[str, str]]:
    """The probes that the pipeline takes, and the others with the reason for which it refuses them; by file name.

    limits: as `Pipeline.run` takes them.
    Raises PipelineError for a pipeline that fails on a probe, as one without a downmix does on the stereo one: such a file
    would be the server's fault, not its sender's.
    """
    taken, refused = {}, {}
    for name, payload, found in _tried(pipeline, **limits):
        if isinstance(found, torch.Tensor):
            taken[name] = payload
        else:
            refused[name] = found
    return taken, refused


def network_inputs(pipeline: Pipeline) -> Iterator[torch.Tensor]:
    """What the pipeline gives for each probe that it accepts, `(S, ...)`, computed as it is asked for; a row of zeros, `(1, ...)`,
    where a probe is shorter than a window, so that there is always an input of the network's shape. A picture below its
    smallest size, for one, it refuses.

    Raises PipelineError as `try_probes` does.
    """
    for _, _, rows in _tried(pipeline):
        if isinstance(rows, torch.Tensor):
            yield rows if len(rows) else rows.new_zeros(1, *rows.shape[1:])


def _tried(pipeline: Pipeline, **limits: Unpack[InputLimits]) -> Iterator[tuple[str, bytes, torch.Tensor | str]]:
    """Each probe's name and bytes, and what the pipeline gives for it or why it refuses it."""
    for name, payload in probes(pipeline.reads).items():
        try:
            # What torchaudio remarks on a filterbank is for whoever writes the pipeline.
            with warnings.catch_warnings(action="ignore", category=UserWarning):
                data = pipeline.run(payload, **limits).data
        except InputError as error:
            yield name, payload, str(error)
        except Exception as error:  # whatever a stage of one's own raises
            what = "a stereo recording" if name == _STEREO else "such a file"
            raise PipelineError(
                f"pipeline '{pipeline.name}' cannot take {what}, the probe {name}: {str(error) or type(error).__name__}"
            ) from error
        else:
            finite = all_finite(data)
            yield (
                name,
                payload,
                data if finite else "what the network would take of it has values that are NaN or infinite",
            )


def recordings() -> dict[str, bytes]:
    """WAV files.

    impulse: every filter's response, and in stereo the downmix. chirp: the resampler's pass band, 20 Hz to 20 kHz.
    speech_band: noise from 300 to 3400 Hz. offset_and_rumble: what a high-pass is for. near_silence: a few steps of 24
    bits, where a floor or a normalisation decides. clipped: full scale, 8 bits, where a filter overshoots.
    """
    rng = np.random.RandomState(0)  # its stream is frozen across NumPy's versions
    signals = {
        "impulse": (_impulse(rng, 44100), 44100, "PCM_16"),
        "chirp": (_chirp(rng, 48000), 48000, "PCM_16"),
        "speech_band": (_speech_band(rng, 22050), 22050, "PCM_16"),
        "offset_and_rumble": (_offset_and_rumble(rng, 16000), 16000, "PCM_16"),
        "near_silence": (1e-6 * rng.randn(int(SECONDS * 32000)), 32000, "PCM_24"),
        "clipped": (_clipped(rng, 8000), 8000, "PCM_U8"),
    }
    return {f"{name}.wav": _wav(*signal) for name, signal in signals.items()}


def images() -> dict[str, bytes]:
    """PNG and JPEG files.

    colour_bars: the order of the channels. one_pixel_checks: a resampler's antialiasing. gradient: its half-pixel
    centres, on odd sides. transparent: what stands behind alpha. turned: EXIF's orientation. grey_16_bit, palette: other
    pixel formats.
    """
    y, x = np.mgrid[0:97, 0:131]
    rgb = np.stack([2 * x % 256, 2 * y % 256, (x + y) % 256], axis=-1).astype(np.uint8)
    bars = np.zeros((64, 96, 3), np.uint8)
    for k in range(3):
        bars[:, 32 * k : 32 * (k + 1), k] = 255
    checks = (255 * (np.indices((300, 300)).sum(axis=0) % 2)).astype(np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6  # shown after a quarter turn clockwise
    made = {
        "colour_bars.png": (Image.fromarray(bars), {}),
        "one_pixel_checks.png": (Image.fromarray(checks), {}),
        "gradient.png": (Image.fromarray(rgb), {}),
        "transparent.png": (Image.fromarray(np.dstack([rgb, (2 * x % 256).astype(np.uint8)])), {}),
        "turned.jpg": (Image.fromarray(rgb), {"exif": turned, "quality": 90}),
        "grey_16_bit.png": (Image.fromarray((400 * x).astype(np.uint16)), {}),
        "palette.png": (Image.fromarray(rgb).quantize(16), {}),
    }
    return {name: _encoded(image, name, options) for name, (image, options) in made.items()}


def _encoded(image: Image.Image, name: str, options: dict) -> bytes:
    file = io.BytesIO()
    image.save(file, format="JPEG" if name.endswith(".jpg") else "PNG", **options)
    return file.getvalue()


def _time(rate: int) -> np.ndarray:
    return np.arange(int(SECONDS * rate)) / rate


def _impulse(rng: np.random.RandomState, rate: int) -> np.ndarray:
    x = _FLOOR * rng.randn(int(SECONDS * rate), 2)
    x[rate // 2, 0], x[rate, 1] = 0.9, -0.5
    return x


def _chirp(rng: np.random.RandomState, rate: int) -> np.ndarray:
    t = _time(rate)
    return 0.5 * scipy.signal.chirp(t, 20, SECONDS, 20000, "logarithmic") + _FLOOR * rng.randn(len(t))


def _clipped(rng: np.random.RandomState, rate: int) -> np.ndarray:
    t = _time(rate)
    return np.clip(3 * np.sin(2 * np.pi * 220 * t) + rng.randn(len(t)), -1, 1)


def _speech_band(rng: np.random.RandomState, rate: int) -> np.ndarray:
    sos = scipy.signal.butter(4, (300, 3400), "bandpass", fs=rate, output="sos")
    x = scipy.signal.sosfilt(sos, rng.randn(int(SECONDS * rate)))
    return 0.3 * x / np.abs(x).max() + _FLOOR * rng.randn(len(x))


def _offset_and_rumble(rng: np.random.RandomState, rate: int) -> np.ndarray:
    t = _time(rate)
    return 0.2 + 0.3 * np.sin(2 * np.pi * 18 * t) + 0.02 * rng.randn(len(t))


def _wav(samples: np.ndarray, rate: int, subtype: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype=subtype)
    return file.getvalue()
