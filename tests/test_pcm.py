"""Rounding samples to integers: against files that soundfile writes, and by hand."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile
import torch
from numpy.typing import NDArray

from skewless.core.pipeline import Pipeline
from skewless.core.stages import STAGES, PipelineError, Signal
from tests import recordings

BITS = (16, 24, 32)
RNG = np.random.default_rng(0)
# Loud and faint noise, every half step of 16 and of 32 bits around zero, full scale and beyond.
SAMPLES = np.concatenate(
    [
        *(RNG.uniform(-size, size, 50_000) for size in (1.3, 1e-4, 1e-8, 1e-10)),
        np.arange(-66_000, 66_000) / 2**16,
        np.arange(-3_000, 3_000) / 2**32,
        [1, -1, 1 - 2**-15, 1 - 2**-16, -1 - 2**-15, 1 - 2**-24, 1e9, -1e9, 1e38, -1e38, 0.0, -0.0, 1e-40, -1e-40],
    ]
).astype(np.float32)


def rounded(samples: NDArray[np.float32], bits: int, rounding: str) -> NDArray[np.float32]:
    return STAGES["pcm"](bits=bits, rounding=rounding)(Signal(torch.from_numpy(samples), 20000, {})).data.numpy()


@pytest.mark.parametrize("bits", BITS)
def test_floor_is_what_libsndfile_writes(bits):
    """Bit for bit, the sign of zero included."""
    file = io.BytesIO(recordings.wav(SAMPLES[None], 20000, f"PCM_{bits}"))
    want, _ = soundfile.read(file, dtype="float32")
    got = rounded(SAMPLES[None], bits, "floor")[0]
    assert got.dtype == np.float32
    assert np.array_equal(got.view(np.uint32), want.view(np.uint32))
    assert float(got.min()) == -1 and float(got.max()) == np.float32(1 - 2.0 ** (1 - bits))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rounding", "by_definition"), [("nearest", np.rint), ("truncate", np.trunc)])
def test_roundings_by_their_definition(bits, rounding, by_definition):
    """In float64, which holds all of these integers."""
    steps = 2.0 ** (bits - 1)
    want = by_definition(SAMPLES.astype(np.float64) * steps).clip(-steps, steps - 1) / steps
    assert np.array_equal(rounded(SAMPLES, bits, rounding), want.astype(np.float32))


@pytest.mark.parametrize(
    ("steps", "floor", "nearest", "truncate"),
    [
        (0.9, 0, 1, 0),
        (-0.1, -1, 0, 0),
        (-0.9, -1, -1, 0),
        (0.5, 0, 0, 0),
        (1.5, 1, 2, 1),
        (-1.5, -2, -2, -1),
        (7, 7, 7, 7),
    ],
)
def test_parts_of_a_step_by_hand(steps, floor, nearest, truncate):
    sample = np.array([steps / 2**15], dtype=np.float32)
    found = [float(rounded(sample, 16, rounding)[0] * 2**15) for rounding in ("floor", "nearest", "truncate")]
    assert found == [floor, nearest, truncate]


@pytest.mark.parametrize("rounding", ["floor", "nearest", "truncate"])
@pytest.mark.parametrize("bits", BITS)
def test_integers_stay_as_they_are(bits, rounding):
    once = rounded(SAMPLES, bits, rounding)
    assert np.array_equal(rounded(once, bits, rounding), once)


def test_shape_rate_and_metadata_stay():
    signal = Signal(torch.from_numpy(SAMPLES[:600].reshape(3, 200)), 8000, {"num_samples": 200, "peak": 1.3})
    out = STAGES["pcm"](bits=16, rounding="floor")(signal)
    assert (out.data.shape, out.rate, out.metadata) == ((3, 200), 8000, signal.metadata)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"bits": 16}, "missing parameter rounding"),
        ({"bits": 8, "rounding": "floor"}, "bits is 8, expected 16, 24 or 32"),
        ({"bits": 16, "rounding": "up"}, "rounding is 'up', expected 'floor', 'nearest' or 'truncate'"),
    ],
)
def test_wrong_parameters_are_refused(params, message):
    with pytest.raises(PipelineError, match=f"stage 'pcm'.*{message}"):
        Pipeline.from_dict({"name": "x", "stages": [{"decode": {}}, {"pcm": params}]})
