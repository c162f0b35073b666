"""A recipe.yaml: how an archive's demonstration is made, from its corpus to its training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def read_recipe(path: Path, part: str) -> dict[str, Any]:
    """The parameters that a recipe.yaml gives for `part`, "corpus" or "training"; raises ValueError without any."""
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(recipe, dict) or not isinstance(recipe.get(part), dict):
        raise ValueError(f"{path} has no '{part}' with parameters below it")
    return recipe[part]
