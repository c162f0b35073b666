"""What the variants of an archive's pipeline do to the decisions of its checkpoint, under recording conditions.

    python -m benchmarks.variants archive/cough --checkpoint runs/esc10/train/best.pth --manifest runs/esc10/manifest.csv \\
        --root ../shared/data/esc10/audio --threshold 0.95 --out runs/esc10/variants

Run it from the repository's root, for an archive of recordings in two classes. Every variant and the archive's own pipeline
score the same recordings, clean and changed: 30 dB quieter, with a DC offset, with rumble, with noise. The changed ones
are 16-bit WAV, as a recorder would have stored them. Writes variants.json, variants.md and variants.png.
"""

import argparse
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from skewless.core.definition import Definition
from skewless.core.pipeline import Pipeline
from skewless.core.service import ModelService
from skewless.evaluation.scores import service_of
from skewless.training.checkpoint import load_checkpoint
from skewless.training.manifest import SPLITS, Recording, read_manifest, select


def quiet(x: np.ndarray, rate: int, rng: np.random.RandomState) -> np.ndarray:
    return x * 10 ** (-30 / 20)


def offset(x: np.ndarray, rate: int, rng: np.random.RandomState) -> np.ndarray:
    return 0.8 * x + 0.1


def rumble(x: np.ndarray, rate: int, rng: np.random.RandomState) -> np.ndarray:
    """20 Hz at the recording's own peak level: a hand on the microphone, wind, traffic."""
    t = np.arange(len(x))[:, None] / rate
    return 0.45 * x + 0.45 * np.abs(x).max() * np.sin(2 * np.pi * 20 * t)


def noisy(x: np.ndarray, rate: int, rng: np.random.RandomState) -> np.ndarray:
    """White noise 10 dB below the recording's mean power."""
    return 0.7 * (x + rng.standard_normal(x.shape) * np.sqrt((x**2).mean()) * 10 ** (-10 / 20))


CONDITIONS: dict[str, Callable[..., np.ndarray] | None] = {
    "clean": None,
    "quiet (-30 dB)": quiet,
    "DC offset": offset,
    "rumble": rumble,
    "noisy": noisy,
}


def recorded(audio: bytes, condition: Callable[..., np.ndarray] | None, seed: int) -> bytes:
    """The recording as the condition would have left it; unchanged for None."""
    if condition is None:
        return audio
    x, rate = soundfile.read(io.BytesIO(audio), always_2d=True)
    file = io.BytesIO()
    soundfile.write(file, condition(x, rate, np.random.RandomState(seed)).clip(-1, 1), rate, "PCM_16", format="WAV")
    return file.getvalue()


def measure(
    service: ModelService, variants: Mapping[str, Pipeline], recordings: Sequence[Recording], threshold: float
) -> list[dict[str, Any]]:
    """One row per condition and variant, of plain JSON types."""
    labels = np.array([recording.label for recording in recordings])
    table = []
    for name, condition in CONDITIONS.items():
        pipelines = {"training": service.pipeline, **variants}
        scores: dict[str, list[float]] = {variant: [] for variant in pipelines}
        for seed, recording in enumerate(tqdm(recordings, desc=name, unit="file")):
            audio = recorded(recording.path.read_bytes(), condition, seed)
            inputs = [pipeline.run(audio, **service.input_limits).data for pipeline in pipelines.values()]
            for variant, outputs in zip(scores, service.runtime(inputs), strict=True):
                scores[variant] += service.postprocessor.scores(outputs)
        reference = np.array(scores.pop("training"))
        correct = float(np.mean((reference > threshold) == labels))
        for variant, values in ((variant, np.array(values)) for variant, values in scores.items()):
            change = np.abs(values - reference)
            table.append(
                {
                    "condition": name,
                    "auc_training": float(roc_auc_score(labels, reference)),
                    "variant": variant,
                    "mean_dp": float(change.mean()),
                    "max_dp": float(change.max()),
                    "flips": int(((values > threshold) != (reference > threshold)).sum()),
                    "recordings": len(recordings),
                    "auc": float(roc_auc_score(labels, values)),
                    "accuracy_change": float(np.mean((values > threshold) == labels)) - correct,
                }
            )
    return table


def as_markdown(table: list[dict[str, Any]]) -> str:
    lines = [
        "| variant | condition | mean abs dp | max abs dp | flips | accuracy | AUC (training's) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(table, key=lambda r: r["variant"]):
        lines.append(
            f"| {row['variant']} | {row['condition']} | {row['mean_dp']:.5f} | {row['max_dp']:.4f} | "
            f"{row['flips']} of {row['recordings']} | {100 * row['accuracy_change']:+.1f} points | "
            f"{row['auc']:.4f} ({row['auc_training']:.4f}) |"
        )
    return "\n".join(lines) + "\n"


def picture(table: list[dict[str, Any]], variants: list[str], path: Path) -> None:
    """Mean |dp| of every variant under every condition."""
    figure = Figure(figsize=(9, 4.5))
    axes = figure.add_subplot()
    width = 0.8 / len(CONDITIONS)
    for k, condition in enumerate(CONDITIONS):
        heights = [
            next(r["mean_dp"] for r in table if (r["variant"], r["condition"]) == (v, condition)) for v in variants
        ]
        axes.bar(np.arange(len(variants)) + (k - 2) * width, heights, width, label=condition)
    axes.set_xticks(np.arange(len(variants)), variants, rotation=15)
    axes.set(yscale="log", ylabel="mean |change of probability|", title="What each difference from training does")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.variants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("archive", type=Path, help="the definition's folder, with variants/*.yaml")
    parser.add_argument("--checkpoint", type=Path, required=True, help="best.pth of a run")
    parser.add_argument("--manifest", type=Path, required=True, help="the manifest it was trained with")
    parser.add_argument("--root", type=Path, help="folder that file_path is relative to (the manifest's)")
    parser.add_argument("--split", choices=SPLITS, default="test", help="(test)")
    parser.add_argument("--threshold", type=float, help="of the decisions (the postprocessor's)")
    parser.add_argument("--out", type=Path, required=True, help="folder for variants.json, variants.md, variants.png")
    args = parser.parse_args(argv)
    files = sorted((args.archive / "variants").glob("*.yaml"))
    if not files:
        parser.error(f"{args.archive} has no variants/*.yaml")
    try:
        service = service_of(Definition.read(args.archive), load_checkpoint(args.checkpoint), torch.device("cpu"))
        classes = service.postprocessor.classes
        if len(classes) != 2 or service.pipeline.reads != "audio":
            raise ValueError(
                f"{args.archive} is no archive of recordings in two classes; see benchmarks.archive_variants"
            )
        rows = select(read_manifest(args.manifest, args.root or args.manifest.parent, classes), args.split, classes)
        variants = {path.stem: Pipeline.from_yaml(path).with_fitted_stages_of(service.pipeline) for path in files}
        table = measure(service, variants, rows, service.threshold if args.threshold is None else args.threshold)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "variants.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    (args.out / "variants.md").write_text(as_markdown(table), encoding="utf-8")
    picture(table, list(variants), args.out / "variants.png")
    print(as_markdown(table))


if __name__ == "__main__":
    main()
