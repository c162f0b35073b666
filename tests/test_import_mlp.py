"""Multilayer perceptrons that Keras saved, with scikit-learn's scaler: the same probabilities from the same recordings."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import joblib
import librosa
import numpy as np
import pytest
import sklearn
import soundfile
import torch
import yaml
from numpy.typing import NDArray
from sklearn.preprocessing import StandardScaler

from skewless.core.definition import Definition
from skewless.core.networks import build_network
from skewless.core.networks.mlp import MLP
from skewless.core.stages import InputError, Signal
from skewless.core.stages.voice import RemoveSilence, VoiceFeatures
from skewless.evaluation.scores import service_of
from skewless.importers import keras_graph
from skewless.importers.errors import ImportFileError
from skewless.importers.keras_mlp import read_keras_mlp, shape_of
from skewless.importers.run import ImportRequest, import_file
from skewless.training.checkpoint import file_digest, load_checkpoint, network_of, trained
from tests.conftest import ROOT, call_skewless
from tests.keras_on_torch import keras
from tests.oracles import librosa_voice
from tests.recordings import one_thread  # noqa: F401
from tests.test_talent import sung

ARCHIVE = ROOT / "archive" / "talent"
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")
layers = keras.layers
SHAPE = {"inputs": 37, "hidden": [256, 128, 64, 32], "dropout": [0.3, 0.3, 0.2, 0.2]}
SIZES = list(zip(SHAPE["hidden"], SHAPE["dropout"], strict=True))


def talent() -> keras.Model:
    """As the public script behind the document builds it."""
    model = keras.Sequential([layers.Input((37,))])
    for units, rate in SIZES[:-1]:
        model.add(layers.Dense(units, activation="relu"))
        model.add(layers.Dropout(rate))
        model.add(layers.BatchNormalization())
    model.add(layers.Dense(32, activation="relu"))
    model.add(layers.Dropout(0.2))
    model.add(layers.Dense(1, activation="sigmoid"))
    return model


def other_order() -> keras.Model:
    """Dropout behind batch normalisation, activations as layers of their own, and a logit at the end."""
    model = keras.Sequential()
    for k, (units, rate) in enumerate(SIZES):
        model.add(layers.Dense(units))
        model.add(layers.ReLU() if k % 2 else layers.Activation("relu"))
        if k < 3:
            model.add(layers.BatchNormalization())
        model.add(layers.Dropout(rate))
    model.add(layers.Dense(1))
    model.build((None, 37))
    return model


def functional() -> keras.Model:
    """A functional model around two Sequential ones, with noise in training, and a sigmoid as a layer of its own. The last
    layer is made first, so that its name counts lower."""
    last = layers.Dense(1)
    first = keras.Sequential([layers.Dense(256, "relu"), layers.Dropout(0.3), layers.BatchNormalization()])
    second = keras.Sequential([layers.Dense(64, "relu"), layers.BatchNormalization(), layers.Dense(32, "relu")])
    given = keras.Input((37,))
    x = first(layers.GaussianNoise(0.1)(given))
    x = layers.BatchNormalization()(layers.Dense(128, activation="relu")(x))
    return keras.Model(given, layers.Activation("sigmoid")(last(second(x))))


LAYOUTS: dict[str, Callable[[], keras.Model]] = {"talent": talent, "other order": other_order, "functional": functional}


def rows(count: int = 200, seed: int = 0) -> NDArray[np.float64]:
    """Features of very different sizes, (count, 37)."""
    spread = np.random.default_rng(9)
    sizes, means = 10.0 ** spread.uniform(-3, 4, 37), spread.uniform(-300, 300, 37)
    return np.random.default_rng(seed).standard_normal((count, 37)) * sizes + means


SCALER = StandardScaler().fit(rows())


def train(model: keras.Model, inputs: NDArray, steps: int = 40) -> keras.Model:
    """Until its answers are neither certain nor all the same."""
    keras.utils.set_random_seed(2)
    labels = (inputs[:, :5].sum(axis=1) > 0).astype(np.float32)
    logit = model.layers[-1].get_config().get("activation") == "linear"
    model.compile("adam", keras.losses.BinaryCrossentropy(from_logits=logit))
    for _ in range(steps):
        model.train_on_batch(inputs, labels)
    return model


@pytest.fixture(scope="module")
def models() -> dict[str, keras.Model]:
    keras.utils.set_random_seed(1)
    return {name: train(make(), SCALER.transform(rows())) for name, make in LAYOUTS.items()}


@pytest.fixture(scope="module")
def files(models: dict[str, keras.Model], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every layout, as Keras saves it in each format."""
    folder = tmp_path_factory.mktemp("models")
    for name, model in models.items():
        model.save(folder / f"{name}.keras")
        model.save(folder / f"{name}.h5")
        model.save_weights(folder / f"{name}.weights.h5")
    return folder


