"""Two programs compared line by line: what is recorded, which lines are named, what is told of wrong input."""

import json
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy
import soundfile

from skewless.errors import UsageError
from skewless.programs.diff import diff
from skewless.programs.program import Recorded, TracedFunction, function_of
from skewless.programs.recorder import MIB, MOST_RUNS
from skewless.programs.trace import Event, Trace
from skewless.programs.worker import ProgramError
from skewless.testing import assert_same
from tests.conftest import call_skewless
from tests.programs import inputs
from tests.programs.realistic.skews import REFACTORINGS, SKEWS, TRAIN, Skew, write
from tests.tiny_model import TinyModel, tiny_model  # noqa: F401

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


# --- 2. what is recorded


def test_values_of_every_kind_are_recorded(traced: Callable[[str], Trace]) -> None:
    trace = traced("""
        from collections import namedtuple
        from dataclasses import dataclass
        import numpy as np
        import torch
        from PIL import Image

        @dataclass
        class Features:
            levels: torch.Tensor
            name: str = "f"

        Two = namedtuple("Two", "left right")

        def network_input(path):
            array = np.arange(6.0)
            tensor = torch.ones(2, 3) * 2
            picture = Image.new("RGB", (4, 5), (1, 2, 3)).rotate(90)
            numbers = (array * 3).tolist() * 4
            many = np.repeat(numbers, 1).tolist()
            half = tensor.bfloat16()
            both = np.stack([array, array + 1])
            size = float(array.max()) * 2.5
            complex_ = np.exp(1j * array)
            return {"a": Two([array, both], tensor), "f": Features(tensor + 1), "p": picture, "l": many}
    """)
    assert [(item.path, item.kind, item.shape, item.dtype) for item in trace.outputs] == [
        ("['a'][0][0]", "numpy", (6,), "float64"),
        ("['a'][0][1]", "numpy", (2, 6), "float64"),
        ("['a'][1]", "torch", (2, 3), "float32"),
        ("['f'].levels", "torch", (2, 3), "float32"),
        ("['p']", "image", (5, 4, 3), "uint8"),
        ("['l']", "list", (24,), "float64"),
    ]
    (both,) = at(trace, "np.stack([array, array + 1])")
    assert np.array_equal(numbers(trace, both), [np.arange(6), np.arange(1, 7)])
    assert both.call is not None
    assert (both.call.package, both.call.function.rpartition(".")[2]) == ("numpy", "stack")
    assert (both.call.arguments["axis"], both.call.given) == ("0", ("arrays",))
    assert {item.digest for item in both.inputs} == {
        at(trace, text)[0].outputs[0].digest for text in ("np.arange(6.0)", "array + 1")
    }
    (scaled,) = at(trace, "float(array.max()) * 2.5")
    assert (scaled.operation, numbers(trace, scaled).item()) == ("*", 12.5)
    assert at(trace, "np.exp(1j * array)")[0].outputs[0].dtype == "complex128"
    assert at(trace, "tensor.bfloat16()")[0].outputs[0].dtype == "bfloat16"
    assert trace.settings == {"program.py:23 size": "12.5", "program.py:11 name": "'f'"}
    assert trace.versions["numpy"] == np.__version__


