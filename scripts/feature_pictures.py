#!/usr/bin/env python3
"""Draw what an archive's voice features look like in labelled recordings, and write down what each of them means."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from skewless.core.postprocess import build_postprocessor
from skewless.core.config import read_config
from skewless.core.pipeline import Pipeline
from skewless.evaluation.feature_pictures import write_pictures
from skewless.training.manifest import SPLITS, read_manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--archive", type=Path, default=Path("archive/talent"), help="folder with its pipeline.yaml")
    parser.add_argument("--manifest", type=Path, required=True, help="CSV of labelled recordings")
    parser.add_argument("--root", type=Path, help="folder that file_path is relative to (default: the manifest's)")
    parser.add_argument("--split", choices=(*SPLITS, "all"), default="train", help="who looks at test chooses by it")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for mfcc.png, spectral.png, features.md and .json"
    )
    parser.add_argument(
        "--skip-unreadable", action="store_true", help="list and leave out recordings that cannot be read"
    )
    args = parser.parse_args()
    try:
        classes = build_postprocessor(read_config(args.archive / "model-config.yaml")["postprocess"]).classes
        recordings = read_manifest(args.manifest, args.root or args.manifest.parent, classes)
        table = write_pictures(
            [r for r in recordings if args.split in (r.split, "all")],
            Pipeline.from_yaml(args.archive / "pipeline.yaml"),
            classes,
            args.out,
            skip_unreadable=args.skip_unreadable,
        )
    except (ValueError, OSError) as error:
        parser.exit(2, f"feature_pictures.py: {error}\n")
    counted = ", ".join(f"{count} {name}" for name, count in table["recordings"].items())
    print(f"{args.out}: {len(table['features'])} features of {counted} recordings, split '{args.split}'")


if __name__ == "__main__":
    main()