SAVED = [f"{name}.{suffix}" for name in LAYOUTS for suffix in ("keras", "h5", "weights.h5")]
SAVED.remove("functional.weights.h5")


def network(**changes: Any) -> MLP:
    made = build_network({"mlp": SHAPE | changes})
    assert isinstance(made, MLP)
    return made.eval()


def ours(network: MLP, inputs: NDArray) -> NDArray[np.float32]:
    """Probabilities (N,) of scaled features (N, 37), one input after the other, as they are served."""
    with torch.no_grad():
        encoded = [network.encode(torch.from_numpy(row.astype(np.float32))[None]) for row in inputs]
        return np.array([network.head(each)["probability"].item() for each in encoded])


def theirs(model: keras.Model, inputs: NDArray) -> NDArray[np.float32]:
    found = model.predict(inputs, verbose=0)[:, 0]
    logit = model.layers[-1].get_config().get("activation") == "linear"
    found = 1 / (1 + np.exp(-found.astype(np.float64))) if logit else found
    # For a comparison to mean something.
    assert np.ptp(found) > 0.3 and np.unique(found.round(4)).size > len(found) / 2
    return found


@pytest.mark.parametrize("name", SAVED)
def test_every_kind_of_file_gives_the_same_probabilities(files: Path, models, name: str):
    """6e-8 to 1.2e-7 measured: float32 sums of up to 256 products, in another order."""
    imported = network()
    found = read_keras_mlp(files / name, imported)
    imported.load_state_dict(found.weights)
    inputs = SCALER.transform(rows(seed=1))
    assert np.abs(ours(imported, inputs) - theirs(models[name.split(".")[0]], inputs)).max() <= 1e-6
    assert (found.format, found.sha256) == ("keras", file_digest(files / name))


@pytest.mark.parametrize("name", SAVED)
def test_the_weights_are_kerass(files: Path, models, name: str):
    found = read_keras_mlp(files / name, network()).weights
    assert found.keys() == network().state_dict().keys()
    model = models[name.split(".")[0]]
    kernels = [layer.kernel for layer in flat(model) if isinstance(layer, layers.Dense)]
    moving = [layer.moving_variance for layer in flat(model) if isinstance(layer, layers.BatchNormalization)]
    places = [*(f"hidden.{k}.linear" for k in range(4)), "output"]
    for place, kernel in zip(places, kernels, strict=True):
        assert np.array_equal(found[f"{place}.weight"].numpy(), keras.ops.convert_to_numpy(kernel).T)
    for k, variance in enumerate(moving):
        assert np.array_equal(found[f"hidden.{k}.norm.running_var"].numpy(), keras.ops.convert_to_numpy(variance))


def flat(model: keras.Model) -> list[Any]:
    """A model's layers in order, those of nested models in place of the model."""
    return [inner for layer in model.layers for inner in (flat(layer) if hasattr(layer, "layers") else [layer])]


