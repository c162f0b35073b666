"""The numeric policy: which device, which shortcuts. Set explicitly, because servers and libraries set it silently."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from threading import Thread
from typing import Any

import torch

from skewless.core.cores import available_cores

# How far a served probability may be from the evaluated one. Between processors and runtimes float32 differs by some
# 1e-6. A "reduced" tier is used only where somebody chose such a precision.
TOLERANCES = {"exact": 1e-4, "reduced": 0.02}
TIERS = {"fp32": "exact", "bf16": "reduced", "fp16": "reduced", "int8": "reduced"}


@dataclass(frozen=True)
class NumericPolicy:
    """What arithmetic may be rounded beyond float32.

    tf32: let GPUs round the inputs of float32 products to TF32's 10 bits. Importing TorchServe's base handler turns
        it on for matrix products, and PyTorch has it on for convolutions; off is the exact tier.
    threads: CPU threads of one worker. 0 keeps what PyTorch has, one per core or as OMP_NUM_THREADS says, but no more than
        `available_cores`: PyTorch counts the machine's cores, also where a container may use a part of their time.
    """

    tf32: bool = False
    threads: int = 0

    def apply(self) -> None:
        """Set the policy for this process. Call after every import that might set its own."""
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = self.tf32
        # Where the switches above say no, PyTorch goes on to ask torch.backends.fp32_precision, which others may have set.
        gpu: Any = torch.backends.cudnn
        cpu: Any = torch.backends.mkldnn
        for operator in (gpu.conv, gpu.rnn):
            operator.fp32_precision = "tf32" if self.tf32 else "ieee"
        for operator in (cpu.conv, cpu.rnn, cpu.matmul):
            operator.fp32_precision = "ieee"
        # Autotuning picks algorithms, and so last bits, by timing.
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        # Set in any case: until somebody does, MKL may use fewer than that, as it sees fit.
        torch.set_num_threads(self.threads or min(torch.get_num_threads(), available_cores()))

    def report(self, device: torch.device) -> dict[str, Any]:
        """The policy and what PyTorch says is in force now, as plain values."""
        return {
            **asdict(self),
            "device": str(device),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
            "autocast": torch.is_autocast_enabled(device.type),
            "num_threads": torch.get_num_threads(),
            "available_cores": available_cores(),
        }


def reader_threads(count: int) -> ThreadPoolExecutor:
    """`count` threads that read files through a pipeline. What torch computes in one of them, it computes with that one.

    If each shared its operations out to as many threads again, they would wait for one another longer than they compute.
    Some operations also give other last bits with one thread than with two, such as torch's bilinear resizing: so a file's
    numbers depend neither on how many threads a worker has, nor on what else it reads.
    """
    return ThreadPoolExecutor(count, "reader", _compute_alone, (torch.get_num_threads(),))


def _compute_alone(threads: int) -> None:
    # Asked first: a thread takes the common number over at its first use of torch, and would forget one set before.
    torch.get_num_threads()
    torch.set_num_threads(1)
    # That is this thread's own number, but also the one that threads start with from now on. Back to the others' number,
    # from a thread that ends at once: the number that it sets for itself is lost with it.
    restoring = Thread(target=torch.set_num_threads, args=(threads,))
    restoring.start()
    restoring.join()


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    if not values.numel():
        return True
    # Both are NaN where any value is. `isfinite` would take several times the memory of what it looks at.
    return all(map(math.isfinite, values.aminmax()))


def choose_device(gpu_id: int | None) -> torch.device:
    """The GPU that TorchServe assigned when CUDA is there, else Apple's MPS, else the CPU."""
    if gpu_id is not None and torch.cuda.is_available():
        return torch.device("cuda", gpu_id)
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")
