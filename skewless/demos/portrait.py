"""A synthetic corpus of drawn profile pictures, for demonstration only: it says nothing about photographs.

Nobody is shown: every picture is drawn from random numbers. "human" has faces with skin, hair and clothes, "animal" has
cats, dogs, bears and rabbits with fur, "avatar" has what programs give to those who send no picture: pixel patterns, emoji,
robots and silhouettes.

images/       pictures of 96 to 640 pixels as JPEG, PNG and WebP; some grey, transparent, or stored on their side
manifest.csv  file_path, label (animal, avatar or human), group (the artist), split (an artist is in one only)
corpus.json   the settings that make these same files again

Three pictures, one of each label, share artist, size, framing, background, colours, format and everything else about the
file: none of these betrays the label. Every picture is drawn from its own random streams, so that it does not depend on how
many there are; only the splits do.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import MT19937, RandomState, SeedSequence
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter
from PIL.ExifTags import Base

from skewless.demos.cough import split_speakers
from skewless.demos.writer import Example

VERSION = 1  # raise it whenever a byte of any example changes
MIN_COUNT = 18
LABELS = ("animal", "avatar", "human")
PICTURES_PER_ARTIST = 6
FORMATS = ("JPEG", "PNG", "WEBP")
CANVAS = 720  # pixels of the drawing's side, before it is reduced

Colour = tuple[int, int, int]
SKIN = ((255, 224, 196), (241, 194, 155), (224, 172, 120), (198, 134, 86), (150, 95, 60), (102, 62, 40))
FUR = ((235, 225, 210), (205, 160, 100), (160, 110, 60), (120, 120, 125), (70, 60, 55), (225, 140, 60), (245, 240, 235))
HAIR = ((40, 28, 20), (92, 58, 30), (150, 95, 45), (215, 175, 95), (130, 130, 130), (180, 60, 40), (90, 70, 160))
# What turns a picture back upright, and how it is stored on its side.
TURNED = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


def _stream(seed: int, *key: int) -> RandomState:
    return RandomState(MT19937(SeedSequence([seed, *key])))


def _shade(colour: Colour, factor: float) -> Colour:
    return _colour(min(255, max(0, level * factor)) for level in colour)


def _colour(levels: Iterable[float]) -> Colour:
    red, green, blue = (int(level) for level in levels)
    return red, green, blue


@dataclass(frozen=True)
class Style:
    """An artist's hand: outlines in canvas pixels (0: none), softness in pixels, grain in levels, and colourfulness."""

    outline: int
    soft: float
    grain: float
    colour: float

    @classmethod
    def of(cls, rng: RandomState) -> Style:
        return cls(int(rng.choice((0, 0, 4, 7))), rng.uniform(0, 1.5), rng.uniform(0, 4), rng.uniform(0.75, 1.25))


class Pen:
    """Draws on a transparent square in units of half its side, from the centre; y points down."""

    def __init__(self, style: Style):
        self.image = Image.new("RGBA", (CANVAS, CANVAS))
        self._draw = ImageDraw.Draw(self.image)
        self._style = style

    def _points(self, *points: tuple[float, float]) -> list[tuple[float, float]]:
        return [((1 + x) * CANVAS / 2, (1 + y) * CANVAS / 2) for x, y in points]

    def _line(self, fill: Colour) -> dict[str, Any]:
        return {
            "fill": fill,
            "outline": _shade(fill, 0.35) if self._style.outline else None,
            "width": self._style.outline,
        }

    def oval(self, x: float, y: float, rx: float, ry: float, fill: Colour) -> None:
        self._draw.ellipse([*self._points((x - rx, y - ry), (x + rx, y + ry))], **self._line(fill))

    def box(self, x: float, y: float, rx: float, ry: float, fill: Colour, corner: float = 0.0) -> None:
        corners = self._points((x - rx, y - ry), (x + rx, y + ry))
        self._draw.rounded_rectangle(corners, corner * CANVAS / 2, **self._line(fill))

    def shape(self, fill: Colour, *points: tuple[float, float]) -> None:
        self._draw.polygon(self._points(*points), **self._line(fill))

    def stroke(self, colour: Colour, width: float, *points: tuple[float, float]) -> None:
        self._draw.line(self._points(*points), colour, max(1, int(width * CANVAS / 2)), joint="curve")

    def smile(self, x: float, y: float, rx: float, ry: float, colour: Colour, width: float = 0.03) -> None:
        ends = self._points((x - rx, y - ry), (x + rx, y + ry))
        self._draw.arc([*ends], 20, 160, colour, max(1, int(width * CANVAS / 2)))


