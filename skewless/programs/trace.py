"""What a traced run of a program leaves: its values, the lines that made them, and its calls into libraries."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from skewless.core.files import atomic
from skewless.errors import UsageError

FORMAT = 1


@dataclass(frozen=True, order=True)
class Site:
    """A place in a program's source.

    file: relative to the program's folder; line: counted from 1; column: from 0; text: the source of the expression.
    function: the qualified name of the function around it, "" at module level. statement: the line on which its statement begins.
    """

    file: str
    line: int
    column: int
    text: str
    function: str = ""
    statement: int = 0

    @property
    def whole(self) -> tuple[str, int]:
        """The statement that it is a part of."""
        return self.file, self.statement

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Value:
    """The numbers of one array or number, whoever held them.

    digest: equal for equal numbers in the same order, whatever their floating-point type, memory layout and axes of length 1.
    shape: without axes of length 1. size: how many numbers.
    sample: at most 256 of the numbers, evenly spaced in row-major order, float64.
    low, high, mean, rms: of the finite numbers. finite: whether all are.
    """

    digest: str
    shape: tuple[int, ...]
    size: int
    sample: np.ndarray = field(repr=False, compare=False)
    low: float
    high: float
    mean: float
    rms: float
    finite: bool = True

    @property
    def largest(self) -> float:
        """The largest absolute number."""
        return max(abs(self.low), abs(self.high))


@dataclass(frozen=True)
class Item:
    """A value where it stood: `path` is how it is reached from what was recorded ("", "[2]", "['specs']", ".mean_").

    kind: "torch", "numpy", "image" (Pillow), "list" (numbers in lists or tuples) or "number". shape and dtype: as they stood.
    """

    digest: str
    path: str
    kind: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Call:
    """A call into a library. arguments: as text, by name, with defaults; `given` names those that the program wrote.

    An argument that holds an array is told by its shape and dtype. version: of the package, "" where it has none.
    """

    function: str
    arguments: Mapping[str, str]
    given: tuple[str, ...]
    package: str
    version: str


@dataclass(frozen=True)
class Event:
    """Something a program computed: an operation at a site, for the `occurrence`-th time (from 0).

    operation: an operator ("+", "[]", "-x"), "return", "in place", or the qualified name of the function called.
    inputs: the arrays it was given, and the state of the object whose method it is. outputs: what it gave.
    name: the variable that the result was assigned to, where it was.
    """

    number: int
    site: Site
    occurrence: int
    operation: str
    inputs: tuple[Item, ...]
    outputs: tuple[Item, ...]
    call: Call | None = None
    name: str = ""


@dataclass(frozen=True)
class Swallowed:
    """An exception that an `except` block, or a context manager, kept from the caller, `count` times."""

    site: Site
    exception: str
    message: str
    count: int


@dataclass(frozen=True)
class Trace:
    """One run of a function on one file.

    program: what was run, as the user named it. file: the file's name. events: in the order in which they ended.
    values: by digest. outputs: what the function returned. arrays: whole arrays by digest, of those that were kept.
    settings: numbers, flags and texts that were assigned to names, by "file:line name", the last value of each, as text.
    versions: of Python and of the packages called. seconds: of the traced run. notes: what could not be recorded, and why.
    sources: the program's files, by the name that sites use.
    """

    program: str
    file: str
    events: tuple[Event, ...]
    values: Mapping[str, Value]
    outputs: tuple[Item, ...]
    arrays: Mapping[str, np.ndarray] = field(repr=False)
    swallowed: tuple[Swallowed, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict, repr=False)

    def write(self, path: Path) -> None:
        """Write the trace as one zip file: trace.json, and the samples and whole arrays as .npy. `Trace.read` reads it."""
        data = asdict(self)
        values, arrays = data.pop("values"), data.pop("arrays")
        samples = {digest: value.pop("sample") for digest, value in values.items()}
        record = {"format": FORMAT, **data, "values": list(values.values())}
        with atomic(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("trace.json", json.dumps(record, ensure_ascii=False))
            for folder, members in (("samples", samples), ("arrays", arrays)):
                for digest, array in members.items():
                    buffer = BytesIO()
                    np.save(buffer, array, allow_pickle=False)
                    file.writestr(f"{folder}/{digest}.npy", buffer.getvalue())

    @classmethod
    def read(cls, path: Path) -> Trace:
        """Read what `write` wrote; raises UsageError for a file that is something else."""
        try:
            with zipfile.ZipFile(path) as file:
                record = json.loads(file.read("trace.json"))
                if record.pop("format") != FORMAT:
                    raise UsageError(
                        f"{path} was written by another version of skewless trace; trace the program again"
                    )
                members = {name: file.read(name) for name in file.namelist() if name.endswith(".npy")}
            arrays = {
                name.removesuffix(".npy"): np.load(BytesIO(data), allow_pickle=False) for name, data in members.items()
            }
            values = [
                Value(**{**v, "shape": tuple(v["shape"])}, sample=arrays[f"samples/{v['digest']}"])
                for v in record.pop("values")
            ]
            return cls(
                **{
                    **record,
                    "events": tuple(map(_event, record["events"])),
                    "outputs": tuple(map(_item, record["outputs"])),
                    "swallowed": tuple(Swallowed(**{**s, "site": Site(**s["site"])}) for s in record["swallowed"]),
                    "notes": tuple(record["notes"]),
                },
                values={value.digest: value for value in values},
                arrays={n.removeprefix("arrays/"): a for n, a in arrays.items() if n.startswith("arrays/")},
            )
        except (OSError, zipfile.BadZipFile, KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{path} is not what skewless trace writes: {error}") from error


def _item(data: dict[str, Any]) -> Item:
    return Item(**{**data, "shape": tuple(data["shape"])})


def _event(data: dict[str, Any]) -> Event:
    call = data["call"] and Call(**{**data["call"], "given": tuple(data["call"]["given"])})
    return Event(
        **{
            **data,
            "site": Site(**data["site"]),
            "inputs": tuple(map(_item, data["inputs"])),
            "outputs": tuple(map(_item, data["outputs"])),
            "call": call,
        }
    )
