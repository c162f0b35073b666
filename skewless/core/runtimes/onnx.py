"""ONNX Runtime: the network as one graph, `model.onnx`. The package is imported when such an archive is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from skewless.core.networks import Network
from skewless.core.runtimes.graph import GraphRuntime
from skewless.core.runtimes.runtime import DEFAULTS, RuntimeSettings

if TYPE_CHECKING:
    import onnxruntime

MODEL = "model.onnx"
FEATURES, PRECEDING = "encoded_features", "preceding_features"


class OnnxRuntime(GraphRuntime):
    """Runs a graph for one recording, as onnx_graph.py writes it for any network.

    In: the network's input by its own name, `(S, ...)` float32, and the optional `preceding_features (T, F)`: features of
    rows that an earlier run has encoded, from its output `encoded_features`. The other outputs are the network's, for all
    T + S rows.
    """

    name = "onnxruntime"
    title = "ONNX Runtime"
    devices = ("cpu", "cuda")
    precisions = ("fp32", "fp16", "int8")
    calibrated = ("int8",)
    packages = ("onnxruntime",)
    build_packages = ("onnx", "onnxscript")

    def __init__(self, model: Path, device: torch.device, settings: RuntimeSettings = DEFAULTS):
        self.device, self.settings = device, settings
        self._session = _session(model, device)
        (self._input,) = (value.name for value in self._session.get_inputs())
        self._outputs = [output.name for output in self._session.get_outputs()]

    @classmethod
    def write_graphs(
        cls, network: Network, folder: Path, settings: RuntimeSettings, rows: Iterator[torch.Tensor]
    ) -> list[Path]:
        """model.onnx, in the settings' precision."""
        from skewless.core.runtimes.onnx_graph import write_graph

        write_graph(network, folder / MODEL, settings.precision, rows)
        return [folder / MODEL]

    @classmethod
    def open(cls, folder: Path, device: torch.device, settings: RuntimeSettings) -> OnnxRuntime:
        """The archive's model.onnx. Raises ValueError when onnxruntime is not installed or cannot use the device."""
        return cls(folder / MODEL, device, settings)

    def compute(self, inputs: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """Recordings, each `(S_i, ...)` float32 or float16, to each one's outputs on the CPU.

        Every recording is a run of its own, so its result cannot depend on its neighbours.
        """
        return [self._run(rows) for rows in inputs]

    def _run(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        feeds: dict[str, np.ndarray] = {}
        for chunk in rows.split(self.settings.micro_batch):
            feeds[self._input] = chunk.float().numpy()
            outputs = dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))
            feeds[PRECEDING] = outputs.pop(FEATURES)
        return {name: torch.from_numpy(value) for name, value in outputs.items()}


def _session(model: Path, device: torch.device) -> onnxruntime.InferenceSession:
    """Open a graph on exactly this device, with PyTorch's number of threads and the numeric policy in force."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(
            "this archive runs on ONNX Runtime; pip install onnxruntime as requirements.txt has it"
        ) from error
    wanted = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(device.type)
    if wanted not in onnxruntime.get_available_providers():
        raise ValueError(
            f"onnxruntime {onnxruntime.__version__} as installed cannot run on device '{device}', only with "
            f"{', '.join(onnxruntime.get_available_providers())}; install onnxruntime-gpu for a CUDA device, or serve an "
            "archive of runtime 'eager'"
        )
    provider_options: dict[str, Any] = {}
    if device.type == "cuda":
        provider_options = {
            "device_id": device.index or 0,
            "use_tf32": int(torch.backends.cudnn.allow_tf32),
            # The default, EXHAUSTIVE, picks algorithms, and so last bits, by timing.
            "cudnn_conv_algo_search": "HEURISTIC",
        }
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    # Errors only: loading warns that preceding_features has a default.
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(model), options, providers=[(wanted, provider_options)])
    # When a provider's libraries do not load, onnxruntime goes on with the CPU.
    if session.get_providers()[0] != wanted:
        raise ValueError(f"onnxruntime could not start {wanted} for device '{device}'; its log says why")
    session.disable_fallback()
    return session
