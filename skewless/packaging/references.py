"""Which recordings travel in an archive, and the probabilities that each of them has to get."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from skewless.core.selftest.record import ENTRIES, REFERENCES
from skewless.core.service import ModelService
from skewless.core.stages import InputError
from skewless.errors import BuildError
from skewless.evaluation.references import MIN_REFERENCE_SPREAD, entry, write_entries
from skewless.packaging.probes import try_probes
from skewless.training.checkpoint import file_digest

# "evaluation": the recordings that evaluation kept, of the split that it measured. "synthetic": only the probes that this
# project computes. "none": no recording at all; such an archive's self-test and smoke test have nothing to compare. Files:
# these recordings. Another word is refused.
Choice = Literal["evaluation", "synthetic", "none"] | str | Sequence[Path]

PROBES = "probes"


def check_evaluated(evaluation: Path) -> None:
    """Raise BuildError unless the references that evaluation kept are its own and tell a trained network from a fresh one."""
    folder = evaluation / REFERENCES
    entries = json.loads((folder / ENTRIES).read_text(encoding="utf-8"))
    for each in entries:
        if file_digest(folder / each["file"]) != each["sha256"]:
            raise BuildError(f"reference {each['file']} is not the file that was evaluated ({each['source']})")
    check_spread(entries)


def check_spread(entries: Sequence[dict[str, Any]]) -> None:
    """Raise BuildError for fewer than two references, or for references whose probabilities hardly differ."""
    if len(entries) < 2:
        raise BuildError(
            f"there are {len(entries)} references, expected at least 2; evaluate again, or give more files"
        )
    check_finite(entries)
    # One column per score; the one that moves most.
    columns = zip(*(each["scores"] for each in entries), strict=True)
    low, high = max(((min(c), max(c)) for c in columns), key=lambda ends: ends[1] - ends[0])
    if not high - low >= MIN_REFERENCE_SPREAD:
        raise BuildError(
            f"the references' probabilities span only {high - low:.4f} (from {low:.4f} to {high:.4f}, "
            f"expected at least {MIN_REFERENCE_SPREAD}): the network looks untrained; is this the trained checkpoint?"
        )


def check_finite(entries: Sequence[dict[str, Any]]) -> None:
    """Raise BuildError for a reference with a probability that is not a number: no answer could ever be compared with it."""
    for each in entries:
        if not all(map(math.isfinite, each["scores"])):
            raise BuildError(
                f"reference {each['file']} ({each['source']}) has the probabilities {each['scores']}, expected numbers: the "
                "network gives NaN for it; train or import again"
            )


def stage_references(
    choice: Choice, evaluation: Path, split: str, staged: Path, service: ModelService
) -> tuple[dict[str, Any], list[str]]:
    """Write the archive's `references/`: recordings, what each has to get, and, unless there are to be none, the probes.

    split: the one that evaluation measured. service: the one that evaluation measured; its probabilities are recorded for
        recordings that evaluation does not have.
    Returns what the archive's metrics say about its references, and warnings for whoever builds it.
    Raises BuildError for an unknown choice, a file that cannot be read, and what `check_spread` raises; PipelineError for a
    pipeline that fails on a probe.
    """
    folder = staged / REFERENCES
    folder.mkdir()
    taken, refused = try_probes(service.pipeline, **service.input_limits)
    if choice == "none":
        write_entries(folder, [])
        warning = (
            "the archive carries no recordings: its self-test compares the definition, the code and the weights only, and the "
            "smoke test has nothing to compare"
        )
        return {"kind": "none", "recordings": 0}, [warning]
    (folder / PROBES).mkdir()
    for name, payload in taken.items():
        (folder / PROBES / name).write_bytes(payload)
    warnings = [f"probe {name} is left out, the pipeline refuses it: {reason}" for name, reason in refused.items()]
    if choice == "evaluation":
        entries = json.loads((evaluation / REFERENCES / ENTRIES).read_text(encoding="utf-8"))
        for each in entries:
            shutil.copyfile(evaluation / REFERENCES / each["file"], folder / each["file"])
        warnings.append(
            f"{len(entries)} recordings of the {split} split travel in the archive; use --references synthetic, or give files "
            "that may be passed on, if they may not leave the house"
        )
    elif choice == "synthetic":
        files = sorted((folder / PROBES).iterdir())
        entries = [_scored(service, f"{PROBES}/{file.name}", "synthetic", file.read_bytes()) for file in files]
        if not entries:
            raise BuildError("the pipeline refuses every probe; give files of your own with --references")
    elif isinstance(choice, str):
        raise BuildError(f"references is {choice!r}, expected evaluation, synthetic, none or files")
    else:
        entries = _copy(choice, folder, service)
        check_spread(entries)
    check_finite(entries)
    write_entries(folder, entries)
    return {"kind": choice if isinstance(choice, str) else "files", "recordings": len(entries)}, warnings


def _copy(files: Sequence[Path], folder: Path, service: ModelService) -> list[dict[str, Any]]:
    """Copy somebody's own recordings, numbered, and score each."""
    entries = []
    for number, path in enumerate(files, start=1):
        if not path.is_file():
            raise BuildError(f"there is no reference {path}")
        name = f"{number:02d}{path.suffix.lower()}"
        shutil.copyfile(path, folder / name)
        try:
            entries.append(_scored(service, name, path.name, path.read_bytes()))
        except InputError as error:
            raise BuildError(f"reference {path} cannot be read: {error}") from error
    return entries


def _scored(service: ModelService, file: str, source: str, payload: bytes) -> dict[str, Any]:
    (scored,) = service.score([payload])
    return entry(file, source, hashlib.sha256(payload).hexdigest(), scored.scores, scored.parts, None)