def keras_2(path: Path) -> Path:
    """An `.h5` file as Keras 2 writes it: variables with ":0" below the layer's name alone, and its configuration."""
    with h5py.File(path, "r+") as root:
        top = root["model_weights"]
        for layer in [str(name) for name in top.attrs["layer_names"]]:
            group = top[layer]
            names = [str(name) for name in group.attrs["weight_names"]]
            renamed = [f"{layer}/{name.split('/')[-1]}:0" for name in names]
            for old, new in zip(names, renamed, strict=True):
                group.move(old, f"moved/{new}")
            if names:
                group.move(f"moved/{layer}", f"{layer}_")
                for left in set(group) - {f"{layer}_"}:
                    del group[left]
                group.move(f"{layer}_", layer)
            group.attrs["weight_names"] = renamed
        del top.attrs["keras_version"]
        top.attrs["keras_version"] = "2.13.1"
        config = json.loads(root.attrs["model_config"])
        for entry in config["config"]["layers"]:
            entry["config"]["dtype"] = "float32"
            if entry["class_name"] == "InputLayer":
                entry["config"]["batch_input_shape"] = entry["config"].pop("batch_shape")
            if entry["class_name"] == "BatchNormalization":
                entry["config"]["axis"] = [1]
        root.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": config["config"]})
    return path


def test_files_of_keras_2_are_read(files: Path, tmp_path: Path):
    old = keras_2(Path(shutil.copy(files / "talent.h5", tmp_path)))
    with h5py.File(old) as root:
        # Keras counts its layers across a session.
        first = next(name for name in root["model_weights"].attrs["layer_names"] if str(name).startswith("dense"))
        assert root[f"model_weights/{first}"].attrs["weight_names"].tolist() == [f"{first}/kernel:0", f"{first}/bias:0"]
    found, expected = (read_keras_mlp(path, network()) for path in (old, files / "talent.keras"))
    assert all(torch.equal(found.weights[name], value) for name, value in expected.weights.items())
    assert "written by Keras 2.13.1" in found.notes
    with h5py.File(old, "r+") as root:
        del root.attrs["model_config"]
    found = read_keras_mlp(old, network())
    assert all(torch.equal(found.weights[name], value) for name, value in expected.weights.items())


@pytest.mark.parametrize(
    ("name", "dropout"),
    [
        ("talent.keras", SHAPE["dropout"]),
        ("talent.h5", SHAPE["dropout"]),
        ("other order.keras", SHAPE["dropout"]),
        ("functional.h5", [0.3, 0.0, 0.0, 0.0]),
        ("talent.weights.h5", [0.0] * 4),
    ],
)
def test_the_shape_is_read_off_a_file(files: Path, name: str, dropout: list[float]):
    found = shape_of(files / name)
    assert found == SHAPE | {"dropout": dropout}
    assert json.loads(json.dumps(found)) == found
    build_network({"mlp": found}).load_state_dict(read_keras_mlp(files / name, network()).weights)


def test_notes_say_what_a_file_does_not(files: Path):
    notes = read_keras_mlp(files / "talent.keras", network()).notes
    assert "the model does nothing to its input: what it was trained behind is not said" in notes
    assert any("class that training called 1, the archive's second" in note for note in notes)
    assert any("Dropout 'dropout" in note for note in notes) and any("optimizer" in note for note in notes)
    notes = read_keras_mlp(files / "talent.weights.h5", network()).notes
    assert "it holds weights alone: what its layers compute, and what comes before them, is not known" in notes
    notes = read_keras_mlp(files / "other order.keras", network()).notes
    assert "its output is a logit: the archive answers with its sigmoid" in notes
    notes = read_keras_mlp(files / "functional.keras", network()).notes
    assert any("dropout [0.3, 0.0, 0.0, 0.0], model.yaml [0.3, 0.3, 0.2, 0.2]: only training" in note for note in notes)
    assert any("GaussianNoise" in note for note in notes)


