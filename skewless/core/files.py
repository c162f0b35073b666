"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A path in the same folder to write to, which takes the place of `path` when the block ends.

    Whoever reads meanwhile finds the old file or the new one, never a part. When the block raises, the unfinished file is
    removed and `path` stays as it was. The name ends in ".tmp", so that nothing takes it for a finished file.

    Example: `with atomic(folder / "status.json") as unfinished: unfinished.write_text(text)`.
    """
    # A name of its own for every writer: processes and threads may write the same file at once.
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
