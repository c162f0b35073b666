"""Start, stop, or look at the TorchServe of a state directory.

python scripts/serve.py start      then register archives with scripts/register.py
python scripts/serve.py status     exits with 1 when none is running or a model has no worker
python scripts/serve.py stop
python scripts/serve.py token      prints a token that is good for up to an hour; each renewal ends the one before
python scripts/serve.py run        in the foreground, with every archive of the model store, until a signal: for containers
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from skewless.errors import LoadError, ServerError, UsageError
from skewless.torchserve.server import CONFIG, Server


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["start", "stop", "status", "token", "run"])
    parser.add_argument("--state-dir", type=Path, default=Path(".server"), help="tokens, logs, process id (.server)")
    parser.add_argument("--model-store", type=Path, default=Path("model_store"), help="archives (model_store)")
    parser.add_argument("--config", type=Path, default=CONFIG, help="TorchServe's settings (config.properties)")
    parser.add_argument("--ports", choices=["free"], help="free ones instead of those in the configuration")
    parser.add_argument(
        "--kind", choices=["inference", "management"], default="inference", help="of token: what it opens (inference)"
    )
    arguments = parser.parse_args()
    where = (arguments.model_store, arguments.state_dir, arguments.config, arguments.ports)
    try:
        if arguments.action == "run":
            return run(*where)
        if arguments.action == "start":
            Server.start(*where)
        server = Server.attach(arguments.state_dir)
        if arguments.action == "stop":
            server.stop()
            print(f"stopped process {server.pid}")
            return 0
        if arguments.action == "token":
            print(server.token(arguments.kind))
            return 0
        status = server.status()
        show(status)
        # TorchServe's health leaves out a model that was scaled to no workers at all.
        return 0 if status["health"] == "Healthy" and all(model["workers"] for model in status["models"]) else 1
    except UsageError as error:
        # Nothing is wrong with asking whether a server is running.
        if arguments.action == "status":
            print(error)
            return 1
        parser.error(str(error))
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1


def run(model_store: Path, state_dir: Path, config: Path, ports: str | None) -> int:
    """Serve all archives of the store, of each model the highest version by default; returns when the server ends."""
    # As an exception, so that a signal during the start stops what was started, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    server = Server.start(model_store, state_dir, config, ports)
    try:
        for archive in sorted(model_store.glob("*.mar"), key=_by_version):
            try:
                server.register(archive, default=True)
            except LoadError as error:
                raise ServerError(f"{archive.name} does not load: {error}") from error
        show(server.status())
        sys.stdout.flush()
        while server.process():
            time.sleep(1.0)
        print(f"TorchServe has ended, see {server.state_dir / 'logs'}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    finally:
        server.stop()


def _by_version(archive: Path) -> list[tuple[bool, int, str]]:
    """Numbers in a name compare as numbers: 1.10 is above 1.9."""
    parts = re.split(r"(\d+)", archive.stem)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def show(status: dict) -> None:
    """One line per setting, then one per registered version."""
    models = status["models"]
    for name, value in status.items():
        if name != "models":
            print(f"{name:12} {value}")
    for model in models:
        default = ", default" if model["default"] else ""
        print(f"{'model':12} {model['name']} {model['version']}{default}: workers {', '.join(model['workers'])}")
    if not models:
        print(f"{'model':12} none; register an archive with scripts/register.py")


if __name__ == "__main__":
    sys.exit(main())
