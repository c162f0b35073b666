"""Two programs compared line by line: what is recorded, which lines are named, what is told of wrong input."""

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skewless.programs.diff import diff
from skewless.programs.program import TracedFunction, function_of
from skewless.programs.trace import Event, Trace
from tests.programs import inputs

PROGRAMS = Path(__file__).parent / "programs"


class Pair:
    """Two processes that run one program after another, training's and the service's."""

    def __init__(self, folder: Path):
        idle = folder / "idle.py"
        idle.write_text("import numpy, torch\n")
        self.sides = tuple(TracedFunction(function_of(f"{idle}:none")) for _ in range(2))

    def close(self) -> None:
        for side in self.sides:
            side.close()

    def trace(self, name: str, file: Path, code: Sequence[Path] = ()) -> Trace:
        self.sides[0].exchange(function_of(name, code))
        return self.sides[0].run(file)

    def diff(self, train: str, serve: str, *files: Path, **options: Any) -> dict[str, Any]:
        for side, name in zip(self.sides, (train, serve), strict=True):
            side.exchange(function_of(name))
        return diff(*self.sides, files, progress=False, **options)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    made = Pair(tmp_path_factory.mktemp("idle"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inputs.recording(tmp_path_factory.mktemp("input") / "recording.wav")


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., str]:
    """Writes a program, and names its function `network_input` as the command line does."""

    def write(text: str, file: str = "program.py", function: str = "network_input") -> str:
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return f"{path}:{function}"

    return write


@pytest.fixture
def traced(pair: Pair, program: Callable[..., str], recording: Path) -> Callable[[str], Trace]:
    return lambda text: pair.trace(program(text), recording)


def named(report: dict[str, Any]) -> list[str]:
    """The lines that a report names, as "file:line"."""
    return [f"{cause['place']['file']}:{cause['place']['line']}" for cause in report["causes"]]


def at(trace: Trace, text: str) -> list[Event]:
    """The events of the expression with this text."""
    return [event for event in trace.events if event.site.text == text]


def numbers(trace: Trace, event: Event, path: str = "") -> np.ndarray:
    """What an event gave."""
    (item,) = [item for item in event.outputs if item.path == path]
    return trace.arrays[item.digest]


# --- 1. the program means what it meant

# Writes what a program returned as text, every number to its last bit, with names of types for types of its own.
TELL = """
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import awkward
import numpy as np
import torch


def told(value):
    kind = type(value).__name__
    if isinstance(value, torch.Tensor):
        return [kind, value.requires_grad, told(value.numpy(force=True))]
    if isinstance(value, np.ndarray):
        numbers = [told(one) for one in value.tolist()] if value.dtype == object else value.tobytes().hex()
        return [kind, str(value.dtype), list(value.shape), numbers]
    if isinstance(value, Mapping):
        return [kind, [[told(key), told(one)] for key, one in value.items()]]
    if isinstance(value, (list, tuple)):
        return [kind, [told(one) for one in value]]
    if isinstance(value, float):
        return [kind, value.hex()]
    return [kind, re.sub("0x[0-9a-f]+", "0x", repr(value))]


def write(path):
    out = {name: told(result) for name, result in awkward.awkward(path).items()}
    Path(path + sys.argv[-1] * (len(sys.argv) > 1)).with_suffix(".json").write_text(json.dumps(out))
    return np.zeros(3)
"""


@pytest.fixture(scope="module")
def awkward(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], Trace]:
    """What awkward.py returned without instrumentation and under it, by case, and the trace."""
    folder = tmp_path_factory.mktemp("awkward")
    for name in ("plain", "traced"):
        (folder / f"{name}.wav").touch()
    tell = folder / "tell.py"
    tell.write_text(TELL)
    run = f"import sys; sys.path[:0] = [{str(PROGRAMS)!r}, {str(folder)!r}]; import tell; tell.write({str(folder / 'plain.wav')!r})"
    subprocess.run([sys.executable, "-B", "-c", run], check=True, timeout=120, stdout=subprocess.DEVNULL)
    tell.write_text(f"import sys\nsys.path.insert(0, {str(PROGRAMS)!r})\n{TELL}")
    with TracedFunction(function_of(f"{tell}:write", [PROGRAMS])) as program:
        trace = program.run(folder / "traced.wav")
    plain, under = (json.loads((folder / f"{name}.json").read_text()) for name in ("plain", "traced"))
    return plain, under, trace


def test_awkward_python_gives_the_same_under_instrumentation(awkward: tuple[Any, Any, Trace]) -> None:
    plain, under, trace = awkward
    assert len(plain) == 20
    assert [name for name in plain if plain[name] != under[name]] == []
    assert list(plain) == list(under)
    # It was instrumented: what its lines computed is there.
    assert sum(event.site.file == "awkward.py" for event in trace.events) > 300


def test_an_exception_has_the_lines_and_words_that_it_has_without_instrumentation(
    traced: Callable[[str], Trace], tmp_path: Path
) -> None:
    text = '''
        """The module's docstring."""
        import inspect
        import traceback
        from pathlib import Path

        import numpy as np


        class Loud(list):
            def __getitem__(self, at):
                raise LookupError(
                    f"no {at}"
                )


        def inner(x):
            """Adds what cannot be added."""
            return (x[1:]
                    + np.arange(5)
                    + 1)


        def network_input(path):
            told = [__doc__, inner.__doc__, inspect.getsource(inner), inspect.getsource(Loud)]
            for attempt in (
                lambda: inner(np.arange(3)),
                lambda: Loud()[3],
                lambda: {}["key"],
                lambda: inner(1),
                lambda: np.zeros(2).mean(axis=7),
                lambda: inner(),
                lambda: (np.zeros((2, 3))
                         .reshape(3, 2)
                         .reshape(5, 5)
                         .mean()),
                lambda: np.reshape(
                    np.zeros(3),
                    (2, 2),
                ),
                lambda: [
                    np.zeros(2)
                    .nothing,
                ],
                lambda: np.zeros(2)[
                    (1, 2)
                ],
                lambda: -"text",
                lambda: "a" < 1,
                lambda: [1][5],
                lambda: np.zeros(1).nothing,
                lambda: missing_name,
            ):
                try:
                    attempt()
                except Exception as error:
                    own = [(f.name, f.lineno) for f in traceback.extract_tb(error.__traceback__) if f.filename == __file__]
                    told.append([type(error).__name__, str(error), own])
            Path(__file__).with_name(f"told{'HOOKED' if '__skewless__' in inner.__code__.co_names else ''}").write_text(repr(told))
            return np.zeros(3)
    '''
    traced(text)
    run = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import program; program.network_input('')"
    subprocess.run([sys.executable, "-B", "-c", run], check=True, timeout=60)
    plain, under = (tmp_path / "told").read_text(), (tmp_path / "toldHOOKED").read_text()
    assert "LookupError" in plain
    assert "missing_name" in plain
    assert under == plain


def test_nothing_is_written_into_the_users_folder(pair: Pair, program: Callable[..., str], recording: Path) -> None:
    name = program("import helper\ndef network_input(path):\n    return helper.array() * 2\n")
    program("import numpy as np\ndef array():\n    return np.ones(3)\n", "helper.py")
    folder = Path(name.partition(":")[0]).parent
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with TracedFunction(function_of(name)) as alone:
        alone.run(recording)
        alone.run(recording, plain=True)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
