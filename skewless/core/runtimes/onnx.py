"""ONNX Runtime: the network as one graph, `model.onnx`. The package is imported when such an archive is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from skewless.core.networks import Network
from skewless.core.networks.with_stages import WithStages
from skewless.core.runtimes.runtime import DEFAULTS, Runtime, RuntimeSettings
from skewless.core.stages import Stage

if TYPE_CHECKING:
    import onnxruntime

MODEL = "model.onnx"
FEATURES, PRECEDING = "encoded_features", "preceding_features"


class OnnxRuntime(Runtime):
    """Runs a graph for one recording, as onnx_graph.py writes it for any network.

    In: the network's input by its own name, `(S, ...)` float32, and the optional `preceding_features (T, F)`: features of
    rows that an earlier run has encoded, from its output `encoded_features`. The other outputs are the network's, for all
    T + S rows.
    """

    name = "onnxruntime"
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
    def write(
        cls,
        network: Network,
        folder: Path,
        settings: RuntimeSettings,
        examples: Iterable[torch.Tensor],
        absorbed: Sequence[Stage] = (),
    ) -> list[Path]:
        """model.onnx, which holds the network, its weights and the absorbed stages, in the settings' precision."""
        try:
            from skewless.core.runtimes.onnx_graph import write_graph
        except ImportError as error:
            needed = ", ".join((*cls.packages, *cls.build_packages))
            raise ValueError(
                f"a graph for ONNX Runtime is written with {needed}: {error}; install them with pip"
            ) from error
        rows = (example.float() for example in examples)
        write_graph(WithStages(network, absorbed) if absorbed else network, folder / MODEL, settings.precision, rows)
        return [folder / MODEL]

    @classmethod
    def load(
        cls,
        archive_dir: Path,
        network: Mapping[str, Any],
        device: torch.device,
        settings: RuntimeSettings,
        absorbed: Sequence[Stage] = (),
    ) -> OnnxRuntime:
        """The archive's model.onnx, which holds the network and its weights.

        Raises ValueError when onnxruntime is not installed or cannot use the device.
        """
        return cls(archive_dir / MODEL, device, settings)

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
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
