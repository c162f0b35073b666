"""The command `skewless`, run as an operator runs it, and shown."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def skewless(*arguments: str | Path, failing: int | None = 0, environment: Mapping[str, str] | None = None) -> Any:
    """Run `skewless ARGUMENTS --json` to its end, print the command, and return what it says.

    failing: the exit code that is expected; None where 1 is as good. Raises RuntimeError for another one, with the command's last words.
    """
    print("$", shlex.join(["skewless", *map(str, arguments)]), flush=True)
    line = [sys.executable, "-m", "skewless", *map(str, arguments), "--json"]
    ended = subprocess.run(line, capture_output=True, text=True, check=False, env=os.environ | dict(environment or {}))
    if ended.returncode not in ((0, 1) if failing is None else (failing,)):
        raise RuntimeError(
            f"it ended with {ended.returncode}, expected {failing}:\n{ended.stderr[-2000:]}{ended.stdout[-2000:]}"
        )
    return json.loads(ended.stdout) if ended.stdout.strip() else ended.stderr
