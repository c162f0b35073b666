"""Serve exactly what you trained: package a trained classifier for TorchServe, and prove that it is served as evaluated."""

__version__ = "0.2.0"