def _eyes(pen: Pen, rng: RandomState, apart: float, y: float, size: float, iris: Colour) -> None:
    look = rng.uniform(-0.3, 0.3) * size
    for side in (-1, 1):
        pen.oval(side * apart, y, size * 1.25, size, (250, 250, 250))
        pen.oval(side * apart + look, y, size * 0.75, size * 0.75, iris)
        pen.oval(side * apart + look, y, size * 0.4, size * 0.4, (15, 15, 20))


def _human(pen: Pen, rng: RandomState, colours: list[Colour]) -> None:
    skin, hair, shirt = SKIN[rng.randint(len(SKIN))], HAIR[rng.randint(len(HAIR))], colours[0]
    wide, long_hair = rng.uniform(0.36, 0.44), rng.rand() < 0.5
    if long_hair:
        pen.oval(0, 0.05, wide + 0.17, 0.62, _shade(hair, 0.85))
    pen.box(0, 1.0, 0.72, 0.42, shirt, 0.3)
    pen.box(0, 0.5, 0.15, 0.2, _shade(skin, 0.88))
    for side in (-1, 1):
        pen.oval(side * wide, -0.02, 0.07, 0.11, _shade(skin, 0.92))
    pen.oval(0, -0.32, wide + 0.06, 0.42, hair)
    pen.oval(0, 0.0, wide, 0.5, skin)
    # Hair falls over the forehead, strand by strand.
    for x in np.linspace(-wide, wide, 40):
        top = -0.5 * (1 - (x / (wide + 0.02)) ** 2) ** 0.5
        end = top + rng.uniform(0.1, 0.22) + (0.5 if long_hair and abs(x) > wide - 0.05 else 0)
        pen.stroke(_shade(hair, rng.uniform(0.7, 1.3)), 0.03, (x, top - 0.07), (x + rng.uniform(-0.05, 0.05), end))
    _eyes(pen, rng, wide * 0.45, -0.05, 0.06, ((70, 45, 30), (60, 110, 150), (80, 120, 70))[rng.randint(3)])
    for side in (-1, 1):
        pen.stroke(_shade(hair, 0.7), 0.03, (side * wide * 0.25, -0.16), (side * wide * 0.65, -0.18))
    pen.stroke(_shade(skin, 0.7), 0.025, (0, -0.02), (0.05, 0.14), (-0.02, 0.16))
    if rng.rand() < 0.3:
        for x in np.linspace(-wide * 0.7, wide * 0.7, 30):
            pen.stroke(_shade(hair, rng.uniform(0.8, 1.2)), 0.02, (x, 0.3), (x * 0.9, 0.47 - 0.5 * x * x))
    pen.smile(0, 0.22, 0.16, 0.1, (165, 60, 60), 0.045)
    if rng.rand() < 0.3:
        for side in (-1, 1):
            pen.smile(side * wide * 0.45, -0.05, 0.13, 0.12, (30, 30, 30), 0.02)
        pen.stroke((30, 30, 30), 0.02, (-wide * 0.8, -0.08), (wide * 0.8, -0.08))


