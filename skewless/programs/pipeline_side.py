"""One of our pipelines as a side of a comparison: every stage is a line of its pipeline.yaml."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml

from skewless import __version__
from skewless.core.definition import PIPELINE
from skewless.core.pipeline import Pipeline
from skewless.core.stages import InputError, Payload, PipelineError, Signal, Stage
from skewless.core.stages.image import CaffePreprocess
from skewless.core.stages.network_input import Standardize
from skewless.core.stages.spectrogram import Mel, Scale
from skewless.core.versions import library_versions
from skewless.errors import UsageError
from skewless.programs.program import Recorded, Side, TracedFunction, function_of
from skewless.programs.recorder import MIB, Place, Substitutes
from skewless.programs.trace import Call, Event, Item, Site, Trace, Value
from skewless.programs.values import measure, replaced
from skewless.programs.worker import ProgramError
from skewless.torchserve.archive import Archive
from skewless.training.checkpoint import load_checkpoint

Given = Mapping[Place, Mapping[str, np.ndarray]]
# What a stage computes with beside its input, as programs make it: each of these in one step, before the first recording.
_CONSTANTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "mel": (("window", "filterbank"),),
    "standardize": (("mean",), ("std",)),
    "caffe_preprocess": (("mean_bgr",),),
    "standard_scaler": (("mean", "std"),),
}
# How many arrays of a shape a program has, by the shape without axes of length 1.
Shapes = Counter[tuple[int, ...]]


class PipelineSide:
    """A pipeline.yaml, a model's folder, or an archive (.mar). Use it in a `with` block, or call `close`.

    Most programs take one segment after the other and stack them at the end. So from the stage that cuts a recording on, each
    stage is one event per segment, in order, and the last one's results are stacked. Where the program `beside` it
    computes on all segments at once, so does the trace. What a stage computes with, such as a filterbank, is a value of its
    own, and stages of a few operators are traced operator by operator: all on the stage's line.

    checkpoint: where stages take what training has fitted. memory: bytes of arrays to keep whole in one trace.
    Raises UsageError for a stage without its statistics, and for a path that is none of the three; PipelineError and
    CheckpointError for files that are wrong.
    """

    def __init__(self, path: Path, checkpoint: Path | None = None, memory: int = 256 * MIB):
        self.name = str(path)
        self.beside: Side | None = None
        self._memory = memory
        self._shapes: Shapes | None = None
        self._unpacked: tempfile.TemporaryDirectory[str] | None = None
        try:
            file = self._file(path)
            self.pipeline = _fitted(Pipeline.from_yaml(file), file, checkpoint)
            self._file_name, self._source = file.name, file.read_text(encoding="utf-8")
            self._sites = _sites(self._source, self._file_name)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> PipelineSide:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        if self._unpacked is not None:
            self._unpacked.cleanup()

    def _file(self, path: Path) -> Path:
        if path.is_dir():
            if not (path / PIPELINE).is_file():
                raise UsageError(f"the folder {path} has no {PIPELINE}, so it is no model's folder")
            return path / PIPELINE
        if path.suffix in (".yaml", ".yml"):
            if not path.is_file():
                raise UsageError(f"there is no file {path}")
            return path
        if path.suffix != ".mar":
            raise UsageError(f"{path} is no pipeline: name a pipeline.yaml, a model's folder or an archive (.mar)")
        self._unpacked = tempfile.TemporaryDirectory(prefix="skewless-")
        folder = Path(self._unpacked.name)
        with Archive(path) as archive:
            if PIPELINE not in archive:
                raise archive.refused(f"it has no {PIPELINE}")
            archive.extract(folder)
        return folder / PIPELINE

    def run(self, file: Path, substitutes: Substitutes | None = None, *, plain: bool = False) -> Trace:
        notes = _Notes(self._memory)
        given = substitutes or {}
        places = {(site.file, site.line) for site in self._sites}
        if lost := sorted({str(site) for site, _ in given if (site.file, site.line) not in places}):
            raise ProgramError(f"{self.name} has no stage at {', '.join(lost)}")
        shapes = self._shapes_beside(file)
        began = time.perf_counter()
        try:
            payload = file.read_bytes()
            if plain:
                data = self.pipeline.run(payload).data
                outputs: tuple[Item, ...] = (notes.item(data),)
            else:
                outputs = self._traced(Signal(Payload(payload)), given, shapes, notes)
        except (InputError, PipelineError, OSError) as error:
            raise ProgramError(f"{self.name} cannot take {file.name}: {error}") from error
        return Trace(
            self.name,
            file.name,
            tuple(notes.events),
            notes.values,
            outputs,
            notes.arrays,
            versions=library_versions(self.pipeline.packages),
            seconds=time.perf_counter() - began,
            notes=tuple(notes.texts),
            sources={self._file_name: self._source},
        )

    def _traced(self, signal: Signal, given: Given, shapes: Shapes | None, notes: _Notes) -> tuple[Item, ...]:
        now = _Items()
        stages = list(self.pipeline.stages.values())
        for number, (stage, (site, written)) in enumerate(zip(stages, self._sites.items(), strict=True)):
            call = _call(stage, written)
            constants: dict[str, Item] = {}
            for occurrence, names in enumerate(_CONSTANTS.get(stage.name, ())):
                # A statement of its own: programs make their constants elsewhere than they use them.
                place = dataclasses.replace(_shifted(site, 1), statement=-site.line)
                if arrays := given.get((place, occurrence)):
                    stage = _with_constants(stage, arrays)
                constants |= notes.constants(place, occurrence, call, _constants(stage, signal, names))
            *_, last = parts = _parts(stage)
            for at, part in enumerate(parts):
                place = site if part is last else _shifted(site, 2 + at)
                with torch.no_grad():
                    signal = part.compute(signal)
                rows = len(signal.data) if "segment_times_s" in signal.metadata else 1
                by_row, whole = _layout(tuple(signal.data.shape), rows, shapes, now.shape)
                returned = part is last and number == len(stages) - 1
                for occurrence in range(rows + 1):
                    for array in given.get((place, occurrence), {}).values():
                        try:
                            signal = _put(stage, signal, occurrence if by_row and occurrence < rows else None, array)
                        except (ValueError, RuntimeError) as error:
                            raise ProgramError(f"{site} ({stage.name}) cannot take the value: {error}") from error
                data = signal.data if returned else _as_beside(signal.data, shapes)
                used = tuple(item for name, item in constants.items() if part.uses is None or name in part.uses)
                whole = whole or not by_row or returned
                now = notes.stage(place, call, part.operation, data, now, used, by_row, whole)
        assert now.whole is not None
        return (now.whole,)

    def _shapes_beside(self, file: Path) -> Shapes | None:
        """What shapes the other program's values have; from one file, because segments have one shape in all."""
        if self._shapes is None and self.beside is not None and not isinstance(self.beside, PipelineSide):
            self._shapes = Counter(value.shape for value in self.beside.run(file).values.values())
        return self._shapes


