"""Importing other scripts' checkpoints: what is read and refused, and that the right pipeline is named."""

from __future__ import annotations

import csv
import json
import os
import pickle
import shutil
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from skewless.core.definition import Definition
from skewless.core.networks import Network
from skewless.core.pipeline import Pipeline
from skewless.core.service import ModelService
from skewless.evaluation.evaluate import evaluate
from skewless.evaluation.scores import Prediction, predict, service_of
from skewless.importers import evidence
from skewless.importers.agreement import check_config, check_servable
from skewless.importers.checkpoint import write
from skewless.importers.errors import ImportFileError
from skewless.importers.evidence import Trial, compare, judge, read_predictions
from skewless.importers.pytorch import read_pytorch
from skewless.importers.run import ImportRequest, ImportResult, import_file
from skewless.importers.weights import network_from
from skewless.training.checkpoint import CheckpointError, file_digest, load_checkpoint, network_of
from skewless.training.manifest import Recording, read_manifest
from skewless.training.untrained import UntrainedError, require_trained
from tests.conftest import ROOT, Demonstration, run_skewless
from tests.recordings import one_thread, wav  # noqa: F401

COUGH = ROOT / "archive" / "cough"
DEFINITION = Definition.read(COUGH)
CLASSES = ("negative", "positive")
PIPELINE = DEFINITION.pipeline
CONFIG = {
    "sample_rate": 16000,
    "segment_duration": 2.0,
    "hop_length": 0.5,
    "n_fft": 1024,
    "hop_length_fft": 160,
    "n_mels": 160,
    "f_min": 50.0,
    "f_max": 4000,
    "resize_to_224": True,
    "model_name": "resnet18",
    "dropout": 0.3,
    "pretrained": True,
    "max_segments_per_file": 32,
    "attn_hidden": 128,
    "batch_size": 8,
}
WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def weights_and(**more: Any) -> dict[str, Any]:
    return {"model_state_dict": WEIGHTS, **more}


def as_training_scripts_write_it(weights: dict[str, torch.Tensor], **changes: Any) -> dict[str, Any]:
    parameters = [nn.Parameter(torch.zeros(2))]
    optimizer = torch.optim.AdamW(parameters)
    parameters[0].grad = torch.ones(2)
    optimizer.step()
    content = {
        "epoch": 3,
        "model_state_dict": weights,
        "optimizer_state_dict": optimizer.state_dict(),
        "val_auc": np.float64(0.9904),
        "config": CONFIG,
    }
    return content | changes


