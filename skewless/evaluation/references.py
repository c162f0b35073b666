"""The recordings that an evaluation keeps for packaging, with what the service computed for them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from skewless.core.postprocess import Part
from skewless.core.selftest.record import ENTRIES
from skewless.evaluation.scores import Prediction

# References travel in every archive: larger recordings become one only where there are not enough smaller ones.
_MAX_REFERENCE_BYTES = 2_000_000

# Probabilities of an untrained network hardly depend on the recording: an archive's references must span this much.
MIN_REFERENCE_SPREAD = 0.05


def write_references(folder: Path, predictions: list[Prediction], count: int) -> None:
    """Copy inputs evenly spread over the range of probabilities (with several classes: over one after the other, each by
    its own probability), with what the service computed for them."""
    by_size = sorted(predictions, key=lambda p: p.recording.path.stat().st_size)
    small = [p for p in by_size if p.recording.path.stat().st_size <= _MAX_REFERENCE_BYTES]
    if len(small) < count:
        small = by_size[:count]
    ranked = sorted(small, key=lambda p: (int(np.argmax(p.scores)), max(p.scores), p.sha256))
    places = np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int)
    chosen = [ranked[place] for place in dict.fromkeys(places.tolist())]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    entries = []
    for number, p in enumerate(chosen, start=1):
        name = f"{number:02d}{p.recording.path.suffix.lower()}"
        shutil.copyfile(p.recording.path, folder / name)
        entries.append(entry(name, p.recording.file_path, p.sha256, p.scores, p.parts, p.recording.label))
    write_entries(folder, entries)


def entry(
    file: str, source: str, sha256: str, scores: Sequence[float], parts: Sequence[Part], label: int | None
) -> dict[str, Any]:
    """One entry of references.json. file: below the folder of references. source: what it was called before. label: None
    where there is none."""
    return {
        "file": file,
        "source": source,
        "sha256": sha256,
        "label": label,
        "scores": list(scores),
        "parts": [list(part) for part in parts],
    }


def write_entries(folder: Path, entries: Sequence[dict[str, Any]]) -> None:
    """references.json: what each reference has to get. Of a source that is an absolute path only the name is written: an
    archive says nothing about the machine that it was built on."""
    entries = [each | {"source": _relative(each["source"])} for each in entries]
    (folder / ENTRIES).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def _relative(source: str) -> str:
    absolute = PurePosixPath(source).is_absolute() or PureWindowsPath(source).is_absolute()
    # PureWindowsPath splits at / as well as at \, so it finds the name in paths of both kinds.
    return PureWindowsPath(source).name if absolute else source
