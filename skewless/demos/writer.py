"""A demonstration's corpus as a folder: examples, their manifest, and the settings that make them again."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class CorpusError(ValueError):
    """Settings that cannot be met, or an output directory that is not ours to write."""


@dataclass(frozen=True)
class Example:
    """One file: its path in the corpus, its bytes, its class's name, what it shares with others, and its split."""

    name: str
    data: bytes
    label: str
    group: str
    split: str


def write(out: Path, settings: dict[str, Any], examples: Iterable[Example], readme: str) -> bool:
    """Write the examples with manifest.csv, corpus.json (the settings) and README.txt under `out`.

    `out` appears complete or not at all. Returns False, having written nothing, if the same corpus is there already.
    Raises CorpusError for a directory that holds anything else.
    """
    out = out.resolve()
    if is_complete(out, settings):
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        part = Path(scratch, "corpus")
        rows = []
        for example in examples:
            path = part / example.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(example.data)
            rows.append((example.name, example.label, example.group, example.split))
        write_csv(part / "manifest.csv", "file_path,label,group,split", rows)
        finish(part, out, settings, readme)
    return True


def write_csv(path: Path, header: str, rows: Iterable[tuple]) -> None:
    """A CSV with the same bytes on every system."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header.split(","))
        writer.writerows(rows)


def finish(part: Path, out: Path, settings: dict[str, Any], readme: str) -> None:
    """Add corpus.json and README.txt to a folder that has all the rest, and move it to its place."""
    (part / "corpus.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (part / "README.txt").write_text(readme, encoding="utf-8")
    if out.exists():
        out.rmdir()
    part.rename(out)


def is_complete(out: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` already holds the corpus of these settings. Raises CorpusError where it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    advice = "give another directory, or remove this one"
    if not (out / "corpus.json").is_file():
        raise CorpusError(f"{out} is in use and has no corpus.json, so it is not a corpus: {advice}")
    try:
        found = json.loads((out / "corpus.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorpusError(f"{out / 'corpus.json'} is not JSON ({error}): {advice}") from error
    if found != settings:
        raise CorpusError(f"{out} holds a corpus with settings {found}, not {settings}: {advice}")
    with (out / "manifest.csv").open(newline="", encoding="utf-8") as file:
        listed = [row["file_path"] for row in csv.DictReader(file)]
    present = sum((out / name).is_file() for name in listed)
    if present != len(listed):
        raise CorpusError(f"{out} holds {present} files where {len(listed)} were written: {advice}")
    return True
