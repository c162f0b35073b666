"""The skew report's pictures, as SVG data URIs that follow the reader's light or dark theme."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from skewless.html_page import PALETTE
from skewless.skew.measure import Output

_LIGHT = {name: light for name, (light, _) in PALETTE.items()}
_STYLE: Any = {
    "svg.fonttype": "path",
    "svg.hashsalt": "skew",
    "font.size": 10,
    "text.color": _LIGHT["ink"],
    "axes.edgecolor": _LIGHT["muted"],
    "axes.labelcolor": _LIGHT["ink"],
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": _LIGHT["muted"],
    "ytick.color": _LIGHT["muted"],
    "xtick.labelcolor": _LIGHT["ink"],
    "ytick.labelcolor": _LIGHT["ink"],
    "grid.color": _LIGHT["grid"],
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Picture:
    """An image as a data URI, its width in CSS pixels, and what it shows, for those who do not see it."""

    uri: str
    width: int
    alt: str


@dataclass(frozen=True)
class Example:
    """One recording to show: its entry in the report, and every stage's output in both pipelines, in order."""

    entry: dict[str, Any]
    reference: Mapping[str, Output]
    candidate: Mapping[str, Output]


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    figure.patch.set_alpha(0.0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0.0)
    return figure, axes


def _picture(figure: Figure, alt: str) -> Picture:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    for name, colour in _LIGHT.items():
        svg = svg.replace(colour, f"var(--{name})")
    light, dark = (";".join(f"--{name}:{pair[k]}" for name, pair in PALETTE.items()) for k in (0, 1))
    style = f"<style>:root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
    start = svg.index("<svg")
    at = svg.index(">", start) + 1
    svg = svg[start:at] + style + svg[at:]
    uri = "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
    return Picture(uri, round(figure.get_figwidth() * 96), alt)


def attribution(report: dict[str, Any]) -> Picture:
    """Each edit's mean absolute change of the probability, alone and in pipeline order, with the largest as a line."""
    with matplotlib.rc_context(_STYLE):
        edits = report["edits"]
        names = [e["edit"] for e in edits] + ["all together"]
        alone = [e["alone"] for e in edits] + [report["together"]]
        in_order = [e["in_order"] for e in edits] + [None]
        figure, axes = _figure(9.4, 1.1 + 0.52 * len(names))
        rows = np.arange(len(names))
        for effects, offset, colour, label in (
            (alone, -0.19, "reference", "alone"),
            (in_order, 0.19, "candidate", "in pipeline order, after the edits above"),
        ):
            drawn = [(row, e) for row, e in zip(rows, effects, strict=True) if e and e["mean_abs"] is not None]
            # The last row is neither: it is the sum.
            colours = [_LIGHT["muted"] if row == rows[-1] else _LIGHT[colour] for row, _ in drawn]
            at = [row + (0 if row == rows[-1] else offset) for row, _ in drawn]
            axes.barh(at, [e["mean_abs"] for _, e in drawn], height=0.34, color=colours)
            axes.hlines(at, 0, [e["max_abs"] for _, e in drawn], colors=colours, linewidth=1.4)
            axes.plot([e["max_abs"] for _, e in drawn], at, "|", color=_LIGHT["ink"], markersize=6)
            axes.barh([np.nan], [np.nan], color=_LIGHT[colour], label=label)
        axes.set_yticks(rows, names)
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel("absolute change of the probability: bar = mean, line = largest over the recordings")
        axes.grid(axis="x")
        axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=2)
        told = "; ".join(
            f"{name} {e['mean_abs']:.2g}" for name, e in zip(names, alone, strict=True) if e["mean_abs"] is not None
        )
        return _picture(figure, f"Bar chart of the mean absolute change of the probability by each edit alone: {told}.")


