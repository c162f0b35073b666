"""From a network to the ONNX graph that OnnxRuntime runs: float32, half precision, or int8.

Imported where a graph is written, and nowhere else: it needs onnx and onnxscript.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import onnxscript  # noqa: F401 - torch.onnx uses it, and says late where it is missing
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

from skewless.core.networks import Network
from skewless.core.networks.program import innermost, program_of
from skewless.core.numerics import TOLERANCES
from skewless.core.runtimes.onnx import FEATURES, PRECEDING, OnnxRuntime
from skewless.core.runtimes.runtime import Runtime, RuntimeSettings

_OPSET = 18
_INT8_OPERATORS = ("Conv", "Relu", "Add", "MaxPool", "GlobalAveragePool")
_HALF, _SUFFIX = "tensor(float16)", "_float16"


def write_graph(network: Network, path: Path, precision: str, examples: Iterable[torch.Tensor]) -> None:
    """Write the network as a graph for one recording of any number of rows. The same inputs give the same bytes.

    In: the network's `input_name` `(S, ...)` float32, and the optional `preceding_features (T, F)` float32: features of
    rows that an earlier run has encoded, so that a long recording can be encoded a few rows at a time. Out: what
    `network.head` names, for all T + S rows, and `encoded_features (T + S, F)`.

    examples: the pipeline's outputs `(S_i, ...)` for some recordings. The first gives the shape of a row; int8 takes its
        value ranges from all of them.
    Raises ValueError for a network that cannot be written so, or whose graph gives other numbers than the network.
    """
    examples = iter(examples)
    first = next(examples, None)
    if first is None:
        raise ValueError("there is no example of the network's input, expected the pipeline's output for a recording")
    model = trace_network(network, first)
    save_graph(model, path)
    try:
        check_numbers(OnnxRuntime(path, torch.device("cpu"), RuntimeSettings(micro_batch=2)), network, first)
    except ValueError as error:
        path.unlink()
        raise ValueError(
            f"{error}; in encode and head take sizes from x.shape, and index with [0] in place of squeeze"
        ) from error
    if precision == "fp16":
        save_graph(to_fp16(model), path)
    elif precision == "int8":
        save_graph(to_int8(model, chain([first], examples)), path)
    elif precision != "fp32":
        raise ValueError(f"precision is {precision!r}, expected fp32, fp16 or int8")


def require_preceding(path: Path) -> None:
    """Make preceding_features of a written graph an input that has to be given: for programs that take an optional one for a
    constant."""
    model = onnx.load(path)
    kept = [tensor for tensor in model.graph.initializer if tensor.name != PRECEDING]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    path.write_bytes(model.SerializeToString(deterministic=True))


class _RecordingGraph(nn.Module):
    def __init__(self, network: Network):
        super().__init__()
        self.network = network

    def forward(self, rows: torch.Tensor, preceding: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = torch.cat([preceding, self.network.encode(rows)])
        return *self.network.head(features).values(), features


def trace_network(network: Network, example: torch.Tensor) -> ModelProto:
    """The graph of `write_graph` in float32, in which preceding_features is not optional yet. example: `(S, ...)`."""
    network.eval()
    with torch.no_grad():
        features = network.encode(example[:1])
        names = [network.input_name, PRECEDING, *network.head(features), FEATURES]
    if len(set(names)) < len(names):
        raise ValueError(f"the graph's inputs and outputs are {', '.join(names)}, expected different names")
    return graph_of(_RecordingGraph(network), {names[0]: example.shape[1:], PRECEDING: features.shape[1:]}, names[2:])


def graph_of(module: nn.Module, inputs: Mapping[str, Sequence[int]], outputs: Sequence[str]) -> ModelProto:
    """A module that gives a tuple of tensors as an ONNX graph that takes any number of rows.

    inputs: names for what it takes, in order, with the shape of one row of each. outputs: names for what it gives.
    Raises ValueError for a module that cannot be written so.
    """
    program = program_of(module, *inputs.values())
    with warnings.catch_warnings():
        # What torch warns of here concerns its own code.
        warnings.simplefilter("ignore")
        try:
            written = torch.onnx.export(
                program, input_names=list(inputs), output_names=list(outputs), opset_version=_OPSET, verbose=False
            )
        except Exception as error:  # torch's own kinds, for what ONNX has no operator for
            raise ValueError(f"the network cannot be written as an ONNX graph: {innermost(error)}") from error
    # Annotated as None, too, for the exporter of old, which is not asked for.
    model = cast(torch.onnx.ONNXProgram, written).model_proto  # made anew each time it is asked for
    _name_dimensions(model.graph)
    return model


def _name_dimensions(graph: onnx.GraphProto) -> None:
    """Call the number of rows of an input `x` x_rows, where torch.export has symbols such as s10."""
    symbols = {value.type.tensor_type.shape.dim[0].dim_param: f"{value.name}_rows" for value in graph.input}
    for value in (*graph.input, *graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param:
                words = dimension.dim_param.split(" ")
                dimension.dim_param = " ".join(symbols.get(word, word) for word in words)


def check_numbers(graph: Runtime, network: Network, example: torch.Tensor) -> None:
    """Raise ValueError unless a written graph gives the network's numbers for 1, 2 and 5 rows, encoded two at a time.

    example: the network's input for a recording, `(S, ...)` float32.
    """
    allowed = TOLERANCES["exact"]
    for count in (1, 2, 5):
        rows = example[torch.arange(count) % len(example)]
        with torch.no_grad():
            expected = network.head(network.encode(rows))
        (outputs,) = graph([rows])
        for name, value in expected.items():
            if value.shape != outputs[name].shape:
                found = f"{tuple(outputs[name].shape)}, the network's {tuple(value.shape)}"
                raise ValueError(f"for {count} rows the graph's {name} has the shape {found}")
            worst = float(((outputs[name] - value).abs() / (1 + value.abs())).max())
            if not worst <= allowed:
                raise ValueError(f"for {count} rows the graph's {name} is off by {worst:.1e}, allowed {allowed:g}")


def to_fp16(model: ModelProto) -> ModelProto:
    """The encoder's weights and arithmetic in half precision, the head and all inputs and outputs in float32.

    Where a provider has no half-precision kernels, as on x86 processors, it computes in float32 with these weights.
    Raises ValueError for weights that half precision cannot hold, and for a network without an encoder.
    """
    half = onnx.shape_inference.infer_shapes(model)
    graph = half.graph
    inside = _encoder(half)
    if not inside:
        raise ValueError(
            "the network's encode hands its rows on as they are, and only what encode computes is put in half precision; "
            "choose fp32"
        )
    weights = {tensor.name: tensor for tensor in graph.initializer}
    values = [*graph.input, *graph.value_info, *graph.output]
    floats = {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    floats |= {name for name, tensor in weights.items() if tensor.data_type == TensorProto.FLOAT}
    made: set[str] = set()
    narrowed: set[str] = set()
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.name not in inside:
            nodes.append(node)
            continue
        schema = onnx.defs.get_schema(node.op_type, _OPSET, node.domain)
        for k, name in enumerate(node.input):
            if name not in floats or _HALF not in schema.inputs[min(k, len(schema.inputs) - 1)].types:
                continue
            node.input[k] = f"{name}{_SUFFIX}"
            if name not in made | narrowed:
                narrowed.add(name)
                if name in weights:
                    graph.initializer.append(_half_tensor(weights[name], node.input[k]))
                else:
                    nodes.append(_cast(name, node.input[k], TensorProto.FLOAT16))
        _narrow_attributes(node)
        nodes.append(node)
        for k, name in enumerate(node.output):
            if name in floats and _HALF in schema.outputs[min(k, len(schema.outputs) - 1)].types:
                node.output[k] = f"{name}{_SUFFIX}"
                made.add(name)
                # Dropped below where only the encoder uses it.
                nodes.append(_cast(node.output[k], name, TensorProto.FLOAT))
    used = {name for node in nodes for name in node.input} | {output.name for output in graph.output}
    kept = [node for node in nodes if used & set(node.output)]
    del graph.node[:]
    graph.node.extend(kept)
    _drop_unused_weights(graph)
    # Shapes and types of what is now another type.
    graph.ClearField("value_info")
    return half


def to_int8(model: ModelProto, recordings: Iterable[torch.Tensor]) -> ModelProto:
    """The encoder's convolutions in int8: 8-bit weights with a scale per channel, unsigned 8-bit activations whose ranges
    are the smallest and largest value seen over `recordings`, each `(S, ...)`. The first convolution and the head stay
    in float32.

    On x86 processors without VNNI the sums of products saturate at 16 bits and the probabilities are others than where
    the archive was built; a worker's self-test refuses when they are.
    Raises ValueError for an encoder without a second convolution.
    """
    inside = _encoder(model)
    convolutions = [node for node in model.graph.node if node.name in inside and node.op_type == "Conv"]
    if len(convolutions) < 2:
        raise ValueError(
            f"the encoder has {len(convolutions)} convolutions, expected 2 or more: int8 computes all but the first in 8 "
            "bits; choose fp32 or fp16"
        )
    # It sees raw pixels: in int8 it doubles the error in probability and saves a tenth of the time.
    first = convolutions[0]
    after = [node for node in model.graph.node if first.output[0] in node.input and node.op_type == "Relu"]
    in_float = [first.name, *(node.name for node in after)]
    with tempfile.TemporaryDirectory() as scratch:
        prepared, target = Path(scratch, "float.onnx"), Path(scratch, "int8.onnx")
        # Infers shapes. The exporter has folded what there is to fold.
        quant_pre_process(model, prepared, skip_optimization=True, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            target,
            _Calibration(model, recordings),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(_INT8_OPERATORS),
            nodes_to_exclude=[*(node.name for node in model.graph.node if node.name not in inside), *in_float],
            per_channel=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )
        return onnx.load(target)


class _Calibration(CalibrationDataReader):
    def __init__(self, model: ModelProto, recordings: Iterable[torch.Tensor]):
        self._recordings = iter(recordings)
        self._input = model.graph.input[0].name
        self._none = _no_features(model)

    def get_next(self) -> dict[str, np.ndarray] | None:
        rows = next(self._recordings, None)
        return None if rows is None else {self._input: rows.numpy(), PRECEDING: self._none}


def _no_features(model: ModelProto) -> np.ndarray:
    """The features of no rows `(0, F)`."""
    (preceding,) = (value for value in model.graph.input if value.name == PRECEDING)
    _, *shape = (dimension.dim_value for dimension in preceding.type.tensor_type.shape.dim)
    return np.zeros((0, *shape), dtype=np.float32)


def _encoder(model: ModelProto) -> set[str]:
    """The names of the nodes that compute the rows' features."""
    producers = {name: node for node in model.graph.node for name in node.output}
    joined = producers[FEATURES]
    if joined.op_type != "Concat" or joined.input[0] != PRECEDING:
        raise ValueError(
            f"{FEATURES} comes from {joined.op_type} of {list(joined.input)}, expected {PRECEDING} and others joined"
        )
    found: set[str] = set()
    open_ends = list(joined.input[1:])
    while open_ends:
        node = producers.get(open_ends.pop())
        if node is not None and node.name not in found:
            found.add(node.name)
            open_ends += node.input
    return found


