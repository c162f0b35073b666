"""Models that Keras saved: the same probabilities from the same files, and a clear refusal of everything else."""

from __future__ import annotations

import copy
import io
import json
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from skewless.core.definition import Definition
from skewless.core.networks import build_network
from skewless.core.networks.keras_resnet50 import KerasResNet50
from skewless.core.pipeline import Pipeline
from skewless.core.runtimes.eager import EagerRuntime
from skewless.core.stages import Signal
from skewless.importers import keras_file
from skewless.importers.errors import ImportFileError
from skewless.importers.keras_file import read_keras
from skewless.importers.keras_graph import ONLY_IN_TRAINING, Graph, groups, read_graph
from skewless.importers.run import ImportRequest, import_file
from skewless.training.checkpoint import CheckpointError, file_digest, load_checkpoint, network_of
from skewless.training.untrained import UntrainedError, require_trained
from tests.conftest import ROOT, run_skewless
from tests.degenerate import KINDS, degenerate
from tests.keras_on_torch import keras
from tests.recordings import one_thread  # noqa: F401
from tests.test_portrait import encoded, picture
from tests.test_portrait_loaders import app

ARCHIVE = ROOT / "archive" / "portrait"
DEFINITION = Definition.read(ARCHIVE)
PIPELINE = DEFINITION.pipeline
CAFFE = {"caffe_preprocess": {"mean_bgr": [103.939, 116.779, 123.68]}}
# Layouts of one network, and kinds of file.
SAVED = ("augmented.keras", "augmented.h5", "augmented.weights.h5", "sequential.keras", "flat.h5", "flat.weights.h5")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")
layers, applications = keras.layers, keras.applications


@pytest.fixture(scope="module")
def base() -> keras.Model:
    keras.utils.set_random_seed(1)
    return applications.ResNet50(weights=None, include_top=False, input_shape=(224, 224, 3))


def augmented(base: keras.Model) -> keras.Model:
    """ResNet50 inside a functional model, behind augmentation and its own preprocess_input."""
    image = keras.Input((224, 224, 3))
    x = layers.RandomRotation(0.1, seed=3)(layers.RandomFlip("horizontal")(image))
    x = layers.GlobalAveragePooling2D()(base(applications.resnet.preprocess_input(x), training=False))
    x = layers.Dropout(0.3, seed=4)(layers.Dense(256, activation="relu")(x))
    return keras.Model(image, layers.Dense(3, activation="softmax")(x))


def sequential(base: keras.Model) -> keras.Model:
    augmentation = keras.Sequential([layers.RandomFlip(), layers.RandomZoom(0.1)], name="augmentation")
    head = [layers.Dense(256, "relu"), layers.Dropout(0.2), layers.Dense(3, "softmax")]
    model = keras.Sequential([augmentation, base, layers.GlobalAveragePooling2D(), layers.Dropout(0.2), *head])
    model.build((None, 224, 224, 3))
    return model


def flat(base: keras.Model) -> keras.Model:
    """The base's own layers, not nested. The last layer is made first, so that its name counts lower."""
    last = layers.Dense(3, activation="softmax")
    pooled = layers.GlobalAveragePooling2D(name="avg_pool")(base.output)
    return keras.Model(base.input, last(layers.Dense(256, activation="relu")(pooled)))


FILES = {
    "photo.jpg": encoded(picture(300, 200), "JPEG", quality=90),
    "drawing.png": encoded(Image.fromarray(picture(97, 500, seed=5)).quantize(12), "PNG"),
    "shot.webp": encoded(255 - picture(640, 480, seed=6), "WebP", quality=80),
    "grey.jpg": encoded(picture(224, 224, 1, seed=7)[..., 0] // 3, "JPEG"),
}


def keras_inputs() -> NDArray[np.float32]:
    """RGB levels `(N, 224, 224, 3)`, as Keras resizes them."""
    pictures = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.float32) for data in FILES.values()]
    return np.stack([keras.ops.image.resize(p, (224, 224), interpolation="bilinear").numpy() for p in pictures])


@pytest.fixture(scope="module")
def models(base: keras.Model) -> dict[str, keras.Model]:
    """One network, as if trained, in three layouts."""
    made = {"augmented": augmented(base), "sequential": sequential(base), "flat": flat(base)}
    generator = np.random.default_rng(0)
    for layer in base.layers:
        if isinstance(layer, layers.BatchNormalization):
            n = layer.gamma.shape[0]
            scale = 50 if layer.name == "conv1_bn" else 1
            statistics = (generator.normal(0, 0.2, n) * scale, generator.uniform(0.5, 1.5, n) * scale**2)
            layer.set_weights([generator.uniform(0.5, 1.5, n), generator.normal(0, 0.2, n), *statistics])
        elif isinstance(layer, layers.Conv2D):
            layer.bias.assign(generator.normal(0, 0.1, layer.bias.shape))
    # Random features are nearly the same for every picture: the head looks at what they differ in.
    features = base.predict(applications.resnet.preprocess_input(keras_inputs()), verbose=0).mean(axis=(1, 2))
    kernel = generator.normal(0, 0.03, (2048, 256)) / (features.std(axis=0)[:, None] + 0.01)
    head = [kernel, generator.normal(0, 0.3, 256) - features.mean(axis=0) @ kernel]
    head += [generator.normal(0, 0.1, (256, 3)), generator.normal(0, 0.1, 3)]
    for model in made.values():
        first, last = (layer for layer in model.layers if isinstance(layer, layers.Dense))
        first.set_weights(head[:2])
        last.set_weights(head[2:])
    return made


