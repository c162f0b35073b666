"""What a Keras model computes, by its configuration: read as data, so that no layer of it is built or run.

A network's weights are only half of it. The same weights behind another stride, epsilon or activation, or behind
preprocessing that sits inside the model, give other numbers without an error.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from skewless.importers.architecture import keras_application
from skewless.importers.errors import ImportFileError

# Layers that hand their input on unchanged outside training. RandomCrop is none: it then crops the centre.
ONLY_IN_TRAINING = frozenset(
    {
        "AlphaDropout", "AugMix", "CutMix", "Dropout", "GaussianDropout", "GaussianNoise", "MixUp", "RandAugment",
        "RandomBrightness", "RandomColorDegeneration", "RandomColorJitter", "RandomContrast", "RandomElasticTransform",
        "RandomErasing", "RandomFlip", "RandomGaussianBlur", "RandomGrayscale", "RandomHue", "RandomInvert",
        "RandomPerspective", "RandomPosterization", "RandomRotation", "RandomSaturation", "RandomSharpness", "RandomShear",
        "RandomTranslation", "RandomZoom", "SpatialDropout2D",
    }
)  # fmt: skip
MODELS = ("Functional", "Sequential", "Model")
# Called with training=True when a model was built, these compute as in training for good in Keras 2. In Keras 3, what the
# model itself is called with overrules it.
_TRAINED_OR_NOT = frozenset(
    {"AlphaDropout", "BatchNormalization", "Dropout", "GaussianDropout", "GaussianNoise", "SpatialDropout2D", *MODELS}
)
_FIRST = "conv1_pad"


@dataclass(frozen=True)
class Layer:
    """One layer or operation of a model: Keras' class and configuration, the layers it gets its input from, and what
    else it is called with, in order (`None` in place of an input)."""

    kind: str
    name: str
    config: Mapping[str, Any]
    inputs: tuple[str, ...]
    constants: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Graph:
    """dense: the names of the two layers of the head. stages: what the model does to its input before its first
    convolution, as stages of a pipeline. notes: what was left out."""

    dense: tuple[str, str]
    stages: tuple[dict[str, dict[str, Any]], ...]
    notes: tuple[str, ...]


def read_graph(model: Mapping[str, Any], network: nn.Module, replaced: Collection[str]) -> Graph:
    """Hold a model's configuration against a KerasResNet50.

    replaced: names of layers before the network of which the caller knows that the pipeline does their work.
    Raises ImportFileError naming the layers that are something else than the network has, or that no stage can stand for.
    """
    try:
        return _read(model, network, replaced)
    except ImportFileError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError, ZeroDivisionError) as error:
        raise ImportFileError(f"the model's configuration is not one that Keras writes: {error!r}") from error


def check_resnet50(names: Collection[str]) -> None:
    """Raise ImportFileError where these are the layers of another network of keras.applications."""
    found = keras_application(names)
    if found not in ("", "ResNet50"):
        raise ImportFileError(
            f"this is a {found}, and the archive's network is keras_resnet50: choose another archive, or load the model in Keras "
            "with its torch backend, save it with torch.export.save and write `network: {exported: model.pt2}` into model.yaml"
        )


def layers(model: Mapping[str, Any]) -> list[Layer]:
    """A model's own layers and operations, in the order in which they are computed."""
    if model["class_name"] not in MODELS or not isinstance(model["config"], Mapping):
        raise ImportFileError(
            f"the model is a {model['class_name']}, expected a Functional or Sequential one: only these say what they "
            "compute; build the same layers as one of them in Keras and save that"
        )
    found: list[Layer] = []
    for entry in model["config"]["layers"]:
        name = entry["config"]["name"]
        if model["class_name"] == "Sequential":
            inputs, constants = tuple(layer.name for layer in found[-1:]), ()
        else:
            inputs, constants = _called_with(entry)
        found.append(Layer(entry["class_name"], name, entry["config"], inputs, constants))
    return found


def groups(model: Mapping[str, Any], prefix: str = "layers") -> Iterator[tuple[str, Layer]]:
    """The group of `model.weights.h5` that Keras 3 keeps each layer in: its class in snake case, numbered among its
    namesakes in the model. The layer's own name, which counts across a whole session, has no part in it."""
    used: Counter[str] = Counter()
    for layer in layers(model):
        kind = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", layer.kind))
        kind = re.sub("([a-z])([A-Z])", r"\1_\2", kind).lower()
        path = f"{prefix}/{kind}_{used[kind]}" if used[kind] else f"{prefix}/{kind}"
        used[kind] += 1
        if layer.kind in MODELS:
            yield from groups({"class_name": layer.kind, "config": layer.config}, f"{path}/layers")
        else:
            yield path, layer


