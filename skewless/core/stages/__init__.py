"""The stages that pipelines are made of, by their textbook names. Each module is imported when one of its stages is asked for."""

from skewless.core.catalogue import Catalogue
from skewless.core.stages.stage import InputError, InputLimits, Payload, PipelineError, Signal, Stage, Tolerance

__all__ = ["STAGES", "InputError", "InputLimits", "Payload", "PipelineError", "Signal", "Stage", "Tolerance"]

_MODULES = {
    "decode": {"decode": "Decode"},
    "waveform": {
        "peak_normalize": "PeakNormalize",
        "downmix": "Downmix",
        "resample": "Resample",
        "highpass": "Highpass",
    },
    "pcm": {"pcm": "Pcm"},
    "segment": {"segment": "Segment"},
    "spectrogram": {
        "mel": "Mel",
        "decibel": "Decibel",
        "pad_frames": "PadFrames",
        "scale": "Scale",
        "letterbox": "Letterbox",
    },
    "voice": {
        "remove_silence": "RemoveSilence",
        "voice_features": "VoiceFeatures",
        "standard_scaler": "StandardScaler",
    },
    "image": {"decode_image": "DecodeImage", "resize": "Resize", "caffe_preprocess": "CaffePreprocess"},
    "network_input": {"cast": "Cast", "replicate": "Replicate", "standardize": "Standardize"},
}

STAGES: Catalogue[Stage] = Catalogue(
    "stage",
    Stage,
    {
        name: f"skewless.core.stages.{module}:{attribute}"
        for module, classes in _MODULES.items()
        for name, attribute in classes.items()
    },
)
