#!/usr/bin/env python3
"""Package a trained checkpoint as model_store/NAME-VERSION.mar, if it gives the numbers that evaluation recorded."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from serving.build import build_archive


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--archive", type=Path, default=Path("archive/cough"), help="definition: pipeline and configuration"
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="best.pth of a run")
    parser.add_argument("--evaluation", type=Path, required=True, help="what scripts/evaluate.py wrote for it")
    parser.add_argument("--version", required=True, help="such as 1.0")
    parser.add_argument("--out", type=Path, default=Path("model_store"))
    parser.add_argument("--force", action="store_true", help="replace a different archive of the same version")
    args = parser.parse_args()
    try:
        target = build_archive(args.archive, args.checkpoint, args.evaluation, args.version, args.out, force=args.force)
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"build_archive.py: {error}\n")
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