def test_a_value_that_is_changed_later_is_compared_as_it_was(traced: Callable[[str], Trace]) -> None:
    trace = traced("""
        import numpy as np
        import torch

        def network_input(path):
            x = np.arange(4.0)
            y = x + 1
            x[0] = 9
            z = x * 2
            y += x
            view = y[1:]
            view *= 0
            t = torch.ones(3) * 5
            t.mul_(2)
            t[1:] += 1
            generator = np.random.default_rng(0)
            generator.shuffle(y)
            x.sort()
            return y, z, t, x
    """)
    values = {
        event.site.text: numbers(trace, event).tolist()
        for event in trace.events
        if event.outputs and event.outputs[0].path == ""
    }
    assert values["np.arange(4.0)"] == [0, 1, 2, 3]
    assert values["x + 1"] == [1, 2, 3, 4]
    assert values["x[0] = 9"] == [9, 1, 2, 3]
    assert values["x * 2"] == [18, 2, 4, 6]
    assert values["y += x"] == [10, 3, 5, 7]
    assert values["y[1:]"] == [3, 5, 7]
    assert values["view *= 0"] == [0, 0, 0]
    assert values["torch.ones(3) * 5"] == [5, 5, 5]
    assert values["t.mul_(2)"] == [10, 10, 10]
    # What a method changes was something else before.
    assert {i.digest for i in at(trace, "t.mul_(2)")[0].inputs} == {at(trace, "torch.ones(3) * 5")[0].outputs[0].digest}
    (shuffled,) = at(trace, "generator.shuffle(y)")
    assert sorted(numbers(trace, shuffled)) == [0, 0, 0, 10]
    assert values["x.sort()"] == [1, 2, 3, 9]
    assert [trace.arrays[item.digest].tolist() for item in trace.outputs][2:] == [[10, 11, 11], [1, 2, 3, 9]]


def test_rows_of_a_loop_are_values(traced: Callable[[str], Trace]) -> None:
    trace = traced("""
        import numpy as np

        def network_input(path):
            rows = np.arange(12.0).reshape(3, 4)
            done = [row / 2 for row in rows]
            for row, name in zip(rows, "abc"):
                done.append(row + 1)
            return np.stack(done)
    """)
    made = {item.digest for event in trace.events if event.operation in ("for", "zip") for item in event.outputs}
    halves, sums = at(trace, "row / 2"), at(trace, "row + 1")
    assert [event.occurrence for event in halves] == [0, 1, 2]
    assert [numbers(trace, event).tolist() for event in sums] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    assert {item.digest for event in halves + sums for item in event.inputs} <= made
    assert len(made) == 3


def test_a_loop_over_single_numbers_leaves_few_events(traced: Callable[[str], Trace]) -> None:
    trace = traced("""
        import numpy as np

        def network_input(path):
            x = np.zeros(100_000)
            for i in range(100_000):
                x[i] = i
            single, few = 0.0, x[:100]
            for i in range(5000):
                j = i % 100
                single = single + few[j] * 1.5
            return x + single
    """)
    (stored,) = at(trace, "x[i] = i")
    assert np.array_equal(numbers(trace, stored), np.arange(100_000.0))
    assert len(trace.events) < 3 * MOST_RUNS + 20
    assert (
        sorted(note.rpartition(" ran ")[2] for note in trace.notes)
        == [f"5,000 times; the first {MOST_RUNS:,} are recorded"] * 3
    )
    assert trace.arrays[trace.outputs[0].digest][0] == 50 * sum(range(100)) * 1.5


def test_a_view_that_repeats_numbers_is_told_by_the_numbers_it_shows(traced: Callable[[str], Trace]) -> None:
    trace = traced("""
        import numpy as np
        import torch

        def network_input(path):
            x = np.arange(2000.0)
            windows = np.lib.stride_tricks.sliding_window_view(x, 1000)
            wide = torch.ones(50).expand(100_000, 50)
            return windows.mean(axis=1), wide.sum(0)
    """)
    assert [value.size for value in trace.values.values() if value.size > 2000] == []
    assert np.allclose(trace.arrays[trace.outputs[0].digest], np.arange(1001) + 499.5)
    assert trace.arrays[trace.outputs[1].digest].tolist() == [100_000] * 50


LARGE = """
    import numpy as np

    def network_input(path):
        x = np.arange(1_000_000.0)
        y = np.sqrt(x)
        y = y / {divisor}
        return y[:100]
"""


