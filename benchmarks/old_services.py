"""Five services taken over: each answers by the libraries that its document names, and `skewless adopt` has to find its pipeline.

    python -m benchmarks.old_services --out /tmp/adopted

For each service the weights of a demonstration (made on the first call, some minutes) are saved as its own framework saves them,
and its own lines answer some labelled files: nothing of Skewless runs in an answer. The commands that take it over are
printed and run. Writes old_services.md, and a folder for each service with the page of its adoption.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import io
import json
import pickle
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import librosa
import numpy as np
import onnxruntime
import soundfile
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.preprocessing import StandardScaler
from torch import nn
from torchvision.models import resnet18

from benchmarks.command import scratch_folder
from skewless.adoption.report import size_text
from skewless.core.definition import Definition
from skewless.core.files import atomic
from skewless.core.networks.resnet_fastai import AdaptiveConcatPool2d
from skewless.core.stages.voice import RemoveSilence, VoiceFeatures
from skewless.packaging.export import export_checkpoint
from skewless.training.checkpoint import load_checkpoint, network_of
from skewless.training.manifest import Recording, read_manifest
from tests.demonstration import ROOT, Demonstration, trained
from tests.oracles import librosa_voice

PROGRAMS = ROOT / "tests" / "programs"
# What libsndfile does not read.
_NOT_READ = {".m4a", ".webm"}
Answers = Callable[[Path], list[dict[str, Any]]]


@dataclass(frozen=True)
class OldService:
    """One document's service.

    document: its number. archive: the folder that it is taken over with. runs: what it runs, in words. make: writes what its
    framework saves into a folder, and gives the files' names, further options of `skewless adopt`, and how it answers a file:
    rows of the record without file_path.
    """

    document: str
    archive: str
    runs: str
    make: Callable[[Demonstration, Path], tuple[str, list[str], Answers]]


@contextlib.contextmanager
def _modules(folder: Path) -> Iterator[None]:
    """Lets the documents' programs import one another by their bare names, which several of them share."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if getattr(sys.modules[name], "__file__", None) and Path(str(sys.modules[name].__file__)).parent == folder:
                del sys.modules[name]


def _program(system: str, module: str) -> ModuleType:
    with _modules(PROGRAMS / system):
        return importlib.import_module(module)


def cough_in_pytorch(made: Demonstration, folder: Path) -> tuple[str, list[str], Answers]:
    checkpoint, network = _network(made)
    saved = {"epoch": 7, "model_state_dict": network.state_dict(), "val_auc": checkpoint["val_auc"]}
    torch.save(saved, folder / "best_model.pth")
    program = _program("cough", "backend_pytorch")

    def answer(path: Path) -> list[dict[str, Any]]:
        batch = program.network_input(str(path))
        with torch.no_grad():
            bag, *_ = network(batch, torch.ones(batch.shape[:2], dtype=torch.bool))
        return [{"probability": float(bag)}]

    return "best_model.pth", ["--classes", "negative,positive"], answer


def cough_in_onnx(made: Demonstration, folder: Path) -> tuple[str, list[str], Answers]:
    checkpoint, network = _network(made)
    torch.save({"model_state_dict": network.state_dict()}, folder / "best_model.pth")
    graph = export_checkpoint(Definition.read(made.definition), checkpoint, folder / "model.onnx")
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    images, *others = session.get_inputs()
    # Rows that a graph of ours takes over from an earlier run: none.
    none = {each.name: np.zeros([d if isinstance(d, int) else 0 for d in each.shape], np.float32) for each in others}
    names = [each.name for each in session.get_outputs()]
    program = _program("cough", "backend_onnx")

    def answer(path: Path) -> list[dict[str, Any]]:
        found = session.run(["bag_probability"], {images.name: program.network_input(str(path))[0], **none})
        return [{"probability": float(found[0])}]

    assert "bag_probability" in names, names
    return "best_model.pth", ["--classes", "negative,positive"], answer


def orca_in_fastai(made: Demonstration, folder: Path) -> tuple[str, list[str], Answers]:
    """cnn_learner's nn.Sequential of body and head, and FastAIModel.predict of the live system."""
    _, network = _network(made)
    backbone = resnet18(weights=None)
    backbone.conv1 = nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
    head = nn.Sequential(
        *(
            AdaptiveConcatPool2d(),
            nn.Flatten(),
            nn.BatchNorm1d(1024),
            nn.Dropout(0.25),
            nn.Linear(1024, 512),
            nn.ReLU(),
        ),
        *(nn.BatchNorm1d(512), nn.Dropout(0.5), nn.Linear(512, 2)),
    )
    model = nn.Sequential(nn.Sequential(*list(backbone.children())[:-2]), head).eval()
    ours = list(network.state_dict().values())
    model.load_state_dict(dict(zip(model.state_dict(), ours, strict=True)))
    torch.save({"model": model.state_dict(), "opt": {}}, folder / "stg2-rn18.pth")
    program = _program("orca", "train")

    def answer(path: Path) -> list[dict[str, Any]]:
        with torch.no_grad():
            windows = torch.softmax(model(program.network_input(str(path))), dim=1)[:, 1].double().numpy()
        seconds = np.concatenate([windows[:1], (windows[:-1] + windows[1:]) / 2, windows[-1:]])
        return [{"start_s": second, "probability": float(value)} for second, value in enumerate(seconds)]

    return "stg2-rn18.pth", ["--classes", "other,call"], answer


