"""Damaged files: small valid ones of every format that is read, and ways to damage them that its parsers meet.

The same seed and the same versions of the codecs make the same bytes. `python -m benchmarks.soak` sends them.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import cast

import av
import numpy as np
import soundfile
from PIL import Image

from skewless.demos.cough import Clip, encode, synthesize

SEED = 10
AUDIO, IMAGE = "audio", "image"
LONGEST_REPETITION = 500_000  # bytes
_FFMPEG = {"Opus": ("ogg", "libopus", 48_000), "MP3": ("mp3", "libmp3lame", 44_100), "AAC": ("adts", "aac", 44_100)}
_BY_THE_CORPUS = {"WAV": "wav", "FLAC": "flac", "Ogg": "ogg", "M4A": "m4a", "WebM": "webm"}


def make_files() -> dict[str, dict[str, list[bytes]]]:
    """What the archives read, "audio" and "image", to the formats, to some small valid files of each."""
    return {AUDIO: dict(_recordings()), IMAGE: dict(_pictures())}


def _recordings() -> Iterator[tuple[str, list[bytes]]]:
    clips = [synthesize(number, SEED, min_seconds=1.0, max_seconds=2.5, formats=("webm",)) for number in range(3)]
    for name, container in _BY_THE_CORPUS.items():
        # Three kinds of samples in a WAV: whole numbers, wide ones, floats.
        subtypes = ("PCM_16", "PCM_24", "FLOAT") if name == "WAV" else ("VORBIS" if name == "Ogg" else "PCM_16",) * 3
        yield (
            name,
            [
                encode(Clip(_limited(c), c.rate, c.label, (), container, subtype, 0))
                for c, subtype in zip(clips, subtypes, strict=True)
            ],
        )
    yield "AIFF", [_aiff(clip) for clip in clips]
    for name, how in _FFMPEG.items():
        yield name, [_encoded(clip, *how) for clip in clips]


def _limited(clip: Clip) -> np.ndarray:
    return np.ascontiguousarray(clip.samples / max(1.0, float(np.abs(clip.samples).max())), dtype=np.float32)


def _aiff(clip: Clip) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, _limited(clip).T, clip.rate, format="AIFF", subtype="PCM_16")
    return file.getvalue()


def _encoded(clip: Clip, container: str, codec: str, rate: int) -> bytes:
    file = io.BytesIO()
    samples = _limited(clip)
    layout = ("mono", "stereo")[len(samples) - 1]
    # bitexact: no serial number drawn at random.
    with av.open(file, "w", format=container, options={"fflags": "+bitexact"}) as output:
        stream = cast(
            av.AudioStream, output.add_stream(codec, rate=rate, layout=layout, options={"flags": "+bitexact"})
        )
        # At the clip's rate or another: what is heard does not matter here.
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def _pictures() -> Iterator[tuple[str, list[bytes]]]:
    down, right = np.mgrid[0:90, 0:120]
    levels = np.stack([right * 2, down * 2, 128 + 100 * np.sin(right * down / 500)], axis=-1).astype(np.uint8)
    plain = Image.fromarray(levels)
    clear = plain.copy()
    clear.putalpha(Image.fromarray((right * 2).astype(np.uint8)))
    grey16 = Image.fromarray((right * 500).astype(np.uint16))
    yield (
        "JPEG",
        [_saved(plain, "JPEG"), _saved(plain, "JPEG", progressive=True), _saved(plain.convert("CMYK"), "JPEG")],
    )
    yield "PNG", [_saved(clear, "PNG"), _saved(plain.quantize(16), "PNG"), _saved(grey16, "PNG")]
    yield "WebP", [_saved(plain, "WEBP"), _saved(plain, "WEBP", lossless=True), _saved(clear, "WEBP")]


def _saved(picture: Image.Image, kind: str, **how: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **how)
    return file.getvalue()


@dataclass(frozen=True)
class Field:
    """A number in a file's header: `offset` bytes behind the start of `marker`, in the form `code` of `struct`."""

    marker: bytes
    offset: int
    code: str


def _fields(marker: bytes, *places: tuple[int, str]) -> tuple[Field, ...]:
    return tuple(Field(marker, offset, code) for offset, code in places)