def test_weights_alone_of_models_within_a_model_are_refused(files: Path):
    """By their groups' names the first hidden layer would come last."""
    for read in (lambda path: read_keras_mlp(path, network()), shape_of):
        with pytest.raises(ImportFileError, match=r"which layer follows which is not in it; give the \.keras or \.h5"):
            read(files / "functional.weights.h5")


# --- what is another network


def small(*inner: Any, last: Any = None) -> keras.Model:
    return keras.Sequential([layers.Input((3,)), *inner, last or layers.Dense(1, activation="sigmoid")])


def plain(units: int = 4, norm: bool = True, **changes: Any) -> list[Any]:
    dense = layers.Dense(units, **({"activation": "relu"} | changes))
    return [dense, layers.BatchNormalization()] if norm else [dense]


def residual() -> keras.Model:
    given = keras.Input((3,))
    x = layers.Dense(3, "relu")(given)
    return keras.Model(given, layers.Dense(1, "sigmoid")(layers.Add()([given, x])))


def branches() -> keras.Model:
    given = keras.Input((3,))
    first = layers.Dense(3, "relu")(given)
    return keras.Model(given, layers.Dense(1, "sigmoid")(layers.Dense(3, "relu")(first) * first))


def two_outputs() -> keras.Model:
    given = keras.Input((3,))
    x = layers.Dense(4, "relu", name="inner")(given)
    return keras.Model(given, [layers.Dense(1, "sigmoid", name="last")(x), x])


def two_inputs() -> keras.Model:
    given = [keras.Input((3,), name="left"), keras.Input((3,), name="right")]
    return keras.Model(given, layers.Dense(1, "sigmoid")(layers.Dense(4, "relu")(given[1])))


def relu_6() -> keras.Model:
    return small(layers.Dense(4), layers.ReLU(max_value=6.0))


