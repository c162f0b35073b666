"""The stages that pipelines are made of, by their textbook names. Importing this package registers them all."""

from handler.stages import decode, image, picture, segment, spectrogram, voice, waveform  # noqa: F401
from handler.stages.stage import REGISTRY, InputError, Payload, PipelineError, Signal, Stage, Tolerance

__all__ = ["REGISTRY", "InputError", "Payload", "PipelineError", "Signal", "Stage", "Tolerance"]
