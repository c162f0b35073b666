"""Recordings shorter than one window, of which `segment` with `short: none` gives no window: from the stages to the answer."""

from __future__ import annotations

import csv
import json
import shutil
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from skewless.core.definition import Definition
from skewless.core.pipeline import Pipeline
from skewless.core.postprocess.vote import SecondsVote
from skewless.core.request import Request
from skewless.core.runtimes import RUNTIMES, RuntimeSettings
from skewless.core.service import ModelService
from skewless.core.stages import STAGES, InputError, PipelineError, Signal
from skewless.evaluation.evaluate import evaluate
from skewless.evaluation.scores import service_of
from skewless.packaging.build import build_archive
from skewless.packaging.execution import Execution
from skewless.packaging.probes import network_inputs
from skewless.programs.score import network_score
from skewless.skew.measure import Comparator
from skewless.training.cache import StageCache, UnreadableRecordings
from skewless.training.checkpoint import load_checkpoint
from skewless.training.config import Config
from skewless.training.fit import fit
from skewless.training.manifest import read_manifest
from tests import recordings
from tests.recordings import one_thread  # noqa: F401

CPU = torch.device("cpu")
# At 8 kHz one sample less than a window, exactly one, and one sample more.
SHORT, EXACT, LONG = (recordings.wav(recordings.coughs(16000, 2.1)[:, :n], 16000) for n in (31998, 32000, 32002))

PIPELINE = """\
name: whistles
stages:
  - decode: {}
  - downmix: {}
  - resample: {rate: 8000, method: resample_poly}
  - segment: {duration_s: 2.0, hop_s: 1.0, max_segments: 20, tail: drop, short: none}
  - mel: {n_fft: 512, win_length: 512, hop_length: 200, n_mels: 16, f_min: 0.0, f_max: 4000.0}
  - decibel: {top_db: 80.0}
  - pad_frames: {frames: 90, value_db: 0.0, relative_to: minimum}
  - scale: {low: -80.0, high: 20.0, to: [-1.0, 1.0]}
  - replicate: {channels: 1}
"""
MODEL = """\
network: {tiny.py:TinyNetwork: {}}
runtime: {eager: {micro_batch: 4}}
postprocess: {seconds_vote: {threshold: 0.5, min_positive_s: 2, positive_field: whistle, classes: [other, whistle]}}
precision: {tf32: false, threads: 1}
limits: {max_duration_s: 60.0, max_read_s: 5.0}
"""
NETWORK = '''\
"""A network small enough to be trained within a test."""

import torch
from torch import nn

from skewless.core.networks import Network


class TinyNetwork(Network):
    """Images `(N, 1, 16, 90)` to class probabilities `(N, 2)`, from each filter's mean and two linear layers."""

    input_name = "images"

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(16, 4)
        self.output = nn.Linear(4, 2)

    def encode(self, x):
        means = x[:, 0].mean(dim=2)
        return torch.tanh(self.project(means - means.mean(dim=1, keepdim=True)))

    def logits(self, features):
        return self.output(features)

    def head(self, features):
        logits = self.logits(features)
        return {"class_logits": logits, "class_probabilities": torch.softmax(logits, dim=1)}
'''


def definition(folder: Path, model: str = MODEL, pipeline: str = PIPELINE) -> Definition:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny.py").write_text(NETWORK, encoding="utf-8")
    (folder / "model.yaml").write_text(model, encoding="utf-8")
    (folder / "pipeline.yaml").write_text(pipeline, encoding="utf-8")
    shutil.copy(Path(__file__).parents[1] / "archive" / "orca" / "model-config.yaml", folder)
    return Definition.read(folder)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return definition(tmp_path_factory.mktemp("pipeline")).pipeline


# Stages


def test_windows_around_the_length_of_one(pipeline):
    runs = [pipeline.run(recording) for recording in (SHORT, EXACT, LONG)]
    assert [tuple(out.data.shape) for out in runs] == [(0, 1, 16, 90), (1, 1, 16, 90), (1, 1, 16, 90)]
    metadata = runs[0].metadata
    assert (metadata["segment_times_s"], metadata["analyzed_s"], metadata["truncated"]) == ([], 0.0, False)
    assert metadata["duration_s"] == 31998 / 16000


