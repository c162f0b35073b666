#!/usr/bin/env python3
"""Turn the checkpoint of another training script into one that can be evaluated and packaged, without running its code.

Such a file does not say which preprocessing its weights were trained behind: --pipeline says it, and with --manifest
the checkpoint's own record is held against it and every variant.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from skewless.core.postprocess import build_postprocessor
from skewless.core.config import read_config
from skewless.core.pipeline import Pipeline
from skewless.importers import fastai, pytorch as legacy
from skewless.training.manifest import read_manifest, select


def pipelines_of(args: argparse.Namespace) -> list[Path]:
    """The archive's own pipeline and the variants; raises ValueError for a --variants without any."""
    folder = args.variants or args.archive / "variants"
    variants = sorted(folder.glob("*.yaml"))
    if args.variants and not variants:
        raise ValueError(f"--variants is {folder}, expected a folder of pipeline files (*.yaml)")
    return [args.archive / "pipeline.yaml", *variants]


def candidates_of(args: argparse.Namespace, chosen: Pipeline) -> dict[str, Pipeline]:
    """The chosen pipeline, then every other one there is, each definition once."""
    candidates = {args.pipeline.as_posix(): chosen}
    for path in pipelines_of(args):
        pipeline = Pipeline.from_yaml(path)
        if pipeline.fingerprint not in {p.fingerprint for p in candidates.values()}:
            candidates[path.as_posix()] = pipeline
    return candidates


def table(trials: list[legacy.Trial]) -> str:
    """Markdown, one row per pipeline."""
    rows = [["pipeline", "AUC", "|AUC - recorded|", "max |dp|", "mean |dp|"]]
    for t in trials:
        numbers = [(t.auc, ".4f"), (t.auc_gap, ".4f"), (t.max_dp, ".1e"), (t.mean_dp, ".1e")]
        rows.append([t.name, *("-" if value is None else format(value, form) for value, form in numbers)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines + [f"{t.name} could not be run: {t.failure}" for t in trials if t.failure])


def compare(args: argparse.Namespace, checkpoint: dict, chosen: Pipeline, val_auc: float | None) -> None:
    """Print the table and the verdict."""
    classes = build_postprocessor(checkpoint["postprocess"]).classes
    rows = select(read_manifest(args.manifest, args.root or args.manifest.parent, classes), args.split, classes)
    recorded = legacy.read_predictions(args.predictions) if args.predictions else {}
    known = sum(r.file_path in recorded for r in rows)
    if args.predictions and not known:
        raise ValueError(
            f"{args.predictions} has no file_path of split '{args.split}'; it has {next(iter(recorded), 'no rows')!r}, the "
            f"manifest {rows[0].file_path!r}"
        )
    trials = legacy.compare(
        checkpoint,
        candidates_of(args, chosen),
        rows,
        torch.device(args.device),
        recorded_auc=val_auc if args.split == "val" else None,
        recorded=recorded,
    )
    print(f"\n{len(rows)} recordings of split '{args.split}', {known} with a recorded probability")
    if args.split == "val" and val_auc is not None:
        print(f"recorded validation AUC: {val_auc:.4f}")
    print(table(trials))
    verdict = legacy.judge(trials, rows)
    if verdict.doubtful:
        print(f"\n{'!' * 80}\nWARNING: {verdict.text}\n{'!' * 80}\n", file=sys.stderr)
    else:
        print(f"\n{verdict.text}\n")


def run(args: argparse.Namespace) -> None:
    """Check everything, compare if asked to, then write."""
    if args.out.exists():
        raise ValueError(f"{args.out} exists; choose another --out, or delete it")
    chosen = Pipeline.from_yaml(args.pipeline)
    legacy.check_servable(chosen)
    definitions = read_config(args.archive / "model-config.yaml")
    old = legacy.read_legacy(args.checkpoint)
    if fastai.is_fastai(old.weights):
        old = replace(old, weights=fastai.rename(old.weights))
    agreed = legacy.check_config(old.config, chosen, definitions["network"])
    network = legacy.network_from(old.weights, definitions["network"])
    notes = legacy.check_trained(network)
    checkpoint = legacy.as_checkpoint(old, network, chosen, definitions)
    print(
        f"its configuration agrees with {args.pipeline} on {', '.join(agreed)}"
        if agreed
        else f"it records no configuration that could be compared with {args.pipeline}"
    )
    for note in notes:
        print(f"note: {note}")
    if args.manifest:
        compare(args, checkpoint, chosen, old.val_auc)
    legacy.write(args.out, checkpoint)
    recorded = [] if old.epoch is None else [f"epoch {old.epoch}"]
    recorded += [] if old.val_auc is None else [f"validation AUC {old.val_auc:.4f}"]
    print(f"{args.out}: {', '.join(recorded) or 'no epoch and no validation AUC'} recorded; pipeline '{chosen.name}'")
    packaged = args.archive / "pipeline.yaml"
    if Pipeline.from_yaml(packaged).fingerprint != chosen.fingerprint:
        print(f"note: {packaged} is another pipeline; package this with an archive definition that has {args.pipeline}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="OLD.pth", help="checkpoint or state dict, by torch.save")
    parser.add_argument("--pipeline", type=Path, help="what the weights were trained behind; always to be given")
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint to write, such as runs/NAME/best.pth")
    parser.add_argument("--archive", type=Path, default=Path("archive/cough"), help="definition: network and decision")
    parser.add_argument("--manifest", type=Path, help="CSV with file_path, label, split: compare pipelines on it")
    parser.add_argument(
        "--root", "--audio-root", type=Path, help="folder that file_path is relative to (default: the manifest's)"
    )
    parser.add_argument(
        "--split", choices=("val", "test"), default="val", help="the part of the manifest to compare on"
    )
    parser.add_argument("--predictions", type=Path, help="CSV with file_path, probability, as recorded after training")
    parser.add_argument("--variants", type=Path, help="folder of pipelines to compare with (default: ARCHIVE/variants)")
    parser.add_argument("--device", default="cpu", help="where the network runs while comparing")
    args = parser.parse_args()
    if args.manifest is None and (args.root or args.predictions):
        parser.error("--root and --predictions belong to --manifest, which is not given")
    try:
        if args.pipeline is None:
            parser.error(
                "--pipeline is required: the checkpoint does not say which preprocessing its weights were trained behind, "
                "and behind any other its probabilities are wrong without an error. There are:\n"
                + "\n".join(f"  {path}" for path in pipelines_of(args))
                + "\nNot sure? Give the likeliest and --manifest: each is held against what the checkpoint records."
            )
        run(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"import_checkpoint.py: {error}\n")


if __name__ == "__main__":
    main()
