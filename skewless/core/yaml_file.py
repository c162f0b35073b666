"""YAML from a file that may come from anybody: plain values, with an end to what they may grow into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from skewless.core.errors import DefinitionError
from skewless.core.git_lfs import pointer

MAX_BYTES = 2**20
MAX_VALUES = 2**17
_LONGEST_NUMBER = 100  # characters; Python refuses to write one of thousands of digits into a message
# What PyYAML raises beside its own errors: for a date such as 2001-99-99, for `!!bool perhaps`, for brackets without end.
_DAMAGE = (ValueError, LookupError, AttributeError, TypeError, OverflowError, RecursionError)


def read_yaml(path: Path) -> Any:
    """The file's one document in plain types.

    Raises DefinitionError, without the file's name, for text that is not UTF-8 or not YAML, for more than MAX_BYTES, and for
    more than MAX_VALUES values once every alias (`*name`) is written out: ten lines of them can stand for billions.
    """
    with path.open("rb") as file:
        return parse_yaml(file.read(MAX_BYTES + 1))


def parse_yaml(data: bytes) -> Any:
    """As `read_yaml`, of a file's bytes."""
    if lfs := pointer(data):
        raise DefinitionError(lfs)
    if len(data) > MAX_BYTES:
        raise DefinitionError(f"it has more than {MAX_BYTES:,} bytes, which no definition needs")
    try:
        loader = yaml.SafeLoader(data.decode("utf-8"))
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if _values(node, {}) > MAX_VALUES:
                raise DefinitionError(f"it stands for more than {MAX_VALUES:,} values; write out what its aliases mean")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except DefinitionError:
        raise
    except (yaml.YAMLError, *_DAMAGE) as error:
        raise DefinitionError(f"it is not YAML: {str(error) or type(error).__name__}") from error


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """The values below a node, every alias written out; more than MAX_VALUES for a node that is inside itself."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag == "tag:yaml.org,2002:int" and len(node.value) > _LONGEST_NUMBER:
            raise DefinitionError(f"it has a number of {len(node.value):,} digits, expected at most {_LONGEST_NUMBER}")
        return 1
    if id(node) not in known:
        known[id(node)] = MAX_VALUES + 1  # until it is counted: met again inside itself, it has no end
        pairs = node.value if isinstance(node, yaml.MappingNode) else [(each,) for each in node.value]
        known[id(node)] = 1 + sum(_values(each, known) for pair in pairs for each in pair)
    return known[id(node)]