def test_short_pad_is_the_padded_window_of_before(pipeline):
    """What "drop" gave before there was a choice, by name or not; longer recordings are the same in both ways."""
    for text in (PIPELINE.replace("short: none", "short: pad"), PIPELINE.replace(", short: none", "")):
        padded = Pipeline.from_dict(yaml.safe_load(text))
        assert padded(SHORT).shape == (1, 1, 16, 90)
        assert torch.equal(padded(EXACT), pipeline(EXACT))


def test_pipelines_from_before_keep_their_fingerprint(pipeline):
    without, with_pad = (
        Pipeline.from_dict(yaml.safe_load(PIPELINE.replace(old, new)))
        for old, new in ((", short: none", ""), ("short: none", "short: pad"))
    )
    assert with_pad.fingerprint == without.fingerprint != pipeline.fingerprint
    assert "short" not in without.to_yaml()
    assert [str(each) for each in without.diff(pipeline)] == ["segment.short: 'pad' here, 'none' there"]
    assert Pipeline.from_dict(pipeline.to_dict()).fingerprint == pipeline.fingerprint


def test_padded_tails_know_no_short_recordings():
    with pytest.raises(PipelineError, match="stage 'segment': short none does nothing with tail pad"):
        STAGES["segment"](duration_s=2.0, hop_s=1.0, max_segments=3, tail="pad", short="none")


def test_together_stages_give_what_they_give_one_by_one(pipeline):
    for recording in (SHORT, EXACT):
        plain = pipeline.run(recording, whole=True)
        assert torch.equal(pipeline(recording), plain.data)
        assert torch.equal(list(pipeline.trace(recording).values())[-1], plain.data)


@pytest.mark.parametrize(
    ("stage", "params", "given", "shape"),
    [
        ("resample", {"rate": 8000, "method": "sinc_hann"}, (44100,), (8000,)),
        ("resample", {"rate": 8000, "method": "resample_poly"}, (44100,), (8000,)),
        ("resample", {"rate": 8000, "method": "soxr_hq"}, (44100,), (8000,)),
        ("pcm", {"bits": 16, "rounding": "floor"}, (800,), (800,)),
        ("highpass", {"cutoff_hz": 50.0}, (800,), (800,)),
        (
            "mel",
            {"n_fft": 512, "win_length": 512, "hop_length": 200, "n_mels": 16, "f_min": 0.0, "f_max": 4000.0},
            (8000,),
            (16, 41),
        ),
        ("decibel", {"top_db": 80.0}, (16, 41), (16, 41)),
        ("decibel", {"top_db": 80.0, "max_over": "recording"}, (16, 41), (16, 41)),
        ("pad_frames", {"frames": 50, "value_db": 0.0}, (16, 41), (16, 50)),
        ("pad_frames", {"frames": 50, "value_db": 0.0, "relative_to": "minimum"}, (16, 41), (16, 50)),
        ("scale", {"low": -80.0, "high": 0.0, "to": (0.0, 1.0)}, (16, 41), (16, 41)),
        ("letterbox", {"size": 64, "pad_value": 0.0}, (16, 41), (64, 64)),
        ("cast", {"dtype": "float16"}, (16, 41), (16, 41)),
        ("replicate", {"channels": 3}, (16, 41), (3, 16, 41)),
        ("standardize", {"mean": (0.5,), "std": (0.2,)}, (1, 16, 41), (1, 16, 41)),
    ],
)
def test_stages_behind_segment_take_no_window(stage, params, given, shape):
    """And give none, of the shape and type that they give for one."""
    facts = {"num_samples": 44100, "peak": 1.0, "duration_s": 1.0}
    none, one = (STAGES[stage](**params)(Signal(torch.zeros(rows, *given), 44100, dict(facts))) for rows in (0, 1))
    assert tuple(none.data.shape) == (0, *shape) and tuple(one.data.shape) == (1, *shape)
    assert none.data.dtype == one.data.dtype
    assert none.metadata == one.metadata


# Network


