"""What each variant of an archive's pipeline does to the answers of its checkpoint: one row per variant, in Markdown.

    python -m benchmarks.archive_variants archive/orca --checkpoint runs/quickstart/orca/train/best.pth \\
        --manifest runs/quickstart/orca/corpus/manifest.csv

Run it from the repository's root.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from skewless.core.definition import Definition
from skewless.core.pipeline import Pipeline
from skewless.core.service import ModelService
from skewless.evaluation.scores import service_of
from skewless.skew.aggregate import summarize
from skewless.skew.measure import Comparator
from skewless.training.checkpoint import load_checkpoint
from skewless.training.manifest import SPLITS, Recording, read_manifest, select


def table(
    service: ModelService, variants: Sequence[Path], recordings: Sequence[Recording], threshold: float
) -> Iterator[str]:
    """The table's lines, each as soon as it is measured."""
    classes = service.postprocessor.classes
    yield "| variant | first differs at | mean abs dp | max abs dp | decisions changed | AUC | accuracy |"
    yield "|---|---|---|---|---|---|---|"
    for number, path in enumerate(variants):
        candidate = Pipeline.from_yaml(path).with_fitted_stages_of(service.pipeline)
        pair = Comparator(service.pipeline, candidate, service.runtime, service.postprocessor, **service.input_limits)
        measured = [
            pair.measure(r.file_path, r.path.read_bytes(), r.label)
            for r in tqdm(recordings, desc=path.stem, unit="file", leave=False)
        ]
        report = summarize(pair.alignment, measured, threshold, classes)
        before, after = report["metrics"]["reference"], report["metrics"]["candidate"]
        if number == 0:
            yield f"| (as trained) | | | | | {before['auc']:.3f} | {before['accuracy']:.3f} |"
        first, together = report["first_divergence"], report["together"]
        yield (
            f"| `{path.stem}` | {first['stage'] if first else 'nowhere'} | {together['mean_abs']:.4f} "
            f"| {together['max_abs']:.4f} | {together['flips']} of {len(recordings)} | {after['auc']:.3f} "
            f"| {after['accuracy']:.3f} |"
        )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.archive_variants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("archive", type=Path, help="the definition's folder, with variants/*.yaml")
    parser.add_argument("--checkpoint", type=Path, required=True, help="best.pth of a run")
    parser.add_argument("--manifest", type=Path, required=True, help="the manifest it was trained with")
    parser.add_argument("--root", type=Path, help="folder that file_path is relative to (the manifest's)")
    parser.add_argument("--split", choices=SPLITS, default="test", help="(test)")
    parser.add_argument("--threshold", type=float, help="of the decisions (the postprocessor's)")
    args = parser.parse_args(argv)
    variants = sorted((args.archive / "variants").glob("*.yaml"))
    if not variants:
        parser.error(f"{args.archive} has no variants/*.yaml")
    try:
        service = service_of(Definition.read(args.archive), load_checkpoint(args.checkpoint), torch.device("cpu"))
        classes = service.postprocessor.classes
        rows = select(read_manifest(args.manifest, args.root or args.manifest.parent, classes), args.split, classes)
        threshold = service.threshold if args.threshold is None else args.threshold
        print(f"{len(rows)} files of split '{args.split}', threshold {threshold:g}\n")
        for line in table(service, variants, rows, threshold):
            print(line, flush=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