class _Items:
    """What stands for a stage's result: one item for the whole, one for each segment, or both."""

    def __init__(self, rows: tuple[Item, ...] = (), whole: Item | None = None, shape: tuple[int, ...] | None = None):
        self.rows, self.whole = rows, whole
        # Of one segment, where the whole was given: the program has stacked, and does not take them apart again.
        self.shape = shape

    def for_row(self, at: int, count: int) -> tuple[Item, ...]:
        return (self.rows[at],) if len(self.rows) == count else self.for_whole()

    def for_whole(self) -> tuple[Item, ...]:
        return (self.whole,) if self.whole is not None else self.rows


class _Notes:
    """What is noted of one run."""

    def __init__(self, memory: int):
        self.events: list[Event] = []
        self.values: dict[str, Value] = {}
        self.arrays: dict[str, np.ndarray] = {}
        self.texts: dict[str, None] = {}
        self._memory = memory

    def item(self, data: torch.Tensor) -> Item:
        array = data.numpy()
        value = measure(array)
        if value.digest not in self.values:
            self.values[value.digest] = value
            if array.nbytes <= self._memory:
                self._memory -= array.nbytes
                self.arrays[value.digest] = array.copy()
            else:
                self.texts[
                    f"more arrays than fit into memory: some are compared by {len(value.sample)} of their numbers only"
                ] = None
        return Item(value.digest, "", "torch", tuple(array.shape), str(data.dtype).removeprefix("torch."))

    def constants(
        self, site: Site, occurrence: int, call: Call, constants: Mapping[str, torch.Tensor]
    ) -> dict[str, Item]:
        items = {name: dataclasses.replace(self.item(data), path=f".{name}") for name, data in constants.items()}
        outputs = tuple(items.values())
        self.events.append(Event(len(self.events), site, occurrence, ", ".join(constants), (), outputs, call))
        return items

    def stage(
        self,
        site: Site,
        call: Call,
        name: str,
        data: torch.Tensor,
        before: _Items,
        constants: tuple[Item, ...],
        by_row: bool,
        whole: bool,
    ) -> _Items:
        rows: tuple[Item, ...] = ()
        if by_row:
            rows = tuple(self.item(row) for row in data)
            for at, row in enumerate(rows):
                self._event(site, at, name, (*before.for_row(at, len(rows)), *constants), row, call)
        if not whole:
            return _Items(rows)
        item = self.item(data)
        if by_row:
            self._event(site, len(rows), "stack", rows, item, None)
        else:
            self._event(site, 0, name, (*before.for_whole(), *constants), item, call)
        return _Items(rows, item, _squeezed(data.shape[1:]))

    def _event(
        self, site: Site, occurrence: int, operation: str, inputs: tuple[Item, ...], output: Item, call: Call | None
    ) -> None:
        self.events.append(Event(len(self.events), site, occurrence, operation, inputs, (output,), call))


