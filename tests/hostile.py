"""Small valid files of every kind that is read, and strategies that damage them where their readers believe them."""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import json
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import h5py
import numpy as np
import torch
import yaml
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save as safetensors_of
from torch import nn

from tests import recordings
from tests.demonstration import ROOT

EXTREMES = (
    *(0, 1, 2, 7, 8, 0x10, 0x40, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000),
    *(0xFFFFFFFE, 0xFFFFFFFF, 2**63 - 1, 2**63, 2**64 - 1),
)
_LONGEST = 200_000


@dataclass(frozen=True)
class Format:
    """A kind of file. seeds: valid ones. marks: a pattern at whose places the structure changes: chunks, pages, boxes.
    repair: puts checksums right, without which a reader would look no further."""

    seeds: Callable[[], Sequence[bytes]]
    marks: bytes
    repair: Callable[[bytes], bytes] | None = None

    def damaged(self) -> st.SearchStrategy[bytes]:
        return _damaged(self)


@st.composite
def _damaged(draw: st.DrawFn, of: Format) -> bytes:
    seeds = of.seeds()
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        places = [found.start() for found in re.finditer(of.marks, data, re.DOTALL)] or [0]
        at = draw(st.sampled_from(places))
        match draw(st.sampled_from(("field", "field", "field", "bits", "cut", "drop", "repeat", "splice", "insert"))):
            case "field":
                width = draw(st.sampled_from((1, 2, 4, 8)))
                value = draw(st.sampled_from(EXTREMES) | st.integers(0, 2**64 - 1)) % 256**width
                start = at + draw(st.integers(0, 40))
                data[start : start + width] = value.to_bytes(width, draw(st.sampled_from(("little", "big"))))
            case "bits":
                where = draw(st.integers(0, max(0, len(data) - 1)))
                data[where : where + 1] = bytes(b ^ draw(st.integers(1, 255)) for b in data[where : where + 1])
            case "cut":
                del data[draw(st.integers(0, len(data))) :]
            case "drop":
                del data[at : draw(st.sampled_from(places)) + draw(st.integers(0, 8))]
            case "repeat":
                part = data[at : at + draw(st.integers(1, 2000))]
                data[at:at] = part * draw(st.integers(1, max(1, min(50, _LONGEST // max(1, len(part))))))
            case "splice":
                other = draw(st.sampled_from(seeds))
                data[at:] = other[draw(st.integers(0, len(other))) :]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=16))
        del data[_LONGEST:]
    done = bytes(data)
    return of.repair(done) if of.repair and draw(st.booleans()) else done


# Recordings and pictures.


def _wavs() -> list[bytes]:
    return [recordings.recording(name, seconds=0.1) for name in ("wav8", "wav16", "wav24", "wav_float", "wav_mulaw")]


def _audio(*names: str) -> Callable[[], list[bytes]]:
    @lru_cache(maxsize=1)
    def made() -> list[bytes]:
        return [recordings.recording(name, channels=channels, seconds=0.15) for name in names for channels in (1, 2)]

    return made


def _ogg_repaired(data: bytes) -> bytes:
    """With every whole page's checksum as RFC 3533 has it."""
    out, at = bytearray(data), 0
    while (at := data.find(b"OggS", at)) >= 0 and at + 27 <= len(data):
        body = at + 27 + data[at + 26]
        end = body + sum(data[at + 27 : body])
        if end <= len(data):
            out[at + 22 : at + 26] = bytes(4)
            out[at + 22 : at + 26] = struct.pack("<I", _ogg_checksum(bytes(out[at:end])))
        at += 4
    return bytes(out)


@lru_cache(maxsize=1)
def _ogg_table() -> list[int]:
    table = []
    for value in range(256):
        rest = value << 24
        for _ in range(8):
            rest = (rest << 1) ^ (0x04C11DB7 if rest & 0x80000000 else 0)
        table.append(rest & 0xFFFFFFFF)
    return table


def _ogg_checksum(page: bytes) -> int:
    table, rest = _ogg_table(), 0
    for byte in page:
        rest = (rest << 8 & 0xFFFFFFFF) ^ table[(rest >> 24) ^ byte]
    return rest


def _pixels(mode: str = "RGB", size: tuple[int, int] = (20, 14)) -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(levels).convert(mode)


def _picture(kind: str, image: Image.Image, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@lru_cache(maxsize=1)
def _jpegs() -> list[bytes]:
    plain = [_picture("JPEG", _pixels(mode), quality=70) for mode in ("RGB", "L", "CMYK")]
    return [*plain, _picture("JPEG", _pixels(), progressive=True), _picture("JPEG", _pixels(), exif=_turned())]


@lru_cache(maxsize=1)
def _pngs() -> list[bytes]:
    sixteen = Image.fromarray(np.arange(280, dtype=np.uint16).reshape(14, 20) * 200)
    made = [_picture("PNG", _pixels(mode)) for mode in ("RGB", "RGBA", "L", "LA", "1", "P")]
    made += [_picture("PNG", sixteen), _picture("PNG", _pixels("P"), transparency=3)]
    made += [_picture("PNG", _pixels(), exif=_turned())]
    return [*made, _picture("PNG", _pixels(), save_all=True, append_images=[_pixels("RGB").rotate(90)])]


@lru_cache(maxsize=1)
def _webps() -> list[bytes]:
    made = [_picture("WEBP", _pixels(), lossless=lossless) for lossless in (True, False)]
    made += [_picture("WEBP", _pixels("RGBA")), _picture("WEBP", _pixels(), exif=_turned())]
    return [*made, _picture("WEBP", _pixels(), save_all=True, append_images=[_pixels().rotate(90)])]


def _png_repaired(data: bytes) -> bytes:
    """With every whole chunk's CRC put right."""
    out, at = bytearray(data), 8
    while at + 12 <= len(data):
        length = struct.unpack_from(">I", data, at)[0]
        if at + 12 + length > len(data):
            break
        struct.pack_into(">I", out, at + 8 + length, zlib.crc32(data[at + 4 : at + 8 + length]))
        at += 12 + length
    return bytes(out)


AUDIO = {
    "WAV": Format(lru_cache(maxsize=1)(_wavs), rb"RIFF|WAVE|fmt |data|LIST|fact"),
    "AIFF": Format(_audio("aiff"), rb"FORM|AIF[FC]|COMM|SSND"),
    "FLAC": Format(_audio("flac", "flac24"), rb"fLaC|\xff[\xf8\xf9]|ffmpeg|reference"),
    "Vorbis": Format(_audio("vorbis"), rb"OggS|\x01vorbis|\x03vorbis|\x05vorbis", _ogg_repaired),
    "Opus": Format(_audio("opus"), rb"OggS|OpusHead|OpusTags", _ogg_repaired),
    "MP3": Format(_audio("mp3", "mp3_vbr"), rb"ID3|\xff[\xfa\xfb\xf3]|Xing|Info|TSSE"),
    "M4A": Format(
        _audio("m4a", "m4a_faststart", "alac"),
        rb"ftyp|moov|mvhd|trak|tkhd|mdia|mdhd|hdlr|minf|stbl|stsd|mp4a|alac|esds|stts|stsc|stsz|stco|edts|elst|mdat|udta",
    ),
    "AAC": Format(_audio("aac"), rb"\xff[\xf0\xf1\xf9]"),
    "WebM": Format(
        _audio("webm", "webm_vorbis", "mkv32"),
        rb"\x1a\x45\xdf\xa3|\x18\x53\x80\x67|\x15\x49\xa9\x66|\x16\x54\xae\x6b|\x1f\x43\xb6\x75|\xa3|\xb5|\x9f|\x86|OpusHead",
    ),
}
PICTURES = {
    "JPEG": Format(_jpegs, rb"\xff[\xc0-\xc4\xd8-\xdf\xe0-\xef]|Exif|Adobe|JFIF"),
    "PNG": Format(_pngs, rb"IHDR|IDAT|PLTE|tRNS|IEND|acTL|fcTL|fdAT|eXIf", _png_repaired),
    "WebP": Format(_webps, rb"RIFF|WEBP|VP8X|VP8L|VP8 |ALPH|ANIM|ANMF|EXIF"),
}


# What would hurt if it were believed: as a path, as code, as a number, as a size.
def _nested(depth: int) -> Any:
    made: Any = 0
    for _ in range(depth):
        made = [made]
    return made


NASTY: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**63, -(2**63) - 1, 10**30, 1e308, float("nan"), float("inf"), -0.0, 0.5),
    *("", " ", "..", "../../x", "/etc/passwd", "a\0b", "x" * 5000, "\ud800", "\u202e", "%s%n", "$(touch x)", "²", "🎵"),
    *("__import__('os').system('true')", "os.system", "Symbol('s0').__class__", "torch.ops.aten.from_file.default"),
    *([], {}, [[]], {"": ""}, [None] * 50, _nested(60), {"class_name": "Lambda", "config": {"name": "l"}}),
)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container with the key or number of something in it."""
    found, waiting = [], [value]
    while waiting:
        each = waiting.pop()
        keys = list(each) if isinstance(each, dict) else range(len(each)) if isinstance(each, list) else ()
        found += [(each, key) for key in keys]
        waiting += [each[key] for key in keys]
    return found


@st.composite
def changed_values(draw: st.DrawFn, documents: Sequence[Any], most: int = 3) -> Any:
    """A document of lists, mappings and plain values with some of them replaced, dropped, doubled or exchanged."""
    root = [copy.deepcopy(draw(st.sampled_from(documents)))]
    for _ in range(draw(st.integers(1, most))):
        places = _places(root)
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        match draw(st.sampled_from(("replace", "replace", "replace", "drop", "double", "exchange", "rename"))):
            case "replace":
                holder[key] = copy.deepcopy(draw(st.sampled_from(NASTY) | st.integers() | st.text(max_size=5)))
            case "drop" if holder is not root:
                del holder[key]
            case "double" if isinstance(holder, list) and holder is not root:
                holder.insert(key, copy.deepcopy(holder[key]))
            case "exchange":
                other, at = places[draw(st.integers(0, len(places) - 1))]
                holder[key] = copy.deepcopy(other[at])
            case "rename" if isinstance(holder, dict):
                holder[draw(st.sampled_from(("", "../x", "x" * 300, "name", "class_name")))] = holder.pop(key)
    return root[0]


# Checkpoints and networks.

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}
GLOBALS = (
    *(
        b"os\nsystem",
        b"posix\nsystem",
        b"builtins\neval",
        b"builtins\nexec",
        b"builtins\ngetattr",
        b"subprocess\nPopen",
    ),
    *(b"torch\nload", b"torch.hub\nload", b"torch.jit\nload", b"torch.storage\n_load_from_bytes", b"numpy\nload"),
    *(
        b"torch._utils\n_rebuild_tensor_v2",
        b"torch._utils\n_rebuild_parameter",
        b"torch._utils\n_rebuild_sparse_tensor",
    ),
    *(b"torch._utils\n_rebuild_meta_tensor_no_storage", b"torch._utils\n_rebuild_qtensor", b"torch\nSize"),
    *(b"torch\ndevice", b"torch\nFloatStorage", b"torch\nDoubleStorage", b"collections\nOrderedDict", b"torch\nTensor"),
    *(b"torch._tensor\n_rebuild_from_type_v2", b"torch._utils\n_rebuild_wrapper_subclass", b"numpy\ndtype"),
    *(b"numpy._core.multiarray\nscalar", b"numpy.core.multiarray\nscalar", b"torch.nn.modules.linear\nLinear"),
)


@lru_cache(maxsize=1)
def pytorch_files() -> list[bytes]:
    full = {"model_state_dict": WEIGHTS, "epoch": 3, "val_auc": np.float64(0.75), "config": {"n_mels": 160, "lr": 0.1}}
    made = []
    for content in (full, WEIGHTS, {"state_dict": WEIGHTS, "val_auc": torch.tensor(0.5)}):
        for zipped in (True, False):
            stream = io.BytesIO()
            torch.save(content, stream, _use_new_zipfile_serialization=zipped)
            made.append(stream.getvalue())
    return made


_PICKLED = Format(pytorch_files, rb"c[a-z_.0-9]+\n[A-Za-z_0-9]+\n|X....|PK..|[}\](tRQuse.K]")


@st.composite
def pytorch(draw: st.DrawFn, seeds: Sequence[bytes] | None = None) -> bytes:
    """A checkpoint whose pickle asks for other things, or is damaged, inside a zip that is whole, or damaged itself."""
    seed = draw(st.sampled_from(pytorch_files() if seeds is None else seeds))
    if draw(st.booleans()):
        asked = draw(st.sampled_from(GLOBALS))
        number = draw(st.integers(0, 5))
        return in_member(seed, "/data.pkl", lambda data: _other_global(data, asked, number))
    damage = Format(lambda: [b"\0"], _PICKLED.marks)
    if seed[:2] == b"PK" and draw(st.booleans()):
        with zipfile.ZipFile(io.BytesIO(seed)) as archive:
            (name,) = (each for each in archive.namelist() if each.endswith("/data.pkl"))
            damage = Format(lambda: [archive.read(name)] if archive.fp else [b""], _PICKLED.marks)
            data = draw(damage.damaged())
        return in_member(seed, "/data.pkl", lambda _: data)
    return draw(Format(lambda: [seed], _PICKLED.marks).damaged())


def _other_global(data: bytes, asked: bytes, number: int) -> bytes:
    found = list(re.finditer(rb"c[a-z_.0-9]+\n[A-Za-z_0-9]+\n", data))
    if not found:
        return data
    at = found[number % len(found)]
    return data[: at.start()] + b"c" + asked + b"\n" + data[at.end() :]


def in_member(data: bytes, ending: str, change: Callable[[bytes], bytes]) -> bytes:
    """A zip with the member of that ending changed; other data changed itself."""
    if data[:2] != b"PK":
        return change(data)
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        return zipped(
            {name: change(old.read(name)) if name.endswith(ending) else old.read(name) for name in old.namelist()}
        )


def zipped(members: dict[str, bytes] | Sequence[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as new:
        for name, content in members.items() if isinstance(members, dict) else members:
            new.writestr(zipfile.ZipInfo(name), content, compression)
    return stream.getvalue()


ZIP = rb"PK\x03\x04|PK\x01\x02|PK\x05\x06|PK\x06\x06|PK\x06\x07"
LINEAR = {"mlp": {"inputs": 2, "hidden": [2], "dropout": [0.0]}}


@lru_cache(maxsize=1)
def safetensors_files() -> list[bytes]:
    from skewless.core.networks import build_network

    return [safetensors_of({k: v.contiguous() for k, v in build_network(LINEAR).state_dict().items()})]


@lru_cache(maxsize=1)
def checkpoint_document() -> dict[str, Any]:
    """What `skewless train` would save for the archive `talent`."""
    from skewless.core.definition import Definition
    from skewless.core.pipeline import Pipeline

    definition = Definition.read(ROOT / "archive" / "talent")
    fitted = definition.pipeline.to_dict()
    for stage in fitted["stages"]:
        if "standard_scaler" in stage:
            stage["standard_scaler"] |= {"mean": [0.0] * 37, "std": [1.0] * 37}
    pipeline = Pipeline.from_dict(fitted)
    kept: dict[str, Any] = {key: {} for key in ("validation_scores", "stage_sources", "stage_outputs", "code")}
    return kept | {
        "epoch": 1,
        "history": [],
        "model_state_dict": dict(definition.build_network().state_dict()),
        "pipeline": pipeline.to_dict(),
        "pipeline_fingerprint": pipeline.fingerprint,
        "network": definition.network,
        "postprocess": definition.postprocess,
    }


def saved(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


@st.composite
def checkpoints(draw: st.DrawFn) -> bytes:
    """A checkpoint of ours with some of its values changed; its fingerprint is put right, as an attacker would."""
    from skewless.core.pipeline import fingerprint_of

    document = {k: v for k, v in checkpoint_document().items() if k != "model_state_dict"}
    changed = draw(changed_values([document]))
    if isinstance(changed, dict):
        changed.setdefault("model_state_dict", checkpoint_document()["model_state_dict"])
        if draw(st.integers(0, 5)) == 0:
            changed["model_state_dict"] = draw(st.sampled_from(NASTY) | st.just({"output.bias": 3}))
        with contextlib.suppress(LookupError, TypeError, ValueError, AttributeError):
            changed["pipeline_fingerprint"] = fingerprint_of(changed["pipeline"])
    return saved(changed)


class Tiny(nn.Module):
    """Rows `(N, 4)` to two named outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 3)
        self.register_buffer("scale", torch.tensor([1.5, -2.0, 0.25]))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = torch.relu(self.dense(x)) * self.scale
        return {"logits": logits, "top": logits.amax(1)}