def talent_in_keras(made: Demonstration, folder: Path) -> tuple[str, list[str], Answers]:
    from tests.keras_on_torch import keras

    _, network = _network(made)
    layers = keras.layers
    model = keras.Sequential([keras.Input((37,))])
    for units, dropout in ((256, 0.3), (128, 0.3), (64, 0.2), (32, 0.2)):
        model.add(layers.Dense(units, activation="relu"))
        model.add(layers.Dropout(dropout))
        if units > 32:
            model.add(layers.BatchNormalization())
    model.add(layers.Dense(1, activation="sigmoid"))
    dense = [layer for layer in model.layers if isinstance(layer, layers.Dense)]
    norms = [layer for layer in model.layers if isinstance(layer, layers.BatchNormalization)]
    for layer, linear in zip(dense, [*(each.linear for each in network.hidden), network.output], strict=True):
        layer.set_weights([linear.weight.detach().numpy().T, linear.bias.detach().numpy()])
    for layer, hidden in zip(norms, network.hidden, strict=False):
        norm = hidden.norm
        values = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        layer.set_weights([value.detach().numpy() for value in values])
    model.save(folder / "talent_model.keras")
    silence = RemoveSilence(top_db=20.0, frame_length=2048, hop_length=512)
    features = VoiceFeatures(n_mfcc=13, n_fft=2048, hop_length=512, tempo="beat_track", n_mels=128, roll_percent=0.85)

    def of(path: Path) -> NDArray[np.float32]:
        audio, rate = librosa.load(path, sr=22050)
        return librosa_voice.features(librosa_voice.remove_silence(audio, silence), int(rate), features)

    training = [row for row in _rows(made) if row.split == "train"]
    scaler = StandardScaler().fit(np.stack([of(row.path) for row in training]))
    (folder / "scaler.pkl").write_bytes(pickle.dumps(scaler))

    def answer(path: Path) -> list[dict[str, Any]]:
        return [{"probability": float(model.predict(scaler.transform([of(path)]), verbose=0)[0][0])}]

    return "talent_model.keras", ["--scaler", "scaler.pkl", "--classes", "poor,good"], answer


def portrait_in_keras(made: Demonstration, folder: Path) -> tuple[str, list[str], Answers]:
    """The deployed app.py, with its classes in its own order: human, avatar, animal."""
    from tests.keras_on_torch import keras

    _, network = _network(made)
    layers, resnet = keras.layers, keras.applications.resnet
    base = keras.applications.ResNet50(weights=None, include_top=False, input_shape=(224, 224, 3))
    pooled = layers.GlobalAveragePooling2D()(base.output)
    outputs = layers.Dense(3, activation="softmax")(layers.Dropout(0.25)(layers.Dense(256, activation="relu")(pooled)))
    model = keras.Model(base.input, outputs)
    first, last = (layer for layer in model.layers if isinstance(layer, layers.Dense))
    for layer in base.layers:
        ours: Any = getattr(network, layer.name, None)
        if isinstance(layer, layers.BatchNormalization):
            values = (ours.weight, ours.bias, ours.running_mean, ours.running_var)
            layer.set_weights([value.detach().numpy() for value in values])
        elif isinstance(layer, layers.Conv2D):
            layer.set_weights([ours.weight.detach().permute(2, 3, 1, 0).numpy(), ours.bias.detach().numpy()])
    for layer, linear in ((first, network.dense), (last, network.predictions)):
        layer.set_weights([linear.weight.detach().numpy().T, linear.bias.detach().numpy()])
    # Animal, avatar, human in the demonstration.
    kernel, bias = last.get_weights()
    last.set_weights([kernel[:, ::-1], bias[::-1]])
    model.save(folder / "resnet50_profilepic_no_aug.h5")
    names = ("human", "avatar", "animal")

    def answer(path: Path) -> list[dict[str, Any]]:
        image: Image.Image = Image.open(io.BytesIO(path.read_bytes()))
        if image.mode != "RGB":
            image = image.convert("RGB")
        levels = np.expand_dims(np.array(image.resize((224, 224))), axis=0)
        probabilities = model.predict(resnet.preprocess_input(levels), verbose=0)[0]
        return [{f"probability_{name}": float(value) for name, value in zip(names, probabilities, strict=True)}]

    return "resnet50_profilepic_no_aug.h5", ["--classes", ",".join(names)], answer


