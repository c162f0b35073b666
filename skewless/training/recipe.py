"""A recipe.yaml: how an archive's demonstration is made, from its corpus to its training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from skewless.core.errors import DefinitionError
from skewless.core.yaml_file import read_yaml

PARTS = ("corpus", "training")


def read_recipe(path: Path, part: str) -> dict[str, Any]:
    """The parameters that a recipe.yaml gives for `part`, one of PARTS.

    Raises ValueError for a file that is not YAML, has other parts, or has no parameters for this one.
    """
    try:
        recipe = read_yaml(path)
    except DefinitionError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} is {recipe!r:.60}, expected the parts {' and '.join(PARTS)}")
    if unknown := [str(key) for key in recipe if key not in PARTS]:
        raise ValueError(f"{path} has the unknown part {', '.join(unknown)}; it takes: {', '.join(PARTS)}")
    if not isinstance(recipe.get(part), dict):
        raise ValueError(f"{path} has no '{part}' with parameters below it")
    return recipe[part]