@pytest.fixture(scope="module")
def files(models: dict[str, keras.Model], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with SAVED, as Keras saves them: 97 MB each."""
    folder = tmp_path_factory.mktemp("models")
    models["augmented"].compile("adam", "sparse_categorical_crossentropy")
    for name in SAVED:
        model = models[name.partition(".")[0]]
        model.save_weights(folder / name) if "weights" in name else model.save(folder / name)
    yield folder
    shutil.rmtree(folder)


def network() -> KerasResNet50:
    return build_network({"keras_resnet50": {"classes": 3, "hidden": 256, "dropout": 0.0}}).eval()


@pytest.fixture(scope="module")
def empty() -> KerasResNet50:
    """A network to hold files against, not to load them into."""
    return network()


@pytest.fixture(scope="module")
def theirs(models: dict[str, keras.Model]) -> NDArray[np.float32]:
    """Keras' own probabilities for FILES, with preprocessing inside the model and outside."""
    levels = keras_inputs()
    inside = models["augmented"].predict(levels, verbose=0)
    outside = models["flat"].predict(applications.resnet.preprocess_input(levels.copy()), verbose=0)
    assert np.abs(inside - outside).max() < 1e-5
    # The pictures have to get different answers, none of them certain, for a comparison to mean something.
    assert outside.max() < 0.95 and np.ptp(outside, axis=0).min() > 0.03
    return outside


def expected_weights(model: keras.Model) -> dict[str, NDArray]:
    """A flat model's weights by our names, read off Keras' layers."""
    weights: dict[str, NDArray] = {}
    dense = iter(("dense", "predictions"))
    for layer in model.layers:
        values = layer.get_weights()
        if isinstance(layer, layers.BatchNormalization):
            names = ("weight", "bias", "running_mean", "running_var")
            weights |= {f"{layer.name}.{name}": value for name, value in zip(names, values, strict=True)}
            weights[f"{layer.name}.num_batches_tracked"] = np.zeros((), np.int64)
        elif values:
            name = next(dense) if isinstance(layer, layers.Dense) else layer.name
            weights |= {f"{name}.weight": values[0].transpose(), f"{name}.bias": values[1]}
            if values[0].ndim == 4:
                weights[f"{name}.weight"] = values[0].transpose(3, 2, 0, 1)
    return weights


@pytest.fixture(scope="module")
def expected(models: dict[str, keras.Model]) -> dict[str, NDArray]:
    return expected_weights(models["flat"])


@pytest.mark.parametrize("name", SAVED)
def test_every_kind_of_file_gives_the_weights(files: Path, empty, expected, name: str):
    found = read_keras(files / name, empty)
    assert found.weights.keys() == expected.keys() == empty.state_dict().keys()
    assert all(np.array_equal(found.weights[k].numpy(), v) for k, v in expected.items())
    assert found.sha256 == file_digest(files / name)


def test_names_count_across_a_session_and_do_not_matter(models):
    names = [layer.name for model in models.values() for layer in model.layers if isinstance(layer, layers.Dense)]
    assert len(set(names)) == 6 and names[4] > names[5]


@pytest.fixture(scope="module")
def ours(files: Path) -> KerasResNet50:
    imported = network()
    imported.load_state_dict(read_keras(files / "augmented.keras", imported).weights)
    return imported


def test_the_same_files_get_the_same_probabilities(ours, theirs):
    outputs = EagerRuntime(ours, torch.device("cpu"))([PIPELINE(data) for data in FILES.values()])
    probabilities = np.stack([o["class_probabilities"].numpy() for o in outputs])
    # 5e-6 measured, under a head that magnifies small differences: 53 convolutions in float32, in another order.
    assert np.abs(probabilities - theirs).max() <= 5e-5
    logits = np.stack([o["class_logits"].numpy() for o in outputs])
    assert np.abs((logits - logits[:, :1]) - np.log(theirs / theirs[:, :1])).max() <= 5e-4


def test_features_equal_those_of_the_base(base, ours):
    with torch.no_grad():
        features = ours.encode(torch.cat([PIPELINE(data) for data in FILES.values()])).numpy()
    expected = base.predict(applications.resnet.preprocess_input(keras_inputs()), verbose=0).mean(axis=(1, 2))
    assert features.shape == (len(FILES), 2048)
    # 2e-6 measured.
    assert np.abs(features - expected).max() <= 2e-5 * np.abs(expected).max()


def test_a_torchvision_resnet50_would_not_do(empty):
    """What distinguishes the two, so that a comparison that cannot tell them apart would be noticed."""
    strides = {
        name: m.stride for name, m in empty.named_modules() if isinstance(m, torch.nn.Conv2d) and m.stride != (1, 1)
    }
    assert set(strides) == {"conv1_conv"} | {f"conv{n}_block1_{k}_conv" for n in (3, 4, 5) for k in (0, 1)}
    assert all(m.eps == 1.001e-5 for m in empty.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert all(m.bias is not None for m in empty.modules() if isinstance(m, torch.nn.Conv2d))


def test_the_head_takes_one_picture(empty):
    with torch.no_grad():
        outputs = empty.head(torch.randn(1, 2048))
    assert outputs["class_logits"].shape == outputs["class_probabilities"].shape == (3,)
    assert float(outputs["class_probabilities"].sum()) == pytest.approx(1, abs=1e-6)


def test_parameters_reach_the_layers():
    built = build_network({"keras_resnet50": {"classes": 5, "hidden": 16, "dropout": 0.25}})
    assert (built.dense.out_features, built.predictions.out_features, built.dropout.p) == (16, 5, 0.25)
    features = torch.rand(64, 2048)
    assert torch.equal(built.eval().logits(features), built.logits(features))
    assert not torch.equal(built.train().logits(features), built.logits(features))


# --- what a file says


def test_notes_say_what_was_left_out(files: Path, empty):
    found = read_keras(files / "augmented.keras", empty)
    assert found.stages == (CAFFE,)
    for expected in ("RandomFlip 'random_flip", "RandomRotation", "Dropout", "optimizer", "Keras 3.15"):
        assert expected in str(found.notes)
    found = read_keras(files / "sequential.keras", empty)
    assert found.stages == () and "RandomZoom" in str(found.notes) and "does nothing to its input" in str(found.notes)
    found = read_keras(files / "flat.weights.h5", empty)
    assert found.stages == () and "weights alone" in str(found.notes)


def test_an_early_keras_3_file_without_names_is_read_by_its_configuration(files: Path, tmp_path: Path, empty, expected):
    new = tmp_path / "early.keras"
    with zipfile.ZipFile(files / "augmented.keras") as old, zipfile.ZipFile(new, "w") as archive:
        weights = io.BytesIO(old.read("model.weights.h5"))
        with h5py.File(weights, "r+") as root:
            without_names(root)
            # States of random generators, as other versions keep them.
            for path in ("layers/dropout/seed_generator/vars", "layers/random_flip/generator/vars"):
                root.require_group(path)["0"] = np.array([1, 2], np.uint32)
            root["layers/random_rotation/vars"]["0"] = np.array([1, 2, 3], np.int64)
        archive.writestr("config.json", old.read("config.json"))
        archive.writestr("model.weights.h5", weights.getvalue())
    found = read_keras(new, empty)
    new.unlink()
    assert all(np.array_equal(found.weights[k].numpy(), v) for k, v in expected.items())
    assert "random generators: random_rotation" in str(found.notes)


def test_keras_2_weights_are_read(files: Path, tmp_path: Path, empty, expected):
    """Variables with ":0", a long list of names in pieces, and no configuration."""
    path = Path(shutil.copy(files / "augmented.h5", tmp_path))
    with h5py.File(path, "r+") as root:
        names = list(root["model_weights"].attrs["layer_names"])
        for i, part in enumerate((names[:3], names[3:])):
            root["model_weights"].attrs[f"layer_names{i}"] = part
        del root["model_weights"].attrs["layer_names"], root.attrs["model_config"]
        for layer in names:
            group = root["model_weights"][layer]
            variables = list(group.attrs["weight_names"])
            for name in variables:
                group.move(name, f"{name}:0")
            group.attrs["weight_names"] = [f"{name}:0" for name in variables]
    found = read_keras(path, empty).weights
    path.unlink()
    assert all(np.array_equal(found[k].numpy(), v) for k, v in expected.items())


def without_names(root: h5py.File) -> None:
    root.visititems(lambda _, item: item.attrs.pop("name", None) and None)


# --- what a model does before the network


def with_front(base: keras.Model, front: Callable) -> keras.Model:
    image = keras.Input((224, 224, 3))
    pooled = layers.GlobalAveragePooling2D()(base(front(image)))
    return keras.Model(image, layers.Dense(3, "softmax")(layers.Dense(256, "relu")(pooled)))


def graph(model: keras.Model | dict, empty: KerasResNet50, *replaced: str) -> Graph:
    config = model if isinstance(model, dict) else json.loads(model.to_json())
    return read_graph(config, empty, replaced)


def standardize(mean: list[float], std: list[float]) -> dict:
    parameters = {"input_range": [0.0, 255.0], "mean": mean, "std": std, "arithmetic": "float32"}
    return {"standardize": parameters}


def reversed_channels(x: Any) -> Any:
    return keras.ops.stack([x[..., 2], x[..., 1], x[..., 0]], axis=-1)


HALVES = standardize([0.5] * 3, [0.5] * 3)
FRONTS: dict[str, tuple[Callable, list[dict]]] = {
    "nothing": (lambda x: layers.RandomFlip()(x), []),
    "resnet": (applications.resnet.preprocess_input, [CAFFE]),
    "resnet_v2": (applications.resnet_v2.preprocess_input, [HALVES]),
    "densenet": (applications.densenet.preprocess_input, [standardize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]),
    "by hand": (lambda x: reversed_channels(x) - keras.ops.convert_to_tensor([103.939, 116.779, 123.68]), [CAFFE]),
    "to 1": (layers.Rescaling(1 / 255), [standardize([0.0] * 3, [1.0] * 3)]),
    "nested": (keras.Sequential([layers.RandomFlip(), layers.Rescaling(1 / 127.5, offset=-1)]), [HALVES]),
    "there and back": (lambda x: layers.Rescaling(0.5)(x * 2.0), []),
    "resizing": (
        lambda x: layers.Rescaling(1 / 127.5, -1)(layers.Resizing(224, 224)(x)),
        [{"resize": {"height": 224, "width": 224, "method": "bilinear"}}, HALVES],
    ),
    "resizing otherwise": (
        lambda x: layers.Resizing(224, 224, antialias=True)(layers.Resizing(150, 260, "nearest", antialias=True)(x)),
        [
            {"resize": {"height": 150, "width": 260, "method": "nearest"}},
            {"resize": {"height": 224, "width": 224, "method": "bilinear", "antialias": True}},
        ],
    ),
}


@pytest.mark.parametrize("name", FRONTS)
def test_what_stands_before_the_network_becomes_stages(base, empty, name: str):
    front, stages = FRONTS[name]
    found = graph(with_front(base, front), empty)
    assert list(found.stages) == stages
    # The stages compute what Keras computes.
    image = keras.Input((224, 224, 3))
    levels = np.random.default_rng(0).uniform(0, 255, (1, 224, 224, 3)).astype(np.float32)
    expected = keras.Model(image, front(image)).predict(levels, verbose=0).transpose(0, 3, 1, 2)
    data = torch.from_numpy(levels).permute(0, 3, 1, 2)
    for number, stage in enumerate(stages):
        data = (
            Pipeline.from_dict({"name": f"stage {number}", "stages": [stage]})
            .stages[next(iter(stage))](Signal(data))
            .data
        )
    # Float32 on numbers up to 255, and constants of six digits.
    assert np.abs(data.numpy() - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_bicubic_that_depends_on_what_keras_ran_on_is_said(base, empty):
    smooth, plain = (layers.Resizing(224, 224, "bicubic", antialias=antialias) for antialias in (True, False))
    assert "bicubic" not in str(graph(with_front(base, smooth), empty).notes)
    assert "bicubic is TensorFlow's here" in str(graph(with_front(base, plain), empty).notes)


@pytest.mark.parametrize(
    ("front", "named"),
    [
        (lambda x: layers.Lambda(applications.resnet.preprocess_input, name="pre")(x), "Lambda 'pre'"),
        (layers.RandomCrop(224, 224), "RandomCrop"),
        (layers.Normalization(mean=[1.0, 2.0, 3.0], variance=[1.0, 1.0, 1.0]), "Normalization"),
        (lambda x: keras.ops.sin(x), "Sin"),
        (lambda x: x[:, ::-1], "GetItem"),
        (lambda x: 255.0 - x, "scales \\[-1.0, -1.0, -1.0\\]"),
        (lambda x: reversed_channels(x) / 58.0, "order \\[2, 1, 0\\]"),
        (lambda x: x + keras.ops.ones((224, 224, 3)), "shape \\(224, 224, 3\\)"),
        (lambda x: x * x, "Multiply"),
        (lambda x: 1.0 / x, "Divide"),
        (lambda x: layers.Resizing(224, 224, pad_to_aspect_ratio=True)(x), "pad_to_aspect_ratio"),
        (lambda x: layers.Resizing(224, 224, crop_to_aspect_ratio=True)(x), "crop_to_aspect_ratio"),
        (lambda x: layers.Concatenate()([x[..., :1], x[..., 1:]]), "GetItem|Concatenate"),
    ],
)
def test_what_no_stage_can_stand_for_is_refused(base, empty, front: Callable, named: str):
    with pytest.raises(ImportFileError, match=named):
        graph(with_front(base, front), empty)


def test_reversing_channels_by_a_step_is_read(base, empty):
    model = with_front(base, lambda x: x[..., ::-1] + keras.ops.convert_to_tensor([-103.939, -116.779, -123.68]))
    assert graph(model, empty).stages == (CAFFE,)


@pytest.mark.parametrize("name", ["MobileNet", "MobileNetV2", "EfficientNetB0", "DenseNet121"])
def test_another_network_is_said_to_be_one(empty, name: str):
    model = getattr(applications, name)(weights=None, include_top=False, input_shape=(64, 64, 3))
    family = name.removesuffix("B0").removesuffix("121")
    with pytest.raises(
        ImportFileError, match=f"this is a {family}, and the archive's network is keras_resnet50: choose"
    ):
        graph(model, empty)


def test_a_layer_that_the_pipeline_replaces_can_be_named(base, empty):
    model = with_front(base, lambda x: layers.Lambda(applications.resnet.preprocess_input, name="pre")(x))
    found = graph(model, empty, "pre")
    assert found.stages == () and "pre" in found.notes[-1]
    with pytest.raises(ImportFileError, match="no layer other before the network"):
        graph(model, empty, "pre", "other")


def keras_2(config: dict, operations: list[dict]) -> dict:
    """A functional configuration as Keras 2 writes it, with operations between the input and ResNet50."""
    config = copy.deepcopy(config)

    def convert(model: dict) -> None:
        for entry in model["config"]["layers"]:
            if "layers" in entry["config"]:
                convert(entry)
            nodes = entry["inbound_nodes"]
            if nodes:
                tensors: list[Any] = nodes[0]["args"][0]
                tensors = tensors if isinstance(tensors, list) else [tensors]
                entry["inbound_nodes"] = [[[*t["config"]["keras_history"], {}] for t in tensors]]

    convert(config)
    entries = config["config"]["layers"]
    previous = entries[0]["config"]["name"]
    for position, operation in enumerate(operations, start=1):
        name = f"operation_{position}"
        node = [[previous, 0, 0, operation["keywords"]]]
        settings = {"name": name, "trainable": True, "dtype": "float32", "function": operation["function"]}
        entries.insert(
            position, {"class_name": operation["kind"], "config": settings, "name": name, "inbound_nodes": node}
        )
        previous = name
    entries[len(operations) + 1]["inbound_nodes"] = [[[previous, 0, 0, {}]]]
    return config


def test_keras_2_configurations_are_read(base, empty):
    plain = json.loads(with_front(base, lambda x: layers.RandomFlip()(x)).to_json())
    reverse = [{"class_name": "__ellipsis__"}, {"start": None, "stop": None, "step": -1}]
    picked = {"kind": "SlicingOpLambda", "function": "__operators__.getitem", "keywords": {"slice_spec": reverse}}
    means = {"bias": [-103.939, -116.779, -123.68], "data_format": "NHWC"}
    caffe = [picked, {"kind": "TFOpLambda", "function": "nn.bias_add", "keywords": means}]
    halves = [
        {"kind": "TFOpLambda", "function": "math.truediv", "keywords": {"y": 127.5, "name": None}},
        {"kind": "TFOpLambda", "function": "math.subtract", "keywords": {"y": 1.0, "name": None}},
    ]
    for operations, stages in (([], ()), (caffe, (CAFFE,)), (halves, (HALVES,))):
        assert graph(keras_2(plain, operations), empty).stages == stages
    other = [{"kind": "TFOpLambda", "function": "image.rgb_to_hsv", "keywords": {}}]
    with pytest.raises(ImportFileError, match="TFOpLambda 'operation_1'"):
        graph(keras_2(plain, other), empty)


AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "AlphaDropout": {"rate": 0.5}, "Dropout": {"rate": 0.5}, "GaussianDropout": {"rate": 0.5},
    "GaussianNoise": {"stddev": 0.9}, "SpatialDropout2D": {"rate": 0.5}, "RandomBrightness": {"factor": 0.5},
    "RandomColorDegeneration": {"factor": 0.5}, "RandomContrast": {"factor": 0.5}, "RandomHue": {"factor": 0.5},
    "RandomPosterization": {"factor": 4}, "RandomRotation": {"factor": 0.3}, "RandomSaturation": {"factor": 0.5},
    "RandomSharpness": {"factor": 0.5}, "RandomShear": {"x_factor": 0.3}, "RandomZoom": {"height_factor": 0.3},
    "RandomTranslation": {"height_factor": 0.3, "width_factor": 0.3},
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(ONLY_IN_TRAINING))
def test_what_is_left_out_does_nothing_outside_training(kind: str):
    layer = getattr(layers, kind)(**AUGMENTATIONS.get(kind, {}))
    levels = picture(32, 32)[None].astype(np.float32)
    given = {"images": levels, "labels": np.ones((1, 3), np.float32)} if kind in ("MixUp", "CutMix") else levels
    result = layer(given, training=False)
    assert np.array_equal(keras.ops.convert_to_numpy(result["images"] if isinstance(result, dict) else result), levels)


# --- what computes something else


def changed(config: dict, name: str, changes: dict[str, Any]) -> dict:
    """A configuration with one layer changed, wherever it is nested."""
    config, changes = copy.deepcopy(config), dict(changes)

    def find(model: dict) -> Iterator[dict]:
        for entry in model["config"]["layers"]:
            if entry["config"]["name"] == name:
                yield entry
            if "layers" in entry["config"]:
                yield from find(entry)

    (entry,) = find(config)
    entry["class_name"] = changes.pop("class_name", entry["class_name"])
    entry["config"].update(changes)
    return config


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("conv3_block1_1_conv", {"strides": [1, 1]}, r"conv3_block1_1_conv' has strides \[1, 1\], expected \[2, 2\]"),
        ("conv3_block1_2_conv", {"padding": "valid"}, "padding 'valid', expected 'same'"),
        ("conv3_block1_2_conv", {"dilation_rate": [2, 2]}, "dilation_rate"),
        ("conv4_block2_1_conv", {"activation": "relu"}, "activation 'relu', expected 'linear'"),
        ("conv2_block1_0_bn", {"epsilon": 0.001}, "epsilon 0.001, expected 1.001e-05"),
        ("conv2_block1_0_bn", {"class_name": "LayerNormalization"}, "LayerNormalization 'conv2_block1_0_bn' is not"),
        ("pool1_pool", {"strides": [1, 1]}, "pool1_pool"),
        ("pool1_pad", {"padding": [[0, 0], [0, 0]]}, "pool1_pad"),
        ("conv2_block1_1_relu", {"activation": "gelu"}, "gelu"),
        ("avg_pool", {"class_name": "GlobalMaxPooling2D"}, "0 global average poolings"),
        ("hidden", {"activation": "tanh"}, "activation 'tanh', expected 'relu'"),
        ("last", {"activation": "sigmoid"}, "activation 'sigmoid', expected 'softmax'"),
        ("last", {"class_name": "Flatten"}, "1 dense layers"),
        ("conv1_pad", {"class_name": "Flatten"}, "ZeroPadding2D|Flatten 'conv1_pad'"),
        ("conv5_block3_add", {"class_name": "Multiply"}, "Multiply 'conv5_block3_add' is not in the network"),
        ("conv5_block3_out", {"class_name": "Mystery"}, "Mystery 'conv5_block3_out' is not in the network"),
    ],
)
def test_other_computations_are_refused(base, empty, name: str, changes: dict, message: str):
    image = keras.Input((224, 224, 3))
    pooled = layers.GlobalAveragePooling2D(name="avg_pool")(base(image))
    hidden = layers.Dense(256, "relu", name="hidden")(pooled)
    config = json.loads(keras.Model(image, layers.Dense(3, "softmax", name="last")(hidden)).to_json())
    assert graph(config, empty).dense == ("hidden", "last")
    with pytest.raises(ImportFileError, match=message):
        graph(changed(config, name, changes), empty)


