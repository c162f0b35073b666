"""Training is proven: evaluation reproduces the scores that it computed, or says what has changed. With a model that trains
in a second: pictures of two colours, and a network and a loss of the folder's own."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from skewless.core.definition import Definition
from skewless.core.files import atomic
from skewless.core.service import ModelService
from skewless.core.stages.image import Resize
from skewless.errors import BuildError, UsageError
from skewless.evaluation.evaluate import evaluate
from skewless.evaluation.reproduction import NotReproducedError
from skewless.packaging.build import build_archive
from skewless.packaging.probes import images
from skewless.torchserve.smoke import References
from skewless.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from skewless.training.config import Config
from skewless.training.fit import fit
from skewless.training.manifest import ManifestError, Recording, check_contents, read_manifest
from tests.conftest import ROOT
from tests.recordings import one_thread  # noqa: F401

CPU = torch.device("cpu")
CLASSES = ("warm", "cold", "grey")
PER_SPLIT = {"train": 10, "val": 4, "test": 4}

FILES = {
    "pipeline.yaml": """
name: colours
stages:
  - decode_image: {background: [255, 255, 255], min_side: 8, orientation: upright}
  - resize: {height: 8, width: 8, method: bilinear}
  - caffe_preprocess: {mean_bgr: [103.939, 116.779, 123.68]}
""",
    "model.yaml": """
network: {network.py:Colours: {hidden: 16}}
runtime: {eager: {micro_batch: 32}}
postprocess: {class_probabilities: {classes: [warm, cold, grey], threshold: 0.5}}
precision: {tf32: false, threads: 0}
limits: {max_bytes: 1000000}
""",
    "model-config.yaml": "minWorkers: 1\nmaxWorkers: 1\nbatchSize: 2\nmaxBatchDelay: 10\nresponseTimeout: 120\n",
    "network.py": '''
import torch
from torch import nn

from skewless.core.networks import Network


class Colours(Network):
    """Pictures `(N, 3, 8, 8)` to the probabilities of three classes."""

    def __init__(self, hidden: int):
        super().__init__()
        self.body, self.last = nn.Linear(3 * 8 * 8, hidden), nn.Linear(hidden, 3)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.body(x.flatten(1) / 100))

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        return self.last(features)

    def head(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.logits(features)[0]
        return {"class_logits": logits, "class_probabilities": torch.softmax(logits, dim=0)}
''',
    "losses.py": '''
from dataclasses import dataclass

import torch

from skewless.core.networks import Network
from skewless.training.losses import Batch, Loss


@dataclass(frozen=True)
class Focal(Loss):
    """Focal loss of every row's logits `(N, C)` with its recording's label."""

    gamma: float = 2.0

    def __call__(self, network: Network, batch: Batch) -> torch.Tensor:
        logs = torch.log_softmax(network.logits(batch.features(network)), dim=1)
        chosen = logs.gather(1, batch.row_labels.unsqueeze(1)).squeeze(1)
        return (-((1 - chosen.exp()) ** self.gamma) * chosen).mean()


class NoShapes(Focal):
    """A loss of which nobody knows what it takes."""
''',
}


@dataclass(frozen=True)
class Colours:
    """A definition, its pictures, its trained checkpoint and that one's evaluation."""

    archive: Path
    manifest: Path
    checkpoint: Path
    evaluation: Path

    @property
    def definition(self) -> Definition:
        return Definition.read(self.archive)

    def rows(self) -> list[Recording]:
        return read_manifest(self.manifest, self.manifest.parent, CLASSES)

    def evaluate(self, out: Path, checkpoint: Path | None = None, rows: list[Recording] | None = None) -> dict:
        path = checkpoint or self.checkpoint
        return evaluate(self.definition, load_checkpoint(path), path, rows or self.rows(), "test", out, CPU, 6)

    def build(self, out: Path, **changes):
        given = {"checkpoint_path": self.checkpoint, "evaluation": self.evaluation, "version": "1.0", "out": out}
        return build_archive(self.archive, **(given | changes))

    def edited(self, path: Path, **changes) -> Path:
        save_checkpoint(path, load_checkpoint(self.checkpoint) | changes)
        return path


