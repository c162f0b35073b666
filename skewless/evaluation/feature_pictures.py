"""What the voice features of labelled recordings look like: pictures of how the classes differ, and a table of meanings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from skewless.core.pipeline import Pipeline
from skewless.core.stages import InputError
from skewless.core.stages.voice import Feature, VoiceFeatures, describe
from skewless.evaluation.pictures import plt, save
from skewless.training.cache import report_unreadable
from skewless.training.manifest import Recording

_COLOURS = ("tab:orange", "tab:blue", "tab:green", "tab:red", "tab:purple")


def write_pictures(
    recordings: list[Recording],
    pipeline: Pipeline,
    classes: Sequence[str],
    out: Path,
    *,
    skip_unreadable: bool = False,
) -> dict[str, Any]:
    """Write mfcc.png, spectral.png, features.md and features.json to `out`; returns what features.json holds.

    classes: the labels' names. Raises ValueError for a pipeline without voice features; UnreadableRecordings listing those
    it cannot read, unless `skip_unreadable`, which prints the list.
    """
    stage = next((s for s in pipeline.stages.values() if isinstance(s, VoiceFeatures)), None)
    if stage is None:
        raise ValueError(
            f"pipeline '{pipeline.name}' has no stage 'voice_features'; it has: {', '.join(pipeline.stages)}"
        )
    values, labels = _measure(recordings, pipeline, stage, skip_unreadable)
    groups = {name: values[labels == number] for number, name in enumerate(classes)}
    if empty := [name for name, group in groups.items() if not len(group)]:
        raise ValueError(f"there is no recording of class {', '.join(empty)} to draw")
    table = _table(describe(stage.n_mfcc), groups)
    out.mkdir(parents=True, exist_ok=True)
    (out / "features.json").unlink(missing_ok=True)
    _draw_mfcc(out / "mfcc.png", groups, stage.n_mfcc)
    _draw_spectral(out / "spectral.png", groups, describe(stage.n_mfcc)[2 * stage.n_mfcc :])
    (out / "features.md").write_text(_markdown(table), encoding="utf-8")
    # Last, so that a folder with features.json is complete.
    (out / "features.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    return table


def _measure(
    recordings: list[Recording], pipeline: Pipeline, stage: VoiceFeatures, skip_unreadable: bool
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The features `(N, F)`, before any scaling, and the labels `(N,)`, of the recordings that can be read."""
    rows, labels, failures = [], [], {}
    for recording in tqdm(recordings, desc="features", unit="file"):
        try:
            for name, signal in pipeline.steps(recording.path.read_bytes()):
                # What follows, such as a scaler that training has not fitted yet, is not run.
                if pipeline.stages[name] is stage:
                    rows.append(signal.data[0].numpy())
                    break
        except InputError as error:
            failures[recording.file_path] = str(error)
            continue
        labels.append(recording.label)
    report_unreadable(failures, skip_unreadable)
    return np.array(rows), np.array(labels)


def _table(features: Sequence[Feature], groups: dict[str, NDArray]) -> dict[str, Any]:
    entries = []
    for column, feature in enumerate(features):
        spread = {
            name: {"mean": float(group[:, column].mean(dtype=float)), "std": float(group[:, column].std(dtype=float))}
            for name, group in groups.items()
        }
        entries.append({**feature._asdict(), "classes": spread})
    return {"recordings": {name: len(group) for name, group in groups.items()}, "features": entries}


def _markdown(table: dict[str, Any]) -> str:
    names = list(table["recordings"])
    counted = ", ".join(f"{count} {name}" for name, count in table["recordings"].items())
    heads = ["", "feature", "meaning", "unit", *names]
    lines = [
        "# Features",
        "",
        f"Mean and standard deviation over {counted} recordings, in the order in which the network gets them.",
        "",
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
    ]
    for number, entry in enumerate(table["features"], start=1):
        spread = [f"{entry['classes'][name]['mean']:.3g} ± {entry['classes'][name]['std']:.2g}" for name in names]
        cells = [str(number), f"`{entry['name']}`", entry["meaning"], entry["unit"], *spread]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _draw_mfcc(path: Path, groups: dict[str, NDArray], count: int) -> None:
    """Per class the mean of every coefficient's average and of its variation, with one standard deviation around."""
    figure, grid = plt.subplots(2, 2, figsize=(10, 6.5), gridspec_kw={"width_ratios": [1, 9]}, squeeze=False)
    for row, (start, what) in zip(
        grid, ((0, "mean over a recording"), (count, "standard deviation\nover a recording")), strict=True
    ):
        # The first one, the level, is some ten times the others.
        for axes, columns in zip(row, (range(1), range(1, count)), strict=True):
            for number, (name, group) in enumerate(groups.items()):
                part = group[:, [start + k for k in columns]]
                # Side by side, so that no class's bar hides another's.
                place = np.array(columns) + 0.16 * (number - (len(groups) - 1) / 2)
                axes.errorbar(
                    place,
                    part.mean(axis=0),
                    yerr=part.std(axis=0),
                    fmt="o",
                    markersize=5,
                    capsize=3,
                    color=_COLOURS[number % len(_COLOURS)],
                    label=f"{name} ({len(group)})",
                )
            axes.set_xticks(list(columns))
            axes.grid(axis="y", alpha=0.3)
            axes.margins(x=0.3 if len(columns) == 1 else 0.03)
        row[0].set_ylabel(f"{what}, dB")
    grid[0, 1].legend(title="class (recordings)")
    grid[1, 1].set_xlabel(
        "mel-frequency cepstral coefficient: 0 level, 1 tilt, higher ones finer shape of the spectrum"
    )
    figure.suptitle("MFCC by class: mean and one standard deviation over the recordings")
    save(figure, grid[0, 0], path, grid=False)


def _draw_spectral(path: Path, groups: dict[str, NDArray], features: Sequence[Feature]) -> None:
    """Per class the distribution of each of the last features, those that are no MFCC."""
    width = 4
    figure, grid = plt.subplots(-(-(len(features) + 1) // width), width, figsize=(11, 8))
    panels = iter(grid.flat)
    for column, feature in enumerate(features, start=-len(features)):
        axes = next(panels)
        values = {name: group[:, column] for name, group in groups.items()}
        # Outliers go into the first and the last bin: one of them would else leave a single bin for all others.
        low, high = np.quantile(np.concatenate(list(values.values())), [0.01, 0.99])
        bins = np.linspace(low, high if high > low else low + 1, 13)
        for number, (name, column_values) in enumerate(values.items()):
            shade = _COLOURS[number % len(_COLOURS)]
            style = {"bins": bins, "weights": np.full(len(column_values), 100 / len(column_values)), "color": shade}
            axes.hist(column_values.clip(low, high), histtype="stepfilled", alpha=0.2, **style)
            axes.hist(column_values.clip(low, high), histtype="step", linewidth=1.5, label=name, **style)
            axes.axvline(np.median(column_values), color=shade, linestyle="--", linewidth=1.2)
        axes.set(title=feature.name, xlabel="" if feature.unit == "1" else feature.unit)
        axes.title.set_fontsize(11)
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="y", alpha=0.3)
    for axes in grid[:, 0]:
        axes.set_ylabel("% of the class's recordings")
    handles, names = grid[0, 0].get_legend_handles_labels()
    spare = next(panels)
    spare.legend(handles, names, loc="center", fontsize=12, title="class\n(dashed: its median)", title_fontsize=11)
    for axes in (spare, *panels):
        axes.axis("off")
    figure.suptitle("Voice features by class: mean and standard deviation (std) over each recording's frames")
    save(figure, grid[0, 0], path, grid=False)
