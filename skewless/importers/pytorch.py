"""Checkpoints that another PyTorch training script wrote, read as data: no code in the file runs."""

from __future__ import annotations

import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from skewless.importers.errors import ImportFileError
from skewless.importers.imported_file import ImportedFile
from skewless.importers.inflated import check_sizes, read_member
from skewless.training.checkpoint import file_digest, reason_of

# Added by nn.DataParallel and by torch.compile.
_PREFIXES = ("module.", "_orig_mod.")

_MAX_PICKLE = 2**28  # bytes; it holds names and shapes, the numbers are elsewhere


class _NumpyDtype:
    """Stands in for numpy.dtype while a file is read: numpy's own would act on any state that the file gives it."""

    def __init__(self, code: str, *_: Any):
        if code not in ("f4", "f8", "i4", "i8"):
            raise pickle.UnpicklingError(f"it holds a numpy scalar of type {code!r}; save plain Python numbers")
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        if order not in ("<", ">"):
            raise pickle.UnpicklingError(f"it holds a numpy scalar of byte order {order!r}, expected '<' or '>'")
        self.code = order + self.code


def _numpy_scalar(dtype: _NumpyDtype, data: bytes) -> float | int:
    """A numpy scalar's pickled parts as a plain Python number."""
    return np.frombuffer(data, dtype.code).item()


_SAFE_GLOBALS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_NumpyDtype, "numpy.dtype"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),  # as numpy 1 spells it
]


def read_pytorch(path: str | Path) -> ImportedFile:
    """Read a `.pth` of another training script onto the CPU, as plain data.

    Accepted: a dict with the weights under `model_state_dict`, `state_dict` or `model`, and optionally `epoch`, `val_auc` (a
    Python number, a numpy scalar or a tensor) and `config` (a dict); or a state dict alone. Prefixes that
    `nn.DataParallel` and `torch.compile` put before every key are removed. Whatever else the file would have Python
    import or call is refused by name: nothing of it runs. Neither is a zip inflated to more than `inflated.MAX_BYTES`.
    Raises ImportFileError, saying what the file holds and what to save instead.
    """
    if not Path(path).is_file():
        raise ImportFileError(f"there is no file {path}")
    _check_sizes(Path(path))
    try:
        # torch warns of pickles and tensors that are refused anyway.
        with torch.serialization.safe_globals(_SAFE_GLOBALS), warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its unpickler or zip reader does
        raise ImportFileError(_why_unreadable(Path(path), error)) from error
    if not isinstance(content, Mapping):
        raise ImportFileError(f"{path} holds a {type(content).__name__}, expected a dict of weights")
    if "pipeline_fingerprint" in content:
        raise ImportFileError(
            f"{path} already says which pipeline trained it; use it as it is, there is nothing to import"
        )
    config = content.get("config")
    if config is not None and not isinstance(config, Mapping):
        raise ImportFileError(f"{path}: config is a {type(config).__name__}, expected a dict; save vars(config)")
    return ImportedFile(
        "pytorch",
        sha256=file_digest(path),
        weights=_weights(path, content),
        epoch=_epoch(path, content.get("epoch")),
        val_auc=_val_auc(path, content.get("val_auc")),
        config=dict(config or {}),
    )


