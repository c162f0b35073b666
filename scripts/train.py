#!/usr/bin/env python3
"""Train a detector from a manifest of labelled recordings. Run again with the same --out, it continues."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from handler.definition import read_config
from handler.pipeline import Pipeline
from training.fit import Config, describe_run, fit
from training.manifest import read_manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--manifest", type=Path, required=True, help="CSV with file_path, cough_label, split")
    parser.add_argument(
        "--audio-root", type=Path, help="folder that file_path is relative to (default: the manifest's)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run, such as runs/NAME")
    parser.add_argument("--archive", type=Path, default=Path("archive/cough"), help="definition to train for")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="spectrogram cache")
    parser.add_argument("--epochs", type=int, default=Config.epochs)
    parser.add_argument("--batch-size", type=int, default=Config.batch_size, help="recordings per step")
    parser.add_argument("--learning-rate", type=float, default=Config.learning_rate)
    parser.add_argument("--weight-decay", type=float, default=Config.weight_decay)
    parser.add_argument("--patience", type=int, default=Config.patience, help="epochs without a better validation AUC")
    parser.add_argument("--seed", type=int, default=Config.seed)
    parser.add_argument(
        "--segment-loss", type=float, default=Config.segment_loss, help="weight of the segment head's loss"
    )
    parser.add_argument("--backbone-weights", default="", help="'imagenet', a ResNet-18 state-dict file, or nothing")
    parser.add_argument("--no-augmentation", dest="augmentation", action="store_false")
    parser.add_argument(
        "--skip-unreadable", action="store_true", help="list and leave out recordings that cannot be read"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        definitions = read_config(args.archive / "model-config.yaml")
        checkpoint = fit(
            read_manifest(args.manifest, args.audio_root or args.manifest.parent),
            Pipeline.from_yaml(args.archive / "pipeline.yaml"),
            definitions,
            Config(**{k: getattr(args, k) for k in Config.__dataclass_fields__}),
            args.out,
            cache_dir=args.cache,
            device=torch.device(args.device),
            skip_unreadable=args.skip_unreadable,
        )
    except (ValueError, OSError, RuntimeError) as error:
        parser.exit(2, f"train.py: {error}\n")
    print(f"{args.out / 'best.pth'}: {describe_run(checkpoint)}")


if __name__ == "__main__":
    main()
