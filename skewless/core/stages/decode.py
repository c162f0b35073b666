"""Encoded audio to samples, in process, chosen by the bytes and never by a file's name.

One container, one decoder: WAV, AIFF and Ogg Vorbis are libsndfile's; FLAC, MP3, Opus, M4A/AAC and WebM are FFmpeg's
(PyAV), because libsndfile stops at a guessed length in an MP3 without a frame table, refuses a FLAC written to a pipe,
and decodes Opus at less than its 48 kHz. There is no second try with the other one: two decoders of the same lossy file
differ, and which of them made a number must not depend on chance.
"""

from __future__ import annotations

import io
import math
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, cast

import av
import numpy as np
import soundfile
import torch

from skewless.core.stages.stage import InputError, Payload, Signal, Stage, Tolerance

FORMATS = "WAV, FLAC, Ogg, MP3, AIFF, M4A/AAC or WebM"
_BLOCK_FRAMES = 65536
_MP3_TABLE_WITHIN = 4096  # bytes; behind the ID3 tag, which is short in files that programs write


@dataclass(frozen=True)
class Decode(Stage, name="decode"):
    """Bytes to a float32 waveform `(channels, samples)`, full scale 1.0, at the recording's own rate and channels.

    Only the head that can reach the pipeline's output is kept (`Payload.head_s`); the rest is decoded block by
    block, so memory does not grow with the recording's length.

    Metadata added, all about the whole recording: `peak` (largest absolute sample over all channels), `num_samples`
    (per channel, at the signal's rate), `duration_s`, `complete` (False when only a head was kept).

    Raises InputError: "unsupported" for bytes that are no audio format read here; "malformed" for an empty,
    truncated, damaged or non-finite recording; "too_large" for one longer than `Payload.max_duration_s`.
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
        reader = _read_sndfile if container in _SNDFILE else _read_ffmpeg
        head: list[np.ndarray] = []
        kept = count = 0
        peak, rate = 0.0, 0
        try:
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
        waveform = torch.from_numpy(_joined(head))
        return signal.of(
            waveform,
            rate=rate,
            peak=peak,
            num_samples=count,
            duration_s=count / rate,
            complete=kept == count,
        )


def _joined(blocks: Sequence[Sequence[np.ndarray]] | Sequence[np.ndarray]) -> np.ndarray:
    """Blocks of a row for each channel, one after the other: `(channels, samples)` float32."""
    joined = np.empty((len(blocks[0]), sum(len(block[0]) for block in blocks)), dtype=np.float32)
    for channel, row in enumerate(joined):
        np.concatenate([block[channel] for block in blocks], out=row)
    return joined


_SNDFILE = ("WAV", "AIFF", "Ogg")

# Named, because FFmpeg would try every demuxer on bytes that only look like their container, those for playlists and
# network streams among them.
_DEMUXERS = {"FLAC": "flac", "MP3": "mp3", "Opus": "ogg", "MP4": "mov", "WebM": "matroska", "AAC": "aac"}


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
    """Blocks of `(rate, float32 (channels, frames))` by libsndfile."""
    if container in ("WAV", "AIFF"):
        _check_riff_complete(data, container)
    if container == "Ogg":
        _check_ogg_complete(data)
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        # Whole levels of 16 bits are read as they are: libsndfile takes longer to make the same floats of them.
        dtype, scale = ("int16", np.float32(2**-15)) if file.subtype == "PCM_16" else ("float32", np.float32(1))
        read = 0
        while len(block := file.read(_BLOCK_FRAMES, dtype=dtype, always_2d=True)):
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


def _check_ogg_complete(data: bytes) -> None:
    """Decoders quietly leave out the end of an Ogg stream whose last page is missing or cut short."""
    page = data.rfind(b"OggS")
    if page + 27 <= len(data):
        segments = data[page + 26]
        body = page + 27 + segments
        # Header type 4 marks a stream's last page (RFC 3533).
        if data[page + 5] & 4 and body <= len(data) and body + sum(data[page + 27 : body]) <= len(data):
            return
    raise InputError("the Ogg data is truncated: its last page is incomplete; send the whole file")


def _read_ffmpeg(data: bytes, container: str) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks of `(rate, float32 (channels, frames))` by FFmpeg's demuxers and decoders."""
    if container == "Opus":
        _check_ogg_complete(data)
    with av.open(io.BytesIO(data), "r", format=_DEMUXERS[container], metadata_errors="replace") as file:
        if not file.streams.audio or file.streams.audio[0].codec_context is None:
            raise InputError(f"the {container} data has no audio track that can be read; send a file with one")
        stream = file.streams.audio[0]
        rate, channels = stream.rate, stream.channels
        # Converts the sample type only: interleaved float32, full scale 1.0.
        to_float = av.AudioResampler(format="flt")
        timed: tuple[av.AudioFrame, int, int] | None = None
        parts: list[Sequence[np.ndarray]] = []
        samples = 0
        for frame in file.decode(stream):
            if (frame.sample_rate, frame.layout.nb_channels) != (rate, channels):
                raise InputError(f"the {container} data changes its rate or channels midway; send it as WAV")
            length = 0
            for part in _samples(frame, channels, to_float):
                if container == "MP4" and frame.duration:
                    # What the file's own table of durations leaves out is the codec's padding.
                    kept = round(_seconds(frame.duration, frame.time_base) * rate)
                    part = [row[:kept] for row in part]
                parts.append(part)
                length = len(part[0])
                samples += length
            if frame.pts is not None:
                timed = frame, frame.pts, length
            # Codecs give some thousand samples at a time: too few to look at one by one.
            if samples >= _BLOCK_FRAMES:
                yield rate, _joined(parts)
                parts, samples = [], 0
        if parts:
            yield rate, _joined(parts)
        end = 0.0
        if timed:
            last, pts, length = timed
            end = float(_seconds(pts, last.time_base)) + length / rate
        stated = _stated_end(file, stream, data, container)
        # WebM may count the codec's padding; the others round to milliseconds, and a lost frame is ten of them.
        if stated is not None and end < stated - (0.1 if container == "WebM" else 0.002):
            raise InputError(f"the {container} data is truncated: {end:.2f} of {stated:.2f} s; send the whole file")


