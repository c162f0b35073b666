"""Which pipelines are tried, in which order, and when it is enough."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from skewless.adoption.recorded import Recorded
from skewless.adoption.trials import (
    Candidate,
    Gap,
    Laboratory,
    Trial,
    closest,
    distinct,
    servable_edits,
    single_edits,
    spread,
)
from skewless.core.definition import PIPELINE
from skewless.core.pipeline import Pipeline
from skewless.training.manifest import Recording

# Edits are tried on so many files first, and the best of them on all.
_SCREENED, _KEPT = 6, 3
# One edit after another, while each brings the answers nearer.
_ROUNDS = 3


def candidates_of(archive: Path, folder: Path, given: Sequence[Path]) -> list[Candidate]:
    """The archive's pipeline and its variants, and then those that were given; `folder` has the archive's own code."""
    own = [PIPELINE, *(f"variants/{path.name}" for path in sorted((archive / "variants").glob("*.yaml")))]
    named = {name: archive / name for name in own} | {path.as_posix(): path for path in given}
    return distinct(Candidate(name, Pipeline.from_yaml(path, folder), path) for name, path in named.items())


def search(
    laboratory: Laboratory,
    candidates: Sequence[Candidate],
    rows: Sequence[Recording],
    recorded: Recorded,
    folder: Path,
) -> tuple[list[Trial], int]:
    """Every candidate on all files; where none that can be served is the same as the record, edits of the closest, while they
    bring it nearer: an edit that is missing may change less than is allowed. Where the closest has a stage that no archive
    carries, first what stands in for that stage, then edits of the closest that can be served.

    Returns the trials on all files, and how many edits were tried on a few.
    """
    edited, replaced = 0, False
    trials = [
        laboratory.run(each, rows, f"{number}/{len(candidates)} {each.name}")
        for number, each in enumerate(candidates, start=1)
    ]
    few = spread(rows, recorded, _SCREENED)
    for turn in range(1, _ROUNDS + 1):
        ranked, servable = closest(trials, recorded), servable_of(trials, recorded)
        if not ranked or (servable and servable[0][0].same):
            break
        gap, base = ranked[0]
        # What the service computes is known then: what is left is to find its like that can be served.
        found = gap.reproduced and not base.candidate.servable
        before = servable if found else ranked
        replacing = found and not replaced
        if replacing:
            edits, replaced = list(servable_edits(base.candidate, candidates, folder)), True
        elif found and not servable:
            break
        else:
            base = before[0][1]
            edits = [e for e in single_edits(base.candidate, candidates, folder) if e.servable or not found]
        edits = distinct(edits, known=[trial.candidate for trial in trials])
        print(
            f"none of {len(trials)} pipelines {'that can be served ' if found else ''}is the same as the record; round {turn}: "
            f"{len(edits)} edits of {base.candidate.name} on {len(few)} files",
            file=sys.stderr,
        )
        screened = [laboratory.run(e, few, f"{number}/{len(edits)} edits") for number, e in enumerate(edits, start=1)]
        edited += len(edits)
        promising = [trial.candidate for _, trial in closest(screened, recorded)[:_KEPT]]
        trials += [laboratory.run(each, rows, each.name) for each in promising]
        after = servable_of(trials, recorded) if found else closest(trials, recorded)
        if after[:1] == before[:1] and not replacing:
            break
    return trials, edited


def servable_of(trials: Sequence[Trial], recorded: Recorded) -> list[tuple[Gap, Trial]]:
    return [each for each in closest(trials, recorded) if each[1].candidate.servable]
