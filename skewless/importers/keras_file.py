"""Weights out of the files that Keras writes, read as data.

No layer is built or run and Keras is not imported, so neither a layer that fails to load nor code inside the file matters.
Three kinds of file, told apart by their content:

- `model.save("x.keras")`: a zip with config.json and model.weights.h5;
- `model.save_weights("x.weights.h5")` of Keras 3: the latter alone, without the configuration;
- `model.save("x.h5")`, and Keras 2's `save_weights`: HDF5 with `layer_names` and `weight_names`.
"""

from __future__ import annotations

import io
import itertools
import json
import mmap
import re
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import torch
from torch import nn

from skewless.importers.errors import ImportFileError
from skewless.importers.imported_file import ImportedFile
from skewless.importers.inflated import read_member
from skewless.importers.keras_graph import check_resnet50, groups, read_graph
from skewless.training.checkpoint import file_digest

_MAX_WEIGHTS = 2**31  # bytes; ResNet-50 with an optimizer's two copies in float64 is a third of that
_MAX_CONFIG = 2**26
_MAX_GROUPS = 2_000
_DAMAGE = (
    OSError,
    EOFError,
    LookupError,
    AttributeError,
    ValueError,
    TypeError,
    RuntimeError,
)  # of json, zipfile, HDF5
_OLD_WORD = "_layer_checkpoint_dependencies"

# The variables of a layer, in the order in which Keras 3 numbers them.
_WEIGHTED = {"kernel": "weight", "bias": "bias"}
_NORMALISING = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
_VARIABLES: dict[type[nn.Module], dict[str, str]] = {
    nn.Conv2d: _WEIGHTED,
    nn.Linear: _WEIGHTED,
    nn.BatchNorm1d: _NORMALISING,
    nn.BatchNorm2d: _NORMALISING,
}


@dataclass
class Stored:
    """A layer's variables, by their names or, in Keras 3's own files, by their numbers.

    nested: whether it is known from its place in the file that the layer is in a model within the model, as it is in Keras
    3's own files. Their order says nothing of how such layers and others follow one another.
    """

    name: str
    variables: dict[str, h5py.Dataset]
    nested: bool = False

    @property
    def kernel(self) -> h5py.Dataset:
        """The first variable: of a dense layer its kernel (in, out)."""
        return next(iter(self.variables.values()))


@dataclass
class SavedModel:
    """A file that Keras wrote, while it is open.

    config: the model's, None in a file of weights alone. layers: those with variables, in the model's order where the file
    lists it, else those of one class in the model's order; without random generators. notes: what was left out. version: of Keras, empty where it
    is not said. checksums: whether every variable is read against one in the file.
    """

    config: Mapping[str, Any] | None
    layers: list[Stored]
    notes: list[str]
    version: str
    checksums: bool


def read_keras(path: str | Path, network: nn.Module, replaced: Collection[str] = ()) -> ImportedFile:
    """The weights of a model that was built on `keras.applications.ResNet50`: its layers by name, wherever they are nested,
    and the two dense layers of its head, whatever their names, in order.

    network: a KerasResNet50 of the expected size.
    replaced: names of layers in the model, before ResNet50, of which you know that the pipeline does their work.
    Raises ImportFileError for a file that is damaged, is of another kind, holds another network, or computes something that
    the network or a pipeline's stages do not.
    """
    with opened(path) as saved:
        graph = None if saved.config is None else read_graph(saved.config, network, replaced)
        check_resnet50([layer.name for layer in saved.layers])
        heads = list(graph.dense if graph else [layer.name for layer in saved.layers if layer.kernel.ndim == 2])
        if len(heads) != 2:
            raise ImportFileError(
                f"it has {len(heads)} dense layers ({', '.join(heads) or 'none'}), expected 2 behind ResNet50"
            )
        modules = {name: module for name, module in network.named_children() if type(module) in _VARIABLES}
        weights = state_dict(saved.layers, modules, {heads[0]: "dense", heads[1]: "predictions"})
        notes: list[str] = []
        if graph is None:
            notes.append("it holds weights alone: what its layers compute, and what comes before them, is not known")
        else:
            notes += graph.notes
            if not graph.stages:
                notes.append("the model does nothing to its input: what it was trained behind is not said")
        notes += saved.notes
    if saved.version:
        notes.append(f"written by Keras {saved.version}")
    stages = graph.stages if graph else ()
    return ImportedFile(
        "keras", file_digest(path), weights, stages=stages, notes=tuple(notes), checksums=saved.checksums
    )


