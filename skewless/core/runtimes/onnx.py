"""ONNX Runtime: the network as one graph, `model.onnx`. The package is imported when such an archive is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from skewless.core.runtimes.runtime import DEFAULTS, Runtime, RuntimeSettings

if TYPE_CHECKING:
    import onnxruntime


class OnnxRuntime(Runtime):
    """Runs a graph with the inputs `spectrograms (B, S, 3, 224, 224)` float32 and `segment_mask (B, S)` bool, and the
    optional `preceding_features (1, T, F)`: features of segments that an earlier run has encoded, from its output
    `segment_features`. The mask then covers them too: `(B, T + S)`.
    """

    name = "onnxruntime"
    precisions = ("fp32", "fp16", "int8")
    packages = ("onnxruntime",)

    def __init__(self, model: Path, device: torch.device, settings: RuntimeSettings = DEFAULTS):
        self.device, self.settings = device, settings
        self._session = _session(model, device)
        self._outputs = [output.name for output in self._session.get_outputs()]

    @classmethod
    def load(
        cls, archive_dir: Path, network: Mapping[str, Any], device: torch.device, settings: RuntimeSettings
    ) -> OnnxRuntime:
        """The archive's model.onnx, which holds the network and its weights.

        Raises ValueError when onnxruntime is not installed or cannot use the device.
        """
        return cls(archive_dir / "model.onnx", device, settings)

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """Recordings, each `(S_i, ...)` float32, to each one's outputs on the CPU.

        Every recording is a run of its own (B = 1), so its result cannot depend on its neighbours.
        """
        return [self._run(segments) for segments in inputs]

    def _run(self, segments: torch.Tensor) -> dict[str, torch.Tensor]:
        feeds: dict[str, np.ndarray] = {}
        encoded = 0
        for chunk in segments.split(self.settings.micro_batch):
            encoded += len(chunk)
            feeds |= {"spectrograms": chunk.unsqueeze(0).numpy(), "segment_mask": np.ones((1, encoded), dtype=bool)}
            outputs = dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))
            feeds["preceding_features"] = outputs.pop("segment_features")
        return {name: torch.from_numpy(value)[0] for name, value in outputs.items()}


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
