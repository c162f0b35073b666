"""Choosing runtime, micro-batch, workers and threads by measuring them on the machine at hand."""
