"""What the old service answered, as somebody wrote it down: a CSV with a row per file, or per window of a file."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from skewless.core.numerics import TOLERANCES
from skewless.csv_file import csv_rows

# What a trained network's answers may be apart between two machines.
_EXACT = TOLERANCES["exact"]
# What sums in another order leave of a probability, by float32's 24 bits and some hundred layers.
_NOISE = 5e-6
_FILE, _START, _PROBABILITY = "file_path", "start_s", "probability"


def part_name(start_s: float) -> str:
    """What the probability of a window is called beside the answer's own fields: "probability at 3 s"."""
    return f"{_PROBABILITY} at {start_s:g} s"


@dataclass(frozen=True)
class Field:
    """One recorded quantity, such as "probability" or "global_confidence".

    scale: its largest recorded value, at least 1: differences are told as shares of it, so that per cent count as probabilities.
    decimals: how many decimals the service wrote, at most.
    allowed: how far an answer may be from the record and reproduce it: the exact tier's tolerance times the scale, and half
        of the last decimal that was written.
    """

    scale: float
    decimals: int

    @property
    def allowed(self) -> float:
        return _EXACT * self.scale + self._rounding

    @property
    def noise(self) -> float:
        """How far two runs of one float32 computation may be apart beside the record's rounding: what is further away than
        this may reproduce the record, and still be another computation."""
        return _NOISE * self.scale + self._rounding

    @property
    def _rounding(self) -> float:
        return 0.5 * 10.0**-self.decimals


@dataclass(frozen=True)
class Recorded:
    """What is recorded of each file.

    sha256: of the CSV. values: by file and by the name of the quantity. fields: what is known of each column; of windows
    all probabilities are one. unused: columns that no answer has, such as a timestamp.
    """

    sha256: str
    values: Mapping[str, Mapping[str, float]]
    fields: Mapping[str, Field]
    unused: tuple[str, ...]

    def field(self, name: str) -> Field:
        """Of a quantity in `values`."""
        return self.fields[_PROBABILITY if name.startswith(f"{_PROBABILITY} at ") else name]


def read_recorded(path: Path, files: Iterable[str], answers: Iterable[str]) -> Recorded:
    """Read `path`: a column `file_path`, and at least one with what the service answered.

    Such a column has the name of a number in our answer, for instance `probability`, `probability_human` or
    `global_confidence`. With a column `start_s` a row is one window of a file, which starts so many seconds after the
    file's start, and `probability` is the window's.

    files: the labelled files. A row belongs to the file of the same path, or else to the only one of the same name: logs
        often have no folders. answers: the names of the numbers that our answer has.
    Raises RecordError naming the row, the column and the value that is wrong, and where nothing can be compared.
    """
    if not path.is_file():
        raise RecordError(f"there is no file {path}: give a CSV with file_path and what the service answered")
    known, answers = _Names(files), set(answers)
    values: dict[str, dict[str, float]] = {}
    decimals: Counter[str] = Counter()
    strangers: list[str] = []
    with csv_rows(path, RecordError) as reader:
        columns = list(reader.fieldnames or [])
        windows = _START in columns
        wanted = [c for c in columns if c == _PROBABILITY] if windows else [c for c in columns if c in answers]
        if _FILE not in columns or not wanted:
            needed = f"{_PROBABILITY} for each {_START}" if windows else f"one of {', '.join(sorted(answers))}"
            raise RecordError(
                f"{path} has the columns {', '.join(columns) or 'none'}; it needs {_FILE} and {needed}: what the service answered"
            )
        for row, record in enumerate(reader, start=2):
            where = f"{path}, row {row}"
            file = known.find(record[_FILE] or "", where)
            if file is None:
                strangers.append(record[_FILE] or "")
                continue
            start = _number(record[_START], f"{where}: {_START}") if windows else 0.0
            for column in wanted:
                number = _number(record[column], f"{where}: {column}")
                name = part_name(start) if windows else column
                if values.setdefault(file, {}).setdefault(name, number) != number:
                    raise RecordError(f"{where}: {record[_FILE]!r} has another {name} in an earlier row")
                decimals[column] = max(decimals[column], _decimals(record[column] or ""))
    if not values:
        raise RecordError(
            f"{path} has none of the labelled files; it has {strangers[0]!r}, the first labelled file is {known.first!r}"
            if strangers
            else f"{path} has no rows"
        )
    largest = {c: max((abs(v) for of in values.values() for n, v in of.items() if windows or n == c)) for c in wanted}
    return Recorded(
        hashlib.sha256(path.read_bytes()).hexdigest(),
        values,
        {column: Field(max(1.0, largest[column]), decimals[column]) for column in wanted},
        tuple(c for c in columns if c not in (_FILE, _START, *wanted)),
    )


class RecordError(ValueError):
    """A record that cannot be compared; the message names the file, the row and the value."""


class _Names:
    """Finds a labelled file by its path, or by its name where only one has it."""

    def __init__(self, files: Iterable[str]):
        self._paths = list(files)
        self._counts = Counter(map(_name, self._paths))
        self._by_name = {_name(path): path for path in self._paths}
        self.first = self._paths[0]

    def find(self, path: str, where: str) -> str | None:
        if path in self._paths:
            return path
        name = _name(path)
        if self._counts[name] > 1:
            raise RecordError(
                f"{where}: {self._counts[name]} labelled files are called {name!r}; write the path, such as {self._by_name[name]!r}"
            )
        return self._by_name.get(name)


def _name(path: str) -> str:
    # Windows' own splits at / as well as at \.
    return PureWindowsPath(path).name if "\\" in path else PurePosixPath(path).name


def _number(text: str | None, where: str) -> float:
    try:
        number = float(text or "")
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise RecordError(f"{where} is {text!r}, expected a number")
    return number


def _decimals(text: str) -> int:
    mantissa, _, exponent = text.strip().lower().partition("e")
    return max(0, len(mantissa.partition(".")[2]) - int(exponent or 0))
