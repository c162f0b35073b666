"""What a file is that no checkpoint is read from, by its first bytes, and what to do with it."""

from __future__ import annotations

import zipfile
from pathlib import Path

from skewless.core.git_lfs import pointer

_EXPORT = "give the checkpoint it was made from, or save the network with torch.export.save"
_UNPACK = "unpack it and give the file in it"
# By the bytes at the start of a file.
_STARTS = {
    b"\x1f\x8b": ("is compressed by gzip", _UNPACK),
    b"\xfd7zXZ\0": ("is compressed by xz", _UNPACK),
    b"BZh": ("is compressed by bzip2", _UNPACK),
    b"7z\xbc\xaf\x27\x1c": ("is a 7z archive", _UNPACK),
    b"Rar!": ("is a RAR archive", _UNPACK),
    b"\x93NUMPY": ("is an array of NumPy's (.npy)", "save the weights by their names, with torch.save"),
}
_SHOWN = 40  # characters of a text
_MAX_HEADER = 100_000_000  # bytes; the limit of the format safetensors itself


def is_safetensors(start: bytes) -> bool:
    """Whether the first 9 bytes of a file are those of a safetensors file: a length within the limit, and a brace."""
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= _MAX_HEADER


def describe(path: Path) -> str:
    """What is wrong with a path and what to do, such as "is empty (0 bytes): copy it again"; empty for a file that may be a
    checkpoint, whole or damaged. Raises OSError for a file that cannot be read."""
    if path.is_dir():
        if (path / "saved_model.pb").is_file():
            return "is a TensorFlow SavedModel, a folder: load it with Keras and save it as .keras or .h5"
        return "is a folder: give the file in it that has the weights"
    with path.open("rb") as file:
        start = file.read(4096)
        file.seek(max(file.seek(0, 2) - 1, 0))
        end = file.read(1)
    if not start:
        return "is empty (0 bytes): copy it again"
    if lfs := pointer(start):
        return f"is not there: {lfs}"
    for magic, (what, advice) in _STARTS.items():
        if start.startswith(magic):
            return f"{what}: {advice}"
    if start[257:262] == b"ustar":
        return f"is a tar archive: {_UNPACK}"
    if start[4:8] == b"TFL3":
        return f"is a TensorFlow Lite model: {_EXPORT}"
    if is_safetensors(start):
        return "is a safetensors file: `skewless import` makes a checkpoint of it"
    # The first fields of an ONNX ModelProto: its version, then the producer's name, the opsets or the graph.
    if start[:1] == b"\x08" and 0 < start[1] < 64 and start[2:3] in (b"\x12", b"\x1a", b"\x3a", b"\x42"):
        return f"is an ONNX graph: {_EXPORT}"
    if start.startswith(b"PK\x03\x04"):
        return _zip(path)
    # A pickle of protocol 0 is text, too: it begins with one of these opcodes and ends with a full stop.
    pickled = start[:1] in (b"(", b"]", b"}", b"c") and end == b"."
    if not pickled and (text := _text(start)) is not None:
        if text.lower().startswith(("<!doctype html", "<html")):
            return f"is a web page, starting with {text[:_SHOWN]!r}: the download gave no file; download it again"
        return f"is text, starting with {text[:_SHOWN]!r}: give the file that has the weights"
    return ""


def _zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
    except Exception:  # a damaged zip raises anything; whoever reads it next says so
        return ""
    inside = {name.partition("/")[2] for name in members}
    if "MAR-INF/MANIFEST.json" in members:
        return "is a TorchServe archive: unzip it and give the weights in it, `serializedFile` in MAR-INF/MANIFEST.json"
    if "constants.pkl" in inside:
        return (
            "is TorchScript, which brings its own code: where it was written, load it with torch.jit.load and save its "
            "state_dict() with torch.save"
        )
    if members and all(name.endswith(".npy") for name in members):
        return "is NumPy's .npz: save the weights by their names, with torch.save"
    return ""


def _text(start: bytes) -> str | None:
    """The bytes as text; None for others. The last character may be cut short."""
    try:
        text = start.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(start) - 3 or not error.start:
            return None
        text = start[: error.start].decode("utf-8")
    return text if all(each.isprintable() or each in "\t\n\r\f\ufeff" for each in text) else None