def test_logits_and_mixed_precision_are_read(base, empty):
    image = keras.Input((224, 224, 3))
    hidden = layers.Dense(256, "relu", name="hidden", dtype="mixed_float16")(
        layers.GlobalAveragePooling2D()(base(image))
    )
    found = graph(keras.Model(image, layers.Dense(3, name="last")(hidden)), empty)
    assert found.dense == ("hidden", "last") and "mixed_float16" in str(found.notes)


@pytest.mark.parametrize(
    "config",
    [{}, [], 3, {"class_name": "Functional"}, {"class_name": "Functional", "config": {"layers": [{}]}}, {"class_name": "MyModel", "config": {}}],
    ids=str,
)  # fmt: skip
def test_configurations_of_something_else_are_refused(empty, config: Any):
    with pytest.raises(ImportFileError):
        graph(config, empty) if isinstance(config, dict) else read_graph(config, empty, ())


# --- files that are damaged, or are not what they say


@pytest.fixture(scope="module")
def plain(base: keras.Model) -> dict:
    """The configuration of a model that does nothing to its input."""
    return json.loads(with_front(base, lambda x: layers.RandomFlip()(x)).to_json())


def skeleton_of(
    config: dict, network: KerasResNet50, path: Path, weights: Mapping[str, torch.Tensor] | None = None
) -> Path:
    """A model's weights as Keras lays them out; None: all 0.5 and none of them stored, a small file."""
    heads = iter(("dense", "predictions"))
    with h5py.File(path, "w") as root:
        for place, layer in groups(config):
            ours = next(heads) if layer.kind == "Dense" else layer.name
            module = getattr(network, ours, None)
            if module is None:
                continue
            values = [p if weights is None else weights[f"{ours}.{name}"] for name, p in module.named_parameters()]
            if layer.kind == "BatchNormalization":
                statistics = ("running_mean", "running_var")
                values += values if weights is None else [weights[f"{ours}.{name}"] for name in statistics]
            else:
                values[0] = values[0].permute((2, 3, 1, 0) if values[0].ndim == 4 else (1, 0))
            variables = root.create_group(place).create_group("vars")
            variables.attrs["name"] = layer.name
            for number, value in enumerate(values):
                if weights is None:
                    variables.create_dataset(str(number), value.shape, "f4", chunks=True, fillvalue=0.5)
                else:
                    variables[str(number)] = value.detach().numpy()
    return path