@contextmanager
def opened(path: str | Path) -> Iterator[SavedModel]:
    """The file, open as long as the `with` statement runs.

    Raises ImportFileError, naming the file, for one that is damaged or of another kind, and for what the statement's body
    raises on account of the file.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(8)
            if start == b"\x89HDF\r\n\x1a\n":
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    _check_heaps(data)
                with h5py.File(file, "r") as root:
                    yield _saved_model(root, None, "")
            elif start[:4] == b"PK\x03\x04":
                with zipfile.ZipFile(file) as archive:
                    config, version = json.loads(_member(archive, "config.json", _MAX_CONFIG)), _version(archive)
                    weights = io.BytesIO(_member(archive, "model.weights.h5", _MAX_WEIGHTS))
                _check_heaps(weights.getbuffer())
                with h5py.File(weights, "r") as root:
                    yield _saved_model(root, config, version)
            else:
                shown = start.hex(" ") or "nothing"
                raise ImportFileError(
                    f"it starts with {shown}: neither a .keras file (a zip) nor HDF5; give what Keras saved"
                )
    except ImportFileError as error:
        raise ImportFileError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise ImportFileError(f"there is no file {path}") from error
    except (*_DAMAGE, zipfile.BadZipFile, zlib.error) as error:
        raise ImportFileError(f"{path} is damaged, or not as Keras writes it: {error!r}") from error


def _check_heaps(data: mmap.mmap | memoryview) -> None:
    """Raise ImportFileError for a heap of texts in HDF5 ("HDF5 File Format Specification", III.E) whose objects do not follow
    one another up to its end: at one that takes no place, HDF5 1.14 would look for the next for ever."""
    for found in re.finditer(rb"GCOL\x01\0\0\0", data):
        (size,) = struct.unpack_from("<Q", data, found.start() + 8) if found.end() + 8 <= len(data) else (0,)
        at, end = found.start() + 16, min(found.start() + size, len(data))
        while at + 16 <= end:
            number, length = struct.unpack_from("<H6xQ", data, at)
            # Number 0 is what is left free; it counts its own header.
            taken = 16 + (length + 7) // 8 * 8 if number else length
            if not 16 <= taken <= end - at:
                raise ImportFileError(f"it is damaged: {taken:,} bytes at {at:,}, expected 16 to {end - at:,}")
            at += taken


def _member(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """A member's bytes, never more than `limit` of them, whatever its header says."""
    found = [info for info in archive.infolist() if info.filename == name]
    if len(found) != 1:
        listed = ", ".join(info.filename for info in archive.infolist()[:8]) or "nothing"
        raise ImportFileError(f"it has {len(found)} members {name}, expected one; it holds {listed}")
    return read_member(archive, found[0], limit)


def _version(archive: zipfile.ZipFile) -> str:
    if "metadata.json" not in archive.namelist():
        return ""
    return str(json.loads(_member(archive, "metadata.json", _MAX_CONFIG)).get("keras_version", ""))


def _saved_model(root: h5py.File, config: Any, version: str) -> SavedModel:
    if config is None and "model_config" in root.attrs:
        config = json.loads(_text(root.attrs["model_config"]))
    if "layer_names" in root.attrs or "model_weights" in root:
        top = root if "layer_names" in root.attrs else _group(root, "model_weights")
        stored, version = list(_by_variable(top)), _text(top.attrs.get("keras_version", ""))
    else:
        stored = list(_by_number(root, config))
    # All they have is whole numbers.
    generators = [s.name for s in stored if all(v.dtype.kind in "iu" for v in s.variables.values())]
    notes = []
    if generators:
        notes.append(f"left out, the state of random generators: {', '.join(generators)}")
    if any(name in root for name in ("optimizer", "optimizer_weights")):
        notes.append("left out: the optimizer's state")
    kept = [s for s in stored if s.name not in generators]
    checked = all(dataset.fletcher32 for layer in kept for dataset in layer.variables.values())
    return SavedModel(config, kept, notes, version, checked)