def decisions(report: dict[str, Any]) -> Picture:
    """Reference against candidate probability, one dot per recording; where a decision changes, the ground is tinted."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(4.9, 4.6)
        threshold = report["threshold"]
        if len(report["classes"]) == 2:  # with more, the highest probability decides, wherever it lies
            for x, y in ((0.0, threshold), (threshold, 0.0)):
                width, height = (threshold, 1 - threshold) if x == 0.0 else (1 - threshold, threshold)
                axes.add_patch(Rectangle((x, y), width, height, color=_LIGHT["flip"], alpha=0.12, linewidth=0))
            axes.axhline(threshold, color=_LIGHT["muted"], linestyle="--", linewidth=0.9)
            axes.axvline(threshold, color=_LIGHT["muted"], linestyle="--", linewidth=0.9)
        axes.plot([0, 1], [0, 1], color=_LIGHT["muted"], linewidth=0.9)
        looks = [("s", "none"), ("o", _LIGHT["ink"]), ("^", "none"), ("D", _LIGHT["ink"]), ("v", "none")]
        marks = {f"labelled {name}": (name, *looks[k % len(looks)]) for k, name in enumerate(report["classes"])}
        for name, (label, marker, filling) in (marks | {"recording": (None, "o", _LIGHT["ink"])}).items():
            chosen = [r["probability"] for r in report["recordings"] if r["label"] == label]
            if chosen:
                x, y = [p["reference"] for p in chosen], [p["candidate"] for p in chosen]
                axes.plot(x, y, marker, color=_LIGHT["ink"], markerfacecolor=filling, markersize=5.5, label=name)
        flipped = [r["probability"] for r in report["recordings"] if _flipped(r)]
        if flipped:
            x, y = [p["reference"] for p in flipped], [p["candidate"] for p in flipped]
            axes.plot(x, y, "o", color=_LIGHT["flip"], markerfacecolor="none", markersize=12, label="decision changes")
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes.set(xlabel="probability, reference", ylabel="probability, candidate")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=9)
        return _picture(
            figure,
            f"Scatter plot of {report['recordings_compared']} recordings, reference probability against candidate "
            f"probability; {len(flipped)} lie where the decision changes.",
        )


def _flipped(entry: dict[str, Any]) -> bool:
    return entry["chosen"]["reference"] != entry["chosen"]["candidate"]


def waveform(example: Example) -> Picture | None:
    """The last waveform before segmentation in both pipelines, as envelopes; None where a pipeline has none."""
    reference, candidate = _last_waveform(example.reference), _last_waveform(example.candidate)
    if reference is None or candidate is None:
        return None
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.4, 3.0))
        figure.patch.set_alpha(0.0)
        peaks = {}
        panels = figure.subplots(2, sharex=True, sharey=True)
        sides = (("reference", *reference), ("candidate", *candidate))
        for axes, (side, samples, rate) in zip(panels, sides, strict=True):
            width = math.ceil(len(samples) / 1200)
            padded = np.pad(samples, (0, -len(samples) % width)).reshape(-1, width)
            times = np.arange(len(padded)) * width / rate
            axes.fill_between(times, padded.min(axis=1), padded.max(axis=1), color=_LIGHT[side], linewidth=0.4)
            peaks[side] = float(np.abs(samples).max())
            axes.set(ylabel=f"{side}\n(full scale)", facecolor="none")
            axes.margins(x=0)
            axes.grid(axis="y")
        panels[-1].set_xlabel("time (s)")
        alt = f"Waveforms of {example.entry['name']} before segmentation; peak {peaks['reference']:.3f} in the reference, "
        return _picture(figure, alt + f"{peaks['candidate']:.3f} in the candidate.")


def _last_waveform(trace: Mapping[str, Output]) -> tuple[np.ndarray, int] | None:
    """The first channel `(N,)` of the last waveform before segmentation, and its sampling rate in Hz."""
    found = [
        (signal.data[0].numpy(), signal.rate)
        for signal, unit in trace.values()
        if unit == "full scale" and signal.rate and "segment_times_s" not in signal.metadata
    ]
    return found[-1] if found else None


def timeline(example: Example, threshold: float) -> Picture | None:
    """Segment probabilities of both pipelines at the middle of each segment; the recording's own at the right. None where
    an input is judged as a whole."""
    if not any(example.entry["segments"][side]["times_s"] for side in ("reference", "candidate")):
        return None
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(9.4, 2.7)
        end = 0.0
        for side, marker in (("reference", "o"), ("candidate", "s")):
            segments = example.entry["segments"][side]
            middles = [(start + stop) / 2 for start, stop in segments["times_s"]]
            end = max([end] + [stop for _, stop in segments["times_s"]])
            style: dict[str, Any] = {"color": _LIGHT[side], "markersize": 5 if marker == "o" else 4}
            axes.plot(
                middles, segments["probabilities"], f"{marker}-", linewidth=1.2, label=f"{side}, segments", **style
            )
        for side, marker in (("reference", "o"), ("candidate", "s")):
            p = example.entry["probability"][side]
            axes.plot(
                end * 1.02, p, marker, color=_LIGHT[side], markersize=10, clip_on=False, label=f"{side}, recording"
            )
        axes.axhline(threshold, color=_LIGHT["muted"], linestyle="--", linewidth=1, label=f"threshold {threshold:g}")
        axes.set(ylim=(0, 1), xlim=(0, end * 1.02), xlabel="middle of the segment (s)", ylabel="probability")
        axes.grid(axis="y")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5, fontsize=9, columnspacing=1.2)
        counts = {side: len(example.entry["segments"][side]["probabilities"]) for side in ("reference", "candidate")}
        p = example.entry["probability"]
        return _picture(
            figure,
            f"Segment probabilities over time: {counts['reference']} segments in the reference, {counts['candidate']} in "
            f"the candidate. Recording: {p['reference']:.4f} and {p['candidate']:.4f}; threshold {threshold:g}.",
        )


@dataclass(frozen=True)
class Images:
    """The images of one segment in both pipelines and their difference; None where a side does not have the segment."""

    title: str
    reference: Picture | None
    candidate: Picture | None
    difference: Picture | None


def segment_images(example: Example) -> list[Images]:
    """What the network sees: of the shared segment that differs most, and of the last segment that only one side has.

    From the last one-channel images `(S, H, W)` of each pipeline, or, where it has only images of several channels
    `(S, C, H, W)`, the first channel of the last. Empty where a pipeline has neither.
    """
    reference, candidate = _last_images(example.reference), _last_images(example.candidate)
    if reference is None or candidate is None:
        return []
    stage, unit, a, times = reference
    _, _, b, other_times = candidate
    shared, height, width = (min(m, n) for m, n in zip(a.shape, b.shape, strict=True))
    delta = b[:shared, :height, :width] - a[:shared, :height, :width]
    chosen = int(np.abs(delta).mean(axis=(1, 2)).argmax())
    both = [a[chosen], b[chosen]]
    limits = min(float(x.min()) for x in both), max(float(x.max()) for x in both)
    name = _segment_name(chosen, times)
    rank = ", the shared one that differs most" if delta.any() else ", the same in both, as every shared one"
    if shared == 1:
        rank = "" if delta.any() else ", the same in both"
    found = [
        Images(
            f"{name}{rank} (output of '{stage}')",
            _image(both[0], times[chosen], "magma", limits, unit, f"Reference, {name}"),
            _image(both[1], times[chosen], "magma", limits, unit, f"Candidate, {name}"),
            _difference_image(delta[chosen], times[chosen], unit, name),
        )
    ]
    if len(a) != len(b):
        side, images, all_times = ("reference", a, times) if len(a) > len(b) else ("candidate", b, other_times)
        name = _segment_name(len(images) - 1, all_times)
        drawn = _image(images[-1], all_times[-1], "magma", limits, unit, f"{side.capitalize()}, {name}")
        title = f"{name}, the last of {abs(len(a) - len(b))} that only the {side} has"
        alone = (drawn, None) if side == "reference" else (None, drawn)
        found.append(Images(title, alone[0], alone[1], None))
    return found


def _segment_name(index: int, times: Sequence[tuple[float, float] | None]) -> str:
    window = times[index]
    if window is None:
        return "The image"
    start, stop = window
    return f"Segment {index + 1}, {start:g} to {stop:g} s"


def _last_images(
    trace: Mapping[str, Output],
) -> tuple[str, str, np.ndarray, Sequence[tuple[float, float] | None]] | None:
    """The stage, its unit, the images `(S, H, W)` and each one's start and end in seconds, or None for a picture's."""
    found = [(key, output) for key, output in trace.items() if output.signal.data.ndim == 3]
    found = found or [(key, output) for key, output in trace.items() if output.signal.data.ndim == 4]
    if not found:
        return None
    key, (signal, unit) = found[-1]
    images = signal.data.float().numpy()
    images = images if images.ndim == 3 else images[:, 0]
    return key, unit, images, signal.metadata.get("segment_times_s", [None] * len(images))


def _difference_image(delta: np.ndarray, times: tuple[float, float] | None, unit: str, name: str) -> Picture:
    """Candidate minus reference, zero in the middle; the colours end at the 99.9th percentile."""
    distance = np.abs(delta)
    limit = float(np.quantile(distance, 0.999)) or float(distance.max()) or 1.0
    alt = f"Candidate minus reference, {name}: largest {distance.max():.3g}, mean {distance.mean():.3g}"
    return _image(delta, times, "RdBu_r", (-limit, limit), f"candidate minus reference ({unit})", alt)


def _image(
    values: np.ndarray,
    times: tuple[float, float] | None,
    colours: str,
    limits: tuple[float, float],
    label: str,
    alt: str,
) -> Picture:
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(3.5, 3.9)
        how: dict[str, Any] = {"cmap": colours, "vmin": limits[0], "vmax": limits[1], "interpolation": "none"}
        if times is None:
            shown = axes.imshow(values, **how)
            axes.set(xlabel="column (first channel)", ylabel="row")
        else:
            shown = axes.imshow(values, origin="lower", extent=(*times, 0, values.shape[0]), aspect="auto", **how)
            axes.set(xlabel="time (s)", ylabel="image row (low frequencies below)")
        clipped = "both" if np.abs(values).max() > max(map(abs, limits)) * (1 + 1e-6) else "neither"
        bar = figure.colorbar(shown, ax=axes, location="bottom", label=label, extend=clipped, aspect=28)
        bar.ax.xaxis.set_major_locator(MaxNLocator(5))
        bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        bar.outline.set_visible(False)
        return _picture(figure, alt + ".")