@pytest.mark.parametrize("name", list(RUNTIMES))
def test_runtimes_have_nothing_to_say_of_no_window(name, tmp_path):
    """Wherever it stands in a batch, and its neighbours have the same numbers as alone, to the last bit where a runtime has that."""
    network = definition(tmp_path)
    built, settings = network.build_network().eval(), RuntimeSettings(micro_batch=2)
    rows = torch.randn(5, 1, 16, 90, generator=torch.Generator().manual_seed(0))
    RUNTIMES[name].write(built, tmp_path, settings, [rows])
    runtime = RUNTIMES[name].load(tmp_path, network.network, CPU, settings)
    none, (alone,) = rows[:0], runtime([rows])
    assert runtime([]) == [] and runtime([none]) == [{}] and runtime([none, none]) == [{}, {}]
    for batch in ([none, rows], [rows, none], [none, rows, none]):
        given = runtime(batch)
        assert [bool(outputs) for outputs in given] == [len(each) > 0 for each in batch]
        found = next(outputs for outputs in given if outputs)
        torch.testing.assert_close(found["class_probabilities"], alone["class_probabilities"], atol=1e-6, rtol=0)


# Answers


def service(folder: Path, postprocess: str) -> ModelService:
    """The pipeline with a network that says the same of every window: a probability of 0.7310585."""
    written = definition(folder, MODEL.replace(MODEL.splitlines()[2], f"postprocess: {postprocess}"))
    network = written.build_network()
    with torch.no_grad():
        network.output.weight.zero_()
        network.output.bias.copy_(torch.tensor([0.0, 1.0]))
    runtime = RUNTIMES["eager"](network, CPU, RuntimeSettings(micro_batch=2))
    return ModelService(written, runtime, metrics={"model_version": "1.0"})


NAMES = "positive_field: whistle, classes: [other, whistle]"
ANSWER_ANYWAY = {
    "seconds": f"{{seconds_vote: {{threshold: 0.5, min_positive_s: 2, {NAMES}}}}}",
    "windows": f"{{windows_vote: {{threshold: 0.5, min_positive_windows: 1, {NAMES}}}}}",
    "top": f"{{top_windows_mean: {{threshold: 0.6, top: 2, window_threshold: 0.5, {NAMES}}}}}",
    "mean": f"{{positive_windows_mean: {{threshold: 0.0, window_threshold: 0.5, {NAMES}}}}}",
}


@pytest.mark.parametrize("threshold", [None, 0.0, 1.0])
@pytest.mark.parametrize("kind", ANSWER_ANYWAY)
def test_no_window_is_a_negative_answer(kind, threshold, tmp_path):
    """At any threshold, in the middle of a batch, whose other recordings have their own answer."""
    served = service(tmp_path, ANSWER_ANYWAY[kind])
    answers = served.predict([Request(recording, threshold) for recording in (LONG, SHORT, EXACT)])
    assert [answer.status for answer in answers] == [200, 200, 200]
    body = answers[1].body
    json.dumps(body, allow_nan=False)
    pieces = "seconds" if kind == "seconds" else "windows"
    assert body["whistle"] is False
    assert (body["global_confidence"], body[pieces], body[f"positive_{pieces}"]) == (0.0, [], [])
    assert (body["analyzed_s"], body["duration_s"]) == (0.0, 31998 / 16000)
    assert served.postprocessor.read(body) == ((0.0,), 0)
    for at in (0, 2):
        expected = 100.0 if pieces == "seconds" or kind == "windows" else 1.0
        wanted = 0.0 if threshold == 1.0 and kind in ("seconds", "windows") else 0.7310585 * expected
        assert answers[at].body["global_confidence"] == pytest.approx(wanted, abs=1e-4)
        assert answers[at].body["whistle"] is (threshold != 1.0)
    (scored,) = served.score([SHORT])
    assert (scored.scores, scored.parts, scored.chosen(0.0)) == ((0.0,), (), 0)


