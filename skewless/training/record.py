"""What a checkpoint records so that evaluation can prove that it computes what training computed."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skewless.core.definition import Definition
from skewless.core.networks import NETWORKS
from skewless.core.own_code import OwnCode, reference
from skewless.core.pipeline import Pipeline
from skewless.core.selftest.record import kind, summary
from skewless.training.cache import Entry

# Recordings whose stages are recorded. Two: what goes wrong with one of them need not with the other.
_RECORDINGS = 2


def stage_sources(definition: Definition) -> dict[str, str]:
    """SHA-256 of the module file of every stage's class, by the stage's name, and of the network's and the
    post-processing's as "network" and "postprocess". Own code is left out: `Definition.code` has its digests."""
    name, _ = NETWORKS.split(definition.network)
    classes = {
        **{name: type(stage) for name, stage in definition.pipeline.stages.items()},
        "network": NETWORKS.find(name, OwnCode(definition.folder)),
        "postprocess": type(definition.postprocessor),
    }
    ours = {name: cls for name, cls in classes.items() if reference(cls) is None}
    return {name: hashlib.sha256(Path(inspect.getfile(cls)).read_bytes()).hexdigest() for name, cls in ours.items()}


def stage_outputs(pipeline: Pipeline, entries: Sequence[Entry]) -> dict[str, Any]:
    """What every stage gives for a few of the entries, by the SHA-256 of the recording's bytes: `kinds`, each stage's shape
    and type in words, and `values`, each stage's `summary` as a tensor."""
    recorded = {}
    for entry in dict.fromkeys([*entries[: _RECORDINGS - 1], entries[-1]]):
        steps = list(pipeline.steps(entry.recording.path.read_bytes()))
        recorded[entry.sha256] = {
            "kinds": {name: kind(signal.data) for name, signal in steps},
            "values": {name: summary(signal.data) for name, signal in steps},
        }
    return recorded
