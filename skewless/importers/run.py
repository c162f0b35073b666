"""From a file of another framework to a checkpoint that `skewless evaluate` and `skewless build` take.

Nothing is printed here: `ImportResult` holds what there is to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from skewless.core.definition import PIPELINE, Definition
from skewless.core.pipeline import Pipeline
from skewless.importers.agreement import check_config, check_servable, check_stages, loader_notes
from skewless.importers.checkpoint import checkpoint_of, write
from skewless.importers.class_order import Orders, said_classes
from skewless.importers.errors import ImportFileError
from skewless.importers.evidence import Comparison, compare, judge, read_predictions
from skewless.importers.formats import WEIGHTS_ALONE, format_of, read
from skewless.importers.scaler import read_scaler, with_scaler
from skewless.importers.weights import network_from
from skewless.packaging.probes import network_inputs
from skewless.training.manifest import read_manifest, select
from skewless.training.untrained import require_trained

_NO_PROOF = "what training computed is not in the file: evaluation cannot check itself against it"


@dataclass(frozen=True)
class ImportRequest:
    """What to import, for which definition, and where to.

    archive: the definition's folder. file: what another framework saved. out: the checkpoint to write.
    pipeline: the file that says what the weights were trained behind; None is the archive's own. PyTorch's weights say
        nothing about it, so that it has to be given.
    classes: the archive's classes, in the order of the file's outputs; to be given where the file does not say it.
    replaced: of a Keras model, the layers before the network that the pipeline does the work of.
    scaler: scikit-learn's StandardScaler in a file, for a pipeline whose standard_scaler has no statistics yet.
    accept_untrained: layers, or "outputs", that look untrained and are rightly so.
    manifest, root, split, predictions, variants: recordings to compare pipelines on; the folder their paths are relative
        to (None: the manifest's), the part of the manifest, a CSV with probabilities as recorded after training, and a
        folder of pipelines (None: the archive's variants/). device: where the network runs for that.
    """

    archive: Path
    file: Path
    out: Path
    pipeline: Path | None = None
    classes: Sequence[str] = ()
    replaced: Sequence[str] = ()
    scaler: Path | None = None
    accept_untrained: Sequence[str] = ()
    manifest: Path | None = None
    root: Path | None = None
    split: str = "val"
    predictions: Path | None = None
    variants: Path | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class ImportResult:
    """What was imported.

    format: as in `skewless.importers.formats`. pipeline: its file; pipeline_name: its name. agreed: settings in the file
    that the definition agrees with. stages: what the model did to its input itself, as the pipeline does. epoch and
    val_auc: as recorded in the file, or None. comparison: None without a manifest.
    """

    checkpoint: Path
    format: str
    sha256: str
    pipeline: Path
    pipeline_name: str
    pipeline_fingerprint: str
    classes: tuple[str, ...]
    epoch: int | None
    val_auc: float | None
    agreed: tuple[str, ...]
    stages: tuple[str, ...]
    accepted_untrained: tuple[str, ...]
    notes: tuple[str, ...]
    comparison: Comparison | None

    def text(self) -> str:
        """What to print on standard output, with line breaks inside and none at the end."""
        lines = []
        if self.agreed:
            lines.append(f"its configuration agrees with {self.pipeline} on {', '.join(self.agreed)}")
        elif self.format in WEIGHTS_ALONE:
            lines.append(f"it records no configuration that could be compared with {self.pipeline}")
        lines += [f"note: {note}" for note in self.notes]
        if self.comparison is not None:
            lines += ["", self.comparison.text()]
            lines += ["", self.comparison.verdict.text, ""] if not self.comparison.verdict.doubtful else [""]
            lines += [] if self.orders is None else [self.orders.text(), ""]
        recorded = [] if self.epoch is None else [f"epoch {self.epoch}"]
        recorded += [] if self.val_auc is None else [f"validation AUC {self.val_auc:.4f}"]
        recorded = recorded or ["no epoch and no validation AUC"]
        lines.append(f"{self.checkpoint}: {', '.join(recorded)} recorded; pipeline '{self.pipeline_name}'")
        if self.format == "keras":
            lines.append(f"the pipeline does what the model did itself: {', '.join(self.stages) or 'nothing'}")
        if self.classes:
            lines.append(f"its outputs are {', '.join(self.classes)}, in this order")
        return "\n".join(lines)

    @property
    def orders(self) -> Orders | None:
        """How well each order of the classes fits the labelled files behind the chosen pipeline; None without a manifest."""
        return None if self.comparison is None else self.comparison.trials[0].orders

    def warning(self) -> str:
        """What to print on standard error; empty unless another pipeline fits what the file records better, or another order of
        the classes the labelled files."""
        texts = []
        if self.comparison is not None and self.comparison.verdict.doubtful:
            texts.append(self.comparison.verdict.text)
        if self.orders is not None and self.orders.doubtful:
            texts.append(self.orders.verdict)
        return "\n".join(f"{'!' * 80}\nWARNING: {text}\n{'!' * 80}" for text in texts)

    def to_dict(self) -> dict[str, Any]:
        """In plain JSON types."""
        return asdict(self) | {"checkpoint": str(self.checkpoint), "pipeline": self.pipeline.as_posix()}


def import_file(request: ImportRequest) -> ImportResult:
    """Check everything, compare pipelines where a manifest is given, then write the checkpoint.

    Raises ValueError (ImportFileError, UntrainedError, CheckpointError, DefinitionError, ManifestError, ...) or OSError,
    and then writes nothing.
    """
    if request.out.exists():
        raise ImportFileError(f"{request.out} exists; choose another --out, or delete it")
    if request.manifest is None and (request.root or request.predictions):
        raise ImportFileError("--root and --predictions belong to --manifest, which is not given")
    definition = Definition.read(request.archive)
    format = format_of(request.file)
    if request.replaced and format != "keras":
        raise ImportFileError("--replaced is for layers of a Keras model, which this file is not")
    path = _pipeline_of(request, format)
    definition = replace(definition, pipeline=Pipeline.from_yaml(path, definition.folder))
    scaler = None if request.scaler is None else read_scaler(request.scaler)
    said: list[str] = []
    if scaler is not None:
        definition, said = with_scaler(definition, scaler)
    check_servable(definition.pipeline)
    file = read(request.file, format, definition, request.replaced)
    agreed = check_config(file.config, definition)
    check_stages(definition.pipeline, file.stages)
    network = network_from(file.weights, definition)
    inputs = list(network_inputs(definition.pipeline))
    notes = [*file.notes, *said, *require_trained(network, request.accept_untrained, inputs=inputs), _NO_PROOF]
    if format == "keras" and "decode_image" in definition.pipeline.stages:
        notes += loader_notes(definition.pipeline, _candidates(request, path, definition))
    classes = said_classes(request.classes, file.config, definition)
    checkpoint = checkpoint_of(file, network, definition, classes, request.accept_untrained)
    if scaler is not None:
        checkpoint["imported_from"]["scaler_sha256"] = scaler.sha256
    comparison = None
    if request.manifest is not None:
        comparison = _compare(request, request.manifest, path, definition, checkpoint, file.val_auc)
    write(request.out, checkpoint)
    packaged = Pipeline.from_yaml(request.archive / PIPELINE, definition.folder)
    if packaged.with_fitted_stages_of(definition.pipeline).fingerprint != definition.pipeline.fingerprint:
        notes.append(
            f"{request.archive / PIPELINE} is another pipeline; package this with an archive folder that has {path}"
        )
    return ImportResult(
        checkpoint=request.out,
        format=format,
        sha256=file.sha256,
        pipeline=path,
        pipeline_name=definition.pipeline.name,
        pipeline_fingerprint=definition.pipeline.fingerprint,
        classes=classes,
        epoch=file.epoch,
        val_auc=file.val_auc,
        agreed=tuple(agreed),
        stages=tuple(name for stage in file.stages for name in stage),
        accepted_untrained=tuple(request.accept_untrained),
        notes=tuple(notes),
        comparison=comparison,
    )


def _pipelines(request: ImportRequest) -> list[Path]:
    """The archive's own pipeline and the variants; raises ImportFileError for a --variants without any."""
    folder = request.variants or request.archive / "variants"
    variants = sorted(folder.glob("*.yaml"))
    if request.variants and not variants:
        raise ImportFileError(f"--variants is {folder}, expected a folder of pipeline files (*.yaml)")
    return [request.archive / PIPELINE, *variants]


def _pipeline_of(request: ImportRequest, format: str) -> Path:
    """The chosen pipeline's file; raises ImportFileError, listing those there are, where it has to be given and is not."""
    if request.pipeline is not None:
        return request.pipeline
    if format not in WEIGHTS_ALONE:
        return request.archive / PIPELINE
    raise ImportFileError(
        "--pipeline is required: the checkpoint does not say which preprocessing its weights were trained behind, "
        "and behind any other its probabilities are wrong without an error. There are:\n"
        + "\n".join(f"  {path}" for path in _pipelines(request))
        + "\nNot sure? Give the likeliest and --manifest: each is held against what the checkpoint records."
    )


def _candidates(request: ImportRequest, path: Path, definition: Definition) -> dict[str, Pipeline]:
    """The chosen pipeline, then every other one there is, each definition once."""
    candidates = {path.as_posix(): definition.pipeline}
    for other in _pipelines(request):
        pipeline = Pipeline.from_yaml(other, definition.folder).with_fitted_stages_of(definition.pipeline)
        if pipeline.fingerprint not in {p.fingerprint for p in candidates.values()}:
            candidates[other.as_posix()] = pipeline
    return candidates


def _compare(
    request: ImportRequest,
    manifest: Path,
    path: Path,
    definition: Definition,
    checkpoint: dict[str, Any],
    val_auc: float | None,
) -> Comparison:
    """Every pipeline there is, held against the record. Raises ImportFileError, ManifestError, UnreadableRecordings."""
    classes, split = definition.classes, request.split
    rows = select(read_manifest(manifest, request.root or manifest.parent, classes), split, classes)
    recorded = read_predictions(request.predictions, classes) if request.predictions else {}
    known = sum(row.file_path in recorded for row in rows)
    if request.predictions and not known:
        raise ImportFileError(
            f"{request.predictions} has no file_path of split '{split}'; it has {next(iter(recorded), 'no rows')!r}, the "
            f"manifest {rows[0].file_path!r}"
        )
    recorded_auc = val_auc if split == "val" else None
    trials = compare(
        definition,
        checkpoint,
        _candidates(request, path, definition),
        rows,
        torch.device(request.device),
        recorded_auc=recorded_auc,
        recorded=recorded,
    )
    return Comparison(split, len(rows), known, recorded_auc, tuple(trials), judge(trials, rows))
