"""One side of a comparison: something that gives a Trace for a file."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

from skewless.errors import UsageError
from skewless.programs.recorder import MIB, Substitutes
from skewless.programs.trace import Trace
from skewless.programs.worker import Function, ProgramError, Run


class Side(Protocol):
    """A program, a pipeline, or a recorded trace. name: as the user gave it."""

    name: str

    def run(self, file: Path, substitutes: Substitutes | None = None, *, plain: bool = False) -> Trace:
        """Trace a run on a file; raises ProgramError where it cannot run, or cannot take the substitutes."""

    def close(self) -> None:
        """End what was started for it."""


class TracedFunction:
    """A function of the user's, in a process of its own. Use it in a `with` block, or call `close`."""

    def __init__(self, function: Function, memory: int = 256 * MIB):
        self.name = f"{function.module.name}:{function.name}"
        self._memory = memory
        self._function = function
        self._process = self._started()
        self._ask(function)

    def _started(self) -> subprocess.Popen[bytes]:
        # The child finds this package where this process did.
        package = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        return subprocess.Popen(
            [sys.executable, "-P", "-c", "from skewless.programs.worker import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )

    def __enter__(self) -> TracedFunction:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def exchange(self, function: Function) -> None:
        """Run another function in the same process, which has its libraries loaded already."""
        self._function = function
        self._ask(function)
        self.name = f"{function.module.name}:{function.name}"

    def run(self, file: Path, substitutes: Substitutes | None = None, *, plain: bool = False) -> Trace:
        if not file.is_file():
            raise UsageError(f"there is no file {file}")
        if self._process.poll() is not None:
            # It ended on the file before. That is no reason not to try this one.
            self.close()
            self._process = self._started()
            self._ask(self._function)
        trace = self._ask(Run(file.resolve(), substitutes or {}, self._memory, plain))
        assert trace is not None
        return trace

    def _ask(self, request: Function | Run) -> Trace | None:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            pickle.dump(request, process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            code = process.wait()
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise ProgramError(f"the process that ran {self.name} {how}") from error
        if isinstance(answer, ProgramError):
            raise answer
        return answer

    def close(self) -> None:
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()
        if self._process.stdout is not None:
            self._process.stdout.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Recorded:
    """A trace that was recorded before, perhaps on another machine. It holds one file."""

    def __init__(self, path: Path):
        self.name, self._trace = path.name, Trace.read(path)

    def run(self, file: Path, substitutes: Substitutes | None = None, *, plain: bool = False) -> Trace:
        if file.name != self._trace.file:
            raise ProgramError(
                f"{self.name} was recorded on {self._trace.file}, not on {file.name}; trace that file as well"
            )
        if substitutes:
            raise ProgramError(f"{self.name} is a recorded trace: it cannot be run again with another value")
        return self._trace

    def close(self) -> None:
        """Nothing was started."""


def function_of(text: str, code: Sequence[Path] = ()) -> Function:
    """`FILE.py:function` or `FILE.py:Class.method`. Raises UsageError for anything else."""
    file, colon, name = text.rpartition(":")
    path = Path(file).resolve()
    if not colon or path.suffix != ".py" or not all(part.isidentifier() for part in name.split(".")):
        raise UsageError(f"{text!r} is no function: write FILE.py:function, such as train/precompute.py:network_input")
    if not path.is_file():
        raise UsageError(f"there is no file {file}")
    package = path.parent
    while (package.parent / "__init__.py").is_file() and (package / "__init__.py").is_file():
        package = package.parent
    return Function(path, name, (package, *(folder.resolve() for folder in code)))
