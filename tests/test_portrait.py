"""The picture stages against the NumPy oracle, Keras and another JPEG decoder; the classes' decision; the drawn corpus."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import zlib
from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.io
from numpy.typing import NDArray
from PIL import Image, ImageFile
from PIL.ExifTags import Base

from skewless.core.pipeline import Pipeline
from skewless.core.postprocess import build_postprocessor
from skewless.core.stages import InputError, Payload, PipelineError, Signal, fused
from skewless.core.stages.image import DecodeImage
from skewless.demos import portrait as corpus
from tests.keras_on_torch import keras
from tests.oracles import portrait as oracle
from tests.recordings import one_thread  # noqa: F401

ARCHIVE = Path(__file__).parents[1] / "archive" / "portrait"
PIPELINE = Pipeline.from_yaml(ARCHIVE / "pipeline.yaml")
DECODE = replace(PIPELINE.stages["decode_image"], min_side=1, background=(30, 200, 90))
ENDS = {"JPEG": "jpg", "PNG": "png", "WebP": "webp"}


def picture(height: int = 24, width: int = 36, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    """A noisy gradient, no two places alike."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [
        128 + 100 * np.sin((1 + c) * x / width * 3 + c) * np.cos((2 - c % 2) * y / height * 2) for c in range(channels)
    ]
    noise = np.random.default_rng(seed).normal(0, 8, (height, width, channels))
    return np.clip(np.stack(planes, axis=-1) + noise, 0, 255).astype(np.uint8)