def _animal(pen: Pen, rng: RandomState, colours: list[Colour]) -> None:
    kind, fur = ("cat", "dog", "bear", "rabbit")[rng.randint(4)], FUR[rng.randint(len(FUR))]
    dark, light = _shade(fur, 0.7), _shade(fur, 1.25)
    iris = ((210, 170, 40), (90, 60, 30), (110, 160, 70))[rng.randint(3)]
    if rng.rand() < 0.5:
        pen.oval(0, 1.0, 0.6, 0.5, fur)
    for side in (-1, 1):
        if kind == "cat":
            pen.shape(fur, (side * 0.15, -0.4), (side * 0.52, -0.9), (side * 0.58, -0.1))
            pen.shape((230, 150, 150), (side * 0.28, -0.42), (side * 0.48, -0.74), (side * 0.5, -0.25))
        elif kind == "dog":
            pen.oval(side * 0.56, 0.0, 0.17, 0.45, dark)
        elif kind == "bear":
            pen.oval(side * 0.45, -0.45, 0.2, 0.2, fur)
            pen.oval(side * 0.45, -0.45, 0.11, 0.11, dark)
        else:
            pen.oval(side * 0.25, -0.65, 0.12, 0.38, fur)
            pen.oval(side * 0.25, -0.62, 0.06, 0.28, (235, 170, 170))
    pen.oval(0, 0.05, 0.58, 0.52, fur)
    for _ in range(1200):  # hairs, pointing outwards
        angle, radius = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 1) ** 0.5
        x, y = 0.58 * radius * np.cos(angle), 0.05 + 0.52 * radius * np.sin(angle)
        end = (x + 0.1 * np.cos(angle) + rng.uniform(-0.02, 0.02), y + 0.1 * np.sin(angle) + 0.02)
        pen.stroke(_shade(fur, rng.uniform(0.4, 1.5)), 0.018, (x, y), end)
    pen.oval(0, 0.27, 0.26, 0.2, light)
    for side in (-1, 1):
        pen.oval(side * 0.22, -0.08, 0.09, 0.1, iris)
        pen.oval(side * 0.22, -0.08, 0.035 if kind == "cat" else 0.065, 0.085, (10, 10, 10))
        pen.oval(side * 0.22 + 0.03, -0.12, 0.018, 0.018, (255, 255, 255))
        for y in (0.2, 0.28, 0.36):
            pen.stroke(
                (245, 245, 245) if sum(fur) < 400 else (60, 55, 50),
                0.008,
                (side * 0.15, y),
                (side * 0.7, 1.5 * y - 0.15),
            )
    pen.shape((50, 30, 35), (-0.09, 0.14), (0.09, 0.14), (0, 0.25))
    for side in (-1, 1):
        pen.smile(side * 0.08, 0.28, 0.08, 0.08, (50, 30, 35), 0.02)


def _avatar(pen: Pen, rng: RandomState, colours: list[Colour]) -> None:
    kind = ("pattern", "emoji", "robot", "silhouette")[rng.randint(4)]
    # Skin and fur are colours for programs, too.
    main = (*colours, SKIN[rng.randint(len(SKIN))], FUR[rng.randint(len(FUR))])[rng.randint(len(colours) + 2)]
    if kind == "pattern":
        cells = int(rng.choice((5, 7, 9)))
        pen.box(0, 0, 0.85, 0.85, (240, 240, 240))
        for row in range(cells):
            for column in range((cells + 1) // 2):
                if rng.rand() < 0.5:
                    fill, size = (main if rng.rand() < 0.8 else colours[1]), 0.8 / cells
                    for x in {column, cells - 1 - column}:
                        pen.box((2 * x + 1) * size - 0.8, (2 * row + 1) * size - 0.8, size, size, fill)
    elif kind == "emoji":
        pen.oval(0, 0, 0.75, 0.75, (255, 205, 60) if rng.rand() < 0.5 else main)
        for side in (-1, 1):
            pen.oval(side * 0.27, -0.15, 0.09, 0.14, (60, 40, 30))
        pen.smile(0, 0.1, 0.42, 0.38, (60, 40, 30), 0.07)
    elif kind == "robot":
        pen.stroke(_shade(main, 0.5), 0.05, (0, -0.5), (0, -0.8))
        pen.oval(0, -0.82, 0.09, 0.09, colours[1])
        pen.box(0, 0.85, 0.45, 0.3, _shade(main, 0.8))
        pen.box(0, 0, 0.6, 0.5, main, 0.1)
        for side in (-1, 1):
            pen.box(side * 0.68, 0, 0.08, 0.18, _shade(main, 0.6))
            pen.box(side * 0.27, -0.12, 0.15, 0.13, (250, 250, 250))
            pen.box(side * 0.27, -0.12, 0.07, 0.07, (20, 30, 60))
        for across in (-0.3, -0.15, 0, 0.15, 0.3):
            pen.box(across, 0.28, 0.055, 0.09, (250, 250, 250))
    else:
        pen.oval(0, 0, 0.9, 0.9, _shade(main, 1.5))
        pen.oval(0, -0.22, 0.3, 0.34, _shade(main, 0.75))
        pen.oval(0, 0.62, 0.55, 0.36, _shade(main, 0.75))


_DRAW = {"animal": _animal, "avatar": _avatar, "human": _human}


def _background(rng: RandomState, size: tuple[int, int], colours: list[Colour]) -> Image.Image:
    """Plain, or running from one colour to another with some blots out of focus."""
    # Walls and skies: muted, neither dark nor bright.
    muted = [
        _colour(125 + 0.15 * (level - 128) + shift for level in colour)
        for colour, shift in zip(colours, rng.uniform(-15, 15, 5), strict=True)
    ]
    first, second = (np.array(muted[i], float) for i in (2, 3))
    kind, (width, height) = rng.randint(3), size
    if kind == 0:
        return Image.new("RGB", size, muted[2])
    ramp = np.linspace(0, 1, height)[:, None, None]
    image = Image.fromarray(np.broadcast_to(first + ramp * (second - first), (height, width, 3)).astype(np.uint8))
    if kind == 2:
        for _ in range(12):
            x, y, radius = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.03, 0.15) * height
            ImageDraw.Draw(image).ellipse([x - radius, y - radius, x + radius, y + radius], muted[rng.randint(5)])
        image = image.filter(ImageFilter.GaussianBlur(height / 30))
    return image


