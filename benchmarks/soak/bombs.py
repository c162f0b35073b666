"""Files of some kB that ask for much: memory, time, or a number that no sum survives. `python -m benchmarks.soak` sends them.

Each bomb is made once. HEAVY are files that an archive may well accept, which cost it most.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Mapping
from functools import cache, partial

import av
import numpy as np
import soundfile
from PIL import Image

from benchmarks.soak.mutations import AUDIO, IMAGE


def wav(samples: bytes, rate: int, channels: int = 1, bits: int = 16, form: int = 1) -> bytes:
    """A WAV file with any header. samples: as they lie in the file. form: 1 for whole numbers, 3 for floats."""
    frame = min(channels * bits // 8, 0xFFFF)
    header = struct.pack(
        "<4sIHHIIHH", b"fmt ", 16, form, channels, rate, min(rate * frame, 2**32 - 1), frame, bits
    )  # fmt: skip
    chunks = header + struct.pack("<4sI", b"data", len(samples)) + samples
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def _tone(count: int) -> bytes:
    return (8000 * np.sin(np.arange(count) / 7)).astype("<i2").tobytes()


def _float_wav(level: float, loud: int = 40_000, subtype: str = "<f4") -> bytes:
    """2.5 s of a tone of which `loud` samples are at this level."""
    samples = np.sin(np.arange(40_000) / 7 + 0.1)
    samples[1000 : 1000 + loud] *= level
    return wav(samples.astype(subtype).tobytes(), 16_000, bits=8 * np.dtype(subtype).itemsize, form=3)


def _flat_flac(seconds: int, rate: int, channels: int) -> bytes:
    """A steady level, which packs as well as silence does, and which nobody refuses for being silent."""
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", rate, channels, format="FLAC", subtype="PCM_16") as out:
        for _ in range(seconds):
            out.write(np.full((rate, channels), 1000, dtype=np.int16))
    return file.getvalue()


def _fast_aiff() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(500), 48_000, format="AIFF", subtype="PCM_16")
    data = bytearray(file.getvalue())
    # The exponent of the 80-bit rate: 2**30 times as fast.
    at = data.index(b"COMM") + 16
    struct.pack_into(">H", data, at, struct.unpack_from(">H", data, at)[0] + 30)
    return bytes(data)


def _silent_stream(output: av.container.OutputContainer, codec: str, rate: int, samples: int) -> av.AudioStream:
    """A mono stream of the container that holds so many samples of silence."""
    stream = output.add_stream(codec, rate=rate, layout="mono", options={"flags": "+bitexact"})
    assert isinstance(stream, av.AudioStream)
    frame = av.AudioFrame.from_ndarray(np.zeros((1, samples), dtype=np.float32), format="fltp", layout="mono")
    frame.sample_rate, frame.pts = rate, 0
    output.mux(stream.encode(frame))
    output.mux(stream.encode(None))
    return stream


def _long_opus(seconds: int) -> bytes:
    """Silence in packets of 120 ms, each of one byte."""
    file = io.BytesIO()
    with av.open(file, "w", format="ogg", options={"fflags": "+bitexact"}) as output:
        stream = _silent_stream(output, "libopus", 48_000, 960)
        for number in range(1, round(seconds / 0.12)):
            # RFC 6716, 3.1 and 3.2.3: two frames of 60 ms (SILK, narrowband), both empty.
            packet = av.Packet(b"\x19")
            packet.stream = stream
            packet.pts = packet.dts = 5760 * number
            packet.duration = 5760
            output.mux(packet)
    return file.getvalue()


def _many_chunks() -> bytes:
    chunks = struct.pack("<4sI", b"LIST", 0) * 5_000
    whole = wav(_tone(16_000), 16_000)
    body = whole[12:36] + chunks + whole[36:]
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


def _nested_mp4(depth: int = 20_000) -> bytes:
    boxes = b"".join(struct.pack(">I4s", 8 * (depth - level), b"moov") for level in range(depth))
    return struct.pack(">I4s4sI", 16, b"ftyp", b"M4A ", 0) + boxes


def _nested_webm(depth: int = 20_000) -> bytes:
    header = b"\x1a\x45\xdf\xa3\x87\x42\x82\x84webm"
    # The segment, its tags, one tag, and in it simple tags within simple tags, all of unknown size.
    unknown = b"\x01" + b"\xff" * 7
    return (
        header
        + b"\x18\x53\x80\x67"
        + unknown
        + b"\x12\x54\xc3\x67"
        + unknown
        + b"\x73\x73"
        + unknown
        + (b"\x67\xc8" + unknown) * depth
    )


def _endless_mp4() -> bytes:
    """Samples of one byte each, two thousand million of them by its table."""
    file = io.BytesIO()
    with av.open(file, "w", format="ipod", options={"fflags": "+bitexact"}) as output:
        _silent_stream(output, "aac", 44_100, 44_100)
    data = bytearray(file.getvalue())
    struct.pack_into(">II", data, data.index(b"stsz") + 8, 1, 2**31 - 1)
    struct.pack_into(">II", data, data.index(b"stts") + 8, 1, 2**31 - 1)
    return bytes(data)


def _empty_ogg_pages() -> bytes:
    page = struct.pack("<4sBBQIIIB", b"OggS", 0, 0, 0, 1, 0, 0, 0)
    return page[:5] + b"\x02" + page[6:] + page * 100_000


def _png(width: int, height: int, rows: int, extra: bytes = b"", depth: int = 8, colour: int = 0) -> bytes:
    """A grey PNG of `rows` black rows, whatever height it claims."""
    row = bytes(1 + (width * depth * (3 if colour == 2 else 1) + 7) // 8)
    packer = zlib.compressobj(9)
    pixels = b"".join(packer.compress(row) for _ in range(rows)) + packer.flush()
    size = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", size) + extra + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _zeros_packed(count: int) -> bytes:
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(count >> 20)) + packer.flush()


def _jpeg(width: int, height: int, **how: object) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (90, 120, 60)).save(file, "JPEG", **how)
    return file.getvalue()


def _huge_jpeg() -> bytes:
    data = bytearray(_jpeg(64, 64))
    struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, 65_500, 65_500)
    return bytes(data)


def _many_scans(width: int, height: int, scans: int) -> bytes:
    """A progressive JPEG that sends its last scan again and again: each costs a pass over all blocks."""
    data = _jpeg(width, height, progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * scans + data[-2:]


def _looped_exif() -> bytes:
    """A directory of metadata whose next one is itself."""
    tiff = struct.pack("<2sHIH", b"II", 42, 8, 1) + struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<I", 8)
    body = b"Exif\x00\x00" + tiff
    whole = _jpeg(64, 64)
    return whole[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(body)) + body + whole[2:]


def _webp(width: int, height: int) -> bytes:
    """A header of so many pixels before a small picture."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "WEBP", lossless=True)
    data = bytearray(file.getvalue())
    at = data.index(b"VP8L") + 9
    struct.pack_into("<I", data, at, (width - 1) | (height - 1) << 14)
    return bytes(data)


