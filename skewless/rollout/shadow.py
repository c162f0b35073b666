"""Why the two versions answer shadowed files otherwise: the first stage at which their pipelines differ, on the same bytes."""

from __future__ import annotations

import contextlib
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from skewless.core.definition import Definition
from skewless.core.pipeline import Pipeline
from skewless.core.service import ModelService
from skewless.core.stages import InputError, PipelineError
from skewless.errors import UsageError
from skewless.rollout.evidence import Evidence, archive_of
from skewless.skew.measure import Comparator, first_divergence
from skewless.torchserve.archive import Archive

NETWORK = "network"


@dataclass(frozen=True)
class Explained:
    """One shadowed file that the two versions answered otherwise.

    sha256, id: of the file and its request. baseline, candidate: the probabilities. stage: the first one whose output is another,
    NETWORK where both networks take the same. definition: how the two definitions differ there, in words. largest: difference of
    the stage's output, in `unit`; None where the two outputs cannot be subtracted. preprocessing: by how much the probability
    moves where only the pipeline is the candidate's; None where the baseline's network cannot take what that gives.
    """

    sha256: str
    id: str | None
    baseline: float
    candidate: float
    stage: str
    definition: str
    largest: float | None
    unit: str
    preprocessing: float | None

    def __str__(self) -> str:
        moved = f"{self.sha256[:12]}: {self.baseline:.4f} to {self.candidate:.4f}"
        if self.stage == NETWORK:
            return f"{moved}; both networks take the same input, and answer otherwise"
        by = "" if self.largest is None else f", by up to {self.largest:.4g} {self.unit}".rstrip()
        alone = (
            "the baseline's network cannot take what the candidate's pipeline gives"
            if self.preprocessing is None
            else f"the pipeline alone moves it by {self.preprocessing:+.4f}"
        )
        return f"{moved}; first differs at '{self.stage}' ({self.definition}){by}; {alone}"


def explain(evidence: Evidence, count: int = 5) -> list[Explained]:
    """The files that moved most, of those whose bytes were kept, each with the stage at which the two pipelines part.

    evidence: with a shadow; uploads are kept where the server was started with SKEWLESS_KEEP_UPLOADS. The archives are read from the
    server's model store, and their code is run here. Empty where nothing was kept or nothing moved. Raises UsageError for an
    archive that is not in the store any more.
    """
    moved = sorted((pair for pair in evidence.pairs() if pair.dp), key=lambda pair: -(pair.dp or 0.0))
    found: dict[str, Explained] = {}
    with contextlib.ExitStack() as stack:
        comparator = None
        for pair in moved:
            ours, theirs = pair
            digest = ours.sha256 or ""
            payload = evidence.kept(digest) if digest not in found else None
            if payload is None or ours.score is None or theirs.score is None:
                continue
            comparator = comparator or _comparator(evidence, stack)
            try:
                traces = comparator.traces(payload)
            except (InputError, PipelineError) as error:
                # Both workers answered it: it is this machine, or an archive that was replaced, that is other.
                raise UsageError(f"the upload {digest} cannot be read again: {error}") from error
            rows = comparator.alignment.rows
            outcomes = comparator.outcomes(*traces)
            at = first_divergence(rows, outcomes)
            stage, definition, largest, unit = NETWORK, "same", None, ""
            if at is not None:
                tally = outcomes[at].tally
                stage, definition = rows[at].label, comparator.alignment.definition(rows[at])
                largest = tally.maximum if tally else None
                unit = traces[0][stage].unit if stage in traces[0] else ""
            try:
                preprocessing = comparator.measure(digest, payload).change
            except PipelineError:
                # A network of its own may take another input, such as a smaller picture.
                preprocessing = None
            found[digest] = Explained(
                digest, ours.id, ours.score, theirs.score, stage, definition, largest, unit, preprocessing
            )
            if len(found) == count:
                break
    return list(found.values())


def _comparator(evidence: Evidence, stack: contextlib.ExitStack) -> Comparator:
    """Both versions' pipelines, with the baseline's network."""
    ours, theirs = (
        stack.enter_context(_unpacked(evidence, version)) for version in (evidence.baseline, evidence.candidate)
    )
    service = ModelService.load(ours, torch.device("cpu"), replay=False)
    candidate = prepared_for(service.definition, Definition.read(theirs).pipeline)
    return Comparator(
        service.definition.prepared, candidate, service.runtime, service.postprocessor, **service.input_limits
    )


def prepared_for(baseline: Definition, candidate: Pipeline) -> Pipeline:
    """The candidate's pipeline as far as the baseline's network takes it, which may compute the last stages itself. Raises
    UsageError where the candidate has others there."""
    if not (absorbed := baseline.absorbed):
        return candidate
    last = list(candidate.stages)[-len(absorbed) :]
    if tuple(candidate.stages[name] for name in last) != absorbed:
        raise UsageError(
            f"the baseline's network computes the last stages of its pipeline itself ({', '.join(s.name for s in absorbed)}), and "
            f"the candidate ends with others ({', '.join(last)}); compare the two pipelines' definitions"
        )
    return candidate.split(last[0])[0]


@contextlib.contextmanager
def _unpacked(evidence: Evidence, version: str) -> Iterator[Path]:
    path = archive_of(evidence.state_dir, evidence.model, version)
    if path is None:
        raise UsageError(
            f"the archive of {evidence.model} {version} is not in the model store any more; put it back to see where the versions "
            "differ"
        )
    # Checks the names of its files.
    with Archive(path), zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
        archive.extractall(folder)
        yield Path(folder)