@dataclass(frozen=True)
class _Part:
    """A part of a stage. operation: as programs write it. uses: the stage's constants that it computes with; None: all."""

    operation: str
    compute: Callable[[Signal], Signal]
    uses: tuple[str, ...] | None = None


def _parts(stage: Stage) -> list[_Part]:
    """A stage that programs write as several operators, in these operators; any other as one part. They give its numbers."""
    steps: list[tuple[str, Callable[[torch.Tensor], torch.Tensor], tuple[str, ...]]]
    if isinstance(stage, Scale):
        (low, high), (bottom, top) = (stage.low, stage.high), stage.to
        steps = [
            ("-", lambda x: x - low, ()),
            ("/", lambda x: x / (high - low), ()),
            ("torch.clamp", lambda x: torch.clamp(x, 0.0, 1.0), ()),
            ("*", lambda x: x * (top - bottom), ()),
            ("+", lambda x: x + bottom, ()),
        ]
    elif isinstance(stage, Standardize):
        low, high = stage.input_range
        mean, std = (torch.tensor(numbers).view(1, -1, 1, 1) for numbers in (stage.mean, stage.std))
        dtype = getattr(torch, stage.arithmetic)
        steps = [
            ("-", lambda x: x.to(dtype) - low, ()),
            ("/", lambda x: x / (high - low), ()),
            ("-", lambda x: x - mean, ("mean",)),
            ("/", lambda x: x / std, ("std",)),
        ]
    elif isinstance(stage, CaffePreprocess):
        mean_bgr = torch.tensor(stage.mean_bgr).view(1, 3, 1, 1)
        steps = [("[]", lambda x: x.flip(1), ()), ("-", lambda x: x - mean_bgr, ("mean_bgr",))]
    else:
        return [_Part(stage.name, stage)]
    return [_Part(operation, _of_data(compute), uses) for operation, compute, uses in steps]