SERVICES = (
    OldService(
        "000",
        "cough",
        "a PyTorch checkpoint, half precision in its arithmetic, no high-pass",
        cough_in_pytorch,
    ),
    OldService(
        "001", "cough", "the same weights in ONNX Runtime, pydub, another level, padded tail windows", cough_in_onnx
    ),
    OldService("002", "orca", "a fastai learner's weights behind fastai_audio, per-second votes", orca_in_fastai),
    OldService("003", "talent", "a Keras MLP behind librosa and scikit-learn's StandardScaler", talent_in_keras),
    OldService(
        "004",
        "portrait",
        "a Keras ResNet50 behind Pillow's default resize, classes in another order",
        portrait_in_keras,
    ),
)


def _network(made: Demonstration) -> tuple[dict[str, Any], Any]:
    checkpoint = load_checkpoint(made.checkpoint)
    return checkpoint, network_of(checkpoint, Definition.read(made.definition))


def _rows(made: Demonstration) -> list[Recording]:
    return read_manifest(made.manifest, made.corpus, Definition.read(made.definition).classes)


def labelled_files(made: Demonstration, folder: Path, limit: int) -> list[Path]:
    """Some files that the demonstration was not trained on, as DIR/CLASS/NAME: pictures as they are, recordings as WAV of 16 bits, of
    which every decoder makes the same."""
    definition = Definition.read(made.definition)
    held_out = [row for row in _rows(made) if row.split != "train" and row.path.suffix not in _NOT_READ]
    written = []
    for label, name in enumerate(definition.classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for row in [row for row in held_out if row.label == label][: -(-limit // len(definition.classes))]:
            if definition.pipeline.reads == "image":
                written.append(Path(shutil.copy(row.path, folder / name)))
            else:
                samples, rate = soundfile.read(row.path)
                written.append(folder / name / f"{row.path.stem}.wav")
                soundfile.write(written[-1], samples, rate, subtype="PCM_16")
    return written


def take_over(service: OldService, out: Path, scratch: Path, limit: int) -> dict[str, Any]:
    """Make the service, record its answers for some `limit` files, and adopt it into `out`."""
    made = trained(service.archive, scratch)
    folder = out / service.document
    folder.mkdir(parents=True, exist_ok=True)
    weights, options, answers = service.make(made, folder)
    files = labelled_files(made, folder / "labelled", limit)
    with open(folder / "answers.csv", "w", newline="", encoding="utf-8") as file:
        rows = [
            {"file_path": path.relative_to(folder / "labelled").as_posix(), **row}
            for path in files
            for row in answers(path)
        ]
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    line = [
        *("skewless", "adopt", f"archive/{service.archive}", weights, *options, "--files", "labelled"),
        *("--predictions", "answers.csv", "--out", "adopted"),
    ]
    # The same command with this machine's folders.
    places = {name: str(folder / name) for name in (weights, "answers.csv", "labelled", "scaler.pkl", "adopted")}
    places[f"archive/{service.archive}"] = str(made.definition)
    started = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-m", *(places.get(word, word) for word in line)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.monotonic() - started
    print(f"{shlex.join(line)}\n{ended.stdout}", flush=True)
    if ended.returncode:
        sys.exit(f"{service.document}: exit code {ended.returncode}\n{ended.stderr}")
    report = json.loads((folder / "adopted" / "adoption.json").read_text(encoding="utf-8"))
    return {"service": service, "command": shlex.join(line), "report": report, "seconds": seconds}


def as_markdown(found: Sequence[dict[str, Any]]) -> str:
    """A row for each service: what it runs, the pipeline that was found, and how closely its answers are reproduced."""
    head = [
        "document",
        "the service runs",
        "pipeline found",
        "recorded",
        "largest difference",
        "mean",
        "decisions changed by the archive's own",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for each in found:
        service, report = each["service"], each["report"]
        gap, other = report["adopted"], report["instead"]
        changed = "none: it is that one" if other is None else f"{other['flips']} of {other['files']}"
        cells = [
            service.document,
            service.runs,
            gap["pipeline"],
            f"{gap['numbers']} numbers, {gap['files']} files",
            size_text(gap["largest"]),
            size_text(gap["mean"]),
            changed,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the services and their archives")
    parser.add_argument("--limit", type=int, default=24, help="how many labelled files each service has answered")
    parser.add_argument("--only", nargs="*", default=[s.document for s in SERVICES], help="documents' numbers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with scratch_folder(parser, ValueError) as scratch:
        found = [
            take_over(s, arguments.out, scratch, arguments.limit) for s in SERVICES if s.document in arguments.only
        ]
        with atomic(arguments.out / "old_services.md") as unfinished:
            unfinished.write_text(as_markdown(found), encoding="utf-8")
        print(as_markdown(found))


if __name__ == "__main__":
    main()