@pytest.fixture
def skeleton(plain: dict, empty: KerasResNet50, tmp_path: Path) -> Path:
    return skeleton_of(plain, empty, tmp_path / "model.weights.h5")


def test_the_skeleton_is_read(skeleton: Path, empty):
    assert read_keras(skeleton, empty).weights.keys() == empty.state_dict().keys()


DENSE, CONV = "layers/dense/vars", "layers/functional/layers/conv2d_5/vars"  # the latter is conv2_block2_1_conv


def replace_dataset(path: str, make: Callable[[h5py.Group, str], Any]) -> Callable[[h5py.File], None]:
    def change(root: h5py.File) -> None:
        group, _, name = path.rpartition("/")
        del root[path]
        made = make(root[group], name)
        if made is not None:
            root[group][name] = made

    return change


def virtual(group: h5py.Group, name: str) -> None:
    group.create_virtual_dataset(name, h5py.VirtualLayout((256,), "f4"))


def rename(path: str, name: str) -> Callable[[h5py.File], None]:
    def change(root: h5py.File) -> None:
        root[path].attrs["name"] = name

    return change


def many_groups(root: h5py.File) -> None:
    """A group that is its own descendant: without end, but for the count."""
    root["layers/functional/layers"]["functional"] = root["layers/functional"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: root.pop("layers/dense"), r"1 dense layers \(dense_\d+\)"),
        (lambda root: root.pop(CONV), "1 missing"),
        (lambda root: root.pop(f"{CONV}/1"), "1 missing \\(conv"),
        (lambda root: root.copy(CONV, "layers/conv2d/vars"), "1 unexpected"),
        (lambda root: root[CONV].create_dataset("2", (3,), "f4"), "1 unexpected \\(conv.*/2"),
        (rename(CONV, "res2a_branch2a"), "1 missing .*1 unexpected \\(res2a_branch2a"),
        (rename(CONV, "conv1_conv"), "1 unexpected \\(conv1_conv"),
        (
            replace_dataset(f"{CONV}/1", lambda g, n: np.zeros(65, "f4")),
            r"of another shape or type \(conv.*\(65,\) float32",
        ),
        (replace_dataset(f"{CONV}/1", lambda g, n: np.zeros(64, "i1")), r"\(64,\) int8"),
        (
            replace_dataset(f"{CONV}/1", lambda g, n: g.create_dataset(n, (2**40,), "f4", chunks=True) and None),
            "1099511627776",
        ),
        (replace_dataset(f"{DENSE}/1", lambda g, n: h5py.ExternalLink("/etc/passwd", "/x")), "a ExternalLink"),
        (replace_dataset(f"{DENSE}/1", lambda g, n: h5py.SoftLink("/layers/dense/vars/0")), "a SoftLink"),
        (replace_dataset(f"{DENSE}/1", virtual), "lies in the file itself"),
        (
            replace_dataset(
                f"{DENSE}/1",
                lambda g, n: g.create_dataset(n, (256,), "f4", external=[("/etc/passwd", 0, 1024)]) and None,
            ),
            "lies in the file itself",
        ),
        (replace_dataset(CONV, lambda g, n: np.zeros(3)), "is no group"),
        (lambda root: root["layers/dense"].create_group("lora"), "holds 'lora'"),
        (lambda root: root.pop("layers"), "holds nothing"),
        (without_names, "does not say which layer it is"),
        (many_groups, "more than 2,000 groups"),
    ],
)
def test_weights_that_do_not_fit_or_lie_elsewhere_are_refused(skeleton: Path, empty, change: Callable, message: str):
    with h5py.File(skeleton, "r+") as root:
        change(root)
    with pytest.raises(ImportFileError, match=message):
        read_keras(skeleton, empty)