def _by_variable(top: h5py.Group) -> Iterator[Stored]:
    """Layers of Keras 2's layout: attributes list a model's layers, and each one's variables by path."""
    for outer in _names(top, "layer_names"):
        group = _group(top, outer)
        found: dict[str, Stored] = {}
        for path in _names(group, "weight_names"):
            # "model/conv1_conv/kernel:0": in a nested model's group, the path says whose variable it is.
            *_, name, variable = path.removesuffix(":0").split("/")
            found.setdefault(name, Stored(name, {})).variables[variable] = _dataset(group, path)
        yield from found.values()


def _names(group: h5py.Group, attribute: str) -> list[str]:
    """A list of names, which Keras spreads over several attributes where it is long."""
    parts = [attribute] if attribute in group.attrs else []
    if not parts:
        numbered = (f"{attribute}{i}" for i in itertools.count())
        parts = list(itertools.takewhile(group.attrs.__contains__, numbered))
    if not parts:
        raise ImportFileError(f"its group {group.name} has no {attribute}")
    return [_text(name) for part in parts for name in group.attrs[part]]


def _by_number(root: h5py.File, config: Any) -> Iterator[Stored]:
    """Layers of Keras 3's layout: groups are named by class and count, variables are numbered. A layer's own name is an
    attribute; files from before Keras wrote that are read by their configuration."""
    # Keras 2.13 has another word for "layers".
    word = next((name for name in ("layers", _OLD_WORD) if name in root), None)
    if word is None:
        raise ImportFileError(
            f"it holds {', '.join(root) or 'nothing'}, expected a Functional or Sequential model's layers"
        )
    configured = {} if config is None else {path: layer.name for path, layer in groups(config)}
    for path, variables in _numbered(_group(root, word), "layers", [0]):
        name = _text(variables.attrs["name"]) if "name" in variables.attrs else configured.get(path)
        if name is None:
            raise ImportFileError(
                f"its group {path} does not say which layer it is, as in weights of early Keras 3; give the .keras or .h5 file "
                "of the whole model, which does"
            )
        if config is not None and configured.get(path) != name:
            raise ImportFileError(f"its group {path} is '{name}', by config.json {configured.get(path)!r}")
        numbered = {number: _dataset(variables, number) for number in sorted(variables, key=int)}
        yield Stored(name, numbered, nested="/layers/" in path)


def _numbered(group: h5py.Group, path: str, seen: list[int]) -> Iterator[tuple[str, h5py.Group]]:
    """Every group of variables with its layer's path, in the model's order; not those of random generators."""
    for child in sorted(group, key=_order):
        inner = _group(group, child)
        for name in inner:
            seen[0] += 1
            if seen[0] > _MAX_GROUPS:
                raise ImportFileError(f"it has more than {_MAX_GROUPS:,} groups; ResNet-50 has some hundreds")
            if name in ("layers", _OLD_WORD):
                yield from _numbered(_group(inner, name), f"{path}/{child}/layers", seen)
            elif name == "vars":
                if len(variables := _group(inner, name)):
                    yield f"{path}/{child}", variables
            elif name not in ("seed_generator", "generator", "random_generator"):
                raise ImportFileError(f"its group {path}/{child} holds '{name}', expected the variables of a layer")


def _order(name: str) -> tuple[str, int]:
    kind, _, number = name.rpartition("_")
    return (kind, int(number)) if kind and number.isdecimal() else (name, 0)