def _webp_canvas() -> bytes:
    file = io.BytesIO()
    frames = [Image.new("RGBA", (64, 64), (level, 0, 0, 90)) for level in (10, 200)]
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:])
    data = bytearray(file.getvalue())
    # Canvas width and height less one, of 24 bits each.
    at = data.index(b"VP8X") + 12
    data[at : at + 6] = (16_382).to_bytes(3, "little") * 2
    return bytes(data)


# By what the archives read: a name, and what makes the file.
BOMBS: Mapping[str, Mapping[str, Callable[[], bytes]]] = {
    AUDIO: {
        "0 Hz": partial(wav, _tone(100), 0),
        "1 Hz": partial(wav, _tone(100), 1),
        "30 MHz": partial(wav, _tone(500), 30_000_000),
        "2 GHz": partial(wav, _tone(500), 2_000_000_000),
        "50 THz AIFF": _fast_aiff,
        "65,535 channels": partial(wav, bytes(200_000), 16_000, 65_535),
        "1,024 channels": partial(wav, bytes(2048 * 100), 16_000, 1024),
        "8 channels of 655,350 Hz": partial(_flat_flac, 2, 655_350, 8),
        "5 hours of FLAC": partial(_flat_flac, 5 * 3600, 8000, 1),
        "5 hours of Opus": partial(_long_opus, 5 * 3600),
        "float 1e17": partial(_float_wav, 1e17),
        "float 1e38": partial(_float_wav, 1e38),
        "one sample of 1e38": partial(_float_wav, 1e38, 1),
        "float 1e300": partial(_float_wav, 1e300, subtype="<f8"),
        "float 1e-40": partial(_float_wav, 1e-40),
        "float NaN": partial(_float_wav, float("nan"), 1),
        "float infinity": partial(_float_wav, float("-inf"), 1),
        "5,000 chunks of WAV": _many_chunks,
        "20,000 nested MP4 boxes": _nested_mp4,
        "20,000 nested WebM tags": _nested_webm,
        "MP4 of 2**31 samples": _endless_mp4,
        "100,000 empty Ogg pages": _empty_ogg_pages,
        "ID3 tag of 256 MB": lambda: b"ID3\x04\x00\x00\x7f\x7f\x7f\x7f" + bytes(2000),
    },
    IMAGE: {
        "400 Mpx PNG": partial(_png, 20_000, 20_000, 20_000, depth=1),
        "2**62 px PNG": partial(_png, 2**31 - 1, 2**31 - 1, 0),
        "PNG without its rows": partial(_png, 7000, 7000, 1),
        "4 Gpx JPEG": _huge_jpeg,
        "268 Mpx WebP": partial(_webp, 16_384, 16_384),
        "268 Mpx WebP canvas": _webp_canvas,
        "PNG with 256 MB of text": lambda: _png(64, 64, 64, _chunk(b"zTXt", b"a\0\0" + _zeros_packed(1 << 28))),
        "PNG with 256 MB of profile": lambda: _png(64, 64, 64, _chunk(b"iCCP", b"a\0\0" + _zeros_packed(1 << 28))),
        "PNG with 100,000 chunks": lambda: _png(64, 64, 64, _chunk(b"tEXt", b"a\0b") * 100_000),
        "JPEG with looped metadata": _looped_exif,
        "JPEG of 20,000 scans": partial(_many_scans, 4000, 3000, 20_000),
    },
}

