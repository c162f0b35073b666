"""Commands that make a model: new, corpus, train, evaluate, features, and schema."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import Field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_origin, get_type_hints

import typer
import yaml

from skewless.cli.frame import (
    DEFINE,
    MAKE,
    Archive,
    Checkpoint,
    Device,
    Manifest,
    Result,
    Root,
    SkipUnreadable,
    app,
    command,
    device_of,
)
from skewless.demos import KINDS
from skewless.training.config import Config, config_of

if TYPE_CHECKING:
    from skewless.core.definition import Definition
    from skewless.training.manifest import Recording

Split = Literal["train", "val", "test"]


@command(app, "new", panel=MAKE)
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The model's name, which its folder gets.")],
    like: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Start from cough, orca, talent or portrait.")
    ] = None,
    folder: Annotated[Path, typer.Option(metavar="DIR", help="Where to make the model's folder.")] = Path(),
) -> Result:
    """Write the folder of a new model, with comments where you have to decide.

    Such a folder trains and packages as it is: change it step by step.
    """
    from skewless.scaffold import create

    made = create(name, folder, like)
    files = sorted(path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file())
    listed = "\n".join(f"  {file}" for file in files)
    return Result({"folder": made, "files": files}, f"{made}:\n{listed}")


@command(app, "corpus", panel=MAKE)
def corpus(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to make; refused if it holds anything else.")],
    recipe: Annotated[
        Path | None, typer.Option(metavar="YAML", help="A recipe.yaml whose part 'corpus' gives the settings below.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(help=f"What it is a corpus of: {', '.join(KINDS)}.", autocompletion=lambda: list(KINDS)),
    ] = None,
    count: Annotated[int | None, typer.Option(help="How many files.", show_default="240")] = None,
    seed: Annotated[int | None, typer.Option(help="0 or more.", show_default="42")] = None,
    min_seconds: Annotated[float | None, typer.Option(help="Shortest recording of a kind that has lengths.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Longest recording of a kind that has lengths.")] = None,
    formats: Annotated[
        str | None, typer.Option(help="Audio formats, separated by commas, of a kind that has them.")
    ] = None,
) -> Result:
    """Write a synthetic corpus to try the rest on: for demonstration only.

    Nothing was recorded or photographed: every file is computed from random numbers, and a model trained on them knows
    nothing of the real thing. The same settings always make the same corpus.
    """
    from tqdm import tqdm

    from skewless.demos import CorpusError, write_corpus
    from skewless.training.recipe import read_recipe

    settings: dict[str, Any] = {"kind": "cough", "count": 240, "seed": 42}
    settings |= read_recipe(recipe, "corpus") if recipe else {}
    given = {
        "kind": kind,
        "count": count,
        "seed": seed,
        "min_seconds": min_seconds,
        "max_seconds": max_seconds,
        "formats": tuple(formats.split(",")) if formats else None,
    }
    settings |= {name: value for name, value in given.items() if value is not None}
    try:
        written = write_corpus(out=out, progress=partial(tqdm, unit="file", total=settings["count"]), **settings)
    except TypeError as error:
        raise CorpusError(f"a corpus of kind {settings['kind']!r} does not have these settings: {error}") from error
    state = "written" if written else "already there, nothing done"
    text = f"{out}: {settings['count']} files of kind '{settings['kind']}', seed {settings['seed']}: {state}"
    return Result({"out": out, "written": written, **settings}, text)


# What --help says about each setting of Config; its docstring says it in full.
_MEANINGS = {
    "epochs": "At most so many passes over the training split.",
    "batch_size": "Recordings per step.",
    "learning_rate": "In the first epoch.",
    "weight_decay": "Weight decay of AdamW.",
    "patience": "Epochs without a better validation AUC before training stops.",
    "schedule": "How the learning rate falls: cosine or plateau.",
    "plateau_patience": "Epochs without a lower validation loss before a plateau halves the rate.",
    "seed": "Seed of all random numbers.",
    "loss": "What training minimises, as in a recipe, such as '{bag: {segment_loss: 0.5}}'.",
    "augmentation": "Change spectrograms at random, anew in every epoch.",
    "offline_augmentation": "How many augmented copies to make of every training recording.",
    "backbone_weights": "'imagenet', a ResNet-18 state-dict file, or nothing.",
    "trained": "all, or head: only the layers behind the encoder.",
}


_METAVARS = {int: "N", float: "X", bool: "", str: "FILE"}
_DEFAULTS: dict[Any, str] = {"": "nothing", None: "the network's own"}


def _from_yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise typer.BadParameter(f"{text!r} is not YAML, expected such as '{{bag: {{segment_loss: 0.5}}}}'") from error


def _with_settings(function: Callable[..., Result]) -> Callable[..., Result]:
    """Give a function with `**settings` one option for each setting of Config; those not given are None."""
    hints = get_type_hints(Config)

    def option(setting: Field) -> inspect.Parameter:
        name, hint = setting.name.replace("_", "-"), hints[setting.name]
        plain = hint in (int, float, str, bool) or get_origin(hint) is Literal
        info = typer.Option(
            f"--{name}/--no-{name}" if hint is bool else f"--{name}",
            # What has parts is written as in a recipe.
            parser=None if plain else _from_yaml,
            metavar=_METAVARS.get(hint, "NAME" if plain else "YAML"),
            help=_MEANINGS[setting.name],
            show_default=_DEFAULTS.get(setting.default, str(setting.default)),
            rich_help_panel="Settings (the recipe's, if any, else the defaults here)",
        )
        annotation: Any = Annotated[(hint | None) if plain else Any, info]
        return inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)

    own = inspect.signature(function, eval_str=True)
    kept = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    kept = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in kept]
    vars(function)["__signature__"] = own.replace(parameters=[*kept, *map(option, fields(Config))])
    return function


@command(app, "train", panel=MAKE)
@_with_settings
def train(
    archive: Archive,
    manifest: Manifest,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the run, such as runs/NAME.")],
    root: Root = None,
    recipe: Annotated[
        Path | None, typer.Option(metavar="YAML", help="A recipe.yaml whose part 'training' gives the settings.")
    ] = None,
    cache: Annotated[Path, typer.Option(metavar="DIR", help="Keeps what preprocessing gave.")] = Path("runs/cache"),
    skip_unreadable: SkipUnreadable = False,
    device: Device = "auto",
    **settings: Any,
) -> Result:
    """Train a model on labelled files. Run again with the same --out, it continues."""
    from skewless.training.fit import describe_run, fit
    from skewless.training.recipe import read_recipe

    definition, recordings = read(archive, manifest, root)
    chosen = read_recipe(recipe, "training") if recipe else {}
    chosen |= {name: value for name, value in settings.items() if value is not None}
    checkpoint = fit(
        recordings,
        definition,
        config_of(chosen),
        out,
        cache_dir=cache,
        device=device_of(device),
        skip_unreadable=skip_unreadable,
    )
    best = out / "best.pth"
    figures = {name: checkpoint[name] for name in ("epoch", "val_auc", "val_ap", "pipeline_fingerprint")}
    data = {"checkpoint": best, **figures, "epochs": len(checkpoint["history"])}
    return Result(data, f"{best}: {describe_run(checkpoint)}")


@command(app, "evaluate", panel=MAKE)
def evaluate(
    archive: Archive,
    checkpoint: Checkpoint,
    manifest: Manifest,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for metrics, predictions, pictures, references.")],
    root: Root = None,
    split: Annotated[Split, typer.Option(help="The part of the manifest to measure.")] = "test",
    references: Annotated[int, typer.Option(min=2, help="How many files to keep for packaging.")] = 8,
    skip_unreadable: SkipUnreadable = False,
    device: Device = "cpu",
) -> Result:
    """Measure a checkpoint on one split and write its reference predictions, through the code that will serve it."""
    from skewless.evaluation.evaluate import evaluate as measure
    from skewless.training.checkpoint import load_checkpoint

    definition, recordings = read(archive, manifest, root)
    metrics = measure(
        definition,
        load_checkpoint(checkpoint),
        checkpoint,
        recordings,
        split,
        out,
        device_of(device),
        references,
        skip_unreadable,
    )
    if len(definition.classes) == 2:
        best = metrics["at_best_threshold"]
        decided = (
            f"at threshold {best['threshold']:.2f}: precision {best['precision']:.3f}, recall {best['recall']:.3f}, "
            f"F1 {best['f1']:.3f}"
        )
    else:
        decided = f"accuracy {metrics['accuracy']:.3f}, macro F1 {metrics['macro_f1']:.3f}"
    text = (
        f"{out}: {metrics['recordings']} files of split '{metrics['split']}', AUC {metrics['auc']:.4f}, "
        f"AP {metrics['average_precision']:.4f}, Brier {metrics['brier']:.4f}; {decided}"
    )
    return Result({"out": out, **metrics}, text)


@command(app, "features", panel=MAKE)
def features(
    archive: Archive,
    manifest: Manifest,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for mfcc.png, spectral.png, features.md and .json.")],
    root: Root = None,
    split: Annotated[
        Literal["train", "val", "test", "all"],
        typer.Option(help="The part to draw; whoever looks at test chooses by it."),
    ] = "train",
    skip_unreadable: SkipUnreadable = False,
) -> Result:
    """Draw what an archive's voice features look like in labelled recordings, and write down what each one means."""
    from skewless.evaluation.feature_pictures import write_pictures

    definition, recordings = read(archive, manifest, root)
    chosen = [recording for recording in recordings if split in (recording.split, "all")]
    table = write_pictures(chosen, definition.pipeline, definition.classes, out, skip_unreadable=skip_unreadable)
    counted = ", ".join(f"{count} {name}" for name, count in table["recordings"].items())
    text = f"{out}: {len(table['features'])} features of {counted} recordings, split '{split}'"
    return Result({"out": out, "split": split, **table}, text)


@command(app, "schema", panel=DEFINE)
def schema(
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write NAME.schema.json for each.", show_default="print one document"),
    ] = None,
) -> Result:
    """Print the JSON Schemas of pipeline.yaml, model.yaml and recipe.yaml, which let editors complete and check them."""
    from skewless.schema import schemas

    found = schemas()
    if out is None:
        return Result(found, json.dumps(found, indent=2))
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{name}.schema.json" for name in found]
    for file, content in zip(files, found.values(), strict=True):
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return Result({"files": files}, "\n".join(map(str, files)))


def read(archive: Path, manifest: Path, root: Path | None) -> tuple[Definition, list[Recording]]:
    """A model's definition, and a manifest's rows with labels by its classes."""
    from skewless.core.definition import Definition
    from skewless.training.manifest import read_manifest

    definition = Definition.read(archive)
    return definition, read_manifest(manifest, root or manifest.parent, definition.classes)
