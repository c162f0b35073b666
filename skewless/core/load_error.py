"""Why a worker could not load an archive, in a file: TorchServe answers a registration before the reason is in its log."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from skewless.core.files import atomic

# Set by whoever starts TorchServe; without it nothing is written.
FOLDER = "SKEWLESS_LOAD_ERRORS"


@contextlib.contextmanager
def written_down(model: Mapping[str, Any]) -> Iterator[None]:
    """Write whatever is raised inside to `FOLDER/NAME-VERSION.json`, whole or not at all, and let it pass.

    model: the manifest's, with `modelName` and `modelVersion`.
    """
    try:
        yield
    except BaseException as error:
        if folder := os.environ.get(FOLDER):
            target = path(Path(folder), model["modelName"], model["modelVersion"])
            with atomic(target) as unfinished:
                unfinished.write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}), encoding="utf-8")
        raise


def path(folder: Path, name: str, version: str) -> Path:
    """Where the reason for one version is written: in the folder, whatever a manifest calls its model."""
    return folder / Path(f"{name}-{version}.json").name


def read(file: Path) -> str | None:
    """The reason as "Type: message"; None where the worker wrote none, as when it was killed."""
    return json.loads(file.read_text(encoding="utf-8"))["error"] if file.exists() else None


def check_own_code(model_dir: str) -> None:
    """Raise ImportError unless the code that is about to serve is the archive's own."""
    import skewless.core

    found = Path(skewless.core.__file__).resolve()
    if not found.is_relative_to(Path(model_dir).resolve()):
        raise ImportError(
            f"the code would be read from {found.parent}, expected the archive's own in {model_dir}; start the server without "
            "another skewless before the archive on its Python path"
        )