def state_dict(
    stored: list[Stored], layers: Mapping[str, nn.Module], ours: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    """The stored layers' variables as a state dict.

    layers: the network's, by the names that their weights start with. ours: these names by Keras' names, where they differ.
    Raises ImportFileError listing variables that are missing, unexpected, or of another shape or type.
    """
    weights: dict[str, torch.Tensor] = {}
    problems: dict[str, list[str]] = {"missing": [], "unexpected": [], "of another shape or type": []}
    found: set[str] = set()
    for layer in stored:
        name = ours.get(layer.name, layer.name)
        if name not in layers or name in found:
            problems["unexpected"].append(layer.name)
            continue
        found.add(name)
        module = layers[name]
        names = _VARIABLES[type(module)]
        by_number = dict(zip(map(str, range(len(names))), names, strict=True))
        variables = {by_number.get(key, key): value for key, value in layer.variables.items()}
        problems["missing"] += [f"{layer.name}/{key}" for key in names if key not in variables]
        problems["unexpected"] += [f"{layer.name}/{key}" for key in variables if key not in names]
        for key in names.keys() & variables.keys():
            weight = _read_weight(variables[key], getattr(module, names[key]).shape)
            if weight is None:
                shown = f"{tuple(variables[key].shape)} {variables[key].dtype}"
                problems["of another shape or type"].append(f"{layer.name}/{key} {shown}")
            else:
                weights[f"{name}.{names[key]}"] = weight
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            weights[f"{name}.num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
    problems["missing"] += [name for name in layers if name not in found]
    if any(problems.values()):
        listed = "; ".join(
            f"{len(v)} {k} ({', '.join(sorted(v)[:5])}{', ...' if len(v) > 5 else ''})"
            for k, v in problems.items()
            if v
        )
        raise ImportFileError(f"its weights do not fit the network: {listed}")
    return weights


def _read_weight(dataset: h5py.Dataset, shape: torch.Size) -> torch.Tensor | None:
    """In PyTorch's layout; None, without having read it, for one that is not a float array of this shape."""
    # Keras: convolutions (height, width, in, out), dense layers (in, out).
    order = {4: (3, 2, 0, 1), 2: (1, 0)}.get(len(shape), (0,))
    if dataset.dtype.kind != "f" or dataset.ndim != len(shape) or tuple(dataset.shape[i] for i in order) != shape:
        return None
    try:
        values = dataset[()]
    except OSError as error:
        if not dataset.fletcher32:
            raise
        raise ImportFileError(
            f"{dataset.name} does not match its checksum: the file is damaged; copy it again"
        ) from error
    return torch.from_numpy(values.astype(values.dtype.newbyteorder("="))).permute(order).contiguous()


def _group(parent: h5py.Group, path: str) -> h5py.Group:
    found = _inside(parent, path)
    if not isinstance(found, h5py.Group):
        raise ImportFileError(f"its {parent.name}/{path} is no group")
    return found


def _dataset(parent: h5py.Group, path: str) -> h5py.Dataset:
    found = _inside(parent, path)
    if not isinstance(found, h5py.Dataset) or found.external or found.is_virtual:
        raise ImportFileError(f"its {parent.name}/{path} is no array that lies in the file itself")
    # HDF5 inflates to the end of a stream, however many bytes the array has. A checksum inflates nothing.
    if found.id.get_create_plist().get_nfilters() > found.fletcher32:
        raise ImportFileError(
            f"its {parent.name}/{path} is compressed ({found.compression or 'by a filter'}), expected {found.nbytes:,} bytes as "
            "Keras stores them; save the model again with Keras"
        )
    return found


def _inside(parent: h5py.Group, path: str) -> h5py.Group | h5py.Dataset:
    """What a path leads to, by hard links only: others can lead to other files."""
    for name in path.split("/"):
        link = parent.get(name, getlink=True) if isinstance(parent, h5py.Group) else None
        if not isinstance(link, h5py.HardLink):
            raise ImportFileError(f"its {path} is {'missing' if link is None else f'a {type(link).__name__}'}")
        parent = parent[name]
    return parent


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
