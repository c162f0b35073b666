"""The command that a container's probes run."""

from __future__ import annotations

from typing import Annotated

import typer

from skewless.cli.frame import STATE_DIR, Result, StateDir, command
from skewless.cli.serving import serve
from skewless.errors import UsageError


@command(serve, "health")
def health(
    live: Annotated[bool, typer.Option("--live", help="Only whether TorchServe answers; nothing is computed.")] = False,
    timeout: Annotated[float, typer.Option(metavar="S", min=0.1, help="Seconds to wait for each answer.")] = 10.0,
    state_dir: StateDir = STATE_DIR,
) -> Result:
    """Whether requests may come: each model's default version gives a reference its recorded probability.

    Exits with 1 when it does not, while archives are loaded, and after SIGTERM. For startup and readiness probes; a liveness probe
    takes --live, or a busy server is restarted.
    """
    from skewless.torchserve import health
    from skewless.torchserve.server import Server

    try:
        server = Server.attach(state_dir)
    except UsageError as error:
        # Nothing is wrong with asking whether a server is running.
        return Result({"passed": False, "checks": [], "message": str(error)}, str(error), failed=True)
    checks = health.alive(server, timeout) if live else health.ready(server, timeout)
    passed = all(check.passed for check in checks)
    return Result({"passed": passed, "checks": checks}, health.as_text(checks), failed=not passed)
