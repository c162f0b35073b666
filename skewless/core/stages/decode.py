"""Encoded audio to samples, in process, chosen by the bytes and never by a file's name.

One container, one decoder: WAV, AIFF and Ogg Vorbis are libsndfile's; FLAC, MP3, Opus, M4A/AAC and WebM are FFmpeg's
(PyAV), because libsndfile stops at a guessed length in an MP3 without a frame table, refuses a FLAC written to a pipe,
and decodes Opus at less than its 48 kHz. There is no second try with the other one: two decoders of the same lossy file
differ, and which of them made a number must not depend on chance.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import soundfile
import torch

from skewless.core.stages.stage import InputError, Payload, Signal, Stage, Tolerance

FORMATS = "WAV, FLAC, Ogg, MP3, AIFF, M4A/AAC or WebM"
# Decoded at once, all channels counted: 0.5 MB.
BLOCK_SAMPLES = 131072
# No integer format has larger levels, and files of floats put full scale at 1.0. The power of larger ones is more than float32
# holds, if not here then behind some stage.
LARGEST_LEVEL = 2.0**31


@dataclass(frozen=True)
class Decode(Stage, name="decode"):
    """Bytes to a float32 waveform `(channels, samples)`, full scale 1.0, at the recording's own rate and channels.

    Only the head that can reach the pipeline's output is kept (`Payload.head_s`); the rest is decoded block by
    block, so memory does not grow with the recording's length.

    Metadata added, all about the whole recording: `peak` (largest absolute sample over all channels), `num_samples`
    (per channel, at the signal's rate), `duration_s`, `complete` (False when only a head was kept).

    Raises InputError: "unsupported" for bytes that are no audio format read here; "malformed" for an empty,
    truncated, damaged or non-finite recording, for one with a sample above LARGEST_LEVEL, and for a sampling rate below
    `Payload.min_rate_hz`; "too_large" for one above `max_rate_hz`, for more than `max_channels` (both by the file's header,
    before memory is taken for samples), more than `max_samples` to keep, or more than `max_duration_s`.
    """

    reads: ClassVar[str] = "audio"
    unit: ClassVar[str] = "full scale"
    packages: ClassVar[tuple[str, ...]] = (
        "numpy",
        "soundfile",
        "av",
    )
    tolerance: ClassVar[Tolerance] = Tolerance(
        1e-6, 1e-4, "PCM is exact, lossy codecs differ in last bits between processors"
    )

    def __call__(self, signal: Signal) -> Signal:
        payload: Payload = signal.data
        container = identify(payload.data)
        if container in _SNDFILE:
            reader = _read_sndfile
        else:
            from skewless.core.stages.decode_ffmpeg import read_ffmpeg as reader
        head = Samples()
        count = 0
        peak, rate = 0.0, 0
        for rate, block in reader(payload, container):
            limit = payload.head_s(rate)
            keep = block.shape[1] if math.isinf(limit) else max(0, math.ceil(limit * rate) - head.length)
            if (head.length + min(keep, block.shape[1])) * len(block) > payload.max_samples:
                raise InputError(
                    f"the recording has more than {payload.max_samples:,} samples to keep in memory, all {len(block)} channels "
                    f"counted; send a shorter excerpt, fewer channels or a lower rate than {rate:,} Hz",
                    "too_large",
                )
            head.append(block[:, :keep])
            count += block.shape[1]
            if block.size:
                # A NaN or an infinity anywhere makes the maximum non-finite.
                peak = float(np.max([peak, block.max(), -block.min()]))
            if not math.isfinite(peak):
                raise InputError("the audio contains NaN or infinite samples; export it again as PCM")
            if peak > LARGEST_LEVEL:
                raise InputError(
                    f"a sample is {peak:.3g} times full scale, at most {LARGEST_LEVEL:.3g} times is read; export the recording "
                    "with samples between -1 and 1"
                )
            if count > payload.max_duration_s * rate:
                raise InputError(
                    f"the recording is longer than {payload.max_duration_s:g} s, the longest accepted; "
                    "send a shorter excerpt",
                    "too_large",
                )
            payload.check()
        if count == 0:
            raise InputError(f"the {container} data contains no audio samples; record or export it again")
        return signal.of(
            torch.from_numpy(head.joined()),
            rate=rate,
            peak=peak,
            num_samples=count,
            duration_s=count / rate,
            complete=head.length == count,
        )


class Samples:
    """A recording's samples as they are decoded, in one array that grows where it is: blocks that are joined at the end take
    the memory twice.

    length: samples per channel so far.
    """

    def __init__(self) -> None:
        self.length = 0
        self._rows, self._room = 0, 0
        self._flat = np.empty(0, dtype=np.float32)

    def append(self, block: np.ndarray) -> None:
        """Add `(channels, samples)`, of as many channels as the blocks before."""
        self._rows = len(block)
        end = self.length + block.shape[1]
        if end > self._room:
            # A quarter more than there was, so that a long recording is not moved at every block.
            self._lay_out(max(end, self._room * 5 // 4))
        self._flat.reshape(self._rows, self._room)[:, self.length : end] = block
        self.length = end

    def joined(self) -> np.ndarray:
        """All of them: `(channels, samples)` float32. Nothing can be added any more."""
        self._lay_out(self.length)
        return self._flat.reshape(self._rows, self.length)

    def _lay_out(self, room: int) -> None:
        """Give every channel's row room for so many samples, and move the rows to where they then begin."""
        rows = range(1, self._rows)
        if room > self._room:
            self._flat.resize(self._rows * room, refcheck=False)
            rows = rows[::-1]
        for row in rows:
            old, new = row * self._room, row * room
            self._flat[new : new + self.length] = self._flat[old : old + self.length]
        if room < self._room:
            self._flat.resize(self._rows * room, refcheck=False)
        self._room = room


def damaged(container: str, error: Exception) -> InputError:
    """What to raise where a decoder raises `error`."""
    return InputError(f"the {container} data cannot be decoded: {error}; the file is damaged or cut short")


_SNDFILE = ("WAV", "AIFF", "Ogg")


def identify(data: bytes) -> str:
    """The container's name, from its first bytes; raises InputError for what is not one of FORMATS."""
    if not data:
        raise InputError(f"the audio is empty (0 bytes); send a recording as {FORMATS}")
    if data[:4] in (b"RIFF", b"RF64") and data[8:12] == b"WAVE":
        return "WAV"
    if data[:4] == b"FORM" and data[8:12] in (b"AIFF", b"AIFC"):
        return "AIFF"
    if data[:4] == b"fLaC":
        return "FLAC"
    if data[:4] == b"OggS":
        return "Opus" if data[28:36] == b"OpusHead" else "Ogg"
    if data[4:8] == b"ftyp":
        return "MP4"
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return "WebM"
    if data[:3] == b"ID3":
        return "MP3"
    if len(data) > 1 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0:
        # An MPEG audio frame header; layer bits 00 are AAC's ADTS, anything else MPEG layers 1 to 3.
        return "AAC" if data[1] & 0x06 == 0 else "MP3"
    shown = data[:8].hex(" ")
    raise InputError(f"not a known audio format (it starts with {shown}); send {FORMATS}", "unsupported")


def _read_sndfile(payload: Payload, container: str) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks of `(rate, float32 (channels, frames))` by libsndfile; raises InputError."""
    data = payload.data
    if container in ("WAV", "AIFF"):
        _check_riff_complete(data, container)
    if container == "Ogg":
        check_ogg_complete(data)
    try:
        yield from _blocks(payload, container)
    except soundfile.LibsndfileError as error:
        raise damaged(container, error) from error


def _blocks(payload: Payload, container: str) -> Iterator[tuple[int, np.ndarray]]:
    with soundfile.SoundFile(io.BytesIO(payload.data)) as file:
        payload.admit(file.samplerate, file.channels)
        # Whole levels of 16 bits are read as they are: libsndfile takes longer to make the same floats of them.
        dtype, scale = ("int16", np.float32(2**-15)) if file.subtype == "PCM_16" else ("float32", np.float32(1))
        frames = max(1, BLOCK_SAMPLES // file.channels)
        read = 0
        while len(block := file.read(frames, dtype=dtype, always_2d=True)):
            read += len(block)
            yield file.samplerate, np.multiply(block.T, scale, order="C")
        if read < file.frames:
            raise InputError(f"the {container} data is truncated: {read} of {file.frames} frames; send the whole file")


def _check_riff_complete(data: bytes, container: str) -> None:
    """libsndfile quietly reads what is there of a WAV or AIFF file whose chunk of samples is cut short."""
    position = 12
    while position + 8 <= len(data):
        name, size = struct.unpack_from("<4sI" if container == "WAV" else ">4sI", data, position)
        if name == (b"data" if container == "WAV" else b"SSND"):
            # 0xFFFFFFFF stands for "unknown", written by programs that stream to a pipe; RF64 says it elsewhere.
            if size != 0xFFFFFFFF and position + 8 + size > len(data):
                have = len(data) - position - 8
                raise InputError(
                    f"the {container} data is truncated: {have} of {size} bytes of samples; send the whole file"
                )
            return
        position += 8 + size + size % 2
    raise InputError(f"the {container} data has a header but no samples; record or export it again")


def check_ogg_complete(data: bytes) -> None:
    """Decoders quietly leave out the end of an Ogg stream whose last page is missing or cut short."""
    page = data.rfind(b"OggS")
    if page + 27 <= len(data):
        segments = data[page + 26]
        body = page + 27 + segments
        # Header type 4 marks a stream's last page (RFC 3533).
        if data[page + 5] & 4 and body <= len(data) and body + sum(data[page + 27 : body]) <= len(data):
            return
    raise InputError("the Ogg data is truncated: its last page is incomplete; send the whole file")
