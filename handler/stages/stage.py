"""What a stage is, and what flows between stages."""

from __future__ import annotations

import dataclasses
import inspect
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch


class PipelineError(ValueError):
    """A pipeline definition that cannot be run as written."""


class InputError(ValueError):
    """An input that a stage cannot turn into numbers. `kind` says why, in the three ways that callers tell apart.

    kind: "malformed" (damaged, empty, not finite), "unsupported" (not a format that is read), "too_large".
    """

    def __init__(self, message: str, kind: str = "malformed"):
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Payload:
    """The encoded bytes a pipeline starts from.

    `head_s(rate)` is how many seconds from the start can reach the pipeline's output, for audio recorded at
    `rate` Hz (`math.inf`: all of it). A decoder need not keep more than that in memory.
    max_duration_s, max_pixels: the longest recording and the largest image that a decoder may accept.
    """

    data: bytes
    head_s: Callable[[int], float] = lambda rate: math.inf
    max_duration_s: float = math.inf
    max_pixels: float = math.inf


@dataclass(frozen=True)
class Signal:
    """What one stage hands to the next.

    data: the stage's result; `trace` returns this.
    rate: sampling rate in Hz, while the data is a waveform `(channels, samples)`.
    facts: what later stages or the decision need to know about the input and cannot read off `data`, such as
        the duration of a recording of which only the head was kept.
    """

    data: Any
    rate: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def of(self, data: torch.Tensor, *, rate: int | None = None, **facts: Any) -> Signal:
        """The next signal: new data, the same rate unless given, facts added."""
        return Signal(data, self.rate if rate is None else rate, {**self.facts, **facts})


@dataclass(frozen=True)
class Tolerance:
    """How far a stage's output may be from its record when the whole pipeline is replayed elsewhere, and why that far.

    mean, largest: of the absolute difference, in `unit`; with `relative`, as shares of the largest recorded value.
    """

    mean: float
    largest: float
    unit: str
    why: str
    relative: bool = False


REGISTRY: dict[str, type[Stage]] = {}


@dataclass(frozen=True)
class Stage:
    """A pure function with explicit parameters: `stage(signal) -> signal`.

    A subclass is a frozen dataclass whose fields are the parameters; naming it in the class statement
    (`class Mel(Stage, name="mel")`) makes it available to pipeline files, and `tolerance` says how exactly its output is
    reproduced. A default is given only where it is the
    field's convention; the normalised pipeline spells every parameter out.

    unit: of the stage's output; differences are only taken between outputs in the same unit. A stage that does not say
        has one of its own; a stage that only copies has "", and neither unit nor tolerance but those of the stage before.
    reads: for a stage that starts from encoded bytes, of what: "audio" or "image".
    cheap: quicker to run than its output is to store, as at the end of a pipeline in training.
    """

    name: ClassVar[str] = ""
    tolerance: ClassVar[Tolerance | None] = None
    unit: ClassVar[str]
    reads: ClassVar[str] = ""
    cheap: ClassVar[bool] = False

    def __init_subclass__(cls, name: str, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls.name = name
        cls.unit = cls.__dict__.get("unit", name)
        REGISTRY[name] = cls

    def __call__(self, signal: Signal) -> Signal:
        raise NotImplementedError

    def needs(self, seconds: float, rate: int) -> float:
        """Seconds of input, from the start, that determine the first `seconds` of output.

        rate: the recording's own sampling rate in Hz. Causal and sample-by-sample stages need no more than
        they give.
        """
        return seconds

    @property
    def fitted(self) -> bool:
        """Whether the stage has what it takes from a training set; a stage that takes nothing has."""
        return True

    def fit(self, data: torch.Tensor) -> Stage:
        """This stage with what it takes from a training set: `data` is what comes before it, for all recordings."""
        return self

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Stage:
        """Build the stage from a pipeline file's parameters; raises PipelineError on any it does not know or lacks."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(map(str, set(params) - set(fields)))
        if unknown:
            known = ", ".join(fields) or "none"
            raise PipelineError(f"stage '{cls.name}': unknown parameter {', '.join(unknown)}; it takes: {known}")
        missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in params]
        if missing:
            raise PipelineError(f"stage '{cls.name}': missing parameter {', '.join(missing)}")
        types = typing.get_type_hints(cls)
        return cls(**{n: _convert(cls.name, n, v, types[n]) for n, v in params.items()})

    def params(self) -> dict[str, Any]:
        """Every parameter, spelt out, in plain YAML types."""
        return {
            f.name: list(v) if isinstance(v := getattr(self, f.name), tuple) else v for f in dataclasses.fields(self)
        }

    def require(self, condition: bool, message: str) -> None:
        """Raise PipelineError with the stage's name unless `condition` holds."""
        if not condition:
            raise PipelineError(f"stage '{self.name}': {message}")


def _convert(stage: str, name: str, value: Any, annotation: Any) -> Any:
    """`value` as the annotated type. An int is accepted where a float is meant (so 50 and 50.0 are one pipeline);
    nothing else is converted, so a quoted number or a yes/no is an error, not a surprise."""
    origin = typing.get_origin(annotation)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise PipelineError(f"stage '{stage}': {name} is {value!r}, expected a list")
        return tuple(_convert(stage, name, item, typing.get_args(annotation)[0]) for item in value)
    if origin is typing.Literal:
        if value not in typing.get_args(annotation):
            choices = ", ".join(map(str, typing.get_args(annotation)))
            raise PipelineError(f"stage '{stage}': {name} is {value!r}, expected one of: {choices}")
        return value
    if annotation is float and type(value) in (int, float):
        if not math.isfinite(value):
            raise PipelineError(f"stage '{stage}': {name} is {value!r}, expected a finite number")
        return float(value) + 0.0
    if inspect.isclass(annotation) and type(value) is annotation:
        return value
    raise PipelineError(f"stage '{stage}': {name} is {value!r}, expected {annotation.__name__}")
