"""Every runtime with every kind of network: the same numbers as PyTorch's eager mode, and clear words where it cannot."""

from __future__ import annotations

import copy
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from skewless.core.definition import Definition
from skewless.core.networks import Network, build_network
from skewless.core.networks.program import program_of
from skewless.core.networks.with_stages import through
from skewless.core.numerics import NumericPolicy
from skewless.core.postprocess import Postprocessor
from skewless.core.runtimes import RUNTIMES, RuntimeSettings, load_runtime
from skewless.core.runtimes.eager import EagerRuntime
from skewless.core.runtimes.onnx import FEATURES, PRECEDING, OnnxRuntime
from skewless.core.stages import Signal, Stage
from skewless.core.stages.image import CaffePreprocess
from skewless.core.stages.network_input import Cast, Replicate, Standardize
from skewless.core.stages.spectrogram import Scale
from skewless.core.stages.voice import StandardScaler
from skewless.errors import BuildError
from skewless.packaging.execution import Execution
from skewless.packaging.export import export_checkpoint
from skewless.packaging.probes import probes
from skewless.training.checkpoint import CheckpointError
from skewless.training.manifest import Recording
from tests.conftest import ROOT
from tests.recordings import one_thread  # noqa: F401

CPU = torch.device("cpu")

OWN = '''\
"""A small network of somebody's own, with convolutions and a head over all rows."""

import torch
from torch import nn

from skewless.core.networks import Network


class Pooling(Network):
    """Images `(N, 1, H, W)` to features `(N, 8)`, and a recording's features to a loudest row and a mean."""

    input_name = "fields"

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.weigh, self.last = nn.Linear(8, 1), nn.Linear(8, 2)

    def encode(self, x):
        return self.body(x).mean((2, 3))

    def head(self, features):
        weights = torch.softmax(self.weigh(features)[:, 0], dim=0)
        even = features.new_full((features.shape[0],), 1.0) / features.shape[0]
        probabilities = torch.softmax(self.last((weights + even) @ features), dim=0)
        return {"probability": probabilities[1], "rows": torch.sigmoid(self.last(features)), "weights": weights}


class Weighing(Pooling):
    """Images `(N, 1, H, W)` to features `(N, 8)`; a head without numbers that are made of the count of rows."""

    def head(self, features):
        weights = torch.softmax(self.weigh(features)[:, 0], dim=0)
        probabilities = torch.softmax(self.last(weights @ features), dim=0)
        return {"probability": probabilities[1], "rows": torch.sigmoid(self.last(features)), "weights": weights}


class Handing(Pooling):
    """Images `(N, 1, H, W)` as they are; all is in the head."""

    def encode(self, x):
        return x

    def head(self, features):
        return super().head(super().encode(features))


class Counting(Pooling):
    """Images `(N, 1, H, W)`, with a number of rows that Python counts."""

    def head(self, features):
        return {"mean": features.sum(0) / len(features)}


class Choosing(Pooling):
    """Images `(N, 1, H, W)`, with one dimension less for a single row."""

    def head(self, features):
        probability = torch.sigmoid(self.last(features))
        return {"probability": probability[0] if features.shape[0] == 1 else probability}


class Shadowing(Pooling):
    """Images `(N, 1, H, W)`, with an output that is called as the input is."""

    def head(self, features):
        return {"fields": features}


class Loud(Pooling):
    """Images `(N, 1, H, W)`, with a constant of 100,000."""

    def encode(self, x):
        return super().encode(x).clamp(max=1e5)


class Sorting(Pooling):
    """Images `(N, 1, H, W)` through an operation that ONNX does not have."""

    def head(self, features):
        return {"mean": torch.histc(features, 4) / features.shape[0]}
'''

