"""Python files of an archive's own folder: stages, networks, post-processing and losses that their owner wrote."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import re
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from skewless.core.errors import DefinitionError
from skewless.core.git_lfs import pointer

T = TypeVar("T")

# Modules of own code are in packages that start so, one for each folder.
_PACKAGE = "skewless_own_"

# A shape in a docstring: `(S, N)`, `(3, 224, 224)`, `(N,)` or `()`.
_SHAPE = re.compile(r"\(\)|\([\w.+*/ -]+,[^()]*\)")


class OwnCodeError(DefinitionError):
    """A file of own code that cannot be used; the message names the file and what to do."""


class OwnCode:
    """The Python files of one folder, by their names relative to it, such as "stages.py".

    Files are imported when a definition names a class in them, and not otherwise. They may import one another relatively
    (`from .filters import window`), and import anything that is installed.

    Example: with `stages.py` in the folder, `- stages.py:PreEmphasis: {coefficient: 0.97}` in pipeline.yaml.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).resolve()

    def load(self, file: str, name: str, base: type[T], kind: str) -> type[T]:
        """The class `name` of `file`, which has to extend `base`.

        Raises OwnCodeError for a file that is not in the folder or does not import, and for a class that is not there, is
        of another kind, or has no docstring that gives shapes.
        """
        module = self._import(file)
        found = getattr(module, name, None)
        if not isinstance(found, type):
            classes = [n for n, value in vars(module).items() if isinstance(value, type) and _defined_in(value, module)]
            raise OwnCodeError(f"{file} has no class {name}; it has: {', '.join(classes) or 'none'}")
        if not issubclass(found, base):
            raise OwnCodeError(f"{file}:{name} is no {kind}: it has to extend {base.__module__}.{base.__qualname__}")
        if not _SHAPE.search(found.__doc__ or ""):
            raise OwnCodeError(
                f"{file}:{name} has no docstring that gives the shapes it takes and gives; write it, such as "
                '"""Pre-emphasis: `(1, N)` float32 to `(1, N)`."""'
            )
        return found

    def digests(self, files: Iterable[str]) -> dict[str, str]:
        """SHA-256 of these files and of those of the folder that they import, at once or later, by name, sorted."""
        names: set[str] = set()
        for file in files:
            self._collect(self._path(file), names)
        return {name: hashlib.sha256((self.folder / name).read_bytes()).hexdigest() for name in sorted(names)}

    def _path(self, file: str) -> Path:
        path = (self.folder / file).resolve()
        if not path.is_relative_to(self.folder):
            raise OwnCodeError(f"{file} is outside of the folder {self.folder.name}; copy it into the folder")
        if not path.is_file():
            raise OwnCodeError(f"there is no {file} in the folder {self.folder.name}")
        return path

    def _collect(self, path: Path, names: set[str]) -> None:
        name = path.relative_to(self.folder).as_posix()
        if name in names:
            return
        names.add(name)
        try:
            source = path.read_bytes()
            if lfs := pointer(source):
                raise OwnCodeError(f"{name}: {lfs}")
            parsed = ast.parse(source)
        except SyntaxError as error:
            raise OwnCodeError(f"{name} does not import: SyntaxError: {error}") from error
        for node in ast.walk(parsed):
            if isinstance(node, ast.ImportFrom) and node.level:
                start = path.parents[node.level - 1]
                target = start.joinpath(*(node.module or "").split(".")) if node.module else start
                # `from . import a` and `from .a import b`: either may be a file.
                candidates = [target.with_suffix(".py"), target / "__init__.py"]
                candidates += [target / f"{alias.name}.py" for alias in node.names]
                for each in candidates:
                    if each.is_file() and each.is_relative_to(self.folder):
                        self._collect(each, names)

    def _import(self, file: str) -> types.ModuleType:
        path = self._path(file)
        relative = path.relative_to(self.folder)
        if not all(part.isidentifier() for part in relative.with_suffix("").parts):
            raise OwnCodeError(f"{file} cannot be imported by this name; use letters, digits and underscores")
        package = self._package(file)
        try:
            module = importlib.import_module(".".join((package, *relative.with_suffix("").parts)))
        except Exception as error:  # whatever the file's own code raises
            raise OwnCodeError(
                f"{file} does not import: {type(error).__name__}: {error}. Files of one folder import one another with a dot "
                "(from .filters import window)"
            ) from error
        return module

    def _package(self, file: str) -> str:
        """A package of its own for a file as it is now, with what it imports: two folders, or two states of one, never share
        a module."""
        state = repr((str(self.folder), self.digests([file])))
        name = f"{_PACKAGE}{hashlib.sha256(state.encode()).hexdigest()[:16]}"
        if name not in sys.modules:
            package = types.ModuleType(name)
            package.__path__ = [str(self.folder)]
            sys.modules[name] = package
        return name


def reference(cls: type) -> str | None:
    """How a definition names a class of own code, "stages.py:PreEmphasis"; None for one of ours."""
    if not cls.__module__.startswith(_PACKAGE):
        return None
    return f"{cls.__module__.partition('.')[2].replace('.', '/')}.py:{cls.__name__}"


def file_of(definition_name: str) -> str | None:
    """The file in "stages.py:PreEmphasis"; None for the name of one of ours."""
    file, colon, _ = str(definition_name).partition(":")
    return file if colon else None


def _defined_in(value: type, module: types.ModuleType) -> bool:
    return value.__module__ == module.__name__
