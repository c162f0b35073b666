"""Spectrograms on disk, so that an epoch does not decode and filter every recording again."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from handler import stages
from handler.pipeline import Pipeline
from handler.references import library_versions
from handler.stages import InputError, Signal
from training.manifest import Recording

# What comes before the channels are replicated is three times smaller, and float16 where the pipeline says so.
_SPLIT_BEFORE = "replicate"


class UnreadableRecordings(ValueError):
    """Recordings that the pipeline could not read: `failures` maps each path to the reason."""

    def __init__(self, failures: dict[str, str]):
        self.failures = failures
        listed = "\n".join(f"  {path}: {reason}" for path, reason in failures.items())
        super().__init__(f"{len(failures)} recording(s) cannot be read:\n{listed}")


def report_unreadable(failures: dict[str, str], skip: bool) -> None:
    """Raise UnreadableRecordings when there are any; with `skip`, print its message instead."""
    if failures:
        problem = UnreadableRecordings(failures)
        if not skip:
            raise problem
        print(f"skipping: {problem}")


class SpectrogramCache:
    """The pipeline, cut in two: `spectrograms` is computed once per recording and kept, `finish` runs every time.

    Entries live below a folder named after the fingerprint of the cached stages, their code and the libraries they call,
    and are named after the digest of the recording's bytes: whatever could change a number is another entry.
    """

    def __init__(self, root: str | Path, pipeline: Pipeline):
        self._first, self._last = pipeline.split(before=_SPLIT_BEFORE)
        self._dir = Path(root) / _key(self._first)
        self._dir.mkdir(parents=True, exist_ok=True)

    def prepare(
        self, recordings: Iterable[Recording], *, skip_unreadable: bool = False
    ) -> list[tuple[Recording, Path]]:
        """Compute what is missing, with a progress bar; each readable recording with its entry.

        Raises UnreadableRecordings listing every recording that cannot be read, unless `skip_unreadable`, which
        prints the same list and leaves them out.
        """
        entries, failures = [], {}
        for recording in tqdm(list(recordings), desc="spectrograms", unit="clip"):
            try:
                entries.append((recording, self._entry(recording.path.read_bytes())))
            except InputError as error:
                failures[recording.file_path] = str(error)
        report_unreadable(failures, skip_unreadable)
        return entries

    def finish(self, spectrograms: torch.Tensor) -> torch.Tensor:
        """The cached stages' output `(S, 224, 224)` to the network's input `(S, 3, 224, 224)` float32."""
        return deque(self._last.resume(Signal(spectrograms)), maxlen=1).pop()[1].data

    def _entry(self, audio: bytes) -> Path:
        path = self._dir / f"{hashlib.sha256(audio).hexdigest()}.npy"
        if not path.exists():
            unfinished = path.with_suffix(f".{os.getpid()}.tmp")
            with open(unfinished, "wb") as file:
                np.save(file, self._first(audio).numpy())
            unfinished.replace(path)
        return path


def _key(pipeline: Pipeline) -> str:
    code = b"".join(path.read_bytes() for path in sorted(Path(stages.__file__).parent.glob("*.py")))
    parts = json.dumps([pipeline.fingerprint, library_versions()]).encode() + code
    return f"{pipeline.fingerprint[:16]}-{hashlib.sha256(parts).hexdigest()[:8]}"
