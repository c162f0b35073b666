"""The choice, written into a model's folder: only the values change; other lines and all comments stay as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from skewless.core.definition import MODEL
from skewless.core.files import atomic
from skewless.errors import UsageError
from skewless.packaging.build import TORCHSERVE


def rewritten(folder: Path, runtime: Mapping[str, Any], threads: int, workers: int) -> dict[Path, str]:
    """The text of model.yaml and of model-config.yaml with these values, by path. Nothing is written.

    runtime: `{name: {parameter: value}}`. Raises UsageError where a file's layout does not let a value be replaced alone.
    """
    model, server = folder / MODEL, folder / TORCHSERVE
    if not server.is_file():
        raise UsageError(f"there is no {server}, where the number of workers is written; `skewless new` writes one")
    changes: dict[Path, dict[tuple[str, ...], Any]] = {
        model: {("runtime",): dict(runtime), ("precision", "threads"): threads},
        server: {("minWorkers",): workers, ("maxWorkers",): workers},
    }
    texts = {}
    for path, values in changes.items():
        # Not read_text, which would change the ends of the lines.
        text = path.read_bytes().decode("utf-8")
        for keys, value in values.items():
            text = _with(text, keys, value, path)
        texts[path] = text
    return texts


def write(texts: Mapping[Path, str], tuning: Path, document: Mapping[str, Any]) -> None:
    """Write the files of `rewritten` and tuning.json. Each appears whole, and none before all of them are on the disk."""
    contents = {**texts, tuning: json.dumps(document, indent=2) + "\n"}
    with ExitStack() as stack:
        for path, text in contents.items():
            stack.enter_context(atomic(path)).write_bytes(text.encode("utf-8"))


def _with(text: str, keys: tuple[str, ...], value: Any, path: Path) -> str:
    """The text with the value at `keys` replaced, or added where there is none."""
    name = ".".join(keys)
    try:
        before, found = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {error}") from error
    if not isinstance(before, dict) or not isinstance(found, yaml.MappingNode):
        raise UsageError(f"{path} is {before!r:.60}, expected keys and values")
    wanted = _changed(before, keys, value)
    if wanted == before:
        return text
    top, *inner = keys
    node = _child(found, top)
    if node is None:
        changed = f"{text}{'' if text.endswith(chr(10)) or not text else chr(10)}{top}: {_flow(wanted[top])}\n"
    else:
        new: Any = wanted[top]
        if inner and isinstance(node, yaml.MappingNode) and (child := _child(node, inner[0])) is not None:
            node, new = child, value
        start, end = node.start_mark.index, node.end_mark.index
        old = text[start:end]
        if "#" in old:
            raise UsageError(
                f"{path}: a comment stands inside the value of {name}, and would be lost. Write the value in one line, the "
                f"comment above it, such as `{top}: {_flow(wanted[top])}`"
            )
        # The end of an indented block is where the next key starts.
        changed = text[:start] + _flow(new) + old[len(old.rstrip()) :] + text[end:]
    try:
        same = yaml.safe_load(changed) == wanted
    except yaml.YAMLError:
        same = False
    if not same:
        raise UsageError(
            f"{path}: {name} cannot be replaced without touching other lines; write it in one line of its own, "
            f"`{top}: {_flow(wanted[top])}`, and run this again"
        )
    return changed


def _changed(content: dict[str, Any], keys: tuple[str, ...], value: Any) -> dict[str, Any]:
    top, *inner = keys
    if not inner:
        return content | {top: value}
    return content | {top: (content.get(top) or {}) | {inner[0]: value}}


def _child(mapping: yaml.MappingNode, key: str) -> yaml.Node | None:
    return next((node for name, node in mapping.value if name.value == key), None)


def _flow(value: Any) -> str:
    """A value in one line."""
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000).removesuffix("...\n").strip()