def picture(artist: RandomState, shared: RandomState, own: RandomState, label: str) -> tuple[bytes, str]:
    """One file and the end of its name. artist, shared, own: streams of the artist, of the three pictures that belong
    together, and of this one."""
    style = Style.of(artist)
    colours = [_colour(shared.randint(30, 245, 3)) for _ in range(5)]
    pen = Pen(style)
    _DRAW[label](pen, own, colours)
    side = int(shared.choice((96, 160, 224, 320, 480, 640)))
    width, height = (side, int(side * shared.uniform(1, 1.3)))[:: int(shared.choice((1, -1)))]
    size = (width, height)
    figure = pen.image.rotate(shared.uniform(-15, 15), Image.Resampling.BICUBIC)
    figure = figure.resize([int(min(size) * shared.uniform(1.1, 1.35))] * 2, Image.Resampling.LANCZOS)
    left, top = (int((whole - figure.width) * shared.uniform(0.3, 0.7)) for whole in size)
    at = (left, top)
    ground = _background(shared, size, colours)
    first, last = shared.uniform(0.9, 1.1, 2)
    light = np.linspace(first, last, width)[None, :, None]
    grain = own.normal(0, style.grain, (height, width, 1))
    kind, grey = FORMATS[shared.randint(3)], shared.rand() < 0.1
    turned, clear = int(shared.choice((1, 1, 1, 1, 3, 6, 8))), shared.rand() < 0.12 and kind != "JPEG"

    flat = ground.copy()
    flat.paste(figure, at, figure)
    flat = ImageEnhance.Color(flat.filter(ImageFilter.GaussianBlur(style.soft * side / 640))).enhance(style.colour)
    image = Image.fromarray(np.clip(np.asarray(flat) * light + grain, 0, 255).astype(np.uint8))
    if grey:
        image = image.convert("L")
    if clear:
        alpha = Image.new("L", size)
        alpha.paste(figure.getchannel("A"), at)
        image.putalpha(alpha)
    options: dict[str, Any] = {}
    if turned in TURNED:
        image = image.transpose(TURNED[turned])
        options["exif"] = Image.Exif()
        options["exif"][Base.Orientation] = turned
    if kind != "PNG":
        options["quality"] = int(shared.randint(70, 96))
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue(), {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[kind]


def examples(count: int, seed: int = 42) -> Iterator[Example]:
    """`count` pictures, the labels in turn, six by each artist."""
    splits = split_speakers(-(-count // PICTURES_PER_ARTIST), seed)
    for index in range(count):
        label, three, artist = LABELS[index % 3], index // 3, index // PICTURES_PER_ARTIST
        data, end = picture(_stream(seed, 0, artist), _stream(seed, 1, three), _stream(seed, 2, index), label)
        yield Example(f"images/{index:04d}.{end}", data, label, f"artist-{artist:03d}", splits[artist])
