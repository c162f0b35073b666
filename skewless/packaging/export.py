"""From a trained network to an ONNX graph: float32, half precision, int8, or with the preprocessing in front of it."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

from skewless.core.networks.attn_mil_resnet import AttnMILResNet
from skewless.core.pipeline import Pipeline
from skewless.core.stages import Signal, Stage
from skewless.core.stages.spectrogram import Mel

OUTPUTS = ("bag_probability", "segment_probabilities", "segment_logits", "bag_logit", "segment_attention")
_IMAGE = (3, 224, 224)
_OPSET = 17

# The first convolution sees raw pixels: in int8 it doubles the error in probability and saves a tenth of the time.
_FLOAT_IN_INT8 = ("/backbone/conv1/Conv", "/backbone/relu/Relu")
_INT8_OPERATORS = ("Conv", "Relu", "Add", "MaxPool", "GlobalAveragePool")


class _BagGraph(nn.Module):
    """The network without data-dependent indexing: padded segments are encoded too, and their features set to 0."""

    def __init__(self, network: AttnMILResNet):
        super().__init__()
        self.network = network

    def forward(
        self, spectrograms: torch.Tensor, segment_mask: torch.Tensor, preceding_features: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        bags = spectrograms.shape[0]
        encoded = self.network.encode(spectrograms.flatten(0, 1))
        features = torch.cat(
            [preceding_features.expand(bags, -1, -1), encoded.reshape(bags, -1, encoded.shape[-1])], dim=1
        )
        features = features.masked_fill(~segment_mask.unsqueeze(-1), 0.0)
        outputs = self.network.pool(features, segment_mask)
        return *(outputs[name] for name in OUTPUTS), features


class _SegmentGraph(nn.Module):
    """Everything after segmentation: the pipeline's own stages, with the STFT as a convolution, then the network."""

    def __init__(self, network: AttnMILResNet, stages: Sequence[Stage], rate: int):
        super().__init__()
        mel, *self.stages = stages
        if not isinstance(mel, Mel):
            raise ValueError(f"stage '{mel.name}' follows 'segment', expected 'mel'")
        self.network = network
        self.margin, self.hop, self.exponent = mel.n_fft // 2, mel.hop_length, mel.power / 2
        filterbank = mel.filterbank(mel.rate or rate)
        # Frequencies outside every filter contribute nothing.
        heard = filterbank.any(dim=1)
        self.register_buffer("filterbank", filterbank[heard])
        self.register_buffer("basis", _fourier_basis(mel)[:, heard].flatten(0, 1).unsqueeze(1))

    def forward(self, waveforms: torch.Tensor) -> tuple[torch.Tensor, ...]:
        padded = F.pad(waveforms.unsqueeze(1), (self.margin, self.margin), mode="reflect")
        real, imaginary = F.conv1d(padded, self.basis, stride=self.hop).chunk(2, dim=1)
        spectrum = (real.square() + imaginary.square()) ** self.exponent
        signal = Signal(torch.matmul(spectrum.transpose(1, 2), self.filterbank).transpose(1, 2))
        for stage in self.stages:
            signal = stage(signal)
        features = self.network.encode(signal.data).unsqueeze(0)
        outputs = self.network.pool(features, torch.ones_like(features[..., 0], dtype=torch.bool))
        return tuple(outputs[name][0] for name in OUTPUTS)