# What a parser believes: sizes, counts, rates, channels, depths, times. One line for each structure of a format.
FIELDS: Mapping[str, tuple[Field, ...]] = {
    "WAV": (
        *_fields(b"RIFF", (4, "<I")),
        # Format, channels, rate, bytes per second and per frame, bits.
        *_fields(b"fmt ", (4, "<I"), (8, "<H"), (10, "<H"), (12, "<I"), (16, "<I"), (20, "<H"), (22, "<H")),
        *_fields(b"data", (4, "<I")),
    ),
    "AIFF": (
        *_fields(b"FORM", (4, ">I")),
        # Channels, frames, bits, and the exponent and the mantissa of an 80-bit rate.
        *_fields(b"COMM", (4, ">I"), (8, ">H"), (10, ">I"), (14, ">H"), (16, ">H"), (18, ">Q")),
        *_fields(b"SSND", (4, ">I"), (8, ">I"), (12, ">I")),
    ),
    "Ogg": (
        # Flags, position, serial number, page number, segments.
        *_fields(b"OggS", (5, "<B"), (6, "<Q"), (14, "<I"), (18, "<I"), (26, "<B")),
        # Version, channels, rate, block sizes.
        *_fields(b"\x01vorbis", (7, "<I"), (11, "<B"), (12, "<I"), (28, "<B")),
    ),
    "Opus": (
        *_fields(b"OggS", (5, "<B"), (6, "<Q"), (14, "<I"), (18, "<I"), (26, "<B")),
        # Version, channels, samples to skip, rate, gain, mapping.
        *_fields(b"OpusHead", (8, "<B"), (9, "<B"), (10, "<H"), (12, "<I"), (16, "<H"), (18, "<B")),
    ),
    # Block sizes; rate, channels and bits in one; length.
    "FLAC": _fields(b"fLaC", (5, ">H"), (8, ">H"), (10, ">H"), (18, ">I"), (22, ">I")),
    "MP3": (
        *_fields(b"ID3", (6, ">I")),
        *_fields(b"\xff\xfb", (0, ">H"), (2, ">B"), (3, ">B")),
        # Flags, frames, bytes.
        *_fields(b"Info", (4, ">I"), (8, ">I"), (12, ">I")),
    ),
    "AAC": _fields(b"\xff\xf1", (0, ">H"), (2, ">B"), (3, ">H"), (5, ">H")),
    "M4A": (
        *_fields(b"moov", (-4, ">I")),
        *_fields(b"mvhd", (16, ">I"), (20, ">I")),
        *_fields(b"mdhd", (16, ">I"), (20, ">I")),
        # Channels, bits, rate.
        *_fields(b"mp4a", (20, ">H"), (22, ">H"), (28, ">I")),
        *_fields(b"stts", (8, ">I"), (12, ">I"), (16, ">I")),
        *_fields(b"stsz", (8, ">I"), (12, ">I"), (16, ">I")),
        *_fields(b"stsc", (8, ">I"), (12, ">I"), (16, ">I")),
        *_fields(b"stco", (8, ">I"), (12, ">I")),
        *_fields(b"mdat", (-4, ">I")),
    ),
    "WebM": (
        *_fields(b"\x1a\x45\xdf\xa3", (4, ">B")),
        *_fields(b"\x18\x53\x80\x67", (4, ">Q")),  # the segment's size
        *_fields(b"\x2a\xd7\xb1", (4, ">H")),  # nanoseconds of a tick
        *_fields(b"\x44\x89", (3, ">d")),  # duration
        *_fields(b"\xb5\x88", (2, ">d")),  # rate
        *_fields(b"\x9f\x81", (2, ">B")),  # channels
        *_fields(b"\x56\xbb", (3, ">H")),  # pre-roll
        *_fields(b"OpusHead", (9, "<B"), (10, "<H"), (12, "<I"), (16, "<H"), (18, "<B")),
    ),
    "JPEG": (
        *_fields(b"\xff\xe0", (2, ">H")),
        *_fields(b"\xff\xdb", (2, ">H"), (4, ">B")),
        # Depth, height, width, components.
        *_fields(b"\xff\xc0", (2, ">H"), (4, ">B"), (5, ">H"), (7, ">H"), (9, ">B"), (11, ">B")),
        *_fields(b"\xff\xc2", (2, ">H"), (4, ">B"), (5, ">H"), (7, ">H"), (9, ">B"), (11, ">B")),
        *_fields(b"\xff\xc4", (2, ">H"), (4, ">B"), (5, ">Q")),
        *_fields(b"\xff\xda", (2, ">H"), (4, ">B")),
    ),
    # Width, height, depth, colours, compression, filter, interlacing; the size of the pixels' first chunk.
    "PNG": (
        *_fields(b"IHDR", (4, ">I"), (8, ">I"), (12, ">B"), (13, ">B"), (14, ">B"), (15, ">B"), (16, ">B")),
        *_fields(b"IDAT", (-4, ">I")),
    ),
    "WebP": (
        *_fields(b"RIFF", (4, "<I")),
        *_fields(b"VP8 ", (4, "<I"), (14, "<H"), (16, "<H")),
        *_fields(b"VP8L", (4, "<I"), (9, "<I")),
        *_fields(b"VP8X", (4, "<I"), (8, "<B"), (12, "<I"), (14, "<I")),
        *_fields(b"ALPH", (4, "<I")),
    ),
}


