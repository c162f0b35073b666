"""JSON Schemas of pipeline.yaml, model.yaml and recipe.yaml, from the same classes that check these files.

An editor that is given them completes names and parameters, and marks what is wrong. What a class checks beyond types, such
as that a rate is positive, is checked when a file is read, and not here.
"""

from __future__ import annotations

import inspect
from typing import Any

from skewless.core.catalogue import OWN, Catalogue, parameters_of
from skewless.core.networks import NETWORKS, SHORT
from skewless.core.networks.exported import ExportedFile
from skewless.core.numerics import NumericPolicy
from skewless.core.postprocess import POSTPROCESSORS
from skewless.core.request import Limits
from skewless.core.runtimes import RUNTIMES, RuntimeSettings
from skewless.core.stages import STAGES
from skewless.demos import KINDS
from skewless.training.config import Config

_DIALECT = "https://json-schema.org/draft/2020-12/schema"

Schema = dict[str, Any]


def schemas() -> dict[str, Schema]:
    """The schema of each kind of file: "pipeline", "model", "recipe"."""
    return {"pipeline": pipeline_schema(), "model": model_schema(), "recipe": recipe_schema()}


def pipeline_schema() -> Schema:
    """Of a pipeline.yaml, and of the variants."""
    properties = {
        "name": {"type": "string"},
        "code": {
            "description": "SHA-256 of the Python files that stages of the folder's own are in; written by the build.",
            "type": "object",
            "additionalProperties": {"type": "string"},
        },
        "stages": {"type": "array", "minItems": 1, "items": _one_of_ours(STAGES)},
    }
    return _file("A pipeline: named stages, from encoded bytes to the network's input.", properties, ("name", "stages"))


def model_schema() -> Schema:
    """Of a model.yaml."""
    network = _one_of_ours(NETWORKS, {"exported": ExportedFile})
    # `{exported: model.pt2, per: recording}` says the same as `{exported: {file: model.pt2, per: recording}}`.
    short = [_short(name, parameter, network["properties"][name]) for name, parameter in SHORT.items()]
    runtime = _one_of_ours(RUNTIMES, dict.fromkeys(RUNTIMES, RuntimeSettings), own=False)
    for name, settings in runtime["properties"].items():
        settings["properties"]["precision"]["enum"] = list(RUNTIMES[name].precisions)
    properties = {
        "network": {"anyOf": [network, *short]},
        "runtime": runtime,
        "fast_runtime": runtime | {"description": "What is asked before the runtime, for a decision-exact archive."},
        "postprocess": _one_of_ours(POSTPROCESSORS),
        "precision": parameters(NumericPolicy),
        "limits": parameters(Limits),
    }
    required = tuple(name for name in properties if name != "fast_runtime")
    return _file("A model: the network, what executes it, and what its outputs mean.", properties, required)


def recipe_schema() -> Schema:
    """Of a recipe.yaml."""
    corpus = {
        "description": "A synthetic corpus, for demonstration; settings beyond these are the kind's own.",
        "type": "object",
        "properties": {
            "kind": {"enum": list(KINDS)},
            "count": {"type": "integer", "minimum": 1},
            "seed": {"type": "integer", "minimum": 0},
        },
    }
    return _file("How a model is trained.", {"corpus": corpus, "training": parameters(Config)}, ())


def parameters(target: type) -> Schema:
    """A class's parameters, with its docstring as the description."""
    schema = parameters_of(target).model_json_schema()
    documented = inspect.getdoc(target)
    return schema | ({"description": documented} if documented else {})


def _file(description: str, properties: dict[str, Any], required: tuple[str, ...]) -> Schema:
    return {
        "$schema": _DIALECT,
        "description": description,
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def _one_of_ours(catalogue: Catalogue, instead: dict[str, type] | None = None, own: bool = True) -> Schema:
    """`{name: {parameters}}` with one name of the catalogue, or FILE.py:Class with any parameters.

    instead: classes that check the parameters of some names in place of the catalogue's.
    """
    classes = {name: (instead or {}).get(name) or catalogue[name] for name in catalogue}
    anything = {"type": "object", "description": f"A {catalogue.kind} in a Python file of the folder's own."}
    return {
        "type": "object",
        "properties": {name: parameters(target) for name, target in classes.items()},
        "patternProperties": {f"^{OWN.pattern.replace('?P<file>', '').replace('?P<name>', '')}$": anything}
        if own
        else {},
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }


def _short(name: str, parameter: str, full: Schema) -> Schema:
    """The definition that gives its main parameter as the value of its name, and the others beside it."""
    others = {key: value for key, value in full["properties"].items() if key != parameter}
    required = [key for key in full.get("required", ()) if key != parameter]
    return full | {"properties": {name: {"type": "string"}, **others}, "required": [name, *required]}