def zipped(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "holds nothing"),
        ({"config.json": b"{}"}, "0 members model.weights.h5"),
        ({"model.weights.h5": b""}, "0 members config.json, expected one; it holds model.weights.h5"),
        ({"config.json": b"{", "model.weights.h5": b""}, "JSONDecodeError"),
        ({"config.json": b"\xff\xfe", "model.weights.h5": b""}, "Decode"),
        ({"config.json": b"[" * 200_000, "model.weights.h5": b""}, "RecursionError"),
        ({"config.json": b"{}", "model.weights.h5": b"no HDF5"}, "OSError"),
        ({"config.json": b" " * 2000, "model.weights.h5": b""}, "more than 1,000 bytes"),
    ],
)
def test_zips_of_something_else_are_refused(tmp_path: Path, empty, monkeypatch, members: dict, message: str):
    if "1,000" in message:
        monkeypatch.setattr(keras_file, "_MAX_CONFIG", 1000)
    path = zipped(tmp_path / "a.keras", members)
    if not members:
        path.write_bytes(b"PK\3\4" + path.read_bytes())
    with pytest.raises(ImportFileError, match=message):
        read_keras(path, empty)


def test_files_of_something_else_are_refused(tmp_path: Path, empty, skeleton: Path):
    with pytest.raises(ImportFileError, match="there is no file"):
        read_keras(tmp_path / "absent.keras", empty)
    for content, message in (
        (b"", "starts with nothing"),
        (b"hello world", "68 65 6c 6c 6f"),
        (b"PK\3\4 and no more", "BadZipFile"),
        (b"\x89HDF\r\n\x1a\n and no more", "damaged"),
        (skeleton.read_bytes()[:5000], "damaged"),
    ):
        path = tmp_path / "file.keras"
        path.write_bytes(content)
        with pytest.raises(ImportFileError, match=message):
            read_keras(path, empty)


