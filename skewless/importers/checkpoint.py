"""The checkpoint that an import writes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from skewless.core.definition import Definition
from skewless.core.files import atomic
from skewless.importers.imported_file import ImportedFile
from skewless.training.checkpoint import load_checkpoint


def checkpoint_of(
    file: ImportedFile,
    network: nn.Module,
    definition: Definition,
    classes: Sequence[str],
    accepted: Collection[str] = (),
) -> dict[str, Any]:
    """A checkpoint with the keys that training writes. What the file does not say is None or empty, and epoch 0.

    network: with the file's weights. Of an exported network the checkpoint holds no weights: they are in the archive's
        folder, in the file whose digest `imported_from` keeps.
    classes: in the order of the file's outputs, as somebody said.
    accepted: layers that look untrained and are rightly so.
    validation_scores, stage_sources and stage_outputs are empty: the file does not hold what training itself computed, so
    evaluation has nothing to reproduce.
    """
    weights = {} if definition.network_files else network.state_dict()
    return {
        "config": dict(file.config),
        "training_code": {},
        "pipeline": definition.pipeline.to_dict(),
        "pipeline_fingerprint": definition.pipeline.fingerprint,
        "network": definition.network,
        "postprocess": definition.postprocess,
        "code": definition.code,
        "manifest_sha256": None,
        "epoch": file.epoch or 0,
        "val_auc": file.val_auc,
        "val_ap": None,
        # Cloned: a view would be saved with all that it is a view of.
        "model_state_dict": {name: value.clone() for name, value in weights.items()},
        "optimizer_state_dict": {},
        "library_versions": {},
        "history": [],
        "validation_scores": {},
        "stage_sources": {},
        "stage_outputs": {},
        "accepted_untrained": sorted(accepted),
        "imported_from": {
            "format": file.format,
            "sha256": file.sha256,
            "epoch": file.epoch,
            "val_auc": file.val_auc,
            "classes": list(classes),
        },
    }


def write(path: Path, checkpoint: dict[str, Any]) -> None:
    """Save the checkpoint; it appears under its name once it has been read back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as unfinished:
        torch.save(checkpoint, unfinished)
        load_checkpoint(unfinished)
