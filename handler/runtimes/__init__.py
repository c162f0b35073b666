"""What executes a network: `outputs = runtime(inputs)`, one dict of named tensors per recording."""

from handler.runtimes.eager import EagerRuntime

__all__ = ["EagerRuntime"]
