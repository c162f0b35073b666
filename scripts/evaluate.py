#!/usr/bin/env python3
"""Measure a checkpoint on one split and write its reference predictions, through the code that will serve it."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from skewless.core.postprocess import build_postprocessor
from skewless.training.checkpoint import load_checkpoint
from skewless.evaluation.evaluate import evaluate
from skewless.training.manifest import SPLITS, read_manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="best.pth of a run")
    parser.add_argument("--manifest", type=Path, required=True, help="the manifest it was trained with")
    parser.add_argument(
        "--root", "--audio-root", type=Path, help="folder that file_path is relative to (default: the manifest's)"
    )
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--out", type=Path, required=True, help="folder for metrics, predictions, pictures, references")
    parser.add_argument("--references", type=int, default=8, help="files to keep for packaging")
    parser.add_argument(
        "--skip-unreadable", action="store_true", help="list and leave out recordings that cannot be read"
    )
    parser.add_argument("--device", default="cpu", help="the reference probabilities are this device's")
    args = parser.parse_args()
    if args.references < 2:
        parser.error(f"--references is {args.references}, expected at least 2")
    try:
        checkpoint = load_checkpoint(args.checkpoint)
        classes = build_postprocessor(checkpoint["postprocess"]).classes
        metrics = evaluate(
            checkpoint,
            args.checkpoint,
            read_manifest(args.manifest, args.root or args.manifest.parent, classes),
            args.split,
            args.out,
            torch.device(args.device),
            args.references,
            args.skip_unreadable,
        )
    except (ValueError, OSError, RuntimeError) as error:
        parser.exit(2, f"evaluate.py: {error}\n")
    if len(classes) == 2:
        best = metrics["at_best_threshold"]
        decided = (
            f"at threshold {best['threshold']:.2f}: precision {best['precision']:.3f}, recall {best['recall']:.3f}, "
        )
        decided += f"F1 {best['f1']:.3f}"
    else:
        decided = f"accuracy {metrics['accuracy']:.3f}, macro F1 {metrics['macro_f1']:.3f}"
    print(
        f"{args.out}: {metrics['recordings']} files of split '{args.split}', AUC {metrics['auc']:.4f}, "
        f"AP {metrics['average_precision']:.4f}, Brier {metrics['brier']:.4f}; {decided}"
    )


if __name__ == "__main__":
    main()
