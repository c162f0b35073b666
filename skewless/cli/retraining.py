"""Commands that retrain a served model: retrain start, run, status."""

from __future__ import annotations

import contextlib
import json
import signal
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
    from skewless.packaging.reservation import Reservation
    from skewless.packaging.signing import SigningKey
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
Sign = Annotated[
    Path | None,
    typer.Option(metavar="KEY", help="Sign the archive with this private key, as a server with trusted keys asks for."),
]
Cache = Annotated[Path, typer.Option(metavar="DIR", help="Keeps what preprocessing gave.")]
CACHE = Path("runs/cache")
# How `start` passes on the version and the folder that it has reserved: their locks stay held without a gap.
Descriptor = Annotated[int | None, typer.Option(hidden=True)]
VERSION_DESCRIPTOR, OUT_DESCRIPTOR = "--version-descriptor", "--out-descriptor"


class _Plan(NamedTuple):
    server: Server
    name: str
    version: str
    out: Path
    config: Config
    rows: list[Recording]
    key: SigningKey | None
    version_held: Reservation
    out_held: Reservation


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
    sign: Sign = None,
    cache: Cache = CACHE,
    state_dir: StateDir = STATE_DIR,
) -> Result:
    """Retrain in the background; prints the folder to ask `skewless retrain status` about.

    A manifest without a split column has a fifth kept for the test, stratified by label, a group (such as a singer) on
    one side only.
    """
    from skewless.torchserve.retrain import LOG, STATUS, read_status

    # Here too, although the process checks them again: nobody looks at once at what runs in the background.
    plan = _checked(archive, manifests, recipe, epochs, batch_size, version, out, sign, state_dir)
    held = (plan.version_held.descriptor, plan.out_held.descriptor)
    options: dict[str, Any] = {
        "--recipe": recipe,
        "--epochs": epochs,
        "--batch-size": batch_size,
        "--version": plan.version,
        "--out": plan.out,
        "--references": references,
        "--sign": sign,
        "--cache": cache,
        "--state-dir": state_dir,
        **dict(zip((VERSION_DESCRIPTOR, OUT_DESCRIPTOR), held, strict=True)),
    }
    given = [(name, value) for name, value in options.items() if value is not None]
    given += [("--manifest", manifest) for manifest in manifests]
    line = [sys.executable, "-m", "skewless", "retrain", "run", str(archive), "--json"]
    line += [str(part) for option in given for part in option]
    process = None
    try:
        with open(plan.out / LOG, "w", encoding="utf-8") as log:
            process = subprocess.Popen(
                line, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=held
            )
        while not (plan.out / STATUS).exists() or read_status(plan.out).pid != process.pid:
            if process.poll() is not None:
                raise ServerError(f"it ended at once: {(plan.out / LOG).read_text(encoding='utf-8').strip()}")
            time.sleep(0.1)
    finally:
        # A process that runs holds them from now on.
        runs = process is not None and process.poll() is None
        for reservation in (plan.version_held, plan.out_held):
            reservation.hand_over() if runs else reservation.release()
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
    sign: Sign = None,
    cache: Cache = CACHE,
    state_dir: StateDir = STATE_DIR,
    version_descriptor: Descriptor = None,
    out_descriptor: Descriptor = None,
) -> Result:
    """Retrain as `start` does, and wait for the end."""
    from skewless.torchserve.retrain import retrain as do

    # As an exception, so that whoever ends it leaves nothing half-done.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    plan = _checked(
        archive,
        manifests,
        recipe,
        epochs,
        batch_size,
        version,
        out,
        sign,
        state_dir,
        (version_descriptor, out_descriptor),
    )
    try:
        result = do(archive, plan.rows, plan.config, plan.version, plan.out, plan.server, cache, references, plan.key)
    finally:
        plan.version_held.release()
        plan.out_held.release()
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
    sign: Path | None,
    state_dir: Path,
    descriptors: tuple[int | None, int | None] = (None, None),
) -> _Plan:
    """What is to be done, with its version and its folder reserved, and all read before anything is written.

    descriptors: those of reservations that `start` has passed on. Raises UsageError or ValueError for what cannot be.
    """
    from skewless.core.definition import Definition
    from skewless.packaging.reservation import Reservation, version_file
    from skewless.torchserve.retrain import merged, reserve_folder, reserve_version, run_file
    from skewless.torchserve.server import Server
    from skewless.training.config import config_of
    from skewless.training.recipe import read_recipe

    if absent := [path for path in manifests if not path.is_file()]:
        raise UsageError(f"there is no manifest {absent[0]}")
    server = Server.attach(state_dir)
    key = _key(server, sign)
    definition = Definition.read(archive)
    name = definition.name
    version_descriptor, out_descriptor = descriptors
    with contextlib.ExitStack() as undo:
        if version is not None and version_descriptor is not None:
            held = Reservation.inherited(version_file(server.model_store, name, version), version_descriptor)
        else:
            version, held = reserve_version(server, name, version)
        undo.callback(held.release)
        settings = read_recipe(recipe or archive / "recipe.yaml", "training")
        given = {"epochs": epochs, "batch_size": batch_size}
        config = config_of(settings | {key: value for key, value in given.items() if value is not None})
        rows = merged([(path, path.parent) for path in manifests], definition.classes)
        if out is not None and out_descriptor is not None:
            out_held = Reservation.inherited(run_file(out), out_descriptor)
        else:
            out = out or Path("runs/retrain", f"{name}-{version}")
            out_held = reserve_folder(out)
        plan = _Plan(server, name, version, out, config, rows, key, held, out_held)
        undo.pop_all()
    return plan


def _key(server: Server, sign: Path | None) -> SigningKey | None:
    """The key to sign with. Raises UsageError, before hours of training, where the server will not take what it signs."""
    trusted = server.required_keys()
    if sign is None:
        if trusted:
            raise UsageError(
                f"the server takes archives only that are signed with a key of {trusted.source}; give --sign KEY"
            )
        return None
    from skewless.packaging.signing import ready_to_sign

    key = ready_to_sign(sign)
    if trusted and key.fingerprint not in trusted.keys:
        raise UsageError(f"the key {sign} is none of those that the server trusts, in {trusted.source}")
    return key