@lru_cache(maxsize=1)
def pt2_file() -> bytes:
    torch.manual_seed(0)
    rows = ({0: torch.export.Dim("batch")},)
    stream = io.BytesIO()
    torch.export.save(torch.export.export(Tiny().eval(), (torch.randn(4, 4),), dynamic_shapes=rows), stream)
    return stream.getvalue()


@st.composite
def pt2(draw: st.DrawFn) -> bytes:
    """An exported program with values of its JSON members changed, or a damaged zip."""
    seed = pt2_file()
    if draw(st.integers(0, 3)) == 0:
        return draw(Format(lambda: [seed], ZIP).damaged())
    endings = ("models/model.json", "model_weights_config.json", "model_constants_config.json", "models/model.json")
    ending = draw(st.sampled_from(endings))
    with zipfile.ZipFile(io.BytesIO(seed)) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith(ending))
        document = json.loads(archive.read(name))
    changed = json.dumps(draw(changed_values([document]))).encode()
    return in_member(seed, ending, lambda _: changed)


# Keras' files.


class KERAS_NETWORK(nn.Module):
    """A network with the names and kinds of layers that a KerasResNet50 has, and few of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1_conv = nn.Conv2d(3, 2, 3, stride=2)
        self.conv1_bn = nn.BatchNorm2d(2, eps=1.001e-5)
        self.dense, self.predictions = nn.Linear(2, 4), nn.Linear(4, 3)


_LAYERS: list[tuple[str, dict[str, Any]]] = [
    ("InputLayer", {"name": "input_1"}),
    ("Rescaling", {"name": "rescaling", "scale": 0.5, "offset": -1.0}),
    ("ZeroPadding2D", {"name": "conv1_pad", "padding": [[3, 3], [3, 3]]}),
    ("Conv2D", {"name": "conv1_conv", "strides": [2, 2], "padding": "valid", "activation": "linear"}),
    ("BatchNormalization", {"name": "conv1_bn", "epsilon": 1.001e-5}),
    ("GlobalAveragePooling2D", {"name": "avg_pool"}),
    ("Dense", {"name": "dense", "activation": "relu"}),
    ("Dense", {"name": "dense_1", "activation": "softmax", "dtype": "float32"}),
]


def keras_configs() -> list[dict[str, Any]]:
    """One model as a Sequential one, and as a functional one in the words of Keras 2 and of Keras 3."""
    plain = [{"class_name": kind, "config": config} for kind, config in _LAYERS]
    names = [config["name"] for _, config in _LAYERS]
    second, third = [], []
    for number, layer in enumerate(plain):
        before = names[number - 1] if number else None
        tensor = {"class_name": "__keras_tensor__", "config": {"keras_history": [before, 0, 0]}}
        second.append(layer | {"inbound_nodes": [[[before, 0, 0, {}]]] if before else []})
        third.append(layer | {"inbound_nodes": [{"args": [tensor], "kwargs": {}}] if before else []})
    return [
        {"class_name": "Sequential", "config": {"name": "s", "layers": plain}},
        {"class_name": "Functional", "config": {"name": "f", "layers": second}},
        {"class_name": "Functional", "config": {"name": "f", "layers": third}},
    ]


def _keras_arrays() -> dict[str, dict[str, np.ndarray]]:
    def values(*shape: int) -> np.ndarray:
        return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)

    norm = dict.fromkeys(("gamma", "beta", "moving_mean", "moving_variance"), values(2))
    return {
        "conv1_conv": {"kernel": values(3, 3, 3, 2), "bias": values(2)},
        "conv1_bn": norm,
        "dense": {"kernel": values(2, 4), "bias": values(4)},
        "dense_1": {"kernel": values(4, 3), "bias": values(3)},
    }


def keras_h5(config: Any) -> bytes:
    """HDF5 as `model.save("x.h5")` writes it."""
    stream = io.BytesIO()
    with h5py.File(stream, "w") as root:
        root.attrs["model_config"] = json.dumps(config)
        top = root.create_group("model_weights")
        arrays = _keras_arrays()
        top.attrs["layer_names"] = [name.encode() for name in arrays]
        top.attrs["keras_version"] = "2.15.0"
        for name, variables in arrays.items():
            group = top.create_group(name)
            group.attrs["weight_names"] = [f"{name}/{each}:0".encode() for each in variables]
            for each, value in variables.items():
                group[f"{name}/{each}:0"] = value
    return stream.getvalue()


def keras_weights_h5() -> bytes:
    """HDF5 as Keras 3 keeps it in a .keras file."""
    stream = io.BytesIO()
    with h5py.File(stream, "w") as root:
        kinds = ("conv2d", "batch_normalization", "dense", "dense_1")
        for kind, (name, variables) in zip(kinds, _keras_arrays().items(), strict=True):
            group = root.create_group(f"layers/{kind}/vars")
            group.attrs["name"] = name
            for number, value in enumerate(variables.values()):
                group[str(number)] = value
    return stream.getvalue()


def keras_zip(config: Any) -> bytes:
    members = {"config.json": json.dumps(config).encode(), "metadata.json": b'{"keras_version": "3.0.0"}'}
    return zipped(members | {"model.weights.h5": keras_weights_h5()})


@lru_cache(maxsize=1)
def keras_files() -> list[bytes]:
    return [*(keras_h5(each) for each in keras_configs()), *(keras_zip(each) for each in keras_configs())]


@st.composite
def keras(draw: st.DrawFn) -> bytes:
    """A model of Keras' with another configuration, or damaged: the zip, or the HDF5 in it."""
    kind = draw(st.sampled_from(("config", "config", "h5", "zip", "weights")))
    if kind == "config":
        changed = draw(changed_values(keras_configs()))
        return draw(st.sampled_from((keras_h5, keras_zip)))(changed)
    if kind == "weights":
        weights = draw(Format(lambda: [keras_weights_h5()], _HDF5).damaged())
        return in_member(keras_files()[-1], "model.weights.h5", lambda _: weights)
    seeds = [each for each in keras_files() if (each[:2] == b"PK") == (kind == "zip")]
    return draw(Format(lambda: seeds, ZIP + rb"|\x89HDF" if kind == "zip" else _HDF5).damaged())