def test_where_there_is_no_answer_the_recording_is_refused_alone(tmp_path):
    served = service(tmp_path, f"{{label_threshold: {{threshold: 0.5, {NAMES}}}}}")
    served = replace(served, runtime=_One(served.runtime))
    answers = served.predict([Request(recording) for recording in (LONG, SHORT, EXACT)])
    assert [answer.status for answer in answers] == [200, 400, 200]
    assert "shorter than one window, and this model has no answer without one" in answers[1].body["message"]
    with pytest.raises(InputError, match="shorter than one window"):
        served.score([SHORT])


class _One:
    """A runtime whose network has one probability for a recording."""

    def __init__(self, runtime):
        self._runtime, self.rows_at_once = runtime, runtime.rows_at_once
        self.name, self.precision, self.tier = runtime.name, runtime.precision, runtime.tier

    def __call__(self, inputs):
        return [{"probability": given["class_probabilities"][0, 1]} for given in self._runtime(inputs)]


@pytest.mark.parametrize("name", ["bag_threshold", "class_probabilities", "label_threshold"])
def test_post_processing_that_needs_a_window_says_so(name, tmp_path):
    classes = "[a, b, c]" if name == "class_probabilities" else "[a, b]"
    field = "" if name == "class_probabilities" else ", positive_field: b"
    found = service(tmp_path, f"{{{name}: {{threshold: 0.5, classes: {classes}{field}}}}}").postprocessor
    found.require_windows(1)
    with pytest.raises(InputError, match="shorter than one window"):
        found.require_windows(0)


# The whole chain


@dataclass(frozen=True)
class Trained:
    definition: Definition
    checkpoint: Path
    evaluation: Path
    manifest: Path
    served: ModelService


def recording(label: int, seed: int, seconds: float) -> bytes:
    """A low tone (0), or a high one (1), in noise."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * 16000)) / 16000
    tone = 0.3 * np.sin(2 * np.pi * rng.uniform(*((1500, 3500) if label else (100, 500))) * time)
    return recordings.wav((tone + 0.03 * rng.standard_normal(len(time)))[None], 16000)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Trained, evaluated and built, with recordings without a window in the test split and among the references."""
    root = tmp_path_factory.mktemp("chain")
    written = definition(root / "whistles")
    (root / "corpus").mkdir()
    rows = []
    for number, split in enumerate(["train"] * 12 + ["val"] * 6 + ["test"] * 6):
        seconds = 1.5 if number in (20, 22) else 3.2
        (root / "corpus" / f"{number}.wav").write_bytes(recording(number % 2, number, seconds))
        rows.append((f"{number}.wav", ("other", "whistle")[number % 2], split))
    with open(root / "corpus" / "manifest.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file_path", "label", "split"), *rows])
    found = read_manifest(root / "corpus" / "manifest.csv", root / "corpus", written.classes)
    config = Config(epochs=15, batch_size=4, learning_rate=0.05, patience=15, augmentation=False)
    checkpoint = fit(found, written, config, root / "run", cache_dir=root / "cache", device=CPU)
    path = root / "run" / "best.pth"
    evaluate(written, checkpoint, path, found, "test", root / "evaluation", CPU, references=6)
    built = build_archive(written.folder, path, root / "evaluation", "1.0", root / "store")
    with zipfile.ZipFile(built.path) as packed:
        packed.extractall(root / "unpacked")
    served = ModelService.load(root / "unpacked", CPU)
    return Trained(written, path, root / "evaluation", root / "corpus" / "manifest.csv", served)


def test_an_archive_replays_references_without_windows(trained):
    entries = json.loads((trained.evaluation / "references" / "references.json").read_text())
    assert [entry["parts"] for entry in entries if entry["source"] in ("20.wav", "22.wav")] == [[], []]
    assert [entry["scores"] for entry in entries if entry["source"] in ("20.wav", "22.wav")] == [[0.0], [0.0]]
    assert trained.served.self_test is not None and trained.served.self_test.max_dp == 0.0
    metrics = json.loads((trained.evaluation / "metrics.json").read_text())
    json.dumps(metrics, allow_nan=False)


