"""ONNX Runtime beside eager PyTorch: the same numbers, archives that run alone, and the gates of reduced precision."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from onnx import numpy_helper

from skewless.core.definition import Definition
from skewless.core.pipeline import Pipeline
from skewless.core.runtimes import RuntimeSettings, onnx_graph
from skewless.core.runtimes.eager import EagerRuntime
from skewless.core.runtimes.onnx import OnnxRuntime
from skewless.errors import BuildError
from skewless.packaging.build import build_archive
from skewless.packaging.execution import Execution
from skewless.packaging.export import export_checkpoint
from skewless.torchserve.smoke import References
from skewless.training.checkpoint import load_checkpoint, network_of
from skewless.training.manifest import Recording, read_manifest
from tests.conftest import ROOT, Demonstration, run_skewless

CPU = torch.device("cpu")
PRECISIONS = ("fp32", "fp16", "int8")

OUTPUTS = ("bag_probability", "segment_probabilities", "segment_logits", "bag_logit", "segment_attention")

# In probability. Of the whole path: the Fourier transform in another order of summation, then decibels.
FP32_TOLERANCE = 1e-5
WHOLE_PATH_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def checkpoint(demonstration: Demonstration):
    return load_checkpoint(demonstration.checkpoint)


@pytest.fixture(scope="module")
def network(checkpoint, demonstration: Demonstration):
    return network_of(checkpoint, Definition.read(demonstration.definition))


@pytest.fixture(scope="module")
def pipeline(checkpoint) -> Pipeline:
    return Pipeline.from_dict(checkpoint["pipeline"])


@pytest.fixture(scope="module")
def references(demonstration: Demonstration) -> list[bytes]:
    folder = demonstration.evaluation / "references"
    return [(folder / e["file"]).read_bytes() for e in json.loads((folder / "references.json").read_text())]


@pytest.fixture(scope="module")
def images(pipeline: Pipeline, references: list[bytes]) -> list[torch.Tensor]:
    return [pipeline(audio) for audio in references]


@pytest.fixture(scope="module")
def model(network, images, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (path,) = OnnxRuntime.write(network, tmp_path_factory.mktemp("onnx"), RuntimeSettings(), images)
    return path


@pytest.fixture(scope="module")
def separated(demonstration: Demonstration, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Recording]]:
    """The demonstration's evaluation as it would be for a network that separates the classes: of the measured
    recordings the two most and the two least probable, labelled so. And the recordings to prove and to calibrate with.
    """
    evaluation = tmp_path_factory.mktemp("separated") / "evaluation"
    shutil.copytree(demonstration.evaluation, evaluation)
    rows = predictions(evaluation)
    ranked = sorted((r for r in rows if r["split"] == "test"), key=lambda r: float(r["probability"]))
    chosen = [row | {"label": int(place >= 2)} for place, row in enumerate(ranked[:2] + ranked[-2:])]
    write_predictions(evaluation, chosen)
    measured = {row["file_path"] for row in chosen}
    classes = Definition.read(demonstration.definition).classes
    recordings = read_manifest(demonstration.manifest, demonstration.corpus, classes)
    training = [r for r in recordings if r.split == "train"]
    return evaluation, [r for r in recordings if r.file_path in measured] + training[:6]


def predictions(evaluation: Path) -> list[dict]:
    with open(evaluation / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def write_predictions(evaluation: Path, rows: list[dict]) -> None:
    with open(evaluation / "predictions.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def build(demonstration: Demonstration, out: Path, separated, precision: str) -> Path:
    evaluation, recordings = separated
    execution = Execution("onnxruntime", precision, recordings, "test", recordings)
    version = f"1.0-{precision}"
    checkpoint = demonstration.checkpoint
    return build_archive(demonstration.definition, checkpoint, evaluation, version, out, execution=execution).path


@pytest.fixture(scope="module")
def archives(demonstration: Demonstration, separated, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("archives")
    return {precision: build(demonstration, out, separated, precision) for precision in PRECISIONS}


def largest_difference(ours: list[dict], theirs: list[dict], name: str) -> float:
    return max(float((a[name] - b[name]).abs().max()) for a, b in zip(ours, theirs, strict=True))


def test_fp32_equals_eager_on_every_reference(network, model: Path, images):
    ours, eager = OnnxRuntime(model, CPU)(images), EagerRuntime(network, CPU)(images)
    assert [{n: v.shape for n, v in o.items()} for o in ours] == [{n: v.shape for n, v in o.items()} for o in eager]
    for name in ("bag_probability", "segment_probabilities", "segment_attention"):
        assert largest_difference(ours, eager, name) <= FP32_TOLERANCE, name
    for name in ("bag_logit", "segment_logits"):
        assert largest_difference(ours, eager, name) <= 10 * FP32_TOLERANCE, name


def test_neighbours_and_micro_batches_change_nothing(model: Path, images):
    plain = OnnxRuntime(model, CPU)
    alone = [plain([x])[0] for x in images]
    assert largest_difference(plain(images), alone, "bag_probability") == 0
    long = [torch.cat(images)]
    assert len(long[0]) > 4
    chunked, whole = (OnnxRuntime(model, CPU, RuntimeSettings(micro_batch=n))(long) for n in (3, 100))
    for name in whole[0]:
        assert chunked[0][name].shape == whole[0][name].shape
        assert largest_difference(chunked, whole, name) <= FP32_TOLERANCE, name
    assert plain([]) == []


@pytest.mark.parametrize("length", [1, 2, 9])
def test_recordings_of_any_length(network, model: Path, images, length: int):
    """The graph as others run it: a whole recording at once, and in two parts."""
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    stock = torch.cat(images)
    segments = stock[torch.arange(length) % len(stock)]
    with torch.inference_mode():
        theirs = network.head(network.encode(segments))
    ours = dict(zip(OUTPUTS, session.run(OUTPUTS, {"images": segments.numpy()}), strict=True))
    for name in OUTPUTS:
        assert ours[name].shape == theirs[name].shape, name
        tolerance = 10 * FP32_TOLERANCE if "logit" in name else FP32_TOLERANCE
        assert np.abs(ours[name] - theirs[name].numpy()).max() <= tolerance, name
    assert float(ours["segment_attention"].sum()) == pytest.approx(1, abs=1e-6)
    (features,) = session.run(["encoded_features"], {"images": segments[:1].numpy()})
    rest = {"images": segments[1:].numpy(), "preceding_features": features}
    if length > 1:
        (probability,) = session.run(["bag_probability"], rest)
        assert probability == pytest.approx(float(ours["bag_probability"]), abs=FP32_TOLERANCE)


def test_threads_follow_the_numeric_policy(model: Path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert OnnxRuntime(model, CPU)._session.get_session_options().intra_op_num_threads == 1
    finally:
        torch.set_num_threads(before)


def test_refuses_what_it_cannot_do(model: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="precision is 'int4'"):
        RuntimeSettings("int4")
    with pytest.raises(ValueError, match="micro_batch is 0"):
        RuntimeSettings(micro_batch=0)
    with pytest.raises(ValueError, match="cannot run on device 'mps'"):
        OnnxRuntime(model, torch.device("mps"))
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(ValueError, match=r"cannot run on device 'cuda'.*onnxruntime-gpu"):
            OnnxRuntime(model, torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match="pip install onnxruntime"):
        OnnxRuntime(model, CPU)


_STANDALONE = """
import json, sys, torch
from skewless.core.service import ModelService
from skewless.core.request import Request
service = ModelService.load(".", torch.device("cpu"))
entries = json.load(open("references/references.json"))
answers = service.predict([Request(open("references/" + e["file"], "rb").read()) for e in entries])
print(json.dumps({
    "modules": sorted({m.partition(".")[0] for m in sys.modules} & {"ts", "onnx", "onnxscript", "onnxruntime"}),
    "described": service.describe()["runtime"],
    "rows": [[e["scores"][0], a.body["file_probability"], a.body["runtime"], a.body["precision"], a.body["tier"]]
             for e, a in zip(entries, answers)],
}))
"""


def alone(archive: Path, folder: Path) -> dict:
    """What an archive answers in a process of its own that sees nothing of the repository."""
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
    command = [sys.executable, "-c", _STANDALONE]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize(("precision", "tier", "tolerance"), [("fp32", "exact", 1e-4), ("int8", "reduced", 0.02)])
def test_archive_runs_without_torchserve(archives, tmp_path: Path, precision: str, tier: str, tolerance: float):
    answered = alone(archives[precision], tmp_path)
    assert answered["modules"] == ["onnxruntime"]
    assert answered["described"] == {
        "name": "onnxruntime",
        "precision": precision,
        "tier": tier,
        "tolerance": tolerance,
    }
    assert len(answered["rows"]) >= 4
    for reference, served, *named in answered["rows"]:
        assert served == pytest.approx(reference, abs=FP32_TOLERANCE if tier == "exact" else tolerance)
        assert named == ["onnxruntime", precision, tier]
    assert not (tmp_path / "weights.safetensors").exists()


def test_an_archive_of_another_runtime_needs_no_onnxruntime(demonstration: Demonstration, tmp_path: Path):
    answered = alone(demonstration.archive, tmp_path)
    assert answered["modules"] == []
    assert answered["described"]["precision"] == "fp32"
    assert {tuple(named) for _, _, *named in answered["rows"]} == {("mnn", "fp32", "exact")}


def test_archive_says_what_runs_it_and_how_well(archives):
    for precision, path in archives.items():
        with zipfile.ZipFile(path) as archive:
            runtime = json.loads(archive.read("metrics.json"))["runtime"]
            config = yaml.safe_load(archive.read("model.yaml"))
        absorb = ["replicate", "standardize"]
        assert config["runtime"] == {"onnxruntime": {"precision": precision, "micro_batch": 32, "absorb": absorb}}
        assert set(runtime["library_versions"]) == {"python", "onnx", "onnxruntime", "onnxscript"}
        assert (
            References.from_archive(path).tolerance == runtime["tolerance"] == (1e-4 if precision == "fp32" else 0.02)
        )
        assert ("measured" in runtime) == (precision != "fp32")
        if precision != "fp32":
            measured = runtime["measured"]
            assert (measured["recordings"], measured["auc"], measured["auc_evaluated"]) == (4, 1.0, 1.0)
            assert 0 < measured["max_dp_references"] <= 0.02
    sizes = [archives[precision].stat().st_size for precision in PRECISIONS]
    assert sizes == sorted(sizes, reverse=True)


def test_the_same_inputs_give_the_same_bytes(demonstration: Demonstration, archives, separated, tmp_path: Path):
    """Built by another process."""
    evaluation, recordings = separated
    manifest = tmp_path / "manifest.csv"
    classes = Definition.read(demonstration.definition).classes
    rows = [f"{r.file_path},{classes[r.label]},{r.split}" for r in recordings]
    manifest.write_text("\n".join(["file_path,label,split", *rows]))
    run_skewless(
        *("build", demonstration.definition, "--checkpoint", demonstration.checkpoint, "--evaluation", evaluation),
        *("--version", "1.0-int8", "--out", tmp_path, "--runtime", "onnxruntime", "--precision", "int8"),
        *("--manifest", manifest, "--calibration-manifest", manifest, "--root", demonstration.corpus),
    )
    assert (tmp_path / archives["int8"].name).read_bytes() == archives["int8"].read_bytes()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_graph_says_nothing_of_where_it_was_made(archives, precision: str):
    with zipfile.ZipFile(archives[precision]) as archive:
        content = archive.read("model.onnx")
    graph = onnx.load_from_string(content)
    assert (graph.producer_name, graph.producer_version, graph.doc_string, list(graph.metadata_props)) == ("",) * 3 + (
        [],
    )
    assert str(ROOT).encode() not in content
    assert b"site-packages" not in content


def refused(demonstration: Demonstration, out: Path, separated, precision: str, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        build(demonstration, out, separated, precision)
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_refuses_a_network_that_is_another(
    demonstration: Demonstration, separated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
):
    write = onnx_graph.write_graph

    def spoiled(network, path: Path, *arguments):
        write(network, path, *arguments)
        graph = onnx.load(path)
        (bias,) = [t for t in graph.graph.initializer if t.name.endswith("bag_head.4.bias")]
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(0.5), bias.name))
        path.write_bytes(graph.SerializeToString(deterministic=True))

    monkeypatch.setattr(onnx_graph, "write_graph", spoiled)
    message = r"stage 'network' differs .*probability 0\.\d+, evaluated 0\.\d+, allowed difference 0.0001"
    if precision != "fp32":
        message = rf"{precision} is too far .* references are off by more than 0.02 \(largest 0\.\d+\).*largest \|dp\|"
    refused(demonstration, tmp_path / "out", separated, precision, message)


def test_refuses_another_auc(demonstration: Demonstration, separated, tmp_path: Path):
    evaluation, recordings = separated
    other = tmp_path / "evaluation"
    shutil.copytree(evaluation, other)
    rows = predictions(other)
    rows[0]["probability"], rows[-1]["probability"] = rows[-1]["probability"], rows[0]["probability"]
    write_predictions(other, rows)
    message = r"AUC 1\.0000 on the 4 recordings of split 'test', 0\.\d+ evaluated \(0\.\d+ apart, allowed 0.001\)"
    refused(demonstration, tmp_path / "out", (other, recordings), "fp16", message)


def test_refuses_recordings_that_were_not_measured(demonstration: Demonstration, separated, tmp_path: Path):
    evaluation, recordings = separated
    train = [r for r in recordings if r.split == "train"]
    refused(demonstration, tmp_path / "out", (evaluation, train), "fp16", "lacks 4 of the 4 recordings")
    first = predictions(evaluation)[0]
    swapped = [
        Recording(r.file_path, train[0].path, r.label, r.split) if r.file_path == first["file_path"] else r
        for r in recordings
    ]
    refused(demonstration, tmp_path / "out", (evaluation, swapped), "fp16", "is not the recording that")
    unmeasured = Execution("onnxruntime", "fp16", recordings, "val")
    with pytest.raises(BuildError, match="no recordings of split 'val'"):
        build_archive(
            *(demonstration.definition, demonstration.checkpoint, evaluation, "1.0", tmp_path / "out"),
            execution=unmeasured,
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--runtime", "onnxruntime", "--precision", "int4"),
            "precision is 'int4', expected one of fp32, bf16, fp16, int8",
        ),
        (("--runtime", "tensorflow"), "runtime is 'tensorflow', expected one of eager, mnn, onnxruntime"),
        (("--precision", "int8"), "go with --runtime"),
        (("--runtime", "eager", "--precision", "fp16"), "'eager' runs in fp32 and bf16 only"),
        (("--runtime", "onnxruntime", "--precision", "fp16"), "give their --manifest"),
    ],
)
def test_wrong_choice_exits_with_2(demonstration: Demonstration, tmp_path: Path, arguments, message: str):
    build = ("build", demonstration.definition, "--checkpoint", demonstration.checkpoint)
    evaluated = ("--evaluation", demonstration.evaluation, "--version", "1.0", "--out", tmp_path)
    result = run_skewless(*build, *evaluated, *arguments, check=False)
    assert result.returncode == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_int8_needs_training_recordings(separated):
    _, recordings = separated
    with pytest.raises(BuildError, match="calibration-manifest"):
        Execution("onnxruntime", "int8", recordings, "test", [r for r in recordings if r.split != "train"])


def test_whole_path_equals_the_pipeline_and_the_network(
    demonstration: Demonstration, network, pipeline: Pipeline, references, images, tmp_path: Path
):
    path = tmp_path / "whole.onnx"
    run_skewless(
        *("export", demonstration.definition, "--checkpoint", demonstration.checkpoint, "--out", path, "--whole-path")
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    eager = EagerRuntime(network, CPU)
    waveforms = [pipeline.trace(audio)["segment"] for audio in references]
    everything = torch.cat(waveforms)
    cases = [(w, x) for w, x in zip(waveforms, images, strict=True)]
    cases += [(everything[:1], torch.cat(images)[:1]), (everything, torch.cat(images))]
    for waveform, x in cases:
        (theirs,) = eager([x])
        ours = dict(zip(OUTPUTS, session.run(OUTPUTS, {"waveforms": waveform.numpy()}), strict=True))
        for name in ("bag_probability", "segment_probabilities", "segment_attention"):
            assert ours[name].shape == theirs[name].shape
            assert np.abs(ours[name] - theirs[name].numpy()).max() <= WHOLE_PATH_TOLERANCE, name
    silence = session.run(["bag_probability"], {"waveforms": np.zeros((2, 32000), np.float32)})
    assert np.isfinite(silence).all()


def test_whole_path_rounds_to_float16_as_the_cache_does(
    demonstration: Demonstration, checkpoint, pipeline: Pipeline, references, tmp_path: Path
):
    """Left out, the rounding moves the input by up to a float16 step, which the probability alone would hide."""
    definition = Definition.read(demonstration.definition)
    path = export_checkpoint(definition, checkpoint, tmp_path / "whole.onnx", whole_path=True)
    graph = onnx.load(path)
    # The first convolution is the Fourier transform.
    _, first, *_ = (k for k, node in enumerate(graph.graph.node) if node.op_type == "Conv")
    images = graph.graph.node[first].input[0]
    del graph.graph.node[first:], graph.graph.output[:]
    graph.graph.output.append(onnx.helper.make_tensor_value_info(images, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    trace = pipeline.trace(references[0])
    (ours,) = session.run(None, {"waveforms": trace["segment"].numpy()})
    difference = np.abs(ours - trace["standardize"].numpy())
    step = 2**-11 / 0.224 / 2
    # Where it was not rounded at all, most values would differ.
    assert (difference > 1e-6).mean() < 0.01
    assert difference.max() <= 2 * step + 1e-5