def _called_with(entry: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """The inputs and constants of a layer in a functional model, as Keras 3 or Keras 2 writes them."""
    name, nodes = entry["config"]["name"], entry["inbound_nodes"]
    if entry["class_name"] == "InputLayer":
        return (), ()
    if len(nodes) != 1:
        raise ImportFileError(f"layer '{name}' is used {len(nodes)} times, expected once")
    inputs: list[str] = []
    if isinstance(nodes[0], Mapping):
        constants = tuple(_without_inputs(value, inputs) for value in nodes[0]["args"])
    else:
        # Keras 2: [[name, node, tensor, keywords], ...], or for an operation's one input [name, node, tensor, keywords].
        tensors = [nodes[0]] if isinstance(nodes[0][0], str) else nodes[0]
        inputs, constants = [tensor[0] for tensor in tensors], (None, tensors[0][3])
        if tensors[0][3].get("training") and entry["class_name"] in _TRAINED_OR_NOT:
            raise ImportFileError(
                f"layer '{name}' is called with training=True: outside training, too, it computes as in training; build the model "
                "without that and save it again"
            )
    if not inputs:
        raise ImportFileError(f"layer '{name}' gets its input by keyword, expected by position")
    return tuple(inputs), constants


def _without_inputs(value: Any, inputs: list[str]) -> Any:
    """An argument in plain types; the tensors in it go to `inputs`."""
    if isinstance(value, list):
        return [_without_inputs(item, inputs) for item in value]
    kind = value.get("class_name") if isinstance(value, Mapping) else None
    if kind == "__keras_tensor__":
        inputs.append(value["config"]["keras_history"][0])
        return None
    return value["config"]["value"] if kind in ("__tensor__", "__numpy__") else value


def _read(model: Mapping[str, Any], network: nn.Module, replaced: Collection[str]) -> Graph:
    check_resnet50([layer.name for layer in _walk(model)])
    front = _Front(replaced)
    image, arrived = front.through(model, tuple((channel, 1.0, 0.0) for channel in range(3)))
    if not arrived:
        raise ImportFileError(f"the model has no layer '{_FIRST}': it is no keras.applications.ResNet50 with a head")
    if unused := sorted(set(replaced) - front.seen):
        raise ImportFileError(f"there is no layer {', '.join(unused)} before the network that a pipeline could replace")
    everything = list(_walk(model))
    behind = [layer for layer in everything if layer.name not in front.seen and layer.kind not in ONLY_IN_TRAINING]
    dense = [layer.name for layer in behind if layer.kind == "Dense"]
    pools = [layer.name for layer in behind if layer.kind == "GlobalAveragePooling2D"]
    if len(dense) != 2 or len(pools) != 1:
        raise ImportFileError(
            f"the model has {len(dense)} dense layers and {len(pools)} global average poolings, expected 2 and 1 behind "
            "ResNet50; another head is another network"
        )
    wrong = [text for layer in behind if (text := _difference(layer, network, dense))]
    if wrong:
        raise ImportFileError(
            "the model computes something else than the network:\n" + "\n".join(f"  {w}" for w in wrong)
        )
    return Graph((dense[0], dense[1]), (*front.stages, *_as_stages(image)), notes_on(everything, replaced))


def _walk(model: Mapping[str, Any]) -> Iterator[Layer]:
    """Every layer, those of nested models in place of the model."""
    for layer in layers(model):
        if layer.kind in MODELS:
            yield from _walk({"class_name": layer.kind, "config": layer.config})
        else:
            yield layer


def _difference(layer: Layer, network: nn.Module, dense: list[str]) -> str:
    """How a layer computes something else than the network does in its place; empty when it does not."""
    module = getattr(network, layer.name, None)
    expected: dict[str, Any] | None = None
    if layer.kind == "Conv2D" and isinstance(module, nn.Conv2d):
        expected = {
            "strides": list(module.stride),
            "padding": "same" if any(module.padding) else "valid",
            "dilation_rate": [1, 1],
            "groups": 1,
            "activation": "linear",
        }
    elif layer.kind == "BatchNormalization" and isinstance(module, nn.BatchNorm2d):
        expected = {"epsilon": module.eps}
    elif layer.kind == "Dense":
        last = "linear" if layer.config["activation"] == "linear" else "softmax"
        expected = {"activation": "relu" if layer.name == dense[0] else last}
    elif layer.kind == "ZeroPadding2D" and layer.name in ("conv1_pad", "pool1_pad"):
        size = 3 if layer.name == "conv1_pad" else 1
        expected = {"padding": [[size, size], [size, size]]}
    elif layer.kind == "MaxPooling2D" and layer.name == "pool1_pool":
        expected = {"pool_size": [3, 3], "strides": [2, 2], "padding": "valid"}
    elif layer.kind == "Activation" and re.fullmatch(r"conv1_relu|conv[2-5]_block\d_([12]_relu|out)", layer.name):
        expected = {"activation": "relu"}
    elif re.fullmatch(
        r"Add conv[2-5]_block\d_add|(GlobalAveragePooling2D|InputLayer) .*", f"{layer.kind} {layer.name}"
    ):
        expected = {}
    if expected is None:
        return f"{layer.kind} '{layer.name}' is not in the network"
    # Early versions do not write groups and dilation, of which they had no others.
    wrong = [f"{k} {layer.config[k]!r}, expected {v!r}" for k, v in expected.items() if layer.config.get(k, v) != v]
    return f"{layer.kind} '{layer.name}' has {', '.join(wrong)}" if wrong else ""


# What one channel of the image is by then: which of the input's channels, times a scale, plus an offset.
Channel = tuple[int, float, float]
Image = tuple[Channel, ...]

_OPERATIONS = {
    "Add": "+", "Subtract": "-", "Multiply": "*", "TrueDivide": "/", "Divide": "/",
    "nn.bias_add": "+", "math.add": "+", "math.subtract": "-", "math.multiply": "*", "math.truediv": "/",
    "__operators__.add": "+",
}  # fmt: skip


class _Front:
    """Follows the image from the model's input to the network's first layer."""

    def __init__(self, replaced: Collection[str]):
        self.replaced = replaced
        self.seen: set[str] = set()
        self.stages: list[dict[str, dict[str, Any]]] = []

    def through(self, model: Mapping[str, Any], image: Image) -> tuple[Image, bool]:
        """What the image is at the network's first layer (True), or at the model's end where it has none (False)."""
        values: dict[str, Image] = {}
        for layer in layers(model):
            # Only an input, and the first layer of a Sequential model, get the image that comes from outside.
            given = [values[name] for name in layer.inputs] or [image]
            if layer.name == _FIRST:
                return given[0], True
            if layer.kind in MODELS:
                image, arrived = self.through({"class_name": layer.kind, "config": layer.config}, given[0])
                if arrived:
                    return image, True
            else:
                self.seen.add(layer.name)
                image = self._apply(layer, given)
            values[layer.name] = image
        return image, False

    def _apply(self, layer: Layer, given: list[Image]) -> Image:
        if layer.kind == "InputLayer" or layer.kind in ONLY_IN_TRAINING or layer.name in self.replaced:
            return given[0]
        if layer.kind == "Rescaling":
            return _affine(_affine(given[0], "*", layer.config["scale"]), "+", layer.config["offset"])
        if layer.kind == "Resizing":
            return self._resized(layer, given[0])
        if layer.kind == "Stack" and layer.config["axis"] == -1 and all(len(image) == 1 for image in given):
            return tuple(image[0] for image in given)
        if layer.kind in ("GetItem", "SlicingOpLambda"):
            key = layer.constants[1]
            picked = _picked(given[0], key if layer.kind == "GetItem" else key["slice_spec"])
            if picked is not None:
                return picked
        if (result := self._arithmetic(layer, given)) is not None:
            return result
        raise ImportFileError(
            f"{layer.kind} '{layer.name}' stands before the network, is not run here, and no stage can stand for it; if the "
            "pipeline does what it computes, name it as replaced"
        )

    def _arithmetic(self, layer: Layer, given: list[Image]) -> Image | None:
        """An operation on the image and one constant; None for anything else."""
        if len(given) != 1:
            return None
        if layer.kind == "TFOpLambda":
            keywords = layer.constants[1]
            operation = _OPERATIONS.get(layer.config["function"])
            left, right = None, keywords.get("bias", keywords.get("y"))
        else:
            operation = _OPERATIONS.get(layer.kind)
            left, right = layer.constants if operation else (None, None)
        if operation is None or (left is None) == (right is None):
            return None
        if left is None:
            return _affine(given[0], operation, right)
        if operation == "-":
            return _affine(_affine(given[0], "*", -1.0), "+", left)
        return None if operation == "/" else _affine(given[0], operation, left)

    def _resized(self, layer: Layer, image: Image) -> Image:
        config = layer.config
        extras = [k for k in ("crop_to_aspect_ratio", "pad_to_aspect_ratio") if config.get(k)]
        if extras:
            raise ImportFileError(
                f"Resizing '{layer.name}' has {', '.join(extras)}; the stage resize stretches a picture without regard to its "
                "aspect ratio"
            )
        stage = {"height": config["height"], "width": config["width"], "method": config["interpolation"]}
        # These two are the same with and without it.
        if config.get("antialias") and config["interpolation"] not in ("nearest", "area"):
            stage["antialias"] = True
        self.stages.append({"resize": stage})
        return image


def _picked(image: Image, key: list[Any]) -> Image | None:
    """`image[..., index]` or `image[..., ::-1]`; None for any other key."""
    *leading, last = key
    whole = all(_slice(item) == (None, None, None) or _is_ellipsis(item) for item in leading)
    if not whole or not (any(map(_is_ellipsis, leading)) or len(key) == 4):
        return None
    if isinstance(last, int) and last < len(image):
        return (image[last],)
    return image[::-1] if _slice(last) == (None, None, -1) else None


def _is_ellipsis(item: Any) -> bool:
    return isinstance(item, Mapping) and item.get("class_name") == "__ellipsis__"


def _slice(item: Any) -> tuple[Any, Any, Any] | None:
    parts = item.get("config", item) if isinstance(item, Mapping) else {}
    return (parts["start"], parts["stop"], parts["step"]) if set(parts) == {"start", "stop", "step"} else None


def _affine(image: Image, operation: str, constant: Any) -> Image:
    numbers = np.asarray(constant, dtype=np.float64)
    if numbers.size != 1 and not numbers.size == numbers.shape[-1] == len(image):
        raise ImportFileError(f"a constant of shape {numbers.shape} meets an image of {len(image)} channels")
    values = np.broadcast_to(numbers.reshape(-1), len(image)).tolist()
    result = []
    for (source, scale, offset), value in zip(image, values, strict=True):
        if operation in "+-":
            result.append((source, scale, offset + value if operation == "+" else offset - value))
        else:
            factor = value if operation == "*" else 1 / value
            result.append((source, scale * factor, offset * factor))
    return tuple(result)


def _as_stages(image: Image) -> tuple[dict[str, dict[str, Any]], ...]:
    """The stage that maps RGB levels as the model does; none where it leaves them alone."""
    sources = [source for source, _, _ in image]
    scales, offsets = [s for _, s, _ in image], [o for _, _, o in image]
    if sources == [2, 1, 0] and scales == [1.0, 1.0, 1.0]:
        return ({"caffe_preprocess": {"mean_bgr": [_digits(-offset) for offset in offsets]}},)
    if sources != [0, 1, 2] or min(scales) <= 0:
        raise ImportFileError(
            f"the model puts its input's channels in the order {sources}, with scales {scales} and offsets {offsets}: there "
            "is no stage for that"
        )
    if scales == [1.0, 1.0, 1.0] and offsets == [0.0, 0.0, 0.0]:
        return ()
    # ((x - 0) / 255 - mean) / std = scale x + offset
    std = [1 / (255 * scale) for scale in scales]
    mean = [-offset * s for offset, s in zip(offsets, std, strict=True)]
    return (
        {
            "standardize": {
                "input_range": [0.0, 255.0],
                "mean": [_digits(value) for value in mean],
                "std": [_digits(value) for value in std],
                "arithmetic": "float32",
            }
        },
    )


def _digits(value: float) -> float:
    """Without what float32 adds to the number that somebody wrote."""
    return float(f"{value:.6g}") + 0.0


def notes_on(everything: Collection[Layer], replaced: Collection[str] = ()) -> tuple[str, ...]:
    """What of a model's layers was left out, and what Keras computed them in where that was not float32."""
    notes = []
    if left := [f"{layer.kind} '{layer.name}'" for layer in everything if layer.kind in ONLY_IN_TRAINING]:
        notes.append(f"left out, as they act in training only: {', '.join(left)}")
    if replaced:
        notes.append(f"left out, as you say that the pipeline does their work: {', '.join(replaced)}")
    bicubic = [
        layer.name
        for layer in everything
        if (layer.kind, layer.config.get("interpolation")) == ("Resizing", "bicubic")
        and not layer.config.get("antialias")
    ]
    if bicubic:
        notes.append(
            f"Resizing {', '.join(bicubic)}: bicubic is TensorFlow's here; Keras on PyTorch computes another, and the file does "
            "not say which of them trained it"
        )
    if policies := {_policy(layer.config.get("dtype", "float32")) for layer in everything} - {"float32"}:
        notes.append(f"Keras computed it in {', '.join(sorted(policies))}; here it is float32, some 1e-3 from that")
    return tuple(notes)


def _policy(dtype: Any) -> str:
    return str(dtype["config"]["name"] if isinstance(dtype, Mapping) else dtype)
