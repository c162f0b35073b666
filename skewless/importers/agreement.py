"""What a file says about its training, held against the definition that its weights are imported for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from skewless.core.definition import Definition
from skewless.core.networks import NETWORKS
from skewless.core.pipeline import Pipeline
from skewless.importers.errors import ImportFileError

# What the parameters of a pipeline and a network are called in the training scripts that write `config`.
_PIPELINE_NAMES = {
    "sample_rate": ("resample", "rate"),
    "segment_duration": ("segment", "duration_s"),
    "hop_length": ("segment", "hop_s"),
    "max_segments_per_file": ("segment", "max_segments"),
    "n_fft": ("mel", "n_fft"),
    "hop_length_fft": ("mel", "hop_length"),
    "n_mels": ("mel", "n_mels"),
    "f_min": ("mel", "f_min"),
    "f_max": ("mel", "f_max"),
}
_NETWORK_NAMES = ("attn_hidden", "dropout")


def check_config(config: Mapping[str, Any], definition: Definition) -> list[str]:
    """The settings of a training script that the definition's pipeline and network agree with; settings that neither of
    them has are left alone.

    Raises ImportFileError with both values for each setting that contradicts them.
    """
    agreed, contradictions = [], []
    stages = definition.pipeline.stages.values()
    for name, (stage, parameter) in _PIPELINE_NAMES.items():
        if name in config:
            ours = [getattr(s, parameter) for s in stages if s.name == stage]
            if ours and isinstance(config[name], int | float) and set(ours) == {config[name]}:
                agreed.append(name)
            else:
                has = f"{stage}.{parameter} is {', '.join(map(repr, ours))}" if ours else f"there is no stage '{stage}'"
                contradictions.append(f"  {name} is {config[name]!r} in the checkpoint, {has} in the pipeline")
    network, parameters = NETWORKS.split(definition.network)
    for name in _NETWORK_NAMES:
        if name in config and name in parameters:
            if isinstance(config[name], int | float) and parameters[name] == config[name]:
                agreed.append(name)
            else:
                has = f"{network}.{name} is {parameters[name]!r} in the archive's model.yaml"
                contradictions.append(f"  {name} is {config[name]!r} in the checkpoint, {has}")
    if contradictions:
        listed = "\n".join(contradictions)
        raise ImportFileError(
            f"the checkpoint's configuration contradicts what it is imported with:\n{listed}\n"
            "Choose the archive folder and the --pipeline that it was trained with."
        )
    return agreed


def check_stages(pipeline: Pipeline, stages: Sequence[Mapping[str, Any]]) -> None:
    """Raises ImportFileError unless the pipeline ends with `stages`: what the model did to its own input."""
    if not stages:
        return
    expected = Pipeline.from_dict({"name": pipeline.name, "stages": list(stages)}).to_dict()["stages"]
    if pipeline.to_dict()["stages"][-len(expected) :] != expected:
        listed = yaml.safe_dump(expected, sort_keys=False, default_flow_style=None, width=110)
        raise ImportFileError(
            f"the model does this to its input itself, and pipeline '{pipeline.name}' does not end with it; end it so:\n{listed}"
        )


_AS_KERAS_LOADS: dict[str, Any] = {"orientation": "stored", "background": []}


def _decoding(pipeline: Pipeline) -> dict[str, Any]:
    """The parameters of the stage that decodes a picture; empty where none does."""
    return next((stage.params() for stage in pipeline.stages.values() if stage.name == "decode_image"), {})


def loader_notes(pipeline: Pipeline, others: Mapping[str, Pipeline]) -> list[str]:
    """What the pipeline does to a picture and Keras' loaders do not; empty where it decodes as they do, or decodes none.

    others: pipelines at hand, by the names of their files; those that decode as the loaders do are named.
    """
    decode = _decoding(pipeline)
    differs = ["turns it upright (orientation: upright)"] * (decode.get("orientation") == "upright")
    differs += [f"blends transparent pixels with {decode.get('background')} (background)"] * bool(
        decode.get("background")
    )
    if not differs:
        return []
    alike = [name for name, other in others.items() if _decoding(other) | _AS_KERAS_LOADS == _decoding(other)]
    have = f"; {', '.join(alike)} {'have' if len(alike) > 1 else 'has'} both" if alike else ""
    return [
        "Keras' loaders, such as load_img and image_dataset_from_directory, leave a picture as it is stored and drop its alpha; "
        f"pipeline '{pipeline.name}' {' and '.join(differs)}. Turned and transparent pictures may get other labels than in training. "
        f"If training read its files by such a loader, set orientation: stored and background: [] in decode_image{have}"
    ]


def check_servable(pipeline: Pipeline) -> None:
    """Raises ImportFileError for a pipeline that cannot be served: one with stages that exist to compare with, such as
    another decoder, or with stages that lack the statistics of a training set."""
    if foreign := pipeline.comparison_only:
        raise ImportFileError(
            f"pipeline '{pipeline.name}' has the stage {', '.join(foreign)}, which exists to compare with and cannot be "
            "served; import with the nearest pipeline that can, and measure what that changes"
        )
    if pipeline.unfitted:
        raise ImportFileError(
            f"pipeline '{pipeline.name}' has the stage {', '.join(pipeline.unfitted)} without the statistics of the training "
            "set, and the file does not hold them; give scikit-learn's fitted StandardScaler as --scaler, or write them into a "
            "pipeline file and give it as --pipeline"
        )
