"""From a definition in a YAML file to an object: `name: {parameter: value}` chooses a class and its arguments.

A name is one of ours, such as `mel`, or `FILE.py:Class` for a class in a Python file of the archive's own folder.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib import import_module
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from skewless.core.errors import DefinitionError
from skewless.core.own_code import OwnCode

T = TypeVar("T")

OWN = re.compile(r"(?P<file>[\w./-]+\.py):(?P<name>[A-Za-z_]\w*)")


class Catalogue(Generic[T]):
    """The classes of one kind, by the names that definitions use. A class is imported when it is first asked for, so that
    an archive needs only the packages of the stages that it uses.

    kind: what the classes are, for messages: "stage", "network". base: the class that they all extend.
    names: name to "module:Class". `catalogue["mel"]` is the class, and iterating gives the names in order.
    """

    # Not type[T], which to a type checker is a class that can be instantiated: most bases are abstract.
    def __init__(self, kind: str, base: type, names: Mapping[str, str]):
        self.kind, self.base = kind, base
        self._names = dict(sorted(names.items()))

    def __getitem__(self, name: str) -> type[T]:
        module, _, attribute = self._names[name].partition(":")
        return getattr(import_module(module), attribute)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def find(self, name: Any, code: OwnCode | None = None) -> type[T]:
        """The class of a name; raises DefinitionError for a name that is neither ours nor in the folder's own code."""
        if name in self._names:
            return self[name]
        own = OWN.fullmatch(name) if isinstance(name, str) else None
        if own is None:
            raise DefinitionError(
                f"unknown {self.kind} '{name}'; there are: {', '.join(self)}; a class of your own is FILE.py:Class"
            )
        if code is None:
            raise DefinitionError(
                f"{self.kind} '{name}' is in a file of the archive's folder, which was not given; give the archive's folder"
            )
        found: type[T] = code.load(own["file"], own["name"], self.base, self.kind)
        # In traces and reports its own name stands beside ours.
        if (called := getattr(found, "name", "")) in self._names:
            raise DefinitionError(
                f"{self.kind} '{name}' calls itself '{called}', which is the name of one of ours; choose another name"
            )
        return found

    def build(self, definition: Any, code: OwnCode | None = None) -> T:
        """The object of `{name: {parameter: value}}`, its parameters checked against the class's annotations.

        Raises DefinitionError for a malformed definition, an unknown name, and unknown, missing or wrong parameters.
        """
        name, params = self.split(definition)
        found = self.find(name, code)
        arguments = check(found, params, f"{self.kind} '{name}'")
        try:
            return found(**arguments)
        except DefinitionError:
            raise
        except ValueError as error:
            raise DefinitionError(f"{self.kind} '{name}': {error}") from error

    def split(self, definition: Any) -> tuple[str, Mapping[str, Any]]:
        """The name and the parameters of `{name: {parameter: value}}`; raises DefinitionError for anything else."""
        if not isinstance(definition, Mapping) or len(definition) != 1:
            raise DefinitionError(f"{self.kind} is {definition!r}, expected one 'name: {{parameters}}'")
        ((name, params),) = definition.items()
        if not isinstance(params, Mapping):
            raise DefinitionError(
                f"{self.kind} '{name}': parameters are {params!r}, expected a mapping (use {{}} for none)"
            )
        return name, params


@lru_cache(maxsize=256)
def parameters_of(target: type) -> type[BaseModel]:
    """A pydantic model of a class's constructor arguments: strict, nothing unknown, only finite numbers.

    The annotations are the rules: "50" in quotes is refused where a number is meant, and so is 1 where true is meant; an
    int is accepted for a float.
    """
    fields: dict[str, Any] = {}
    try:
        signature = inspect.signature(target, eval_str=True)
    except (NameError, TypeError, ValueError) as error:
        raise DefinitionError(f"{target.__name__}: its parameters' annotations cannot be read: {error}") from error
    for name, parameter in signature.parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise DefinitionError(f"{target.__name__} takes *{name}: name every parameter, with its type")
        annotation = Any if parameter.annotation is parameter.empty else parameter.annotation
        fields[name] = (annotation, ... if parameter.default is parameter.empty else parameter.default)
    config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    return create_model(target.__name__, __config__=config, **fields)


def check(target: type, params: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`params` as the constructor's types: 50 becomes 50.0 for a float, a list becomes a tuple for a tuple.

    where: the start of the message. Raises DefinitionError naming the parameter, its value and what was expected.
    """
    model = parameters_of(target)
    unknown = [str(name) for name in params if name not in model.model_fields]
    if unknown:
        known = ", ".join(model.model_fields) or "none"
        raise DefinitionError(f"{where}: unknown parameter {', '.join(sorted(unknown))}; it takes: {known}")
    try:
        # By way of JSON: there a list is what a tuple is written as, and still nothing else is converted.
        checked = model.model_validate_json(json.dumps(dict(params)))
    except ValidationError as error:
        raise DefinitionError(f"{where}: {explain(error)}") from error
    except (TypeError, ValueError, RecursionError) as error:
        # Not a JSON value: a date, a number of thousands of digits, a list inside itself.
        raise DefinitionError(f"{where}: {dict(params)!r:.200} cannot be written in a definition: {error}") from error
    return {name: _plain(getattr(checked, name)) for name in params}


def explain(error: ValidationError) -> str:
    """pydantic's findings in one line: each parameter with its value and what was expected."""
    missing = [_path(e["loc"]) for e in error.errors() if e["type"] == "missing"]
    found = [f"missing parameter {', '.join(missing)}"] if missing else []
    for each in error.errors():
        if each["type"] == "extra_forbidden":
            found.append(f"unknown parameter {_path(each['loc'])}")
        elif each["type"] != "missing":
            expected = re.sub(r"^(Input should be|Value error,) ", "", each["msg"]).replace("a valid ", "a ")
            found.append(f"{_path(each['loc'])} is {each['input']!r}, expected {_KINDS.get(each['type'], expected)}")
    return "; ".join(found)


_KINDS = {
    "int_type": "a whole number (int)",
    "float_type": "a number (float); YAML reads 1e-3, without a point, as text",
    "bool_type": "true or false",
    "string_type": "text (str)",
    "tuple_type": "a list",
    "list_type": "a list",
    "finite_number": "a finite number",
}


def _path(location: tuple[int | str, ...]) -> str:
    first, *rest = location or ("it",)
    return str(first) + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in rest)


def _plain(value: Any) -> Any:
    # -0.0 and 0.0 are one number and must be one fingerprint.
    if isinstance(value, float):
        return value + 0.0
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value