def _of_data(compute: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Signal], Signal]:
    return lambda signal: signal.of(compute(signal.data))


def _shifted(site: Site, by: int) -> Site:
    """The place of a stage's constants and parts: on its line, and not that of its result."""
    return dataclasses.replace(site, column=site.column + by)


def _constants(stage: Stage, signal: Signal, names: Sequence[str]) -> dict[str, torch.Tensor]:
    if isinstance(stage, Mel):
        return {"window": stage.window, "filterbank": stage.filterbank(stage.rate or signal.sampling_rate)}
    return {name: torch.tensor(getattr(stage, name)) for name in names}


def _with_constants(stage: Stage, arrays: Mapping[str, np.ndarray]) -> Stage:
    given = {path.removeprefix("."): array for path, array in arrays.items()}
    if isinstance(stage, Mel):
        changed = copy.copy(stage)
        for name, array in given.items():
            tensor = torch.from_numpy(array).float()
            # Its own attributes come before the class's, and a parameter for it there is not.
            vars(changed)[name] = tensor if name == "window" else lambda rate, tensor=tensor: tensor
        return changed
    numbers = {name: tuple(map(float, array.reshape(-1))) for name, array in given.items()}
    return dataclasses.replace(stage, **numbers)


def _as_beside(data: torch.Tensor, shapes: Shapes | None) -> torch.Tensor:
    """A picture (1, C, H, W) with its channels last where the program beside has them there first."""
    shape = _squeezed(data.shape)
    if shapes is None or len(shape) != 3 or data.ndim != 4:
        return data
    moved = (*shape[1:], *shape[:1])
    # A Counter keeps the order in which the shapes came.
    return (
        data if next((each for each in shapes if each in (shape, moved)), shape) == shape else data[0].permute(1, 2, 0)
    )


def _layout(
    shape: tuple[int, ...], rows: int, shapes: Shapes | None, stacked: tuple[int, ...] | None
) -> tuple[bool, bool]:
    """Whether the program beside has a value for each segment, and one for all of them. stacked: the shape of a segment of the
    last value that it had for all."""
    if rows == 1:
        return False, True
    if shapes is None:
        return True, False
    row = _squeezed(shape[1:])
    # One array of all segments is what is returned in the end.
    all_of_them = sum(count for each, count in shapes.items() if len(each) == len(row) + 1 and each[1:] == row)
    whole = all_of_them > 1 or (all_of_them == 1 and not shapes[row])
    return not whole or (shapes[row] > 0 and stacked != row), whole


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(length for length in shape if length != 1)


def _put(stage: Stage, signal: Signal, row: int | None, array: np.ndarray) -> Signal:
    """The signal with other numbers in place of its data, or of one segment's."""
    data = signal.data
    if row is not None:
        new = replaced(data[row], "", _shaped(array, tuple(data[row].shape)))
        if new.shape != data[row].shape:
            raise ValueError(f"a segment of shape {tuple(data[row].shape)} cannot become {tuple(new.shape)}")
        return signal.of(torch.cat([data[:row], new.to(data.dtype)[None], data[row + 1 :]]))
    data = replaced(data, "", _shaped(array, tuple(data.shape)))
    if "num_samples" not in signal.metadata or "segment_times_s" in signal.metadata:
        return signal.of(data)
    # All samples are here: no head was cut.
    signal = signal.of(data, num_samples=data.shape[-1])
    return signal.of(data, peak=float(data.abs().max())) if stage.reads else signal


