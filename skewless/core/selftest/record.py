"""Writing down what each stage and the network give."""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors.torch import save_file

from skewless.core.definition import Definition
from skewless.core.numerics import all_finite
from skewless.core.runtimes import Runtime
from skewless.core.versions import library_versions

REFERENCES, ENTRIES = "references", "references.json"
KINDS, VALUES = "stages.json", "stages.safetensors"
_SAMPLES = 256


def record(definition: Definition, runtime: Runtime) -> None:
    """Write `stages.json` and `stages.safetensors` beside the recordings in the folder's `references/`.

    Raises ValueError, naming the stage and the recording, for values that are NaN or infinite: no replay could equal them.
    """
    folder = definition.folder / REFERENCES
    recordings = (p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".json", ".safetensors"))
    files = sorted(p.relative_to(folder).as_posix() for p in recordings)
    last = definition.prepared.last_stage
    kinds: dict[str, dict[str, Any]] = {}
    values: dict[str, torch.Tensor] = {}
    for file in files:
        kinds[file] = {}
        for stage, signal in definition.pipeline.steps((folder / file).read_bytes()):
            kinds[file][stage] = kind(signal.data)
            values[f"{file}/{stage}"] = _finite(summary(signal.data), f"stage '{stage}'", file)
            if stage == last:
                prepared = signal.data
        (outputs,) = runtime([prepared])
        for name, value in outputs.items():
            values[f"{file}/network/{name}"] = _finite(value.double(), f"the network's {name}", file)
    save_file(values, folder / VALUES)
    recorded = {"library_versions": library_versions(definition.packages), "recordings": kinds}
    (folder / KINDS).write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")


def _finite(values: torch.Tensor, what: str, file: str) -> torch.Tensor:
    if not all_finite(values):
        raise ValueError(
            f"{what} is NaN or infinite for reference {file}, and no worker could reproduce that; mend what computes it, or "
            "choose other references"
        )
    return values


def kind(data: torch.Tensor) -> str:
    """Shape and type in words, such as "(7, 160, 201) float32"."""
    return f"{tuple(data.shape)} {str(data.dtype).removeprefix('torch.')}"


def summary(data: torch.Tensor) -> torch.Tensor:
    """Mean, standard deviation, minimum, maximum and values at fixed places, in float64: `(4 + samples,)`; of no values, as a
    recording without windows has, `(0,)`."""
    flat = data.detach().flatten().double()
    if not len(flat):
        return flat
    # In integers: the float32 of a linspace rounds differently from one processor to the next.
    count = min(_SAMPLES, len(flat))
    places = torch.arange(count) * (len(flat) - 1) // max(count - 1, 1)
    statistics = torch.stack([flat.mean(), flat.std(correction=0), flat.min(), flat.max()])
    return torch.cat([statistics, flat[places]])
