"""Manifests, the spectrogram cache, training that can be interrupted, checkpoints and evaluation."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import soundfile
import torch
from sklearn.metrics import f1_score

from skewless.core.definition import Definition
from skewless.core.networks import Network
from skewless.core.pipeline import Pipeline
from skewless.evaluation.evaluate import evaluate
from skewless.evaluation.metrics import at_threshold, best_threshold, measure_classes
from skewless.training.augment import augment
from skewless.training.cache import StageCache, UnreadableRecordings
from skewless.training.checkpoint import CheckpointError, load_checkpoint, network_of
from skewless.training.config import Config, config_of
from skewless.training.fit import fit
from skewless.training.inputs import measure_batch_statistics
from skewless.training.losses import Batch, ClassLoss
from skewless.training.manifest import ManifestError, Recording, manifest_digest, read_manifest, select
from skewless.training.offline_augmentation import augmented_recordings
from skewless.training.recipe import read_recipe
from tests.conftest import ROOT, Demonstration, run_skewless

COUGH = ROOT / "archive" / "cough"


def write_manifest(path: Path, rows: list[tuple[str, str, str]]) -> Path:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("file_path", "cough_label", "split"), *rows])
    return path


@pytest.fixture
def audio_root(tmp_path: Path) -> Path:
    for name in "abcdef":
        (tmp_path / f"{name}.wav").write_bytes(b"")
    return tmp_path


def test_manifest_reads_every_spelling_of_a_label(audio_root: Path):
    labels = ["1", "TRUE", "yes", "0", "False", "n"]
    rows = [(f"{name}.wav", label, "train") for name, label in zip("abcdef", labels, strict=True)]
    recordings = read_manifest(write_manifest(audio_root / "m.csv", rows), audio_root)
    assert [r.label for r in recordings] == [1, 1, 1, 0, 0, 0]
    reordered = read_manifest(write_manifest(audio_root / "n.csv", rows[::-1]), audio_root)
    assert manifest_digest(recordings) == manifest_digest(reordered)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("a.wav", "maybe", "train"), "row 3: cough_label is 'maybe'"),
        (("a.wav", "", "train"), "row 3: cough_label is ''"),
        (("a.wav", "1", "dev"), "row 3: split is 'dev'"),
        (("z.wav", "1", "train"), "row 3: there is no file"),
        (("b.wav", "1", "train"), "row 3: file_path 'b.wav' is repeated"),
    ],
)
def test_manifest_errors_name_the_row(audio_root: Path, row, message: str):
    manifest = write_manifest(audio_root / "m.csv", [("b.wav", "0", "train"), row])
    with pytest.raises(ManifestError, match=message):
        read_manifest(manifest, audio_root)


def test_a_split_needs_both_labels(audio_root: Path):
    manifest = write_manifest(audio_root / "m.csv", [("a.wav", "1", "train"), ("b.wav", "1", "train")])
    with pytest.raises(ManifestError, match="0 negative, 2 positive"):
        select(read_manifest(manifest, audio_root), "train")


def test_cache_gives_the_pipelines_own_numbers(demonstration: Demonstration, tmp_path: Path):
    pipeline = Pipeline.from_yaml(COUGH / "pipeline.yaml")
    recordings = read_manifest(demonstration.manifest, demonstration.corpus)[:3]
    cache = StageCache(tmp_path, pipeline)
    for recording, entry in cache.prepare(recordings):
        cached = np.load(entry)
        assert cached.dtype == np.float16
        assert torch.equal(cache.finish(torch.from_numpy(cached)), pipeline(recording.path.read_bytes()))


def test_unreadable_recordings_are_named_and_stop_the_run(demonstration: Demonstration, tmp_path: Path):
    corpus = tmp_path / "corpus"
    shutil.copytree(demonstration.corpus, corpus)
    recordings = read_manifest(corpus / "manifest.csv", corpus)
    bad = [r for r in recordings if r.split == "train"][:2]
    for number, recording in enumerate(bad):
        recording.path.write_bytes(b"not audio %d" % number)
    cache = StageCache(tmp_path / "cache", Pipeline.from_yaml(COUGH / "pipeline.yaml"))
    with pytest.raises(UnreadableRecordings) as error:
        cache.prepare(recordings)
    assert list(error.value.failures) == [r.file_path for r in bad]
    assert len(cache.prepare(recordings, skip_unreadable=True)) == len(recordings) - 2
    given = ("--manifest", corpus / "manifest.csv", "--out", tmp_path / "run", "--cache", tmp_path / "cache")
    result = run_skewless("train", COUGH, *given, check=False)
    assert result.returncode == 2
    assert all(r.file_path in result.stderr for r in bad)
    assert not (tmp_path / "run" / "best.pth").exists()


def test_augmentation_keeps_the_range_and_is_seeded():
    x = torch.rand(3, 224, 224).half() * 2 - 1
    first = augment(x, torch.Generator().manual_seed(1))
    assert torch.equal(first, augment(x, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, augment(x, torch.Generator().manual_seed(2)))
    assert first.dtype == torch.float32
    assert (first.min() >= -1, first.max() <= 1) == (True, True)


def _fit(demonstration: Demonstration, out: Path, cache: Path, **changes):
    return fit(
        read_manifest(demonstration.manifest, demonstration.corpus)[:20] + _validation(demonstration),
        Definition.read(COUGH),
        Config(**({"epochs": 2, "learning_rate": 1e-3} | changes)),
        out,
        cache_dir=cache,
        device=torch.device("cpu"),
    )


def _validation(demonstration: Demonstration):
    recordings = read_manifest(demonstration.manifest, demonstration.corpus)
    return [r for r in recordings[20:] if r.split == "val"]


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(demonstration: Demonstration, tmp_path, monkeypatch):
    whole = _fit(demonstration, tmp_path / "whole", tmp_path / "cache")
    from skewless.training import fit as module

    def interrupt(history, patience):
        if len(history) == 1:
            raise KeyboardInterrupt
        return False

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_exhausted", interrupt)
        _fit(demonstration, tmp_path / "parts", tmp_path / "cache")
    assert load_checkpoint(tmp_path / "parts" / "last.pth")["epoch"] == 1
    resumed = _fit(demonstration, tmp_path / "parts", tmp_path / "cache")
    assert resumed["epoch"] == whole["epoch"]
    for name, weight in whole["model_state_dict"].items():
        assert torch.equal(weight, resumed["model_state_dict"][name]), name
    with pytest.raises(CheckpointError, match="another config"):
        _fit(demonstration, tmp_path / "parts", tmp_path / "cache", learning_rate=2e-3)


def test_checkpoint_holds_what_the_number_depends_on(demonstration: Demonstration):
    raw = torch.load(demonstration.checkpoint, weights_only=True)
    wanted = {"epoch", "model_state_dict", "optimizer_state_dict", "val_auc", "val_ap", "config", "pipeline"}
    wanted |= {"pipeline_fingerprint", "library_versions", "manifest_sha256", "network", "postprocess", "history"}
    wanted |= {"code", "training_code", "validation_scores", "stage_sources", "stage_outputs"}
    assert wanted <= set(raw)
    assert raw["pipeline_fingerprint"] == Pipeline.from_yaml(COUGH / "pipeline.yaml").fingerprint
    assert network_of(raw, Definition.read(COUGH)).training is False


def test_checkpoint_refuses_code_and_foreign_files(demonstration: Demonstration, tmp_path: Path):
    code, edited = tmp_path / "code.pth", tmp_path / "edited.pth"
    torch.save({"model": Path}, code)
    with pytest.raises(CheckpointError, match="without running code"):
        load_checkpoint(code)
    torch.save({"model_state_dict": {}}, code)
    with pytest.raises(CheckpointError, match="lacks epoch"):
        load_checkpoint(code)
    checkpoint = load_checkpoint(demonstration.checkpoint)
    checkpoint["pipeline"]["stages"][3]["resample"]["rate"] = 22050
    torch.save(checkpoint, edited)
    with pytest.raises(CheckpointError, match="edited"):
        load_checkpoint(edited)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_checkpoint(tmp_path / "absent.pth")


def test_best_threshold_is_the_f1_optimum():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    probabilities = (0.3 * labels + rng.random(200) * 0.7).clip(0, 1)
    chosen = best_threshold(labels, probabilities)
    scores = {t: f1_score(labels, probabilities > t) for t in np.linspace(0.01, 0.99, 99)}
    assert f1_score(labels, probabilities > chosen) == max(scores.values())


def test_at_threshold_by_hand():
    row = at_threshold(np.array([0, 0, 1, 1, 1]), np.array([0.2, 0.8, 0.5, 0.6, 0.9]), 0.5)
    # The decision is strict: 0.5 is not above 0.5.
    assert row["confusion"] == {"true_negative": 1, "false_positive": 1, "false_negative": 1, "true_positive": 2}
    assert (row["accuracy"], row["precision"], row["recall"]) == (3 / 5, 2 / 3, 2 / 3)
    assert row["f1"] == pytest.approx(2 / 3)


def test_evaluation_writes_numbers_and_pictures(demonstration: Demonstration):
    folder = demonstration.evaluation
    metrics = json.loads((folder / "metrics.json").read_text())
    with open(folder / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    manifest = read_manifest(demonstration.manifest, demonstration.corpus)
    assert {r["file_path"] for r in rows} == {r.file_path for r in manifest if r.split in ("val", "test")}
    labels, probabilities = np.array(
        [[int(r["label"]), float(r["probability"])] for r in rows if r["split"] == "test"]
    ).T
    positives, negatives = probabilities[labels == 1], probabilities[labels == 0]
    # The area under the ROC curve is the chance that a positive outranks a negative (Mann and Whitney).
    pairs = positives[:, None] - negatives[None, :]
    assert metrics["auc"] == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())
    assert metrics["brier"] == pytest.approx(((probabilities - labels) ** 2).mean())
    assert [m["threshold"] for m in metrics["at_thresholds"]] == [0.3, 0.4, 0.5, 0.6, 0.7]
    for name in ("roc", "pr", "calibration", "training"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for value in probabilities:
        assert float(np.float32(value)) == value


def _evaluate(demonstration: Demonstration, rows: list[Recording], out: Path, skip_unreadable: bool = False) -> dict:
    checkpoint = load_checkpoint(demonstration.checkpoint)
    given = (Definition.read(COUGH), checkpoint, demonstration.checkpoint, rows, "test", out, torch.device("cpu"))
    return evaluate(*given, skip_unreadable=skip_unreadable)


def test_evaluating_twice_gives_the_same_files(demonstration: Demonstration, tmp_path: Path):
    _evaluate(demonstration, read_manifest(demonstration.manifest, demonstration.corpus), tmp_path)
    for name in ("metrics.json", "predictions.csv", "references/references.json"):
        assert (tmp_path / name).read_bytes() == (demonstration.evaluation / name).read_bytes()


def test_evaluation_names_unreadable_recordings_or_skips_them(demonstration: Demonstration, tmp_path: Path, capsys):
    rows = read_manifest(demonstration.manifest, demonstration.corpus)
    bad = next(r for r in rows if r.split == "test")
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"not audio")
    rows = [replace(r, path=broken) if r == bad else r for r in rows]
    with pytest.raises(UnreadableRecordings, match=bad.file_path):
        _evaluate(demonstration, rows, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    metrics = _evaluate(demonstration, rows, tmp_path / "out", skip_unreadable=True)
    assert bad.file_path in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics
    assert metrics["skipped"] == 1
    assert metrics["recordings"] == sum(r.split == "test" for r in rows) - 1


# --- groups, splits and classes ---------------------------------------------------------------------------------------


def write_rows(path: Path, header: str, rows: list[tuple]) -> Path:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    for name, *_ in rows:
        (path.parent / name).write_bytes(b"")
    return path


def test_labels_are_class_names(tmp_path: Path):
    rows = [("a.png", "human", "train"), ("b.png", "Animal", "val"), ("c.png", "avatar", "test")]
    manifest = write_rows(tmp_path / "m.csv", "file_path,label,split", rows)
    recordings = read_manifest(manifest, tmp_path, ("animal", "avatar", "human"))
    assert [r.label for r in recordings] == [2, 0, 1]
    with pytest.raises(ManifestError, match="row 2: label is 'human', expected one of"):
        read_manifest(manifest, tmp_path, ("cat", "dog"))
    with pytest.raises(ManifestError, match="1 animal, 0 avatar, 0 human"):
        select(recordings, "val", ("animal", "avatar", "human"))


def test_class_names_win_over_yes_and_no_and_spreadsheets_may_mark_their_encoding(tmp_path: Path):
    rows = [("a.wav", "yes", "train"), ("b.wav", "no", "train")]
    manifest = write_rows(tmp_path / "m.csv", "file_path,label,split", rows)
    manifest.write_bytes(b"\xef\xbb\xbf" + manifest.read_bytes())
    assert [r.label for r in read_manifest(manifest, tmp_path, ("yes", "no"))] == [0, 1]
    assert [r.label for r in read_manifest(manifest, tmp_path)] == [1, 0]


def test_one_file_is_listed_once_however_it_is_spelt(tmp_path: Path):
    rows = [("a.wav", "1", "train"), ("./a.wav", "0", "test")]
    with pytest.raises(ManifestError, match=r"row 3: file_path '\./a\.wav' is repeated"):
        read_manifest(write_rows(tmp_path / "m.csv", "file_path,label,split", rows), tmp_path)


def test_a_group_belongs_to_one_split(tmp_path: Path):
    rows = [("a.wav", "1", "train", "ada"), ("b.wav", "0", "test", "ada")]
    manifest = write_rows(tmp_path / "m.csv", "file_path,label,split,group", rows)
    with pytest.raises(ManifestError, match="group 'ada' is in splits train and test"):
        read_manifest(manifest, tmp_path)


def test_a_manifest_without_splits_is_split_by_group_and_label(tmp_path: Path):
    rows = [(f"{k}.wav", str(k % 2), f"singer {k // 4}") for k in range(160)]
    recordings = read_manifest(write_rows(tmp_path / "m.csv", "file_path,label,group", rows), tmp_path)
    splits = {split: [r for r in recordings if r.split == split] for split in ("train", "val", "test")}
    assert [len(splits[s]) for s in ("train", "val", "test")] == pytest.approx([102, 26, 32], abs=8)
    for one in splits.values():
        assert 0.4 <= np.mean([r.label for r in one]) <= 0.6
    groups = [{r.group for r in one} for one in splits.values()]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    # The same again, whatever else is in memory.
    assert read_manifest(tmp_path / "m.csv", tmp_path) == recordings


def test_a_split_column_is_filled_or_empty(tmp_path: Path):
    rows = [("a.wav", "1", "train"), ("b.wav", "0", "")]
    with pytest.raises(ManifestError, match=r"split is empty for b\.wav"):
        read_manifest(write_rows(tmp_path / "m.csv", "file_path,label,split", rows), tmp_path)


def test_a_plateau_halves_the_rate():
    config = Config(learning_rate=1.0, schedule="plateau", plateau_patience=2, epochs=9)
    losses = [5.0, 4.0, 4.0, 4.5, 3.0, 3.0, 3.0, 3.0, 3.0]
    history = [{"val_loss": loss} for loss in losses]
    rates = [config.rate(history[:k]) for k in range(len(losses) + 1)]
    assert rates == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.125]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epoch": 3}, "training settings: unknown parameter epoch; it takes: epochs, batch_size"),
        ({"schedule": "linear"}, "schedule is 'linear', expected 'cosine' or 'plateau'"),
        ({"trained": "tail"}, "trained is 'tail', expected 'all' or 'head'"),
        ({"offline_augmentation": -1}, "offline_augmentation is -1, expected at least 0"),
        ({"learning_rate": "1e-3"}, r"learning_rate is '1e-3', expected a number \(float\)"),
        ({"learning_rate": 0}, r"learning_rate is 0\.0, expected a number above 0"),
        ({"epochs": 4.5}, r"epochs is 4\.5, expected a whole number \(int\)"),
        ({"batch_size": 1}, "batch_size is 1, expected at least 2"),
        ({"augmentation": "false"}, "augmentation is 'false', expected true or false"),
        ({1: 2}, "unknown parameter 1"),
        ({"trained": "head"}, "trained: head needs augmentation: false"),
        ({"loss": {"bag": {}, "classes": {}}}, "expected one 'name: {parameters}'"),
        ({"loss": "bag"}, "loss is 'bag', expected"),
    ],
)
def test_settings_that_make_no_sense(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        config_of(settings)


def test_a_config_made_in_python_is_checked_too():
    with pytest.raises(ValueError, match="schedule is 'linear'"):
        Config(schedule="linear")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "corpus: {kind: talent}\ntrainings: {epochs: 3}\n",
            "has the unknown part trainings; it takes: corpus, training",
        ),
        ("corpus: {kind: talent}\n", "has no 'training' with parameters below it"),
        ("training: 3\n", "has no 'training' with parameters below it"),
        ("[3]\n", r"is \[3\], expected the parts corpus and training"),
        ("training: {epochs: 3", "is not YAML"),
    ],
)
def test_a_recipe_has_two_parts(tmp_path: Path, text: str, message: str):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_recipe(tmp_path / "recipe.yaml", "training")


@pytest.mark.parametrize("name", ["cough", "orca", "talent", "portrait"])
def test_the_archives_recipes_are_settings(name: str):
    recipe = ROOT / "archive" / name / "recipe.yaml"
    assert config_of(read_recipe(recipe, "training")).epochs > 1
    assert read_recipe(recipe, "corpus")["kind"] == name


def test_figures_of_three_classes():
    """By hand: six inputs, five right; the third class is once taken for the first."""
    labels = np.array([0, 0, 1, 1, 2, 2])
    probabilities = np.array(
        [[0.8, 0.1, 0.1], [0.7, 0.2, 0.1], [0.1, 0.9, 0.0], [0.2, 0.6, 0.2], [0.1, 0.1, 0.8], [0.5, 0.1, 0.4]]
    )
    found = measure_classes(labels, probabilities, ("first", "second", "third"), 0.65)
    assert found["accuracy"] == pytest.approx(5 / 6)
    assert found["confusion"] == [[2, 0, 0], [0, 2, 0], [1, 0, 1]]
    assert found["per_class"]["third"] == {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 2.0}
    assert found["macro_f1"] == pytest.approx((0.8 + 1 + 2 / 3) / 3)
    assert found["confident"] == pytest.approx(4 / 6)
    errors = [0.06, 0.14, 0.02, 0.24, 0.06, 0.62]
    assert found["brier"] == pytest.approx(np.mean(errors))
    assert found["auc"] == 1.0


# --- what is trained --------------------------------------------------------------------------------------------------


class TwoLayers(Network):
    """An encoder with batch normalisation, and a head: `(N, 4)` to logits `(N, 3)`."""

    input_shape: ClassVar[tuple[int, ...]] = (4,)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5))
        self.last = torch.nn.Linear(5, 3)

    def encode(self, x):
        return self.body(x)

    def logits(self, features):
        return self.last(features)


def test_every_segment_has_its_recordings_label_and_every_class_its_weight():
    network = TwoLayers().eval()
    inputs, labels = [torch.randn(2, 4), torch.randn(1, 4)], torch.tensor([2, 0])
    counts = torch.tensor([1.0, 2.0, 3.0])
    loss = ClassLoss()(network, Batch(inputs, labels, counts))
    logs = torch.log_softmax(network.logits(network.encode(torch.cat(inputs))), dim=1)
    weights = {0: 6 / 3 / 1, 2: 6 / 3 / 3}
    chosen = [(0, 2), (1, 2), (2, 0)]
    expected = -sum(weights[k] * logs[n, k] for n, k in chosen) / 3
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    features = [network.encode(x) for x in inputs]
    assert torch.equal(ClassLoss()(network, Batch(features, labels, counts, frozen=True)), loss)


def test_batch_statistics_of_a_frozen_encoder_are_the_training_sets():
    network = TwoLayers()
    x = torch.randn(12, 4)
    measure_batch_statistics(network, lambda number: x[number : number + 1], range(12), batch_size=4)
    hidden = network.body[0](x).detach()
    assert torch.allclose(network.body[1].running_mean, hidden.mean(dim=0), atol=1e-6)
    variances = torch.stack([part.var(dim=0) for part in hidden.split(4)]).mean(dim=0)
    assert torch.allclose(network.body[1].running_var, variances, atol=1e-5)
    assert network.body[1].momentum == 0.1


def test_a_bag_is_trained_as_a_whole(demonstration: Demonstration, tmp_path: Path):
    with pytest.raises(ValueError, match="choose trained: all"):
        _fit(demonstration, tmp_path, tmp_path / "cache", trained="head", augmentation=False)


def test_augmentation_of_what_is_no_spectrogram_is_refused(demonstration: Demonstration, tmp_path: Path):
    orca = ROOT / "archive" / "orca"
    with pytest.raises(ValueError, match="augmentation is of scaled spectrograms, pipeline 'orca' gives values in dB"):
        fit(
            read_manifest(demonstration.manifest, demonstration.corpus),
            Definition.read(orca),
            Config(),
            tmp_path / "run",
            cache_dir=tmp_path / "cache",
            device=torch.device("cpu"),
        )


def test_copies_stay_in_their_recordings_split_and_group(tmp_path: Path):
    rows = [("a.wav", "1", "train", "ada"), ("b.wav", "0", "train", "ben")]
    manifest = write_rows(tmp_path / "m.csv", "file_path,label,split,group", rows)
    recordings = read_manifest(manifest, tmp_path)
    soundfile.write(recordings[0].path, np.sin(np.arange(8000) / 5), 8000)
    made = augmented_recordings(recordings, 2, 42, tmp_path / "copies")
    # b.wav cannot be read: it has no copies, and preparing the originals says why.
    assert [(r.file_path, r.label, r.split, r.group) for r in made] == [
        ("a.wav, copy 1", 1, "train", "ada"),
        ("a.wav, copy 2", 1, "train", "ada"),
    ]
    contents = {r.path.read_bytes() for r in [recordings[0], *made]}
    assert len(contents) == 3
    before = [r.path.stat().st_mtime_ns for r in made]
    assert [r.path.stat().st_mtime_ns for r in augmented_recordings(recordings, 2, 42, tmp_path / "copies")] == before