@pytest.mark.parametrize("kind", ["zip", "HDF5"])
def test_damage_is_refused_or_does_not_matter(plain: dict, skeleton: Path, tmp_path: Path, empty, kind: str):
    path, generator = tmp_path / "damaged", random.Random(0)
    data = skeleton.read_bytes()
    if kind == "zip":
        members = {"config.json": json.dumps(plain).encode(), "model.weights.h5": data}
        data = zipped(tmp_path / "whole.keras", members).read_bytes()
    refused = 0
    for _ in range(25):
        damaged = bytearray(data)
        for _ in range(40):
            damaged[generator.randrange(8, len(damaged))] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            read_keras(path, empty)
        except ImportFileError:
            refused += 1
    assert refused


# --- trained or not


def trained() -> KerasResNet50:
    torch.manual_seed(0)
    made = network()
    with torch.no_grad():
        for name, value in made.state_dict().items():
            if name.endswith(("running_var", "dense.bias", "predictions.bias")):
                value += 0.5
    return made


def test_trained_weights_pass():
    assert require_trained(trained()) == []


@pytest.mark.parametrize(
    ("fresh", "finding"),
    [
        ("dense.bias", "layer 'dense' has a bias of exactly 0 throughout"),
        ("predictions.bias", "layer 'predictions' has a bias of exactly 0 throughout"),
        ("conv1_bn.running_var", "layer 'network' never saw a batch: conv1_bn still has running mean 0 and variance 1"),
    ],
)
def test_weights_as_keras_draws_them_are_refused(fresh: str, finding: str):
    made = trained()
    made.state_dict()[fresh].fill_(1 if fresh.endswith("running_var") else 0)
    with pytest.raises(UntrainedError, match=f"not trained weights:\n  {finding}"):
        require_trained(made)