def _samples(frame: av.AudioFrame, channels: int, to_float: av.AudioResampler) -> list[Sequence[np.ndarray]]:
    """A decoded frame's float32 samples, a row for each channel, in one part or more."""
    if frame.format.name == "fltp" and channels <= 2:
        # What most codecs give already. With more channels, `to_float` knows where a frame keeps them.
        return [[np.frombuffer(cast(memoryview, plane), np.float32, frame.samples) for plane in frame.planes]]
    return [list(part.to_ndarray().reshape(-1, channels).T) for part in to_float.resample(frame)]


def _stated_end(file: av.container.InputContainer, stream: av.AudioStream, data: bytes, container: str) -> float | None:
    """When the sound ends by the file's own account, in seconds; None where it gives none, as live recordings do."""
    if container == "WebM":
        if stated := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", "")):
            hours, minutes, seconds = map(float, stated.groups())
            return hours * 3600 + minutes * 60 + seconds
        return None if file.duration is None else file.duration / av.time_base
    if container in ("AAC", "Opus"):
        return None
    if container == "MP3":
        # Without the first frame's table (its flag 1: a count of frames follows) the duration is guessed from bit rate.
        table = re.search(rb"(?:Xing|Info)...(.)(.{4})", data[:_MP3_TABLE_WITHIN], re.DOTALL)
        if table is None or not table[1][0] & 1 or table[2] == bytes(4):
            return None
    if stream.duration is None:
        return None
    return float(_seconds(stream.duration + (stream.start_time or 0), stream.time_base))


def _seconds(ticks: int, time_base: Fraction | None) -> Fraction:
    """A time that FFmpeg counts in units of `time_base` seconds; raises InputError where it does not know the unit."""
    if time_base is None:
        raise InputError("the file does not say in what unit its times are; export it again, or send it as WAV")
    return ticks * time_base
