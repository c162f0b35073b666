"""A pipeline's costly part on disk, so that an epoch does not decode and filter every recording again."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from skewless.core import stages
from skewless.core.files import atomic
from skewless.core.git_lfs import pointer
from skewless.core.pipeline import Pipeline
from skewless.core.stages import InputError, Signal
from skewless.core.versions import library_versions
from skewless.training.manifest import Recording


class Entry(NamedTuple):
    """A recording and the file that keeps its costly stages' output."""

    recording: Recording
    path: Path

    @property
    def sha256(self) -> str:
        """Of the recording's bytes: entries are named after it."""
        return self.path.stem


class UnreadableRecordings(ValueError):
    """Recordings that the pipeline could not read: `failures` maps each path to the reason."""

    def __init__(self, failures: dict[str, str]):
        self.failures = failures
        listed = "\n".join(f"  {path}: {reason}" for path, reason in failures.items())
        super().__init__(f"{len(failures)} recording(s) cannot be read:\n{listed}")


def report_unreadable(failures: dict[str, str], skip: bool) -> None:
    """Raise UnreadableRecordings when there are any; with `skip`, print its message to stderr instead."""
    if failures:
        problem = UnreadableRecordings(failures)
        if not skip:
            raise problem
        print(f"skipping: {problem}", file=sys.stderr)


class StageCache:
    """The pipeline, cut in two: the costly stages' output is computed once per input and kept, `finish` runs every time.

    The cut is before the cheap stages at the end, such as one that replicates channels, and before the first stage that
    training fits, such as a scaler. Entries lie in a folder named after the fingerprint of the cached stages, their code and
    the libraries they call, and are named after the SHA-256 of the input's bytes: whatever could change a number makes
    another entry.
    """

    def __init__(self, root: str | Path, pipeline: Pipeline):
        self._first, self._last = _cut(pipeline)
        # The unit of the kept values, such as "dB".
        self.unit = list(self._first.stages.values())[-1].unit
        self._dir = Path(root) / _key(self._first)
        self._dir.mkdir(parents=True, exist_ok=True)

    def prepare(self, recordings: Iterable[Recording], *, skip_unreadable: bool = False) -> list[Entry]:
        """Compute what is missing, with a progress bar; each readable input with its entry.

        Raises UnreadableRecordings listing every recording that cannot be read, unless `skip_unreadable`, which
        prints the same list to stderr and leaves them out.
        """
        entries, failures = [], {}
        for recording in tqdm(list(recordings), desc="preprocessing", unit="file"):
            payload = recording.path.read_bytes()
            try:
                entries.append(Entry(recording, self._entry(payload)))
            except InputError as error:
                failures[recording.file_path] = pointer(payload) or str(error)
        report_unreadable(failures, skip_unreadable)
        return entries

    def fit(self, entries: Iterable[Entry]) -> None:
        """Fit the stages that take something from a training set, in order, to these entries."""
        if self._last is None or not self._last.unfitted:
            return
        data = torch.cat([self.load(entry.path) for entry in entries])
        for name, stage in self._last.stages.items():
            if not stage.fitted:
                self._last = self._last.replace(**{name: stage.fit(data)})
            data = self._last.stages[name](Signal(data)).data

    @property
    def pipeline(self) -> Pipeline:
        """The whole pipeline, fitted where `fit` has been called."""
        last = [] if self._last is None else list(self._last.stages.values())
        return Pipeline(self._first.name, list(self._first.stages.values()) + last, self._first.code)

    def load(self, path: Path) -> torch.Tensor:
        """What is kept of one input, `(S, ...)`."""
        return torch.from_numpy(np.load(path))

    def finish(self, kept: torch.Tensor) -> torch.Tensor:
        """The costly stages' output `(S, ...)` to the network's input, float32."""
        if self._last is None:
            return kept
        return deque(self._last.resume(Signal(kept)), maxlen=1).pop()[1].data

    def _entry(self, payload: bytes) -> Path:
        path = self._dir / f"{hashlib.sha256(payload).hexdigest()}.npy"
        if not path.exists():
            kept = self._first(payload).numpy()
            if not len(kept):
                raise InputError("it is shorter than one window, so that there is nothing to train on")
            # As an open file: to a name, NumPy adds its own suffix.
            with atomic(path) as unfinished, open(unfinished, "wb") as file:
                np.save(file, kept)
        return path


def _cut(pipeline: Pipeline) -> tuple[Pipeline, Pipeline | None]:
    names = list(pipeline.stages)
    cheap = [pipeline.stages[name].cheap for name in names]
    kept = len(names) - next((k for k, c in enumerate(reversed(cheap)) if not c), len(names))
    # What is not fitted yet cannot be kept, nor what comes behind it.
    kept = min([kept, *(names.index(name) for name in pipeline.unfitted)])
    if kept == 0:
        raise ValueError(f"pipeline '{pipeline.name}' begins with '{names[0]}', expected a stage that decodes a file")
    return (pipeline, None) if kept == len(names) else pipeline.split(before=names[kept])


def _key(pipeline: Pipeline) -> str:
    code = b"".join(path.read_bytes() for path in sorted(Path(stages.__file__).parent.glob("*.py")))
    parts = json.dumps([pipeline.fingerprint, library_versions(pipeline.packages)]).encode() + code
    return f"{pipeline.fingerprint[:16]}-{hashlib.sha256(parts).hexdigest()[:8]}"
