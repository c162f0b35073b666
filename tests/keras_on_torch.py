"""Keras on PyTorch, its settings in a temporary folder: without one it writes into the user's home when imported."""

import os
import tempfile

_home = tempfile.TemporaryDirectory(prefix="keras-")
os.environ["KERAS_BACKEND"] = "torch"
os.environ["KERAS_HOME"] = _home.name

import keras

__all__ = ["keras"]
