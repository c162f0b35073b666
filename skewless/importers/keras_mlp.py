"""A multilayer perceptron that Keras saved, as the network `mlp`: its layers in order, whatever their names.

Each hidden layer of `mlp` is a dense layer with ReLU, then dropout and batch normalisation in either order, as dropout does
nothing outside training; the last hidden layer has no batch normalisation. What computes something else is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from skewless.core.networks.mlp import MLP
from skewless.importers.errors import ImportFileError
from skewless.importers.imported_file import ImportedFile
from skewless.importers.keras_file import SavedModel, Stored, opened, state_dict
from skewless.importers.keras_graph import MODELS, ONLY_IN_TRAINING, Layer, layers, notes_on
from skewless.training.checkpoint import file_digest

_OTHER = (
    "the network 'mlp' has no such layer there; a network of your own, or one that torch.export saved, can have any "
    "(docs/your-own-model.md)"
)


@dataclass
class _Dense:
    """A dense layer and what follows it, up to the next one."""

    layer: Layer
    activation: Any
    dropout: float = 0.0
    norm: Layer | None = None


def read_keras_mlp(path: str | Path, network: MLP) -> ImportedFile:
    """The weights of a Functional or Sequential model that is a chain of dense layers, by the names of `network`.

    network: of the size that model.yaml says.
    Raises ImportFileError for a file that is damaged, is of another kind, holds a network of another size, or computes
    something that `mlp` does not.
    """
    with opened(path) as saved:
        chain = None if saved.config is None else list(_chain(saved.config))
        notes = [] if chain is None else list(notes_on(chain))
        found = None if chain is None else _dense_layers(chain)
        dense = _stored_dense(saved, found)
        shape = _shape(dense, found)
        _check_shape(shape, network)
        if found is None:
            norms = [layer.name for layer in saved.layers if layer.kernel.ndim == 1]
            notes.append("it holds weights alone: what its layers compute, and what comes before them, is not known")
        else:
            _check_layers(found, network)
            norms = [each.norm.name for each in found if each.norm is not None]
            rates = [layer.dropout.p for layer in _hidden(network)]
            if shape["dropout"] != rates:
                notes.append(f"it has the dropout {shape['dropout']}, model.yaml {rates}: only training is affected")
            if found[-1].activation == "linear":
                notes.append("its output is a logit: the archive answers with its sigmoid")
            notes.append("the model does nothing to its input: what it was trained behind is not said")
        modules: dict[str, nn.Module] = {}
        ours: dict[str, str] = {}
        for k, name in enumerate(layer.name for layer in dense):
            place = f"hidden.{k}.linear" if k + 1 < len(dense) else "output"
            modules[place], ours[name] = network.get_submodule(place), place
        for k in range(len(dense) - 2):
            modules[f"hidden.{k}.norm"] = network.get_submodule(f"hidden.{k}.norm")
        ours |= {name: f"hidden.{k}.norm" for k, name in enumerate(norms)}
        weights = state_dict(saved.layers, modules, ours)
        notes += saved.notes
    notes.append(
        "its output is the probability of the class that training called 1, the archive's second: its name is not said"
    )
    if saved.version:
        notes.append(f"written by Keras {saved.version}")
    return ImportedFile("keras", file_digest(path), weights, notes=tuple(notes), checksums=saved.checksums)


def shape_of(path: str | Path) -> dict[str, Any]:
    """The parameters of the network `mlp` that a file's weights fit.

    Such as {"inputs": 37, "hidden": [256, 128, 64, 32], "dropout": [0.3, 0.3, 0.2, 0.2]}. A file of weights alone has no
    dropout, which acts in training only: it is then 0 throughout.
    Raises ImportFileError for a file that is damaged, or that holds no chain of dense layers.
    """
    with opened(path) as saved:
        found = None if saved.config is None else _dense_layers(list(_chain(saved.config)))
        return _shape(_stored_dense(saved, found), found)


def _chain(model: Mapping[str, Any]) -> Iterator[Layer]:
    """A model's layers, those of nested models in place of the model, each of which gets what the one before it gives."""
    previous = ""
    for layer in layers(model):
        if layer.inputs not in ((), (previous,)) or (layer.kind == "InputLayer" and previous):
            raise ImportFileError(
                f"layer '{layer.name}' gets its input from {', '.join(layer.inputs) or 'outside'}, not from '{previous}' "
                "before it: the model is no chain of layers"
            )
        previous = layer.name
        if layer.kind in MODELS:
            yield from _chain({"class_name": layer.kind, "config": layer.config})
        elif layer.kind != "InputLayer":
            yield layer
    if model["class_name"] != "Sequential":
        outputs = model["config"]["output_layers"]
        outputs = [outputs] if outputs and isinstance(outputs[0], str) else outputs
        if [output[0] for output in outputs] != [previous]:
            raise ImportFileError(f"the model's output is not that of its last layer '{previous}' alone")


