"""Building an archive: what is in it, that it runs without TorchServe, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from skewless.packaging.build import BuildError, build_archive
from skewless.training.checkpoint import CheckpointError, file_digest, load_checkpoint
from tests.conftest import ROOT, SERVED, Demonstration, run_skewless

COUGH = ROOT / "archive" / "cough"


def build(demonstration: Demonstration, out: Path, **changes) -> Path:
    arguments = {"archive": COUGH, "checkpoint_path": demonstration.checkpoint, "evaluation": demonstration.evaluation}
    return build_archive(**(arguments | {"version": "1.0", "out": out} | changes)).path


def test_the_same_inputs_give_the_same_bytes(demonstration: Demonstration, tmp_path: Path):
    assert build(demonstration, tmp_path).read_bytes() == demonstration.archive.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["cough-1.0.mar"]


def test_archive_carries_everything_the_number_depends_on(demonstration: Demonstration):
    with zipfile.ZipFile(demonstration.archive) as archive:
        names = set(archive.namelist())
        metrics = json.loads(archive.read("metrics.json"))
        manifest = json.loads(archive.read("MAR-INF/MANIFEST.json"))
    assert {
        "entry.py",
        "skewless/core/pipeline.py",
        "pipeline.yaml",
        "model.yaml",
        "model-config.yaml",
        "encoder.mnn",
        "head.mnn",
    } <= names
    assert "references/references.json" in names
    assert not [n for n in names if "__pycache__" in n or n.endswith((".pth", ".pt", ".pkl"))]
    assert manifest["model"]["modelVersion"] == metrics["model_version"] == "1.0"
    assert metrics["checkpoint_sha256"] == file_digest(demonstration.checkpoint)
    assert set(metrics["library_versions"]) >= {"torch", "torchaudio", "numpy", "soundfile", "av"}


_STANDALONE = """
import json, sys, torch
from skewless.core.service import ModelService
from skewless.core.request import Request
assert not [m for m in sys.modules if m == "ts" or m.startswith("ts.")]
service = ModelService.load(".", torch.device("cpu"))
entries = json.load(open("references/references.json"))
audio = [open("references/" + e["file"], "rb").read() for e in entries]
batch = service.predict([Request(a) for a in audio] + [Request(b"no audio")])
alone = [service.predict([Request(a)])[0] for a in audio]
assert batch[-1].status == 415, batch[-1]
print(json.dumps([[e["scores"][0], b.body["file_probability"], a.body["file_probability"]]
                  for e, b, a in zip(entries, batch, alone)]))
