"""The post-processing that turns a network's outputs into an answer, by the names that a model.yaml uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from skewless.core.catalogue import Catalogue
from skewless.core.own_code import OwnCode
from skewless.core.postprocess.postprocessor import Part, Postprocessor

__all__ = ["POSTPROCESSORS", "Part", "Postprocessor", "build_postprocessor"]

POSTPROCESSORS: Catalogue[Postprocessor] = Catalogue(
    "postprocess",
    Postprocessor,
    {
        "bag_threshold": "skewless.core.postprocess.bag_threshold:BagThreshold",
        "class_probabilities": "skewless.core.postprocess.class_probabilities:ClassProbabilities",
        "label_threshold": "skewless.core.postprocess.label_threshold:LabelThreshold",
        "positive_windows_mean": "skewless.core.postprocess.windows_mean:PositiveWindowsMean",
        "seconds_vote": "skewless.core.postprocess.vote:SecondsVote",
        "top_windows_mean": "skewless.core.postprocess.windows_mean:TopWindowsMean",
        "windows_vote": "skewless.core.postprocess.vote:WindowsVote",
    },
)


def build_postprocessor(definition: Any, folder: str | Path | None = None) -> Postprocessor:
    """The postprocessor of `{name: {parameter: value}}`. folder: the archive's, for classes of its own code.

    Raises DefinitionError for an unknown one, or parameters that it does not take.
    """
    return POSTPROCESSORS.build(definition, None if folder is None else OwnCode(folder))