def test_a_changed_record_of_no_window_is_noticed(trained, tmp_path):
    """An archive whose pipeline now pads what was recorded as no window does not load."""
    shutil.copytree(trained.served.definition.folder, tmp_path / "unpacked")
    changed = tmp_path / "unpacked" / "pipeline.yaml"
    assert "short: none" in changed.read_text()
    changed.write_text(changed.read_text().replace(", short: none", ""))
    with pytest.raises(
        ValueError, match=r"stage 'segment' differs on .*\(1, 16000\) float32, recorded with \(0, 16000\)"
    ):
        ModelService.load(tmp_path / "unpacked", CPU)


def test_skew_reports_compare_no_window_with_a_padded_one(trained):
    with_pad = Pipeline.from_dict(yaml.safe_load(PIPELINE.replace(", short: none", "")))
    pair = Comparator(trained.served.pipeline, with_pad, trained.served.runtime, trained.served.postprocessor)
    measured = pair.measure("20.wav", recording(0, 20, 1.5), 0)
    assert measured.reference.parts == () and len(measured.candidate.parts) == 2
    assert (measured.reference.scores, measured.without_effect) == ((0.0,), frozenset())
    same = pair.measure("21.wav", recording(1, 21, 3.2), 1)
    assert same.change == 0.0 and same.without_effect == {0}


def test_programs_are_scored_without_windows(trained):
    score, _ = network_score(trained.definition.folder, trained.checkpoint, trained.manifest.parent / "0.wav")
    assert score(np.zeros((0, 1, 16, 90), dtype=np.float32)) == (0.0,)


def test_reports_and_programs_say_so_where_there_is_no_answer(trained, monkeypatch):
    monkeypatch.setattr(SecondsVote, "without_windows", False)
    served = trained.served
    pair = Comparator(served.pipeline, served.pipeline, served.runtime, served.postprocessor)
    with pytest.raises(InputError, match="reference: this recording is shorter than one window"):
        pair.measure("20.wav", recording(0, 20, 1.5))
    score, _ = network_score(trained.definition.folder, trained.checkpoint, trained.manifest.parent / "0.wav")
    with pytest.raises(ValueError, match=r"the network cannot take \(0, 1, 16, 90\).*shorter than one window"):
        score(np.zeros((0, 1, 16, 90), dtype=np.float32))


def test_value_ranges_are_taken_from_windows(trained):
    """A reduced precision is calibrated by the recordings that have any."""
    rows = read_manifest(trained.manifest, trained.manifest.parent, trained.definition.classes)
    calibration = [replace(row, split="train") for row in rows[19:]]
    execution = Execution("onnxruntime", "int8", recordings=rows, calibration=calibration)
    examples = list(execution._calibration_inputs(trained.definition.pipeline))
    assert [len(example) for example in examples] == [2, 2, 2]


def test_training_names_the_recordings_without_a_window(trained, tmp_path):
    rows = read_manifest(trained.manifest, trained.manifest.parent, trained.definition.classes)
    cache = StageCache(tmp_path, trained.definition.pipeline)
    with pytest.raises(UnreadableRecordings, match=r"2 recording\(s\)(.|\n)*20\.wav: it is shorter than one window"):
        cache.prepare(rows)
    assert len(cache.prepare(rows, skip_unreadable=True)) == 22
    with pytest.raises(UnreadableRecordings):
        cache.prepare(rows)


def test_probes_shorter_than_a_window_give_a_row_of_the_networks_shape():
    """The runtimes' graphs are written by them."""
    long_windows = Pipeline.from_dict(yaml.safe_load(PIPELINE.replace("duration_s: 2.0", "duration_s: 3.0")))
    examples = list(network_inputs(long_windows))
    assert len(examples) == 6
    assert all(example.shape == (1, 1, 16, 90) and not example.any() for example in examples)


def test_evaluation_counts_them_as_negative(trained):
    rows = list(csv.DictReader((trained.evaluation / "predictions.csv").open()))
    assert {row["file_path"]: row["probability"] for row in rows if row["file_path"] in ("20.wav", "22.wav")} == {
        "20.wav": "0.0",
        "22.wav": "0.0",
    }
    found = service_of(trained.definition, load_checkpoint(trained.checkpoint), CPU)
    assert found.score([recording(0, 20, 1.5)])[0].scores == (0.0,)