def _fourier_basis(mel: Mel) -> torch.Tensor:
    """Windowed cosines and sines, `(2, n_fft // 2 + 1, n_fft)`: the discrete Fourier transform of a real frame."""
    left = (mel.n_fft - mel.win_length) // 2
    window = F.pad(torch.hann_window(mel.win_length, dtype=torch.float64), (left, mel.n_fft - mel.win_length - left))
    # The phase modulo a turn, in integers: exact, whatever n_fft.
    turns = torch.outer(torch.arange(mel.n_fft // 2 + 1), torch.arange(mel.n_fft)) % mel.n_fft
    phase = 2 * torch.pi * turns.double() / mel.n_fft
    return (torch.stack([phase.cos(), phase.sin()]) * window).float()


def trace_network(network: AttnMILResNet) -> ModelProto:
    """The network in eval mode as a graph that skewless.core.runtimes.onnx runs.

    In: spectrograms `(B, S, 3, 224, 224)` float32, segment_mask `(B, T + S)` bool (False: padding), and
    preceding_features `(B, T, F)`, which `save_graph` makes optional, with T = 0.
    Out: OUTPUTS as AttnMILResNet.pool has them, and segment_features `(B, T + S, F)`.
    """
    inputs = {
        "spectrograms": (torch.zeros(2, 3, *_IMAGE), {0: "B", 1: "S"}),
        "segment_mask": (torch.ones(2, 3, dtype=torch.bool), {0: "B", 1: "T_S"}),
        "preceding_features": (torch.zeros(1, 0, network.seg_head.in_features), {0: "B_or_1", 1: "T"}),
    }
    per_segment = {0: "B", 1: "T_S"}
    outputs = {name: {0: "B"} if name.startswith("bag") else per_segment for name in OUTPUTS}
    return _trace(_BagGraph(network), inputs, outputs | {"segment_features": per_segment})


def export_onnx(
    network: AttnMILResNet, path: Path, precision: str = "fp32", calibration: Iterable[torch.Tensor] = ()
) -> None:
    """Write the network as an archive's model.onnx. The same inputs give the same bytes.

    calibration: the pipeline's output `(S, 3, 224, 224)` for recordings that int8 takes its value ranges from.
    Raises ValueError for an unknown precision.
    """
    _require_bag(network)
    model = trace_network(network)
    if precision == "fp16":
        model = to_fp16(model)
    elif precision == "int8":
        model = to_int8(model, calibration)
    elif precision != "fp32":
        raise ValueError(f"precision is {precision!r}, expected fp32, fp16 or int8")
    empty = np.zeros((1, 0, network.seg_head.in_features), dtype=np.float32)
    model.graph.initializer.append(numpy_helper.from_array(empty, "preceding_features"))
    save_graph(model, path)


def export_segment_model(network: AttnMILResNet, pipeline: Pipeline, path: Path) -> None:
    """Write everything that follows the pipeline's `segment` stage as one graph, for use without this project.

    In: waveforms `(S, duration_s * rate)` float32, one recording's segments, resampled and filtered as the pipeline's
    earlier stages do. Out: OUTPUTS of that one recording, `()` or `(S,)`.
    Raises ValueError for a pipeline without `resample`, `segment` and `mel`, or whose segments are coupled.
    """
    _require_bag(network)
    missing = [name for name in ("resample", "segment", "mel") if name not in pipeline.stages]
    if missing:
        raise ValueError(f"pipeline '{pipeline.name}' has no stage {', '.join(missing)}; this export needs it")
    rate = pipeline.stages["resample"].rate
    samples = int(pipeline.stages["segment"].duration_s * rate)
    names, stages = list(pipeline.stages), list(pipeline.stages.values())
    graph = _SegmentGraph(network, stages[names.index("segment") + 1 :], rate)
    # Noise, not silence: a constant spectrogram could be traced as a constant.
    example = torch.rand(3, samples, generator=torch.Generator().manual_seed(0)) - 0.5
    outputs = {name: {} if name.startswith("bag") else {0: "S"} for name in OUTPUTS}
    save_graph(_trace(graph, {"waveforms": (example, {0: "S"})}, outputs), path)


def _require_bag(network: nn.Module) -> None:
    if not isinstance(network, AttnMILResNet):
        raise ValueError(
            f"only network 'attn_mil_resnet' is exported to ONNX, this one is a {type(network).__name__}; serve it with "
            "runtime 'eager'"
        )


def to_fp16(model: ModelProto) -> ModelProto:
    """The backbone's weights and arithmetic in half precision, the pooling heads and all inputs and outputs in float32.

    Where a provider has no half-precision kernels, as on x86 processors, it computes in float32 with these weights.
    """
    half, nodes = ModelProto(), list(model.graph.node)
    half.CopyFrom(model)
    places = [k for k, node in enumerate(nodes) if _in_backbone(node)]
    first, last = half.graph.node[places[0]], half.graph.node[places[-1]]
    weights = {name for k in places for name in nodes[k].input}
    for tensor in half.graph.initializer:
        if tensor.name in weights:
            values = numpy_helper.to_array(tensor)
            if not np.abs(values).max() <= np.finfo(np.float16).max:
                raise ValueError(f"{tensor.name} holds {np.abs(values).max():g}, too large for half precision")
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), tensor.name))
    narrow = helper.make_node("Cast", [first.input[0]], ["images_float16"], "/narrow", to=TensorProto.FLOAT16)
    widen = helper.make_node("Cast", ["features_float16"], [last.output[0]], "/widen", to=TensorProto.FLOAT)
    first.input[0], last.output[0] = narrow.output[0], widen.input[0]
    half.graph.node.insert(places[-1] + 1, widen)
    half.graph.node.insert(places[0], narrow)
    # Shapes and types that the exporter noted for what is now another type.
    half.graph.ClearField("value_info")
    return half