OTHERS: dict[str, tuple[Callable[[], keras.Model], str]] = {
    "epsilon": (
        lambda: small(layers.Dense(4, "relu"), layers.BatchNormalization(epsilon=1e-5), *plain(norm=False)),
        "has the epsilon 1e-05, expected 0.001",
    ),
    "tanh": (lambda: small(*plain(norm=False, activation="tanh")), "hidden layer 1, 'dense.*has the activation 'tanh', expected 'relu'"),
    "no activation": (lambda: small(*plain(norm=False, activation=None)), "has the activation 'linear', expected 'relu'"),
    "leaky": (lambda: small(layers.Dense(4), layers.LeakyReLU()), "LeakyReLU 'leaky_re_lu.*no such layer there.*your-own-model.md"),
    "ReLU 6": (relu_6, "ReLU 're_lu.*no such layer there"),
    "norm before ReLU": (
        lambda: small(layers.Dense(4), layers.BatchNormalization(), layers.Activation("relu"), *plain(norm=False)),
        "Activation 'activation.*stands behind 'dense.*no such layer there",
    ),
    "norm twice": (lambda: small(*plain(), layers.BatchNormalization(), *plain(norm=False)), "BatchNormalization '.*no such layer"),
    "norm first": (lambda: small(layers.BatchNormalization(), *plain(norm=False)), "BatchNormalization '.*before the first dense layer"),
    "norm in the last hidden layer": (lambda: small(*plain()), "hidden layer 1, .* has a batch normalisation, expected none"),
    "no norm": (lambda: small(*plain(norm=False), *plain(norm=False)), "hidden layer 1, .* has no batch normalisation, expected one"),
    "norm of the output": (
        lambda: keras.Sequential([small(*plain(norm=False)), layers.BatchNormalization()]),
        "the output, 'dense.*has a batch normalisation, expected none",
    ),
    "softmax": (
        lambda: small(*plain(norm=False), last=layers.Dense(2, activation="softmax")),
        r"softmax over 2 units, expected one unit with a sigmoid\. In Keras, replace it",
    ),
    "three classes": (lambda: small(*plain(norm=False), last=layers.Dense(3, "softmax")), "has 3 units and the activation 'softmax'"),
    "output": (lambda: small(*plain(norm=False), last=layers.Dense(1, "tanh")), "has 1 units and the activation 'tanh'"),
    "Normalization": (
        lambda: small(layers.Normalization(mean=[1.0] * 3, variance=[2.0] * 3), *plain(norm=False)),
        "Normalization '.*which the stage standard_scaler does in the archive: build the model without",
    ),
    "layer norm": (lambda: small(*plain(norm=False), layers.LayerNormalization()), "LayerNormalization '.*no such layer there"),
    "Lambda": (lambda: small(*plain(norm=False), layers.Lambda(lambda x: 2 * x, output_shape=(4,))), "Lambda '.*no such layer there"),
    "one layer": (lambda: small(), "the model has 1 dense layers, expected a hidden one"),
    "skip": (residual, "gets its input from .*: the model is no chain of layers"),
    "branches": (branches, "gets its input from .*: the model is no chain of layers"),
    "two outputs": (two_outputs, "the model's output is not that of its last layer '.*' alone"),
    "two inputs": (two_inputs, "'left' gets its input from outside, not from 'dense"),
    "no bias": (lambda: small(*plain(norm=False, use_bias=False)), "1 missing \\(dense.*/bias\\)"),
    "no scale": (
        lambda: small(layers.Dense(4, "relu"), layers.BatchNormalization(scale=False), *plain(norm=False)),
        "do not fit the network: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_another_network_is_refused(tmp_path: Path, name: str, suffix: str):
    make, message = OTHERS[name]
    path = tmp_path / f"model.{suffix}"
    make().save(path)
    with pytest.raises(ImportFileError, match=message):
        # Of the size that the file has, so that what it computes is what is wrong.
        read_keras_mlp(path, network(**shape_of(path)))


def test_a_layer_that_keras_2_calls_as_in_training_is_refused():
    """Keras 3 overrules that when it predicts."""
    entries = [{"class_name": "InputLayer", "config": {"name": "given"}, "inbound_nodes": []}]
    for training in (False, True):
        node = [[["given", 0, 0, {"training": training}]]]
        dropout = {"class_name": "Dropout", "config": {"name": "dropout", "rate": 0.5}, "inbound_nodes": node}
        model = {"class_name": "Functional", "config": {"layers": [*entries, dropout]}}
        if training:
            with pytest.raises(ImportFileError, match="'dropout' is called with training=True"):
                keras_graph.layers(model)
        else:
            assert [layer.name for layer in keras_graph.layers(model)] == ["given", "dropout"]
    given = keras.Input((3,))
    model = keras.Model(given, layers.Dropout(0.5)(given, training=True))
    assert np.array_equal(model.predict(np.ones((9, 3)), verbose=0), np.ones((9, 3)))


def test_a_softmax_of_two_is_what_the_message_makes_of_it(tmp_path: Path):
    softmax = small(*plain(norm=False), last=layers.Dense(2, activation="softmax"))
    sigmoid = small(*plain(norm=False))
    kernel, bias = softmax.layers[-1].get_weights()
    sigmoid.layers[0].set_weights(softmax.layers[0].get_weights())
    sigmoid.layers[-1].set_weights([kernel[:, 1:] - kernel[:, :1], bias[1:] - bias[:1]])
    sigmoid.save(tmp_path / "model.keras")
    imported = network(inputs=3, hidden=[4], dropout=[0.0])
    imported.load_state_dict(read_keras_mlp(tmp_path / "model.keras", imported).weights)
    inputs = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
    assert np.abs(ours(imported, inputs) - softmax.predict(inputs, verbose=0)[:, 1]).max() <= 1e-6


@pytest.mark.parametrize("suffix", ["keras", "h5", "weights.h5"])
def test_another_size_is_refused_with_the_line_to_write(tmp_path: Path, suffix: str):
    model = small(*plain(6), layers.Dropout(0.25), *plain(4, norm=False))
    path = tmp_path / f"model.{suffix}"
    model.save_weights(path) if "weights" in suffix else model.save(path)
    with pytest.raises(
        ImportFileError, match=r"takes 3 features and has hidden layers of \[6, 4\] units; .* has 37 and \[256"
    ) as error:
        read_keras_mlp(path, network())
    line = yaml.safe_load(str(error.value).splitlines()[-1])
    assert line["network"]["mlp"]["dropout"] == ([0.0, 0.0] if "weights" in suffix else [0.25, 0.0])
    read_keras_mlp(path, build_network(line["network"]))


def without(part: str) -> Callable[[h5py.File], None]:
    return lambda root: root.__delitem__(part)


def one_more_norm(root: h5py.File) -> None:
    root.copy("layers/batch_normalization_2", "layers/batch_normalization_3")
    root["layers/batch_normalization_3/vars"].attrs["name"] = "another"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("layers/dense_1"), "it takes 37 features and has hidden layers"),
        (without("layers/batch_normalization_1"), "1 missing .*of another shape"),
        (without("layers/dense/vars/1"), r"1 missing \(dense"),
        (one_more_norm, "1 unexpected .*another"),
        (lambda root: root.copy("layers/dense_4", "layers/dense_5"), r"hidden layers of \[256, 128, 64, 32, 1\]"),
        (without("layers"), "holds"),
    ],
)
def test_weights_that_do_not_fit_are_refused(files: Path, tmp_path: Path, change: Callable, message: str):
    path = Path(shutil.copy(files / "talent.weights.h5", tmp_path))
    with h5py.File(path, "r+") as root:
        change(root)
    with pytest.raises(ImportFileError, match=message):
        read_keras_mlp(path, network())


