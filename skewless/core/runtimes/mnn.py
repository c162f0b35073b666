"""MNN, on the CPU: convolutions by Winograd's algorithm, which needs fewer multiplications than the direct sum.

S. Winograd, "Arithmetic Complexity of Computations", 1980; for networks A. Lavin, S. Gray, "Fast Algorithms for Convolutional
Neural Networks", CVPR 2016. The package is imported when such an archive is loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from skewless.core.networks import Network
from skewless.core.runtimes.graph import GraphRuntime
from skewless.core.runtimes.runtime import DEFAULTS, RuntimeSettings

_SIDE_BY_SIDE = 4
ENCODER, HEAD = "encoder.mnn", "head.mnn"


class MnnRuntime(GraphRuntime):
    """Two graphs: the rows' features, a few rows at a time, and the head over all of a recording's features.

    A recording's rows are cut into micro-batches by themselves, never beside another's: in MNN the last bits of a row depend
    on its place in the batch, and so they are the same in whatever company a recording comes. Micro-batches are computed side
    by side, each by one thread: two threads that share one have to wait for each other at every layer, and here they do not.
    """

    name = "mnn"
    title = "MNN"
    devices = ("cpu",)
    packages = ("MNN",)
    build_packages = ("onnx", "onnxscript")

    def __init__(self, encoder: Path, head: Path, settings: RuntimeSettings = DEFAULTS):
        self.device, self.settings = torch.device("cpu"), settings
        threads = torch.get_num_threads()
        # Each has the weights in memory once more, so that of many threads several share a micro-batch.
        self._side_by_side = min(threads, _SIDE_BY_SIDE)
        # The head is a few small products: more threads would only wait for each other.
        self._head = _Graph(head, 1)
        self._encoders: SimpleQueue[_Graph] = SimpleQueue()
        for _ in range(self._side_by_side):
            self._encoders.put(_Graph(encoder, threads // self._side_by_side))
        self._threads = ThreadPoolExecutor(self._side_by_side, thread_name_prefix="mnn")

    @property
    def rows_at_once(self) -> int:
        """A micro-batch for each that is computed side by side."""
        return self.settings.micro_batch * self._side_by_side

    @classmethod
    def write_graphs(
        cls, network: Network, folder: Path, settings: RuntimeSettings, rows: Iterator[torch.Tensor]
    ) -> list[Path]:
        """encoder.mnn and head.mnn."""
        from skewless.core.runtimes.mnn_graph import write_graphs

        encoder, head = folder / ENCODER, folder / HEAD
        write_graphs(network, encoder, head, rows)
        return [encoder, head]

    @classmethod
    def open(cls, folder: Path, device: torch.device, settings: RuntimeSettings) -> MnnRuntime:
        """The archive's two graphs. Raises ValueError when MNN is not installed, or cannot open them."""
        return cls(folder / ENCODER, folder / HEAD, settings)

    def compute(self, inputs: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """Recordings, each `(S_i, ...)` float32 or float16, to each one's outputs on the CPU.

        What a recording gets does not depend on the others, to the last bit.
        """
        chunks = [rows.split(self.settings.micro_batch) for rows in inputs]
        # All at once, so that no thread waits at the end of a recording.
        features = self._threads.map(self._encode, (chunk for of_one in chunks for chunk in of_one))
        return [self._answer([next(features) for _ in of_one]) for of_one in chunks]

    def _encode(self, chunk: torch.Tensor) -> np.ndarray:
        graph = self._encoders.get()
        try:
            (features,) = graph(chunk.float().numpy()).values()
        finally:
            self._encoders.put(graph)
        return features

    def _answer(self, features: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        outputs = self._head(np.concatenate(features))
        return {name: torch.from_numpy(value) for name, value in outputs.items()}


class _Graph:
    """One graph, with one input of any number of rows."""

    def __init__(self, path: Path, threads: int):
        with without_printing():
            try:
                import MNN
            except ImportError as error:
                raise ValueError("this archive runs on MNN; pip install MNN as requirements.txt has it") from error
            self._mnn = MNN
            try:
                self._interpreter = MNN.Interpreter(str(path))
                # "high": float32 throughout.
                self._session = self._interpreter.createSession(
                    {"backend": "CPU", "precision": "high", "numThread": threads}
                )
            except Exception as error:  # MNN raises no narrower kind
                raise ValueError(
                    f"MNN {MNN.version()} cannot open {path.name}: {error}; build the archive again"
                ) from error
        self._input = self._interpreter.getSessionInput(self._session)
        self._row = tuple(self._input.getShape())[1:]
        self._shape: tuple[int, ...] = ()

    def __call__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """`(N, ...)` float32 to the outputs by name. Raises ValueError for rows of another shape than the graph's, and
        RuntimeError where MNN cannot run it, such as for too little memory."""
        # MNN would end the process.
        if rows.shape[1:] != self._row:
            raise ValueError(f"the graph takes rows {self._row}, got {rows.shape[1:]}")
        if rows.shape != self._shape:
            self._shape = ()  # until the session has it
            self._interpreter.resizeTensor(self._input, rows.shape)
            self._interpreter.resizeSession(self._session)
            self._shape = rows.shape
        # MNN copies from where the rows are: it has to be one piece of memory, alive until then.
        rows = np.ascontiguousarray(rows)
        self._input.copyFrom(self._tensor(rows))
        # MNN raises nothing; its outputs would be those of an earlier run.
        if code := self._interpreter.runSession(self._session):
            self._shape = ()
            raise RuntimeError(f"MNN could not run the graph on {len(rows)} rows (its error {code})")
        outputs = self._interpreter.getSessionOutputAll(self._session)
        return {name: self._copied(output) for name, output in outputs.items()}

    def _copied(self, output: Any) -> np.ndarray:
        shape = tuple(output.getShape())
        host = self._tensor(np.empty(shape, dtype=np.float32))
        output.copyToHostTensor(host)
        return np.array(host.getNumpyData(), dtype=np.float32).reshape(shape)

    def _tensor(self, values: np.ndarray) -> Any:
        mnn = self._mnn
        return mnn.Tensor(values.shape, mnn.Halide_Type_Float, values, mnn.Tensor_DimensionType_Caffe)


@contextlib.contextmanager
def without_printing() -> Iterator[None]:
    """MNN says what it finds of the processor on the standard output, where a command's JSON goes."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        # What C has not written yet was printed in here.
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