def to_int8(model: ModelProto, recordings: Iterable[torch.Tensor]) -> ModelProto:
    """The backbone in int8: 8-bit weights with a scale per channel, unsigned 8-bit activations whose ranges are the
    smallest and largest value seen over `recordings`, each `(S, 3, 224, 224)`. The first convolution and the pooling
    heads stay in float32.

    On x86 processors without VNNI the sums of products saturate at 16 bits and the probabilities are others than where
    the archive was built; a worker's self-test refuses when they are.
    """
    absent = set(_FLOAT_IN_INT8) - {node.name for node in model.graph.node}
    if absent:
        raise ValueError(f"the graph has no {', '.join(sorted(absent))}, which int8 keeps in float32")
    heads = [node.name for node in model.graph.node if not _in_backbone(node)]
    (preceding,) = (i for i in model.graph.input if i.name == "preceding_features")
    features = preceding.type.tensor_type.shape.dim[2].dim_value
    with tempfile.TemporaryDirectory() as scratch:
        prepared, target = Path(scratch, "float.onnx"), Path(scratch, "int8.onnx")
        # Infers shapes. The exporter has folded what there is to fold.
        quant_pre_process(model, prepared, skip_optimization=True, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            target,
            _Calibration(recordings, features),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(_INT8_OPERATORS),
            nodes_to_exclude=[*heads, *_FLOAT_IN_INT8],
            per_channel=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )
        return onnx.load(target)


class _Calibration(CalibrationDataReader):
    def __init__(self, recordings: Iterable[torch.Tensor], features: int):
        self._recordings = iter(recordings)
        self._none = np.zeros((1, 0, features), dtype=np.float32)

    def get_next(self) -> dict[str, np.ndarray] | None:
        segments = next(self._recordings, None)
        if segments is None:
            return None
        return {
            "spectrograms": segments.unsqueeze(0).numpy(),
            "segment_mask": np.ones((1, len(segments)), dtype=bool),
            "preceding_features": self._none,
        }


def _in_backbone(node: NodeProto) -> bool:
    return node.name.startswith("/backbone/")


def save_graph(model: ModelProto, path: Path) -> None:
    """Check a graph and write it without what says where and by which program it was made."""
    for field in ("producer_name", "producer_version", "doc_string", "metadata_props"):
        model.ClearField(field)
    for node in model.graph.node:
        node.ClearField("doc_string")
        node.ClearField("metadata_props")
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


def _trace(
    module: nn.Module, inputs: dict[str, tuple[torch.Tensor, dict[int, str]]], outputs: dict[str, dict[int, str]]
) -> ModelProto:
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings(), torch.no_grad():
        # That this exporter is the older one, and that sizes become constants: those that do are constants.
        warnings.simplefilter("ignore")
        path = Path(scratch, "traced.onnx")
        torch.onnx.export(
            module.eval(),
            tuple(example for example, _ in inputs.values()),
            str(path),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes={name: axes for name, (_, axes) in inputs.items()} | {n: a for n, a in outputs.items() if a},
            opset_version=_OPSET,
            dynamo=False,
        )
        return onnx.load(path)