def _half_tensor(tensor: TensorProto, name: str) -> TensorProto:
    values = numpy_helper.to_array(tensor)
    finite = np.abs(values[np.isfinite(values)])
    if finite.size and finite.max() > np.finfo(np.float16).max:
        raise ValueError(f"{tensor.name} holds {finite.max():g}, too large for half precision; choose fp32")
    return numpy_helper.from_array(values.astype(np.float16), name)


def _cast(source: str, target: str, to: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], f"{target}/cast", to=to)


def _narrow_attributes(node: NodeProto) -> None:
    """Let a node that makes float32 values of itself make half ones."""
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16
        elif attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT:
            attribute.t.CopyFrom(_half_tensor(attribute.t, attribute.t.name))


def _drop_unused_weights(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def save_graph(model: ModelProto, path: Path) -> None:
    """Check a graph and write it without what says where and by which program it was made. Features of earlier rows, if it
    takes any, become optional."""
    saved = ModelProto()
    saved.CopyFrom(model)
    graph = saved.graph
    for field in ("producer_name", "producer_version"):
        saved.ClearField(field)
    # What is inferred again from the inputs.
    graph.ClearField("value_info")
    for part in (saved, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    if any(value.name == PRECEDING for value in graph.input):
        graph.initializer.append(numpy_helper.from_array(_no_features(model), PRECEDING))
    onnx.checker.check_model(saved, full_check=True)
    path.write_bytes(saved.SerializeToString(deterministic=True))
