#!/usr/bin/env python3
"""What each variant of an archive's pipeline does to the answers of its checkpoint: one row per variant, in Markdown.

python benchmarks/archive_variants.py --archive archive/orca --checkpoint runs/quickstart/orca/train/best.pth \
    --manifest runs/quickstart/orca/corpus/manifest.csv
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from skewless.core.pipeline import Pipeline
from skewless.skew.skew import Comparator, summarize
from skewless.training.checkpoint import load_checkpoint
from skewless.evaluation.scores import service_of
from skewless.training.manifest import SPLITS, read_manifest, select


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=Path, required=True, help="definition with variants/*.yaml")
    parser.add_argument("--checkpoint", type=Path, required=True, help="best.pth of a run")
    parser.add_argument("--manifest", type=Path, required=True, help="the manifest it was trained with")
    parser.add_argument("--root", type=Path, help="folder that file_path is relative to (default: the manifest's)")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--threshold", type=float, help="for decisions (default: the checkpoint's decision's)")
    args = parser.parse_args()
    variants = sorted((args.archive / "variants").glob("*.yaml"))
    if not variants:
        parser.error(f"{args.archive} has no variants/*.yaml")
    try:
        service = service_of(load_checkpoint(args.checkpoint), torch.device("cpu"))
        classes = service.postprocessor.classes
        rows = select(read_manifest(args.manifest, args.root or args.manifest.parent, classes), args.split, classes)
    except (ValueError, OSError) as error:
        parser.exit(2, f"archive_variants.py: {error}\n")
    threshold = service.threshold if args.threshold is None else args.threshold
    print(f"{len(rows)} files of split '{args.split}', threshold {threshold:g}\n")
    print("| variant | first differs at | mean \\|dp\\| | max \\|dp\\| | decisions changed | AUC | accuracy |")
    print("|---|---|---|---|---|---|---|")
    shown = None
    for path in variants:
        candidate = Pipeline.from_yaml(path).with_fitted_stages_of(service.pipeline)
        comparator = Comparator(service.pipeline, candidate, service.runtime, service.postprocessor, **service.input_limits)
        measured = [
            comparator.measure(r.file_path, r.path.read_bytes(), r.label)
            for r in tqdm(rows, desc=path.stem, unit="file", leave=False)
        ]
        report = summarize(comparator.alignment, measured, threshold, classes)
        together, metrics = report["together"], report["metrics"]
        if shown is None:
            shown = metrics["reference"]
            print(f"| (as trained) | | | | | {shown['auc']:.3f} | {shown['accuracy']:.3f} |")
        first = report["first_divergence"]
        print(
            f"| `{path.stem}` | {first['stage'] if first else 'nowhere'} | {together['mean_abs']:.4f} | {together['max_abs']:.4f} | "
            f"{together['flips']} of {len(rows)} | {metrics['candidate']['auc']:.3f} | {metrics['candidate']['accuracy']:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
