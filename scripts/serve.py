"""Start, stop, or look at the TorchServe of a state directory.

python scripts/serve.py start      then register archives with scripts/register.py
python scripts/serve.py status     exits with 1 when none is running
python scripts/serve.py stop
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from serving.errors import ServerError, UsageError
from serving.server import CONFIG, Server


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["start", "stop", "status"])
    parser.add_argument("--state-dir", type=Path, default=Path(".server"), help="tokens, logs, process id (.server)")
    parser.add_argument("--model-store", type=Path, default=Path("model_store"), help="archives (model_store)")
    parser.add_argument("--config", type=Path, default=CONFIG, help="TorchServe's settings (config.properties)")
    parser.add_argument("--ports", choices=["free"], help="free ones instead of those in the configuration")
    arguments = parser.parse_args()
    try:
        if arguments.action == "start":
            Server.start(arguments.model_store, arguments.state_dir, arguments.config, arguments.ports)
        server = Server.attach(arguments.state_dir)
        if arguments.action == "stop":
            server.stop()
            print(f"stopped process {server.pid}")
            return 0
        show(server.status())
    except UsageError as error:
        # Nothing is wrong with asking whether a server is running.
        if arguments.action == "status":
            print(error)
            return 1
        parser.error(str(error))
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def show(status: dict) -> None:
    """One line per setting, then one per registered version."""
    models = status.pop("models")
    for name, value in status.items():
        print(f"{name:12} {value}")
    for model in models:
        default = ", default" if model["default"] else ""
        print(f"{'model':12} {model['name']} {model['version']}{default}: workers {', '.join(model['workers'])}")
    if not models:
        print(f"{'model':12} none; register an archive with scripts/register.py")


if __name__ == "__main__":
    sys.exit(main())