NETWORKS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "attention": ({"attn_mil_resnet": {}}, (3, 96, 96)),
    "fastai": ({"resnet_fastai": {"depth": 18}}, (1, 96, 80)),
    "keras": ({"keras_resnet50": {}}, (3, 64, 64)),
    "mlp": ({"mlp": {}}, (37,)),
    "torchvision": ({"torchvision": {"model": "shufflenet_v2_x0_5", "classes": 3}}, (3, 64, 64)),
    "own": ({"own.py:Pooling": {}}, (1, 12, 16)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive's folder with code of its own and two exported networks."""
    path = tmp_path_factory.mktemp("archive")
    (path / "own.py").write_text(OWN)
    own = lively({"own.py:Pooling": {}}, (1, 12, 16), path)
    torch.export.save(program_of(Answer(own, "probability", "weights"), (1, 12, 16)), path / "recording.pt2")
    torch.export.save(program_of(Answer(own, "rows"), (1, 12, 16)), path / "segment.pt2")
    return path


class Answer(nn.Module):
    """Some of a network's outputs."""

    def __init__(self, network: Network, *names: str):
        super().__init__()
        self.network, self.names = network, names

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = self.network.head(self.network.encode(x))
        return {name: outputs[name] for name in self.names}


def lively(definition: dict[str, Any], shape: tuple[int, ...], folder: Path | None = None) -> Network:
    """Random weights behind batch statistics of a few inputs, as training leaves them: so that outputs depend on inputs."""
    torch.manual_seed(0)
    network = build_network(definition, folder)
    if network.files:
        return network.eval()
    layers = [m for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    for layer in layers:
        layer.momentum = None  # the plain mean over what it sees
    with torch.no_grad():
        features = network.train().encode(examples(shape, 24)[0])
    for layer in layers:
        if layer.running_var.min() <= 1e-10 or layer.num_batches_tracked == 0:
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
    assert features.std() > 0
    return network.eval()


def examples(shape: tuple[int, ...], *counts: int) -> list[torch.Tensor]:
    """Recordings of so many rows, at different levels."""
    generator = torch.Generator().manual_seed(1)
    return [(0.5 + 0.25 * k) * torch.randn(n, *shape, generator=generator) for k, n in enumerate(counts)]


def written(network: Network, inputs: list[torch.Tensor], folder: Path, precision: str = "fp32") -> Path:
    (path,) = OnnxRuntime.write(network, folder, RuntimeSettings(precision), iter(inputs))
    return path


def apart(ours: list[dict[str, torch.Tensor]], theirs: list[dict[str, torch.Tensor]]) -> float:
    """The largest difference, relative for values above 1, of outputs with the same names and shapes."""
    assert [{n: v.shape for n, v in o.items()} for o in ours] == [{n: v.shape for n, v in o.items()} for o in theirs]
    pairs = [(a[name], b[name]) for a, b in zip(ours, theirs, strict=True) for name in b]
    return max(float(((a - b).abs() / b.abs().clamp(min=1)).max()) for a, b in pairs)


@pytest.fixture(scope="module")
def made(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Network, Path]]:
    """A network of NETWORKS and its graph in float32, made when first asked for."""
    kept: dict[str, tuple[Network, Path]] = {}

    def make(name: str) -> tuple[Network, Path]:
        if name not in kept:
            network = lively(*NETWORKS[name], folder)
            path = written(network, examples(NETWORKS[name][1], 2), tmp_path_factory.mktemp(name))
            kept[name] = network, path
        return kept[name]

    return make


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_runtime_equals_eager(name: str, made):
    network, path = made(name)
    inputs = examples(NETWORKS[name][1], 1, 3, 5)
    eager = EagerRuntime(network, CPU)(inputs)
    (other,) = EagerRuntime(network, CPU)([2 * inputs[1]])
    assert all(float((other[name] - value).abs().max()) > 1e-4 for name, value in eager[1].items())
    assert apart(OnnxRuntime(path, CPU)(inputs), eager) <= 1e-5


@pytest.mark.parametrize("name", NETWORKS)
def test_micro_batches_and_neighbours_change_nothing(name: str, made):
    _, path = made(name)
    inputs = examples(NETWORKS[name][1], 7, 2)
    whole = OnnxRuntime(path, CPU, RuntimeSettings(micro_batch=100))
    chunked = OnnxRuntime(path, CPU, RuntimeSettings(micro_batch=3))
    assert apart(chunked(inputs), whole(inputs)) <= 1e-6
    assert apart(whole(inputs)[1:], whole(inputs[1:])) == 0
    assert whole([]) == []


@pytest.mark.parametrize("name", NETWORKS)
def test_a_graph_has_the_networks_names(name: str, made):
    network, path = made(name)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (rows,) = session.get_inputs()
    assert (rows.name, rows.type) == (network.input_name, "tensor(float)")
    assert rows.shape == [f"{network.input_name}_rows", *NETWORKS[name][1]]
    (preceding,) = session.get_overridable_initializers()
    assert preceding.name == PRECEDING
    (inputs,) = examples(NETWORKS[name][1], 2)
    expected = network.head(network.encode(inputs))
    assert [output.name for output in session.get_outputs()] == [*expected, FEATURES]
    assert session.get_outputs()[-1].shape[0] == f"{network.input_name}_rows + {PRECEDING}_rows"


@pytest.mark.parametrize(
    ("file", "per", "names"),
    [("recording.pt2", "recording", ["probability", "weights"]), ("segment.pt2", "segment", ["rows"])],
)
def test_exported_networks_run_on_onnx_runtime(folder: Path, tmp_path: Path, file: str, per: str, names: list[str]):
    network = build_network({"exported": {"file": file, "per": per}}, folder)
    inputs = examples((1, 12, 16), 1, 2, 5)
    path = written(network, inputs, tmp_path)
    eager = EagerRuntime(network, CPU)(inputs)
    assert [list(outputs) for outputs in eager] == [names] * 3
    for micro_batch in (2, 32):
        assert apart(OnnxRuntime(path, CPU, RuntimeSettings(micro_batch=micro_batch))(inputs), eager) <= 1e-5


@pytest.mark.parametrize("runtime", list(RUNTIMES))
@pytest.mark.parametrize(
    "definition", [{"own.py:Weighing": {}}, {"exported": {"file": "segment.pt2"}}], ids=["class", "file"]
)
def test_what_a_runtime_writes_is_what_it_loads(folder: Path, runtime: str, definition: dict[str, Any]):
    """Whatever the runtime: nothing here knows its name."""
    for package in RUNTIMES[runtime].packages:
        pytest.importorskip(package, reason="the runtime's package is an extra")
    network = lively(definition, (1, 12, 16), folder)
    inputs = examples((1, 12, 16), 2, 4)
    before = set(folder.rglob("*"))
    files = RUNTIMES[runtime].write(network, folder, RuntimeSettings(), iter(inputs))
    try:
        assert set(files) == {path for path in set(folder.rglob("*")) - before if "__pycache__" not in path.parts}
        assert files or network.files
        loaded = load_runtime({runtime: {"micro_batch": 3}}, definition, folder, CPU)
        assert (loaded.name, loaded.precision, loaded.tier) == (runtime, "fp32", "exact")
        assert apart(loaded(inputs), EagerRuntime(network, CPU)(inputs)) <= 1e-5
    finally:
        for file in files:
            file.unlink()


def weights_of(path: Path, operators: tuple[str, ...]) -> dict[str, str]:
    """What gives the weights of the graph's convolutions and linear layers: an operator, or a tensor's type."""
    graph = onnx.load(path).graph
    producers = {name: node.op_type for node in graph.node for name in node.output}
    types = {t.name: onnx.TensorProto.DataType.Name(t.data_type) for t in graph.initializer}
    nodes = [node for node in graph.node if node.op_type in operators]
    return {node.name: producers.get(node.input[1]) or types[node.input[1]] for node in nodes}


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 2e-3), ("int8", 0.05)])
@pytest.mark.parametrize("name", ["attention", "own"])
def test_reduced_precision_reduces_the_encoder_alone(made, tmp_path: Path, name: str, precision: str, tolerance: float):
    network, full = made(name)
    inputs = examples(NETWORKS[name][1], 1, 4)
    path = written(network, inputs, tmp_path, precision)
    settings = RuntimeSettings(precision, micro_batch=3)
    eager, reduced = EagerRuntime(network, CPU)(inputs), OnnxRuntime(path, CPU, settings)(inputs)
    for ours, theirs in zip(reduced, eager, strict=True):
        for output in theirs:
            if not output.endswith(("logit", "logits")):
                assert float((ours[output] - theirs[output]).abs().max()) <= tolerance, output
    assert apart(reduced, OnnxRuntime(full, CPU)(inputs)) > 1e-7
    assert path.stat().st_size < 0.65 * full.stat().st_size or name == "own"
    first, *others = weights_of(path, ("Conv",)).values()
    assert (first, set(others)) == (
        ("FLOAT16", {"FLOAT16"}) if precision == "fp16" else ("FLOAT", {"DequantizeLinear"})
    )
    assert "FLOAT" in (head := set(weights_of(path, ("Gemm", "MatMul")).values()))
    assert head <= {"FLOAT", "Concat"}


