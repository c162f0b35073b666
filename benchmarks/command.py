"""How a benchmark that starts servers ends: with its servers, and with a message."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from skewless.errors import LoadError, ServerError, UsageError


@contextlib.contextmanager
def scratch_folder(parser: argparse.ArgumentParser, wrong: type[Exception] = UsageError) -> Iterator[Path]:
    """A folder for what the block's servers write, which is removed at its end. SIGTERM ends the block as an exception does.

    wrong: raised in the block, it ends the command with exit code 2, as UsageError does; ServerError and LoadError end it
        with 1.
    """
    # Whoever ends the benchmark ends its servers, too.
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        # A short path: TorchServe's workers and Ray listen on sockets in there.
        with tempfile.TemporaryDirectory(prefix="sk") as folder:
            yield Path(folder)
    except (wrong, UsageError) as error:
        parser.error(str(error))
    except (ServerError, LoadError) as error:
        sys.exit(f"{parser.prog}: {error}")
    finally:
        signal.signal(signal.SIGTERM, previous)
