"""Which program wrote a file, by its content, and the importer that reads it. One more format is one more entry here."""

from __future__ import annotations

import zipfile
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from skewless.core.definition import Definition
from skewless.core.networks import NETWORKS
from skewless.importers.errors import ImportFileError
from skewless.importers.imported_file import ImportedFile
from skewless.importers.safetensors_file import read_safetensors
from skewless.importers.torchvision_names import rename as rename_torchvision
from skewless.training.checksums import ChecksumError, check_members
from skewless.training.foreign_files import describe, is_safetensors

FORMATS = {
    "pytorch": "what torch.save wrote: a checkpoint or a state dict",
    "safetensors": "weights as safetensors: .safetensors",
    "keras": "what Keras saved: .keras, .h5 or .weights.h5",
    "exported": "what torch.export.save wrote: .pt2",
}
# Formats of PyTorch's weights, which say nothing about what comes before the network.
WEIGHTS_ALONE = ("pytorch", "safetensors")
_HALVES = (torch.float16, torch.bfloat16)


def format_of(path: Path) -> str:
    """One of FORMATS; the file's name plays no part.

    What is neither HDF5, safetensors nor a zip is taken for PyTorch's, whose old files have no mark of their own.
    Raises ImportFileError for a file that is not there, for one of another kind, saying of which, and for a zip that none of
    these programs wrote.
    """
    if not path.exists():
        raise ImportFileError(f"there is no file {path}")
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(9)
        if is_safetensors(start):
            return "safetensors"
    if foreign := describe(path):
        raise ImportFileError(f"{path} {foreign}. Expected is {', or '.join(FORMATS.values())}")
    if start.startswith(b"\x89HDF\r\n\x1a\n"):
        return "keras"
    if not start.startswith(b"PK\x03\x04"):
        return "pytorch"
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise ImportFileError(f"{path} starts as a zip does, and is damaged: {error}") from error
    # torch puts everything below one folder of any name, Keras puts it at the top.
    inside = {name.partition("/")[2] for name in members}
    if "data.pkl" in inside:
        return "pytorch"
    if "models/model.json" in inside or "archive_format" in inside or "serialized_exported_program.json" in members:
        return "exported"
    if {"config.json", "model.weights.h5"} & set(members):
        return "keras"
    raise ImportFileError(
        f"{path} is a zip with {', '.join(members[:5]) or 'nothing in it'}; expected " + ", or ".join(FORMATS.values())
    )


def read(path: Path, format: str, definition: Definition, replaced: Collection[str] = ()) -> ImportedFile:
    """The file as data, its weights by the names of the definition's network. Raises ImportFileError.

    replaced: for Keras, names of layers before the network of which the caller knows that the pipeline does their work.
    """
    try:
        unchecked = check_members(path)
    except ChecksumError as error:
        raise ImportFileError(str(error)) from error
    file = _read(path, format, definition, replaced)
    return replace(file, notes=(*file.notes, unchecked)) if unchecked and not file.checksums else file


def _read(path: Path, format: str, definition: Definition, replaced: Collection[str]) -> ImportedFile:
    if format == "exported":
        from skewless.importers.exported import read_exported

        return read_exported(path, definition)
    if definition.network_files:
        raise ImportFileError(
            f"{definition.folder} has an exported network, {definition.network_files[0]}; import that file, not {path}"
        )
    network, _ = NETWORKS.split(definition.network)
    if format == "keras":
        from skewless.core.networks.keras_resnet50 import KerasResNet50
        from skewless.importers.keras_file import read_keras

        if network == "mlp":
            from skewless.core.networks.mlp import MLP
            from skewless.importers.keras_mlp import read_keras_mlp

            if replaced:
                raise ImportFileError("--replaced is for layers before keras_resnet50, and the network is mlp")
            return read_keras_mlp(path, cast(MLP, definition.build_network()))
        if network != "keras_resnet50":
            raise ImportFileError(
                f"{definition.folder} has the network {definition.network}, expected keras_resnet50 or mlp"
            )
        built, classes = cast(KerasResNet50, definition.build_network()), definition.classes
        if len(classes) != built.predictions.out_features:
            raise ImportFileError(
                f"{definition.folder}: {len(classes)} classes for {built.predictions.out_features} outputs"
            )
        return read_keras(path, built, replaced)
    from skewless.importers.pytorch import read_pytorch

    file = read_safetensors(path) if format == "safetensors" else read_pytorch(path)
    if network == "resnet_fastai":
        from skewless.importers.fastai import weights_for

        file = replace(file, weights=weights_for(definition, file.weights))
    if network == "torchvision":
        file = replace(file, weights=rename_torchvision(file.weights, definition.build_network().state_dict()))
    return replace(file, notes=(*file.notes, *_halved(file)))


def shape_of(path: Path, definition: Definition) -> dict[str, Any]:
    """The parameters of the definition's network that the file's weights have settled, such as `depth`; empty where the network
    has none that they tell. Raises ImportFileError for a file that cannot be read."""
    format = format_of(path)
    network, _ = NETWORKS.split(definition.network)
    if network == "resnet_fastai" and format in WEIGHTS_ALONE:
        from skewless.importers.fastai import shape_of as shape_of_fastai
        from skewless.importers.pytorch import read_pytorch

        file = read_safetensors(path) if format == "safetensors" else read_pytorch(path)
        return dict(shape_of_fastai(file.weights) or {})
    if network == "mlp" and format == "keras":
        from skewless.importers.keras_mlp import shape_of as shape_of_mlp

        return shape_of_mlp(path)
    return {}


def _halved(file: ImportedFile) -> list[str]:
    """A note where the weights are in a half-precision type."""
    halves = {str(v.dtype).removeprefix("torch.") for v in file.weights.values() if v.dtype in _HALVES}
    return [
        f"its weights are {half}: each is the same number in float32, which the network computes in; a service that computed "
        f"in {half} itself gave slightly other probabilities"
        for half in sorted(halves)
    ]
