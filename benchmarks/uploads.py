"""The recordings that the serving benchmark uploads: five kinds, as phones and browsers make them, with real codecs.

The sounds are the synthetic coughs and not-coughs of `skewless.demos.cough`. The same versions of NumPy and of the codecs
make the same files.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from numpy.typing import NDArray
from scipy.signal import resample_poly

from skewless.demos.cough import RATE, Clip, encode, synthesize

SEED = 9


@dataclass(frozen=True)
class Upload:
    """One file. kind: such as "5 s WAV". seconds: the recording's length."""

    kind: str
    seconds: float
    payload: bytes


@dataclass(frozen=True)
class Made:
    """How one kind is made. clip: its number in the corpus of SEED; odd ones are coughs. All have two channels."""

    seconds: float
    container: str
    rate: int
    clip: int
    source: str

    def description(self) -> str:
        return f"{self.rate} Hz, 2 channels: {self.source}"


KINDS: Mapping[str, Made] = {
    "5 s WAV": Made(5.0, "wav", 44_100, 1, "a desktop recorder, 16 bits"),
    "5 s Ogg": Made(5.0, "ogg", 44_100, 2, "a desktop recorder, Vorbis"),
    "17.5 s WAV": Made(
        17.5, "wav", 48_000, 5, "a phone's recorder, 16 bits; the longest recording that is analysed whole"
    ),
    "9.8 s WebM": Made(9.8, "webm", 48_000, 8, "a browser's MediaRecorder, Opus, always at 48 kHz"),
    "60 s MP3": Made(60.0, "mp3", 44_100, 13, "an exported voice memo, 128 kbit/s"),
}
LONGEST_WHOLE = "17.5 s WAV"
SHORT = "5 s WAV"


def make_uploads() -> list[Upload]:
    """One upload of each kind, in the order in which they are sent."""
    return [Upload(kind, how.seconds, _encoded(_samples(how), how)) for kind, how in KINDS.items()]


def _samples(how: Made) -> NDArray[np.float32]:
    """`(2, samples)` at the kind's rate."""
    # The corpus writes WebM at 48 kHz always, the rate that its scenes are computed at.
    clip = synthesize(how.clip, SEED, min_seconds=how.seconds, max_seconds=how.seconds, formats=("webm",))
    ratio = Fraction(how.rate, RATE)
    heard = resample_poly(clip.samples, ratio.numerator, ratio.denominator, axis=1)[:, : round(how.seconds * how.rate)]
    # One microphone is sent in two channels by many phones and browsers.
    both = np.broadcast_to(heard, (2, heard.shape[1])) if len(heard) == 1 else heard
    return np.ascontiguousarray(both / max(1.0, np.abs(both).max()), dtype=np.float32)


def _encoded(samples: NDArray[np.float32], how: Made) -> bytes:
    if how.container == "mp3":
        return _mp3(samples, how.rate)
    subtype = {"wav": "PCM_16", "ogg": "VORBIS", "webm": "OPUS"}[how.container]
    return encode(Clip(samples, how.rate, how.clip % 2, (), how.container, subtype, 0))


def _mp3(samples: NDArray[np.float32], rate: int) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp3") as output:
        stream = output.add_stream("libmp3lame", rate=rate, layout="stereo")
        stream.bit_rate = 128_000
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
        frame.sample_rate, frame.pts = rate, 0
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()