def places(kind: str, data: bytes) -> list[tuple[int, str]]:
    """Where the fields of a format are in this file: position in bytes and form."""
    found = []
    for field in FIELDS[kind]:
        start = data.find(field.marker)
        at = start + field.offset
        if start >= 0 and at >= 0 and at + struct.calcsize(field.code) <= len(data):
            found.append((at, field.code))
    return found


def extremes(code: str) -> tuple[float, ...]:
    """What to write into a field: none, one, the most, and their neighbours; for a float also what is no number."""
    if code[-1] == "d":
        return 0.0, -1.0, math.nan, math.inf, -math.inf, 1e300, 1e-300
    most = 2 ** (8 * struct.calcsize(code)) - 1
    return 0, 1, 2, 3, most // 2, most // 2 + 1, most - 1, most


def _flip(kind: str, data: bytes, other: bytes, rng: Random) -> bytes:
    within = len(data) if rng.random() < 0.5 else min(len(data), 256)
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 8, 64))):
        bit = rng.randrange(8 * within)
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def _cut(kind: str, data: bytes, other: bytes, rng: Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] if rng.random() < 0.8 else data[at:]


def _extreme(kind: str, data: bytes, other: bytes, rng: Random) -> bytes:
    changed = bytearray(data)
    found = places(kind, data)
    for at, code in rng.sample(found, min(rng.choice((1, 1, 2, 3)), len(found))):
        struct.pack_into(code, changed, at, rng.choice(extremes(code)))
    # Half of them with checksums that fit, or a parser that checks them would look no further.
    return with_checksums(kind, bytes(changed)) if rng.random() < 0.5 else bytes(changed)


def _splice(kind: str, data: bytes, other: bytes, rng: Random) -> bytes:
    return data[: rng.randrange(1, len(data))] + other[rng.randrange(len(other)) :]


def _repeat(kind: str, data: bytes, other: bytes, rng: Random) -> bytes:
    start = rng.randrange(len(data))
    chunk = data[start : start + rng.choice((1, 4, 27, 512, 4096))]
    times = min(rng.choice((2, 10, 1000)), LONGEST_REPETITION // len(chunk))
    return data[:start] + chunk * times + data[start + len(chunk) :]


def _remove(kind: str, data: bytes, other: bytes, rng: Random) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.choice((1, 2, 16, 512)) :]


def _fill(kind: str, data: bytes, other: bytes, rng: Random) -> bytes:
    start = rng.randrange(len(data))
    length = min(rng.choice((4, 64, 1024)), len(data) - start)
    return data[:start] + rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length))) + data[start + length :]


MUTATIONS: Mapping[str, Callable[[str, bytes, bytes, Random], bytes]] = {
    "bits flipped": _flip,
    "cut short": _cut,
    "extreme header": _extreme,
    "two files spliced": _splice,
    "a chunk repeated": _repeat,
    "a chunk removed": _remove,
    "a chunk overwritten": _fill,
}


def mutate(mutation: str, kind: str, data: bytes, other: bytes, rng: Random) -> bytes:
    """A damaged copy of a file of the format `kind`, never the file itself. other: a file to take a part of."""
    while (changed := MUTATIONS[mutation](kind, data, other, rng)) == data:
        pass
    return changed


def with_checksums(kind: str, data: bytes) -> bytes:
    """The file with checksums that fit its first chunk (PNG) or its pages (Ogg), as far as it still has any."""
    if kind == "PNG" and data[12:16] == b"IHDR":
        return data[:29] + struct.pack(">I", zlib.crc32(data[12:29])) + data[33:]
    return ogg_with_checksums(data) if kind in ("Ogg", "Opus") else data


_BIT_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def ogg_with_checksums(data: bytes) -> bytes:
    """An Ogg stream with every page's checksum as RFC 3533, section 6, has it, up to what is no page any more."""
    changed, at = bytearray(data), 0
    while changed[at : at + 4] == b"OggS" and at + 27 <= len(changed):
        segments = changed[at + 26]
        size = 27 + segments + sum(changed[at + 27 : at + 27 + segments])
        page = changed[at : at + size]
        page[22:26] = bytes(4)
        # zlib's polynomial with the bits the other way round, starting from 0.
        reflected = zlib.crc32(page.translate(_BIT_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
        changed[at + 22 : at + 26] = int(f"{reflected:032b}"[::-1], 2).to_bytes(4, "little")
        at += size
    return bytes(changed)