# Those of which no answer is a prediction: no recording has such a rate, so many channels or such levels.
NEVER = frozenset(
    (
        *("0 Hz", "1 Hz", "30 MHz", "2 GHz", "50 THz AIFF", "65,535 channels", "1,024 channels"),
        *("float 1e17", "float 1e38", "one sample of 1e38", "float 1e300", "float NaN", "float infinity"),
        *("2**62 px PNG", "PNG without its rows"),
    )
)

HEAVY: Mapping[str, Mapping[str, Callable[[], bytes]]] = {
    AUDIO: {
        "299 s at 8 kHz": partial(_flat_flac, 299, 8000, 1),
        "299 s in stereo at 48 kHz": partial(_flat_flac, 299, 48_000, 2),
        "299 s in 8 channels at 96 kHz": partial(_flat_flac, 299, 96_000, 8),
        "14 minutes of Opus": partial(_long_opus, 14 * 60),
    },
    IMAGE: {
        "49 Mpx PNG": partial(_png, 7000, 7000, 7000, depth=8, colour=2),
        "49 Mpx JPEG": partial(_jpeg, 7000, 7000),
    },
}


@cache
def bomb(reads: str, name: str) -> bytes:
    """One of BOMBS or HEAVY, made on first use."""
    return {**BOMBS[reads], **HEAVY[reads]}[name]()