@pytest.mark.parametrize("name", NETWORKS)
def test_bf16_reduces_the_encoder_alone(made, name: str):
    network, _ = made(name)
    inputs = examples(NETWORKS[name][1], 1, 4)
    exact, seen = EagerRuntime(network, CPU), []
    reduced = EagerRuntime(network, CPU, RuntimeSettings("bf16", micro_batch=3))
    assert (reduced.precision, reduced.tier, reduced.tolerance) == ("bf16", "reduced", 0.02)
    outputs = reduced(inputs)
    for ours, theirs in zip(outputs, exact(inputs), strict=True):
        assert all(value.dtype == theirs[output].dtype for output, value in ours.items())
        for output in theirs:
            if not output.endswith(("logit", "logits")):
                assert float((ours[output] - theirs[output]).abs().max()) <= 0.05, output
    assert apart(outputs, exact(inputs)) > 1e-6 or name == "mlp"
    # The head takes float32 and computes in it: given the reduced features, it gives the very outputs.
    network.head, head = lambda features: (seen.append(features), head(features))[1], network.head
    try:
        again = reduced(inputs)
    finally:
        del network.head
    with torch.inference_mode():
        plain = [network.head(features) for features in seen]
    assert [features.dtype for features in seen] == [torch.float32] * 2
    assert all(torch.equal(a[k], b[k]) for a, b in zip(again, plain, strict=True) for k in b)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_callers_autocast_changes_nothing(made, precision: str):
    network, _ = made("own")
    inputs = examples((1, 12, 16), 2, 5)
    runtime = EagerRuntime(network, CPU, RuntimeSettings(precision))
    alone = runtime(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert apart(runtime(inputs), alone) == 0
    assert not torch.is_autocast_enabled("cpu")


class Mixing(Stage, name="mixing"):
    """A stage with a product in it, which bf16 would round."""

    def __call__(self, signal: Signal) -> Signal:
        return signal.of(signal.data @ torch.linspace(0, 1, 256).view(16, 16))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_eager_absorbs_stages_in_float32(made, precision: str):
    network, _ = made("own")
    inputs = [rows.half() for rows in examples((1, 12, 16), 2, 5)]
    stages = (Mixing(), Standardize(mean=(0.3,), std=(0.7,)))
    absorbing = EagerRuntime(network, CPU, RuntimeSettings(precision, micro_batch=3), stages)
    plain = EagerRuntime(network, CPU, RuntimeSettings(precision, micro_batch=3))
    assert apart(absorbing(inputs), plain([through(stages, rows.float()) for rows in inputs])) <= 1e-6


def test_rows_go_to_a_gpu_from_pinned_memory_as_they_are(made, monkeypatch: pytest.MonkeyPatch):
    """Without a GPU: that the memory is asked for, in the rows' own type."""
    network, _ = made("own")
    inputs = [rows.half() for rows in examples((1, 12, 16), 2, 5)]
    runtime, asked = EagerRuntime(network, CPU), []
    expected = runtime(inputs)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda rows: (asked.append((rows.shape, rows.dtype)), rows)[1])
    assert apart(runtime(inputs), expected) == 0
    assert asked == []
    monkeypatch.setattr(runtime, "_pinned", True)
    assert apart(runtime(inputs), expected) == 0
    assert asked == [((7, 1, 12, 16), torch.float16)]


