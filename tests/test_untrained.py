"""A layer that looks untrained and is rightly so: accepted by name, recorded, and never forgotten on the way."""

from __future__ import annotations

import csv
import json
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from skewless.core.definition import Definition
from skewless.errors import BuildError
from skewless.evaluation.evaluate import evaluate
from skewless.importers.run import ImportRequest, import_file
from skewless.packaging.build import build_archive
from skewless.scaffold import create
from skewless.training.checkpoint import file_digest, load_checkpoint, save_checkpoint
from skewless.training.config import Config
from skewless.training.fit import fit
from skewless.training.manifest import read_manifest
from skewless.training.untrained import UntrainedError, untrained_layers
from tests.tiny_model import TinyModel, recording, tiny_model  # noqa: F401

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Measured:
    """A checkpoint whose last layer has a bias of 0, accepted when it was imported, and its evaluation."""

    archive: Path
    checkpoint: Path
    evaluation: Path


def weights_without_bias(model: TinyModel, folder: Path) -> Path:
    weights = load_checkpoint(model.checkpoint)["model_state_dict"]
    torch.save(weights | {"output.bias": torch.zeros(1)}, folder / "old.pth")
    return folder / "old.pth"


@pytest.fixture(scope="module")
def measured(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Measured:  # noqa: F811
    folder = tmp_path_factory.mktemp("measured")
    old, new = weights_without_bias(tiny_model, folder), folder / "new.pth"
    request = ImportRequest(tiny_model.archive, old, new, tiny_model.archive / "pipeline.yaml", ("tone", "noise"))
    with pytest.raises(
        UntrainedError, match=r"layer 'output' has a bias of exactly 0 .*\n.*--accept-untrained output$"
    ):
        import_file(request)
    assert not new.exists()
    import_file(replace(request, accept_untrained=["output"]))
    rows = read_manifest(tiny_model.manifest, tiny_model.manifest.parent, tiny_model.definition.classes)
    evaluate(tiny_model.definition, load_checkpoint(new), new, rows, "test", folder / "evaluation", CPU)
    return Measured(tiny_model.archive, new, folder / "evaluation")


def test_what_was_accepted_at_import_is_accepted_by_the_build(measured: Measured, tmp_path: Path):
    built = build_archive(measured.archive, measured.checkpoint, measured.evaluation, "1.0", tmp_path)
    with zipfile.ZipFile(built.path) as archive:
        assert json.loads(archive.read("metrics.json"))["accepted_untrained"] == ["output"]


def test_the_build_takes_names_too(measured: Measured, tmp_path: Path):
    checkpoint, evaluation = tmp_path / "edited.pth", measured.evaluation
    save_checkpoint(checkpoint, load_checkpoint(measured.checkpoint) | {"accepted_untrained": []})
    metrics = evaluation / "metrics.json"
    before = metrics.read_text()
    metrics.write_text(json.dumps(json.loads(before) | {"checkpoint_sha256": file_digest(checkpoint)}))
    try:
        with pytest.raises(BuildError, match="layer 'output' has a bias of exactly 0 throughout"):
            build_archive(measured.archive, checkpoint, evaluation, "1.0", tmp_path)
        with pytest.raises(BuildError, match=r"layer project is to be accepted, .*; these do: output"):
            build_archive(measured.archive, checkpoint, evaluation, "1.0", tmp_path, accept_untrained=["project"])
        assert [p.name for p in tmp_path.iterdir()] == ["edited.pth"]
        built = build_archive(measured.archive, checkpoint, evaluation, "1.0", tmp_path, accept_untrained=["output"])
    finally:
        metrics.write_text(before)
    with zipfile.ZipFile(built.path) as archive:
        assert json.loads(archive.read("metrics.json"))["accepted_untrained"] == ["output"]


@pytest.fixture
def rows(tmp_path: Path):
    names = []
    for number, split in enumerate(["train"] * 8 + ["val"] * 4):
        (tmp_path / f"{number}.wav").write_bytes(recording(number % 2, seed=number))
        names.append((f"{number}.wav", number % 2, split))
    with open(tmp_path / "manifest.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file_path", "label", "split"), *names])
    return read_manifest(tmp_path / "manifest.csv", tmp_path)


@pytest.mark.parametrize(("trained", "accepted"), [("head", ["body"]), ("all", [])])
def test_training_accepts_an_encoder_that_it_leaves_as_it_was_drawn(rows, tmp_path: Path, trained: str, accepted: list):
    definition = Definition.read(create("mine", tmp_path))
    config = Config(epochs=2, batch_size=4, trained=trained, augmentation=False)
    checkpoint = fit(rows, definition, config, tmp_path / "run", cache_dir=tmp_path / "cache", device=CPU)
    assert checkpoint["accepted_untrained"] == accepted
    network = definition.build_network()
    network.load_state_dict(checkpoint["model_state_dict"])
    assert [finding.layer for finding in untrained_layers(network).findings] == accepted
