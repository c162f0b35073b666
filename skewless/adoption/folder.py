"""The adopted model's own folder: the archive's, with what the weights and their owner say of it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from skewless.core.definition import MODEL, Definition
from skewless.core.networks import spelt_out
from skewless.core.yaml_file import read_yaml
from skewless.errors import UsageError
from skewless.importers.formats import shape_of


def write_folder(
    archive: Path, folder: Path, weights: Path, classes: Sequence[str], threshold: float | None
) -> tuple[Definition, dict[str, Any]]:
    """Copy an archive's folder to `folder`, in place of what is there, and put into its model.yaml what the weights settle of the
    network, such as its depth, and what their owner says: the classes' order and names, and the threshold.

    Returns the new definition, and what was changed: parameter to its new value.
    Raises DefinitionError, ImportFileError; and UsageError for classes that would turn the meaning of the answer's yes/no field
    around.
    """
    given = Definition.read(archive)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(archive, folder, ignore=shutil.ignore_patterns("__pycache__"))
    content = read_yaml(folder / MODEL)
    ((network, shape),) = spelt_out(content["network"]).items()
    ((rule, decides),) = content["postprocess"].items()
    settled = {name: value for name, value in shape_of(weights, given).items() if shape.get(name) != value}
    said: dict[str, Any] = {}
    if classes and "classes" in decides and list(classes) != list(decides["classes"]):
        _check_not_turned(archive / MODEL, decides, classes)
        said["classes"] = list(classes)
    if threshold is not None and threshold != decides.get("threshold"):
        said["threshold"] = threshold
    if settled or said:
        content["network"] = {network: {**shape, **settled}}
        content["postprocess"] = {rule: {**decides, **said}}
        text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=110)
        told = ", ".join((*settled, *said))
        (folder / MODEL).write_text(
            f"# As in {archive.name}, but for {told}: the adopted weights'.\n{text}", encoding="utf-8"
        )
    return Definition.read(folder), {**settled, **said}


def _check_not_turned(model: Path, decides: Mapping[str, Any], classes: Sequence[str]) -> None:
    """Raise UsageError where the second class, which a field such as `talented` stands for, would become the first."""
    first, second = decides["classes"][0], decides["classes"][-1]
    field = decides.get("positive_field")
    if field and (classes[0] == second or classes[-1] == first):
        raise UsageError(
            f"--classes is {', '.join(classes)}, and {model} has {first}, {second}, where {field} is true for {second}: it would "
            f"become true for {classes[-1]}. Write classes: [{', '.join(classes)}] and another positive_field there, and adopt again"
        )
