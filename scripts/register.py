"""Register an archive of the model store with the running server, and wait until its workers are ready.

Exits with 1 when a worker cannot load the archive: the handler's own error is printed, the version is unregistered
again, and the versions already serving go on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from skewless.errors import LoadError, ServerError, UsageError
from skewless.torchserve.server import Server


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, help="a .mar file in the model store")
    parser.add_argument("--default", action="store_true", help="serve requests that name no version")
    parser.add_argument("--workers", type=int, help="processes (the archive's model-config.yaml)")
    parser.add_argument("--state-dir", type=Path, default=Path(".server"), help="the server's (.server)")
    arguments = parser.parse_args()
    try:
        server = Server.attach(arguments.state_dir)
        model = server.register(arguments.archive, arguments.workers, arguments.default)
    except UsageError as error:
        parser.error(str(error))
    except LoadError as error:
        log = server.state_dir / "logs" / "model_log.log"
        print(f"{arguments.archive} does not load: {error}\nunregistered again; details in {log}", file=sys.stderr)
        return 1
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    default = "default version" if model["default"] else "not the default version"
    print(f"{model['name']} {model['version']} registered, {default}, workers {', '.join(model['workers'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
