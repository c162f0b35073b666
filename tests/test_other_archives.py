"""Archives made in other ways, through the same TorchServe: an imported checkpoint, and ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from skewless.torchserve.client import Client
from skewless.torchserve.server import Server
from skewless.torchserve.smoke import smoke_test
from skewless.training.checkpoint import load_checkpoint
from tests.conftest import SERVED, Demonstration, run_skewless

COUGH = "archive/cough"


@pytest.fixture
def imported(demonstration: Demonstration, tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint as another training script writes it, imported and evaluated."""
    trained = load_checkpoint(demonstration.checkpoint)
    old, new = tmp_path / "old.pth", tmp_path / "imported.pth"
    weights = {f"module.{name}": weight for name, weight in trained["model_state_dict"].items()}
    torch.save({"epoch": 3, "val_auc": np.float64(0.9), "config": {"n_mels": 160}, "model_state_dict": weights}, old)
    said = ("--pipeline", f"{COUGH}/pipeline.yaml", "--classes", "negative,positive")
    run_skewless("import", COUGH, old, *said, "--out", new)
    evaluation = tmp_path / "evaluation"
    run_skewless("evaluate", COUGH, "--checkpoint", new, "--manifest", demonstration.manifest, "--out", evaluation)
    return new, evaluation


def registered(
    server: Server, demonstration: Demonstration, version: str, checkpoint: Path, evaluation: Path, *build: str
) -> str:
    """Build a version into the server's store and register it beside the default version; the archive's name."""
    arguments = ("--checkpoint", checkpoint, "--evaluation", evaluation, "--out", demonstration.store)
    run_skewless("build", COUGH, *arguments, "--version", version, *build)
    archive = demonstration.store / f"cough-{version}.mar"
    run_skewless("register", archive, "--state-dir", server.state_dir)
    return archive.name


def test_an_imported_checkpoint_is_served(server: Server, demonstration: Demonstration, imported: tuple[Path, Path]):
    archive = registered(server, demonstration, "2.0", *imported)
    try:
        rows = smoke_test(server, "cough", "2.0")
        assert len(rows) == 6
        assert all(row.passed and row.max_dp <= SERVED for row in rows), rows
    finally:
        server.unregister("cough", "2.0")
        (demonstration.store / archive).unlink()


def test_onnx_runtime_serves_the_evaluated_probabilities(server: Server, client: Client, demonstration: Demonstration):
    onnx = ("--runtime", "onnxruntime", "--precision", "fp32")
    archive = registered(server, demonstration, "3.0", demonstration.checkpoint, demonstration.evaluation, *onnx)
    try:
        rows = smoke_test(server, "cough", "3.0")
        assert all(row.passed and row.max_dp <= SERVED for row in rows), rows
        (recording,) = (demonstration.evaluation / "references").glob("08.*")
        body = client.predict_rest("cough", recording.read_bytes(), "3.0").body
        assert (body["runtime"], body["precision"], body["tier"]) == ("onnxruntime", "fp32", "exact")
        # The default version is still the first one.
        assert client.predict_rest("cough", recording.read_bytes()).body["runtime"] == "mnn"
    finally:
        server.unregister("cough", "3.0")
        (demonstration.store / archive).unlink()
