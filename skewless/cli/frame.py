"""What every command has in common: its result as text or JSON, progress on standard error, and its exit code.

Exit codes: 0; 1 when a check failed, such as a smoke test or an archive that does not load; 2 for wrong use or wrong input.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
import math
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from skewless.errors import CheckFailedError, ServerError, UsageError

if TYPE_CHECKING:
    import torch

FAILED, MISUSED = 1, 2

# The headings under which `skewless --help` lists the commands.
MAKE, PACKAGE, SERVE, DEFINE = "Make a model", "Package and compare", "Serve it", "Definitions"

# As a model goes its way; help lists them so.
_ORDER = (
    "new corpus train evaluate features import adopt tune build sign verify export skew trace diff serve register smoke predict score versions gateway "
    "rollout retrain schema"
)


class _InOrder(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=_ORDER.split().index)


NAME = "skewless"
app = typer.Typer(
    name=NAME,
    cls=_InOrder,
    help="Serve exactly what you trained: package a trained classifier for TorchServe, and prove that it is served as evaluated.",
    epilog="Exit codes: 0; 1 when a check failed; 2 for wrong use or wrong input.",
    pretty_exceptions_enable=False,
)

Archive = Annotated[
    Path, typer.Argument(metavar="ARCHIVE", help="The model's folder, with pipeline.yaml and model.yaml.")
]
Manifest = Annotated[
    Path, typer.Option(metavar="CSV", help="Labelled files: file_path, label, perhaps split and group.")
]
Root = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="What file_path is relative to.", show_default="the manifest's folder"),
]
Checkpoint = Annotated[Path, typer.Option(metavar="FILE", help="best.pth of a training or an import.")]
SkipUnreadable = Annotated[
    bool, typer.Option("--skip-unreadable", help="List recordings that cannot be read, and go on without them.")
]
Device = Annotated[
    str, typer.Option(metavar="NAME", help="Where the network runs: cpu, cuda, cuda:1, mps; auto: a GPU if any.")
]
StateDir = Annotated[
    Path, typer.Option("--state-dir", metavar="DIR", help="The server's folder: tokens, logs, process id.")
]
TrustedKeys = Annotated[
    Path,
    typer.Option(
        "--trusted",
        metavar="FILE|DIR",
        envvar="SKEWLESS_TRUSTED_KEYS",
        help="Public keys on P-256, in PEM: a file, or a folder of files that end in .pub or .pem.",
    ),
]
STATE_DIR = Path(".server")


@dataclasses.dataclass(frozen=True)
class Result:
    """What a command found out. data: for --json. text: for people. failed: whether a check failed, which exits with 1."""

    data: Any
    text: str
    failed: bool = False


# How the command that runs prints its result.
_PUBLISH: ContextVar[Callable[[Result], None]] = ContextVar("publish")


def command(
    group: typer.Typer, name: str, *, panel: str | None = None, hidden: bool = False
) -> Callable[[Callable[..., Result | None]], Callable[..., Result | None]]:
    """Make a function a command of `group`, with the option --json beside its own; the function returns the Result.

    Whatever is printed while the function runs is progress and goes to standard error. What it raises becomes one
    line there, and the exit code.
    """

    def register(function: Callable[..., Result | None]) -> Callable[..., Result | None]:
        where = f"{NAME} {name}" if group is app else f"{NAME} {group.info.name} {name}"

        @functools.wraps(function)
        def run(*, as_json: bool, **arguments: Any) -> None:
            _PUBLISH.set(functools.partial(_print, as_json=as_json, file=sys.stdout))
            with _exit_codes(where), contextlib.redirect_stdout(sys.stderr):
                result = function(**arguments)
            if result is not None:
                publish(result)
                if result.failed:
                    raise typer.Exit(FAILED)

        json_option = typer.Option("--json", help="Print the result as one JSON document.")
        own = inspect.signature(function, eval_str=True)
        extra = inspect.Parameter(
            "as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, json_option]
        )
        vars(run)["__signature__"] = own.replace(
            parameters=[
                *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own.parameters.values()),
                extra,
            ],
            return_annotation=None,
        )
        run.__annotations__ = {}
        group.command(name, rich_help_panel=panel, hidden=hidden)(run)
        return function

    return register


def publish(result: Result) -> None:
    """Print a result on standard output, as text or as JSON. A command does it itself only when it goes on afterwards."""
    _PUBLISH.get()(result)


def _print(result: Result, as_json: bool, file: TextIO) -> None:
    print(json.dumps(_plain(result.data), indent=2) if as_json else result.text, file=file, flush=True)


@contextlib.contextmanager
def undone_by_a_signal() -> Iterator[None]:
    """Let SIGTERM raise in the block, as Ctrl-C does, so that what is interrupted is taken back."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def device_of(name: str) -> torch.device:
    """The device of an option; "auto" is a GPU where there is one. Raises UsageError for one that cannot be used here."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device is {name!r}, expected cpu, or cuda or mps where there is one: {reason}") from error
    return device


@contextlib.contextmanager
def _exit_codes(where: str) -> Iterator[None]:
    """The one place that turns exceptions into exit codes. Anything else is a fault of ours and keeps its traceback."""
    try:
        yield
    except UsageError as error:
        _end(f"{where}: {error}", MISUSED, error)
    except (ServerError, CheckFailedError) as error:
        _end(f"{where}: {error}", FAILED, error)
    except ModuleNotFoundError as error:
        if (error.name or "skewless").partition(".")[0] == "skewless":
            raise
        _end(
            f"{where}: needs the package '{error.name}', which is not installed; `pip install 'skewless[all]'` brings every one",
            MISUSED,
            error,
        )
    except (ValueError, OSError) as error:
        _end(f"{where}: {error}", MISUSED, error)


def _end(message: str, code: int, cause: Exception) -> None:
    print(message, file=sys.stderr)
    raise typer.Exit(code) from cause


def _plain(value: Any) -> Any:
    """`value` in what JSON has: paths as text, and null for numbers that are not finite."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
