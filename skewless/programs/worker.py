"""The process in which a user's function runs under instrumentation.

It is a process of its own so that two programs cannot reach each other: their modules may have the same names, and one of them may set
torch's threads, its default type, or a seed. Requests and answers are pickles on standard input and output; what the program
prints goes to standard error.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import os
import pickle
import random
import sys
import time
import traceback
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, BinaryIO

import numpy as np

from skewless.programs.recorder import Recorder, Substitutes
from skewless.programs.rewrite import HOOKS, Rewriter
from skewless.programs.trace import Site, Trace

# Folders of the user's project that hold other people's code.
_FOREIGN = {"site-packages", "dist-packages", "node_modules", "__pycache__"}


@dataclass(frozen=True)
class Function:
    """A function of the user's. module: its file; name: "function" or "Class.method"; code: folders whose modules are the user's."""

    module: Path
    name: str
    code: tuple[Path, ...]


@dataclass(frozen=True)
class Run:
    """One run. plain: without instrumentation, for the time it takes; the answer then has no events."""

    file: Path
    substitutes: Substitutes
    memory: int
    plain: bool = False


class ProgramError(ValueError):
    """The user's program cannot be loaded, or raised; the message is for the user."""


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles the rewritten source, and neither reads nor writes a compiled copy."""

    def __init__(self, name: str, path: str, program: Program):
        super().__init__(name, path)
        self._program = program

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        source = importlib.util.decode_source(self.get_data(path))
        return self._program.compile(source, path)


class Program(importlib.abc.MetaPathFinder):
    """A user's function and the modules it imports from the user's folders."""

    def __init__(self, function: Function):
        self.function = function
        self._sites: list[Site] = []
        self._files: dict[str, tuple[CodeType, str]] = {}
        self._rewriting = True
        root, name = _module_name(function.module)
        self._name, self._root = name, root
        sys.path.insert(0, str(root))
        sys.meta_path.insert(0, self)

    def close(self) -> None:
        """Make room for another program in this process."""
        self._forget()
        sys.meta_path.remove(self)
        sys.path.remove(str(self._root))

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.origin is None or not self._is_own(Path(spec.origin)):
            return None
        spec.loader = _Loader(fullname, spec.origin, self)
        return spec

    def _is_own(self, path: Path) -> bool:
        if path.suffix != ".py":
            return False
        for folder in self.function.code:
            if path.is_relative_to(folder):
                between = [folder, *(folder / p for p in path.relative_to(folder).parents)]
                return not (_FOREIGN & set(path.relative_to(folder).parts)) and not any(
                    (each / "pyvenv.cfg").exists() for each in between
                )
        return False

    def compile(self, source: str, path: str) -> CodeType:
        """The rewritten module; the same file keeps its places from run to run."""
        if not self._rewriting:
            return compile(source, path, "exec", dont_inherit=True)
        if path not in self._files or self._files[path][1] != source:
            tree = ast.parse(source, path)
            shown = self._shown(Path(path))
            rewritten = Rewriter(source, shown, self._sites).rewrite(tree)
            self._files[path] = compile(rewritten, path, "exec", dont_inherit=True), source
        return self._files[path][0]

    def _shown(self, path: Path) -> str:
        folder = next(f for f in self.function.code if path.is_relative_to(f))
        return path.relative_to(folder).as_posix()

    def run(self, run: Run) -> Trace:
        """Load the program afresh, so that each run starts as the first one did, and call the function with the file."""
        self._rewriting = not run.plain
        self._forget()
        recorder = Recorder(self._sites, self._is_own_module, run.substitutes, run.memory, str(run.file))
        setattr(builtins, HOOKS, recorder)
        _seed()
        unseeded = "torch" not in sys.modules
        function = self._load()
        if unseeded and "torch" in sys.modules:
            # It may have drawn numbers of torch's already, which begins with a random seed.
            return self.run(run)
        given = _argument(function, run.file)
        began = time.perf_counter()
        try:
            outputs = function(given)
        except (Exception, SystemExit) as error:
            raise ProgramError(f"{self.function.name} raised on {run.file.name}: {_told(error, self)}") from error
        seconds = time.perf_counter() - began
        if unseeded and "torch" in sys.modules:
            return self.run(run)
        if run.plain:
            recorder = Recorder(self._sites, self._is_own_module, {}, run.memory)
        sources = {self._shown(Path(path)): source for path, (_, source) in self._files.items()}
        label = f"{self.function.module.name}:{self.function.name}"
        return recorder.trace(label, run.file.name, outputs, seconds, sources)

    def _is_own_module(self, name: str) -> bool:
        module = sys.modules.get(name)
        return isinstance(getattr(module, "__loader__", None), _Loader)

    def _forget(self) -> None:
        for name in [name for name in sys.modules if self._is_own_module(name)]:
            del sys.modules[name]

    def _load(self) -> Any:
        try:
            found: Any = importlib.import_module(self._name)
        except (Exception, SystemExit) as error:
            raise ProgramError(f"{self.function.module} cannot be imported: {_told(error, self)}") from error
        *owners, last = self.function.name.split(".")
        for name in owners:
            found = self._attribute(found, name)
            if isinstance(found, type):
                try:
                    found = found()
                except Exception as error:
                    raise ProgramError(
                        f"{name}() needs arguments ({error}); write a function that makes one and calls its method, and name that"
                    ) from error
        function = self._attribute(found, last)
        if not callable(function):
            raise ProgramError(
                f"{self.function.name} in {self.function.module} is a {type(function).__name__}, no function"
            )
        return function

    def _attribute(self, holder: Any, name: str) -> Any:
        if not hasattr(holder, name):
            own = getattr(holder, "__name__", "") if inspect.ismodule(holder) else None
            known = [
                n
                for n, v in getattr(holder, "__dict__", {}).items()
                if callable(v) and not n.startswith("_") and own in (None, getattr(v, "__module__", None))
            ]
            raise ProgramError(
                f"{self.function.module} has no {self.function.name}; it has {', '.join(sorted(known)) or 'no functions'}"
            )
        return getattr(holder, name)


def _module_name(path: Path) -> tuple[Path, str]:
    """(folder for sys.path, dotted name): a file in a package is imported as a part of it."""
    names, folder = [path.stem], path.parent
    while (folder / "__init__.py").is_file():
        names.insert(0, folder.name)
        folder = folder.parent
    return folder, ".".join(names)


def _argument(function: Any, file: Path) -> Any:
    """The file as the function wants it: its bytes, a Path, an array for .npy, or its path as text."""
    wanted: Any = None
    try:
        parameters = [
            p
            for p in inspect.signature(function).parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)
        ]
        hints = typing.get_type_hints(inspect.unwrap(function))
        wanted = hints.get(parameters[0].name) if parameters else None
    except (TypeError, ValueError, NameError):
        wanted = None
    if wanted is bytes:
        return file.read_bytes()
    if wanted is Path:
        return file
    if file.suffix == ".npy":
        return np.load(file, allow_pickle=False)
    return str(file)


def _seed() -> None:
    """Both programs draw the same random numbers, in every run."""
    random.seed(0)
    np.random.seed(0)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)


def _told(error: BaseException, program: Program) -> str:
    """The error with the user's own line at which it came."""
    own = [f for f in traceback.extract_tb(error.__traceback__) if program._is_own(Path(f.filename))]
    where = f" ({Path(own[-1].filename).name}:{own[-1].lineno}: {own[-1].line})" if own else ""
    return f"{type(error).__name__}: {error}{where}"


def _answers(requests: BinaryIO, answers: BinaryIO) -> None:
    program: Program | None = None
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        answer: Any
        try:
            if isinstance(request, Function):
                if program is not None:
                    program.close()
                program, answer = Program(request), None
            else:
                assert program is not None
                answer = program.run(request)
        except (ProgramError, ValueError) as error:
            answer = ProgramError(str(error))
        pickle.dump(answer, answers, protocol=pickle.HIGHEST_PROTOCOL)
        answers.flush()


def main() -> None:
    """Answer requests until standard input ends."""
    # What the program prints must not get between the answers.
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    _answers(sys.stdin.buffer, channel)