_HDF5 = (
    rb"\x89HDF|TREE|SNOD|HEAP|GCOL|OHDR|\x01\x00[\x00-\x20]\x00\x01\x00\x00\x00|layer_names|weight_names|model_config"
)


# Archives.

REFERENCES = [{"file": f"{number:02d}.wav", "scores": [0.25 * number], "sha256": "0" * 64} for number in (1, 2)]
METRICS: dict[str, Any] = {
    "model_version": "1.0",
    "threshold": 0.5,
    "pipeline_fingerprint": "0" * 64,
    "runtime": {"name": "eager", "tier": "exact", "tolerance": 1e-4},
    "tier": "exact",
    "evaluation": {"auc": 0.9},
    "code": {},
}
MANIFEST: dict[str, Any] = {
    "runtime": "python",
    "model": {"modelName": "cough", "modelVersion": "1.0", "handler": "entry.py", "configFile": "model-config.yaml"},
    "archiverVersion": "0.12.0",
}
MANIFEST_FILE, METRICS_FILE, REFERENCES_FILE = "MAR-INF/MANIFEST.json", "metrics.json", "references/references.json"


def archive_members() -> dict[str, bytes]:
    """What is read of an archive without unpacking it."""
    return {
        MANIFEST_FILE: json.dumps(MANIFEST).encode(),
        METRICS_FILE: json.dumps(METRICS).encode(),
        REFERENCES_FILE: json.dumps(REFERENCES).encode(),
        "references/01.wav": b"one",
        "references/02.wav": b"two",
        "model.yaml": (ROOT / "archive" / "talent" / "model.yaml").read_bytes(),
    }


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    """A .mar with other values in its JSON, hostile names of members, or a damaged zip."""
    members = archive_members()
    compression = draw(st.sampled_from((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)))
    kind = draw(st.sampled_from(("values", "values", "names", "zip")))
    if kind == "zip":
        return draw(Format(lambda: [zipped(members, compression)], ZIP).damaged())
    pairs = list(members.items())
    if kind == "names":
        hostile = (
            "../x",
            "/tmp/x",
            "a/../../x",
            "x\\..\\y",
            "model.yaml",
            MANIFEST_FILE,
            "x" * 3000,
            "",
            "a/",
            "..",
            "\u202e",
        )
        for _ in range(draw(st.integers(1, 3))):
            pairs.insert(draw(st.integers(0, len(pairs))), (draw(st.sampled_from(hostile)), b"{}"))
        code = {draw(st.sampled_from(hostile)): "0" * 64}
        pairs = [(n, json.dumps(METRICS | {"code": code}).encode() if n == METRICS_FILE else c) for n, c in pairs]
        return _zipped_quietly(pairs, compression)
    name = draw(st.sampled_from((MANIFEST_FILE, METRICS_FILE, REFERENCES_FILE)))
    content = json.dumps(draw(changed_values([json.loads(members[name])]))).encode()
    return zipped(members | {name: content}, compression)