def test_arrays_beyond_the_memory_are_compared_by_samples(program: Callable[..., str], recording: Path) -> None:
    train, serve = (program(LARGE.format(divisor=d), f"{n}.py") for n, d in (("train", 2), ("serve", 3)))
    with TracedFunction(function_of(train), MIB) as reference, TracedFunction(function_of(serve), MIB) as candidate:
        trace = reference.run(recording)
        assert sum(array.nbytes for array in trace.arrays.values()) <= MIB
        assert max(value.size for value in trace.values.values()) == 1_000_000
        note = "more arrays than fit into memory: some are compared by 256 of their numbers only"
        assert trace.notes == (note,)
        report = diff(reference, candidate, [recording], progress=False)
    assert named(report) == ["serve.py:7"]
    # Training's value was too large to be put in place there, and the part of it at the next line was not.
    assert report["causes"][0]["put_right_at"]["line"] == 8
    assert report["notes"] == {"reference": [note], "candidate": [note]}
    assert report["files_same_in_the_end"] == 1


def test_only_the_users_modules_are_rewritten(
    pair: Pair, program: Callable[..., str], recording: Path, tmp_path: Path
) -> None:
    module = "import numpy as np\ndef made():\n    return np.ones(3) + 1\n"
    text = """
        import sys
        from pathlib import Path
        here = Path(__file__).parent
        sys.path[:0] = map(str, (here / "lib/site-packages", here / "env", here.parent / "more"))
        import own, package.part, site_one, venv_one, more_one

        def network_input(path):
            return own.made() + package.part.made() + site_one.made() + venv_one.made() + more_one.made()
    """
    for file in ("own.py", "package/part.py", "lib/site-packages/site_one.py", "env/venv_one.py"):
        program(module, f"app/{file}")
    program(module, "more/more_one.py")
    program("", "app/package/__init__.py")
    program("", "app/env/pyvenv.cfg")
    name = program(text, "app/program.py")

    def files(code: Sequence[Path]) -> set[str]:
        trace = pair.trace(name, recording, code)
        assert trace.sources.keys() >= {event.site.file for event in trace.events}
        return {event.site.file for event in trace.events}

    assert files([tmp_path / "more"]) == {"program.py", "own.py", "package/part.py", "more_one.py"}
    assert files(()) == {"program.py", "own.py", "package/part.py"}


def test_what_a_module_computes_while_it_is_imported_is_compared(
    pair: Pair, program: Callable[..., str], recording: Path
) -> None:
    text = """
        import numpy as np
        WINDOW = np.hanning({points})[:16]

        def network_input(path):
            return np.arange(16.0) * WINDOW
    """
    report = pair.diff(
        *(program(text.format(points=n), f"{name}.py") for name, n in (("train", 17), ("serve", 16))), recording
    )
    assert named(report) == ["serve.py:3"]
    assert report["files_same_in_the_end"] == 1


SAME_NAMES = """
    import numpy as np
    import torch
    from helper import factor

    def network_input(path):
        print("a line that the program prints", flush=True)
        {extra}
        return (torch.arange(20.0) * factor(), torch.rand(4), np.random.rand(4), torch.ones(1).dtype == torch.float32)
"""


