"""What a stage is, and what flows between stages."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypedDict

import torch

from skewless.core.catalogue import check
from skewless.core.errors import DefinitionError


class PipelineError(DefinitionError):
    """A pipeline definition that cannot be run as written."""


class InputError(ValueError):
    """An input that a stage cannot turn into numbers. `kind` says why, in the three ways that callers tell apart.

    kind: "malformed" (damaged, empty, not finite), "unsupported" (not a format that is read), "too_large".
    """

    def __init__(self, message: str, kind: str = "malformed"):
        super().__init__(message)
        self.kind = kind


class InputLimits(TypedDict, total=False):
    """What one input may be, as Payload has it; what is left out has no limit."""

    min_rate_hz: float
    max_rate_hz: float
    max_channels: float
    max_samples: float
    max_duration_s: float
    max_pixels: float
    check: Callable[[], None]


def _no_check() -> None:
    """Nothing to hold against anything: no server waits for the input."""


@dataclass(frozen=True)
class Payload:
    """The encoded bytes a pipeline starts from.

    `head_s(rate)` is how many seconds from the start can reach the pipeline's output, for audio recorded at
    `rate` Hz (`math.inf`: all of it). A decoder need not keep more than that in memory.
    min_rate_hz, max_rate_hz, max_channels: the sampling rates in Hz and the channels that a decoder may accept.
    max_samples: of all channels together, what a decoder may keep in memory, 4 bytes each.
    max_duration_s, max_pixels: the longest recording and the largest image that a decoder may accept.
    check: called between blocks of a recording and between stages; raises where there is no time left to go on.
    """

    data: bytes
    head_s: Callable[[int], float] = lambda rate: math.inf
    min_rate_hz: float = 0
    max_rate_hz: float = math.inf
    max_channels: float = math.inf
    max_samples: float = math.inf
    max_duration_s: float = math.inf
    max_pixels: float = math.inf
    check: Callable[[], None] = _no_check

    def admit(self, rate: int, channels: int) -> None:
        """Raise InputError for a sampling rate in Hz or a number of channels that is not accepted.

        A decoder asks with what the header says of the recording, before it takes memory for any of it: the rate decides
        how many samples a window of so many seconds has.
        """
        if not self.min_rate_hz <= rate <= self.max_rate_hz:
            raise InputError(
                f"the sampling rate is {rate:,} Hz, {self.min_rate_hz:,} to {self.max_rate_hz:,} Hz are accepted; convert the "
                "recording to a usual rate, such as 16000, 44100 or 48000 Hz",
                "malformed" if rate < self.min_rate_hz else "too_large",
            )
        if channels > self.max_channels:
            raise InputError(
                f"the recording has {channels:,} channels, at most {self.max_channels:,} are accepted; send fewer of them, or mix "
                "them to one",
                "too_large",
            )


@dataclass(frozen=True)
class Signal:
    """What one stage hands to the next.

    data: the stage's result; `trace` returns this.
    rate: sampling rate in Hz, while the data is a waveform `(channels, samples)`.
    metadata: what later stages or the post-processing need to know about the input and cannot read off `data`, such as
        the duration of a recording of which only the head was kept.
    """

    data: Any
    rate: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def of(self, data: torch.Tensor, *, rate: int | None = None, **metadata: Any) -> Signal:
        """The next signal: new data, the same rate unless given, metadata added."""
        return Signal(data, self.rate if rate is None else rate, {**self.metadata, **metadata})

    @property
    def sampling_rate(self) -> int:
        """The rate in Hz; raises PipelineError where there is none, because the pipeline does not start from a recording."""
        if self.rate is None:
            raise PipelineError(
                "a stage needs the sampling rate of a recording, and none is known; start the pipeline with 'decode', or with a "
                "stage of your own that sets the signal's rate"
            )
        return self.rate


@dataclass(frozen=True)
class Tolerance:
    """How far a stage's output may be from its record when the pipeline is replayed elsewhere, and why that far.

    mean, largest: of the absolute difference, in the stage's unit. With `relative` they are shares of the largest recorded
        value: 5e-4 for powers up to 20 allows 0.01.
    """

    mean: float
    largest: float
    why: str
    relative: bool = False


def each_row(function: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """What a function of rows `(S, ...)` gives, also for no row: then it is given one of zeros, and its result dropped.

    Some operations of torch refuse a batch of 0, which a recording has that is too short for one window."""
    # A graph is exported with rows, and for any number of them: asking for it would fix the number.
    if torch.compiler.is_compiling() or len(rows):
        return function(rows)
    return function(rows.new_zeros(1, *rows.shape[1:]))[:0]


# A few float32 operations on values of about the same size.
DEFAULT_TOLERANCE = Tolerance(5e-6, 5e-4, "float32 arithmetic", relative=True)


@dataclass(frozen=True)
class Stage:
    """One step of a pipeline, without state: `stage(signal) -> signal`.

    A stage is a frozen dataclass. Its fields are its parameters, and a pipeline file gives them:

        @dataclass(frozen=True)
        class PreEmphasis(Stage, name="pre_emphasis"):
            '''y[n] = x[n] - coefficient x[n - 1]: `(1, N)` float32 to `(1, N)`.'''

            unit: ClassVar[str] = "full scale"
            tolerance: ClassVar[Tolerance] = Tolerance(1e-6, 1e-5, "one float32 product and sum")
            packages: ClassVar[tuple[str, ...]] = ("torch",)

            coefficient: float

            def __call__(self, signal: Signal) -> Signal:
                x = signal.data
                return signal.of(torch.cat([x[:, :1], x[:, 1:] - self.coefficient * x[:, :-1]], dim=1))

    A default is given only where it is the field's convention; the normalised pipeline spells every parameter out. A stage
    computes the same output for the same input, and raises what it cannot do: InputError for the input's fault.

    name: what traces and reports call it.
    unit: of the output's values, such as "dB". Reports subtract outputs of the same unit only. "" for a stage that passes
        values on as they are, such as `replicate`: its output has the unit and the tolerance of the stage before.
        A stage that does not say has a unit of its own.
    tolerance: how exactly the output is reproduced on another machine. A stage with a unit that does not say has DEFAULT_TOLERANCE.
    packages: the packages that compute the output, as pip names them. Their versions are recorded with it.
    reads: of a stage that starts from encoded bytes, what they are: "audio" or "image".
    cheap: whether running the stage takes less time than reading its output from a disk. Training keeps what comes before
        the cheap stages at the end of a pipeline, and runs these every time.
    later: parameters that the stage did not have at first. At their defaults they are left out of a normalised definition:
        pipelines that were written before them keep their fingerprints, and archives built before them their proofs.
    comparison_only: True for a stage that imitates another system's fault, to measure it. It is never built into an archive.
    """

    name: ClassVar[str] = ""
    unit: ClassVar[str] = ""
    tolerance: ClassVar[Tolerance | None] = None
    packages: ClassVar[tuple[str, ...]] = ("torch",)
    reads: ClassVar[str] = ""
    cheap: ClassVar[bool] = False
    later: ClassVar[tuple[str, ...]] = ()
    comparison_only: ClassVar[bool] = False

    def __init_subclass__(cls, name: str, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls.name = name
        cls.unit = cls.__dict__.get("unit", name)
        if cls.unit and cls.tolerance is None:
            cls.tolerance = DEFAULT_TOLERANCE

    def __call__(self, signal: Signal) -> Signal:
        raise NotImplementedError

    def needs(self, seconds: float, rate: int) -> float:
        """Seconds of input, from the start, that determine the first `seconds` of output.

        rate: the recording's own sampling rate in Hz. A stage that computes each sample from those before it needs no more
        than it gives.
        """
        return seconds

    @property
    def fitted(self) -> bool:
        """Whether the stage has what it takes from a training set, such as a scaler's mean; True if it takes nothing."""
        return True

    def fit(self, data: torch.Tensor) -> Stage:
        """This stage with what it takes from a training set: `data` is what comes before it, for all recordings."""
        return self

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Stage:
        """The stage with a pipeline file's parameters; raises PipelineError for any that it does not know, lacks, or that
        has another type than annotated."""
        try:
            return cls(**check(cls, params, f"stage '{cls.name}'"))
        except DefinitionError as error:
            raise PipelineError(str(error)) from error

    def params(self) -> dict[str, Any]:
        """Every parameter, spelt out, in plain YAML types, but for those of `later` that have their default."""
        return {
            f.name: list(v) if isinstance(v, tuple) else v
            for f in dataclasses.fields(self)
            if (v := getattr(self, f.name)) != f.default or f.name not in self.later
        }

    def require(self, condition: bool, message: str) -> None:
        """Raise PipelineError with the stage's name unless `condition` holds."""
        if not condition:
            raise PipelineError(f"stage '{self.name}': {message}")
