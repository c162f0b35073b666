"""The programs that two pieces of code are compared on: each planted difference shows, and each rewriting keeps the numbers."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from skewless.core.pipeline import Pipeline
from tests.programs import inputs
from tests.programs.realistic.skews import REFACTORINGS, SKEWS, TRAIN, Skew, write

PROGRAMS = Path(__file__).parent / "programs"
ARCHIVE = PROGRAMS.parents[1] / "archive"
CAFFE = "caffe_preprocess: {mean_bgr: [103.939, 116.779, 123.68]}"
RGB_MEANS = (
    "standardize: {input_range: [0.0, 1.0], mean: [123.68, 116.779, 103.939], std: [1, 1, 1], arithmetic: float32}"
)
# Of the largest absolute number: above, a difference counts; below, it is rounding.
ROUNDING = 1e-5


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of small operations wait for one another where processors are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One file of each sort, by the name of what makes it."""
    folder = tmp_path_factory.mktemp("inputs")
    return {
        "recording": inputs.recording(folder / "recording.wav"),
        "picture": inputs.picture(folder / "picture.jpg"),
    }


@contextmanager
def imported(path: Path) -> Iterator[ModuleType]:
    """A program's module, imported from its folder; afterwards all modules of that folder are forgotten."""
    sys.path.insert(0, str(path.parent))
    try:
        yield importlib.import_module(path.stem)
    finally:
        sys.path.remove(str(path.parent))
        for name, module in list(sys.modules.items()):
            if getattr(module, "__file__", None) and Path(module.__file__).parent == path.parent:
                del sys.modules[name]


def result(path: Path, function: str, file: Path) -> np.ndarray:
    with imported(path) as module:
        return np.asarray(getattr(module, function)(str(file)))


def change(expected: np.ndarray, found: np.ndarray) -> float:
    """The largest absolute difference, relative to the largest number expected; infinite for another shape."""
    if expected.shape != found.shape:
        return float("inf")
    return float(np.abs(found.astype(np.float64) - expected).max() / np.abs(expected).max())


def same(a: Any, b: Any) -> bool:
    """Whether two results are of the same types and hold the same bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return (
            a.dtype == b.dtype and a.requires_grad == b.requires_grad and same(a.numpy(force=True), b.numpy(force=True))
        )
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and same(list(a.values()), list(b.values()))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a.hex() == b.hex() if isinstance(a, float) else bool(a == b)


@pytest.mark.parametrize("skew", SKEWS, ids=lambda skew: skew.name)
def test_a_planted_skew_changes_the_result(skew: Skew, files: dict[str, Path], tmp_path: Path) -> None:
    expected = result(TRAIN, skew.function, files[skew.input])
    module, lines = write(skew, tmp_path)
    assert change(expected, result(module, skew.function, files[skew.input])) > ROUNDING
    assert lines and len(set(lines)) == len(lines)
    texts = []
    for file, number in (line.split(":") for line in lines):
        texts.append((tmp_path / file).read_text().splitlines()[int(number) - 1])
    for marker in skew.at:
        assert any(marker.splitlines()[0] in text for text in texts)
    if not skew.at:
        assert "\n".join(texts).count(skew.new.rstrip("\n")) >= 1


@pytest.mark.parametrize("refactoring", REFACTORINGS, ids=lambda refactoring: refactoring.name)
def test_a_refactoring_keeps_the_result(refactoring: Skew, files: dict[str, Path], tmp_path: Path) -> None:
    expected = result(TRAIN, refactoring.function, files[refactoring.input])
    module, lines = write(refactoring, tmp_path)
    assert module.read_text() != TRAIN.read_text() and not lines
    assert change(expected, result(module, refactoring.function, files[refactoring.input])) < ROUNDING


# What each program of the documents computes, as a pipeline: its file among the archives, and lines of it that differ.
AS_PIPELINE: dict[str, tuple[str, dict[str, str]]] = {
    "cough/precompute.py": ("cough/variants/no_highpass.yaml", {}),
    "cough/backend_pytorch.py": (
        "cough/variants/pytorch_backend.yaml",
        {"  - highpass: {cutoff_hz: 50.0, q: 0.707}\n": ""},
    ),
    "cough/backend_onnx.py": ("cough/variants/onnx_backend.yaml", {}),
    "orca/train.py": ("orca/pipeline.yaml", {}),
    "orca/serve.py": ("orca/variants/filterbank_20k.yaml", {"relative_to: reference": "relative_to: minimum"}),
    "portrait/train.py": ("portrait/pipeline.yaml", {}),
    "portrait/serve.py": ("portrait/variants/load_img.yaml", {f"  - {CAFFE}\n": ""}),
    "portrait/serve_fixed.py": ("portrait/variants/load_img.yaml", {CAFFE: RGB_MEANS}),
}


@pytest.mark.filterwarnings("ignore")  # pydub's, about the ffmpeg program, and torchaudio's, about empty mel filters
@pytest.mark.parametrize("program", AS_PIPELINE)
def test_a_documents_program_computes_what_our_pipeline_of_it_does(program: str, tmp_path: Path) -> None:
    if program.startswith("portrait"):
        # Upright: our pipeline of training turns pictures, which Keras leaves as they are stored.
        file = inputs.picture(tmp_path / "picture.png", orientation=1)
    else:
        file = inputs.recording(tmp_path / "recording.wav", seed=2)
    name, edits = AS_PIPELINE[program]
    text = (ARCHIVE / name).read_text()
    for old, new in edits.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    pipeline = Pipeline.from_dict(yaml.safe_load(text), folder=ARCHIVE / name.split("/")[0])
    with imported(PROGRAMS / program) as module:
        (annotation,) = list(module.network_input.__annotations__.values())[:1]
        found = np.asarray(module.network_input(file.read_bytes() if annotation is bytes else annotation(file)))
    expected = pipeline(file.read_bytes()).numpy()
    assert change(expected, found.reshape(expected.shape)) < 1e-6


def test_names_are_given_once() -> None:
    names = [edit.name for edit in SKEWS + REFACTORINGS]
    assert len(set(names)) == len(names)


def test_a_text_to_replace_occurs_exactly_once(tmp_path: Path) -> None:
    for old, times in (("waveform", r"\d\d"), ("not in train.py", "0")):
        with pytest.raises(ValueError, match=f"occurs {times} times and should occur once"):
            write(replace(SKEWS[0], old=old), tmp_path)
    with pytest.raises(ValueError, match="occurs 2 times"):
        write(replace(SKEWS[0], at=("high_pass(waveform",)), tmp_path)


def test_inputs_are_the_same_each_time(files: dict[str, Path], tmp_path: Path) -> None:
    again = inputs.recording(tmp_path / "again.wav"), inputs.picture(tmp_path / "again.jpg")
    assert [path.read_bytes() for path in again] == [files[name].read_bytes() for name in ("recording", "picture")]
    other = inputs.recording(tmp_path / "other.wav", seed=1)
    assert other.read_bytes() != again[0].read_bytes()


def test_awkward_python_gives_the_same_result_each_time() -> None:
    with imported(PROGRAMS / "awkward.py") as module:
        first, second = module.awkward(""), module.awkward("")
        assert len(first) == len(module.CASES) == 20
    assert [name for name in first if not same(first[name], second[name])] == []