def picture(label: str, rng: np.random.Generator) -> bytes:
    means = {"warm": (190, 110, 80), "cold": (80, 110, 190), "grey": (130, 130, 130)}[label]
    pixels = np.clip(rng.normal(means, 60, (12, 12, 3)), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_pictures(folder: Path, seed: int = 0) -> Path:
    """Pictures in three splits, with their manifest."""
    folder.mkdir(parents=True)
    rng, lines = np.random.default_rng(seed), ["file_path,label,split"]
    for split, count in PER_SPLIT.items():
        for label in CLASSES:
            for number in range(count):
                name = f"{split}-{label}-{number}.png"
                (folder / name).write_bytes(picture(label, rng))
                lines.append(f"{name},{label},{split}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder / "manifest.csv"


SETTINGS = {"epochs": 6, "learning_rate": 3e-3, "augmentation": False}


def trained(archive: Path, manifest: Path, out: Path, **changes) -> dict:
    return fit(
        read_manifest(manifest, manifest.parent, CLASSES),
        Definition.read(archive),
        Config(**(SETTINGS | changes)),
        out,
        cache_dir=out / "cache",
        device=CPU,
    )


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Colours:
    root = tmp_path_factory.mktemp("colours")
    archive = root / "colours"
    archive.mkdir()
    for name, text in FILES.items():
        (archive / name).write_text(text)
    made = Colours(archive, write_pictures(root / "pictures"), root / "run" / "best.pth", root / "evaluation")
    trained(archive, made.manifest, root / "run")
    made.evaluate(made.evaluation)
    return made


# --- what is recorded, and reproduced ---------------------------------------------------------------------------------


def test_the_checkpoint_records_what_evaluation_has_to_reproduce(colours: Colours):
    checkpoint = load_checkpoint(colours.checkpoint)
    validation = [r for r in colours.rows() if r.split == "val"]
    digests = [hashlib.sha256(r.path.read_bytes()).hexdigest() for r in validation]
    assert list(checkpoint["validation_scores"]) == digests
    assert all(sum(scores) == pytest.approx(1, abs=1e-6) for scores in checkpoint["validation_scores"].values())
    # The network is the folder's own: its source is in `code`.
    assert list(checkpoint["stage_sources"]) == ["decode_image", "resize", "caffe_preprocess", "postprocess"]
    image = ROOT / "skewless" / "core" / "stages" / "image.py"
    assert checkpoint["stage_sources"]["resize"] == hashlib.sha256(image.read_bytes()).hexdigest()
    assert set(checkpoint["stage_outputs"]) == {digests[0], digests[-1]}
    recorded = checkpoint["stage_outputs"][digests[0]]
    assert recorded["kinds"]["resize"] == "(1, 3, 8, 8) float32"
    assert list(recorded["values"]) == list(recorded["kinds"]) == ["decode_image", "resize", "caffe_preprocess"]


def test_evaluation_reproduces_the_scores_of_training(colours: Colours):
    metrics = json.loads((colours.evaluation / "metrics.json").read_text())
    assert metrics["training_reproduced"]["recordings"] == 3 * PER_SPLIT["val"]
    assert metrics["training_reproduced"]["max_dp"] <= 1e-6


def test_a_stage_that_changed_is_named(colours: Colours, tmp_path: Path, monkeypatch):
    """As after an upgrade of the package that computes it, which every version before let pass."""
    resize = Resize.__call__

    def brighter(self, signal):
        found = resize(self, signal)
        return found.of(found.data + 20)

    monkeypatch.setattr(Resize, "__call__", brighter)
    checkpoint = load_checkpoint(colours.checkpoint)
    edited = colours.edited(
        tmp_path / "edited.pth",
        library_versions=checkpoint["library_versions"] | {"torch": "2.10.0"},
        stage_sources=checkpoint["stage_sources"] | {"resize": "another"},
    )
    with pytest.raises(NotReproducedError) as error:
        colours.evaluate(tmp_path / "out", edited)
    message = str(error.value)
    now = torch.__version__.partition("+")[0]
    for part in (
        r"val-",
        "apart (allowed 0.0001; ",
        "of 12 validation recordings are off)",
        f"torch 2.10.0 then, {now}",
        "Source code: changed since for 'resize'.",
        "The first stage that differs: stage 'resize' on val-",
        "mean difference 2.0e+01",
    ):
        assert part in message, message
    assert not (tmp_path / "out").exists()


def test_other_weights_are_found_behind_the_stages(colours: Colours, tmp_path: Path):
    weights = load_checkpoint(colours.checkpoint)["model_state_dict"]
    weights["last.bias"] += torch.tensor([0.01, 0.0, 0.0])
    edited = colours.edited(tmp_path / "edited.pth", model_state_dict=weights)
    with pytest.raises(
        NotReproducedError, match=r"Versions: as in training\. Source code: as in training\. No stage differs"
    ):
        colours.evaluate(tmp_path / "out", edited)


def test_scores_that_are_no_numbers_are_not_reproduced(colours: Colours, tmp_path: Path):
    weights = load_checkpoint(colours.checkpoint)["model_state_dict"]
    # Finite, as every weight has to be, and too large for any answer to be.
    weights["last.weight"] = torch.full_like(weights["last.weight"], 3e38)
    edited = colours.edited(tmp_path / "edited.pth", model_state_dict=weights)
    with pytest.raises(NotReproducedError, match=r"nan apart .* 12 of 12 validation recordings are off"):
        colours.evaluate(tmp_path / "out", edited)


def test_recordings_of_another_manifest_are_not_compared(colours: Colours, tmp_path: Path, capsys):
    other = write_pictures(tmp_path / "pictures", seed=1)
    rows = read_manifest(other, other.parent, CLASSES)
    metrics = colours.evaluate(tmp_path / "out", rows=rows)
    assert metrics["training_reproduced"] == {"recordings": 0, "max_dp": None}
    assert "none of the recordings that training validated on" in capsys.readouterr().err
    with pytest.raises(BuildError, match="reproduced none of the scores that training computed"):
        colours.build(tmp_path / "store", evaluation=tmp_path / "out")
    # One of training's among them is enough to compare with.
    known = next(r for r in colours.rows() if r.split == "val")
    metrics = colours.evaluate(tmp_path / "out", rows=[*rows, known])
    assert metrics["training_reproduced"]["recordings"] == 1


def test_an_imported_checkpoint_says_that_this_proof_is_missing(colours: Colours, tmp_path: Path, capsys):
    edited = colours.edited(tmp_path / "imported.pth", validation_scores={}, stage_sources={}, stage_outputs={})
    metrics = colours.evaluate(tmp_path / "out", edited)
    assert metrics["training_reproduced"] is None
    assert "nothing proves that evaluation computes what training computed" in capsys.readouterr().err
    built = colours.build(tmp_path / "store", checkpoint_path=edited, evaluation=tmp_path / "out")
    with zipfile.ZipFile(built.path) as archive:
        assert json.loads(archive.read("metrics.json"))["evaluation"]["training_reproduced"] is None


def test_an_evaluation_without_this_proof_is_not_packaged(colours: Colours, tmp_path: Path):
    metrics = colours.evaluate(tmp_path / "out")
    del metrics["training_reproduced"]
    (tmp_path / "out" / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(BuildError, match="reproduced none of the scores"):
        colours.build(tmp_path / "store", evaluation=tmp_path / "out")
    assert not (tmp_path / "store").exists()


# --- the same bytes ---------------------------------------------------------------------------------------------------


def test_the_same_bytes_in_two_splits_are_refused(colours: Colours, tmp_path: Path):
    rows = colours.rows()
    heard = next(r for r in rows if r.split == "train")
    copy = tmp_path / "another name.png"
    copy.write_bytes(heard.path.read_bytes())
    leaking = [*rows, replace(heard, file_path=copy.name, path=copy, split="test")]
    message = (
        "train-warm-0.png and .*another name.png are the same recording.* in the splits train and test: .*remove one"
    )
    with pytest.raises(ManifestError, match=message):
        colours.evaluate(tmp_path / "out", rows=leaking)
    with pytest.raises(ManifestError, match=message):
        fit(leaking, colours.definition, Config(**SETTINGS), tmp_path, cache_dir=tmp_path / "cache", device=CPU)


def test_the_same_bytes_in_one_split_have_one_label(tmp_path: Path):
    for name in "ab":
        (tmp_path / name).write_bytes(b"the same")
    first, second = (Recording(name, tmp_path / name, 1, "train") for name in "ab")
    assert check_contents([first, second]) == {hashlib.sha256(b"the same").hexdigest(): [first, second]}
    with pytest.raises(ManifestError, match=r"a and .*b are the same recording, byte for byte, with two labels"):
        check_contents([first, replace(second, label=0)])


# --- which recordings travel ------------------------------------------------------------------------------------------


def contents(archive: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as packed:
        return {name: packed.read(name) for name in packed.namelist()}


def loaded(archive: Path, folder: Path) -> ModelService:
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
    return ModelService.load(folder, CPU)


def test_test_recordings_travel_unless_told_otherwise(colours: Colours, tmp_path: Path):
    built = colours.build(tmp_path / "store")
    (warning,) = built.warnings
    assert warning.startswith("6 recordings of the test split travel in the archive; use --references synthetic")
    service = loaded(built.path, tmp_path / "unpacked")
    assert service.self_test.recordings == 6 + len(images())
    assert service.metrics["references"] == {"kind": "evaluation", "recordings": 6}


def test_synthetic_references_are_the_probes_with_the_evaluated_probabilities(colours: Colours, tmp_path: Path):
    built = colours.build(tmp_path / "store", references="synthetic")
    assert built.warnings == ()
    files = contents(built.path)
    probes = images()
    assert {n for n in files if n.startswith("references/") and n.endswith(("g", "x"))} == {
        f"references/probes/{name}" for name in probes
    }
    entries = json.loads(files["references/references.json"])
    assert {e["file"] for e in entries} == {f"probes/{name}" for name in probes}
    service = loaded(built.path, tmp_path / "unpacked")
    assert (service.self_test.recordings, service.self_test.max_dp <= 1e-6) == (len(probes), True)
    for entry in entries:
        (scored,) = service.score([probes[Path(entry["file"]).name]])
        assert list(scored.scores) == pytest.approx(entry["scores"], abs=1e-6)
        assert (entry["source"], entry["label"]) == ("synthetic", None)
    # What a smoke test sends, and expects.
    assert len(References.from_archive(built.path).payloads) == len(probes)


def test_an_archive_without_references_says_so_everywhere(colours: Colours, tmp_path: Path):
    built = colours.build(tmp_path / "store", references="none")
    assert "the smoke test has nothing to compare" in built.warnings[0]
    assert {n for n in contents(built.path) if n.startswith("references/")} == {
        "references/references.json",
        "references/stages.json",
        "references/stages.safetensors",
    }
    service = loaded(built.path, tmp_path / "unpacked")
    assert (service.self_test.recordings, service.self_test.max_dp) == (0, None)
    assert service.metrics["references"] == {"kind": "none", "recordings": 0}
    with pytest.raises(UsageError, match=r"carries no references.*rebuild it with --references synthetic"):
        References.from_archive(built.path)
    # What is left is still compared.
    weights = tmp_path / "unpacked" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match=r"stage 'network' is not as built: weights\.safetensors"):
        ModelService.load(tmp_path / "unpacked", CPU)


def test_files_of_ones_own_travel(colours: Colours, tmp_path: Path):
    rng, own = np.random.default_rng(7), []
    for number, label in enumerate((*CLASSES, *CLASSES)):
        own.append(tmp_path / f"own {number}.PNG")
        own[-1].write_bytes(picture(label, rng))
    built = colours.build(tmp_path / "store", references=own)
    assert built.warnings == ()
    entries = json.loads(contents(built.path)["references/references.json"])
    assert [(e["file"], e["source"]) for e in entries][:2] == [("01.png", "own 0.PNG"), ("02.png", "own 1.PNG")]
    assert loaded(built.path, tmp_path / "unpacked").self_test.recordings == 6 + len(images())
    (tmp_path / "text.png").write_text("no picture")
    for files, message in (
        ([own[0], own[0]], "span only 0.0000"),
        ([own[0]], "there are 1 references, expected at least 2"),
        ([own[0], tmp_path / "absent.png"], "there is no reference .*absent.png"),
        ([own[0], tmp_path / "text.png"], "text.png cannot be read: not a known picture format"),
        ("synthetc", "references is 'synthetc', expected evaluation, synthetic, none or files"),
    ):
        with pytest.raises(BuildError, match=message):
            colours.build(tmp_path / "refused", references=files)
        assert list((tmp_path / "refused").iterdir()) == []


@pytest.mark.parametrize("references", ["synthetic", "none", "evaluation"])
def test_an_untrained_network_is_refused_whatever_travels(colours: Colours, tmp_path: Path, references: str):
    """By the evaluation's own references, also where they stay at home: an answer that hardly depends on the input."""
    weights = load_checkpoint(colours.checkpoint)["model_state_dict"]
    weights["last.weight"] *= 1e-3
    edited = colours.edited(tmp_path / "edited.pth", model_state_dict=weights, validation_scores={})
    colours.evaluate(tmp_path / "out", edited)
    with pytest.raises(BuildError, match="looks untrained"):
        colours.build(tmp_path / "store", checkpoint_path=edited, evaluation=tmp_path / "out", references=references)


def test_no_path_of_this_machine_is_in_an_archive(colours: Colours, tmp_path: Path):
    lines = colours.manifest.read_text().splitlines()
    absolute = [lines[0], *(f"{colours.manifest.parent}/{line}" for line in lines[1:])]
    (tmp_path / "absolute.csv").write_text("\n".join(absolute) + "\n")
    rows = read_manifest(tmp_path / "absolute.csv", tmp_path, CLASSES)
    colours.evaluate(tmp_path / "evaluation", rows=rows)
    built = colours.build(tmp_path / "store", evaluation=tmp_path / "evaluation")
    files = contents(built.path)
    assert all(e["source"].startswith("test-") for e in json.loads(files["references/references.json"]))
    for place in (
        colours.manifest.parent,
        colours.archive,
        tmp_path,
        ROOT,
        Path.home(),
        Path(torch.__file__).parents[1],
    ):
        found = [name for name, data in files.items() if str(place).encode() in data]
        assert not found, (place, found)


# --- what training minimises ------------------------------------------------------------------------------------------


def test_a_loss_of_ones_own(colours: Colours, tmp_path: Path):
    loss = {"losses.py:Focal": {"gamma": 1.5}}
    focal = trained(colours.archive, colours.manifest, tmp_path / "run", epochs=2, loss=loss)
    assert focal["config"]["loss"] == loss
    source = (colours.archive / "losses.py").read_bytes()
    assert focal["training_code"] == {"losses.py": hashlib.sha256(source).hexdigest()}
    # It is no part of what is served.
    assert list(focal["code"]) == ["network.py"]
    plain = load_checkpoint(colours.checkpoint)
    assert (plain["config"]["loss"], plain["training_code"]) == ({"classes": {}}, {})
    assert focal["history"][0]["train_loss"] != plain["history"][0]["train_loss"]
    with pytest.raises(CheckpointError, match="holds a run with another config"):
        trained(colours.archive, colours.manifest, tmp_path / "run", epochs=2, loss={"losses.py:Focal": {"gamma": 1.0}})


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"focal": {}}, "unknown loss 'focal'; there are: bag, classes; a class of your own is FILE.py:Class"),
        ({"losses.py:Focal": {"gamma": "2"}}, "loss 'losses.py:Focal': gamma is '2', expected a number"),
        ({"losses.py:NoShapes": {}}, "losses.py:NoShapes has no docstring that gives the shapes"),
        ({"network.py:Colours": {}}, "network.py:Colours is no loss: it has to extend skewless.training.losses.Loss"),
        ({"bag": {"segment_loss": -1.0}}, "loss 'bag': segment_loss is -1.0, expected 0 or more"),
        ({"bag": {}}, "loss 'bag' is for networks that pool segments, which Colours does not"),
        ({"bag": {}, "classes": {}}, "expected one 'name: {parameters}'"),
    ],
)
def test_a_loss_that_cannot_be_used_is_refused(colours: Colours, tmp_path: Path, loss: dict, message: str):
    with pytest.raises(ValueError, match=message.replace("{", r"\{")):
        trained(colours.archive, colours.manifest, tmp_path, loss=loss)


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "a.json"
    with atomic(path) as unfinished:
        unfinished.write_text("first")
        assert not path.exists() and unfinished.parent == tmp_path
    with pytest.raises(RuntimeError), atomic(path) as unfinished:
        unfinished.write_text("half")
        raise RuntimeError("interrupted")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.json", "first")]