def _zipped_quietly(pairs: Sequence[tuple[str, bytes]], compression: int) -> bytes:
    import warnings

    with warnings.catch_warnings(action="ignore"):  # of two members with one name
        return zipped(pairs, compression)


# Texts.

_scraps = st.text(st.characters(max_codepoint=127), max_size=5).map(str.encode)


@lru_cache(maxsize=1)
def pipeline_files() -> list[bytes]:
    files = [*ROOT.glob("archive/*/pipeline.yaml"), *ROOT.glob("archive/*/variants/*.yaml")]
    texts = [path.read_bytes() for path in sorted(files)]
    return [text for text in texts if b".py:" not in text]


@lru_cache(maxsize=1)
def model_files() -> list[bytes]:
    return [path.read_bytes() for path in sorted(ROOT.glob("archive/*/model.yaml"))]


@lru_cache(maxsize=1)
def recipe_files() -> list[bytes]:
    return [path.read_bytes() for path in sorted(ROOT.glob("archive/*/recipe.yaml"))]


_YAML_TEXTS = (
    *(
        "&a [*a]",
        "*a",
        "!!python/object/apply:os.system [true]",
        "!!python/name:os.system",
        "!!binary aGk=",
        "!!set {a}",
    ),
    *(
        "2001-99-99",
        "2001-12-14t21:59:43.10-99:00",
        "!!bool perhaps",
        "!!int ''",
        "!!float x",
        "!!timestamp x",
        "0x" + "f" * 5000,
    ),
    *(
        "9" * 5000,
        "1:2:3",
        ".nan",
        "-.inf",
        "<<: *b",
        "? [a]",
        "{" * 300,
        "[" * 2000,
        "- " * 300,
        '"\\ud800"',
        "\t",
        "\0",
        "%TAG ! x",
    ),
    *("a.py:B", "../x.py:B", "/etc/passwd.py:B", "--- 1\n--- 2", "!!omap [a: 1]", "~", "null", "''"),
)


