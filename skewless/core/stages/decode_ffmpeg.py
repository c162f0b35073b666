"""FFmpeg's half of `decode`. Imported when the first recording of its containers is read: it takes 15 MB and 0.2 s."""

from __future__ import annotations

import errno
import io
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import cast

import av
import numpy as np

from skewless.core.stages.decode import BLOCK_SAMPLES, check_ogg_complete, damaged
from skewless.core.stages.stage import InputError, Payload

_MP3_TABLE_WITHIN = 4096  # bytes; behind the ID3 tag, which is short in files that programs write
# Per channel, in one frame. Codecs have up to 65,536; the header of an ALAC file may promise a thousand times that.
_LARGEST_FRAME = 2**20

# Named, because FFmpeg would try every demuxer on bytes that only look like their container, those for playlists and
# network streams among them.
_DEMUXERS = {"FLAC": "flac", "MP3": "mp3", "Opus": "ogg", "MP4": "mov", "WebM": "matroska", "AAC": "aac"}


def read_ffmpeg(payload: Payload, container: str) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks of `(rate, float32 (channels, frames))` by FFmpeg's demuxers and decoders; raises InputError."""
    try:
        yield from _read(payload, container)
    except av.FFmpegError as error:
        if error.errno == errno.ENOMEM:
            raise MemoryError from error
        raise damaged(container, error) from error


def _read(payload: Payload, container: str) -> Iterator[tuple[int, np.ndarray]]:
    data = payload.data
    if container == "Opus":
        check_ogg_complete(data)
    with av.open(io.BytesIO(data), "r", format=_DEMUXERS[container], metadata_errors="replace") as file:
        if not file.streams.audio or file.streams.audio[0].codec_context is None:
            raise InputError(f"the {container} data has no audio track that can be read; send a file with one")
        stream = file.streams.audio[0]
        rate, channels = stream.rate, stream.channels
        payload.admit(rate, channels)
        stream.codec_context.options = {"max_samples": str(_LARGEST_FRAME)}
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
            if samples * channels >= BLOCK_SAMPLES:
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


def _joined(parts: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Parts of a row for each channel, one after the other: `(channels, samples)` float32."""
    joined = np.empty((len(parts[0]), sum(len(part[0]) for part in parts)), dtype=np.float32)
    for channel, row in enumerate(joined):
        np.concatenate([part[channel] for part in parts], out=row)
    return joined


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
