"""From an encoded picture to the input of a network that was trained in Keras."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.ExifTags import Base
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from skewless.core.stages import tensorflow_resize
from skewless.core.stages.stage import InputError, Payload, PipelineError, Signal, Stage, Tolerance

FORMATS = "JPEG, PNG or WebP"
# Each costs the decoder a pass over all pixels and a file some twenty bytes. Programs write 1 to 15 of them.
MOST_SCANS = 100

# Between libjpeg-turbo and FFmpeg's decoder, colour planes unreduced: mean 0.06, largest 3. Planes enlarged in another way
# are another picture (mean 1 to 14) and not within this.
_DECODERS = Tolerance(0.2, 8.0, "JPEG decoders round differently; PNG and WebP are exact")


@dataclass(frozen=True)
class DecodeImage(Stage, name="decode_image"):
    """Bytes to RGB levels `(1, 3, height, width)`: float32, whole numbers from 0 to 255, upright.

    JPEG, PNG and WebP, told apart by their content. Of an animation the first picture; of an animated PNG the one that
    programs without animation show. The orientation that the file's metadata gives is applied. Grey fills all three
    channels; 16 bits keep their upper 8, as libpng's strip_16 does. CMYK becomes (255 - C)(255 - K) / 255 and so on, whether
    stored as such or inverted behind an Adobe marker. Colour profiles are not applied.

    background: the RGB levels that transparent pixels are blended with, in proportion to their alpha. Empty: alpha is
        dropped and shows whatever colour lies under it, as Keras' loaders do.
    orientation: "upright" applies the metadata's, "stored" ignores it, as Keras' loaders do.
    min_side: the fewest pixels in height and in width.

    Metadata added: `width` and `height` of the upright picture in pixels, `format` ("JPEG", "PNG" or "WebP").

    Raises InputError: "unsupported" for what is none of these formats; "malformed" for an empty, damaged or truncated
    file, and for a picture smaller than `min_side`; "too_large" for more pixels than `Payload.max_pixels`, by the file's
    header, before memory is taken for them, and for a JPEG of more than MOST_SCANS scans.
    """

    reads: ClassVar[str] = "image"
    unit: ClassVar[str] = "level"
    packages: ClassVar[tuple[str, ...]] = (
        "pillow",
        "numpy",
    )
    tolerance: ClassVar[Tolerance] = _DECODERS

    background: tuple[int, ...]
    min_side: int
    orientation: Literal["upright", "stored"] = "upright"

    def __post_init__(self):
        levels = len(self.background) in (0, 3) and all(0 <= level <= 255 for level in self.background)
        self.require(levels, f"background is {list(self.background)}, expected three levels from 0 to 255, or []")
        self.require(self.min_side > 0, f"min_side is {self.min_side}, expected at least 1 pixel")

    def __call__(self, signal: Signal) -> Signal:
        picture = self.read(signal.data)
        return picture.signal(signal, levels_of(picture.upright()))

    def read(self, payload: Payload) -> Picture:
        """The decoded picture; raises InputError as calling the stage does."""
        kind = identify(payload.data)
        try:
            image = _open(payload, kind)
            turn = _TURNS.get(image.getexif().get(Base.Orientation, 0)) if self.orientation == "upright" else None
            image.load()
            # Byte 24 of a PNG is its bit depth. Pillow compares such a colour with levels of which it kept 8 bits.
            keyed = image.has_transparency_data and "transparency" in image.info
            if self.background and keyed and payload.data[24] == 16:
                raise InputError(
                    "a PNG of 16 bits with one transparent colour (tRNS) is not read; save it with 8 bits or with an alpha "
                    "channel",
                    "unsupported",
                )
            picture = Picture(image, kind, turn, self.background)
            picture.rows(0, 1)  # a palette may be damaged, too
        except (InputError, MemoryError):
            raise
        except Image.DecompressionBombError as error:
            raise InputError(
                f"the {kind} data is more than Pillow opens: {error}; send a smaller one", "too_large"
            ) from error
        except Exception as error:  # Pillow raises whatever the damage makes of its parsers
            reason = str(error) or type(error).__name__
            raise InputError(
                f"the {kind} data cannot be decoded: {reason}; the file is damaged or cut short"
            ) from error
        width, height = picture.size
        if min(width, height) < self.min_side:
            raise InputError(
                f"the picture is {width} x {height} pixels, expected at least {self.min_side} x {self.min_side}; send a "
                "larger one"
            )
        return picture


_PART = 2**20  # pixels of a picture that are turned and converted at once


@dataclass(frozen=True)
class Picture:
    """A decoded picture as its file stores it, at most 4 bytes per pixel, and how to see it upright and in RGB.

    turn: None where it is upright. background: as DecodeImage has it.
    """

    image: Image.Image
    kind: str
    turn: Image.Transpose | None
    background: tuple[int, ...]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the upright picture."""
        width, height = self.image.size
        return (height, width) if self.turn in _ACROSS else (width, height)

    def signal(self, given: Signal, data: torch.Tensor) -> Signal:
        """What comes of a signal when `data` was computed from its picture."""
        width, height = self.size
        return given.of(data, width=width, height=height, format=self.kind)

    def rows(self, start: int, stop: int) -> Image.Image:
        """Rows `start` to `stop` of the upright picture in RGB."""
        width, height = self.image.size
        across = self.turn in _ACROSS
        if self.turn in _BACKWARDS:
            total = width if across else height
            start, stop = total - stop, total - start
        part = self._rgb(self.image.crop((start, 0, stop, height) if across else (0, start, width, stop)))
        return part if self.turn is None else part.transpose(self.turn)

    def upright(self) -> Image.Image:
        """The upright picture in RGB: the stored one itself, or one copy of it, which is made part by part."""
        if (
            self.image.mode == "RGB"
            and self.turn is None
            and not (self.background and self.image.has_transparency_data)
        ):
            return self.image
        width, height = self.size
        whole = Image.new("RGB", (width, height))
        step = max(1, _PART // width)
        for start in range(0, height, step):
            whole.paste(self.rows(start, min(start + step, height)), (0, start))
        return whole

    def _rgb(self, image: Image.Image) -> Image.Image:
        if self.background and image.has_transparency_data:
            with_alpha = image.convert("RGBA")
            canvas = Image.new("RGB", image.size, self.background)
            canvas.paste(with_alpha, mask=with_alpha.getchannel("A"))
            return canvas
        if image.mode == "I;16":
            # Pillow's own conversion clips at 255.
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        if image.mode == "CMYK" and "adobe" not in image.info:
            # Pillow takes every CMYK JPEG for an inverted one.
            return image.point(lambda level: 255 - level).convert("RGB")
        # A palette with alpha goes to RGB by way of RGBA, or Pillow warns.
        return image.convert("RGBA" if image.has_transparency_data else "RGB").convert("RGB")


# What turns a picture upright, by its EXIF orientation (CIPA DC-008, "Exchangeable image file format", 4.6.4).
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Those of them after which the rows are what the file stores as columns, and those after which the last row or column is first.
_ACROSS = {_TURNS[5], _TURNS[6], _TURNS[7], _TURNS[8]}
_BACKWARDS = {_TURNS[3], _TURNS[4], _TURNS[7], _TURNS[8]}


def identify(data: bytes) -> str:
    """The picture's format, from its first bytes; raises InputError for what is not one of FORMATS."""
    if not data:
        raise InputError(f"the picture is empty (0 bytes); send one as {FORMATS}")
    if data[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    shown = data[:8].hex(" ")
    raise InputError(f"not a known picture format (it starts with {shown}); send {FORMATS}", "unsupported")


_READERS: dict[str, Callable[[io.BytesIO], ImageFile]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WebP": WebPImageFile,
}


def _open(payload: Payload, kind: str) -> ImageFile:
    """The picture with its header read and no pixel decoded."""
    # Not Image.open: it would hold the picture against a limit that the whole process shares, and read the stereo pairs
    # that some cameras write into a JPEG as another format.
    if kind == "WebP":
        # libwebp takes memory for the whole canvas as soon as it is opened.
        _check_size(_webp_size(payload.data), payload)
    image = _READERS[kind](io.BytesIO(payload.data))
    _check_size(image.size, payload)
    if kind == "JPEG" and (scans := _scans(payload.data)) > MOST_SCANS:
        raise InputError(
            f"the JPEG sends its picture in {scans:,} scans, at most {MOST_SCANS} are accepted; save it again",
            "too_large",
        )
    if kind == "PNG":
        _check_png_complete(payload.data)
    return image


# Of a PNG's seven passes when it is interlaced: first column and row, and steps to the next (PNG specification, 8).
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type


def _check_png_complete(data: bytes) -> None:
    """Pillow gives black for the rows that are missing of a PNG whose compressed data has a proper end."""
    width, height, bits, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    wanted = 0
    for column, row, across, down in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = -((column - width) // across), -((row - height) // down)
        if columns > 0 and rows > 0:
            # A row begins with its filter's number.
            wanted += rows * (1 + -(-columns * _PNG_CHANNELS[colour] * bits // 8))
    inflating, found, at = zlib.decompressobj(), 0, 8
    while found < wanted and at + 8 <= len(data) and not inflating.eof:
        size, name = struct.unpack_from(">I4s", data, at)
        part = data[at + 8 : at + 8 + size] if name == b"IDAT" else b""
        while part and found < wanted:
            found += len(inflating.decompress(part, 2**20))
            part = inflating.unconsumed_tail
        at += 12 + size
    found += 0 if found >= wanted else len(inflating.flush())
    if found < wanted:
        raise InputError(
            f"the PNG data has {found:,} of {wanted:,} bytes of pixels; the file is damaged or cut short, send the whole one"
        )


# A marker that a length follows (ITU-T T.81, B.1.1.3): no stuffed zero, no restart, no start of an image, no fill byte.
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")


def _scans(data: bytes) -> int:
    """How many scans a JPEG has before its end; what its segments hold and what follows its end is not looked at."""
    found, at = 0, 2
    while (marker := _MARKER.search(data, at)) and marker[0] != b"\xff\xd9":
        found += marker[0] == b"\xff\xda"
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return found


def _check_size(size: tuple[int, int], payload: Payload) -> None:
    if size[0] * size[1] > payload.max_pixels:
        raise InputError(
            f"the picture has {size[0]:,} x {size[1]:,} pixels, at most {payload.max_pixels:,} in all are accepted; send a "
            "smaller one",
            "too_large",
        )


def _webp_size(data: bytes) -> tuple[int, int]:
    """Canvas width and height from the first chunk (RFC 9649, "WebP Image Format", 2.5 to 2.7)."""
    chunk, body = data[12:16], data[20:30]
    if len(body) == 10:
        if chunk == b"VP8X":
            return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
        if chunk == b"VP8L":
            bits = int.from_bytes(body[1:5], "little")
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        if chunk == b"VP8 ":
            return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    raise ValueError("its first chunk is not a picture's header")


def levels_of(image: Image.Image) -> torch.Tensor:
    """An RGB image as `(1, 3, H, W)` float32."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().unsqueeze(0).float()


_PILLOW = {
    "pil_nearest": Image.Resampling.NEAREST,
    "pil_box": Image.Resampling.BOX,
    "pil_bilinear": Image.Resampling.BILINEAR,
    "pil_hamming": Image.Resampling.HAMMING,
    "pil_bicubic": Image.Resampling.BICUBIC,
    "pil_lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Resize(Stage, name="resize"):
    """Stretch `(1, C, H, W)` to `height` x `width` pixels; the aspect ratio is not kept.

    method: whose interpolation, and which.
        bilinear, nearest, bicubic, lanczos3, lanczos5, area, gaussian, mitchellcubic: what `tf.image.resize` does, and with
        it, on TensorFlow, `keras.layers.Resizing`, `keras.ops.image.resize` and `image_dataset_from_directory`, whose
        default is bilinear. Half-pixel centres, float32, not rounded. Keras on PyTorch or JAX has other numbers for some:
        bicubic on PyTorch, for one, is another cubic (a is -0.75, here -0.5).
        pil_nearest, pil_box, pil_bilinear, pil_hamming, pil_bicubic, pil_lanczos: what Pillow's `Image.resize` does on 8-bit
        levels, rounded to such. `Image.resize` without a method is pil_bicubic; `keras.utils.load_img(target_size=...)`,
        which has Pillow resize, is pil_nearest unless it is told otherwise.
    antialias: where the picture gets smaller, whether a method of Keras looks at all pixels that a new one covers, or only at
        the few nearest to its centre; False is Keras' default. Pillow always looks at all, pil_nearest never; area looks
        at all, nearest never. For these it stays False.

    Raises PipelineError where a `pil_` method gets something else than whole levels from 0 to 255.
    """

    unit: ClassVar[str] = "level"
    tolerance: ClassVar[Tolerance] = _DECODERS

    later: ClassVar[tuple[str, ...]] = ("antialias",)

    height: int
    width: int
    method: Literal[
        "bilinear", "nearest", "bicubic", "lanczos3", "lanczos5", "area", "gaussian", "mitchellcubic",
        "pil_nearest", "pil_box", "pil_bilinear", "pil_hamming", "pil_bicubic", "pil_lanczos",
    ]  # fmt: skip
    antialias: bool = False

    def __post_init__(self):
        self.require(
            self.height > 0 and self.width > 0, f"{self.height} x {self.width} pixels, expected at least 1 x 1"
        )
        takes_it = self.method not in _PILLOW and self.method not in ("nearest", "area")
        self.require(
            takes_it or not self.antialias,
            f"antialias is true, expected false: {self.method} has no choice there, it "
            + ("takes one pixel" if "nearest" in self.method else "always looks at all pixels that a new one covers"),
        )

    @property
    def by_pillow(self) -> bool:
        return self.method in _PILLOW

    @property
    def packages(self) -> tuple[str, ...]:  # type: ignore[override]  # read of stages, not classes; follows the method
        return ("pillow", "numpy") if self.by_pillow else ("torch", "numpy")

    def __call__(self, signal: Signal) -> Signal:
        if not self.by_pillow:
            return signal.of(self._as_keras(signal.data))
        levels = signal.data.to(torch.uint8)
        if not torch.equal(levels.float(), signal.data):
            raise PipelineError(f"stage 'resize': {self.method} takes 8-bit levels; put it right behind decode_image")
        return signal.of(self.image(Image.fromarray(levels[0].permute(1, 2, 0).numpy())))

    def image(self, image: Image.Image) -> torch.Tensor:
        """What a `pil_` method makes of an RGB image: `(1, 3, height, width)` float32."""
        return levels_of(image.resize((self.width, self.height), _PILLOW[self.method]))

    def _as_keras(self, picture: torch.Tensor) -> torch.Tensor:
        size = (self.height, self.width)
        if self.method == "nearest":
            return F.interpolate(picture, size, mode="nearest-exact")
        # PyTorch's bicubic is another one, but where it antialiases.
        if self.method == "bilinear" or (self.method == "bicubic" and self.antialias):
            return F.interpolate(picture, size, mode=self.method, align_corners=False, antialias=self.antialias)
        return tensorflow_resize.resize(picture, *size, self.method, self.antialias)


@dataclass(frozen=True)
class CaffePreprocess(Stage, name="caffe_preprocess"):
    """RGB levels `(1, 3, H, W)` to BGR minus `mean_bgr`, unscaled: `keras.applications.resnet.preprocess_input`, after the
    Caffe models of K. He et al., "Deep Residual Learning for Image Recognition", CVPR 2016."""

    unit: ClassVar[str] = "network input"
    cheap: ClassVar[bool] = True
    tolerance: ClassVar[Tolerance] = _DECODERS

    mean_bgr: tuple[float, ...]

    def __post_init__(self):
        self.require(len(self.mean_bgr) == 3, f"mean_bgr is {list(self.mean_bgr)}, expected three levels")

    def __call__(self, signal: Signal) -> Signal:
        mean = torch.tensor(self.mean_bgr, device=signal.data.device).view(1, 3, 1, 1)
        return signal.of(signal.data.flip(1) - mean)
