"""From a network to the graphs that MnnRuntime runs. Imported where they are written, and nowhere else."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterable
from pathlib import Path

import onnx
import torch
from torch import nn

from skewless.core.networks import Network
from skewless.core.runtimes.mnn import MnnRuntime, without_printing
from skewless.core.runtimes.onnx_graph import check_numbers, graph_of
from skewless.core.runtimes.runtime import RuntimeSettings

with without_printing():
    import MNN

# A process of its own: the converter brings a protobuf that crashes beside others. Not the command mnnconvert, which also
# installs a package and sends statistics.
_CONVERT = "import sys, _tools; _tools.mnnconvert(['mnnconvert', *sys.argv[1:]])"


def write_graphs(network: Network, encoder: Path, head: Path, examples: Iterable[torch.Tensor]) -> None:
    """Write `network.encode` and `network.head` as MNN's graphs, for any number of rows. The same inputs give the same bytes.

    examples: the first is what the network is given for a recording, `(S, ...)` float32.
    Raises ValueError for a network that cannot be written so, or whose graphs give other numbers than the network.
    """
    example = next(iter(examples), None)
    if example is None:
        raise ValueError("there is no example of the network's input, expected the pipeline's output for a recording")
    network.eval()
    with torch.no_grad():
        features = network.encode(example[:1])
        names = list(network.head(features))
    _write(_Encoder(network), network.input_name, example, ["features"], encoder)
    _write(_Head(network), "features", features, names, head)
    try:
        check_numbers(MnnRuntime(encoder, head, RuntimeSettings(micro_batch=2)), network, example)
    except ValueError as error:
        encoder.unlink()
        head.unlink()
        raise ValueError(
            f"MNN does not compute this network as PyTorch does: {error}; choose runtime 'onnxruntime' or 'eager'"
        ) from error


class _Encoder(nn.Module):
    def __init__(self, network: Network):
        super().__init__()
        self.network = network

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.network.encode(rows),)


class _Head(nn.Module):
    def __init__(self, network: Network):
        super().__init__()
        self.network = network

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.network.head(features).values())


def _write(module: nn.Module, name: str, example: torch.Tensor, outputs: list[str], path: Path) -> None:
    graph = graph_of(module, {name: example.shape[1:]}, outputs)
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch, "graph.onnx"), Path(scratch, "graph.mnn")
        onnx.save(graph, source)
        command = [sys.executable, "-c", _CONVERT, "-f", "ONNX", "--modelFile", str(source), "--MNNModel", str(target)]
        # In a folder of its own: the converter keeps weights in a file of a fixed name where it runs.
        done = subprocess.run(
            [*command, "--bizCode", "skewless"], cwd=scratch, capture_output=True, text=True, check=False
        )
        if target.is_file():
            shutil.move(target, path)
    if done.returncode or not path.is_file():
        said = " ".join(
            line for line in (done.stdout + done.stderr).splitlines() if "support" in line or "rror" in line
        )
        raise ValueError(
            f"MNN's converter cannot write the network (exit code {done.returncode}: {said[-500:]}); choose runtime "
            "'onnxruntime' or 'eager'"
        )
    # The converter marks every file with a random number; one of its content takes that place.
    mark, content = MNN.get_model_uuid(str(path)).encode(), path.read_bytes()
    before, after = content.split(mark)
    own = uuid.UUID(bytes=hashlib.sha256(before + after).digest()[:16])
    path.write_bytes(before + str(own).encode() + after)