@st.composite
def yaml_texts(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """YAML with other values, or a text that is damaged."""
    seed = draw(st.sampled_from(seeds))
    if draw(st.booleans()):
        changed = draw(changed_values([yaml.safe_load(seed)]))
        return yaml.safe_dump(changed, allow_unicode=True).encode("utf-8", "surrogatepass")
    text = bytearray(seed)
    for _ in range(draw(st.integers(1, 3))):
        tokens = [found.span() for found in re.finditer(rb"[\w.]+|[{}\[\]:,-]|\n", text)] or [(0, 0)]
        start, end = draw(st.sampled_from(tokens))
        put = draw(st.sampled_from(_YAML_TEXTS).map(lambda each: each.encode("utf-8", "surrogatepass")) | _scraps)
        text[start : end if draw(st.booleans()) else start] = put
    return bytes(text)


def manifest_csv() -> bytes:
    """A manifest of files beside it, `0.wav` to `11.wav`."""
    stream = io.StringIO()
    rows = [
        (f"{number}.wav", ("no", "yes")[number % 2], ("train", "val", "test")[number % 3], f"g{number}")
        for number in range(12)
    ]
    csv.writer(stream).writerows([("file_path", "label", "split", "group"), *rows])
    return stream.getvalue().encode()


def predictions_csv() -> bytes:
    return b"file_path,probability\r\n" + b"".join(b"%d.wav,0.%d\r\n" % (number, number) for number in range(9))


_CSV_TEXTS = (
    *(
        b"\0",
        b'"',
        b'"' * 9,
        b"\r",
        b"\n",
        b",",
        b",,,",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"../../etc/passwd",
        b"/etc/passwd",
        b"a\0b",
    ),
    *(
        b"x" * 300,
        b"x" * 200_000,
        b"nan",
        b"inf",
        b"1e999",
        b"",
        b".",
        b"..",
        b"\xed\xa0\x80",
        b"file_path",
        b"label",
        b"a_label",
    ),
)


@st.composite
def csv_texts(draw: st.DrawFn, seed: bytes) -> bytes:
    text = bytearray(seed)
    for _ in range(draw(st.integers(1, 4))):
        cells = [found.span() for found in re.finditer(rb"[^,\r\n]+|[,\r\n]", text)] or [(0, 0)]
        start, end = draw(st.sampled_from(cells))
        text[start : end if draw(st.booleans()) else start] = draw(st.sampled_from(_CSV_TEXTS) | _scraps)
    return bytes(text)


@st.composite
def properties_texts(draw: st.DrawFn) -> bytes:
    lines = (ROOT / "config.properties").read_bytes().splitlines()
    more = (
        *(
            b"management_address=http://0.0.0.0:8081",
            b"management_address:http://0.0.0.0:8081",
            b"grpc_management_address=0.0.0.0",
        ),
        *(
            b"management\\u005faddress=http://0.0.0.0:8081",
            b"x=y\\",
            b"enable_envvars_config=true",
            b"=",
            b"\xff",
            b"x",
            b"a b=c",
        ),
        *(
            b"management_address=http://[::]:8081",
            b"management_address=unix:/tmp/x",
            b"metrics_address=http://:0",
            b"\0=\0",
        ),
    )
    for _ in range(draw(st.integers(1, 3))):
        lines.insert(draw(st.integers(0, len(lines))), draw(st.sampled_from(more) | _scraps))
    return b"\n".join(lines)


def pickled_call(function: Callable[..., Any], *arguments: Any, protocol: int = 2) -> bytes:
    """A pickle that calls `function` when it is loaded."""

    class Call:
        def __reduce__(self) -> tuple[Any, ...]:
            return function, arguments

    return pickle.dumps(Call(), protocol)