class Several(Network):
    """Outputs of several types and shapes, one of them empty."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def head(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        high = features.argmax(1)
        return {
            "any": (features > 1).any(),
            "high": high,
            "columns": features.double().T,
            "none": features[:0],
            "half": features.half()[1:],
        }


def test_outputs_of_any_type_come_back_as_they_are():
    inputs = examples((3,), 1, 4, 2)
    network = Several()
    for ours, rows in zip(EagerRuntime(network, CPU)(inputs), inputs, strict=True):
        theirs = network.head(rows)
        assert list(ours) == list(theirs)
        for name, value in theirs.items():
            assert ours[name].dtype == value.dtype
            assert torch.equal(ours[name], value)


DEVICE_STAGES = {
    "cast": (Cast("float16"), (4, 5, 6)),
    "replicate": (Replicate(3), (4, 5, 6)),
    "standardize": (Standardize(mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0)), (4, 3, 5, 6)),
    "standardize in float16": (Standardize(mean=(0.1,), std=(1.0,), arithmetic="float16"), (4, 1, 5, 6)),
    "scale": (Scale(-80.0, 40.0, (-1.0, 1.0)), (4, 5, 6)),
    "caffe_preprocess": (CaffePreprocess((103.9, 116.8, 123.7)), (1, 3, 5, 6)),
    "standard_scaler": (StandardScaler((0.1, 0.2), (1.0, 2.0)), (4, 2)),
}


@pytest.mark.parametrize("name", DEVICE_STAGES)
def test_absorbed_stages_stay_on_the_device_of_their_rows(name: str):
    """On a device without values: no stage reads them, and what it adds is on the same device."""
    stage, shape = DEVICE_STAGES[name]
    given = through([stage], torch.empty(shape, device="meta"))
    on_cpu = through([stage], torch.ones(shape))
    assert given.device.type == "meta"
    assert (given.shape, given.dtype) == (on_cpu.shape, on_cpu.dtype)


@pytest.mark.parametrize("tf32", [False, True])
def test_the_numeric_policy_holds_whatever_others_have_set(tf32: bool):
    backends = torch.backends
    try:
        backends.fp32_precision = "tf32"
        backends.cudnn.conv.fp32_precision = backends.mkldnn.conv.fp32_precision = "tf32"
        backends.cuda.matmul.fp32_precision = "tf32"
        NumericPolicy(tf32=tf32).apply()
        gpu = {
            backends.cuda.matmul.fp32_precision,
            backends.cudnn.conv.fp32_precision,
            backends.cudnn.rnn.fp32_precision,
        }
        assert gpu == {"tf32" if tf32 else "ieee"}
        assert {backends.mkldnn.conv.fp32_precision, backends.mkldnn.matmul.fp32_precision} == {"ieee"}
        assert backends.cudnn.deterministic
        assert not backends.cudnn.benchmark
        assert NumericPolicy(tf32=tf32).report(CPU)["cudnn_allow_tf32"] is tf32
    finally:
        backends.fp32_precision = "none"
        NumericPolicy().apply()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.05)])
@pytest.mark.parametrize("name", NETWORKS)
def test_cuda_gives_what_the_cpu_gives(made, name: str, precision: str, tolerance: float):
    _, shape = NETWORKS[name]
    network = copy.deepcopy(made(name)[0])
    inputs = [rows.half() for rows in examples(shape, 1, 4)]
    NumericPolicy().apply()
    expected = EagerRuntime(network, CPU)(inputs)
    given = EagerRuntime(network, torch.device("cuda"), RuntimeSettings(precision, micro_batch=3))(inputs)
    for ours, theirs in zip(given, expected, strict=True):
        for output, value in theirs.items():
            assert ours[output].device == CPU
            if not output.endswith(("logit", "logits")):
                assert float((ours[output] - value).abs().max()) <= tolerance, output


def test_half_precision_without_convolutions(made, tmp_path: Path):
    network, _ = made("mlp")
    inputs = examples((37,), 1, 3)
    path = written(network, inputs, tmp_path, "fp16")
    assert 0 < apart(OnnxRuntime(path, CPU)(inputs), EagerRuntime(network, CPU)(inputs)) <= 2e-3


def test_the_same_network_gives_the_same_bytes(made, tmp_path: Path):
    network, path = made("own")
    inputs = examples((1, 12, 16), 2)
    for precision in ("fp32", "fp16", "int8"):
        one, other = tmp_path / f"{precision}-1", tmp_path / f"{precision}-2"
        one.mkdir(), other.mkdir()
        content = written(network, inputs, one, precision).read_bytes()
        assert content == written(network, inputs, other, precision).read_bytes()
        assert str(ROOT).encode() not in content
        assert b"site-packages" not in content
    assert path.read_bytes() == (tmp_path / "fp32-1" / "model.onnx").read_bytes()


@pytest.mark.parametrize(
    ("name", "precision", "message"),
    [
        ("Counting", "fp32", r"torch.export cannot follow the network for any number of rows.*leave out len\(x\)"),
        ("Choosing", "fp32", r"for 1 rows the graph's probability has the shape \(1, 2\), the network's \(2,\)"),
        (
            "Shadowing",
            "fp32",
            "inputs and outputs are fields, preceding_features, fields, encoded_features, expected diff",
        ),
        ("Sorting", "fp32", "cannot be written as an ONNX graph: .*histc"),
        ("Loud", "fp16", "holds 100000, too large for half precision; choose fp32"),
        ("Handing", "fp16", "encode hands its rows on as they are.*choose fp32"),
        ("Handing", "int8", "the encoder has 0 convolutions, expected 2 or more"),
    ],
)
def test_what_cannot_be_written_is_refused(folder: Path, tmp_path: Path, name: str, precision: str, message: str):
    network = lively({f"own.py:{name}": {}}, (1, 12, 16), folder)
    with pytest.raises(ValueError, match=message):
        written(network, examples((1, 12, 16), 2), tmp_path, precision)


def test_int8_is_for_convolutions(made, tmp_path: Path):
    network, _ = made("mlp")
    with pytest.raises(ValueError, match=r"the encoder has 0 convolutions.*choose fp32 or fp16"):
        written(network, examples((37,), 2), tmp_path, "int8")
    with pytest.raises(ValueError, match="no example of the network's input"):
        written(network, [], tmp_path)


def test_a_graph_that_gives_other_numbers_is_refused(made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from skewless.core.runtimes import onnx_graph

    network, _ = made("own")
    right = onnx_graph.trace_network

    def spoiled(*arguments):
        model = right(*arguments)
        (bias,) = [t for t in model.graph.initializer if t.name.endswith("last.bias")]
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32([0, 0.5]), bias.name))
        return model

    monkeypatch.setattr(onnx_graph, "trace_network", spoiled)
    with pytest.raises(ValueError, match=r"for 1 rows the graph's probability is off by 0?\d\.\d+.*, allowed 0.0001"):
        written(network, examples((1, 12, 16), 2), tmp_path)


def test_only_writing_a_graph_needs_what_writes_graphs(tmp_path: Path):
    """The core, both runtimes' classes and an eager model where none of the packages is installed."""
    program = """
import sys
for name in ("onnx", "onnxscript", "onnxruntime"):
    sys.modules[name] = None
import torch
from pathlib import Path
from skewless.core.networks import build_network
from skewless.core.runtimes import RUNTIMES, RuntimeSettings
import skewless.core.service, skewless.packaging.build, skewless.packaging.export
network = build_network({"mlp": {}}).eval()
print(RUNTIMES["eager"].write(network, Path(sys.argv[1]), RuntimeSettings(), []))
try:
    RUNTIMES["onnxruntime"].write(network, Path(sys.argv[1]), RuntimeSettings(), [torch.zeros(1, 37)])
except ValueError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "weights.safetensors" in result.stdout
    assert "is written with onnxruntime, onnx, onnxscript" in result.stdout


PIPELINE = """\
name: small
stages:
  - decode: {}
  - downmix: {}
  - resample: {rate: 8000, method: sinc_hann}
  - segment: {duration_s: 1.0, hop_s: 0.5, max_segments: 8, tail: drop}
  - mel: {n_fft: 256, win_length: 256, hop_length: 500, n_mels: 12, f_min: 50.0, f_max: 4000.0}
  - decibel: {top_db: 80.0, max_over: segment}
  - scale: {low: -80.0, high: 40.0, to: [-1.0, 1.0]}
  - replicate: {channels: 1}
