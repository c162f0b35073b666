#!/usr/bin/env python3
"""Package a trained checkpoint as model_store/NAME-VERSION.mar, if it gives the numbers that evaluation recorded."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from skewless.core.postprocess import build_postprocessor
from skewless.core.config import read_config
from skewless.core.numerics import TIERS
from skewless.core.runtimes import RUNTIMES
from skewless.packaging.build import build_archive
from skewless.packaging.execution import Execution
from skewless.training.manifest import SPLITS, Recording, read_manifest


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
    parser.add_argument("--runtime", choices=RUNTIMES, help="what executes the network (default: model-config.yaml's)")
    parser.add_argument("--precision", choices=TIERS, help="of runtime onnxruntime (default: fp32)")
    parser.add_argument("--manifest", type=Path, help="the manifest of --evaluation; fp16 and int8 are proved on it")
    parser.add_argument("--split", choices=SPLITS, default="test", help="the split to prove them on")
    parser.add_argument("--calibration-manifest", type=Path, help="its train split gives int8 its value ranges")
    parser.add_argument(
        "--root", "--audio-root", type=Path, help="folder that file_path is relative to (default: each manifest's own)"
    )
    args = parser.parse_args()
    if args.runtime is None and (args.precision or args.manifest or args.calibration_manifest):
        parser.error("--precision, --manifest and --calibration-manifest go with --runtime onnxruntime")
    try:
        execution = args.runtime and Execution(
            args.runtime,
            args.precision or "fp32",
            _recordings(args.manifest, args.root, args.archive),
            args.split,
            _recordings(args.calibration_manifest, args.root, args.archive),
        )
        target = build_archive(
            *(args.archive, args.checkpoint, args.evaluation, args.version, args.out),
            force=args.force,
            execution=execution,
        )
    except (ValueError, OSError, RuntimeError) as error:
        parser.exit(2, f"build_archive.py: {error}\n")
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")


def _recordings(manifest: Path | None, root: Path | None, archive: Path) -> list[Recording]:
    if manifest is None:
        return []
    classes = build_postprocessor(read_config(archive / "model-config.yaml")["postprocess"]).classes
    return read_manifest(manifest, root or manifest.parent, classes)


if __name__ == "__main__":
    main()
