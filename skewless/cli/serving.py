"""Commands around a running TorchServe: serve, smoke, predict."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from skewless import resources
from skewless.cli.frame import FAILED, SERVE, STATE_DIR, Result, StateDir, app, command, publish, undone_by_a_signal
from skewless.errors import ServerError, UsageError

if TYPE_CHECKING:
    from skewless.torchserve.server import Server
    from skewless.torchserve.versions import Restored

serve = typer.Typer(name="serve", help="Start, stop, or look at a TorchServe.")
app.add_typer(serve, rich_help_panel=SERVE)

ModelStore = Annotated[Path, typer.Option(metavar="DIR", help="Folder of archives (.mar).")]
Config = Annotated[Path, typer.Option(metavar="FILE", help="TorchServe's settings.", show_default="ours")]
Ports = Annotated[Literal["free"] | None, typer.Option(help="Free ones, instead of those in the configuration.")]
Forget = Annotated[
    bool, typer.Option("--forget", help="Forget what was registered, scaled, retired and default in this folder.")
]
TrustedKeys = Annotated[
    Path | None,
    typer.Option(
        "--trusted-keys",
        metavar="FILE|DIR",
        envvar="SKEWLESS_TRUSTED_KEYS",
        help="Public keys: only archives signed with one of them are served.",
        show_default="any archive is served",
    ),
]
Version = Annotated[str | None, typer.Option(help="One of the model's versions.", show_default="the default one")]


@command(serve, "start")
def start(
    model_store: ModelStore = Path("model_store"),
    state_dir: StateDir = STATE_DIR,
    config: Config = resources.CONFIG,
    ports: Ports = None,
    forget: Forget = False,
    trusted_keys: TrustedKeys = None,
) -> Result:
    """Start a server in the background, with the versions that were registered when the last one ended.

    They have as many workers as then, and the same default. A version that does not load is left out, with its reason; the
    others are served, and the exit code is 1.
    """
    from skewless.torchserve import versions
    from skewless.torchserve.server import Server

    with undone_by_a_signal():
        server = Server.start(model_store, state_dir, config, ports, trusted_keys=trusted_keys)
        restored = versions.Restored()
        try:
            if forget:
                versions.forget(server)
            versions.restore(server, restored)
            return _started(server, restored)
        except BaseException:
            server.stop()
            raise


@command(serve, "stop")
def stop(state_dir: StateDir = STATE_DIR) -> Result:
    """End the server of a state directory, and its workers."""
    from skewless.torchserve.server import Server

    server = Server.attach(state_dir)
    server.stop()
    return Result({"stopped": server.pid}, f"stopped process {server.pid}")


@command(serve, "status")
def status(state_dir: StateDir = STATE_DIR) -> Result:
    """Addresses, health and registered versions. Exits with 1 when no server runs, or a model has no worker."""
    from skewless.torchserve.server import Server

    try:
        server = Server.attach(state_dir)
    except UsageError as error:
        # Nothing is wrong with asking whether a server is running.
        return Result({"health": "not running", "message": str(error)}, str(error), failed=True)
    return _status(server)


@command(serve, "token")
def token(
    kind: Annotated[Literal["inference", "management"], typer.Option(help="The API that it is for.")] = "inference",
    state_dir: StateDir = STATE_DIR,
) -> Result:
    """Print a token that is good for up to an hour; each renewal ends the one before."""
    from skewless.torchserve.server import Server

    key = Server.attach(state_dir).token(kind)
    return Result({"kind": kind, "token": key}, key)


@command(serve, "run")
def run(
    model_store: ModelStore = Path("model_store"),
    state_dir: StateDir = STATE_DIR,
    config: Config = resources.CONFIG,
    ports: Ports = None,
    forget: Forget = False,
    trusted_keys: TrustedKeys = None,
    drain_s: Annotated[
        float,
        typer.Option("--drain", metavar="S", min=0, help="Seconds to answer what is under way after SIGTERM; 0: none."),
    ] = 30.0,
) -> None:
    """Serve every archive of the model store in the foreground, until a signal: for containers.

    Of each model the version that was last made the default is the default one; where none was, the highest that loads. What
    was retired stays so. The status is printed once every archive is ready. An archive that does not load is left out, with its
    reason; the others are served, and the exit code at the end is 1. Where none loads, nothing is served.

    After SIGTERM `serve health` fails, so that no more requests are sent here, what is under way is answered, and then the server
    ends; a second signal ends it at once.
    """
    from skewless.torchserve import versions
    from skewless.torchserve.drain import drain
    from skewless.torchserve.health import set_phase
    from skewless.torchserve.server import Server

    restored = versions.Restored()

    def end(*_: object) -> None:
        sys.exit(FAILED if restored.left_out else 0)

    # As an exception, so that a signal during the start stops what was started, too.
    signal.signal(signal.SIGTERM, end)
    server = Server.start(model_store, state_dir, config, ports, trusted_keys=trusted_keys)
    try:
        set_phase(server.state_dir, "starting")
        if forget:
            versions.forget(server)
        versions.restore(server, restored, whole_store=True)
        if restored.left_out and not server.models():
            raise ServerError(f"no archive of {model_store} loads; the reasons are above")
        shown = _started(server, restored)
        set_phase(server.state_dir, "serving")
        signal.signal(signal.SIGTERM, _drain)
        publish(shown)
        while server.process():
            time.sleep(1.0)
        raise ServerError(f"TorchServe has ended, see {server.state_dir / 'logs'}")
    except KeyboardInterrupt:
        end()
    except _DrainError:
        signal.signal(signal.SIGTERM, end)
        # On a full disk the health check goes on passing; what is under way is answered all the same.
        with contextlib.suppress(OSError):
            set_phase(server.state_dir, "draining")
        if drain_s and not drain(server, drain_s):
            print(f"requests are still under way after {drain_s:g} s, and are cut off", file=sys.stderr)
        end()
    finally:
        server.stop()


class _DrainError(Exception):
    """SIGTERM while a server serves."""


def _drain(*_: object) -> None:
    raise _DrainError


@command(app, "smoke", panel=SERVE)
def smoke(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A registered model's name.")],
    version: Version = None,
    state_dir: StateDir = STATE_DIR,
) -> Result:
    """Prove a served model: every reference by REST and gRPC, alone and in batches, against evaluation's numbers.

    Exits with 1 when a probability is further from its reference than the archive's tier allows (exact: 1e-4, reduced:
    0.02), or a request fails.
    """
    from skewless.torchserve.server import Server
    from skewless.torchserve.smoke import as_table, smoke_test

    rows = smoke_test(Server.attach(state_dir), model, version)
    passed = sum(row.passed for row in rows)
    text = f"{as_table(rows)}\n{passed} of {len(rows)} paths serve the reference probabilities"
    return Result({"model": model, "passed": passed == len(rows), "paths": rows}, text, failed=passed < len(rows))


@command(app, "predict", panel=SERVE)
def predict(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="What the model reads: recordings, images.")],
    model: Annotated[str, typer.Option(metavar="NAME", help="A registered model's name.")],
    version: Version = None,
    json_body: Annotated[bool, typer.Option("--json-body", help="Send the files as JSON, in base64.")] = False,
    state_dir: StateDir = STATE_DIR,
) -> Result:
    """Send files to a served model and print the answer; on standard error, the curl command that does the same.

    Several files travel in one request, and each is answered under its name. Exits with 1 when one is refused.
    """
    from skewless.torchserve.client import Client
    from skewless.torchserve.server import Server

    if missing := [file for file in files if not file.is_file()]:
        raise UsageError(f"there is no file {missing[0]}")
    server = Server.attach(state_dir)
    path = "/".join(filter(None, ("predictions", model, version)))
    named = dict(zip(_names(files), files, strict=True))
    print(f"TOKEN=$(skewless serve token --state-dir {shlex.quote(str(state_dir))})")
    print(_curl(named, json_body, f"{server.inference_url}/{path}"), end="\n\n", flush=True)
    with Client(server) as client:
        if len(named) > 1:
            contents = {name: file.read_bytes() for name, file in named.items()}
            answer = client.predict_batch_rest(model, contents, version, as_json=json_body)
        else:
            json_key = "file" if json_body else None
            answer = client.predict_rest(model, files[0].read_bytes(), version, json_key=json_key)
    refused = answer.status != 200 or bool(answer.body.get("failed"))
    return Result(answer.body, json.dumps(answer.body, indent=2), failed=refused)


def _started(server: Server, restored: Restored) -> Result:
    """As `_status`, and what was not brought back, with which it fails."""
    shown = _status(server)
    lines = [f"{'left out':12} {name}: {reason}" for name, reason in restored.left_out.items()]
    lines += [f"{'default':12} {words}" for words in restored.stand_ins.values()]
    return Result(
        shown.data | {"left_out": restored.left_out, "stand_ins": restored.stand_ins},
        "\n".join([shown.text, *lines]),
        failed=shown.failed or bool(restored.left_out),
    )


def _status(server: Server) -> Result:
    """Every setting and registered version. It fails unless all is well."""
    found = server.status()
    models: list[dict[str, Any]] = found["models"]
    lines = [f"{name:12} {value}" for name, value in found.items() if name != "models"]
    for model in models:
        default = ", default" if model["default"] else ""
        lines.append(f"{'model':12} {model['name']} {model['version']}{default}: workers {', '.join(model['workers'])}")
    if not models:
        lines.append(f"{'model':12} none; register an archive with `skewless register`")
    # TorchServe's health leaves out a model that was scaled to no workers at all.
    well = found["health"] == "Healthy" and all(model["workers"] for model in models)
    return Result(found, "\n".join(lines), failed=not well)


def _names(files: list[Path]) -> list[str]:
    """A name for each file that curl can send and TorchServe delivers unchanged."""
    names = [re.sub(r'[",:;=\\\x00-\x1f]|\s$', "_", file.name) for file in files]
    return names if len(set(names)) == len(names) else [f"{i}.{name}" for i, name in enumerate(names, 1)]


def _curl(named: dict[str, Path], as_json: bool, url: str) -> str:
    call = 'curl -H "Authorization: Bearer $TOKEN"'
    if as_json:
        contents = " ".join(f"\"$(base64 < {shlex.quote(str(file))} | tr -d '\\n')\"" for file in named.values())
        # printf takes a % for the start of a conversion.
        fields = {name.replace("%", "%%"): "%s" for name in named}
        body = json.dumps({"files": fields} if len(named) > 1 else {"file": "%s"}, ensure_ascii=False)
        call = f"printf {shlex.quote(body)} {contents} |\n{call} -H 'Content-Type: application/json'"
        return f"{call} \\\n     --data-binary @- {url}"
    if len(named) > 1:
        forms = [f"-F {shlex.quote(f'files.{name}=@{_form_path(file)}')}" for name, file in named.items()]
        return " \\\n     ".join([call, *forms, url])
    (file,) = named.values()
    sent = f"-H 'Content-Type: application/octet-stream' \\\n     --data-binary {shlex.quote(f'@{file}')}"
    return f"{call} {sent} {url}"


def _form_path(file: Path) -> str:
    # Outside quotes, curl ends a path at ; and starts another at a comma.
    if not re.search(r'[";,\\]', str(file)):
        return str(file)
    return '"' + re.sub(r'(["\\])', r"\\\1", str(file)) + '"'
