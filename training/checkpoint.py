"""The checkpoint: weights together with everything the number depends on. Loads without running code."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch

from handler.networks import build_network
from handler.pipeline import Pipeline

_KEYS = ("epoch", "model_state_dict", "pipeline", "pipeline_fingerprint", "network", "decision", "history")


class CheckpointError(ValueError):
    """A file that is not a checkpoint of this project, or one whose parts do not fit together."""


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write tensors and plain Python values; an interrupted write leaves the previous file."""
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    torch.save(checkpoint, unfinished)
    unfinished.replace(path)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU without unpickling code; raises CheckpointError saying what is wrong with it."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {path}") from error
    except Exception as error:  # torch.load raises whatever its unpickler or zip reader does
        raise CheckpointError(f"{path} is not a checkpoint that loads without running code: {error}") from error
    missing = [k for k in _KEYS if not isinstance(checkpoint, dict) or k not in checkpoint]
    if missing:
        raise CheckpointError(
            f"{path} lacks {', '.join(missing)}: it was not written by scripts/train.py; scripts/import_checkpoint.py imports others"
        )
    pipeline = Pipeline.from_dict(checkpoint["pipeline"])
    if pipeline.fingerprint != checkpoint["pipeline_fingerprint"]:
        raise CheckpointError(f"{path}: its pipeline does not have the fingerprint it records; the file was edited")
    return checkpoint


def network_of(checkpoint: dict[str, Any], definition: dict[str, Any] | None = None) -> torch.nn.Module:
    """The network with the checkpoint's weights, in eval mode; `definition` overrides the checkpoint's own.

    Raises CheckpointError listing missing, unexpected and misshapen keys.
    """
    network = build_network(definition or checkpoint["network"])
    weights, expected = checkpoint["model_state_dict"], network.state_dict()
    problems = {
        "missing": sorted(set(expected) - set(weights)),
        "unexpected": sorted(set(weights) - set(expected)),
        "of another shape": sorted(k for k in set(expected) & set(weights) if expected[k].shape != weights[k].shape),
    }
    if any(problems.values()):
        listed = "; ".join(
            f"{len(v)} {k} ({', '.join(v[:5])}{', ...' if len(v) > 5 else ''})" for k, v in problems.items() if v
        )
        raise CheckpointError(f"the weights do not fit the network: {listed}")
    network.load_state_dict(weights)
    return network.eval()


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