def test_files_of_something_else_are_refused(tmp_path: Path, files: Path):
    path = tmp_path / "model.keras"
    for data, message in (
        (b"hello", "68 65 6c 6c 6f"),
        (b"PK\3\4 cut", "damaged"),
        ((files / "talent.h5").read_bytes()[:3000], "damaged"),
    ):
        path.write_bytes(data)
        for read in (lambda: read_keras_mlp(path, network()), lambda: shape_of(path)):
            with pytest.raises(ImportFileError, match=message):
                read()
    with pytest.raises(ImportFileError, match="there is no file"):
        shape_of(tmp_path / "absent.keras")


# --- from files to served numbers


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive with the names and the order of their classes."""
    folder = tmp_path_factory.mktemp("archive") / "talent"
    shutil.copytree(ARCHIVE, folder)
    model = (folder / "model.yaml").read_text(encoding="utf-8")
    assert model.count("classes: [poor, good]") == 1
    (folder / "model.yaml").write_text(model.replace("[poor, good]", "[bad, good]"), encoding="utf-8")
    return folder


@pytest.fixture
def scaler(tmp_path: Path) -> Path:
    (tmp_path / "scaler.pkl").write_bytes(pickle.dumps(SCALER))
    return tmp_path / "scaler.pkl"


@pytest.mark.parametrize("name", ["talent.keras", "talent.h5", "talent.weights.h5"])
def test_model_and_scaler_become_a_checkpoint(
    archive: Path, files: Path, models, scaler: Path, tmp_path: Path, name: str
):
    """Features to probability: the checkpoint's scaler and network against scikit-learn's and Keras'."""
    result = import_file(
        ImportRequest(archive, files / name, tmp_path / "best.pth", classes=("bad", "good"), scaler=scaler)
    )
    assert (result.format, result.classes) == ("keras", ("bad", "good"))
    assert (
        f"note: the scaler is scikit-learn {sklearn.__version__}'s StandardScaler, fitted to 37 features"
        in result.text()
    )
    assert not any("another pipeline" in note for note in result.notes)
    checkpoint = load_checkpoint(tmp_path / "best.pth")
    assert checkpoint["imported_from"]["scaler_sha256"] == file_digest(scaler)
    definition = trained(Definition.read(archive), checkpoint)
    stage = definition.pipeline.stages["standard_scaler"]
    assert stage.std == tuple(SCALER.scale_.tolist())
    data = rows(seed=3)
    scaled = stage(Signal(torch.from_numpy(data))).data.numpy()
    assert np.array_equal(scaled, SCALER.transform(data).astype(np.float32))
    imported = network_of(checkpoint, definition)
    assert isinstance(imported, MLP)
    assert np.abs(ours(imported, scaled) - theirs(models["talent"], SCALER.transform(data))).max() <= 1e-6


