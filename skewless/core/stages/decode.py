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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import soundfile
import torch

from skewless.core.stages.stage import InputError, Payload, Signal, Stage, Tolerance

FORMATS = "WAV, FLAC, Ogg, MP3, AIFF, M4A/AAC or WebM"
BLOCK_FRAMES = 65536
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
    truncated, damaged or non-finite recording, and for one with a sample above LARGEST_LEVEL; "too_large" for one longer than
    `Payload.max_duration_s`.
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
        head: list[np.ndarray] = []
        kept = count = 0
        peak, rate = 0.0, 0
        for rate, block in reader(payload.data, container):
            limit = payload.head_s(rate)
            keep = block.shape[1] if math.isinf(limit) else max(0, math.ceil(limit * rate) - kept)
            if keep:
                # A copy of a part: a view, however small, would keep its whole block in memory.
                head.append(block if keep >= block.shape[1] else block[:, :keep].copy())
                kept += head[-1].shape[1]
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
        if count == 0:
            raise InputError(f"the {container} data contains no audio samples; record or export it again")
        waveform = torch.from_numpy(join_blocks(head))
        return signal.of(
            waveform,
            rate=rate,
            peak=peak,
            num_samples=count,
            duration_s=count / rate,
            complete=kept == count,
        )


def join_blocks(blocks: Sequence[Sequence[np.ndarray]] | Sequence[np.ndarray]) -> np.ndarray:
    """Blocks of a row for each channel, one after the other: `(channels, samples)` float32."""
    joined = np.empty((len(blocks[0]), sum(len(block[0]) for block in blocks)), dtype=np.float32)
    for channel, row in enumerate(joined):
        np.concatenate([block[channel] for block in blocks], out=row)
    return joined


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


def _read_sndfile(data: bytes, container: str) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks of `(rate, float32 (channels, frames))` by libsndfile; raises InputError."""
    if container in ("WAV", "AIFF"):
        _check_riff_complete(data, container)
    if container == "Ogg":
        check_ogg_complete(data)
    try:
        yield from _blocks(data, container)
    except soundfile.LibsndfileError as error:
        raise damaged(container, error) from error


def _blocks(data: bytes, container: str) -> Iterator[tuple[int, np.ndarray]]:
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        # Whole levels of 16 bits are read as they are: libsndfile takes longer to make the same floats of them.
        dtype, scale = ("int16", np.float32(2**-15)) if file.subtype == "PCM_16" else ("float32", np.float32(1))
        read = 0
        while len(block := file.read(BLOCK_FRAMES, dtype=dtype, always_2d=True)):
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
