"""Commands around a new version on live traffic: gateway, rollout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from skewless.cli.frame import SERVE, STATE_DIR, Result, StateDir, app, command, publish
from skewless.errors import UsageError

if TYPE_CHECKING:
    from skewless.rollout.gateway import Gateway, Options
    from skewless.rollout.state import Rollout

gateway = typer.Typer(name="gateway", help="nginx in front of a TorchServe: who may ask, and which version answers.")
app.add_typer(gateway, rich_help_panel=SERVE)
rollout = typer.Typer(
    name="rollout", help="Try a new version on live traffic, step by step, and go back if it is worse."
)
app.add_typer(rollout, rich_help_panel=SERVE)

Host = Annotated[
    str, typer.Option(metavar="ADDRESS", help="Where it listens; another than loopback needs --client-keys.")
]
Port = Annotated[int, typer.Option(help="For REST.")]
GrpcPort = Annotated[int, typer.Option(help="For gRPC.")]
Ports = Annotated[Literal["free"] | None, typer.Option(help="Free ones, instead of those.")]
TlsCert = Annotated[
    Path | None, typer.Option(metavar="PEM", help="The certificate, with those between it and the root.")
]
TlsKey = Annotated[Path | None, typer.Option(metavar="PEM", help="Its key.")]
ClientKeys = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Who may ask: a key in each line, as it is or as sha256:HEX.")
]
Rate = Annotated[float | None, typer.Option(help="Requests a second of one client.", show_default="any number")]
Multipart = Annotated[bool, typer.Option("--multipart", help="Let forms with files in, which TorchServe has to parse.")]
Hold = Annotated[float, typer.Option(metavar="SECONDS", help="How long a request waits for a TorchServe that is away.")]

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A registered model's name.")]
Why = Annotated[str, typer.Option(metavar="TEXT", help="For the history and the audit log.")]
_ASKED = "asked for"


@command(gateway, "start")
def start_gateway(
    host: Host = "127.0.0.1",
    port: Port = 8090,
    grpc_port: GrpcPort = 7090,
    ports: Ports = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    client_keys: ClientKeys = None,
    rate: Rate = None,
    multipart: Multipart = False,
    hold: Hold = 30.0,
    state_dir: StateDir = STATE_DIR,
) -> Result:
    """Start the gateway of a running server in the background."""
    from skewless.rollout.gateway import Gateway

    options = _options(host, port, grpc_port, ports, tls_cert, tls_key, client_keys, rate, multipart, hold)
    return _shown(Gateway.start(state_dir, options))


@command(gateway, "run")
def run_gateway(
    host: Host = "127.0.0.1",
    port: Port = 8090,
    grpc_port: GrpcPort = 7090,
    ports: Ports = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    client_keys: ClientKeys = None,
    rate: Rate = None,
    multipart: Multipart = False,
    hold: Hold = 30.0,
    state_dir: StateDir = STATE_DIR,
) -> None:
    """Be the gateway in the foreground, until a signal: for containers.

    nginx ends when the requests under way are answered. SIGHUP has the certificate read again.
    """
    from skewless.rollout.gateway import run

    options = _options(host, port, grpc_port, ports, tls_cert, tls_key, client_keys, rate, multipart, hold)
    run(state_dir, options, lambda started: publish(_shown(started)))


@command(gateway, "stop")
def stop_gateway(state_dir: StateDir = STATE_DIR) -> Result:
    """End the gateway once the requests under way are answered."""
    from skewless.rollout.gateway import stop

    stopped = stop(state_dir)
    return Result({"stopped": stopped}, f"stopped process {stopped}")


@command(gateway, "status")
def gateway_status(state_dir: StateDir = STATE_DIR) -> Result:
    """Addresses, and what is split. Exits with 1 when no gateway runs."""
    from skewless.rollout.gateway import Gateway

    try:
        return _shown(Gateway.attach(state_dir))
    except UsageError as error:
        return Result({"health": "not running", "message": str(error)}, str(error), failed=True)


@command(rollout, "start")
def start_rollout(
    model: Model,
    candidate: Annotated[str, typer.Option(metavar="VERSION", help="The registered version to try.")],
    percent: Annotated[
        float | None, typer.Option(help="Of the clients, to begin with.", show_default="the policy's first step")
    ] = None,
    shadow: Annotated[
        bool, typer.Option("--shadow", help="Send it a copy of what the default version answers.")
    ] = False,
    policy: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Steps, and what is tolerated.", show_default="ours")
    ] = None,
    target: Annotated[
        Literal["gateway", "kubernetes"],
        typer.Option(help="Who splits: kubernetes writes patches, and starts nothing."),
    ] = "gateway",
    baseline: Annotated[
        str | None, typer.Option(metavar="VERSION", help="For kubernetes: the version that is served now.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="For kubernetes: where the patches go.")] = None,
    state_dir: StateDir = STATE_DIR,
) -> Result:
    """Let a new version answer some clients beside the default one, or copies of their requests."""
    from skewless.rollout import run, state
    from skewless.rollout.gateway import Gateway, follow
    from skewless.torchserve.server import Server

    if target == "kubernetes":
        if baseline is None or out is None:
            raise UsageError(
                "--target kubernetes needs --baseline VERSION, which is served now, and --out DIR for the patches"
            )
        if percent is not None or shadow:
            raise UsageError(
                "with --target kubernetes the steps are the policy's; write them into one, instead of --percent"
            )
        written = run.kubernetes_patches(model, baseline, candidate, policy, out)
        return Result({"patches": written}, "\n".join(str(file) for file in written))
    if baseline is not None or out is not None:
        raise UsageError("--baseline and --out belong to --target kubernetes")
    server = Server.attach(state_dir)
    Gateway.attach(state_dir)
    if percent is None and not shadow:
        percent, shadow = run.first_step(policy)
    elif policy is not None:
        run.steps(policy)  # refuses a wrong one now, instead of later
    begun = state.start(server, model, candidate, percent or 0.0, shadow, policy, step=0)
    follow(server.state_dir)
    return _told(begun)


@command(rollout, "status")
def rollout_status(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Only this one's.", show_default=False)] = None,
    state_dir: StateDir = STATE_DIR,
) -> Result:
    """How a rollout stands, how the two versions compare, and what its policy says."""
    from skewless.rollout import state
    from skewless.rollout.judge import as_text, assess

    folder = Path(state_dir).resolve()
    found = state.rollouts(folder) if model is None else [_known(folder, model)]
    shown = [(each, assess(folder, each) if each.running else None) for each in found]
    text = "\n\n".join("\n".join([_as_text(each), *([as_text(judged)] if judged else [])]) for each, judged in shown)
    data = [{"rollout": each, "verdict": judged} for each, judged in shown]
    return Result(data[0] if model else data, text or "no model has had a rollout")


@command(rollout, "step")
def step(
    model: Model,
    percent: Annotated[
        float | None,
        typer.Argument(metavar="[PERCENT]", help="Of the clients.", show_default="the policy's next step"),
    ] = None,
    shadow: Annotated[bool, typer.Option("--shadow", help="Copy to the candidate what others answer, too.")] = False,
    why: Why = _ASKED,
    state_dir: StateDir = STATE_DIR,
) -> Result:
    """Let the candidate answer more clients, or fewer. Each client changes its version at most once on the way up."""
    from skewless.rollout import run

    return _told(run.step(Path(state_dir).resolve(), model, percent, why, shadow))


@command(rollout, "promote")
def promote(model: Model, why: Why = _ASKED, state_dir: StateDir = STATE_DIR) -> Result:
    """Make the candidate the default version, for everybody."""
    from skewless.rollout import run

    return _told(run.promote(Path(state_dir).resolve(), model, why))


@command(rollout, "abort")
def abort(model: Model, why: Why = _ASKED, state_dir: StateDir = STATE_DIR) -> Result:
    """Send everybody back to the version that was the default when the rollout began."""
    from skewless.rollout import run

    return _told(run.abort(Path(state_dir).resolve(), model, why))


@command(rollout, "explain")
def explain_rollout(
    model: Model,
    count: Annotated[int, typer.Option(help="Of how many files.")] = 5,
    state_dir: StateDir = STATE_DIR,
) -> Result:
    """Name the first stage at which the two versions differ, for the shadowed files that moved most.

    For files that were kept: start the server with SKEWLESS_KEEP_UPLOADS=100 in its environment. Both archives' code runs here.
    """
    from skewless.rollout.judge import evidence_of
    from skewless.rollout.shadow import explain

    folder = Path(state_dir).resolve()
    found = explain(evidence_of(folder, _known(folder, model)), count)
    return Result(found, "\n".join(map(str, found)) or "no file that was kept got another probability")


@command(rollout, "label")
def label_rollout(
    model: Model,
    labels: Annotated[
        Path, typer.Argument(metavar="CSV", help="With the columns label and request_id, sha256 or file.")
    ],
    state_dir: StateDir = STATE_DIR,
) -> Result:
    """Join labels that are known by now with what both versions answered: accuracy and AUC with intervals."""
    from skewless.rollout.judge import evidence_of
    from skewless.rollout.labels import as_text, by_labels

    folder = Path(state_dir).resolve()
    found = by_labels(evidence_of(folder, _known(folder, model)), labels)
    return Result(found, as_text(found))


@command(rollout, "run")
def run_rollout(
    model: Model,
    every: Annotated[float, typer.Option(metavar="SECONDS", help="Between looks at the evidence.")] = 30.0,
    state_dir: StateDir = STATE_DIR,
) -> Result:
    """Follow the policy until the candidate is promoted or aborted. Exits with 1 when it was aborted.

    It may be interrupted or killed at any moment; the next `run` goes on from there.
    """
    from skewless.rollout import run

    ended = run.unattended(Path(state_dir).resolve(), model, every)
    told = _told(ended)
    return Result(told.data, told.text, failed=ended.phase == "aborted")


def _options(
    host: str,
    port: int,
    grpc_port: int,
    ports: str | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    client_keys: Path | None,
    rate: float | None,
    multipart: bool,
    hold: float,
) -> Options:
    from skewless.rollout.gateway import Options

    if ports == "free":
        port = grpc_port = 0
    return Options(host, port, grpc_port, tls_cert, tls_key, client_keys, rate, multipart, hold)


def _shown(running: Gateway) -> Result:
    from skewless.rollout.state import rollouts

    split = [each for each in rollouts(running.state_dir) if each.running]
    data: dict[str, Any] = {
        "pid": running.pid,
        "health": "running",
        "rest": running.rest_url,
        "grpc": running.grpc_address,
        "tls": running.tls,
        "log": running.access_log,
    }
    lines = [f"{name:12} {value}" for name, value in data.items()]
    lines += [f"{'rollout':12} {_as_line(each)}" for each in split]
    return Result(data | {"rollouts": split}, "\n".join(lines))


def _known(state_dir: Path, model: str) -> Rollout:
    from skewless.rollout.state import Rollout

    found = Rollout.read(state_dir, model)
    if found is None:
        raise UsageError(
            f"{model} has had no rollout; start one with `skewless rollout start {model} --candidate VERSION`"
        )
    return found


def _told(changed: Rollout) -> Result:
    return Result(changed, _as_line(changed))


def _as_line(shown: Rollout) -> str:
    shadow = f", and a copy of what {shown.baseline} answers" if shown.shadow else ""
    split = f"{shown.candidate} answers {shown.percent:g} % of the clients{shadow}, {shown.baseline} the others"
    ended = {"promoted": f"{shown.candidate} is the default version", "aborted": f"{shown.baseline} answers everybody"}
    pending = f"; {shown.pending} was interrupted" if shown.pending else ""
    return f"{shown.model}: {shown.phase}: {ended.get(shown.phase, split)}{pending}"


def _as_text(shown: Rollout) -> str:
    lines = [_as_line(shown), f"  policy: {shown.policy or 'the default one'}"]
    lines += [f"  {each.time}  {each.action:8} {each.percent:5g} %  {each.why}" for each in shown.history]
    return "\n".join(lines)