def test_the_command_takes_a_scaler(archive: Path, files: Path, scaler: Path, tmp_path: Path):
    arguments = ("import", archive, files / "talent.h5", "--out", tmp_path / "run" / "best.pth")
    refused = call_skewless(*arguments)
    assert refused.returncode == 2 and "StandardScaler as --scaler" in refused.stderr
    refused = call_skewless(*arguments, "--scaler", files / "talent.h5")
    assert refused.returncode == 2 and "is not taken as a scaler" in refused.stderr
    refused = call_skewless(*arguments, "--scaler", scaler, "--replaced", "dense")
    assert refused.returncode == 2 and "the network is mlp" in refused.stderr
    assert not (tmp_path / "run").exists()
    done = call_skewless(*arguments, "--scaler", scaler, "--classes", "bad,good", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["pipeline_name"] == "talent"
    assert load_checkpoint(tmp_path / "run" / "best.pth")["imported_from"]["format"] == "keras"


def recording(seed: int, rate: int) -> bytes:
    """A sung phrase as a WAV file of 32-bit floats."""
    wave = sung(1.0 + 0.1 * (seed % 5), seed)[0]
    if rate != 22050:
        wave = librosa.resample(wave, orig_sr=22050, target_sr=rate)
    file = io.BytesIO()
    soundfile.write(file, wave, rate, "FLOAT", format="WAV")
    return file.getvalue()


def their_features(data: bytes, definition: Definition) -> NDArray[np.float64]:
    """As the script gets them: librosa's own functions, one after the other."""
    stages = definition.pipeline.stages
    silence, voice = stages["remove_silence"], stages["voice_features"]
    assert isinstance(silence, RemoveSilence) and isinstance(voice, VoiceFeatures)
    wave, rate = librosa.load(io.BytesIO(data), sr=22050)
    return librosa_voice.features(librosa_voice.remove_silence(wave, silence), int(rate), voice).astype(np.float64)


def test_recordings_get_the_probabilities_of_their_service(archive: Path, tmp_path: Path):
    """The whole way, each side its own: librosa, scikit-learn and Keras against an imported checkpoint's service."""
    definition = Definition.read(archive)
    data = [recording(seed, rate) for seed, rate in enumerate((22050, 44100, 48000, 16000) * 3)]
    table = np.stack([their_features(each, definition) for each in data])
    fitted = StandardScaler().fit(table)
    joblib.dump(fitted, tmp_path / "scaler.joblib", compress=3)
    keras.utils.set_random_seed(4)
    model = train(talent(), fitted.transform(table))
    model.save(tmp_path / "model.h5")
    request = ImportRequest(
        archive,
        tmp_path / "model.h5",
        tmp_path / "best.pth",
        classes=("bad", "good"),
        scaler=tmp_path / "scaler.joblib",
    )
    import_file(request)
    service = service_of(definition, load_checkpoint(tmp_path / "best.pth"), torch.device("cpu"))
    served = np.array([service.score([each])[0].scores[0] for each in data])
    assert np.abs(served - theirs(model, fitted.transform(table))).max() <= 1e-5
    with pytest.raises(InputError, match="every sample is 0"):
        service.score([silent()])


def silent() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(22050, np.float32), 22050, "FLOAT", format="WAV")
    return file.getvalue()
