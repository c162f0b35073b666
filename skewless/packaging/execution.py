"""What executes an archive's network: its entry in model.yaml, its files, and what a reduced precision
has to pass beyond the references."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from skewless.core.definition import Definition
from skewless.core.networks import Network
from skewless.core.numerics import TIERS, TOLERANCES
from skewless.core.pipeline import Pipeline
from skewless.core.runtimes import RUNTIMES, Runtime, RuntimeSettings, runtime_settings
from skewless.core.service import ModelService
from skewless.core.stages import InputError
from skewless.core.versions import library_versions
from skewless.errors import BuildError
from skewless.evaluation.metrics import auc
from skewless.evaluation.scores import PREDICTIONS, Prediction, predict, score_columns
from skewless.packaging.probes import network_inputs
from skewless.training.manifest import Recording, manifest_digest

# How far a reduced network's AUC may be from the evaluated one.
MAX_AUC_DIFFERENCE = 0.001

# Value ranges settle long before; more recordings can only widen them.
CALIBRATION_RECORDINGS = 32


@dataclass(frozen=True)
class Execution:
    """A runtime and its precision, with the recordings that a reduced precision is made and proved with.

    runtime: a name in RUNTIMES. precision: one of that runtime's.
    recordings: those that evaluation measured, for a reduced tier; others are ignored. split: the one to compare on.
    calibration: recordings, of which the training split's give the value ranges that a precision such as int8 needs.
    Raises BuildError for a runtime or precision that there is not, and for recordings that are missing.
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
        if self.precision not in self._class.precisions:
            others = [name for name in RUNTIMES if self.precision in RUNTIMES[name].precisions]
            raise BuildError(
                f"runtime '{self.runtime}' runs in {' and '.join(self._class.precisions)} only; for {self.precision} choose "
                f"runtime {' or '.join(map(repr, others))}"
            )
        if self.tier == "reduced" and not self.recordings:
            raise BuildError(
                f"{self.precision} is proved on the recordings that evaluation measured; give their --manifest"
            )
        if self._calibrated and not self._calibrating:
            raise BuildError(
                f"{self.precision} takes its value ranges from training recordings; give a --calibration-manifest with a "
                "train split"
            )

    @classmethod
    def of(cls, runtime: Mapping[str, Any]) -> Execution:
        """What a model.yaml itself asks for."""
        found, settings = runtime_settings(runtime)
        return cls(found.name, settings.precision)

    @property
    def tier(self) -> str:
        return TIERS[self.precision]

    def definition(self, runtime: Mapping[str, Any]) -> dict[str, Any]:
        """The `runtime` entry of an archive's model.yaml: `runtime` where it asks for just this, else one that does and
        absorbs the same stages, and of the same runtime with the same micro-batch."""
        found, settings = runtime_settings(runtime)
        if (found.name, settings.precision) == (self.runtime, self.precision):
            return dict(runtime)
        if found.name != self.runtime:
            settings = RuntimeSettings(absorb=settings.absorb)
        chosen = asdict(replace(settings, precision=self.precision))
        absorb = list(chosen.pop("absorb"))
        return {self.runtime: chosen | ({"absorb": absorb} if absorb else {})}

    def metadata(self) -> dict[str, Any]:
        """What the archive's metrics record: what executes it, and how far from evaluation it may be."""
        metadata: dict[str, Any] = {
            "name": self.runtime,
            "precision": self.precision,
            "tier": self.tier,
            "tolerance": TOLERANCES[self.tier],
            "library_versions": library_versions((*self._class.packages, *self._class.build_packages)),
        }
        if self._calibrated:
            chosen = self._calibrating
            metadata["calibration"] = {"recordings": len(chosen), "manifest_sha256": manifest_digest(chosen)}
        return metadata

    def write(self, network: Network, definition: Definition, folder: Path) -> list[Path]:
        """Write the files that the runtime loads into the archive's folder; returns their paths, none for a network that is
        in a file of its own. Raises BuildError for a network that the runtime cannot execute."""
        pipeline, absorbed = definition.prepared, definition.absorbed
        examples = self._calibration_inputs(pipeline) if self._calibrated else network_inputs(pipeline)
        try:
            return self._class.write(network, folder, RuntimeSettings(self.precision), examples, absorbed)
        except BuildError:
            raise
        except ValueError as error:
            raise BuildError(f"runtime '{self.runtime}' in {self.precision}: {error}") from error

    def measure(self, service: ModelService, evaluation: Path) -> dict[str, Any]:
        """Compare a reduced service with what evaluation recorded; returns the figures.

        Raises BuildError with them when a reference is off by more than the tier's tolerance, when a decision changes
        that was further than that from the threshold, or when the AUC on `split` differs by more than MAX_AUC_DIFFERENCE;
        also for recordings that are not those that evaluation measured.
        """
        rows, predictions = self._replay(service, evaluation)
        columns = score_columns(service.postprocessor.classes)
        labels = np.array([int(row["label"]) for row in rows])
        evaluated = np.array([[float(row[column]) for column in columns] for row in rows])
        now = np.array([prediction.scores for prediction in predictions])
        references = json.loads((evaluation / "references" / "references.json").read_text(encoding="utf-8"))
        payloads = [(evaluation / "references" / entry["file"]).read_bytes() for entry in references]
        differences = [
            float(np.abs(np.subtract(scored.scores, entry["scores"])).max())
            for entry, scored in zip(references, service.score(payloads), strict=True)
        ]
        flipped = _chosen(now, service) != _chosen(evaluated, service)
        figures: dict[str, Any] = {
            "split": self.split,
            "recordings": len(rows),
            "auc": auc(labels, now),
            "auc_evaluated": auc(labels, evaluated),
            "max_dp": float(np.abs(now - evaluated).max()),
            "flips": int(flipped.sum()),
            "max_dp_references": max(differences),
        }
        allowed = TOLERANCES[self.tier]
        problems = []
        far = sum(not difference <= allowed for difference in differences)
        if far:
            problems.append(
                f"{far} of {len(references)} references are off by more than {allowed} (largest {max(differences):.4f})"
            )
        far = int((flipped & (_margins(evaluated, service) > allowed)).sum())
        if far:
            problems.append(f"{far} decisions change that were further than {allowed} from changing")
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

    def _replay(self, service: ModelService, evaluation: Path) -> tuple[list[dict[str, str]], list[Prediction]]:
        """Evaluation's rows of `split`, and what the service predicts for the same recordings."""
        measured = self.measured(evaluation, self.split)
        predictions = predict(service, [recording for _, recording in measured], self.precision)
        for (row, _), prediction in zip(measured, predictions, strict=True):
            _check_same(prediction.sha256, row, prediction.recording, evaluation)
        return [row for row, _ in measured], predictions

    def measured(self, evaluation: Path, split: str) -> list[tuple[dict[str, str], Recording]]:
        """Evaluation's rows of a split, each with its recording; raises BuildError where the recordings lack one."""
        with open(evaluation / PREDICTIONS, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["split"] == split]
        if not rows:
            raise BuildError(f"{evaluation / 'predictions.csv'} has no recordings of split '{split}'")
        given = {recording.file_path: recording for recording in self.recordings}
        missing = [row["file_path"] for row in rows if row["file_path"] not in given]
        if missing:
            raise BuildError(
                f"the manifest lacks {len(missing)} of the {len(rows)} recordings that {evaluation} measured in split "
                f"'{split}', such as {missing[0]}; give the manifest it was measured with"
            )
        return [(row, given[row["file_path"]]) for row in rows]

    @staticmethod
    def read(row: Mapping[str, str], recording: Recording, evaluation: Path) -> bytes:
        """A recording's bytes; raises BuildError unless they are those that evaluation measured for its row."""
        payload = recording.path.read_bytes()
        _check_same(hashlib.sha256(payload).hexdigest(), row, recording, evaluation)
        return payload

    @property
    def _class(self) -> type[Runtime]:
        return RUNTIMES[self.runtime]

    @property
    def _calibrated(self) -> bool:
        return self.precision in self._class.calibrated

    @property
    def _calibrating(self) -> list[Recording]:
        train = [recording for recording in self.calibration if recording.split == "train"]
        places = np.linspace(0, len(train) - 1, min(CALIBRATION_RECORDINGS, len(train))).round().astype(int)
        return [train[place] for place in places]

    def _calibration_inputs(self, pipeline: Pipeline) -> Iterator[torch.Tensor]:
        for recording in self._calibrating:
            try:
                rows = pipeline(recording.path.read_bytes())
            except InputError as error:
                raise BuildError(f"calibration recording {recording.file_path} cannot be read: {error}") from error
            # A recording shorter than one window has no values to take ranges from.
            if len(rows):
                yield rows


def _check_same(sha256: str, row: Mapping[str, str], recording: Recording, evaluation: Path) -> None:
    if sha256 != row["sha256"]:
        raise BuildError(f"{recording.path} is not the recording that {evaluation} measured")


def _chosen(scores: np.ndarray, service: ModelService) -> np.ndarray:
    """The number of the chosen class `(N,)`."""
    return np.array([service.postprocessor.choose(tuple(each), service.threshold) for each in scores])


def _margins(scores: np.ndarray, service: ModelService) -> np.ndarray:
    """How far each score has to move for another class to be chosen `(N,)`: to the threshold, or with several classes, where
    the highest and the second move towards one another, half of what is between them."""
    if scores.shape[1] == 1:
        return np.abs(scores[:, 0] - service.threshold)
    second, highest = np.sort(scores, axis=1)[:, -2:].T
    return (highest - second) / 2
