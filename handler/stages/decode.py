"""Encoded audio to samples, in process, chosen by the bytes and never by a file's name.

One container, one decoder: WAV, FLAC, Ogg, MP3 and AIFF are libsndfile's; MP4/M4A, WebM/Matroska and raw AAC are
FFmpeg's (PyAV). There is no second try with the other one: two decoders of the same lossy file differ, and which of
them made a number must not depend on chance.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import av
import numpy as np
import soundfile
import torch

from handler.stages.stage import InputError, Payload, Signal, Stage

FORMATS = "WAV, FLAC, Ogg, MP3, AIFF, M4A/AAC or WebM"
_BLOCK_FRAMES = 65536


@dataclass(frozen=True)
class Decode(Stage, name="decode"):
    """Bytes to a float32 waveform `(channels, samples)`, full scale 1.0, at the recording's own rate and channels.

    Only the head that can reach the pipeline's output is kept (`Payload.head_s`); the rest is decoded block by
    block, so memory does not grow with the recording's length.

    Facts added, all about the whole recording: `peak` (largest absolute sample over all channels), `num_samples`
    (per channel), `source_rate` (Hz), `duration_s`, `complete` (False when only a head was kept).

    Raises InputError: "unsupported" for bytes that are no audio format read here; "malformed" for an empty,
    truncated, damaged or non-finite recording; "too_large" for one longer than `Payload.max_duration_s`.
    """

    def __call__(self, signal: Signal) -> Signal:
        payload: Payload = signal.data
        container = identify(payload.data)
        reader = _read_sndfile if container in _SNDFILE else _read_ffmpeg
        head: list[np.ndarray] = []
        kept = count = 0
        peak, rate = 0.0, 0
        try:
            for rate, block in reader(payload.data, container):
                limit = payload.head_s(rate)
                keep = block.shape[1] if math.isinf(limit) else max(0, math.ceil(limit * rate) - kept)
                head.append(block[:, :keep])
                kept += head[-1].shape[1]
                count += block.shape[1]
                if block.size:
                    # A NaN or an infinity anywhere makes the maximum non-finite.
                    peak = float(np.maximum(peak, np.abs(block).max()))
                if not math.isfinite(peak):
                    raise InputError("the audio contains NaN or infinite samples; export it again as PCM")
                if count > payload.max_duration_s * rate:
                    raise InputError(
                        f"the recording is longer than {payload.max_duration_s:g} s, the longest accepted; "
                        "send a shorter excerpt",
                        "too_large",
                    )
        except (soundfile.LibsndfileError, av.FFmpegError) as error:
            raise InputError(
                f"the {container} data cannot be decoded: {error}; the file is damaged or cut short"
            ) from error
        if count == 0:
            raise InputError(f"the {container} data contains no audio samples; record or export it again")
        waveform = torch.from_numpy(np.concatenate(head, axis=1))
        return signal.of(
            waveform,
            rate=rate,
            peak=peak,
            num_samples=count,
            source_rate=rate,
            duration_s=count / rate,
            complete=kept == count,
        )


_SNDFILE = ("WAV", "FLAC", "Ogg", "MP3", "AIFF")


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
        return "Ogg"
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
    """Blocks of `(rate, float32 (channels, frames))` by libsndfile."""
    if container == "WAV":
        _check_riff_complete(data)
    if container == "Ogg":
        _check_ogg_complete(data)
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        read = 0
        while len(block := file.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)):
            read += len(block)
            yield file.samplerate, block.T
        if read < file.frames:
            raise InputError(f"the {container} data is truncated: {read} of {file.frames} frames; send the whole file")


def _check_riff_complete(data: bytes) -> None:
    """libsndfile quietly reads what is there of a WAV file whose data chunk is cut short."""
    position = 12
    while position + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, position)
        if name == b"data":
            # 0 and 0xFFFFFFFF stand for "unknown", written by programs that stream to a pipe; RF64 says it elsewhere.
            if size != 0xFFFFFFFF and position + 8 + size > len(data):
                have = len(data) - position - 8
                raise InputError(f"the WAV data is truncated: {have} of {size} bytes of samples; send the whole file")
            return
        position += 8 + size + size % 2
    raise InputError("the WAV data has a header but no samples; record or export it again")


def _check_ogg_complete(data: bytes) -> None:
    """libsndfile quietly leaves out an Ogg page that is cut short."""
    page = data.rfind(b"OggS")
    if page + 27 <= len(data):
        segments = data[page + 26]
        body = page + 27 + segments
        if body <= len(data) and body + sum(data[page + 27 : body]) <= len(data):
            return
    raise InputError("the Ogg data is truncated: its last page is incomplete; send the whole file")


def _read_ffmpeg(data: bytes, container: str) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks of `(rate, float32 (channels, frames))` by FFmpeg's demuxers and decoders."""
    with av.open(io.BytesIO(data)) as file:
        if not file.streams.audio:
            raise InputError(f"the {container} data has no audio track; send a file with one")
        stream = file.streams.audio[0]
        rate, channels, read = stream.rate, stream.channels, 0
        for frame in file.decode(stream):
            if (frame.sample_rate, frame.layout.nb_channels) != (rate, channels):
                raise InputError(f"the {container} data changes its rate or channels midway; send it as WAV")
            block = _to_float(frame)
            read += block.shape[1]
            yield rate, block
        # Files made while recording state no duration; those that do are held to it, give or take codec padding.
        if file.duration is not None and container != "AAC":
            stated = file.duration / av.time_base
            if read / rate < stated - 0.1:
                raise InputError(
                    f"the {container} data is truncated: {read / rate:.2f} of {stated:.2f} s; send the whole file"
                )


# Full scale of FFmpeg's sample types, as (offset, factor) to float.
_SAMPLE_TYPES = {
    "u8": (128.0, 2.0**-7),
    "s16": (0.0, 2.0**-15),
    "s32": (0.0, 2.0**-31),
    "flt": (0.0, 1.0),
    "dbl": (0.0, 1.0),
}


def _to_float(frame: av.AudioFrame) -> np.ndarray:
    """A decoded frame as float32 `(channels, frames)`, full scale 1.0."""
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    offset, factor = _SAMPLE_TYPES[frame.format.name.removesuffix("p")]
    return ((samples - offset) * factor).astype(np.float32) if factor != 1.0 else samples.astype(np.float32)
