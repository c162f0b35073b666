"""Rows of a CSV that anybody may have written."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator
from pathlib import Path

from skewless.core.git_lfs import pointer


@contextlib.contextmanager
def csv_rows(path: str | Path, refusal: type[ValueError]) -> Iterator[csv.DictReader[str]]:
    """The file's rows, each a value by column; what is read inside the block may turn out not to be a CSV.

    Raises `refusal` for text that is not UTF-8, and for what Python's csv does not read, such as a NUL or an open quote with
    128 KiB behind it.
    """
    with open(path, "rb") as start:
        if lfs := pointer(start.read(1024)):
            raise refusal(f"{path}: {lfs}")
    try:
        # A byte-order mark is what spreadsheets write.
        with open(path, newline="", encoding="utf-8-sig") as file:
            yield csv.DictReader(file)
    except (csv.Error, UnicodeDecodeError) as error:
        raise refusal(f"{path} is not a CSV in UTF-8: {error}") from error
