"""The list of labelled recordings: a CSV with the columns file_path, cough_label, split."""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass
from pathlib import Path

COLUMNS = ("file_path", "cough_label", "split")
SPLITS = ("train", "val", "test")
_LABELS = {"1": 1, "true": 1, "yes": 1, "y": 1, "0": 0, "false": 0, "no": 0, "n": 0}


class ManifestError(ValueError):
    """A manifest that cannot be used as it is; the message names the file and the row."""


@dataclass(frozen=True)
class Recording:
    """One row: the path as the manifest has it, where the file is, its label (1 positive, 0 negative), its split."""

    file_path: str
    path: Path
    label: int
    split: str


def read_manifest(manifest: str | Path, audio_root: str | Path) -> list[Recording]:
    """All rows, in order. Relative paths are below `audio_root`.

    Labels are 1/true/yes/y and 0/false/no/n in any case. Raises ManifestError naming the row for any other label, an
    unknown split, a repeated path or a file that is not there.
    """
    with open(manifest, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        absent = [c for c in COLUMNS if c not in (reader.fieldnames or [])]
        if absent:
            raise ManifestError(f"{manifest}: no column {', '.join(absent)}; it needs {', '.join(COLUMNS)}")
        recordings: dict[str, Recording] = {}
        # Row 1 is the header, as a spreadsheet counts.
        for row, record in enumerate(reader, start=2):
            where = f"{manifest}, row {row}"
            name, label, split = (str(record[c] or "").strip() for c in COLUMNS)
            if label.lower() not in _LABELS:
                raise ManifestError(f"{where}: cough_label is {label!r}, expected one of {', '.join(_LABELS)}")
            if split not in SPLITS:
                raise ManifestError(f"{where}: split is {split!r}, expected one of {', '.join(SPLITS)}")
            if not name or name in recordings:
                raise ManifestError(f"{where}: file_path {name!r} is {'repeated' if name else 'empty'}")
            path = Path(audio_root, name)
            if not path.is_file():
                raise ManifestError(f"{where}: there is no file {path}; is --audio-root right?")
            recordings[name] = Recording(name, path, _LABELS[label.lower()], split)
    return list(recordings.values())


def select(recordings: list[Recording], split: str) -> list[Recording]:
    """The recordings of one split; raises ManifestError unless both labels occur in it."""
    chosen = [r for r in recordings if r.split == split]
    require_both_labels(chosen, f"split '{split}'")
    return chosen


def require_both_labels(recordings: list[Recording], what: str) -> None:
    """Raise ManifestError, naming `what`, unless there are positive and negative recordings."""
    positives = sum(r.label for r in recordings)
    if not 0 < positives < len(recordings):
        negatives = len(recordings) - positives
        raise ManifestError(f"{what} has {positives} positive and {negatives} negative recordings; it needs both")


def manifest_digest(recordings: list[Recording]) -> str:
    """SHA-256 over the rows (path, label, split), whatever the order and the spelling of the labels."""
    rows = sorted(f"{r.file_path}\t{r.label}\t{r.split}" for r in recordings)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()
