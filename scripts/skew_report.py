#!/usr/bin/env python3
"""Compare two pipelines on recordings: where they part, how much, and what that does to the decisions of a checkpoint."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from tqdm import tqdm

from skewless.core.pipeline import Pipeline
from skewless.core.selftest import library_versions
from skewless.core.stages import InputError
from skewless.skew.page import write_html
from skewless.skew.pictures import Example
from skewless.skew.report import as_text, worst, write_json
from skewless.skew.skew import Comparator, summarize
from skewless.training.checkpoint import file_digest, load_checkpoint
from skewless.evaluation.evaluate import service_of
from skewless.training.manifest import SPLITS, read_manifest


def recordings_of(args: argparse.Namespace, classes: Sequence[str]) -> list[tuple[str, Path, int | None]]:
    """(name, path, label) of every recording asked for; raises ValueError when there is none."""
    if args.manifest:
        rows = read_manifest(args.manifest, args.root or args.manifest.parent, classes)
        # A manifest may have absolute paths, which would say where on this machine the recordings are.
        found = [
            (f"{n}-{r.path.name}" if Path(r.file_path).is_absolute() else r.file_path, r.path, r.label)
            for n, r in enumerate(rows, start=1)
            if r.split == args.split
        ]
        empty = f"{args.manifest} has no recordings in split '{args.split}'"
    else:
        if not args.files.is_dir():
            raise ValueError(f"--files is {args.files}, expected a folder of recordings or images")
        found = [(p.relative_to(args.files).as_posix(), p, None) for p in sorted(args.files.rglob("*")) if p.is_file()]
        empty = f"--files {args.files} has no files"
    if not found:
        raise ValueError(empty)
    if args.limit and args.limit < len(found):
        found = [found[k] for k in np.linspace(0, len(found) - 1, args.limit).round().astype(int)]
    return found


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Measure everything, write the report's files, and return the report."""
    checkpoint = load_checkpoint(args.checkpoint)
    service = service_of(checkpoint, torch.device(args.device))
    recordings = recordings_of(args, service.postprocessor.classes)
    reference, candidate = (
        Pipeline.from_yaml(path).with_fitted_stages_of(service.pipeline) for path in (args.reference, args.candidate)
    )
    threshold = service.threshold if args.threshold is None else args.threshold
    comparator = Comparator(reference, candidate, service.runtime, service.postprocessor, **service.input_limits)
    measurements, unreadable = [], []
    for name, path, label in tqdm(recordings, desc="comparing", unit="clip"):
        try:
            measurements.append(comparator.measure(name, path.read_bytes(), label))
        except InputError as error:
            unreadable.append({"name": name, "reason": str(error)})
    if not measurements:
        reasons = "\n".join(f"  {u['name']}: {u['reason']}" for u in unreadable)
        raise ValueError(f"none of the {len(recordings)} recordings can be read:\n{reasons}")
    report = {
        "reference": _described(reference, args.reference),
        "candidate": _described(candidate, args.candidate),
        "checkpoint": {
            "file": args.checkpoint.name,
            "sha256": file_digest(args.checkpoint),
            "epoch": checkpoint["epoch"],
            "pipeline_fingerprint": checkpoint["pipeline_fingerprint"],
            "trained_with_reference": checkpoint["pipeline_fingerprint"] == reference.fingerprint,
        },
        "source": f"split '{args.split}' of {args.manifest.name}"
        if args.manifest
        else f"folder {args.files.resolve().name}",
        "precision": service.policy.report(service.runtime.device),
        "library_versions": library_versions(),
        "unreadable": unreadable,
        **summarize(comparator.alignment, measurements, threshold, service.postprocessor.classes),
    }
    paths = {name: path for name, path, _ in recordings}
    examples = [
        Example(entry, *comparator.traces(paths[entry["name"]].read_bytes())) for entry in worst(report, args.worst)
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(report, args.out / "skew.json")
    write_html(report, examples, args.out / "index.html")
    return report


def _described(pipeline: Pipeline, path: Path) -> dict[str, Any]:
    return {"file": path.name, "fingerprint": pipeline.fingerprint, **pipeline.to_dict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="pipeline file, usually the one of training")
    parser.add_argument("--candidate", type=Path, required=True, help="pipeline file to compare with it")
    parser.add_argument("--checkpoint", type=Path, required=True, help="best.pth of a run: network, weights, decision")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--files", "--audio", type=Path, help="folder of recordings or images, with what is in its subfolders"
    )
    source.add_argument("--manifest", type=Path, help="CSV with file_path, label, split")
    parser.add_argument(
        "--root", "--audio-root", type=Path, help="folder that file_path is relative to (default: the manifest's)"
    )
    parser.add_argument("--split", choices=SPLITS, default="test", help="the part of the manifest to compare on")
    parser.add_argument("--out", type=Path, required=True, help="folder for index.html and skew.json")
    parser.add_argument(
        "--worst", type=int, default=5, help="how many of the most changed recordings to show in pictures"
    )
    parser.add_argument(
        "--threshold", type=float, help="for decisions, in [0, 1] (default: the checkpoint's decision's)"
    )
    parser.add_argument("--limit", type=int, help="compare only so many recordings, evenly spread over the list")
    parser.add_argument("--device", default="cpu", help="where the network runs")
    args = parser.parse_args()
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        parser.error(f"--threshold is {args.threshold}, expected a number in [0, 1]")
    if args.worst < 0:
        parser.error(f"--worst is {args.worst}, expected 0 or more")
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit is {args.limit}, expected at least 1")
    if args.root and not args.manifest:
        parser.error("--root belongs to --manifest; with --files the folder says it all")
    try:
        report = compare(args)
    except (ValueError, OSError, RuntimeError) as error:
        parser.exit(2, f"skew_report.py: {error}\n")
    print(as_text(report))
    print(f"\n{args.out / 'index.html'}: open it in a browser; all numbers are in {args.out / 'skew.json'}")


if __name__ == "__main__":
    main()