# --- from file to checkpoint


@pytest.mark.parametrize("name", SAVED)
def test_behind_the_apps_own_lines_a_model_answers_as_the_app_does(files: Path, models, tmp_path: Path, name: str):
    """Pictures read, resized and preprocessed as in the deployed program, and Keras' own predict."""
    out, variant = tmp_path / "best.pth", ARCHIVE / "variants" / "app_py.yaml"
    request = ImportRequest(ARCHIVE, files / name, out, variant, DEFINITION.classes)
    result = import_file(request)
    assert result.classes == DEFINITION.classes and "orientation: stored" not in result.text()
    pipeline = Pipeline.from_yaml(variant)
    expected = models["flat"].predict(np.concatenate([app(data) for data in FILES.values()]), verbose=0)
    outputs = EagerRuntime(
        network_of(load_checkpoint(out), replace(DEFINITION, pipeline=pipeline)), torch.device("cpu")
    )([pipeline(data) for data in FILES.values()])
    probabilities = np.stack([o["class_probabilities"].numpy() for o in outputs])
    out.unlink()
    # As above: 53 convolutions in another order.
    assert np.abs(probabilities - expected).max() <= 5e-5


def test_what_keras_loaders_leave_out_is_said(base, empty, tmp_path: Path):
    path = model_file(base, empty, tmp_path, lambda x: x, nothing)
    result = import_file(ImportRequest(ARCHIVE, path, tmp_path / "best.pth", classes=DEFINITION.classes))
    (note,) = (line for line in result.text().splitlines() if "Keras' loaders" in line)
    for part in (
        "leave a picture as it is stored and drop its alpha",
        "pipeline 'portrait' turns it upright (orientation: upright)",
        "blends transparent pixels with [255, 255, 255] (background)",
        "set orientation: stored and background: [] in decode_image",
        "variants/app_py.yaml, ",
        "variants/image_dataset_from_directory.yaml, ",
        "variants/load_img.yaml have both",
    ):
        assert part in note
    assert "rgb_order" not in note


