"""The labelled files of an adoption: a folder for each class, or a manifest."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from skewless.training.manifest import ManifestError, Recording, read_manifest

# All of them measure: nothing is trained.
SPLIT = "val"


def labelled_files(
    files: Path | None, manifest: Path | None, root: Path | None, classes: Sequence[str], listed: Path
) -> tuple[list[Recording], Path]:
    """The labelled files, all in SPLIT, and the folder that their paths are relative to; `listed` is written to say the same.

    files: a folder that has one for each class. manifest, root: in place of it, a CSV with file_path and label, and the folder
        that its paths are relative to, None for its own. Its splits play no part.
    Raises ManifestError.
    """
    if (files is None) == (manifest is None):
        raise ManifestError("give the labelled files: either --files, a folder for each class, or --manifest")
    if files is not None and root is not None:
        raise ManifestError("--root belongs to --manifest; --files needs none")
    if manifest is not None:
        below = root or manifest.parent
        rows = read_manifest(manifest, below, classes, split=SPLIT)
    elif files is not None:
        below, rows = files, list(_by_folder(files, classes))
    if not rows:
        raise ManifestError(f"{manifest or files} lists no files")
    with open(listed, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file_path", "label", "split"])
        writer.writerows((row.file_path, classes[row.label], row.split) for row in rows)
    return rows, below


def _by_folder(files: Path, classes: Sequence[str]) -> Iterator[Recording]:
    """The files below DIR/CLASS, for each class; raises ManifestError for a class without a folder, and for other folders."""
    if not files.is_dir():
        raise ManifestError(f"--files is {files}, expected a folder that has one for each class: {', '.join(classes)}")
    folders = {path.name.lower(): path for path in sorted(files.iterdir()) if path.is_dir()}
    expected = [name.lower() for name in classes]
    if missing := [name for name in classes if name.lower() not in folders]:
        raise ManifestError(
            f"{files} has no folder for {', '.join(missing)}; it has {', '.join(p.name for p in folders.values()) or 'none'}"
        )
    if strange := [path.name for name, path in folders.items() if name not in expected]:
        raise ManifestError(f"{files} has the folder {', '.join(strange)}; the classes are {', '.join(classes)}")
    for label, name in enumerate(expected):
        for path in sorted(folders[name].rglob("*")):
            if path.is_file():
                yield Recording(path.relative_to(files).as_posix(), path, label, SPLIT)