def test_two_programs_with_modules_of_the_same_names_do_not_reach_each_other(
    pair: Pair, program: Callable[..., str], recording: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    names = []
    for folder, number, extra in (("a", 2, "pass"), ("b", 3, "torch.set_default_dtype(torch.float64)")):
        names.append(program(SAME_NAMES.format(extra=extra), f"{folder}/program.py"))
        program(f"def factor():\n    return {number}\n", f"{folder}/helper.py")
    own = program(SAME_NAMES.format(extra="import random; random.seed(5); torch.get_num_threads()"), "a/again.py")
    with TracedFunction(function_of(names[0])) as first, TracedFunction(function_of(names[1])) as second:
        one, two, once_more = first.run(recording), second.run(recording), first.run(recording)
        seeded = diff(first, first, [recording], progress=False)
    assert seeded["files_same"] == 1
    assert one.values[one.outputs[0].digest].high == 38
    assert two.values[two.outputs[0].digest].high == 57
    assert [item.dtype for item in one.outputs[:2]] == ["float32", "float32"]
    assert two.outputs[1].dtype == "float64"
    assert [item.digest for item in one.outputs] == [item.digest for item in once_more.outputs]
    # numpy draws the same numbers on both sides.
    assert one.outputs[2].digest == two.outputs[2].digest == pair.trace(own, recording).outputs[2].digest
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.count("a line that the program prints") >= 3


def test_an_exception_that_is_swallowed_is_told_and_one_that_leaves_is_not(traced: Callable[[str], Trace]) -> None:
    trace = traced("""
        from contextlib import suppress
        import numpy as np

        def leaves():
            try:
                raise KeyError("leaves here")
            except KeyError:
                raise

        def network_input(path):
            for _ in range(3):
                try:
                    np.zeros(2).high_pass()
                except AttributeError:
                    pass
            with suppress(ZeroDivisionError):
                1 / 0
            try:
                leaves()
            except LookupError as error:
                kept = error
            return np.zeros(3)
    """)
    assert [(s.site.line, s.exception, s.message, s.count) for s in trace.swallowed] == [
        (15, "AttributeError", "'numpy.ndarray' object has no attribute 'high_pass'", 3),
        (17, "ZeroDivisionError", "division by zero", 1),
        (21, "KeyError", "'leaves here'", 1),
    ]


# --- 3. the documents' programs

# Training, the service, the input, and the lines of the service that are named, in order.
DOCUMENTS = {
    "pytorch": ("cough/precompute", "cough/backend_pytorch", "mono", ["backend_pytorch.py:23"]),
    "onnx": (
        "cough/precompute",
        "cough/backend_onnx",
        "mono",
        ["backend_onnx.py:63", "backend_onnx.py:85", "backend_onnx.py:117"],
    ),
    "onnx, two channels": (
        "cough/precompute",
        "cough/backend_onnx",
        "stereo",
        ["backend_onnx.py:59", "backend_onnx.py:63", "backend_onnx.py:85", "backend_onnx.py:117"],
    ),
    "orca": ("orca/train", "orca/serve", "mono", ["serve.py:41", "serve.py:52"]),
    "orca, first": (
        "orca/train",
        "orca/serve_first",
        "mono",
        ["serve_first.py:12", "serve_first.py:16", "serve.py:41", "serve_first.py:19"],
    ),
    "portrait": ("portrait/train", "portrait/serve", "picture", ["serve.py:14", "serve.py:20"]),
    "portrait, fixed": (
        "portrait/train",
        "portrait/serve_fixed",
        "picture",
        ["serve.py:14", "serve_fixed.py:12", "serve_fixed.py:13"],
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    return {
        "mono": inputs.recording(folder / "mono.wav", channels=1),
        "stereo": inputs.recording(folder / "stereo.wav"),
        "picture": inputs.picture(folder / "picture.jpg"),
    }


@pytest.fixture(scope="module")
def documents(pair: Pair, files: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """The report of each pair of a document's programs."""
    return {
        name: pair.diff(*(f"{PROGRAMS / each}.py:network_input" for each in (train, serve)), files[file])
        for name, (train, serve, file, _) in DOCUMENTS.items()
    }


@pytest.mark.chain
@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_documents_service_parts_from_its_training_at_these_lines(
    name: str, documents: dict[str, dict[str, Any]]
) -> None:
    report = documents[name]
    assert named(report) == DOCUMENTS[name][-1]
    assert report["files_same"] == 0
    assert report["files_same_in_the_end"] == 1
    assert report["files"][0]["stopped"] == ""


@pytest.mark.chain
def test_a_level_of_full_scale_is_told_by_its_ratio_to_a_level_of_the_peak(
    documents: dict[str, dict[str, Any]], files: dict[str, Path]
) -> None:
    cause = documents["onnx"]["causes"][0]
    assert cause["place"]["text"] == "samples / 32768.0"
    assert (cause["kind"], cause["counterpart"]["text"]) == ("other", "waveform / waveform.abs().max()")
    assert cause["last_common"]["candidate"]["line"] == 59
    assert cause["relation"]["kind"] == "scale"
    peak = np.abs(soundfile.read(files["mono"], dtype="int16")[0].astype(float)).max()
    assert cause["relation"]["numbers"]["ratio"] == pytest.approx(peak / 32768, rel=1e-6)


@pytest.mark.chain
def test_a_high_pass_that_never_runs_is_told_where_it_is_swallowed(documents: dict[str, dict[str, Any]]) -> None:
    message = "module 'torchaudio.transforms' has no attribute 'HighpassBiquad'"
    for name, sides in (("pytorch", ("reference", "candidate")), ("onnx", ("reference",))):
        for side in ("reference", "candidate"):
            told = documents[name]["swallowed"][side]
            assert [
                (each["place"]["file"], each["place"]["line"], each["exception"], each["message"]) for each in told
            ] == ([("precompute.py", 53, "AttributeError", message)] if side in sides else [])


@pytest.mark.chain
def test_the_filterbank_of_another_rate_is_told_as_an_argument(documents: dict[str, dict[str, Any]]) -> None:
    (argument,) = documents["orca"]["causes"][0]["arguments"]
    assert argument == {
        "function": "torchaudio.transforms.MelSpectrogram",
        "argument": "sample_rate",
        "reference": "16000",
        "candidate": "20000",
        "given": {"reference": False, "candidate": True},
    }
    assert documents["orca"]["causes"][1]["relation"]["kind"] == "padding"


# --- 4. planted skews and refactorings


def planted(pair: Pair, edit: Skew, files: dict[str, Path], folder: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(the report of train.py against its edited copy, the lines that are right to name)."""
    service, right = write(edit, folder)
    file = files["stereo" if edit.input == "recording" else "picture"]
    return pair.diff(*(f"{module}:{edit.function}" for module in (TRAIN, service)), file), right


@pytest.mark.chain
def test_every_planted_skew_is_named_first_and_hardly_anything_besides(
    pair: Pair, files: dict[str, Path], tmp_path: Path
) -> None:
    besides = {}
    for skew in SKEWS:
        (tmp_path / skew.name).mkdir()
        report, right = planted(pair, skew, files, tmp_path / skew.name)
        lines = named(report)
        assert lines and lines[0] in right, skew.name
        assert (report["files_same"], report["files_same_in_the_end"]) == (0, 1), skew.name
        if others := set(lines) - set(right):
            besides[skew.name] = others
    assert set(besides) <= {"library_default"}
    assert sum(map(len, besides.values())) <= 1


@pytest.mark.chain
@pytest.mark.parametrize("edit", REFACTORINGS, ids=lambda edit: edit.name)
def test_a_refactoring_is_no_line(pair: Pair, edit: Skew, files: dict[str, Path], tmp_path: Path) -> None:
    report, _ = planted(pair, edit, files, tmp_path)
    assert named(report) == []
    assert report["files_same"] == 1


# --- 5. messages

MISTAKES = """
    import os
    import signal
    import sys
    import numpy as np

    class Needs:
        def __init__(self, rate):
            self.rate = rate

        def array(self, path):
            return np.ones(3)

    class Model:
        def array(self, path):
            return np.ones(3) * 2

    NUMBER = 5

    def raises(path):
        x = np.zeros(3)
        return x.reshape(2, 2)

    def exits(path):
        sys.exit("nothing to do")

    def leaves(path):
        os._exit(7)

    def killed(path):
        os.kill(os.getpid(), signal.SIGKILL)

    def nothing(path):
        return "text"

    def network_input(path):
        if "bad" in path:
            raise ValueError("not audio")
        return np.ones(3)
"""


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("absent", "has no absent; it has Model, Needs, exits, killed, leaves, network_input, nothing, raises"),
        ("Model.absent", "has no Model.absent"),
        ("Needs.array", r"Needs\(\) needs arguments .*missing 1 required positional argument: 'rate'"),
        ("NUMBER", "NUMBER in .*program.py is a int, no function"),
        ("raises", r"raises raised on recording.wav: ValueError: .* \(program.py:22: return x.reshape\(2, 2\)\)"),
        ("exits", r"exits raised on recording.wav: SystemExit: nothing to do \(program.py:25: "),
        ("leaves", "the process that ran program.py:leaves ended with exit code 7"),
        ("killed", "the process that ran program.py:killed was ended by SIGKILL"),
    ],
)
def test_a_function_that_cannot_run_is_told(
    function: str, words: str, program: Callable[..., str], recording: Path
) -> None:
    name = program(MISTAKES, function=function)
    with TracedFunction(function_of(name)) as side, pytest.raises(ProgramError, match=words):
        side.run(recording)


def test_a_method_is_called_on_an_object_of_its_class(pair: Pair, program: Callable[..., str], recording: Path) -> None:
    trace = pair.trace(program(MISTAKES, function="Model.array"), recording)
    assert trace.arrays[trace.outputs[0].digest].tolist() == [2, 2, 2]


def test_a_module_that_cannot_be_imported_is_told_with_its_line(
    pair: Pair, program: Callable[..., str], recording: Path
) -> None:
    name = program("import numpy\nimport a_module_that_is_not_there\n")
    with pytest.raises(
        ProgramError, match=r"program.py cannot be imported: ModuleNotFoundError: .*\(program.py:2: import"
    ):
        pair.trace(name, recording)
    with pytest.raises(ProgramError, match=r"broken.py cannot be imported: SyntaxError"):
        pair.trace(program("def network_input(path:\n", "broken.py"), recording)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("program.py", "'program.py' is no function: write FILE.py:function"),
        ("program.txt:run", "is no function"),
        ("program.py:not a name", "is no function"),
        ("absent.py:run", "there is no file absent.py"),
    ],
)
def test_a_text_that_names_no_function_is_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        function_of(text)


def test_a_file_that_one_side_cannot_take_is_listed_and_the_others_are_compared(
    pair: Pair, program: Callable[..., str], recording: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.wav"
    bad.touch()
    serve, train = (
        program(MISTAKES),
        program("import numpy as np\ndef network_input(path):\n    return np.ones(3)\n", "train.py"),
    )
    report = pair.diff(train, serve, bad, recording)
    (refused,) = report["unreadable"]
    assert refused["file"] == "bad.wav"
    assert "network_input raised on bad.wav: ValueError: not audio (program.py:38: " in refused["reason"]
    assert (report["files_compared"], report["files_same"]) == (1, 1)
    with pytest.raises(UsageError, match=r"none of the 1 files can be compared:\n  bad.wav: network_input raised"):
        pair.diff(train, serve, bad)
    with pytest.raises(UsageError, match="there is no file to compare on"):
        pair.diff(train, serve)


def test_a_file_is_given_as_its_annotation_says(pair: Pair, program: Callable[..., str], tmp_path: Path) -> None:
    text = """
        from pathlib import Path
        import numpy as np

        def text(path):
            return np.full(3, len(path)) * (type(path) is str)

        def pathlike(path: "Path"):
            return np.full(3, len(path.name)) * isinstance(path, Path)

        def content(data: bytes):
            return np.frombuffer(data, np.uint8) * (type(data) is bytes)

        def array(samples):
            return samples * 2
    """
    plain, numpy_file = tmp_path / "four", tmp_path / "array.npy"
    plain.write_bytes(bytes(range(4)))
    np.save(numpy_file, np.arange(5.0))
    for function, file, expected in (
        ("text", plain, [len(str(plain))] * 3),
        ("pathlike", plain, [4] * 3),
        ("content", plain, [0, 1, 2, 3]),
        ("array", numpy_file, [0, 2, 4, 6, 8]),
    ):
        trace = pair.trace(program(text, function=function), file)
        assert trace.arrays[trace.outputs[0].digest].tolist() == expected


# --- 6. recorded traces

PARTS = """
    import numpy as np
    import scipy.signal

    def network_input(path):
        x = np.arange(400.0) % 7
        x = scipy.signal.detrend(x)
        return x {end}
"""


def test_a_trace_that_was_written_and_read_compares_as_the_run_did(
    pair: Pair, program: Callable[..., str], recording: Path, tmp_path: Path
) -> None:
    train, serve = (program(PARTS.format(end=end), f"{n}.py") for n, end in (("train", "* 2"), ("serve", "* 3")))
    live = pair.diff(train, serve, recording)
    assert named(live) == ["serve.py:8"]
    trace = pair.trace(train, recording)
    trace.write(tmp_path / "train.trace")
    pair.trace(serve, recording).write(tmp_path / "serve.trace")
    again = Trace.read(tmp_path / "train.trace")
    assert again.events == trace.events
    assert again.outputs == trace.outputs
    assert again.values == trace.values
    assert {digest: array.tobytes() for digest, array in again.arrays.items()} == {
        digest: array.tobytes() for digest, array in trace.arrays.items()
    }
    pair.sides[1].exchange(function_of(serve))
    reference, candidate = Recorded(tmp_path / "train.trace"), Recorded(tmp_path / "serve.trace")
    half = diff(reference, pair.sides[1], [recording], progress=False)
    assert named(half) == ["serve.py:8"]
    assert half["files_same_in_the_end"] == 1
    assert half["causes"][0]["relation"] == live["causes"][0]["relation"]
    both = diff(reference, candidate, [recording], progress=False)
    assert named(both) == ["serve.py:8"]
    assert "it cannot be run again with another value" in both["causes"][0]["stopped"]


def test_another_default_of_a_library_on_another_machine_is_told(
    pair: Pair, program: Callable[..., str], recording: Path, tmp_path: Path
) -> None:
    here, there = tmp_path / "here.trace", tmp_path / "there.trace"
    pair.trace(program(PARTS.format(end="* 2")), recording).write(here)
    with zipfile.ZipFile(here) as old, zipfile.ZipFile(there, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name == "trace.json":
                record = json.loads(data)
                record["versions"]["scipy"] = "0.1"
                (call,) = [
                    each["call"] for each in record["events"] if each["site"]["text"] == "scipy.signal.detrend(x)"
                ]
                assert call["arguments"]["type"] == "'linear'"
                call["arguments"]["type"], call["version"] = "'constant'", "0.1"
                data = json.dumps(record).encode()
            new.writestr(name, data)
    report = diff(Recorded(here), Recorded(there), [recording], progress=False)
    (argument,) = [each for each in report["calls"] if each["argument"] == "type"]
    assert (argument["reference"], argument["candidate"]) == ("'linear'", "'constant'")
    assert argument["given"] == {"reference": False, "candidate": False}
    assert ["scipy", scipy.__version__, "0.1"] in report["versions"]["apart"]


def test_a_trace_of_another_file_and_files_that_are_no_traces_are_refused(
    pair: Pair, program: Callable[..., str], recording: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run.trace"
    pair.trace(program(PARTS.format(end="* 2")), recording).write(path)
    with pytest.raises(
        ProgramError, match=r"run.trace was recorded on recording.wav, not on other.wav; trace that file"
    ):
        Recorded(path).run(tmp_path / "other.wav")
    damaged = tmp_path / "damaged.trace"
    for content in (path.read_bytes()[:-200], b"no trace at all", b""):
        damaged.write_bytes(content)
        with pytest.raises(UsageError, match=r"damaged.trace is not what skewless trace writes"):
            Recorded(damaged)
    with zipfile.ZipFile(damaged, "w") as file:
        file.writestr("trace.json", '{"format": 99}')
    with pytest.raises(UsageError, match="was written by another version of skewless trace"):
        Recorded(damaged)


# --- 7. in a test suite, and on the command line

OUTPUT = "import numpy as np\ndef network_input(path):\n    x = np.arange(100.0)\n    return x + {offset}\n"


def test_assert_same(program: Callable[..., str], recording: Path) -> None:
    train, serve = (program(OUTPUT.format(offset=o), f"{n}.py") for n, o in (("train", 1), ("serve", 1.01)))
    assert_same(train, train, [recording])
    assert_same(train, serve, [str(recording)], atol=0.02)
    with pytest.raises(AssertionError, match=r"serve.py:4(.|\n)*x \+ 1.01"):
        assert_same(train, serve, [recording])
    with pytest.raises(AssertionError):
        assert_same(train, serve, [recording], atol=0.005)
    with pytest.raises(UsageError, match="there is no file to compare on"):
        assert_same(train, train, [])
    with pytest.raises(UsageError, match="cannot be found in a file again: name a function of a module"):
        assert_same(lambda path: path, train, [recording])


def test_the_exit_codes_of_diff(program: Callable[..., str], recording: Path, tmp_path: Path) -> None:
    train, serve = (program(OUTPUT.format(offset=o), f"{n}.py") for n, o in (("train", 1), ("serve", 2)))
    same = call_skewless("diff", train, train, recording)
    assert (same.returncode, "Both programs return the same" in same.stdout) == (0, True)
    out = tmp_path / "report"
    parts = call_skewless("diff", train, serve, recording, "--json", "--out", out)
    assert parts.returncode == 1
    assert named(json.loads(parts.stdout)) == ["serve.py:4"]
    assert sorted(path.name for path in out.iterdir()) == ["diff.json", "index.html"]
    assert named(json.loads((out / "diff.json").read_text())) == ["serve.py:4"]
    assert "serve.py:4" in (out / "index.html").read_text()
    for arguments, words in (
        ((train, f"{serve}x", recording), "no networ"),
        ((train, "absent.py:f", recording), "there is no file absent.py"),
        ((train, serve, tmp_path / "absent.wav"), "there is no file"),
        ((train, serve, recording, "--archive", tmp_path), "give --checkpoint"),
        ((train, "service", recording), "names no program"),
    ):
        nowhere = tmp_path / "nowhere"
        wrong = call_skewless("diff", *arguments, "--out", nowhere)
        assert wrong.returncode == 2, arguments
        assert words in " ".join(wrong.stderr.split())
        assert not nowhere.exists()


def test_trace_writes_what_diff_reads(program: Callable[..., str], recording: Path, tmp_path: Path) -> None:
    train, serve = (program(OUTPUT.format(offset=o), f"{n}.py") for n, o in (("train", 1), ("serve", 2)))
    out = tmp_path / "run.trace"
    told = call_skewless("trace", train, recording, "--out", out, "--json")
    assert told.returncode == 0
    assert json.loads(told.stdout)["outputs"] == [{"path": "", "kind": "numpy", "shape": [100], "dtype": "float64"}]
    assert Trace.read(out).file == "recording.wav"
    assert call_skewless("diff", out, serve, recording).returncode == 1
    assert call_skewless("diff", out, train, recording).returncode == 0
    assert call_skewless("trace", train, recording, "--out", tmp_path / "run.zip").returncode == 2
    assert call_skewless("trace", train, tmp_path / "absent.wav").returncode == 2


@pytest.mark.chain
def test_a_checkpoint_tells_probabilities(tiny_model: TinyModel, files: dict[str, Path]) -> None:  # noqa: F811
    told = call_skewless(
        "diff",
        f"{PROGRAMS}/cough/precompute.py:network_input",
        f"{PROGRAMS}/cough/backend_onnx.py:network_input",
        files["mono"],
        "--archive",
        tiny_model.archive,
        "--checkpoint",
        tiny_model.checkpoint,
        "--json",
    )
    assert told.returncode == 1, told.stderr
    report = json.loads(told.stdout)
    (file,) = report["files"]
    before, after = (file["scores"][side][0] for side in ("reference", "candidate"))
    assert 0 < before < 1
    assert before != after
    assert report["causes"][0]["effect"]["in_order"]["dp_largest"] > 0
