"""What lies in a model store, and what its archives say about themselves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skewless.errors import UsageError
from skewless.torchserve.archive import METRICS, Archive

_FINGERPRINT_DIGITS = 12

# An archive that is not proved yet is called so. The dot hides it, from TorchServe as well where that loads a whole store;
# by its name, which has to end in .mar and to be in the store itself, it can be registered.
UNPROVED = ".unproved.mar"


@dataclass(frozen=True)
class StoredVersion:
    """One version of a model: in the store, registered with a server, or both.

    default: whether it answers requests without a version. workers: their states; None where it is not registered.
    threshold, fingerprint (of the pipeline, its first 12 digits), runtime, tier, auc: of the archive's metrics; None for
    an archive that has none. problem: why the file cannot be read, if it cannot.
    """

    name: str
    version: str
    archive: str
    default: bool = False
    workers: list[str] | None = None
    threshold: float | None = None
    fingerprint: str | None = None
    runtime: str | None = None
    tier: str | None = None
    auc: float | None = None
    problem: str = ""


def archives(store: Path) -> list[Path]:
    """The archives of a store, by name and version, without those that are not proved yet: what a restart may serve."""
    # Unlike a shell's, this * matches names that start with a dot.
    return sorted((path for path in store.glob("*.mar") if not path.name.startswith(".")), key=by_version)


def listing(store: Path, registered: Iterable[Mapping[str, Any]] = ()) -> list[StoredVersion]:
    """Every archive of a store, by name and version. registered: the rows of `Server.models()`."""
    rows = {row["archive"]: row for row in registered}
    found = []
    for path in archives(store):
        row = rows.pop(path.name, None)
        state = {"default": row["default"], "workers": row["workers"]} if row else {}
        try:
            with Archive(path) as archive:
                name, version = archive.name_and_version()
                found.append(StoredVersion(name, version, path.name, **state, **_measured(archive)))
        except UsageError as error:
            found.append(StoredVersion(path.stem, "", path.name, problem=str(error)))
    for row in rows.values():
        # Retraining is proving it, or the file has been removed since it was registered.
        problem = "not proved yet" if row["archive"].endswith(UNPROVED) else "the file is gone"
        found.append(
            StoredVersion(row["name"], row["version"], row["archive"], row["default"], row["workers"], problem=problem)
        )
    return found


def by_version(archive: Path) -> list[tuple[bool, int, str]]:
    """A key to sort archives by: numbers in a name compare as numbers, so 1.10 is above 1.9."""
    parts = re.split(r"(\d+)", archive.stem)
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def as_table(rows: list[StoredVersion]) -> str:
    """The rows as aligned text."""
    lines = [["model", "version", "registered", "workers", "threshold", "pipeline", "runtime", "tier", "AUC"]]
    for row in rows:
        registered = "-" if row.workers is None else "default" if row.default else "yes"
        figures = (row.threshold, row.fingerprint, row.runtime, row.tier, None if row.auc is None else f"{row.auc:.4f}")
        workers = "-" if row.workers is None else ",".join(row.workers) or "none"
        shown = ["-" if figure is None else str(figure) for figure in figures]
        lines.append([row.name, row.version or "-", registered, workers, *shown])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join(text + [f"{row.archive}: {row.problem}" for row in rows if row.problem])


def _measured(archive: Archive) -> dict[str, Any]:
    """The figures that an archive's metrics.json has; empty for an archive that was not built by `skewless build`."""
    if METRICS not in archive:
        return {}
    metrics = archive.json_object(METRICS)
    try:
        return {
            "threshold": _number(metrics["threshold"]),
            "fingerprint": str(metrics["pipeline_fingerprint"])[:_FINGERPRINT_DIGITS],
            "runtime": str(metrics["runtime"]["name"]),
            "tier": str(metrics.get("tier", metrics["runtime"]["tier"])),
            "auc": _number(metrics["evaluation"]["auc"]),
        }
    except (LookupError, TypeError, OverflowError) as error:
        raise archive.refused(f"its {METRICS} is not as `skewless build` writes it: {error!r}") from error


def _number(value: Any) -> float | None:
    if value is not None and type(value) not in (int, float):
        raise TypeError(f"{value!r:.60} is no number")
    return None if value is None else float(value)