def _dense_layers(chain: Sequence[Layer]) -> list[_Dense]:
    """The dense layers, each with what follows it; raises ImportFileError for a layer that `mlp` has nothing for."""
    found: list[_Dense] = []
    for layer in chain:
        shown = f"{layer.kind} '{layer.name}'"
        if layer.kind == "Normalization":
            raise ImportFileError(
                f"{shown} scales the model's input by statistics of its own, which the stage standard_scaler does in the "
                "archive: build the model without that layer, save it, and write the layer's mean and the root of its variance into the "
                "pipeline's standard_scaler"
            )
        last = found[-1] if found else None
        if layer.kind == "Dense":
            found.append(_Dense(layer, layer.config["activation"]))
        elif layer.kind in ONLY_IN_TRAINING:
            if layer.kind == "Dropout" and last is not None:
                last.dropout = float(layer.config["rate"])
        elif last is None:
            raise ImportFileError(f"{shown} stands before the first dense layer: {_OTHER}")
        elif (activation := _activation(layer)) is not None and last.activation == "linear" and last.norm is None:
            last.activation = activation
        elif layer.kind == "BatchNormalization" and last.norm is None:
            last.norm = layer
        else:
            raise ImportFileError(f"{shown} stands behind '{last.layer.name}': {_OTHER}")
    if len(found) < 2:
        raise ImportFileError(f"the model has {len(found)} dense layers, expected a hidden one and the output at least")
    return found


def _activation(layer: Layer) -> Any:
    """What a layer that is only an activation computes; None for every other layer."""
    if layer.kind == "Activation":
        return layer.config["activation"]
    plain = {"max_value": None, "negative_slope": 0.0, "threshold": 0.0}
    if layer.kind == "ReLU" and all(layer.config.get(name, value) == value for name, value in plain.items()):
        return "relu"
    return None


def _stored_dense(saved: SavedModel, found: list[_Dense] | None) -> list[Stored]:
    """The dense layers' variables, in the model's order."""
    if found is None:
        if nested := [layer.name for layer in saved.layers if layer.nested]:
            raise ImportFileError(
                f"it holds the weights alone of models within a model (the layer {nested[0]}): which layer follows which "
                "is not in it; give the .keras or .h5 file of the whole model, which has its configuration"
            )
        dense = [layer for layer in saved.layers if layer.kernel.ndim == 2]
    else:
        stored = {layer.name: layer for layer in saved.layers}
        if missing := [each.layer.name for each in found if each.layer.name not in stored]:
            raise ImportFileError(f"it has no weights of the layer {', '.join(missing)}")
        dense = [stored[each.layer.name] for each in found]
    if len(dense) < 2 or any(layer.kernel.ndim != 2 for layer in dense):
        raise ImportFileError(
            f"it has the weights of {len(dense)} dense layers, expected a hidden one and the output at least"
        )
    return dense


def _shape(dense: Sequence[Stored], found: list[_Dense] | None) -> dict[str, Any]:
    hidden = dense[:-1]
    return {
        "inputs": int(dense[0].kernel.shape[0]),
        "hidden": [int(layer.kernel.shape[1]) for layer in hidden],
        "dropout": [each.dropout for each in found[:-1]] if found else [0.0] * len(hidden),
    }


def _hidden(network: MLP) -> list[Any]:
    return list(network.hidden)


def _check_shape(shape: Mapping[str, Any], network: MLP) -> None:
    linears = [layer.linear for layer in _hidden(network)]
    inputs, hidden = linears[0].in_features, [linear.out_features for linear in linears]
    if (shape["inputs"], shape["hidden"]) != (inputs, hidden):
        line = ", ".join(f"{name}: {value}" for name, value in shape.items())
        raise ImportFileError(
            f"it takes {shape['inputs']} features and has hidden layers of {shape['hidden']} units; the archive's "
            f"model.yaml has {inputs} and {hidden}. Write there:\n  network: {{mlp: {{{line}}}}}"
        )


def _check_layers(found: Sequence[_Dense], network: MLP) -> None:
    """Raise ImportFileError for what the layers compute otherwise than the network's."""
    wrong = []
    *hidden, output = found
    for k, (each, ours) in enumerate(zip(hidden, _hidden(network), strict=True)):
        shown = f"hidden layer {k + 1}, '{each.layer.name}',"
        if each.activation != "relu":
            wrong.append(f"{shown} has the activation {each.activation!r:.80}, expected 'relu'")
        expected = isinstance(ours.norm, nn.BatchNorm1d)
        if (each.norm is not None) != expected:
            wrong.append(
                f"{shown} has {'no' if expected else 'a'} batch normalisation, expected {'one' if expected else 'none'}"
            )
        elif each.norm is not None and each.norm.config["epsilon"] != ours.norm.eps:
            wrong.append(
                f"batch normalisation '{each.norm.name}' has the epsilon {each.norm.config['epsilon']!r:.40}, expected "
                f"{ours.norm.eps}"
            )
    units = output.layer.config["units"]
    if (units, output.activation) == (2, "softmax"):
        wrong.append(
            f"the output, '{output.layer.name}', is a softmax over 2 units, expected one unit with a sigmoid. In Keras, "
            "replace it with Dense(1, activation='sigmoid') of the kernel k[:, 1:] - k[:, :1] and the bias b[1:] - b[:1], "
            "which gives the same probability of the second class, and save that"
        )
    elif units != 1 or output.activation not in ("sigmoid", "linear"):
        wrong.append(
            f"the output, '{output.layer.name}', has {units!r:.20} units and the activation {output.activation!r:.80}, "
            "expected 1 and 'sigmoid', or 'linear' for a logit"
        )
    if output.norm is not None:
        wrong.append(f"the output, '{output.layer.name}', has a batch normalisation, expected none")
    if wrong:
        listed = "\n".join(f"  {each}" for each in wrong)
        raise ImportFileError(f"the model computes something else than the network 'mlp':\n{listed}")
