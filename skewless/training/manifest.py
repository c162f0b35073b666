"""The list of labelled inputs: a CSV with the columns file_path, label and split, and group where it matters."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sklearn.model_selection import StratifiedGroupKFold

from skewless.csv_file import csv_rows

SPLITS = ("train", "val", "test")
BINARY = ("negative", "positive")
_YES_AND_NO = {"1": 1, "true": 1, "yes": 1, "y": 1, "0": 0, "false": 0, "no": 0, "n": 0}


class ManifestError(ValueError):
    """A manifest that cannot be used as it is; the message names the file and the row."""


@dataclass(frozen=True)
class Recording:
    """One row: the path as the manifest has it, where the file is, its label (the number of its class), its split, and
    its group: whoever or whatever several files have in common, such as a singer; empty where the manifest has none."""

    file_path: str
    path: Path
    label: int
    split: str
    group: str = ""


def read_manifest(
    manifest: str | Path, root: str | Path, classes: Sequence[str] = BINARY, *, split: str | None = None
) -> list[Recording]:
    """All rows, in order. Relative paths are below `root`. split: that every row is taken for, whatever the file says.

    The label's column is `label`, or the one whose name ends in `_label`. A label is a class's name; of two classes also
    1/true/yes/y for the second and 0/false/no/n for the first; in any case. `group` is optional. Where there is no column
    `split`, or it is empty in every row, `assign_splits` fills it.
    Raises ManifestError naming the row for any other label, an unknown split, a repeated path, a file that is not there,
    or a group that is in more than one split.
    """
    named = {name.lower(): number for number, name in enumerate(classes)}
    # A class that is itself called "no" keeps its own number.
    labels = (_YES_AND_NO if len(classes) == 2 else {}) | named
    files: set[Path] = set()
    with csv_rows(manifest, ManifestError) as reader:
        columns = reader.fieldnames or []
        column = _label_column(manifest, columns)
        recordings: dict[str, Recording] = {}
        # Row 1 is the header, as a spreadsheet counts.
        for row, record in enumerate(reader, start=2):
            where = f"{manifest}, row {row}"
            name, label, own_split, group = (
                str(record.get(c) or "").strip() for c in ("file_path", column, "split", "group")
            )
            if label.lower() not in labels:
                raise ManifestError(f"{where}: {column} is {label!r}, expected one of {', '.join(labels)}")
            if own_split and own_split not in SPLITS:
                raise ManifestError(f"{where}: split is {own_split!r}, expected one of {', '.join(SPLITS)}")
            path = Path(root, name)
            if not name:
                raise ManifestError(f"{where}: file_path is empty")
            if not _is_file(path):
                raise ManifestError(f"{where}: there is no file {str(path)!r:.300}; is the root folder right?")
            if path.resolve() in files:
                raise ManifestError(f"{where}: file_path {name!r} is repeated")
            files.add(path.resolve())
            recordings[name] = Recording(name, path, labels[label.lower()], split or own_split, group)
    rows = list(recordings.values())
    without = [r.file_path for r in rows if not r.split]
    if without and len(without) < len(rows):
        raise ManifestError(f"{manifest}: split is empty for {without[0]}, expected in every row or in none")
    if without:
        rows = assign_splits(rows)
    _check_groups(manifest, rows)
    return rows


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have: too long, or with a NUL
        return False


def _label_column(manifest: str | Path, columns: Sequence[str]) -> str:
    found = [c for c in columns if c == "label"] or [c for c in columns if c.endswith("_label")]
    absent = [c for c, there in (("file_path", "file_path" in columns), ("label", len(found) == 1)) if not there]
    if absent:
        raise ManifestError(
            f"{manifest}: no column {', '.join(absent)}; it needs file_path, label (or one that ends in _label) and split"
        )
    return found[0]


def _check_groups(manifest: str | Path, recordings: list[Recording]) -> None:
    splits: dict[str, str] = {}
    for r in recordings:
        if r.group and splits.setdefault(r.group, r.split) != r.split:
            raise ManifestError(
                f"{manifest}: group {r.group!r} is in splits {splits[r.group]} and {r.split}; a group belongs to one split, "
                "or a test measures what training has heard"
            )


def assign_splits(recordings: list[Recording], seed: int = 42) -> list[Recording]:
    """A fifth to test, a fifth of the rest to val, the others to train: stratified by label, whole groups together.

    Rows without a group are a group of their own. Raises ManifestError when there are too few groups for that.
    """
    try:
        rest, test = _fold(recordings, seed)
        train, val = _fold(rest, seed)
    except ValueError as error:
        groups = len({r.group or r.file_path for r in recordings})
        raise ManifestError(
            f"{len(recordings)} rows in {groups} groups are too few to be split ({error}); give more, or a split column"
        ) from error
    chosen = {r.file_path: split for split, part in (("train", train), ("val", val), ("test", test)) for r in part}
    return [replace(r, split=chosen[r.file_path]) for r in recordings]


def _fold(recordings: list[Recording], seed: int) -> tuple[list[Recording], list[Recording]]:
    groups = [r.group or r.file_path for r in recordings]
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=seed)
    larger, smaller = next(folds.split(recordings, [r.label for r in recordings], groups))
    return [recordings[k] for k in larger], [recordings[k] for k in smaller]


def select(recordings: list[Recording], split: str, classes: Sequence[str] = BINARY) -> list[Recording]:
    """The recordings of one split; raises ManifestError unless every class occurs in it."""
    chosen = [r for r in recordings if r.split == split]
    require_every_class(chosen, f"split '{split}'", classes)
    return chosen


def require_every_class(recordings: list[Recording], what: str, classes: Sequence[str] = BINARY) -> None:
    """Raise ManifestError, naming `what`, unless there are recordings of every class."""
    counts = [sum(r.label == number for r in recordings) for number in range(len(classes))]
    if not all(counts):
        listed = ", ".join(f"{count} {name}" for count, name in zip(counts, classes, strict=True))
        raise ManifestError(f"{what} has {listed} recordings; it needs some of each")


def check_contents(recordings: Sequence[Recording]) -> dict[str, list[Recording]]:
    """The recordings by the SHA-256 of their files' bytes; every file is read once.

    The same bytes may be listed twice in one split, under two paths. Raises ManifestError naming both paths where they are in
    two splits, or have two labels.
    """
    by_content: dict[str, list[Recording]] = {}
    for recording in recordings:
        with open(recording.path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        by_content.setdefault(digest, []).append(recording)
    for first, *others in by_content.values():
        for other in others:
            both = f"{first.path} and {other.path} are the same recording, byte for byte"
            if first.split != other.split:
                raise ManifestError(
                    f"{both}, in the splits {first.split} and {other.split}: a test would measure what training has heard; "
                    "remove one of the two rows, or give both the same split"
                )
            if first.label != other.label:
                raise ManifestError(f"{both}, with two labels; correct one of the two rows, or remove it")
    return by_content


def manifest_digest(recordings: list[Recording]) -> str:
    """SHA-256 over the rows (path, label, split), whatever the order and the spelling of the labels."""
    rows = sorted(f"{r.file_path}\t{r.label}\t{r.split}" for r in recordings)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()
