"""Cutting a waveform into overlapping segments."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

from skewless.core.stages.stage import Signal, Stage, Tolerance


@dataclass(frozen=True)
class Cut:
    """A waveform's segments: `count` windows of `window` samples, one every `hop` samples of `waveform` `(span,)`, which ends
    with the last of them. truncated: whether `max_segments` left windows out."""

    waveform: torch.Tensor
    window: int
    hop: int
    count: int
    truncated: bool

    def signal(self, given: Signal, data: torch.Tensor) -> Signal:
        """What comes of a signal when `data` `(count, ...)` was computed from its segments."""
        rate = given.sampling_rate
        times = [(i * self.hop / rate, (i * self.hop + self.window) / rate) for i in range(self.count)]
        return given.of(
            data,
            segment_times_s=times,
            analyzed_s=min(times[-1][1], given.metadata["duration_s"]) if times else 0.0,
            truncated=self.truncated,
        )


@dataclass(frozen=True)
class Segment(Stage, name="segment"):
    """Windows of `duration_s` every `hop_s`, at most the first `max_segments`: `(1, N) -> (S, samples)`.

    tail "drop" keeps only windows that fit; "pad" keeps every window that starts inside the recording and
    zero-pads it.
    short: with "drop", what a recording shorter than one window becomes: "pad", one zero-padded window; "none", no window,
    `(0, samples)`. Post-processing that cannot answer without a window refuses such a recording.

    Metadata added: `segment_times_s` (start and end of each window), `analyzed_s` (end of the last one, at most the
    recording's duration), `truncated` (True when `max_segments` left windows out).
    """

    unit: ClassVar[str] = "full scale"
    tolerance: ClassVar[Tolerance] = Tolerance(3e-5, 3e-4, "cut out of what the filter before it gives")

    later: ClassVar[tuple[str, ...]] = ("short",)

    duration_s: float
    hop_s: float
    max_segments: int
    tail: Literal["drop", "pad"]
    short: Literal["pad", "none"] = "pad"

    def __post_init__(self):
        self.require(self.duration_s > 0, f"duration_s is {self.duration_s}, expected a positive number")
        self.require(self.hop_s > 0, f"hop_s is {self.hop_s}, expected a positive number")
        self.require(self.max_segments > 0, f"max_segments is {self.max_segments}, expected at least 1")
        self.require(
            self.tail == "drop" or self.short == "pad",
            "short none does nothing with tail pad, which pads every window; choose tail drop, or leave short out",
        )

    def __call__(self, signal: Signal) -> Signal:
        cut = self.cut(signal)
        if cut.count == 0:
            return cut.signal(signal, cut.waveform.new_empty(0, cut.window))
        return cut.signal(signal, cut.waveform.unfold(0, cut.window, cut.hop).contiguous())

    def cut(self, signal: Signal) -> Cut:
        """Where the segments of a waveform `(1, N)` lie; raises PipelineError for more than one channel."""
        channels = signal.data.shape[0]
        self.require(channels == 1, f"it takes one channel, got {channels}; add a 'downmix' stage before it")
        rate = signal.sampling_rate
        window, hop = int(self.duration_s * rate), int(self.hop_s * rate)
        total = signal.metadata["num_samples"]
        if self.tail == "drop":
            fitting = max(1 if self.short == "pad" else 0, 1 + (total - window) // hop)
        else:
            fitting = math.ceil(total / hop)
        count = min(fitting, self.max_segments)
        span = (count - 1) * hop + window if count else 0
        waveform = signal.data[0, :span]
        waveform = F.pad(waveform, (0, span - waveform.shape[0]))
        return Cut(waveform, window, hop, count, truncated=fitting > count)

    def needs(self, seconds: float, rate: int) -> float:
        return (self.max_segments - 1) * self.hop_s + self.duration_s
