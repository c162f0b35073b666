"""What counts as an array in a user's program, and when two arrays hold the same numbers."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np

from skewless.programs.trace import Value

# Lists and tuples of at least so many numbers are arrays; shorter ones are settings, such as a size or a mean of three channels.
LIST_FROM = 16
SAMPLE = 256
# A view that shows every number more often than this, such as all windows of a recording, is told by the numbers that it shows.
MOST_REPEATED = 8
# How far into containers arrays are looked for, and how many of one container are recorded.
DEPTH = 4
MOST_ITEMS = 4096


class Found(NamedTuple):
    """An array found in an object: how it is reached, what held it, and its numbers."""

    path: str
    kind: str
    holder: Any
    array: np.ndarray


def measure(array: np.ndarray) -> Value:
    """The Value of numbers of any type and shape; complex numbers are pairs along a last axis."""
    numbers = canonical(array)
    # Half of SHA-256, which processors compute faster than other digests.
    digest = hashlib.sha256(repr(numbers.shape).encode())
    digest.update(np.ascontiguousarray(numbers).data)
    flat = numbers.reshape(-1)
    places = np.linspace(0, flat.size - 1, min(SAMPLE, flat.size)).astype(np.int64)
    ok = np.isfinite(flat)
    finite = bool(ok.all())
    known = flat if finite else flat[ok]
    low, high, mean, rms = (
        (
            float(known.min()),
            float(known.max()),
            float(known.mean(dtype=np.float64)),
            float(np.sqrt(np.mean(np.square(known, dtype=np.float64)))),
        )
        if known.size
        else (0.0, 0.0, 0.0, 0.0)
    )
    return Value(
        digest.hexdigest()[:32],
        numbers.shape,
        int(flat.size),
        flat[places].astype(np.float64),
        low,
        high,
        mean,
        rms,
        finite,
    )


def canonical(array: np.ndarray) -> np.ndarray:
    """The same numbers without axes of length 1: float32 where it holds every one of them exactly, else float64."""
    if np.iscomplexobj(array):
        array = np.stack([array.real, array.imag], axis=-1)
    array = np.squeeze(array)
    narrow = array.astype(np.float32)
    if array.dtype.itemsize > 2 and array.dtype != np.float32 and not np.array_equal(narrow, array, equal_nan=True):
        narrow = array.astype(np.float64)
    # Minus zero is zero.
    return narrow + narrow.dtype.type(0)


def unseen() -> AbstractContextManager[Any]:
    """Within it, a tensor of a class of the user's is looked at without its `__torch_function__`, which would take note of that."""
    torch = sys.modules.get("torch")
    # A program may be in the middle of importing torch.
    guard = getattr(getattr(torch, "_C", None), "DisableTorchFunctionSubclass", None)
    return nullcontext() if guard is None else guard()


def array_of(value: Any) -> tuple[str, np.ndarray] | None:
    """(kind, numbers) of an array-like value, None for anything else. A tensor's numbers are those it has now, not a view."""
    with unseen():
        return _array_of(value)


def _array_of(value: Any) -> tuple[str, np.ndarray] | None:
    if isinstance(value, np.ndarray):
        return ("numpy", np.asarray(_repeated_once(value))) if value.dtype.kind in "biufc" and value.size else None
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        if not _has_numbers(value, torch):
            return None
        tensor = value.detach()
        if value.numel() > MOST_REPEATED * (held := value.untyped_storage().nbytes() // value.element_size()) > 0:
            tensor = tensor.as_strided((held,), (1,), 0)
        tensor = tensor.cpu().resolve_conj().resolve_neg()
        # numpy has no bfloat16 and no eight-bit floats.
        known = not tensor.is_floating_point() or tensor.dtype in (torch.float16, torch.float32, torch.float64)
        return "torch", (tensor if known else tensor.float()).numpy()
    pillow = sys.modules.get("PIL.Image")
    if pillow is not None and isinstance(value, pillow.Image):
        pixels = np.asarray(value)
        return ("image", pixels) if pixels.dtype.kind in "biuf" and pixels.size else None
    if isinstance(value, list | tuple) and len(value) >= LIST_FROM and _number(value[0]):
        return ("list", np.asarray(value)) if all(map(_number, value)) else None
    if isinstance(value, list | tuple) and value and isinstance(value[0], list | tuple) and len(value[0]) >= LIST_FROM:
        same = all(isinstance(row, list | tuple) and len(row) == len(value[0]) for row in value)
        return ("list", np.asarray(value)) if same and all(_number(x) for row in value for x in row) else None
    return None


def _has_numbers(tensor: Any, torch: Any) -> bool:
    """Whether a tensor has numbers that can be read: none while torch.vmap, torch.func.grad or a tracer goes through a function."""
    if torch.jit.is_tracing() or torch._C._functorch.is_functorch_wrapped_tensor(tensor) or tensor.is_nested:
        return False
    if tensor.is_quantized or tensor.layout != torch.strided or tensor.device.type == "meta":
        return False
    return bool(tensor.numel())


def _repeated_once(array: np.ndarray) -> np.ndarray:
    base = array.base
    if isinstance(base, np.ndarray) and array.size > MOST_REPEATED * base.size:
        return base
    # What numpy's sliding windows are views of is an object that tells where the numbers are.
    base = getattr(base, "base", None)
    return base if isinstance(base, np.ndarray) and array.size > MOST_REPEATED * base.size else array


def _number(value: Any) -> bool:
    if isinstance(value, np.number):
        # A difference of times is an integer to numpy.
        return value.dtype.kind in "iufc"
    return isinstance(value, int | float) and not isinstance(value, bool)


def number_of(value: Any) -> np.ndarray | None:
    """A single number that may come out of an array: a float, or a number of numpy's. Python's ints are sizes and indices."""
    if isinstance(value, float | np.floating | np.integer) and (number := np.asarray(value)).dtype.kind in "iuf":
        return number
    return None


def find(value: Any, notes: Callable[[str], None], depth: int = DEPTH) -> Iterator[Found]:
    """All arrays in a value: itself, or in lists, tuples, dictionaries and dataclasses."""
    yield from _find(value, "", notes, depth)


def _find(value: Any, path: str, notes: Callable[[str], None], depth: int) -> Iterator[Found]:
    known = array_of(value)
    if known is not None:
        yield Found(path, known[0], value, known[1])
    elif depth and (isinstance(value, list | tuple | dict) or _fields(value)):
        parts = list(_parts(value))
        if len(parts) > MOST_ITEMS:
            notes(f"a {type(value).__name__} of {len(parts):,} elements: only the first {MOST_ITEMS:,} are recorded")
        for step, part in parts[:MOST_ITEMS]:
            yield from _find(part, path + step, notes, depth - 1)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, Sequence):
        yield from ((f"[{at}]", part) for at, part in enumerate(value))
    else:
        held = getattr(value, "__dict__", {})
        yield from ((f".{name}", held[name]) for name in _fields(value) if name in held)


