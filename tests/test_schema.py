"""`skewless schema`: every file of ours passes, and what the checks refuse for its name or its type fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from skewless import resources
from skewless.core.networks import NETWORKS
from skewless.core.postprocess import POSTPROCESSORS
from skewless.core.runtimes import RUNTIMES
from skewless.core.stages import STAGES
from skewless.scaffold import create
from skewless.schema import schemas
from tests.conftest import run_skewless

SCHEMAS = schemas()
KINDS = {"pipeline.yaml": "pipeline", "model.yaml": "model", "recipe.yaml": "recipe"}
FILES = [
    *((path, KINDS[path.name]) for name in KINDS for path in sorted(resources.ARCHIVES.glob(f"*/{name}"))),
    *((path, "pipeline") for path in sorted(resources.ARCHIVES.glob("*/variants/*.yaml"))),
]
COUGH = resources.ARCHIVES / "cough"


def complaints(kind: str, content: object) -> list[str]:
    validator = Draft202012Validator(SCHEMAS[kind])
    return [error.message for error in validator.iter_errors(content)]


@pytest.mark.parametrize("kind", SCHEMAS)
def test_they_are_schemas(kind: str):
    Draft202012Validator.check_schema(SCHEMAS[kind])


@pytest.mark.parametrize(
    ("path", "kind"), FILES, ids=lambda value: "/".join(value.parts[-3:]) if isinstance(value, Path) else ""
)
def test_our_files_pass(path: Path, kind: str):
    assert complaints(kind, yaml.safe_load(path.read_text())) == []


def test_a_new_model_passes(tmp_path: Path):
    folder = create("mine", tmp_path)
    for name, kind in KINDS.items():
        assert complaints(kind, yaml.safe_load((folder / name).read_text())) == []


@pytest.mark.parametrize(
    ("kind", "path", "old", "new"),
    [
        ("pipeline", "pipeline.yaml", "- downmix: {}", "- downmx: {}"),
        ("pipeline", "pipeline.yaml", "hop_s: 0.5", "hops: 0.5"),
        ("pipeline", "pipeline.yaml", "hop_s: 0.5, ", ""),
        ("pipeline", "pipeline.yaml", "rate: 16000", 'rate: "16000"'),
        ("pipeline", "pipeline.yaml", "tail: drop", "tail: cut"),
        ("pipeline", "pipeline.yaml", "stages:", "steps:"),
        ("pipeline", "pipeline.yaml", "- decode: {}", "- stages.txt:Decode: {}"),
        ("model", "model.yaml", "tf32: false", 'tf32: "false"'),
        ("model", "model.yaml", "attn_mil_resnet", "attn_mil"),
        ("model", "model.yaml", "attn_hidden: 128", "attn_hidden: 128.5"),
        ("model", "model.yaml", "mnn: {micro_batch: 4", "mnn: {precision: int9"),
        ("model", "model.yaml", "max_bytes", "maxBytes"),
        ("recipe", "recipe.yaml", "epochs: 5", "epoch: 5"),
        ("recipe", "recipe.yaml", "epochs: 5", "epochs: five"),
        ("recipe", "recipe.yaml", "kind: cough", "kind: cat"),
    ],
)
def test_a_typo_does_not_pass(kind: str, path: str, old: str, new: str):
    text = (COUGH / path).read_text()
    assert old in text
    assert complaints(kind, yaml.safe_load(text.replace(old, new, 1)))


@pytest.mark.parametrize(
    "network",
    [
        {"exported": "model.pt2"},
        {"exported": "model.pt2", "per": "recording"},
        {"exported": {"file": "model.pt2", "outputs": ["probability"]}},
        {"torchvision": "resnet18", "classes": 3},
        {"network.py:Mine": {"width": 3}},
    ],
    ids=str,
)
def test_networks_without_a_class_of_ours(network: dict):
    content = yaml.safe_load((COUGH / "model.yaml").read_text()) | {"network": network}
    assert complaints("model", content) == []
    assert complaints("model", content | {"network": {**network, "widht": 3}})


def test_every_name_is_described():
    stages = SCHEMAS["pipeline"]["properties"]["stages"]["items"]["properties"]
    model = SCHEMAS["model"]["properties"]
    for catalogue, properties in (
        (STAGES, stages),
        (NETWORKS, model["network"]["anyOf"][0]["properties"]),
        (RUNTIMES, model["runtime"]["properties"]),
        (POSTPROCESSORS, model["postprocess"]["properties"]),
    ):
        assert set(properties) == set(catalogue)
        assert all(each["description"] for each in properties.values())


def test_the_command_writes_and_prints_them(tmp_path: Path):
    run_skewless("schema", "--out", tmp_path)
    for name, schema in SCHEMAS.items():
        assert json.loads((tmp_path / f"{name}.schema.json").read_text()) == json.loads(json.dumps(schema))
    assert json.loads(run_skewless("schema").stdout) == json.loads(json.dumps(SCHEMAS))