"""

MODEL = """\
network: {own.py:Pooling: {}}
runtime: {eager: {micro_batch: 3}}
postprocess: {label_threshold: {threshold: 0.5, classes: [low, high], positive_field: high}}
precision: {}
limits: {}
"""


@pytest.fixture
def definition(tmp_path: Path) -> Definition:
    path = tmp_path / "small"
    path.mkdir()
    for name, content in (("own.py", OWN), ("pipeline.yaml", PIPELINE), ("model.yaml", MODEL)):
        (path / name).write_text(content)
    return Definition.read(path)


@pytest.fixture
def checkpoint(definition: Definition) -> dict[str, Any]:
    network = lively({"own.py:Pooling": {}}, (1, 12, 17), definition.folder)
    return {
        "pipeline": definition.pipeline.to_dict(),
        "postprocess": definition.postprocess,
        "code": definition.code,
        "model_state_dict": network.state_dict(),
    }


def eager(definition: Definition, checkpoint: dict[str, Any]) -> EagerRuntime:
    network = definition.build_network()
    network.load_state_dict(checkpoint["model_state_dict"])
    return EagerRuntime(network, CPU)


def test_a_pt2_file_gives_the_networks_very_numbers(definition: Definition, checkpoint, tmp_path: Path):
    path = export_checkpoint(definition, checkpoint, tmp_path / "new" / "model.pt2", format="pt2")
    inputs = examples((1, 12, 17), 1, 2, 5)
    program = torch.export.load(path).module()
    served = build_network({"exported": {"file": "model.pt2", "per": "recording"}}, path.parent)
    network = eager(definition, checkpoint).network
    with torch.no_grad():
        for x in inputs:
            expected = network.head(network.encode(x))
            for ours in (program(x), served.head(served.encode(x))):
                assert list(ours) == list(expected) == ["probability", "rows", "weights"]
                assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert str(ROOT).encode() not in path.read_bytes()


def test_an_onnx_file_of_a_checkpoint(definition: Definition, checkpoint, tmp_path: Path):
    path = export_checkpoint(definition, checkpoint, tmp_path / "model.onnx")
    inputs = examples((1, 12, 17), 1, 2, 5)
    assert apart(OnnxRuntime(path, CPU)(inputs), eager(definition, checkpoint)(inputs)) <= 1e-5


@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_the_whole_path_starts_at_mel(definition: Definition, checkpoint, tmp_path: Path, form: str):
    path = export_checkpoint(definition, checkpoint, tmp_path / f"whole.{form}", format=form, whole_path=True)
    before, _ = definition.pipeline.split("mel")
    payloads = list(probes("audio").values())
    waveforms = [before(payload) for payload in payloads]
    assert waveforms[0].shape == (4, 8000)
    expected = eager(definition, checkpoint)([definition.pipeline(payload) for payload in payloads])
    if form == "onnx":
        runtime = OnnxRuntime(path, CPU, RuntimeSettings(micro_batch=3))
        assert runtime._session.get_inputs()[0].name == "waveforms"
        answers = runtime(waveforms)
    else:
        program = torch.export.load(path).module()
        with torch.no_grad():
            answers = [program(x) for x in waveforms]
    # The Fourier transform in another order of summation, then decibels.
    assert apart(answers, expected) <= 1e-4


def test_what_cannot_be_exported_is_refused(definition: Definition, checkpoint, tmp_path: Path):
    with pytest.raises(ValueError, match="format is 'tflite', expected one of onnx, pt2"):
        export_checkpoint(definition, checkpoint, tmp_path / "model.tflite", format="tflite")
    with pytest.raises(CheckpointError, match="trained with the post-processing"):
        export_checkpoint(definition, checkpoint | {"postprocess": {}}, tmp_path / "model.onnx")
    path = definition.folder / "pipeline.yaml"
    path.write_text(PIPELINE.replace("top_db: 80.0, max_over: segment", "top_db: 20.0, max_over: recording"))
    coupled = Definition.read(definition.folder)
    changed = checkpoint | {"pipeline": coupled.pipeline.to_dict()}
    with pytest.raises(ValueError, match=r"the graph's .* is off by"):
        export_checkpoint(coupled, changed, tmp_path / "model.onnx", whole_path=True)
    without = [line for line in PIPELINE.splitlines(keepends=True) if "segment: {" not in line]
    path.write_text("".join(without))
    plain = Definition.read(definition.folder)
    with pytest.raises(ValueError, match="expected `segment` and then `mel`"):
        export_checkpoint(
            plain, checkpoint | {"pipeline": plain.pipeline.to_dict()}, tmp_path / "m.onnx", whole_path=True
        )
    assert not list(tmp_path.glob("m*"))


def test_execution_asks_the_runtime():
    onnx_fp32 = Execution("onnxruntime")
    assert onnx_fp32.metadata()["library_versions"].keys() == {"python", "onnx", "onnxruntime", "onnxscript"}
    assert Execution("eager").metadata()["library_versions"].keys() == {"python", "torch"}
    assert onnx_fp32.definition({"eager": {"micro_batch": 7}}) == {
        "onnxruntime": {"precision": "fp32", "micro_batch": 32}
    }
    absorbing = {"mnn": {"micro_batch": 4, "absorb": ["replicate", "standardize"]}}
    assert Execution("eager").definition(absorbing) == {
        "eager": {"precision": "fp32", "micro_batch": 32, "absorb": ["replicate", "standardize"]}
    }
    assert Execution("eager").definition({"eager": {"micro_batch": 7}}) == {"eager": {"micro_batch": 7}}
    assert Execution.of({"onnxruntime": {}}) == onnx_fp32
    some = [Recording("a.wav", Path("a.wav"), 0, "test")]
    for arguments, message in [
        (("tensorflow",), "runtime is 'tensorflow', expected one of eager, mnn, onnxruntime"),
        (("eager", "int4"), "precision is 'int4', expected one of fp32, bf16, fp16, int8"),
        (("eager", "fp16"), "runtime 'eager' runs in fp32 and bf16 only; for fp16 choose runtime 'onnxruntime'"),
        (("mnn", "bf16"), "runtime 'mnn' runs in fp32 only; for bf16 choose runtime 'eager'"),
        (("eager", "bf16"), "bf16 is proved on .* give their --manifest"),
        (("onnxruntime", "fp16"), "give their --manifest"),
        (("onnxruntime", "int8", some), "--calibration-manifest with a train split"),
    ]:
        with pytest.raises(BuildError, match=message):
            Execution(*arguments)
    assert Execution("onnxruntime", "fp16", some).definition({"onnxruntime": {"precision": "fp16"}}) == {
        "onnxruntime": {"precision": "fp16"}
    }


def test_execution_says_which_network_a_runtime_cannot_execute(definition: Definition, tmp_path: Path):
    (definition.folder / "model.yaml").write_text(MODEL.replace("Pooling", "Counting"))
    counting = Definition.read(definition.folder)
    with pytest.raises(BuildError, match=r"runtime 'onnxruntime' in fp32: torch.export cannot follow the network"):
        Execution("onnxruntime").write(counting.build_network(), counting, tmp_path)


class _Measured:
    """A service with three classes that gives what its recordings' bytes say, moved by `off`."""

    threshold = 0.5

    def __init__(self, off: float):
        self.off = off
        self.postprocessor = SimpleNamespace(classes=("a", "b", "c"), choose=Postprocessor.choose)

    def score(self, payloads: list[bytes]) -> list[Any]:
        found = [np.add(json.loads(payload), (self.off, 0, -self.off)) for payload in payloads]
        return [SimpleNamespace(scores=tuple(map(float, each)), parts=()) for each in found]