def encoded(pixels: NDArray | Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(stream, kind.upper(), **options)
    return stream.getvalue()


def lossless(pixels: NDArray, kind: str, **options: object) -> bytes:
    return encoded(pixels, kind, **({"lossless": True, "exact": True} if kind == "WebP" else {}), **options)


def decode(data: bytes, stage: DecodeImage = DECODE, max_pixels: float = np.inf) -> Signal:
    return stage(Signal(Payload(data, max_pixels=max_pixels)))


def levels(data: bytes, stage: DecodeImage = DECODE) -> NDArray[np.float32]:
    """The decoded picture as `(H, W, 3)`, its form checked."""
    tensor = decode(data, stage).data
    assert tensor.dtype == torch.float32 and tensor.shape[:2] == (1, 3) and tensor.is_contiguous()
    return tensor[0].permute(1, 2, 0).numpy()


def refusal(data: bytes, stage: DecodeImage = DECODE, max_pixels: float = np.inf) -> InputError:
    with pytest.raises(InputError) as caught:
        decode(data, stage, max_pixels)
    return caught.value


RGB, GREY, ALPHA = picture(), picture(channels=1)[..., 0], picture(channels=4)
INDICES = picture(channels=1, seed=3)[..., 0] % 7
PALETTE = picture(1, 7, 4, seed=4)[0]
SIXTEEN = GREY.astype(np.uint16) * 257
SIXTEEN[0, :4] = (0, 255, 256, 65535)


def palette_png(opaque: bool) -> bytes:
    chunks = [(b"PLTE", PALETTE[:, :3].tobytes())] + ([] if opaque else [(b"tRNS", PALETTE[:, 3].tobytes())])
    return oracle.png(INDICES, 3, chunks=tuple(chunks))


def grey(planes: NDArray) -> NDArray:
    return np.repeat(planes[..., None], 3, axis=-1)


def keyed(pixels: NDArray, key: NDArray) -> NDArray:
    """RGB and an alpha that is 0 where a pixel has the key's colour."""
    alpha = np.where((pixels == key).all(axis=-1, keepdims=True), 0, 255)
    return np.concatenate([pixels, alpha], axis=-1)


# A file of exactly known pixels, and those: three levels, or four with an alpha.
EXACT: dict[str, tuple[bytes, NDArray]] = {
    "PNG": (oracle.png(RGB, 2), RGB),
    "WebP": (lossless(RGB, "WebP"), RGB),
    "grey PNG": (oracle.png(GREY, 0), grey(GREY)),
    "16-bit grey PNG": (oracle.png(SIXTEEN, 0, depth=16), grey(SIXTEEN >> 8)),
    "16-bit RGB PNG": (oracle.png(RGB * np.uint16(257) ^ 0x55, 2, depth=16), RGB),
    "palette PNG": (palette_png(opaque=True), PALETTE[INDICES][..., :3]),
    "palette PNG with transparency": (palette_png(opaque=False), PALETTE[INDICES]),
    "RGBA PNG": (oracle.png(ALPHA, 6), ALPHA),
    "16-bit RGBA PNG": (oracle.png(ALPHA * np.uint16(257), 6, depth=16), ALPHA),
    "grey and alpha PNG": (oracle.png(ALPHA[..., 2:], 4), np.dstack([grey(ALPHA[..., 2]), ALPHA[..., 3]])),
    "RGBA WebP": (lossless(ALPHA, "WebP"), ALPHA),
    "RGB PNG with one transparent colour": (
        oracle.png(RGB, 2, chunks=((b"tRNS", struct.pack(">3H", *map(int, RGB[3, 5]))),)),
        keyed(RGB, RGB[3, 5]),
    ),
    "grey PNG with one transparent level": (
        oracle.png(GREY, 0, chunks=((b"tRNS", struct.pack(">H", int(GREY[3, 5]))),)),
        keyed(grey(GREY), GREY[3, 5]),
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_pixels_are_exact(name: str):
    data, pixels = EXACT[name]
    expected = oracle.composite(pixels, DECODE.background) if pixels.shape[2] == 4 else pixels
    assert np.array_equal(levels(data), expected)


@pytest.mark.parametrize("name", [name for name, (_, pixels) in EXACT.items() if pixels.shape[2] == 4])
def test_without_a_background_alpha_is_dropped(name: str):
    data, pixels = EXACT[name]
    assert np.array_equal(levels(data, replace(DECODE, background=())), pixels[..., :3])


def test_one_bit_is_black_or_white():
    bits = GREY > 128
    assert np.array_equal(levels(encoded(Image.fromarray(bits), "PNG")), grey(bits * 255))


@pytest.mark.parametrize("depth_kind", [0, 2])
def test_a_transparent_colour_of_16_bits_is_refused(depth_kind: int):
    pixels = SIXTEEN if depth_kind == 0 else np.repeat(SIXTEEN[..., None], 3, axis=-1)
    data = oracle.png(pixels, depth_kind, depth=16, chunks=((b"tRNS", bytes(2 if depth_kind == 0 else 6)),))
    error = refusal(data)
    assert error.kind == "unsupported" and "alpha channel" in str(error)
    assert levels(data, replace(DECODE, background=())).shape == (24, 36, 3)


@pytest.mark.parametrize("options", [{"quality": 75}, {"quality": 90, "subsampling": 0}, {"progressive": True}])
@pytest.mark.parametrize("pixels", [RGB, GREY], ids=["RGB", "grey"])
def test_jpeg_equals_another_decoder(pixels: NDArray, options: dict):
    data = encoded(pixels, "JPEG", **options)
    wire = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    other = torchvision.io.decode_jpeg(wire, mode=torchvision.io.ImageReadMode.RGB).permute(1, 2, 0).numpy()
    tolerance = DECODE.tolerance
    difference = np.abs(levels(data) - other)
    # The same bits today: both are libjpeg-turbo. What a stage promises is what is asked for.
    assert difference.mean() <= tolerance.mean and difference.max() <= tolerance.largest


def cmyk_jpegs() -> dict[str, tuple[bytes, NDArray]]:
    """Inks as a JPEG in three ways, and what they should be decoded to: without loss but for some levels."""
    inks = np.full((16, 16, 4), (40, 120, 200, 30), np.uint8)
    inks[:, 8:] = (220, 10, 90, 100)
    options = {"quality": 100, "subsampling": 0}
    inverted = encoded(Image.frombytes("CMYK", (16, 16), inks.tobytes()), "JPEG", **options)
    plain = encoded(Image.frombytes("CMYK", (16, 16), (255 - inks).tobytes()), "JPEG", **options)
    marker = plain.index(b"\xff\xee")
    end = marker + 2 + int.from_bytes(plain[marker + 2 : marker + 4], "big")
    # YCCK: Y, Cb, Cr are of the inks as if these were red, green and blue; the marker says transform 2.
    ycc = np.asarray(Image.fromarray(inks[..., :3].copy()).convert("YCbCr"))
    planes = np.dstack([ycc, 255 - inks[..., 3]])
    ycck = bytearray(encoded(Image.frombytes("CMYK", (16, 16), (255 - planes).tobytes()), "JPEG", **options))
    at = ycck.index(b"Adobe") + 11
    assert ycck[at] == 0
    ycck[at] = 2
    return {"Adobe": (inverted, inks), "plain": (plain[:marker] + plain[end:], inks), "YCCK": (bytes(ycck), inks)}


@pytest.mark.parametrize("way", ["Adobe", "plain", "YCCK"])
def test_cmyk(way: str):
    data, inks = cmyk_jpegs()[way]
    # Flat areas at quality 100 are exact, up to rounding to whole levels; YCCK's own rounding makes that 1.7.
    assert np.abs(levels(data) - oracle.cmyk(inks)).max() <= (4 if way == "YCCK" else 0.5)


def with_orientation(kind: str, pixels: NDArray, orientation: object) -> bytes:
    exif = Image.Exif()
    exif[Base.Orientation] = orientation
    return encoded(pixels, kind, quality=95, exif=exif) if kind == "JPEG" else lossless(pixels, kind, exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ENDS)
def test_orientation(kind: str, orientation: int):
    scene = picture(32, 48)
    data = with_orientation(kind, oracle.stored(scene, orientation), orientation)
    signal = decode(data)
    assert (signal.metadata["width"], signal.metadata["height"], signal.metadata["format"]) == (48, 32, kind)
    difference = np.abs(signal.data[0].permute(1, 2, 0).numpy() - scene)
    assert difference.mean() < 6 if kind == "JPEG" else not difference.any()
    as_stored = levels(data, replace(DECODE, orientation="stored"))
    assert np.abs(as_stored - oracle.stored(scene, orientation)).mean() < 6


@pytest.mark.parametrize("orientation", [0, 9, 4711])
def test_an_orientation_that_does_not_exist_is_none(orientation: int):
    assert np.array_equal(levels(with_orientation("PNG", RGB, orientation)), RGB)


def test_an_orientation_behind_the_pixels_is_found():
    data = with_orientation("PNG", oracle.stored(RGB, 6), 6)
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    assert start < data.index(b"IDAT")
    moved = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    assert np.array_equal(levels(moved), RGB)


def test_of_a_jpeg_with_several_pictures_the_first():
    data = encoded(RGB, "MPO", save_all=True, append_images=[Image.fromarray(255 - RGB)])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert decode(data).metadata["format"] == "JPEG" and np.array_equal(levels(data), levels(encoded(RGB, "JPEG")))


@pytest.mark.parametrize("kind", ["PNG", "WebP"])
def test_of_an_animation_the_first_picture(kind: str):
    later = [Image.fromarray(255 - RGB), Image.fromarray(RGB[::-1].copy())]
    assert np.array_equal(levels(lossless(RGB, kind, save_all=True, append_images=later, duration=50)), RGB)


def test_of_an_animated_png_the_picture_for_programs_without_animation():
    later = [Image.fromarray(255 - RGB), Image.fromarray(RGB[::-1].copy())]
    data = encoded(RGB, "PNG", save_all=True, append_images=later, default_image=True)
    assert b"acTL" in data and np.array_equal(levels(data), RGB)


@pytest.mark.parametrize(
    "data",
    [
        b"GIF89a\1\0",
        b"BM" + bytes(60),
        b"II*\0" + bytes(20),
        b"<svg/>",
        b"\0\0\0\x18ftypheic",
        b"\x89PN",
        b"RIFF1234WAVE",
    ],
)
def test_other_formats_are_unsupported(data: bytes):
    error = refusal(data)
    assert error.kind == "unsupported"
    assert data[:8].hex(" ") in str(error) and "JPEG, PNG or WebP" in str(error)


def test_an_empty_file_is_malformed():
    assert refusal(b"").kind == "malformed" and "0 bytes" in str(refusal(b""))


def sound_files() -> dict[str, bytes]:
    small = picture(20, 18)
    return {
        "JPEG": encoded(small, "JPEG"),
        "progressive JPEG": encoded(small, "JPEG", progressive=True),
        "PNG": encoded(small, "PNG"),
        "palette PNG": encoded(Image.fromarray(small).quantize(9), "PNG"),
        "animated PNG": encoded(small, "PNG", save_all=True, append_images=[Image.fromarray(255 - small)]),
        "WebP": encoded(small, "WebP"),
        "lossless WebP": lossless(small, "WebP"),
        "animated WebP": encoded(small, "WebP", save_all=True, append_images=[Image.fromarray(255 - small)]),
    }


@pytest.mark.parametrize("name", sound_files())
def test_a_truncated_file_is_malformed_or_has_every_pixel(name: str):
    data = sound_files()[name]
    whole = levels(data)
    accepted = 0
    for end in range(12, len(data)):
        try:
            assert np.array_equal(levels(data[:end]), whole)
            accepted += 1
        except InputError as error:
            assert error.kind == "malformed" and "damaged or cut short" in str(error)
    # What may be missing: a PNG's check sums and end mark, an animation's later pictures.
    assert accepted < (len(data) if name == "animated PNG" else 32)


def png_of(size: tuple[int, int], depth: int, colour: int, interlaced: int, pixels: bytes) -> bytes:
    parts = [(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, interlaced))]
    packed = zlib.compress(pixels)
    parts += [(b"IDAT", packed[:20]), (b"IDAT", packed[20:]), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(body)) + name + body for name, body in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(c + struct.pack(">I", zlib.crc32(c[4:])) for c in chunks)


@pytest.mark.parametrize(("depth", "colour"), [(1, 0), (8, 0), (8, 2), (16, 2), (8, 4), (8, 6), (16, 6)])
@pytest.mark.parametrize("interlaced", [False, True], ids=["plain", "interlaced"])
def test_a_png_has_all_its_rows(depth: int, colour: int, interlaced: bool):
    """Compressed data that ends properly, but before the last row: Pillow shows black there."""
    width, height = 37, 35
    bits = depth * {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    rows = [1 + (len(range(x, width, dx)) * bits + 7) // 8 for x, y, dx, dy in passes for _ in range(y, height, dy)]
    whole = b"".join(b"\0" + bytes([17 * n % 251]) * (length - 1) for n, length in enumerate(rows))
    assert decode(png_of((width, height), depth, colour, interlaced, whole)).data.shape == (1, 3, height, width)
    for missing in (1, rows[-1], len(whole) - rows[0]):
        short = png_of((width, height), depth, colour, interlaced, whole[:-missing])
        with pytest.raises(
            InputError, match=f"PNG data has {len(whole) - missing:,} of {len(whole):,} bytes of pixels"
        ):
            decode(short)


@pytest.mark.parametrize("name", sound_files())
def test_damage_is_never_our_fault(name: str):
    data, generator = sound_files()[name], random.Random(1)
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(generator.randint(1, 4)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        try:
            decode(bytes(damaged), max_pixels=1e6)
        except InputError as error:
            assert str(error)


def huge(kind: str) -> bytes:
    """A file of some hundred bytes whose header says 15,000 x 16,000 pixels."""
    if kind == "PNG":
        body = struct.pack(">IIBBBBB", 15000, 16000, 8, 2, 0, 0, 0)
        header = struct.pack(">I", 13) + b"IHDR" + body + struct.pack(">I", zlib.crc32(b"IHDR" + body))
        return b"\x89PNG\r\n\x1a\n" + header + oracle.png(RGB, 2)[33:]
    if kind == "JPEG":
        data = bytearray(encoded(RGB, "JPEG"))
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", 16000, 15000)
        return bytes(data)
    size, bits = (14999).to_bytes(3, "little") + (15999).to_bytes(3, "little"), 14999 | 15999 << 14
    chunk = {
        "WebP VP8X": b"VP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + size,
        "WebP VP8L": b"VP8L" + struct.pack("<IBI", 12, 0x2F, bits) + bytes(7),
        "WebP VP8": b"VP8 "
        + struct.pack("<I", 20)
        + bytes(3)
        + b"\x9d\1\x2a"
        + struct.pack("<HH", 15000, 16000)
        + bytes(10),
    }[kind]
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WebP VP8X", "WebP VP8L", "WebP VP8"])
def test_too_many_pixels_are_refused_before_memory_is_taken(kind: str, monkeypatch: pytest.MonkeyPatch):
    def no_memory(*_: object) -> None:
        raise AssertionError("memory was taken for pixels")

    monkeypatch.setattr(ImageFile.ImageFile, "load_prepare", no_memory)
    monkeypatch.setattr("PIL._webp.WebPAnimDecoder", no_memory)
    error = refusal(huge(kind), max_pixels=50_000_000)
    assert error.kind == "too_large"
    assert "15,000 x 16,000" in str(error) and "50,000,000" in str(error)


@pytest.mark.parametrize("kind", ENDS)
def test_as_many_pixels_as_allowed_are_read(kind: str):
    data = encoded(RGB, kind)
    assert decode(data, max_pixels=24 * 36).data.shape == (1, 3, 24, 36)
    assert refusal(data, max_pixels=24 * 36 - 1).kind == "too_large"


def of_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes again until there are so many."""
    file = io.BytesIO()
    Image.new("RGB", (64, 48), (90, 120, 60)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * (count - data.count(b"\xff\xda")) + data[-2:]


def test_a_jpeg_of_too_many_scans_is_refused():
    """A scan of 26 bytes costs a pass over all pixels: 500 of them on 12 million pixels, 84 kB, took 3.7 s."""
    assert decode(of_scans(100)).data.shape == (1, 3, 48, 64)
    error = refusal(of_scans(101))
    assert error.kind == "too_large" and "101 scans, at most 100" in str(error)


def test_only_scans_are_counted_as_such():
    whole = encoded(RGB, "JPEG")
    comment = b"\xff\xda" * 20_000
    hidden = whole[:2] + b"\xff\xfe" + (2 + len(comment)).to_bytes(2, "big") + comment + whole[2:]
    # Behind its end some cameras write a film.
    assert torch.equal(decode(hidden + comment).data, decode(whole).data)


@pytest.mark.parametrize("kind", ENDS)
@pytest.mark.filterwarnings("error")
def test_a_limit_that_the_process_shares_has_no_part(kind: str, monkeypatch: pytest.MonkeyPatch):
    # Half of the pixels: Pillow would warn above the limit, and refuse above twice as many.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 18)
    assert decode(encoded(RGB, kind)).data.shape == (1, 3, 24, 36)


def test_beyond_what_libwebp_may_open_is_too_large(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24)
    assert refusal(encoded(RGB, "WebP")).kind == "too_large"


@pytest.mark.parametrize(
    "chunk",
    [
        (b"zTXt", b"k\0\0" + zlib.compress(bytes(10_000_000))),
        (b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(10_000_000))),
        (b"iCCP", b"k\0\0" + zlib.compress(bytes(10_000_000))),
    ],
    ids=lambda chunk: chunk[0].decode(),
)
def test_text_that_grows_without_end_is_malformed(chunk: tuple[bytes, bytes]):
    error = refusal(oracle.png(RGB, 2, chunks=(chunk,)))
    assert error.kind == "malformed"


def test_too_small_pictures_are_refused():
    stage = PIPELINE.stages["decode_image"]
    for shape in ((1, 1), (31, 400), (400, 31)):
        error = refusal(encoded(picture(*shape), "PNG"), stage)
        assert error.kind == "malformed"
        assert f"{shape[1]} x {shape[0]} pixels, expected at least 32 x 32" in str(error)
    assert decode(encoded(picture(32, 32), "PNG"), stage).data.shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    "changes",
    [{"background": (1, 2)}, {"background": (0, 0, 256)}, {"min_side": 0}],
    ids=str,
)
def test_parameters_that_make_no_sense_are_refused(changes: dict):
    with pytest.raises(PipelineError, match="decode_image"):
        replace(DECODE, **changes)


# --- resize and caffe_preprocess

SIZES = [(224, 224), (224, 300), (97, 500), (640, 480), (33, 32), (1000, 223)]


def resized(pixels: NDArray, method: str, height: int = 224, width: int = 224) -> NDArray:
    stage = replace(PIPELINE.stages["resize"], method=method, height=height, width=width)
    data = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1).unsqueeze(0)
    return stage(Signal(data)).data[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("target", [(224, 224), (100, 250)])
@pytest.mark.parametrize("size", SIZES)
def test_resize(size: tuple[int, int], target: tuple[int, int]):
    pixels = picture(*size)
    bilinear = np.abs(resized(pixels, "bilinear", *target) - oracle.bilinear(pixels, *target))
    # Source positions up to 1000 are float32: 1000 eps = 6e-5 of a step between neighbours of some 60 levels. 2e-3 measured.
    assert bilinear.max() <= 6e-3
    nearest = oracle.nearest(pixels, *target)
    assert np.array_equal(resized(pixels, "pil_nearest", *target)[~np.isnan(nearest)], nearest[~np.isnan(nearest)])
    # Pillow goes first along the axis that leaves it less to do; another order is 0.2 levels away on average.
    ours = resized(pixels, "pil_bilinear", *target)
    antialiased = min((np.abs(ours - oracle.antialiased(pixels, *target, o)) for o in ((0, 1), (1, 0))), key=np.mean)
    # Its weights are whole numbers of 22 bits, so that a sum near a half may go to the other side: 1 in 80 measured.
    assert antialiased.max() <= 1 and antialiased.mean() <= 0.04


@pytest.mark.parametrize("size", SIZES)
def test_resize_as_keras_does(size: tuple[int, int]):
    pixels = picture(*size).astype(np.float32)
    ours = resized(pixels, "bilinear")
    assert np.array_equal(keras.ops.image.resize(pixels, (224, 224)).numpy(), ours)
    assert np.array_equal(keras.layers.Resizing(224, 224)(pixels[None])[0].numpy(), ours)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("size", SIZES)
def test_the_variant_is_what_load_img_gives(size: tuple[int, int], interpolation: str, tmp_path: Path):
    variant = Pipeline.from_yaml(ARCHIVE / "variants" / "load_img.yaml")
    exif = Image.Exif()
    exif[Base.Orientation] = 6
    (tmp_path / "a.png").write_bytes(encoded(picture(*size, 4), "PNG", exif=exif))
    theirs = keras.utils.load_img(tmp_path / "a.png", target_size=(224, 224), interpolation=interpolation)
    method = replace(variant.stages["resize"], method=f"pil_{interpolation}")
    ours = variant.replace(resize=method).trace((tmp_path / "a.png").read_bytes())["resize"]
    assert np.array_equal(ours[0].permute(1, 2, 0).numpy(), keras.utils.img_to_array(theirs))


def test_pillow_is_not_given_anything_but_levels():
    for wrong in (RGB + 0.5, RGB - 100.0, RGB * 2.0):
        with pytest.raises(PipelineError, match="right behind decode_image"):
            resized(wrong, "pil_nearest")


def test_caffe_preprocess():
    ours = PIPELINE.stages["caffe_preprocess"](
        Signal(torch.from_numpy(RGB).permute(2, 0, 1).unsqueeze(0).float())
    ).data[0]
    # One subtraction of numbers up to 255 in float32, and means that are rounded to it: 2 x 4e-6 (eps is 2**-24).
    assert np.abs(ours.numpy() - oracle.caffe_preprocess(RGB)).max() <= 3e-5
    theirs = keras.applications.resnet.preprocess_input(RGB.astype(np.float32), data_format="channels_last")
    assert np.array_equal(ours.permute(1, 2, 0).numpy(), theirs)


@pytest.mark.parametrize("kind", ["PNG", "WebP"])
def test_the_whole_pipeline(kind: str):
    pixels = picture(180, 320, 4)
    signal = PIPELINE.run(lossless(pixels, kind))
    flat = oracle.composite(pixels, (255, 255, 255))
    assert signal.data.shape == (1, 3, 224, 224)
    assert np.abs(signal.data[0].numpy() - oracle.caffe_preprocess(oracle.bilinear(flat, 224, 224))).max() <= 6e-3
    assert dict(signal.metadata) == {"width": 320, "height": 180, "format": kind}


@pytest.mark.parametrize("variant", sorted((ARCHIVE / "variants").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_variant_runs_and_differs(variant: Path):
    data = lossless(picture(300, 200, 4), "PNG")
    changed = Pipeline.from_yaml(variant)
    assert PIPELINE.diff(changed)
    assert float((PIPELINE(data) - changed(data)).abs().mean()) > 1


def test_rgb_order_differs_in_nothing_but_the_order():
    data = encoded(RGB.repeat(4, axis=0), "PNG")
    swapped = Pipeline.from_yaml(ARCHIVE / "variants" / "rgb_order.yaml")(data)
    assert torch.equal(swapped.flip(1), PIPELINE(data))


# --- both together, as they are served


def same_as_the_plain_stages(data: bytes, pipeline: Pipeline = PIPELINE) -> None:
    fast, plain = pipeline.run(data), deque(pipeline.steps(data), maxlen=1).pop()[1]
    assert torch.equal(fast.data, plain.data) and fast.metadata == plain.metadata
    assert (fast.data.stride(), fast.data.dtype) == (plain.data.stride(), plain.data.dtype)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Every picture is resized in parts; the sizes of those that were."""
    resized, sizes = fused._resized, []

    def counted(rows, size, target, way):
        sizes.append(size)
        return resized(rows, size, target, way)

    assert fused._arithmetic(224, 224)
    monkeypatch.setattr(fused, "_FEW_PIXELS", 0)
    monkeypatch.setattr(fused, "_resized", counted)
    sizes.clear()
    return sizes


LARGE = [(2100, 1999), (224, 5000), (5000, 224), (33, 20000), (20000, 33), (225, 223), (448, 448), (7, 7000), (100, 90)]


@pytest.mark.parametrize("size", LARGE)
def test_a_picture_resized_in_parts_has_the_same_bits(size: tuple[int, int], parts: list):
    same_as_the_plain_stages(encoded(picture(max(32, size[0]), max(32, size[1])), "JPEG", quality=90))
    assert parts == [(max(32, size[0]), max(32, size[1]))]


@pytest.mark.parametrize("name", [*EXACT, *cmyk_jpegs()])
def test_a_picture_of_any_kind_has_the_same_bits_in_parts(name: str, parts: list):
    data = EXACT[name][0] if name in EXACT else cmyk_jpegs()[name][0]
    for background in ((), (30, 200, 90)):
        decode_image = replace(DECODE, background=background)
        for method in ("bilinear", "pil_bilinear", "pil_nearest"):
            resize = replace(PIPELINE.stages["resize"], method=method)
            same_as_the_plain_stages(data, PIPELINE.replace(decode_image=decode_image, resize=resize))
    assert len(parts) == 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_has_the_same_bits_in_parts(orientation: int, parts: list, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("skewless.core.stages.image._PART", 700)
    scene = picture(300, 480)
    for method in ("bilinear", "pil_bilinear", "pil_nearest"):
        resize = replace(PIPELINE.stages["resize"], method=method)
        data = with_orientation("PNG", oracle.stored(scene, orientation), orientation)
        turned, upright = PIPELINE.replace(resize=resize), with_orientation("PNG", scene, 1)
        same_as_the_plain_stages(data, turned)
        assert torch.equal(turned(data), turned(upright))
    assert np.array_equal(levels(data), scene)


@pytest.mark.parametrize("target", [(224, 300), (300, 229), (129, 130), (64, 64), (32, 500), (1, 1)])
def test_to_any_size_it_has_the_same_bits(target: tuple[int, int], parts: list):
    assert fused._arithmetic(*target)
    parts.clear()
    resize = replace(PIPELINE.stages["resize"], height=target[0], width=target[1])
    same_as_the_plain_stages(encoded(picture(700, 900), "PNG"), PIPELINE.replace(resize=resize))
    assert parts == [(700, 900)]


def test_where_parts_give_other_bits_the_whole_is_resized(parts: list, monkeypatch: pytest.MonkeyPatch):
    right = fused._resized
    monkeypatch.setattr(fused, "_resized", lambda *given: torch.nextafter(right(*given), torch.tensor(1e3)))
    fused._arithmetic.cache_clear()
    try:
        assert fused._arithmetic(224, 224) is None
        same_as_the_plain_stages(encoded(picture(700, 900), "PNG"))
    finally:
        fused._arithmetic.cache_clear()


def test_with_antialiasing_the_whole_is_resized(parts: list):
    resize = replace(PIPELINE.stages["resize"], antialias=True)
    same_as_the_plain_stages(encoded(picture(700, 900), "PNG"), PIPELINE.replace(resize=resize))
    assert parts == []


def test_with_several_threads_the_whole_is_resized(parts: list):
    torch.set_num_threads(2)
    same_as_the_plain_stages(encoded(picture(700, 900), "PNG"))
    assert parts == []


MEMORY = """
import io, sys
import numpy as np, torch
from PIL import Image
from skewless.core.pipeline import Pipeline

torch.set_num_threads(1)
pipeline = Pipeline.from_yaml(sys.argv[1])

def encoded(height, width):
    file = io.BytesIO()
    Image.new("RGB", (width, height), (9, 99, 199)).save(file, sys.argv[2])
    return file.getvalue()

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

for height, width in ((2100, 2000), (3000, 4000)):
    data = encoded(height, width)
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    pipeline.run(data)
    print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells a process its own peak memory")
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_large_picture_takes_little_more_than_decoding_it(kind: str):
    """12 million pixels are 48 MB for Pillow, and 144 MB as float32."""
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, ARCHIVE / "pipeline.yaml", kind],
        capture_output=True,
        text=True,
        check=True,
        cwd=ARCHIVE.parents[1],
    )
    _, twelve_million = map(int, run.stdout.split())
    assert twelve_million < 48_000_000 + 24_000_000


# --- the decision

DECISION = build_postprocessor({"class_probabilities": {"classes": ["animal", "avatar", "human"], "threshold": 0.7}})
FACTS = {"width": 640, "height": 480, "format": "PNG"}


def test_the_most_probable_class_is_the_answer():
    outputs = {"class_probabilities": torch.tensor([0.125, 0.75, 0.125])}
    body = DECISION(outputs, FACTS, 0.7)
    assert body == {
        "label": "avatar",
        "confidence": 0.75,
        "confident": True,
        "probabilities": {"animal": 0.125, "avatar": 0.75, "human": 0.125},
        "threshold_used": 0.7,
        "width": 640,
        "height": 480,
    }
    assert DECISION.read(body) == ((0.125, 0.75, 0.125), 1)
    assert DECISION.classes == ("animal", "avatar", "human") and not DECISION.tuned


@pytest.mark.parametrize(("threshold", "confident"), [(0.5, True), (0.500001, False), (0.0, True), (1.0, False)])
def test_confident_is_at_or_above_the_threshold(threshold: float, confident: bool):
    body = DECISION({"class_probabilities": torch.tensor([0.25, 0.25, 0.5])}, FACTS, threshold)
    assert (body["label"], body["confident"], body["threshold_used"]) == ("human", confident, threshold)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"classes": ["a", "b"], "threshold": 0.5}, "three or more"),
        ({"classes": ["a", "b", "a"], "threshold": 0.5}, "different names"),
        ({"classes": "abc", "threshold": 0.5}, "expected a list"),
        ({"classes": ["a", "b", 3], "threshold": 0.5}, r"classes\[2\] is 3, expected text"),
        ({"classes": ["a", "b", "c"], "threshold": 1.5}, "threshold is 1.5"),
        ({"classes": ["a", "b", "c"]}, "threshold"),
    ],
)
def test_decisions_that_make_no_sense_are_refused(parameters: dict, message: str):
    with pytest.raises(ValueError, match=message):
        build_postprocessor({"class_probabilities": parameters})


def test_a_network_with_another_number_of_classes_is_refused():
    with pytest.raises(ValueError, match="4 probabilities, for 3 classes"):
        DECISION.scores({"class_probabilities": torch.full((4,), 0.25)})


# --- the corpus


@pytest.fixture(scope="module")
def drawn() -> list:
    return list(corpus.examples(24))


def test_the_corpus_is_the_same_every_time(drawn: list):
    again = [example for example, _ in zip(corpus.examples(corpus.MIN_COUNT), range(6), strict=False)]
    # Only the splits depend on how many pictures there are.
    assert [replace(e, split="") for e in again] == [replace(e, split="") for e in drawn[:6]]
    assert next(corpus.examples(corpus.MIN_COUNT, seed=1)).data != drawn[0].data


@pytest.mark.parametrize("count", [corpus.MIN_COUNT, 36, 150])
def test_an_artist_is_in_one_split_with_every_label(count: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(corpus, "picture", lambda *_: (b"", "png"))
    made = list(corpus.examples(count))
    groups = {(e.group, e.split) for e in made}
    assert len(groups) == len({group for group, _ in groups}) == -(-count // corpus.PICTURES_PER_ARTIST)
    assert {(e.split, e.label) for e in made} == {(s, k) for s in ("train", "val", "test") for k in corpus.LABELS}


def test_nothing_about_the_file_betrays_the_label(drawn: list):
    for three in zip(drawn[::3], drawn[1::3], drawn[2::3], strict=True):
        assert [e.label for e in three] == list(corpus.LABELS)
        images = [Image.open(io.BytesIO(e.data)) for e in three]
        assert len({(i.format, i.mode, i.size, i.getexif().get(Base.Orientation)) for i in images}) == 1
        assert len({e.name.rpartition(".")[2] for e in three}) == 1


def test_every_picture_is_read(drawn: list):
    metadata = [PIPELINE.run(e.data).metadata for e in drawn]
    assert {f["format"] for f in metadata} == set(ENDS)
    assert all(96 <= f[side] <= 832 for f in metadata for side in ("width", "height"))
    images = [Image.open(io.BytesIO(e.data)) for e in drawn]
    assert {i.getexif().get(Base.Orientation) for i in images} > {None, 6}
