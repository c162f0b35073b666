"""A hostile crowd and canaries against one TorchServe: `python -m benchmarks.soak`."""
