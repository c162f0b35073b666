"""Exported networks become checkpoints that point at the archive's own file; formats are told apart by content."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import h5py
import pytest
import torch
import yaml
from torch import nn

from skewless.core.definition import Definition
from skewless.evaluation.scores import service_of
from skewless.importers.errors import ImportFileError
from skewless.importers.formats import format_of
from skewless.importers.run import ImportRequest, ImportResult, import_file
from skewless.scaffold import create
from skewless.training.checkpoint import CheckpointError, file_digest, load_checkpoint, network_of
from skewless.training.untrained import UntrainedError
from tests import recordings
from tests.degenerate import KINDS, degenerate
from tests.recordings import one_thread  # noqa: F401

RECORDING = recordings.wav(recordings.coughs(16000, 3.0), 16000)


class Detector(nn.Module):
    """One recording's windows `(S, 1, 40, 101)` to the probability of a class, `()`."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.dense = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"probability": torch.sigmoid(self.dense(self.body(x).mean(dim=(2, 3))).mean())}


def trained() -> Detector:
    torch.manual_seed(0)
    network = Detector()
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    network(torch.randn(8, 1, 40, 101))
    return network.eval()


def export(network: nn.Module, path: Path) -> Path:
    example, windows = (torch.randn(3, 1, 40, 101),), torch.export.Dim("windows")
    torch.export.save(torch.export.export(network.eval(), example, dynamic_shapes=({0: windows},)), path)
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(trained(), tmp_path_factory.mktemp("exported") / "detector.pt2")


@pytest.fixture
def folder(tmp_path: Path, exported: Path) -> Path:
    """An archive folder with the exported network in it."""
    made = create("mine", tmp_path)
    shutil.copy(exported, made / "model.pt2")
    model = yaml.safe_load((made / "model.yaml").read_text())
    model["network"] = {"exported": {"file": "model.pt2", "per": "recording"}}
    (made / "model.yaml").write_text(yaml.safe_dump(model))
    return made


def imported(folder: Path, file: Path, **more) -> ImportResult:
    more = {"classes": ["negative", "positive"]} | more
    return import_file(ImportRequest(folder, file, folder.parent / "run" / "best.pth", **more))


def test_an_exported_network_becomes_a_checkpoint(folder: Path, exported: Path):
    result = imported(folder, exported)
    checkpoint, definition = load_checkpoint(result.checkpoint), Definition.read(folder)
    assert checkpoint["model_state_dict"] == {}
    assert checkpoint["imported_from"] == {
        "format": "exported",
        "sha256": file_digest(exported),
        "epoch": None,
        "val_auc": None,
        "classes": ["negative", "positive"],
    }
    assert "note: the file does not say what its network was trained behind" in result.text()
    assert "its outputs are negative, positive, in this order" in result.text()
    (scored,) = service_of(definition, checkpoint, torch.device("cpu")).score([RECORDING])
    with torch.inference_mode():
        expected = trained()(definition.pipeline(RECORDING))["probability"].item()
    assert scored.scores[0] == pytest.approx(expected, abs=1e-6)
    assert network_of(checkpoint, definition).files == ("model.pt2",)


def test_another_file_than_the_imported_one_is_refused(folder: Path, exported: Path):
    checkpoint = load_checkpoint(imported(folder, exported).checkpoint)
    export(Detector(), folder / "model.pt2")
    with pytest.raises(
        CheckpointError, match=r"model\.pt2 is not the exported network that the checkpoint was imported"
    ):
        service_of(Definition.read(folder), checkpoint, torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_weights_are_refused(folder: Path, kind: str):
    network = trained()
    network.load_state_dict(degenerate(kind, network.state_dict(), "dense"))
    export(network, folder / "model.pt2")
    with pytest.raises(CheckpointError, match=KINDS[kind][1]):
        imported(folder, folder / "model.pt2")
    assert not (folder.parent / "run").exists()


def test_an_untrained_export_is_refused(folder: Path):
    network = trained()
    network.body[1].reset_running_stats()
    nn.init.zeros_(network.dense.bias)
    export(network, folder / "model.pt2")
    with pytest.raises(UntrainedError) as error:
        imported(folder, folder / "model.pt2")
    assert "layer 'program.body' never saw a batch: program.body.1 still has" in str(error.value)
    assert "layer 'program.dense' has a bias of exactly 0 throughout" in str(error.value)
    accepted = ["program.body", "program.dense"]
    result = imported(folder, folder / "model.pt2", accept_untrained=accepted)
    assert load_checkpoint(result.checkpoint)["accepted_untrained"] == accepted


def test_a_file_that_is_not_the_archives_is_refused(folder: Path, exported: Path, tmp_path: Path):
    with pytest.raises(ImportFileError, match=r"is not the same file as .*; copy the right one there"):
        imported(folder, export(Detector(), tmp_path / "other.pt2"))
    (folder / "model.pt2").unlink()
    with pytest.raises(ImportFileError, match=r"there is no .*model\.pt2, which model.yaml names as the network; copy"):
        imported(folder, exported)
    with pytest.raises(ImportFileError, match=r"write network: \{exported: detector\.pt2\}"):
        imported(create("plain", tmp_path), exported)
    torch.save({"a": torch.ones(1)}, tmp_path / "old.pth")
    with pytest.raises(ImportFileError, match=r"has an exported network, model\.pt2; import that file, not .*old\.pth"):
        imported(folder, tmp_path / "old.pth", pipeline=folder / "pipeline.yaml")
    assert not (tmp_path / "run").exists()


def test_formats_are_told_apart_by_content(tmp_path: Path, exported: Path):
    """Whatever the names: every file here is called the same."""
    path = tmp_path / "model"
    shutil.copy(exported, path)
    assert format_of(path) == "exported"
    for zipped in (True, False):
        torch.save({"a": torch.ones(1)}, path, _use_new_zipfile_serialization=zipped)
        assert format_of(path) == "pytorch"
    path.unlink()
    with h5py.File(path, "w"):
        pass
    assert format_of(path) == "keras"
    for member in ("config.json", "model.weights.h5"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(member, "")
        assert format_of(path) == "keras"
    path.write_bytes(b"\x80\x02 of a pickle")
    assert format_of(path) == "pytorch"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "")
    with pytest.raises(ImportFileError, match=r"is a zip with readme\.txt; expected what torch\.save wrote.*\.pt2$"):
        format_of(path)
    path.write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(ImportFileError, match="starts as a zip does, and is damaged"):
        format_of(path)
    with pytest.raises(ImportFileError, match="there is no file"):
        format_of(tmp_path / "absent")