def _shaped(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The array with the axes that a stage's result of this shape has, which may have other lengths."""
    bare = np.squeeze(array)
    long = [at for at, length in enumerate(shape) if length != 1]
    if bare.ndim == len(long) == 3 and bare.shape != _squeezed(shape):
        # Pictures whose channels are last, as numpy and PIL have them, or first.
        moved = (np.moveaxis(bare, -1, 0), np.moveaxis(bare, 0, -1))
        bare = next((each for each in moved if each.shape == _squeezed(shape)), bare)
    if array.ndim == len(shape) and bare.shape != _squeezed(shape):
        return array
    if bare.ndim != len(long):
        raise ValueError(f"an array of shape {tuple(array.shape)} is not laid out as {shape}")
    lengths = iter(bare.shape)
    return bare.reshape([next(lengths) if length != 1 else 1 for length in shape])


def _call(stage: Stage, given: tuple[str, ...]) -> Call:
    kind = type(stage)
    arguments = {name: repr(value) for name, value in stage.params().items()}
    return Call(f"{kind.__module__}.{kind.__qualname__}", arguments, given, "skewless", __version__)


def _sites(source: str, file: str) -> dict[Site, tuple[str, ...]]:
    """The place of each stage in a pipeline file that was read before, with the parameters that are written there."""
    root = yaml.compose(source, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    stages = next(value for key, value in root.value if key.value == "stages")
    found = {}
    for stage in stages.value:
        ((_, params),) = stage.value
        start, end = stage.start_mark, params.end_mark
        lines = [line for line in source[start.index : end.index].splitlines() if not line.lstrip().startswith("#")]
        text = " ".join(" ".join(lines).split())
        line = start.line + 1
        found[Site(file, line, start.column, text, statement=line)] = tuple(key.value for key, _ in params.value)
    if len(found) < len(stages.value):
        raise UsageError(f"a stage of {file} is written once and used twice; write out what its aliases (*name) mean")
    return found


def _fitted(pipeline: Pipeline, file: Path, checkpoint: Path | None) -> Pipeline:
    if checkpoint is not None:
        folder = file.resolve().parent
        folder = folder.parent if folder.name == "variants" else folder
        trained = Pipeline.from_dict(load_checkpoint(checkpoint)["pipeline"], folder)
        pipeline = pipeline.with_fitted_stages_of(trained)
    if pipeline.unfitted:
        where = (
            f"{checkpoint} has none either" if checkpoint else "give the checkpoint that has them, with --checkpoint"
        )
        raise UsageError(f"stage '{pipeline.unfitted[0]}' of {file} lacks the statistics of a training set; {where}")
    return pipeline


def side_of(text: str, code: Sequence[Path] = (), checkpoint: Path | None = None, memory: int = 256 * MIB) -> Side:
    """What a command's argument names: `FILE.py:function`, a recorded `*.trace`, a pipeline's `*.yaml`, a model's folder, or a
    `.mar` archive.

    code: further folders whose modules are the user's. checkpoint: for a pipeline whose stages are fitted in training. memory: bytes
    of arrays that one run keeps whole.
    Raises UsageError for anything else.
    """
    path = Path(text)
    if path.is_dir() or path.suffix in (".yaml", ".yml", ".mar"):
        return PipelineSide(path, checkpoint, memory)
    if path.suffix == ".trace":
        return Recorded(path)
    if ".py:" in text or path.suffix == ".py":
        return TracedFunction(function_of(text, code), memory)
    raise UsageError(
        f"{text!r} names no program: write FILE.py:function, a trace (*.trace) that `skewless trace` wrote, a pipeline.yaml, a "
        "model's folder, or an archive (.mar)"
    )


def sides_of(
    reference: str,
    candidate: str,
    code: Sequence[Path] = (),
    checkpoint: Path | None = None,
    memory: int = 256 * MIB,
) -> tuple[Side, Side]:
    """Both sides of a comparison as `side_of` gives them, each knowing the other: a pipeline then computes segment by segment
    where the program does."""
    first = side_of(reference, code, checkpoint, memory)
    try:
        second = side_of(candidate, code, checkpoint, memory)
    except BaseException:
        first.close()
        raise
    for side, other in ((first, second), (second, first)):
        if isinstance(side, PipelineSide):
            side.beside = other
    return first, second