def _fields(value: Any) -> list[str]:
    """The fields of a dataclass; asked of its classes, as an object may make up attributes."""
    classes = (vars(kind) for kind in type(value).__mro__)
    return next((list(held["__dataclass_fields__"]) for held in classes if "__dataclass_fields__" in held), [])


def state(thing: Any, most: int = 1_000_000) -> Iterator[Found]:
    """The arrays that an object of a library holds: a module's buffers and parameters, or attributes such as `mean_`.

    Nothing where they are more than `most` numbers together: that is a network, not a step of preprocessing.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(thing, torch.nn.Module):
        held = [(f".{n}", t) for n, t in (*thing.named_buffers(), *thing.named_parameters())]
    else:
        try:
            # Not getattr: an object that makes up its attributes would make this one up.
            held = [(f".{n}", v) for n, v in object.__getattribute__(thing, "__dict__").items()]
        except AttributeError:
            return
    found = [Found(path, known[0], value, known[1]) for path, value in held if (known := array_of(value)) is not None]
    if sum(f.array.size for f in found) <= most:
        yield from found


def replaced(value: Any, path: str, array: np.ndarray) -> Any:
    """`value` with the array at `path` (as `find` and `state` give it) replaced by other numbers, held as before.

    The wider type of the two is taken: rounding may be what differs. Raises ValueError where the place cannot
    hold them.
    """
    if not path:
        return _held_like(value, array)
    step, rest = _first_step(path)
    if isinstance(value, dict):
        key = next(k for k in value if f"[{k!r}]" == step)
        return type(value)({**value, key: replaced(value[key], rest, array)})
    if isinstance(value, list | tuple):
        at = int(step[1:-1])
        parts = [*value[:at], replaced(value[at], rest, array), *value[at + 1 :]]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.nn.Module):
        owner, _, name = path[1:].rpartition(".")
        module = value.get_submodule(owner)
        setattr(module, name, _held_like(getattr(module, name), array))
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{step[1:]: replaced(getattr(value, step[1:]), rest, array)})
    setattr(value, step[1:], replaced(getattr(value, step[1:]), rest, array))
    return value


def _first_step(path: str) -> tuple[str, str]:
    ends = [at for at in (path.find(".", 1), path.find("[", 1)) if at > 0]
    end = min(ends, default=len(path))
    if path[0] == "[":
        end = path.index("]") + 1
    return path[:end], path[end:]


def _held_like(holder: Any, array: np.ndarray) -> Any:
    if isinstance(holder, float | np.number) and array.size == 1:
        return type(holder)(array.reshape(-1)[0])
    known = array_of(holder)
    if known is None:
        raise ValueError(f"a {type(holder).__name__} does not hold an array")
    kind, before = known
    if array.size == before.size and np.squeeze(array).shape == np.squeeze(before).shape:
        array = array.reshape(before.shape)
    if before.dtype.kind == "f":
        array = array.astype(_wide_enough(array, before, kind))
    if kind == "torch":
        import torch

        return torch.from_numpy(np.ascontiguousarray(array).copy()).to(holder.device)
    if kind == "numpy":
        return np.ascontiguousarray(array).copy()
    if kind == "image":
        from PIL import Image

        if before.dtype != np.uint8 or (array.dtype.kind not in "ui" and not np.array_equal(array, np.round(array))):
            raise ValueError("an image takes whole numbers from 0 to 255 only")
        return Image.fromarray(array.astype(np.uint8), holder.mode)
    return type(holder)(array.tolist())


def _wide_enough(array: np.ndarray, before: np.ndarray, kind: str) -> np.dtype:
    """A floating-point type that holds the numbers without rounding them to one that the other program does not have.

    Half precision is no reason to compute on in half precision. numpy computes in float64 where torch keeps float32, and the next line of a
    torch program takes float32.
    """
    if array.dtype.kind != "f":
        return before.dtype
    if kind == "torch" and before.dtype != np.float64 and array.dtype == np.float64:
        return np.dtype(np.float32)
    return np.promote_types(array.dtype, before.dtype)