@pytest.mark.parametrize(
    ("content", "epoch", "auc"),
    [
        (as_training_scripts_write_it(WEIGHTS), 3, 0.9904),
        (as_training_scripts_write_it({f"module.{k}": v for k, v in WEIGHTS.items()}), 3, 0.9904),
        ({"state_dict": OrderedDict(WEIGHTS), "epoch": np.int64(7), "val_auc": np.float32(0.5)}, 7, 0.5),
        (
            {"state_dict": {f"_orig_mod.module.{k}": v for k, v in WEIGHTS.items()}, "val_auc": torch.tensor(1)},
            None,
            1.0,
        ),
        (OrderedDict(WEIGHTS), None, None),
        ({f"module.{k}": nn.Parameter(v) for k, v in WEIGHTS.items()}, None, None),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_every_shape_of_file_is_read(tmp_path: Path, content, epoch, auc, zipped: bool):
    old = read_pytorch(saved(tmp_path / "old.pth", content, _use_new_zipfile_serialization=zipped))
    assert {k: v.tolist() for k, v in old.weights.items()} == {k: v.tolist() for k, v in WEIGHTS.items()}
    assert (old.epoch, old.val_auc) == (epoch, auc)
    assert type(old.val_auc) in (float, type(None))
    assert old.config == ({} if "config" not in content else CONFIG)


@pytest.mark.parametrize("value", [np.float64(0.990412345), np.float32(0.25), np.int64(1), np.dtype(">f8").type(0.5)])
def test_numpy_scalars_of_numpy_1_and_2_are_read(tmp_path: Path, value):
    path = saved(tmp_path / "2.pth", weights_and(val_auc=value), _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert b"numpy._core.multiarray\nscalar\n" in data
    (tmp_path / "1.pth").write_bytes(data.replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n"))
    assert read_pytorch(path).val_auc == read_pytorch(tmp_path / "1.pth").val_auc == float(value)


class Evil:
    """Unpickling it touches a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class Evaluated(Evil):
    def __reduce__(self):
        return eval, (f"open({str(self.marker)!r}, 'w')",)


@pytest.mark.parametrize(("kind", "name"), [(Evil, "posix.system"), (Evaluated, "eval")])
@pytest.mark.parametrize("place", ["whole", "config", "weights"])
def test_what_would_run_code_is_refused_by_name(tmp_path: Path, kind, name: str, place: str):
    marker = tmp_path / "ran"
    evil = kind(marker)
    content = {"whole": evil, "config": weights_and(config=evil), "weights": {"model_state_dict": {"a": evil}}}[place]
    for zipped in (True, False):
        path = saved(tmp_path / f"{zipped}.pth", content, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ImportFileError, match=f"'{name}'.*Nothing of it ran"):
            read_pytorch(path)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_pickle_that_is_no_checkpoint_is_refused_by_name(tmp_path: Path, protocol: int):
    marker, path = tmp_path / "ran", tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(Evil(marker), protocol))
    with pytest.raises(ImportFileError, match=r"'posix.system'"):
        read_pytorch(path)
    saved(tmp_path / "zip.pth", {"a": Evil(marker)}, pickle_protocol=max(protocol, 3))
    with pytest.raises(ImportFileError, match=r"'posix.system'"):
        read_pytorch(tmp_path / "zip.pth")
    assert not marker.exists()


class Settings:
    """A training script's own class, which nothing but that script has."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (weights_and(config=Settings()), r"would import and run '.*test_import_checkpoint.Settings'.*vars\(config\)"),
        (nn.Linear(2, 2), r"'torch.nn.modules.linear.Linear'"),
        (weights_and(config={"curve": np.ones(3)}), r"'numpy._core.multiarray._reconstruct'"),
        (weights_and(val_auc=np.complex128(1)), "numpy scalar of type 'c16'"),
        (weights_and(config={"out": Path("runs")}), r"'pathlib.PosixPath'"),
        (weights_and(state_dict=WEIGHTS), "both model_state_dict and state_dict"),
        ({"net": WEIGHTS, "epoch": 3}, "without a tensor .net, epoch.; expected 'model_state_dict'"),
        ({"model_state_dict": {**WEIGHTS, "version": 2}}, "without a tensor .version.; expected tensors by name"),
        ({"model_state_dict": {0: torch.ones(1)}}, "without a tensor"),
        ({"model_state_dict": {}}, "has no weights"),
        (list(WEIGHTS.values()), "holds a list, expected a dict"),
        (weights_and(val_auc=99.04), r"val_auc is 99.04, expected a number in \[0, 1\]"),
        (weights_and(val_auc=np.float64("nan")), "val_auc is nan"),
        (weights_and(epoch="3"), "epoch is '3'"),
        (weights_and(config=["sample_rate"]), "config is a list, expected a dict"),
        (weights_and(pipeline_fingerprint="dcb3"), "already says which pipeline"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, content, message: str):
    with pytest.raises(ImportFileError, match=message):
        read_pytorch(saved(tmp_path / "old.pth", content))


@pytest.mark.parametrize("data", [b"", b"not a checkpoint", b"\x80\x02", b"PK\x03\x04 cut short"])
def test_damaged_files_are_refused(tmp_path: Path, data: bytes):
    (tmp_path / "old.pth").write_bytes(data)
    with pytest.raises(ImportFileError, match=r"old.pth is not a checkpoint that loads without running code: ."):
        read_pytorch(tmp_path / "old.pth")
    with pytest.raises(ImportFileError, match="there is no file"):
        read_pytorch(tmp_path / "other.pth")


def test_configuration_is_compared_by_the_names_it_is_known_by():
    agreed = check_config(CONFIG, DEFINITION)
    assert set(CONFIG) - set(agreed) == {"resize_to_224", "model_name", "pretrained", "batch_size"}
    assert check_config({}, DEFINITION) == []


@pytest.mark.parametrize(
    ("name", "value", "ours"),
    [
        ("sample_rate", 22050, "resample.rate is 16000"),
        ("segment_duration", 3.0, "segment.duration_s is 2.0"),
        ("hop_length", 160, "segment.hop_s is 0.5"),
        ("max_segments_per_file", 64, "segment.max_segments is 32"),
        ("n_fft", 2048, "mel.n_fft is 1024"),
        ("hop_length_fft", 512, "mel.hop_length is 160"),
        ("n_mels", 128, "mel.n_mels is 160"),
        ("f_min", 20.0, "mel.f_min is 50.0"),
        ("f_max", None, "mel.f_max is 4000.0"),
        ("attn_hidden", 64, "attn_mil_resnet.attn_hidden is 128"),
        ("dropout", 0.5, "attn_mil_resnet.dropout is 0.3"),
    ],
)
def test_a_contradiction_names_both_values(name: str, value, ours: str):
    with pytest.raises(ImportFileError) as error:
        check_config(CONFIG | {name: value}, DEFINITION)
    assert f"{name} is {value!r} in the checkpoint, {ours} in the" in str(error.value)


def test_a_stage_that_is_not_there_contradicts():
    without = Pipeline(PIPELINE.name, [s for s in PIPELINE.stages.values() if s.name != "resample"])
    with pytest.raises(ImportFileError, match="sample_rate is 16000 in the checkpoint, there is no stage 'resample'"):
        check_config(CONFIG, replace(DEFINITION, pipeline=without))


def test_a_pipeline_that_exists_to_compare_with_is_refused():
    check_servable(PIPELINE)
    with pytest.raises(ImportFileError, match="decode_pydub, which exists to compare with and cannot be served"):
        check_servable(Pipeline.from_yaml(COUGH / "variants" / "onnx_backend.yaml"))


def test_a_pipeline_without_its_statistics_is_refused(tmp_path: Path):
    """A scaler's mean and deviation are in no file of weights: whoever imports has to give them."""
    talent = Pipeline.from_yaml(ROOT / "archive" / "talent" / "pipeline.yaml")
    with pytest.raises(ImportFileError, match=r"standard_scaler without the statistics .*give it as --pipeline"):
        check_servable(talent)
    fitted = talent.to_dict()
    for stage in fitted["stages"]:
        if "standard_scaler" in stage:
            stage["standard_scaler"] |= {"mean": [0.0] * 37, "std": [1.0] * 37}
    check_servable(Pipeline.from_dict(fitted))


def fresh() -> Network:
    torch.manual_seed(0)
    return DEFINITION.build_network()


def trained(network: nn.Module, *, rate: float = 1e-4, steps: int = 1, freeze: str = "") -> nn.Module:
    """`steps` optimizer steps on noise; `freeze`: a part that stays as it is, in eval mode. Rate 0: only reads data."""
    network.train()
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    if freeze:
        network.get_submodule(freeze).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW((p for p in network.parameters() if p.requires_grad), lr=rate)
    for _ in range(steps):
        *_, logit = network(torch.randn(2, 2, 3, 32, 32), torch.ones(2, 2, dtype=torch.bool))
        loss = F.binary_cross_entropy_with_logits(logit, torch.tensor([0.0, 1.0]))
        optimizer.zero_grad()
        loss.backward()
        if rate:
            optimizer.step()
    return network.eval()


def pretrained() -> nn.Module:
    """A trained backbone under fresh heads, as torchvision's ImageNet weights make it: nothing counted."""
    network, other = fresh(), trained(fresh(), steps=2)
    network.backbone.load_state_dict(other.backbone.state_dict())
    for name, buffer in network.backbone.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.zero_()
    return network


def without_bias() -> Network:
    """Trained, but for the last layer's bias."""
    network = trained(fresh())
    nn.init.zeros_(network.bag_head[4].bias)
    return network


def test_trained_weights_are_accepted_after_one_small_step():
    note = "seg_head still looks like its random initial values: what it computes may mean nothing"
    assert require_trained(trained(fresh())) == [note]
    assert note in require_trained(trained(fresh(), rate=1e-8))


def test_a_frozen_pretrained_backbone_under_a_trained_head_is_accepted():
    require_trained(trained(pretrained(), freeze="backbone"))


@pytest.mark.parametrize(
    ("make", "messages"),
    [
        (
            fresh,
            [
                "layer 'backbone' never saw a batch: backbone.bn1 and 19 more still have running mean 0 and variance 1",
                "layer 'bag_head' never saw a batch: bag_head.2 still has",
            ],
        ),
        (pretrained, ["layer 'bag_head' never saw a batch: bag_head.2 still has running mean 0 and variance 1"]),
        (
            lambda: trained(fresh(), rate=0.0),
            [
                "layer 'backbone' never saw an optimizer step: every scale is still 1",
                "layer 'bag_head' never saw an optimizer step: every scale is still 1",
            ],
        ),
        (lambda: trained(fresh(), freeze="bag_head"), ["layer 'bag_head' never saw a batch: bag_head.2 still has"]),
        (lambda: trained(fresh(), freeze="backbone"), ["layer 'backbone' never saw a batch: backbone.bn1 and 19 more"]),
        (without_bias, ["layer 'bag_head.4' has a bias of exactly 0 throughout"]),
    ],
)
def test_weights_that_no_training_shaped_are_refused(make, messages: list[str]):
    with pytest.raises(UntrainedError, match="not trained weights") as error:
        require_trained(make())
    assert str(error.value).count("\n  ") == len(messages)
    for message in messages:
        assert message in str(error.value)


def test_a_layer_that_is_rightly_so_can_be_accepted():
    assert require_trained(without_bias(), ["bag_head.4"])[0] == (
        "accepted although it looks untrained: layer 'bag_head.4' has a bias of exactly 0 throughout, as before the first "
        "step of training"
    )
    require_trained(without_bias(), recorded=["bag_head.4", "backbone"])
    with pytest.raises(UntrainedError, match=r"layer 'bag_head.4' .*\n.*--accept-untrained bag_head.4$"):
        require_trained(without_bias(), recorded=["backbone"])
    with pytest.raises(UntrainedError, match=r"layer attn, x is to be accepted, .*; these do: bag_head.4$"):
        require_trained(without_bias(), ["attn", "bag_head.4", "x"])
    with pytest.raises(UntrainedError, match="layer attn is to be accepted, but does not look untrained; none does"):
        require_trained(trained(fresh()), ["attn"])


class Flat(nn.Module):
    """Layers without parts."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.dense = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)


class Wrapped(nn.Module):
    """One module, as in an exported program."""

    def __init__(self):
        super().__init__()
        self.program = nn.Module()
        self.program.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        self.program.dense = nn.Linear(4, 2)


@pytest.mark.parametrize(
    ("make", "part", "norm"), [(Flat, "network", "norm"), (Wrapped, "program.body", "program.body.1")]
)
def test_parts_of_networks_of_other_shapes(make: type[nn.Module], part: str, norm: str):
    network = make()
    with pytest.raises(UntrainedError, match=f"layer '{part}' never saw a batch: {norm} still has"):
        require_trained(network)
    network.get_submodule(norm).running_mean += 0.5
    with pytest.raises(UntrainedError, match=f"layer '{part}' never saw an optimizer step"):
        require_trained(network)
    require_trained(network, [part])
    nn.init.constant_(network.get_submodule(norm).bias, 0.1)
    require_trained(network)
    nn.init.zeros_(network.get_submodule(f"{part}.dense".removeprefix("network.").replace("body.", "")).bias)
    with pytest.raises(UntrainedError, match="dense' has a bias of exactly 0 throughout"):
        require_trained(network)


def test_a_part_that_was_loaded_under_other_names_is_refused():
    weights = {k.replace("bag_head", "head"): v for k, v in trained(fresh()).state_dict().items()}
    with pytest.raises(CheckpointError, match=r"9 missing .bag_head.*9 unexpected .head"):
        network_from(weights, DEFINITION)
    accident = fresh()
    accident.load_state_dict(weights, strict=False)
    with pytest.raises(UntrainedError, match=r"bag_head' never saw a batch: .*\n.*strict=True"):
        require_trained(accident)


def test_an_image_classifier_is_refused():
    classifier = pretrained().backbone.state_dict() | {"fc.bias": torch.zeros(1000)}
    with pytest.raises(CheckpointError, match=r"missing .*attn.0.bias.* unexpected .*bn1.bias"):
        network_from(classifier, DEFINITION)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return trained(fresh()).state_dict()


def test_half_precision_weights_are_converted_exactly(weights):
    for dtype in (torch.float16, torch.bfloat16):
        half = {k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()}
        network = network_from(half, DEFINITION)
        for name, value in network.state_dict().items():
            assert value.dtype in (torch.float32, torch.int64)
            assert torch.equal(value, half[name].to(value.dtype))
        require_trained(network)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("attn.0.weight", lambda v: v.double() + 1e-12, "attn.0.weight is torch.float64 and changes when converted"),
        (
            "attn.0.weight",
            lambda v: v * float("nan"),
            "attn.0.weight has 65536 of 65536 values that are NaN or infinite",
        ),
        ("attn.2.bias", lambda v: v / 0, "attn.2.bias has 1 of 1 values that are NaN or infinite"),
        ("attn.2.bias", lambda v: v.long(), "attn.2.bias is torch.int64, expected torch.float32"),
        ("attn.2.bias", lambda v: v.to_sparse(), "attn.2.bias is not a plain dense tensor"),
        ("attn.2.bias", lambda v: v.to("meta"), "attn.2.bias is not a plain dense tensor"),
        ("attn.2.bias", lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8), "not a plain dense tensor"),
        ("attn.0.weight", lambda v: v[:64], r"1 of another shape .attn.0.weight"),
    ],
)
def test_values_that_would_change_the_network_are_refused(weights, name: str, change, message: str):
    with pytest.raises(CheckpointError, match=message):
        network_from(weights | {name: change(weights[name])}, DEFINITION)


def test_float64_that_float32_holds_exactly_is_accepted(weights):
    double = {k: v.double() if v.is_floating_point() else v for k, v in weights.items()}
    state = network_from(double, DEFINITION).state_dict()
    assert all(torch.equal(state[k], v) for k, v in weights.items())


def test_nothing_is_left_when_writing_fails(tmp_path: Path):
    with pytest.raises(CheckpointError):
        write(tmp_path / "new.pth", {"config": {"out": Path("runs")}})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_path,p\na,0.5\n", "no column probability"),
        ("file_path,probability\na,0.5\nb,1.5\n", r"row 3: probability is '1.5'"),
        ("file_path,probability\na,\n", r"row 2: probability is ''"),
        ("file_path,probability\na,nan\n", r"row 2: probability is 'nan'"),
        ("file_path,probability\na,0.5\na,0.6\n", "row 3: 'a' has another probability"),
    ],
)
def test_recorded_predictions_name_the_row_that_is_wrong(tmp_path: Path, text: str, message: str):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(ImportFileError, match=message):
        read_predictions(tmp_path / "p.csv")


def test_recorded_predictions_of_several_classes(tmp_path: Path):
    (tmp_path / "p.csv").write_text("file_path,probability_x,probability_y,probability_z\na,0.5,0.25,0.25\n")
    assert read_predictions(tmp_path / "p.csv", ("x", "y", "z")) == {"a": (0.5, 0.25, 0.25)}
    with pytest.raises(ImportFileError, match="no column probability_w; it needs file_path, probability_w, prob"):
        read_predictions(tmp_path / "p.csv", ("w", "y", "z"))


ROWS = [Recording(str(i), Path(str(i)), i % 2, "val") for i in range(20)]  # 100 pairs: an AUC moves by 0.01


@pytest.mark.parametrize(
    ("trials", "doubtful", "text"),
    [
        (
            [Trial("a", 0.9, 0.0), Trial("b", 0.8, 0.1)],
            False,
            r"a reproduces the recorded validation AUC .off by 0.0000..$",
        ),
        ([Trial("a", 0.9, 0.0), Trial("b", 0.9, 0.0)], False, "So do, .* 20 recordings can tell: b. Recorded probab"),
        ([Trial("a", 0.8, 0.1), Trial("b", 0.9, 0.0)], True, "b reproduces the recorded validation AUC .* a does not"),
        ([Trial("a", 0.8, 0.1), Trial("b", 0.7, 0.2)], True, "None of these .* closest is a"),
        ([Trial("a", 0.8, 0.1, 1e-3, 2e-2), Trial("b", 0.9, 0.2, 1e-8, 1e-7)], True, "b reproduces the recorded prob"),
        (
            [Trial("a", 0.9, 0.1, 1e-8, 1e-7), Trial("b", 0.9, 0.0, 1e-5, 1e-3)],
            False,
            r"a reproduces .* largest 1.0e-07..$",
        ),
        ([Trial("a", 0.9, 0.0, 1e-8, 1e-7), Trial("b", 0.9, 0.0, 1e-7, 9e-7)], False, r"So do, .* tell: b.$"),
        ([Trial("a", 0.9, 0.0, 1e-2, 1e-1), Trial("b", 0.9, 0.0, 2e-3, 1e-2)], True, "None of these .* closest is b"),
        ([Trial("a", 0.9, 0.0), Trial("b", failure="cannot read 3 recording(s)")], False, "a reproduces"),
        ([Trial("a", 0.9), Trial("b", 0.8)], False, "Nothing recorded to compare with"),
    ],
)
def test_verdict(trials: list[Trial], doubtful: bool, text: str):
    verdict = judge(trials, ROWS)
    assert verdict.doubtful == doubtful
    with pytest.raises(AssertionError, match=text):
        raise AssertionError(verdict.text)


def test_several_classes_are_compared_by_all_their_scores(monkeypatch: pytest.MonkeyPatch):
    rows = [Recording(str(i), Path(str(i)), i % 3, "val") for i in range(9)]
    right = np.eye(3)[[r.label for r in rows]] * 0.5 + 0.25
    scores = {"right": right, "wrong": np.roll(right, 1, axis=1), "one": np.where([0, 0, 1], right, 0.3)}
    portrait = Definition.read(ROOT / "archive" / "portrait")
    monkeypatch.setattr(evidence, "service_of", lambda *_: ModelService(portrait, None, {}))
    monkeypatch.setattr(
        evidence,
        "predict",
        lambda _, rows, name: [Prediction(r, "", tuple(s), ()) for r, s in zip(rows, scores[name], strict=True)],
    )
    recorded = {r.file_path: tuple(s) for r, s in zip(rows[:6], right, strict=False)}
    candidates = dict.fromkeys(scores, PIPELINE)
    trials = compare(*(portrait, {}, candidates, rows, torch.device("cpu")), recorded_auc=1.0, recorded=recorded)
    # Of three classes, each against the rest: all right, each half wrong, and one right beside two that are guessed.
    assert [t.auc for t in trials] == pytest.approx([1.0, 0.25, 2 / 3])
    assert [t.max_dp for t in trials] == pytest.approx([0.0, 0.5, 0.45])
    assert [t.orders.best[0].classes[0] for t in trials] == ["animal", "human", "animal"]
    assert judge(trials, rows).text.startswith("right reproduces the recorded probabilities")


def imported(file: Path, out: Path, pipeline: Path | None = COUGH / "pipeline.yaml", **more: Any) -> ImportResult:
    more = {"classes": CLASSES} | more
    return import_file(ImportRequest(archive=COUGH, file=file, out=out, pipeline=pipeline, **more))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no --pipeline", "--pipeline is required"),
        ("no file", "there is no file"),
        ("contradiction", "n_mels is 128 in the checkpoint, mel.n_mels is 160 in the pipeline"),
        ("out exists", "old.pth exists"),
        ("no --manifest", "belong to --manifest"),
        ("no variants", "expected a folder of pipeline files"),
        ("other predictions", "p.csv has no file_path of split 'val'; it has 'elsewhere.wav', the manifest 'a.wav'"),
        ("replaced", "--replaced is for layers of a Keras model"),
        ("accepted", "layer attn is to be accepted, but does not look untrained; none does"),
        ("to compare with", "decode_pydub, which exists to compare with and cannot be served"),
        ("damaged", "old.pth is text, starting with 'not a checkpoint': give the file that has the weights. Expected"),
        ("another zip", "is a zip with readme.txt; expected what torch.save wrote"),
    ],
)
def test_wrong_input_is_an_error_and_writes_nothing(tmp_path, weights, name, message):
    old, out, predictions = tmp_path / "old.pth", tmp_path / "new" / "best.pth", tmp_path / "p.csv"
    manifest = tmp_path / "m.csv"
    config = CONFIG | ({"n_mels": 128} if name == "contradiction" else {})
    if name == "damaged":
        old.write_bytes(b"not a checkpoint")
    elif name == "another zip":
        with zipfile.ZipFile(old, "w") as archive:
            archive.writestr("readme.txt", "no weights")
    elif name != "no file":
        saved(old, as_training_scripts_write_it(weights, config=config))
    predictions.write_text("file_path,probability\nelsewhere.wav,0.5\n")
    manifest.write_text("file_path,cough_label,split\na.wav,1,val\nb.wav,0,val\n")
    for file in "ab":
        (tmp_path / f"{file}.wav").touch()
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    more: dict[str, Any] = {
        "no --pipeline": {"pipeline": None},
        "no --manifest": {"predictions": predictions},
        "no variants": {"manifest": manifest, "variants": tmp_path},
        "other predictions": {"manifest": manifest, "predictions": predictions},
        "replaced": {"replaced": ["pre"]},
        "accepted": {"accept_untrained": ["attn"]},
        "to compare with": {"pipeline": COUGH / "variants" / "onnx_backend.yaml"},
    }
    with pytest.raises(CheckpointError) as error:
        imported(old, old if name == "out exists" else out, **more.get(name, {}))
    assert message in str(error.value)
    if name == "no --pipeline":
        for path in [COUGH / "pipeline.yaml", *sorted((COUGH / "variants").glob("*.yaml"))]:
            assert str(path) in str(error.value)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_the_command_refuses_with_code_2(tmp_path: Path, weights):
    old, out = saved(tmp_path / "old.pth", as_training_scripts_write_it(weights)), tmp_path / "new.pth"
    result = run_skewless("import", "archive/cough", old, "--out", out, check=False)
    assert result.returncode == 2
    assert "--pipeline is required" in result.stderr and "archive/cough/variants/tail_only.yaml" in result.stderr
    assert not out.exists()


def test_the_command_imports_and_says_so_as_json(tmp_path: Path):
    old, out = (
        saved(tmp_path / "old.pth", as_training_scripts_write_it(without_bias().state_dict())),
        tmp_path / "new.pth",
    )
    arguments = ("import", "archive/cough", old, "--pipeline", "archive/cough/pipeline.yaml", "--out", out)
    arguments += ("--classes", "negative,positive")
    refused = run_skewless(*arguments, check=False)
    assert refused.returncode == 2 and "--accept-untrained bag_head.4" in refused.stderr
    printed = json.loads(run_skewless(*arguments, "--accept-untrained", "bag_head.4", "--json").stdout)
    assert (printed["format"], printed["val_auc"], printed["accepted_untrained"]) == ("pytorch", 0.9904, ["bag_head.4"])
    checkpoint = load_checkpoint(out)
    assert checkpoint["accepted_untrained"] == ["bag_head.4"]
    assert checkpoint["imported_from"] == {
        "format": "pytorch",
        "sha256": file_digest(old),
        "epoch": 3,
        "val_auc": 0.9904,
        "classes": ["negative", "positive"],
    }


@pytest.fixture(scope="module")
def stripped(demonstration: Demonstration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration's checkpoint as another training script would have written it, from two GPUs."""
    checkpoint = load_checkpoint(demonstration.checkpoint)
    content = {
        "epoch": checkpoint["epoch"],
        "model_state_dict": {f"module.{k}": v for k, v in checkpoint["model_state_dict"].items()},
        "optimizer_state_dict": checkpoint["optimizer_state_dict"],
        "val_auc": np.float64(checkpoint["val_auc"]),
        "config": CONFIG,
    }
    return saved(tmp_path_factory.mktemp("stripped") / "old.pth", content)


def test_an_imported_checkpoint_is_evaluated_and_packaged(demonstration: Demonstration, stripped: Path, tmp_path: Path):
    new = tmp_path / "run" / "best.pth"
    arguments = ("--pipeline", COUGH / "pipeline.yaml", "--classes", "negative,positive", "--out", new)
    result = run_skewless("import", "archive/cough", stripped, *arguments)
    assert "agrees with" in result.stdout
    assert "note: what training computed is not in the file: evaluation cannot check itself against it" in result.stdout
    original, checkpoint = load_checkpoint(demonstration.checkpoint), load_checkpoint(new)
    assert set(original) <= set(checkpoint)
    for key in ("pipeline", "pipeline_fingerprint", "network", "postprocess", "code", "epoch", "val_auc"):
        assert checkpoint[key] == original[key]
    assert checkpoint["imported_from"] == {
        "format": "pytorch",
        "sha256": file_digest(stripped),
        "epoch": original["epoch"],
        "val_auc": original["val_auc"],
        "classes": ["negative", "positive"],
    }
    assert checkpoint["validation_scores"] == {}
    state = network_of(original, DEFINITION).state_dict()
    assert all(torch.equal(state[k], v) for k, v in network_of(checkpoint, DEFINITION).state_dict().items())
    assert [p.name for p in new.parent.iterdir()] == ["best.pth"]
    evaluation, store = tmp_path / "evaluation", tmp_path / "store"
    arguments = ("--checkpoint", new, "--manifest", demonstration.manifest, "--out", evaluation)
    # With one thread, as the demonstration was evaluated: then to the last digit.
    run_skewless("evaluate", "archive/cough", *arguments, environment={"OMP_NUM_THREADS": "1"})
    for name in ("predictions.csv", "references/references.json"):
        assert (evaluation / name).read_bytes() == (demonstration.evaluation / name).read_bytes()
    arguments = ("--checkpoint", new, "--evaluation", evaluation, "--version", "1.0", "--out", store)
    run_skewless("build", "archive/cough", *arguments)
    assert (store / "cough-1.0.mar").exists()


def test_weights_alone_can_be_evaluated(demonstration: Demonstration, tmp_path: Path):
    old = saved(tmp_path / "old.pth", load_checkpoint(demonstration.checkpoint)["model_state_dict"])
    variant, new = COUGH / "variants" / "no_highpass.yaml", tmp_path / "new.pth"
    result = imported(old, new, variant)
    assert "no configuration" in result.text()
    assert "pipeline.yaml is another pipeline; package this with" in result.text()
    checkpoint = load_checkpoint(new)
    assert (checkpoint["imported_from"]["epoch"], checkpoint["val_auc"]) == (None, None)
    recordings = read_manifest(demonstration.manifest, demonstration.corpus)
    definition = replace(DEFINITION, pipeline=Pipeline.from_yaml(variant))
    metrics = evaluate(definition, checkpoint, new, recordings, "val", tmp_path / "evaluation", torch.device("cpu"))
    assert metrics["imported_from"]["sha256"] == file_digest(old)


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of the variants: each costs a pass over the split."""
    folder = tmp_path_factory.mktemp("variants")
    for name in ("no_highpass", "tail_only"):
        shutil.copy(COUGH / "variants" / f"{name}.yaml", folder)
    return folder


@pytest.mark.parametrize("chosen", ["pipeline.yaml", "variants/tail_only.yaml"])
def test_the_pipeline_that_reproduces_the_record_is_named(
    demonstration: Demonstration, stripped: Path, variants: Path, tmp_path: Path, chosen: str
):
    recorded = demonstration.evaluation / "predictions.csv"
    result = imported(
        *(stripped, tmp_path / "new.pth", COUGH / chosen),
        manifest=demonstration.manifest,
        predictions=recorded,
        variants=variants,
    )
    with open(recorded, newline="") as file:
        count = sum(row["split"] == "val" for row in csv.DictReader(file))
    assert f"{count} recordings of split 'val', {count} with a recorded probability" in result.text()
    table = [line.strip("|").split("|") for line in result.text().splitlines() if line.startswith("|")][2:]
    # The second table is of the classes' orders.
    largest = {Path(row[0].strip()).stem: float(row[3]) for row in table if len(row) == 5}
    assert largest.pop("pipeline") < 1e-6 < min(largest.values())
    assert set(largest) == {"no_highpass", "tail_only"}
    assert load_checkpoint(tmp_path / "new.pth")["pipeline"]["name"] == Pipeline.from_yaml(COUGH / chosen).name
    assert [trial["max_dp"] for trial in json.loads(json.dumps(result.to_dict()))["comparison"]["trials"]]
    if chosen == "pipeline.yaml":
        assert "archive/cough/pipeline.yaml reproduces the recorded probabilities (mean" in result.text()
        assert result.warning() == ""
    else:
        assert "WARNING: " in result.warning()
        assert "archive/cough/pipeline.yaml reproduces the recorded probabilities" in result.warning()
        assert "/archive/cough/variants/tail_only.yaml does not" in result.warning()


@pytest.fixture(scope="module")
def rows(demonstration: Demonstration, tmp_path_factory: pytest.TempPathFactory) -> list[Recording]:
    """The validation split, and one of its recordings over a loud rumble that a 50 Hz high-pass attenuates."""
    split = [r for r in read_manifest(demonstration.manifest, demonstration.corpus) if r.split == "val"]
    _, decoded = next(PIPELINE.steps(split[0].path.read_bytes()))
    time = np.arange(decoded.data.shape[1]) / decoded.rate
    path = tmp_path_factory.mktemp("rumble") / "rumble.wav"
    path.write_bytes(wav(0.3 * decoded.data.numpy() + 0.6 * np.sin(2 * np.pi * 30 * time), decoded.rate))
    return [*split, Recording("rumble.wav", path, split[0].label, "val")]


def test_a_record_made_behind_a_variant_names_the_variant(demonstration: Demonstration, rows: list[Recording]):
    checkpoint = load_checkpoint(demonstration.checkpoint)
    service = service_of(DEFINITION, checkpoint, torch.device("cpu"))
    no_highpass = Pipeline.from_yaml(COUGH / "variants" / "no_highpass.yaml")
    behind = replace(service, definition=replace(service.definition, pipeline=no_highpass))
    made = predict(behind, rows, "no_highpass")
    unfinished, _ = PIPELINE.split(before="replicate")
    waveform = Pipeline.from_yaml(COUGH / "variants" / "onnx_backend.yaml").split(before="segment")[0]
    candidates = {"train": PIPELINE, "no_highpass": no_highpass, "unfinished": unfinished, "waveform": waveform}
    trials = compare(
        DEFINITION,
        checkpoint,
        candidates,
        rows,
        torch.device("cpu"),
        recorded_auc=None,
        recorded={p.recording.file_path: p.scores for p in made[1:]},
    )
    assert [t.name for t in trials] == list(candidates)
    assert trials[1].max_dp < 1e-6 < 1e-4 < trials[0].max_dp
    assert all(t.failure and t.auc is None for t in trials[2:])
    verdict = judge(trials, rows)
    assert verdict.doubtful
    assert verdict.text.startswith("no_highpass reproduces the recorded probabilities")
    with pytest.raises(ImportFileError, match="unfinished does not give what the network takes"):
        compare(
            *(DEFINITION, checkpoint, {"unfinished": unfinished}, rows[:1], torch.device("cpu")),
            recorded_auc=None,
            recorded={},
        )


def test_probabilities_that_barely_vary_are_refused(demonstration: Demonstration, rows: list[Recording]):
    checkpoint = load_checkpoint(demonstration.checkpoint)
    checkpoint["model_state_dict"]["bag_head.4.weight"] *= 1e-3
    with pytest.raises(ImportFileError, match=rf"all {len(rows)} recordings get a probability .* looks untrained"):
        compare(
            *(DEFINITION, checkpoint, {"train": PIPELINE}, rows, torch.device("cpu")), recorded_auc=None, recorded={}
        )
