#!/usr/bin/env python3
"""Train on new files and register the result beside the version that serves, without making it the default.

python scripts/retrain.py start --archive archive/talent --manifest new.csv     in the background; prints the folder to poll
python scripts/retrain.py status --out runs/retrain/talent-2.0                  progress as JSON; exits with 1 when it failed
python scripts/retrain.py run ...                                               as start, but waits for the end

--manifest may be given several times: the files of the last training and the new ones. A manifest without a split column
has a fifth kept for the test, stratified by label, a group (such as a singer) on one side only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from skewless.core.postprocess import build_postprocessor
from skewless.core.config import read_config
from skewless.errors import ServerError, UsageError
from skewless.torchserve.retrain import STATUS, check_version, merged, next_version, read_status, retrain
from skewless.torchserve.server import Server
from skewless.training.fit import config_of
from skewless.training.recipe import read_recipe


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["start", "run", "status"])
    parser.add_argument("--archive", type=Path, help="definition to train for, such as archive/talent")
    parser.add_argument("--manifest", type=Path, action="append", default=[], help="CSV with file_path, label, ...")
    parser.add_argument("--recipe", type=Path, help="training settings (ARCHIVE/recipe.yaml)")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    parser.add_argument("--batch-size", type=int, help="instead of the recipe's")
    parser.add_argument("--version", help="of the new archive (the next whole number)")
    parser.add_argument("--out", type=Path, help="folder of the run (runs/retrain/NAME-VERSION)")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="what preprocessing gave (runs/cache)")
    parser.add_argument("--state-dir", type=Path, default=Path(".server"), help="the server's (.server)")
    arguments = parser.parse_args()
    try:
        if arguments.action == "status":
            if arguments.out is None:
                parser.error("status needs --out, the folder that start printed")
            status = read_status(arguments.out)
            print(json.dumps(asdict(status), indent=2))
            return 1 if status.state == "failed" else 0
        return start(arguments)
    except (ServerError, ValueError, OSError) as error:
        # What is wrong with the request, and what happened on the way, have a code each.
        print(f"retrain.py: {error}", file=sys.stderr)
        return 1 if isinstance(error, ServerError) and not isinstance(error, UsageError) else 2


def start(arguments: argparse.Namespace) -> int:
    """Check what can be checked at once, then run, or start a process that does."""
    if arguments.archive is None or not arguments.manifest:
        raise UsageError("--archive and at least one --manifest are needed")
    absent = [str(path) for path in arguments.manifest if not path.is_file()]
    if absent:
        raise UsageError(f"there is no manifest {absent[0]}")
    server = Server.attach(arguments.state_dir)
    name = arguments.archive.resolve().name
    version = arguments.version or next_version(server, name)
    check_version(server, name, version)
    out = arguments.out or Path("runs/retrain", f"{name}-{version}")
    if (out / STATUS).exists() and read_status(out).state != "failed":
        raise UsageError(f"{out} already holds a retraining; choose another --version or --out")
    settings = read_recipe(arguments.recipe or arguments.archive / "recipe.yaml", "training")
    given = {"epochs": arguments.epochs, "batch_size": arguments.batch_size}
    config = config_of(settings | {k: v for k, v in given.items() if v is not None})
    # Before anything is written, and before it runs in the background, where nobody looks at once.
    classes = build_postprocessor(read_config(arguments.archive / "model-config.yaml")["postprocess"]).classes
    rows = merged([(path, path.parent) for path in arguments.manifest], classes)
    if arguments.action == "run":
        result = retrain(arguments.archive, rows, config, version, out, server, arguments.cache)
        print(json.dumps(result, indent=2))
        return 0
    out.mkdir(parents=True, exist_ok=True)
    (out / STATUS).unlink(missing_ok=True)
    given = vars(arguments) | {"action": None, "version": version, "out": out}
    options = [
        (f"--{k.replace('_', '-')}", v) for k, vs in given.items() for v in (vs if isinstance(vs, list) else [vs])
    ]
    command = [sys.executable, __file__, "run", *(str(part) for k, v in options if v is not None for part in (k, v))]
    with open(out / "retrain.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
    while not (out / STATUS).exists() or read_status(out).pid != process.pid:
        if process.poll() is not None:
            raise ServerError(f"it ended at once: {(out / 'retrain.log').read_text(encoding='utf-8').strip()}")
        time.sleep(0.1)
    print(f"{name} {version}: process {process.pid}; poll it with: python scripts/retrain.py status --out {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
