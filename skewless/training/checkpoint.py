"""The checkpoint: weights together with everything the number depends on. Loads without running code."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from skewless.core.definition import Definition
from skewless.core.files import atomic
from skewless.core.networks import Network
from skewless.core.pipeline import Pipeline, fingerprint_of
from skewless.training.checksums import ChecksumError, check_members
from skewless.training.foreign_files import describe

_KEYS = (
    *("epoch", "model_state_dict", "pipeline", "pipeline_fingerprint", "network", "postprocess", "code", "history"),
    # What evaluation has to reproduce; all three are empty in an imported checkpoint.
    *("validation_scores", "stage_sources", "stage_outputs"),
)


_KINDS: dict[str, type] = {"epoch": int, "pipeline_fingerprint": str, "history": list}


class CheckpointError(ValueError):
    """A file that is not a checkpoint of this project, or one whose parts do not fit together."""


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write tensors and plain Python values; an interrupted write leaves the previous file."""
    with atomic(path) as unfinished:
        torch.save(checkpoint, unfinished)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU without unpickling code; raises CheckpointError saying what is wrong with it."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}")
    if foreign := describe(path):
        raise CheckpointError(f"{path} {foreign}. Expected is what `skewless train` or `skewless import` wrote")
    try:
        check_members(path)
        # torch warns of pickles and tensors that are refused anyway.
        with warnings.catch_warnings(action="ignore"):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except ChecksumError as error:
        raise CheckpointError(str(error)) from error
    except Exception as error:  # torch.load raises whatever its unpickler or zip reader does
        raise CheckpointError(
            f"{path} is not a checkpoint that loads without running code: {reason_of(error)}"
        ) from error
    missing = [k for k in _KEYS if not isinstance(checkpoint, dict) or k not in checkpoint]
    wrong = [k for k in _KEYS if not missing and not isinstance(checkpoint[k], _KINDS.get(k, Mapping))]
    if missing:
        raise CheckpointError(
            f"{path} lacks {', '.join(missing)}: it was not written by `skewless train`; `skewless import` takes others"
        )
    if wrong:
        raise CheckpointError(f"{path}: its {wrong[0]} is {checkpoint[wrong[0]]!r:.60}; the file was edited")
    weights = checkpoint["model_state_dict"]
    if other := [k for k, v in weights.items() if not isinstance(k, str) or not isinstance(v, torch.Tensor)]:
        raise CheckpointError(
            f"{path}: its model_state_dict has {other[0]!r:.60}, which is no tensor; the file was edited"
        )
    try:
        fingerprint = fingerprint_of(checkpoint["pipeline"])
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its pipeline is no definition ({error!r}); the file was edited") from error
    if fingerprint != checkpoint["pipeline_fingerprint"]:
        raise CheckpointError(f"{path}: its pipeline does not have the fingerprint it records; the file was edited")
    return checkpoint


def reason_of(error: Exception) -> str:
    """Why torch.load refused a file, in one line: its own advice, before and after that, is to allow running code."""
    message = str(error) or type(error).__name__
    reason = message.partition("WeightsUnpickler error:")[2] or message.partition("In PyTorch 2.6")[0]
    return (reason.strip().splitlines() or [type(error).__name__])[0].strip()


def trained(definition: Definition, checkpoint: dict[str, Any]) -> Definition:
    """The definition with what training has fitted, such as a scaler's statistics.

    Raises CheckpointError, saying what differs, for a checkpoint that was trained with another pipeline, post-processing
    or own code: its numbers would not be those of this definition.
    """
    theirs = Pipeline.from_dict(checkpoint["pipeline"], definition.folder)
    pipeline = definition.pipeline.with_fitted_stages_of(theirs)
    if pipeline.unfitted:
        raise CheckpointError(
            f"stage '{pipeline.unfitted[0]}' has no statistics of a training set, neither in the archive's pipeline nor in the "
            "checkpoint's; train with `skewless train`, which writes them into the checkpoint"
        )
    if pipeline.fingerprint != theirs.fingerprint:
        differences = "\n".join(f"  {d}" for d in pipeline.diff(theirs))
        raise CheckpointError(
            "the checkpoint was trained with another pipeline than the archive defines ('here': the archive, 'there': "
            f"the checkpoint):\n{differences}"
        )
    if definition.postprocess != checkpoint["postprocess"]:
        raise CheckpointError(
            f"the checkpoint was trained with the post-processing {checkpoint['postprocess']}, model.yaml has "
            f"{definition.postprocess}; the names of the classes, their order and the threshold belong to the numbers: train "
            "again, or put the post-processing back"
        )
    fitted = replace(definition, pipeline=pipeline)
    if changed := [f for f in {**fitted.code, **checkpoint["code"]} if fitted.code.get(f) != checkpoint["code"].get(f)]:
        raise CheckpointError(
            f"{', '.join(sorted(changed))} is not the code that the checkpoint was trained with; put it back, or train again"
        )
    for file in fitted.network_files:
        if file_digest(fitted.folder / file) != checkpoint.get("imported_from", {}).get("sha256"):
            raise CheckpointError(
                f"{fitted.folder / file} is not the exported network that the checkpoint was imported from; put it back, or "
                "import this one with `skewless import`"
            )
    return fitted


class UnfitWeightsError(CheckpointError):
    """Weights of another network: keys are missing, unexpected or of another shape."""


def network_of(checkpoint: dict[str, Any], definition: Definition) -> Network:
    """The definition's network with the checkpoint's weights, in eval mode.

    Raises UnfitWeightsError listing missing, unexpected and misshapen keys; CheckpointError for values that no trained
    network has: NaN, infinity, a negative variance.
    """
    network = definition.build_network()
    # An exported network brings its weights.
    if not definition.network_files:
        weights = checkpoint["model_state_dict"]
        check_fit(weights, network)
        network.load_state_dict(weights)
    _check_values(network)
    return network.eval()


def check_fit(weights: Mapping[str, torch.Tensor], network: Network) -> None:
    """Raise UnfitWeightsError unless the weights have the network's names and shapes."""
    expected = network.state_dict()
    problems = {
        "missing": sorted(set(expected) - set(weights)),
        "unexpected": sorted(set(weights) - set(expected)),
        "of another shape": sorted(k for k in set(expected) & set(weights) if expected[k].shape != weights[k].shape),
    }
    if any(problems.values()):
        listed = "; ".join(f"{len(v)} {k} ({shortened(v)})" for k, v in problems.items() if v)
        raise UnfitWeightsError(f"the weights do not fit the network: {listed}")


def shortened(names: Sequence[str], shown: int = 5) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{', '.join(names[:shown])}{more}"


def _check_values(network: Network) -> None:
    for name, value in network.state_dict().items():
        if bad := int((~value.isfinite()).sum()):
            raise CheckpointError(
                f"{name} has {bad} of {value.numel()} values that are NaN or infinite: the training diverged, or the file is "
                "damaged; give weights from before"
            )
        if name.endswith("running_var") and (bad := int((value < 0).sum())):
            raise CheckpointError(
                f"{name} has {bad} of {value.numel()} values below 0, the lowest {value.min():g}, and no variance is: these "
                "are not a training's statistics; give the trained model's state_dict()"
            )


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