def test_a_model_becomes_a_checkpoint(files: Path, theirs, tmp_path: Path):
    out = tmp_path / "run" / "best.pth"
    result = import_file(ImportRequest(ARCHIVE, files / "augmented.keras", out, classes=DEFINITION.classes))
    printed = result.text()
    assert "animal, avatar, human" in printed and "caffe_preprocess" in printed and "RandomFlip" in printed
    assert "note: what training computed is not in the file: evaluation cannot check itself against it" in printed
    assert (result.format, result.stages, result.warning()) == ("keras", ("caffe_preprocess",), "")
    checkpoint = load_checkpoint(out)
    assert checkpoint["pipeline_fingerprint"] == PIPELINE.fingerprint
    assert checkpoint["imported_from"]["format"] == "keras" and checkpoint["validation_scores"] == {}
    (outputs,) = EagerRuntime(network_of(checkpoint, DEFINITION), torch.device("cpu"))([PIPELINE(FILES["photo.jpg"])])
    assert np.abs(outputs["class_probabilities"].numpy() - theirs[0]).max() <= 5e-5
    with pytest.raises(ImportFileError, match="exists"):
        import_file(ImportRequest(ARCHIVE, files / "augmented.keras", out, classes=DEFINITION.classes))
    shutil.rmtree(out.parent)


def nothing(_: h5py.File) -> None: ...


def fresh_head(root: h5py.File) -> None:
    root["layers/dense_1/vars/1"][...] = 0


def with_nan(root: h5py.File) -> None:
    root["layers/dense/vars/0"][3, 4] = np.nan


def model_file(base, empty, folder: Path, front: Callable, change: Callable) -> Path:
    """A `.keras` file with something in front of the network, and with changed weights."""
    model = with_front(base, front).to_json()
    weights = skeleton_of(json.loads(model), empty, folder / "weights.h5", trained().state_dict())
    with h5py.File(weights, "r+") as root:
        change(root)
    members = {"config.json": model.encode(), "model.weights.h5": weights.read_bytes()}
    weights.unlink()
    return zipped(folder / "model.keras", members, zipfile.ZIP_STORED)


@pytest.mark.parametrize(
    ("front", "archive", "change", "message"),
    [
        (lambda x: layers.Rescaling(1 / 255)(x), ARCHIVE, nothing, "standardize:"),
        (lambda x: x, ARCHIVE, fresh_head, "layer 'predictions' has a bias of exactly 0 throughout"),
        (lambda x: x, ARCHIVE, with_nan, "dense.weight has 1 of"),
        (lambda x: layers.Lambda(lambda y: y)(x), ARCHIVE, nothing, "Lambda"),
        (lambda x: x, ROOT / "archive" / "cough", nothing, "expected keras_resnet50"),
    ],
    ids=["another pipeline", "fresh head", "NaN", "Lambda", "another archive"],
)
def test_what_cannot_be_imported_is_an_error_and_leaves_nothing(
    base, empty, tmp_path: Path, front: Callable, archive: Path, change: Callable, message: str
):
    path = model_file(base, empty, tmp_path, front, change)
    with pytest.raises(ValueError) as error:
        import_file(ImportRequest(archive, path, tmp_path / "run" / "best.pth", classes=DEFINITION.classes))
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("form", "kind"),
    [*(("keras", kind) for kind in KINDS), *(("h5", kind) for kind in ("all 0.5", "variance -1", "one NaN"))],
)
def test_degenerate_weights_are_refused(plain: dict, empty, tmp_path: Path, form: str, kind: str):
    weights = degenerate(kind, trained().state_dict(), "predictions")
    path = skeleton_of(plain, empty, tmp_path / "model.h5", weights)
    if form == "keras":
        members = {"config.json": json.dumps(plain).encode(), "model.weights.h5": path.read_bytes()}
        path = zipped(tmp_path / "model.keras", members, zipfile.ZIP_STORED)
    with pytest.raises(CheckpointError, match=KINDS[kind][1]):
        import_file(ImportRequest(ARCHIVE, path, tmp_path / "run" / "best.pth"))
    assert not (tmp_path / "run").exists()
    shutil.rmtree(tmp_path)


def test_layers_that_are_rightly_so_can_be_named(base, empty, tmp_path: Path):
    """One that the pipeline replaces, and a head without a bias."""
    path = model_file(base, empty, tmp_path, lambda x: layers.Lambda(lambda y: y, name="pre")(x), fresh_head)
    out = tmp_path / "best.pth"
    request = ImportRequest(
        ARCHIVE, path, out, classes=DEFINITION.classes, replaced=["pre"], accept_untrained=["predictions"]
    )
    result = import_file(request)
    assert "note: left out, as you say that the pipeline does their work: pre" in result.text()
    assert "note: accepted although it looks untrained: layer 'predictions'" in result.text()
    assert load_checkpoint(out)["accepted_untrained"] == ["predictions"]
    out.unlink()


def test_the_command_imports_a_model(base, empty, tmp_path: Path):
    path = model_file(base, empty, tmp_path, lambda x: layers.Lambda(lambda y: y, name="pre")(x), nothing)
    out = tmp_path / "best.pth"
    refused = run_skewless("import", ARCHIVE, path, "--out", out, check=False)
    assert refused.returncode == 2 and "Lambda 'pre'" in refused.stderr and not out.exists()
    result = run_skewless(
        "import", ARCHIVE, path, "--out", out, "--replaced", "pre", "--classes", "animal,avatar,human"
    )
    assert "animal, avatar, human" in result.stdout and "left out, as you say" in result.stdout
    out.unlink()
