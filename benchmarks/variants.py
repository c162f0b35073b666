#!/usr/bin/env python3
"""What each archive/cough/variants pipeline does to the decisions of a trained checkpoint, under recording conditions.

Every variant and the training pipeline score the same recordings, clean and changed: 30 dB quieter, with a DC offset,
with rumble, with noise. The changed ones are 16-bit WAV, as a recorder would have stored them.
"""

import argparse
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib
import numpy as np
import soundfile
import torch
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from skewless.core.pipeline import Pipeline
from skewless.training.checkpoint import load_checkpoint
from skewless.evaluation.scores import service_of
from skewless.training.manifest import read_manifest, select

matplotlib.use("Agg")
import matplotlib.pyplot as plt


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--audio-root", type=Path, help="folder that file_path is relative to (the manifest's)")
    parser.add_argument("--split", default="test")
    parser.add_argument("--threshold", type=float, required=True, help="the archive's, where decisions flip")
    parser.add_argument("--variants", type=Path, default=Path("archive/cough/variants"))
    parser.add_argument("--out", type=Path, required=True, help="folder for variants.json, variants.md, variants.png")
    args = parser.parse_args()
    try:
        service = service_of(load_checkpoint(args.checkpoint), torch.device("cpu"))
        rows = select(read_manifest(args.manifest, args.audio_root or args.manifest.parent), args.split)
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"variants.py: {error}\n")
    pipelines = {path.stem: Pipeline.from_yaml(path) for path in sorted(args.variants.glob("*.yaml"))}
    labels = [row.label for row in rows]
    table = []
    for name, condition in CONDITIONS.items():
        scores: dict[str, list[float]] = {"training": [], **{variant: [] for variant in pipelines}}
        for seed, row in enumerate(tqdm(rows, desc=name, unit="clip")):
            audio = recorded(row.path.read_bytes(), condition, seed)
            inputs = [service.pipeline(audio), *(pipeline(audio) for pipeline in pipelines.values())]
            for variant, output in zip(scores, service.runtime(inputs), strict=True):
                scores[variant].append(service.postprocessor.scores(output)[0])
        reference = np.array(scores.pop("training"))
        before = {"condition": name, "auc_training": float(roc_auc_score(labels, reference))}
        for variant, values in scores.items():
            change = np.abs(np.array(values) - reference)
            flips = (np.array(values) > args.threshold) != (reference > args.threshold)
            table.append(
                {
                    **before,
                    "variant": variant,
                    "mean_dp": float(change.mean()),
                    "max_dp": float(change.max()),
                    "flips": int(flips.sum()),
                    "recordings": len(rows),
                    "auc": float(roc_auc_score(labels, values)),
                    "accuracy_change": float(
                        np.mean((np.array(values) > args.threshold) == np.array(labels))
                        - np.mean((reference > args.threshold) == np.array(labels))
                    ),
                }
            )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "variants.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    (args.out / "variants.md").write_text(as_markdown(table), encoding="utf-8")
    picture(table, list(pipelines), args.out / "variants.png")
    print(as_markdown(table))


def as_markdown(table: list[dict]) -> str:
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


def picture(table: list[dict], variants: list[str], path: Path) -> None:
    """Mean |dp| of every variant under every condition."""
    figure, axes = plt.subplots(figsize=(9, 4.5))
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
    plt.close(figure)


if __name__ == "__main__":
    main()