@pytest.mark.parametrize(
    ("off", "flips", "message"), [(0.001, 0, ""), (0.015, 1, ""), (0.03, 1, "off by more than 0.02")]
)
def test_reduced_precision_is_measured_for_several_classes_too(tmp_path: Path, off: float, flips: int, message: str):
    scores = [(0.8, 0.1, 0.1), (0.1, 0.8, 0.1), (0.1, 0.2, 0.7), (0.39, 0.2, 0.41)]
    evaluation, references = tmp_path / "evaluation", tmp_path / "evaluation" / "references"
    references.mkdir(parents=True)
    recordings, lines, entries = [], ["file_path,label,split,probability_a,probability_b,probability_c,sha256"], []
    for number, each in enumerate(scores):
        path, label = references / f"{number}.json", (0, 1, 2, 2)[number]
        path.write_text(json.dumps(each))
        recordings.append(Recording(path.name, path, label, "test"))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        lines.append(",".join(map(str, (path.name, label, "test", *each, digest))))
        entries.append({"file": path.name, "scores": each})
    (evaluation / "predictions.csv").write_text("\n".join(lines) + "\n")
    (references / "references.json").write_text(json.dumps(entries))
    execution = replace(Execution("onnxruntime"), precision="fp16", recordings=recordings)
    if message:
        with pytest.raises(BuildError, match=message):
            execution.measure(_Measured(off), evaluation)
        return
    figures = execution.measure(_Measured(off), evaluation)
    assert (figures["recordings"], figures["flips"], figures["auc_evaluated"]) == (4, flips, 1.0)
    assert figures["max_dp"] == pytest.approx(off)
