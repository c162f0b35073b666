"""Commands about the versions of a server's models: versions list, register, default, scale, retire, log."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skewless.cli.frame import SERVE, STATE_DIR, Result, StateDir, app, command, undone_by_a_signal
from skewless.errors import LoadError, UsageError

versions = typer.Typer(
    name="versions", help="What is served, and by which version: list, register, default, scale, retire, log."
)
app.add_typer(versions, rich_help_panel=SERVE)

Name = Annotated[str, typer.Argument(metavar="MODEL", help="A model's name.")]
Number = Annotated[str, typer.Argument(metavar="VERSION", help="One of its registered versions.")]
Only = Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Only this one's.", show_default=False)]


@command(versions, "list")
def list_versions(
    model: Only = None,
    model_store: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of archives.", show_default="the server's, or model_store"),
    ] = None,
    state_dir: StateDir = STATE_DIR,
) -> Result:
    """List the versions in the model store and those that a server has registered, with what was measured of each.

    Works without a server, too: then nothing is registered, and what was is "recorded".
    """
    from skewless.torchserve.server import Server
    from skewless.torchserve.store import as_table, listing
    from skewless.torchserve.versions import Record

    try:
        server = Server.attach(state_dir)
    except UsageError:
        server = None
    store = model_store or (server.model_store if server else Path("model_store"))
    if not store.is_dir():
        raise UsageError(f"{store}: no such model store; give --model-store, or build an archive first")
    registered, recorded = [], {}
    if server is None or server.model_store == store.resolve():
        registered = server.models() if server else []
        recorded = Record.read(Path(state_dir)).states(running=server is not None)
    rows = [row for row in listing(store, registered, recorded) if model in (None, row.name)]
    return Result({"model_store": store, "versions": rows}, as_table(rows) if rows else f"{store} has no archives")


@command(versions, "register")
@command(app, "register", panel=SERVE)
def register(
    archive: Annotated[Path, typer.Argument(metavar="MAR", help="An archive (.mar) in the server's model store.")],
    default: Annotated[bool, typer.Option("--default", help="Serve requests that name no version.")] = False,
    workers: Annotated[
        int | None, typer.Option(help="Processes.", show_default="the archive's model-config.yaml")
    ] = None,
    state_dir: StateDir = STATE_DIR,
) -> Result:
    """Register an archive with the running server, and wait until its workers are ready.

    Exits with 1 when a worker cannot load it: the handler's own error is printed, the version is unregistered again,
    and the versions already serving go on. Other content under a version that the server has had is refused.
    """
    from skewless.torchserve import versions as actions
    from skewless.torchserve.server import Server

    server = Server.attach(state_dir)
    try:
        with undone_by_a_signal():
            model = actions.register(server, archive, workers, default)
    except LoadError as error:
        log = server.state_dir / "logs" / "model_log.log"
        raise LoadError(f"{archive} does not load: {error}\nunregistered again; details in {log}") from error
    which = "default version" if model["default"] else "not the default version"
    text = f"{model['name']} {model['version']} registered, {which}, workers {', '.join(model['workers'])}"
    return Result(model, text)


@command(versions, "default")
def default(model: Name, version: Number, state_dir: StateDir = STATE_DIR) -> Result:
    """Let a registered version answer the requests that name none: to switch over, or to roll back.

    It stays the default when the server is started again.
    """
    from skewless.torchserve import versions as actions
    from skewless.torchserve.server import Server

    row = actions.set_default(Server.attach(state_dir), model, version)
    return Result(row, f"{model} {version} is the default version")


@command(versions, "scale")
def scale(
    model: Name,
    version: Number,
    workers: Annotated[int, typer.Option(help="Processes, 1 or more.")],
    state_dir: StateDir = STATE_DIR,
) -> Result:
    """Give a registered version so many workers, and wait until they are ready.

    Exits with 1 when one cannot load the archive; the version then has as many as before.
    """
    from skewless.torchserve import versions as actions
    from skewless.torchserve.server import Server

    with undone_by_a_signal():
        row = actions.scale(Server.attach(state_dir), model, version, workers)
    return Result(row, f"{model} {version}: workers {', '.join(row['workers'])}")


@command(versions, "retire")
def retire(model: Name, version: Number, state_dir: StateDir = STATE_DIR) -> Result:
    """Unregister a version for good: a restart leaves it out, too. Its archive stays in the model store.

    Refused for the default version, the last one of its model, and one that a running rollout uses. To have it again,
    register it.
    """
    from skewless.torchserve import versions as actions
    from skewless.torchserve.server import Server

    actions.retire(Server.attach(state_dir), model, version)
    return Result({"name": model, "version": version, "state": "retired"}, f"{model} {version} is retired")


@command(versions, "log")
def log(model: Only = None, state_dir: StateDir = STATE_DIR) -> Result:
    """Show who did what to the versions of a server, and how it ended, the latest last.

    The actor is the environment variable SKEWLESS_ACTOR, or user@host. Works without a running server, too.
    """
    from skewless.torchserve.audit import Audit, as_text

    audit = Audit(Path(state_dir))
    entries, unreadable = audit.read(model)
    text = as_text(entries) if entries else f"{audit.path} has nothing{f' about {model}' if model else ''}"
    if unreadable:
        text += f"\n{unreadable} of its lines cannot be read"
    return Result({"entries": entries, "unreadable": unreadable}, text)
