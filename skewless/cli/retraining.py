"""Commands that retrain a served model: retrain start, run, status."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from skewless.cli.frame import SERVE, STATE_DIR, Archive, Result, StateDir, app, command
from skewless.errors import ServerError, UsageError

if TYPE_CHECKING:
    from skewless.torchserve.server import Server
    from skewless.training.config import Config
    from skewless.training.manifest import Recording

retrain = typer.Typer(
    name="retrain",
    help="Train on new files and register the result beside the version that serves, without making it the default.",
)
app.add_typer(retrain, rich_help_panel=SERVE)

Manifests = Annotated[
    list[Path],
    typer.Option(
        "--manifest",
        metavar="CSV",
        help="May be given several times: the files of the last training, and the new ones.",
    ),
]
Recipe = Annotated[
    Path | None, typer.Option(metavar="YAML", help="Training settings.", show_default="ARCHIVE/recipe.yaml")
]
Epochs = Annotated[int | None, typer.Option(help="Instead of the recipe's.", min=1)]
BatchSize = Annotated[int | None, typer.Option(help="Instead of the recipe's.", min=2)]
Version = Annotated[str | None, typer.Option(help="The new archive's version.", show_default="the next whole number")]
Out = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder of the run.", show_default="runs/retrain/NAME-VERSION")
]
References = Annotated[
    Literal["evaluation", "synthetic"],
    typer.Option(
        help="The recordings that travel in the archive: those of the test split that evaluation kept, or computed ones only."
    ),
]
Cache = Annotated[Path, typer.Option(metavar="DIR", help="Keeps what preprocessing gave.")]
CACHE = Path("runs/cache")


class _Plan(NamedTuple):
    server: Server
    name: str
    version: str
    out: Path
    config: Config
    rows: list[Recording]


@command(retrain, "start")
def start(
    archive: Archive,
    manifests: Manifests,
    recipe: Recipe = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    version: Version = None,
    out: Out = None,
    references: References = "evaluation",
    cache: Cache = CACHE,
    state_dir: StateDir = STATE_DIR,
) -> Result:
    """Retrain in the background; prints the folder to ask `skewless retrain status` about.

    A manifest without a split column has a fifth kept for the test, stratified by label, a group (such as a singer) on
    one side only.
    """
    from skewless.torchserve.retrain import STATUS, read_status

    # Here too, although the process checks them again: nobody looks at once at what runs in the background.
    plan = _checked(archive, manifests, recipe, epochs, batch_size, version, out, state_dir)
    plan.out.mkdir(parents=True, exist_ok=True)
    (plan.out / STATUS).unlink(missing_ok=True)
    options: dict[str, Any] = {
        "--recipe": recipe,
        "--epochs": epochs,
        "--batch-size": batch_size,
        "--version": plan.version,
        "--out": plan.out,
        "--references": references,
        "--cache": cache,
        "--state-dir": state_dir,
    }
    given = [(name, value) for name, value in options.items() if value is not None]
    given += [("--manifest", manifest) for manifest in manifests]
    line = [sys.executable, "-m", "skewless", "retrain", "run", str(archive), "--json"]
    line += [str(part) for option in given for part in option]
    with open(plan.out / "retrain.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(line, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
    while not (plan.out / STATUS).exists() or read_status(plan.out).pid != process.pid:
        if process.poll() is not None:
            raise ServerError(f"it ended at once: {(plan.out / 'retrain.log').read_text(encoding='utf-8').strip()}")
        time.sleep(0.1)
    data = {"model": plan.name, "version": plan.version, "pid": process.pid, "out": plan.out}
    poll = f"skewless retrain status --out {plan.out}"
    return Result(data, f"{plan.name} {plan.version}: process {process.pid}; see how far it is with: {poll}")


@command(retrain, "run")
def run(
    archive: Archive,
    manifests: Manifests,
    recipe: Recipe = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    version: Version = None,
    out: Out = None,
    references: References = "evaluation",
    cache: Cache = CACHE,
    state_dir: StateDir = STATE_DIR,
) -> Result:
    """Retrain as `start` does, and wait for the end."""
    from skewless.torchserve.retrain import retrain as do

    plan = _checked(archive, manifests, recipe, epochs, batch_size, version, out, state_dir)
    result = do(archive, plan.rows, plan.config, plan.version, plan.out, plan.server, cache, references)
    return Result(result, json.dumps(result, indent=2))


@command(retrain, "status")
def status(
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder that `start` printed.")],
) -> Result:
    """How far a retraining is. Exits with 1 when it failed."""
    from skewless.torchserve.retrain import read_status

    found = asdict(read_status(out))
    return Result(found, json.dumps(found, indent=2), failed=found["state"] == "failed")


def _checked(
    archive: Path,
    manifests: list[Path],
    recipe: Path | None,
    epochs: int | None,
    batch_size: int | None,
    version: str | None,
    out: Path | None,
    state_dir: Path,
) -> _Plan:
    """What is to be done, read before anything is written. Raises UsageError or ValueError for what cannot be."""
    from skewless.core.definition import Definition
    from skewless.torchserve.retrain import STATUS, check_version, merged, next_version, read_status
    from skewless.torchserve.server import Server
    from skewless.training.config import config_of
    from skewless.training.recipe import read_recipe

    if absent := [path for path in manifests if not path.is_file()]:
        raise UsageError(f"there is no manifest {absent[0]}")
    server = Server.attach(state_dir)
    definition = Definition.read(archive)
    version = version or next_version(server, definition.name)
    check_version(server, definition.name, version)
    out = out or Path("runs/retrain", f"{definition.name}-{version}")
    if (out / STATUS).exists() and read_status(out).state not in ("failed",):
        raise UsageError(f"{out} already holds a retraining; choose another --version or --out")
    settings = read_recipe(recipe or archive / "recipe.yaml", "training")
    given = {"epochs": epochs, "batch_size": batch_size}
    config = config_of(settings | {name: value for name, value in given.items() if value is not None})
    rows = merged([(path, path.parent) for path in manifests], definition.classes)
    return _Plan(server, definition.name, version, out, config, rows)
