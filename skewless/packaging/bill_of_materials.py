"""A bill of materials of an archive: CycloneDX 1.6 in JSON, with the model, its weights, its data and its libraries."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from packaging.utils import canonicalize_name

from skewless.packaging.model_card import figures


def bill_of_materials(metrics: Mapping[str, Any], reads: str) -> str:
    """The JSON document. The same metrics give the same bytes: it has no date, and its serial number is of its content.

    metrics: an archive's. reads: "audio" or "image", what the model takes.
    The format: https://cyclonedx.org/docs/1.6/json/
    """
    name, version = metrics["model_name"], metrics["model_version"]
    data = {
        "type": "data",
        "bom-ref": "dataset",
        "name": f"{name} data set",
        "hashes": [{"alg": "SHA-256", "content": metrics["dataset_sha256"]}],
        "data": [{"type": "dataset", "name": f"{name} data set"}],
    }
    weights = [
        {"type": "file", "bom-ref": f"file:{file}", "name": file, "hashes": [{"alg": "SHA-256", "content": digest}]}
        for file, digest in sorted(metrics["weights_sha256"].items())
    ]
    versions = metrics["library_versions"] | metrics["runtime"]["library_versions"]
    if fast := metrics.get("fast_runtime"):
        versions |= fast.get("library_versions", {})
    libraries = [_library(library, number) for library, number in sorted(versions.items())]
    components = [*weights, data, *libraries]
    model = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": name,
        "version": version,
        "modelCard": _card(metrics, reads),
        "properties": _properties(
            checkpoint_sha256=metrics["checkpoint_sha256"],
            git_commit=metrics["git_commit"],
            pipeline_fingerprint=metrics["pipeline_fingerprint"],
            precision=metrics["runtime"]["precision"],
            runtime=metrics["runtime"]["name"],
            threshold=f"{metrics['threshold']:g}",
            tier=metrics.get("tier", metrics["runtime"]["tier"]),
        ),
    }
    builder = {"type": "application", "name": "skewless", "version": metrics["skewless_version"]}
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"tools": {"components": [builder]}, "component": model},
        "components": components,
        "dependencies": [{"ref": "model", "dependsOn": [each["bom-ref"] for each in components]}],
    }
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(document, sort_keys=True))
    return json.dumps(document | {"serialNumber": serial.urn}, indent=2) + "\n"


def _library(name: str, version: str) -> dict[str, Any]:
    if name == "python":
        return {"type": "platform", "bom-ref": "python", "name": name, "version": version}
    purl = f"pkg:pypi/{canonicalize_name(name)}@{quote(version, safe='')}"
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def _card(metrics: Mapping[str, Any], reads: str) -> dict[str, Any]:
    evaluation = metrics["evaluation"]
    (network,) = metrics["network"]
    measured = [
        {"type": each.kind, "value": repr(each.value), "slice": f"{evaluation['split']} split"}
        for each in figures(evaluation)
    ]
    return {
        "bom-ref": "model-card",
        "modelParameters": {
            "approach": {"type": "supervised"},
            "task": f"{reads}-classification",
            "modelArchitecture": network,
            "datasets": [{"ref": "dataset"}],
            "inputs": [{"format": reads}],
            "outputs": [{"format": f"probabilities of {', '.join(evaluation['classes'])}"}],
        },
        "quantitativeAnalysis": {"performanceMetrics": measured},
    }


def _properties(**values: str) -> list[dict[str, str]]:
    return [{"name": f"skewless:{name}", "value": value} for name, value in values.items()]
