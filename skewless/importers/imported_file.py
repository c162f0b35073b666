"""What every importer hands on, whichever program wrote the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class ImportedFile:
    """What a file of another framework says.

    format: one of `skewless.importers.formats.FORMATS`. sha256: of the file.
    weights: by the network's own names; empty where the archive's folder holds the network itself, as an exported one.
    epoch, val_auc: of the training, None where the file has none. config: the training script's settings.
    stages: what the model itself does to its input, as stages of a pipeline.
    notes: what was left out, and what the file does not say.
    checksums: whether every weight was read against a checksum in the file, beside that of a zip's members.
    """

    format: str
    sha256: str
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    epoch: int | None = None
    val_auc: float | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[dict[str, dict[str, Any]], ...] = ()
    notes: tuple[str, ...] = ()
    checksums: bool = False
