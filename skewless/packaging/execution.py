"""What executes an archive's network: its entry in model.yaml, its weights file, and its proof beyond references."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score
from torch import nn

from skewless.core.numerics import TIERS, TOLERANCES
from skewless.core.pipeline import Pipeline
from skewless.core.runtimes import RUNTIMES
from skewless.core.service import ModelService
from skewless.core.stages import InputError
from skewless.errors import BuildError
from skewless.evaluation.scores import predict
from skewless.training.manifest import Recording, manifest_digest

# How far a reduced network's AUC may be from the evaluated one.
MAX_AUC_DIFFERENCE = 0.001

# Value ranges settle long before; more recordings can only widen them.
CALIBRATION_RECORDINGS = 32


@dataclass(frozen=True)
class Execution:
    """A runtime and its precision, with the recordings that a reduced precision is made and proved with.

    recordings: those that evaluation measured, for a reduced tier; others are ignored. split: the one to compare on.
    calibration: recordings, of which the training split's give int8 its value ranges.
    """

    runtime: str
    precision: str = "fp32"
    recordings: Sequence[Recording] = ()
    split: str = "test"
    calibration: Sequence[Recording] = ()

    def __post_init__(self):
        if self.runtime not in RUNTIMES:
            raise BuildError(f"runtime is {self.runtime!r}, expected one of {', '.join(RUNTIMES)}")
        if self.precision not in TIERS:
            raise BuildError(f"precision is {self.precision!r}, expected one of {', '.join(TIERS)}")
        if self.runtime == "eager" and self.precision != "fp32":
            raise BuildError(f"runtime 'eager' runs in fp32 only; for {self.precision} choose runtime 'onnxruntime'")
        if self.tier == "reduced" and not self.recordings:
            raise BuildError(
                f"{self.precision} is proved on the recordings that evaluation measured; give their --manifest"
            )
        if self.precision == "int8" and not self._calibrating:
            raise BuildError(
                "int8 takes its value ranges from training recordings; give a --calibration-manifest with a train split"
            )

    @classmethod
    def of(cls, runtime: Mapping[str, Any]) -> Execution:
        """What a model.yaml itself asks for."""
        ((name, params),) = runtime.items()
        return cls(name, params.get("precision", "fp32"))

    @property
    def tier(self) -> str:
        return TIERS[self.precision]

    def definition(self, runtime: Mapping[str, Any]) -> dict[str, Any]:
        """The `runtime` entry of a model.yaml, with the micro-batch that `runtime` has."""
        ((_, params),) = runtime.items()
        precision = {} if self.runtime == "eager" else {"precision": self.precision}
        return {self.runtime: precision | {k: v for k, v in params.items() if k != "precision"}}

    def metadata(self) -> dict[str, Any]:
        """What the archive's metrics record: what executes it, and how far from evaluation it may be."""
        found: dict[str, Any] = {
            "name": self.runtime,
            "precision": self.precision,
            "tier": self.tier,
            "tolerance": TOLERANCES[self.tier],
        }
        if self.runtime == "onnxruntime":
            found["library_versions"] = {name: version(name) for name in ("onnx", "onnxruntime")}
        if self.precision == "int8":
            chosen = self._calibrating
            found["calibration"] = {"recordings": len(chosen), "manifest_sha256": manifest_digest(chosen)}
        return found

    def write_weights(self, network: nn.Module, pipeline: Pipeline, folder: Path) -> Path:
        """Write the file that the runtime loads, weights.safetensors or model.onnx, and return its path."""
        if self.runtime == "eager":
            path = folder / "weights.safetensors"
            save_file({k: v.contiguous() for k, v in network.state_dict().items()}, path)
            return path
        # Here, so that building for another runtime does not need onnx.
        from skewless.packaging.export import export_onnx

        path = folder / "model.onnx"
        export_onnx(network, path, self.precision, self._images(pipeline))
        return path

    def measure(self, service: ModelService, evaluation: Path) -> dict[str, Any]:
        """Compare a reduced service with what evaluation recorded; returns the figures.

        Raises BuildError with them when a reference is off by more than the tier's tolerance, when a decision changes
        that was further than that from the threshold, or when the AUC on `split` by more than MAX_AUC_DIFFERENCE; also for
        recordings that are not those that evaluation measured.
        """
        rows, predictions = self._replay(service, evaluation)
        labels = [int(row["label"]) for row in rows]
        evaluated = np.array([float(row["probability"]) for row in rows])
        (now,) = np.array([prediction.scores for prediction in predictions]).T
        references = json.loads((evaluation / "references" / "references.json").read_text(encoding="utf-8"))
        payloads = [(evaluation / "references" / entry["file"]).read_bytes() for entry in references]
        differences = [
            float(np.abs(np.subtract(scored.scores, entry["scores"])).max())
            for entry, scored in zip(references, service.score(payloads), strict=True)
        ]
        figures = {
            "split": self.split,
            "recordings": len(rows),
            "auc": float(roc_auc_score(labels, now)),
            "auc_evaluated": float(roc_auc_score(labels, evaluated)),
            "max_dp": float(np.abs(now - evaluated).max()),
            "flips": int(((now > service.threshold) != (evaluated > service.threshold)).sum()),
            "max_dp_references": max(differences),
        }
        allowed = TOLERANCES[self.tier]
        problems = []
        far = sum(not difference <= allowed for difference in differences)
        if far:
            problems.append(
                f"{far} of {len(references)} references are off by more than {allowed} (largest {max(differences):.4f})"
            )
        flipped = (now > service.threshold) != (evaluated > service.threshold)
        far = int((flipped & (np.abs(evaluated - service.threshold) > allowed)).sum())
        if far:
            problems.append(f"{far} decisions change that were further than {allowed} from the threshold")
        apart = abs(figures["auc"] - figures["auc_evaluated"])
        if not apart <= MAX_AUC_DIFFERENCE:
            problems.append(
                f"AUC {figures['auc']:.4f} on the {len(rows)} recordings of split '{self.split}', {figures['auc_evaluated']:.4f} "
                f"evaluated ({apart:.4f} apart, allowed {MAX_AUC_DIFFERENCE})"
            )
        if problems:
            raise BuildError(
                f"{self.precision} is too far from the evaluated network: {'; '.join(problems)}. On that split, the largest "
                f"|dp| is {figures['max_dp']:.4f} and decisions change for {figures['flips']}. Choose another --precision"
            )
        return figures

    def _replay(self, service: ModelService, evaluation: Path) -> tuple[list[dict[str, str]], list[Any]]:
        """Evaluation's rows of `split`, and what the service predicts for the same recordings."""
        with open(evaluation / "predictions.csv", newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["split"] == self.split]
        if not rows:
            raise BuildError(f"{evaluation / 'predictions.csv'} has no recordings of split '{self.split}'")
        given = {recording.file_path: recording for recording in self.recordings}
        missing = [row["file_path"] for row in rows if row["file_path"] not in given]
        if missing:
            raise BuildError(
                f"the manifest lacks {len(missing)} of the {len(rows)} recordings that {evaluation} measured in split "
                f"'{self.split}', such as {missing[0]}; give the manifest it was measured with"
            )
        predictions = predict(service, [given[row["file_path"]] for row in rows], self.precision)
        for row, prediction in zip(rows, predictions, strict=True):
            if prediction.sha256 != row["sha256"]:
                raise BuildError(f"{prediction.recording.path} is not the recording that {evaluation} measured")
        return rows, predictions

    @property
    def _calibrating(self) -> list[Recording]:
        train = [recording for recording in self.calibration if recording.split == "train"]
        places = np.linspace(0, len(train) - 1, min(CALIBRATION_RECORDINGS, len(train))).round().astype(int)
        return [train[place] for place in places]

    def _images(self, pipeline: Pipeline) -> Iterator[torch.Tensor]:
        for recording in self._calibrating:
            try:
                yield pipeline(recording.path.read_bytes())
            except InputError as error:
                raise BuildError(f"calibration recording {recording.file_path} cannot be read: {error}") from error
