"""Weights in the safetensors format, such as a `model.safetensors` from the Hugging Face Hub.

A file is the length of a JSON header, the header and raw tensors (https://github.com/huggingface/safetensors): there is
nothing in it that could run. The package checks that lengths, shapes, types and offsets agree with one another and with
the file's size.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from skewless.importers.errors import ImportFileError
from skewless.importers.imported_file import ImportedFile
from skewless.importers.pytorch import without_prefixes
from skewless.training.checkpoint import file_digest

# What a network's weights and counters are in; not 8-bit and 4-bit numbers, which mean nothing without their scales.
_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64)


def read_safetensors(path: str | Path) -> ImportedFile:
    """The weights of a safetensors file; it says nothing else about the training.

    Prefixes that `nn.DataParallel` and `torch.compile` put before every name are removed.
    Raises ImportFileError for a file that is damaged, has no weights, or has numbers of another type than weights have.
    """
    try:
        with safe_open(path, framework="pt") as file:
            weights: dict[str, torch.Tensor] = file.get_tensors()
    except Exception as error:  # the package raises its own kind for a header, and others for what a header asks for
        raise ImportFileError(f"{path} is damaged, or no safetensors file: {error}") from error
    if not weights:
        raise ImportFileError(f"{path} has no weights; save model.state_dict()")
    if other := {name: value.dtype for name, value in weights.items() if value.dtype not in _TYPES}:
        name, dtype = next(iter(other.items()))
        raise ImportFileError(
            f"{path}: {name} is {dtype}, expected one of {', '.join(map(str, _TYPES))}; save the model that was not quantized"
        )
    return ImportedFile("safetensors", sha256=file_digest(path), weights=without_prefixes(weights))
