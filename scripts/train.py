#!/usr/bin/env python3
"""Train a model from a manifest of labelled files. Run again with the same --out, it continues."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from skewless.core.postprocess import build_postprocessor
from skewless.core.config import read_config
from skewless.core.pipeline import Pipeline
from skewless.training.fit import Config, config_of, describe_run, fit
from skewless.training.manifest import read_manifest
from skewless.training.recipe import read_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, required=True, help="CSV with file_path, label, split")
    parser.add_argument(
        "--root", "--audio-root", type=Path, help="folder that file_path is relative to (default: the manifest's)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run, such as runs/NAME")
    parser.add_argument("--archive", type=Path, default=Path("archive/cough"), help="definition to train for")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="what preprocessing gave (runs/cache)")
    parser.add_argument("--recipe", type=Path, help="a recipe.yaml whose part 'training' gives the settings below")
    settings = parser.add_argument_group("settings", "the recipe's, if any, else the default in brackets")
    for name, meaning in (
        ("epochs", "at most"),
        ("batch-size", "files per step"),
        ("learning-rate", "the first epoch's"),
        ("weight-decay", ""),
        ("patience", "epochs without a better validation AUC"),
        ("schedule", "of the learning rate: cosine or plateau"),
        ("plateau-patience", "epochs without a lower validation loss before a plateau halves the rate"),
        ("seed", ""),
        ("segment-loss", "weight of a segment head's loss"),
        ("copies", "augmented copies of every training recording"),
        ("backbone-weights", "'imagenet', a ResNet-18 state-dict file, or nothing"),
        ("trained", "all, or only the head"),
    ):
        default = getattr(Config, name.replace("-", "_"))
        settings.add_argument(f"--{name}", type=type(default), help=f"{meaning} ({default})".strip())
    settings.add_argument(
        "--no-augmentation",
        dest="augmentation",
        action="store_const",
        const=False,
        help="leave spectrograms as they are",
    )
    parser.add_argument(
        "--skip-unreadable", action="store_true", help="list and leave out recordings that cannot be read"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        definitions = read_config(args.archive / "model-config.yaml")
        classes = build_postprocessor(definitions["postprocess"]).classes
        chosen = read_recipe(args.recipe, "training") if args.recipe else {}
        chosen |= {k: v for k in Config.__dataclass_fields__ if (v := getattr(args, k)) is not None}
        checkpoint = fit(
            read_manifest(args.manifest, args.root or args.manifest.parent, classes),
            Pipeline.from_yaml(args.archive / "pipeline.yaml"),
            definitions,
            config_of(chosen),
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