def _check_sizes(path: Path) -> None:
    """Raise ImportFileError for a zip that torch would inflate without end; torch.save itself compresses nothing."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":
            return
    try:
        with zipfile.ZipFile(path) as archive:
            check_sizes(archive)
    except ImportFileError as error:
        raise ImportFileError(f"{path}: {error}") from error
    except Exception as error:  # zipfile raises many kinds on a damaged archive
        raise ImportFileError(
            f"{path} is not a checkpoint that loads without running code: its zip is damaged ({error})"
        ) from error


def _why_unreadable(path: Path, error: Exception) -> str:
    message = str(error)
    advice = (
        "Nothing of it ran. Where it was written, save plain values instead: "
        'torch.save({"model_state_dict": model.state_dict(), "config": vars(config), "epoch": ..., "val_auc": ...}, ...)'
    )
    named = re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", message)
    if named and _is_whole_model(path):
        return (
            f"{path} is a whole model, saved with torch.save(model): reading it would import and run its classes, first "
            f"'{named[1]}'. Nothing of it ran. Where it was written, load it and save its weights alone: "
            "torch.save(model.state_dict(), ...)"
        )
    if named:
        return f"{path} is refused: reading it would import and run '{named[1]}'. {advice}"
    # A pickle of another protocol, which torch does not look into.
    foreign = "Unsupported operand" in message
    if foreign and (name := _first_global(path)):
        return f"{path} is refused: it is no file that torch.save writes, and asks for '{name}' first. {advice}"
    reason = reason_of(error)
    # The number of an opcode, or nothing that says more: bytes of something else.
    if foreign or reason.isdigit():
        with path.open("rb") as file:
            start = file.read(8).hex(" ")
        reason = f"torch.save did not write it; it starts with the bytes {start}, which are of no format known here"
    return f"{path} is not a checkpoint that loads without running code: {reason}"


class _Asked(Exception):
    """A pickle asked for a global."""


class _Asking(pickle.Unpickler):
    """Raises _Asked with the first global that a pickle asks for, before anything is imported or called."""

    def find_class(self, module: str, name: str) -> Any:
        raise _Asked(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return None


def _pickled(path: Path) -> bytes:
    """A file, or of a zip the pickle in it."""
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        pickles = [member for member in archive.infolist() if member.filename.endswith("/data.pkl")]
        return b"".join(read_member(archive, member, _MAX_PICKLE) for member in pickles)


def _is_whole_model(path: Path) -> bool:
    """Whether a pickle names what every nn.Module keeps, and a state dict does not have."""
    try:
        data = _pickled(path)
    except Exception:  # damaged bytes raise anything; the file is refused either way
        return False
    return all(name in data for name in (b"_parameters", b"_buffers", b"_modules", b"_forward_hooks"))


def _first_global(path: Path) -> str:
    """The first global of a pickle, or of the pickle in a zip; empty when it breaks off before."""
    try:
        _Asking(io.BytesIO(_pickled(path))).load()
    except _Asked as asked:
        return str(asked)
    except Exception:  # damaged bytes raise anything; the file is refused either way
        return ""
    return ""


def _weights(path: str | Path, content: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    wrappers = [k for k in ("model_state_dict", "state_dict", "model") if k in content]
    if len(wrappers) > 1:
        raise ImportFileError(f"{path} has both {' and '.join(wrappers)}; keep the one that was evaluated")
    weights = content[wrappers[0]] if wrappers else content
    if not isinstance(weights, Mapping) or not weights:
        raise ImportFileError(f"{path} has no weights: {wrappers[0] if wrappers else 'the file'} is {weights!r:.60}")
    other = [str(k) for k, v in weights.items() if not isinstance(k, str) or not isinstance(v, torch.Tensor)]
    if other:
        expected = (
            "expected tensors by name"
            if wrappers
            else "expected 'model_state_dict', 'state_dict', 'model' or tensors only"
        )
        listed = f"{', '.join(other[:8])}{', ...' if len(other) > 8 else ''}"
        raise ImportFileError(f"{path} has keys without a tensor ({listed}); {expected}")
    return without_prefixes(weights)


def without_prefixes(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights by their names without what `nn.DataParallel` and `torch.compile` put before every one of them."""
    while prefix := next((p for p in _PREFIXES if weights and all(k.startswith(p) for k in weights)), ""):
        weights = {k.removeprefix(prefix): v for k, v in weights.items()}
    return dict(weights)


def _number(value: Any) -> Any:
    # A tensor of another kind, such as one on the device "meta", has no value to give.
    plain = isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.layout == torch.strided
    return value.item() if plain and value.numel() == 1 else value


def _epoch(path: str | Path, value: Any) -> int | None:
    epoch = _number(value)
    if epoch is not None and (type(epoch) is not int or epoch < 0):
        raise ImportFileError(f"{path}: epoch is {epoch!r}, expected a whole number")
    return epoch


def _val_auc(path: str | Path, value: Any) -> float | None:
    auc = _number(value)
    if auc is not None and (type(auc) not in (int, float) or not 0 <= auc <= 1):
        raise ImportFileError(f"{path}: val_auc is {auc!r}, expected a number in [0, 1]")
    return None if auc is None else float(auc)