"""


def test_unpacked_archive_runs_without_torchserve(demonstration: Demonstration, tmp_path: Path):
    with zipfile.ZipFile(demonstration.archive) as archive:
        archive.extractall(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", _STANDALONE], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert len(rows) == 8
    for reference, batched, alone in rows:
        assert alone == pytest.approx(reference, abs=SERVED)
        assert batched == alone


def edited_checkpoint(demonstration: Demonstration, tmp_path: Path, change) -> tuple[Path, Path]:
    """A changed checkpoint, and an evaluation that claims to be of it."""
    checkpoint = load_checkpoint(demonstration.checkpoint)
    change(checkpoint)
    path = tmp_path / "edited.pth"
    torch.save(checkpoint, path)
    evaluation = tmp_path / "evaluation"
    shutil.copytree(demonstration.evaluation, evaluation)
    metrics = json.loads((evaluation / "metrics.json").read_text())
    (evaluation / "metrics.json").write_text(json.dumps(metrics | {"checkpoint_sha256": file_digest(path)}))
    return path, evaluation


def refused(demonstration: Demonstration, tmp_path: Path, message: str, error=BuildError, **changes) -> None:
    with pytest.raises(error, match=message):
        build(demonstration, tmp_path / "out", **changes)
    out = tmp_path / "out"
    assert not out.exists() or not list(out.iterdir())


def test_refuses_another_pipeline(demonstration: Demonstration, tmp_path: Path):
    archive = tmp_path / "cough"
    shutil.copytree(COUGH, archive)
    text = (archive / "pipeline.yaml").read_text().replace("cutoff_hz: 50.0", "cutoff_hz: 80.0")
    (archive / "pipeline.yaml").write_text(text)
    refused(
        demonstration, tmp_path, r"highpass.cutoff_hz: 80.0 here, 50.0 there", error=CheckpointError, archive=archive
    )
    result = run_skewless(
        *("build", archive, "--checkpoint", demonstration.checkpoint),
        *("--evaluation", demonstration.evaluation, "--version", "2.0", "--out", tmp_path / "out"),
        check=False,
    )
    assert result.returncode == 2
    assert "highpass.cutoff_hz" in result.stderr
    assert "Traceback" not in result.stderr


def test_refuses_missing_and_unexpected_keys(demonstration: Demonstration, tmp_path: Path):
    def rename(checkpoint):
        weights = checkpoint["model_state_dict"]
        weights["seg_head.kernel"] = weights.pop("seg_head.weight")

    path, evaluation = edited_checkpoint(demonstration, tmp_path, rename)
    message = r"1 missing \(seg_head.weight\); 1 unexpected \(seg_head.kernel\)"
    refused(demonstration, tmp_path, message, CheckpointError, checkpoint_path=path, evaluation=evaluation)


def test_refuses_weights_that_give_other_numbers(demonstration: Demonstration, tmp_path: Path):
    def nudge(checkpoint):
        checkpoint["model_state_dict"]["bag_head.4.bias"] += 0.01

    path, evaluation = edited_checkpoint(demonstration, tmp_path, nudge)
    refused(
        demonstration,
        tmp_path,
        "references are not reproduced.*stage 'network'",
        checkpoint_path=path,
        evaluation=evaluation,
    )


def test_refuses_an_evaluation_of_another_checkpoint(demonstration: Demonstration, tmp_path: Path):
    path = tmp_path / "other.pth"
    torch.save(load_checkpoint(demonstration.checkpoint) | {"epoch": 99}, path)
    refused(demonstration, tmp_path, "measured another checkpoint", checkpoint_path=path)


def test_refuses_an_untrained_network(demonstration: Demonstration, tmp_path: Path):
    def forget(checkpoint):
        weights = checkpoint["model_state_dict"]
        # What a fresh head does: it hardly depends on the features.
        weights["bag_head.4.weight"] *= 1e-3
        # As an import, which has no record of its training.
        checkpoint["validation_scores"] = {}

    path, _ = edited_checkpoint(demonstration, tmp_path, forget)
    evaluation = tmp_path / "measured"
    run_skewless("evaluate", COUGH, "--checkpoint", path, "--manifest", demonstration.manifest, "--out", evaluation)
    refused(demonstration, tmp_path, "looks untrained", checkpoint_path=path, evaluation=evaluation)


def test_refuses_to_replace_a_different_archive(demonstration: Demonstration, tmp_path: Path):
    target = tmp_path / "cough-1.0.mar"
    target.write_bytes(b"another")
    with pytest.raises(BuildError, match="exists and differs"):
        build(demonstration, tmp_path)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"another"]
    assert build(demonstration, tmp_path, force=True).read_bytes() == demonstration.archive.read_bytes()


@pytest.mark.parametrize("version", ["", "1/0", "../1", "v 1"])
def test_refuses_a_version_that_is_no_file_name(demonstration: Demonstration, tmp_path: Path, version: str):
    refused(demonstration, tmp_path, "version is", version=version)


def test_pipeline_file_in_the_archive_is_the_definition(demonstration: Demonstration):
    with zipfile.ZipFile(demonstration.archive) as archive:
        packed = yaml.safe_load(archive.read("pipeline.yaml"))
    assert packed["name"] == "cough"
    assert [next(iter(s)) for s in packed["stages"]][:3] == ["decode", "peak_normalize", "downmix"]


@pytest.mark.parametrize("change", [("threshold: 0.61", "threshold: 0.5"), ("coughDetected", "detected")])
def test_refuses_other_post_processing(demonstration: Demonstration, tmp_path: Path, change: tuple[str, str]):
    """Classes in another order, or another threshold, would give every number another meaning."""
    definition = tmp_path / "cough"
    shutil.copytree(ROOT / "archive" / "cough", definition)
    config = definition / "model.yaml"
    config.write_text(config.read_text().replace(*change))
    with pytest.raises(CheckpointError, match="trained with the post-processing"):
        build_archive(definition, demonstration.checkpoint, demonstration.evaluation, "1.0", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ("{max_seconds: 300}", "limits: unknown parameter max_seconds"),
        ("{max_bytes: 50 MB}", "limits: max_bytes is '50 MB', expected a whole number"),
        ("{max_duration_s: 0.5}", "refuses its own reference .*longer than 0.5 s"),
    ],
)
def test_refuses_limits_that_make_no_sense(demonstration: Demonstration, tmp_path: Path, limits: str, message: str):
    definition = tmp_path / "cough"
    shutil.copytree(ROOT / "archive" / "cough", definition)
    config = definition / "model.yaml"
    config.write_text(re.sub("limits: .*", f"limits: {limits}", config.read_text()))
    with pytest.raises(ValueError, match=message):
        build_archive(definition, demonstration.checkpoint, demonstration.evaluation, "1.0", tmp_path / "out")
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []
