"""What is to be scored: a folder's files, or those that a manifest lists."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from skewless.csv_file import csv_rows


class File(NamedTuple):
    """A file as the result names it, and where it is."""

    file_path: str
    path: str


class ListError(ValueError):
    """A folder or list that cannot be used as it is; the message says where."""


def list_files(source: Path, root: Path | None, without: Path) -> Iterator[File]:
    """Every file of a folder and its subfolders, by name, or of a list, in its order.

    source: a folder; or a CSV with a column `file_path`, such as a training's manifest; or, where the name does not end in
        .csv, a text with one path in a line. root: what a list's relative paths are below; None for the list's folder.
    without: a file that is no input, with everything that begins with its name: the result, and its parts.
    Raises ListError for a source that is not there or is empty, for a name that is no text, and for a repeated path. A
    listed file that is not there is no error here: it gets a row that says so.
    """
    if source.is_dir():
        if root is not None:
            raise ListError(f"--root is {root}, which belongs to a list; --input is a folder, and needs none")
        found = _of_folder(source, without)
    elif source.is_file():
        found = _of_list(source, source.parent if root is None else root)
    else:
        raise ListError(f"--input is {source}, expected a folder, or a file that lists files")
    empty = True
    for file in found:
        empty = False
        if _broken(file.file_path):
            raise ListError(f"the file {file.path!r} has a name that is not UTF-8; rename it")
        yield file
    if empty:
        raise ListError(f"there are no files in {source}")


def _broken(name: str) -> bool:
    """Whether a name has bytes that are no text: Python keeps them as halves of surrogate pairs."""
    return any("\ud800" <= character <= "\udfff" for character in name)


def _of_folder(folder: Path, without: Path) -> Iterator[File]:
    result = without.absolute()
    for path in sorted(folder.rglob("*")):
        absolute = path.absolute()
        ours = absolute == result or result.with_name(result.name + ".parts") in absolute.parents
        if path.is_file() and not ours:
            yield File(path.relative_to(folder).as_posix(), str(absolute))


def _of_list(source: Path, root: Path) -> Iterator[File]:
    seen: set[str] = set()
    for row, name in _of_csv(source) if source.suffix.lower() == ".csv" else _of_lines(source):
        if not name:
            raise ListError(f"{source}, row {row}: the path is empty")
        if name in seen:
            raise ListError(f"{source}, row {row}: file_path {name!r} is repeated")
        seen.add(name)
        yield File(name, str(Path(root, name).absolute()))


def _of_csv(source: Path) -> Iterator[tuple[int, str]]:
    """Paths with their rows' numbers, as a spreadsheet counts."""
    with csv_rows(source, ListError) as reader:
        if "file_path" not in (reader.fieldnames or []):
            raise ListError(f"{source} has no column file_path; it has {', '.join(reader.fieldnames or ['nothing'])}")
        yield from ((row, str(record["file_path"] or "").strip()) for row, record in enumerate(reader, start=2))


def _of_lines(source: Path) -> Iterator[tuple[int, str]]:
    """Paths with their lines' numbers."""
    try:
        with open(source, encoding="utf-8-sig") as file:
            yield from ((row, line.strip()) for row, line in enumerate(file, start=1) if line.strip())
    except UnicodeDecodeError as error:
        raise ListError(f"{source} is not text in UTF-8: {error}") from error
