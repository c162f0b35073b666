"""What `pickle.dump` and `joblib.dump` write, with numpy's arrays in it, read as data: `skewless.importers.pickled` has how.

joblib writes an array as a `NumpyArrayWrapper`, followed by the array's bytes in the middle of the pickle, and may compress the
whole file (joblib/numpy_pickle.py, versions 0.10 to 1.6).
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from skewless.importers.errors import ImportFileError
from skewless.importers.pickled import Made, Named, read_pickle

# Once inflated: statistics of some ten thousand features, with their names.
MAX_BYTES = 2**22
_MAX_LZMA = 2**27  # of memory while inflating; xz' strongest setting takes half of it

_RECONSTRUCT = "numpy._core.multiarray._reconstruct"
_FROM_BUFFER = "numpy._core.numeric._frombuffer"
_SCALAR = "numpy._core.multiarray.scalar"
_WRAPPER = "joblib.numpy_pickle.NumpyArrayWrapper"
# numpy 1 says numpy.core. scikit-learn before 0.21 brought its own joblib.
_ALLOWED = frozenset(
    {
        *(
            "copyreg._reconstructor",
            "builtins.object",
            "builtins.bytes",
            "_codecs.encode",
            "numpy.ndarray",
            "numpy.dtype",
        ),
        *(name.replace("_core", core) for name in (_RECONSTRUCT, _FROM_BUFFER, _SCALAR) for core in ("_core", "core")),
        *(_WRAPPER, f"sklearn.externals.{_WRAPPER}"),
    }
)

_NUMBERS = ("f4", "f8", "i4", "i8")


def read_pickled(path: Path, classes: Collection[str]) -> Any:
    """The value in a file that pickle or joblib wrote; arrays in it are for `numbers` and `texts`.

    classes: what the file may hold besides arrays and plain values, as `module.Class`.
    Raises ImportFileError for a file that is not such a pickle, asks for anything else, or has more than MAX_BYTES.
    """
    with path.open("rb") as opened:
        data = opened.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ImportFileError(f"it has {path.stat().st_size:,} bytes, more than {MAX_BYTES:,} are not read")
    if data.startswith(b"version https://git-lfs"):
        raise ImportFileError("it is a Git LFS pointer, not the file itself: run `git lfs pull`")
    file = io.BytesIO(_inflated(data))
    value = read_pickle(file, _ALLOWED | set(classes), _finish)
    if rest := len(file.read()):
        raise ImportFileError(f"it goes on for {rest:,} bytes after its first value; save that value alone")
    return value


def numbers(value: Any) -> NDArray[np.float64]:
    """A pickled array of one dimension, a numpy scalar or a number, as float64 `(N,)`: each value exactly.

    Raises ImportFileError for anything else.
    """
    if type(value) in (int, float):
        return np.array([value], dtype=np.float64)
    if isinstance(value, Made) and _name(value) == _SCALAR and len(value.arguments) == 2:
        return _decoded(value.arguments[1], value.arguments[0], 1)
    data, dtype, count = _array(value)
    return _decoded(data, dtype, count)


def texts(value: Any) -> tuple[str, ...]:
    """A pickled array of texts (numpy's dtype object) of one dimension; raises ImportFileError for anything else."""
    data, dtype, count = _array(value)
    if (
        _dtype(dtype) != "O"
        or not isinstance(data, list)
        or len(data) != count
        or not all(type(d) is str for d in data)
    ):
        raise ImportFileError("it has an array of something else than texts where names are expected")
    return tuple(data)


def _array(value: Any) -> tuple[Any, Any, int]:
    """An array's content, dtype and length, as they are in the pickle."""
    if isinstance(value, Made) and _name(value) == _FROM_BUFFER and len(value.arguments) == 4:
        data, dtype, shape, _ = value.arguments
    elif (
        isinstance(value, Made)
        and _name(value) == _RECONSTRUCT
        and type(value.state) is tuple
        and len(value.state) == 5
    ):
        _, shape, dtype, _, data = value.state
    else:
        raise ImportFileError(f"it has {_shown(value)} where an array is expected")
    if type(shape) is not tuple or len(shape) != 1 or type(shape[0]) is not int:
        raise ImportFileError("it has an array of another number of dimensions than one")
    return data, dtype, shape[0]


def _decoded(data: Any, dtype: Any, count: int) -> NDArray[np.float64]:
    code, content = _dtype(dtype), _bytes(data)
    if code == "O" or len(content) != count * np.dtype(code).itemsize:
        raise ImportFileError(f"it has {len(content):,} bytes for {count:,} numbers of type {code!r}")
    values = np.frombuffer(content, code)
    exact = values.astype(np.float64)
    if not np.array_equal(exact.astype(values.dtype), values, equal_nan=values.dtype.kind == "f"):
        raise ImportFileError(f"it has whole numbers of type {code!r} that float64 cannot hold")
    return exact


def _dtype(value: Any) -> str:
    """A dtype's code with its byte order, such as "<f8"; "O" for objects."""
    if not isinstance(value, Made) or value.function != "numpy.dtype" or not value.arguments:
        raise ImportFileError(f"it has {_shown(value)} where a numpy dtype is expected")
    code, state = value.arguments[0], value.state
    if code in ("O", "O8"):
        return "O"
    if code not in _NUMBERS or type(state) is not tuple or len(state) < 2 or state[1] not in ("<", ">"):
        raise ImportFileError(f"it has numbers of type {_shown(code)}, expected {', '.join(_NUMBERS)}")
    return f"{state[1]}{code}"


def _bytes(value: Any) -> bytes | bytearray:
    """Bytes; protocols 0 to 2 write them as a text in Latin-1, Python 2 as a text."""
    if isinstance(value, Made) and value.function == "_codecs.encode" and value.arguments[1:] == ("latin1",):
        value = value.arguments[0]
    if type(value) is str:
        return value.encode("latin-1")
    if type(value) not in (bytes, bytearray):
        raise ImportFileError(f"it has {_shown(value)} where an array's bytes are expected")
    return value


def _finish(made: Made, file: BinaryIO) -> Any:
    """joblib's array, with the bytes that follow it in the file; everything else as it is."""
    if made.function.removeprefix("sklearn.externals.") != _WRAPPER:
        return made
    state = made.state
    if type(state) is not dict or not {"shape", "dtype", "order"} <= state.keys():
        raise ImportFileError("it has an array of joblib without its shape, dtype or order")
    dtype, shape = state["dtype"], state["shape"]
    code = _dtype(dtype)
    if code == "O":
        return read_pickle(file, _ALLOWED)
    if type(shape) is not tuple or len(shape) != 1 or type(shape[0]) is not int or shape[0] < 0:
        raise ImportFileError("it has an array of another number of dimensions than one")
    # Since 1.2, unless compressed in a way that cannot tell where it is: how many bytes are left out to align the array.
    if state.get("numpy_array_alignment_bytes") is not None:
        padding = file.read(1)
        file.read(padding[0] if padding else 0)
    size = shape[0] * np.dtype(code).itemsize
    data = file.read(size)
    if len(data) != size:
        raise ImportFileError(f"it breaks off {size - len(data):,} bytes before the end of an array")
    return Made(_FROM_BUFFER, (data, dtype, shape, state["order"]))


def _name(made: Made) -> str:
    return made.function.replace("numpy.core.", "numpy._core.")


def _shown(value: Any) -> str:
    """What something is, for a message, however large or deep it is."""
    if isinstance(value, Made | Named):
        return value.function if isinstance(value, Made) else value.name
    return f"{value!r:.60}" if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"


def _inflated(data: bytes) -> bytes:
    """The file's content, where joblib has compressed it; raises ImportFileError beyond MAX_BYTES."""
    machine: Any
    if data.startswith(b"\x1f\x8b"):
        machine = zlib.decompressobj(zlib.MAX_WBITS | 16)
    elif data.startswith(b"\x78"):
        machine = zlib.decompressobj()
    elif data.startswith(b"BZh"):
        machine = bz2.BZ2Decompressor()
    elif data.startswith((b"\xfd7zXZ", b"\x5d\x00")):
        machine = lzma.LZMADecompressor(memlimit=_MAX_LZMA)
    elif data.startswith(b"\x04\x22\x4d\x18"):
        raise ImportFileError("it is compressed with lz4; save it again with joblib.dump(..., compress=0)")
    else:
        return data
    try:
        content: bytes = machine.decompress(data, MAX_BYTES + 1)
    except (zlib.error, OSError, EOFError, ValueError, lzma.LZMAError) as error:
        raise ImportFileError(f"it is compressed, and damaged: {error}") from error
    if len(content) > MAX_BYTES:
        raise ImportFileError(f"it inflates from {len(data):,} to more than {MAX_BYTES:,} bytes, which are not read")
    if not machine.eof:
        raise ImportFileError("it is compressed, and breaks off")
    return content
