"""OpenVINO, on the CPU: the same ONNX graph as for ONNX Runtime. The package is imported when such an archive is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch

from skewless.core.networks import Network
from skewless.core.runtimes.graph import GraphRuntime
from skewless.core.runtimes.onnx import FEATURES, MODEL, PRECEDING
from skewless.core.runtimes.runtime import DEFAULTS, RuntimeSettings


class OpenVinoRuntime(GraphRuntime):
    """Runs the graph that onnx_graph.py writes, with `preceding_features` as an input that is always given.

    In int8 the convolutions that are not quantised, and the head, are computed in bfloat16 where the processor has it, else
    in float32. So the numbers differ between processors, as those of int8 do anyway.
    """

    name = "openvino"
    title = "OpenVINO"
    devices = ("cpu",)
    precisions = ("fp32", "int8")
    calibrated = ("int8",)
    packages = ("openvino",)
    build_packages = ("onnx", "onnxruntime", "onnxscript")

    def __init__(self, model: Path, settings: RuntimeSettings = DEFAULTS):
        self.device, self.settings = torch.device("cpu"), settings
        try:
            import openvino
        except ImportError as error:
            raise ValueError("this archive runs on OpenVINO; pip install 'skewless[openvino]'") from error
        options = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "bf16" if settings.precision == "int8" else "f32",
        }
        core = openvino.Core()
        self._compiled = core.compile_model(core.read_model(str(model)), "CPU", options)
        inputs = {value.any_name: value for value in self._compiled.inputs}
        self._width = inputs.pop(PRECEDING).partial_shape[1].get_length()
        (self._input,) = inputs

    @classmethod
    def write_graphs(
        cls, network: Network, folder: Path, settings: RuntimeSettings, rows: Iterator[torch.Tensor]
    ) -> list[Path]:
        """model.onnx, in the settings' precision."""
        import openvino  # noqa: F401

        from skewless.core.runtimes.onnx_graph import check_numbers, require_preceding, write_graph

        first, path = list(islice(rows, 1)), folder / MODEL
        write_graph(network, path, settings.precision, chain(first, rows))
        require_preceding(path)
        # A reduced precision gives other numbers; what it may differ by, the build measures.
        if settings.precision == "fp32":
            check_numbers(cls(path, RuntimeSettings(micro_batch=2)), network, *first)
        return [path]

    @classmethod
    def open(cls, folder: Path, device: torch.device, settings: RuntimeSettings) -> OpenVinoRuntime:
        """The archive's model.onnx. Raises ValueError when OpenVINO is not installed."""
        return cls(folder / MODEL, settings)

    def compute(self, inputs: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """Recordings, each `(S_i, ...)` float32 or float16, to each one's outputs on the CPU.

        Every recording is a run of its own, so its result cannot depend on its neighbours.
        """
        return [self._run(rows) for rows in inputs]

    def _run(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        feeds: dict[str, np.ndarray] = {PRECEDING: np.zeros((0, self._width), dtype=np.float32)}
        for chunk in rows.split(self.settings.micro_batch):
            feeds[self._input] = chunk.float().numpy()
            # OpenVINO's results are views that the next run overwrites.
            outputs = {output.any_name: value.copy() for output, value in self._compiled(feeds).items()}
            feeds[PRECEDING] = outputs.pop(FEATURES)
        return {name: torch.from_numpy(value) for name, value in outputs.items()}
