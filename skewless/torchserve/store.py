"""What lies in a model store, and what its archives say about themselves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skewless.errors import UsageError
from skewless.torchserve.archive import METRICS, Archive

_DIGITS = 12

# An archive that is not proved yet is called so. The dot hides it, from TorchServe as well where that loads a whole store;
# by its name, which has to end in .mar and to be in the store itself, it can be registered.
UNPROVED = ".unproved.mar"


@dataclass(frozen=True)
class StoredVersion:
    """One version of a model: in the store, registered with a server, or both.

    state: "default" or "registered"; else "recorded" (it was registered, and comes back with the server), "left out" (it did
    not come back), "retired", or "-". default: whether it answers requests without a version. workers: their states; None
    where it is not registered. threshold, fingerprint (of the pipeline, its first 12 digits), runtime, tier, auc, metrics (all
    that evaluation measured): of the archive's metrics.json; None for an archive that has none. digest: `Archive.digest()` of
    the file. problem: why the file cannot be read, or what else is wrong with it.
    """

    name: str
    version: str
    archive: str
    state: str = "-"
    default: bool = False
    workers: list[str] | None = None
    threshold: float | None = None
    fingerprint: str | None = None
    runtime: str | None = None
    tier: str | None = None
    auc: float | None = None
    metrics: Mapping[str, Any] | None = None
    digest: str | None = None
    problem: str = ""


def archives(store: Path) -> list[Path]:
    """The archives of a store, by name and version, without those that are not proved yet: what a restart may serve."""
    # Unlike a shell's, this * matches names that start with a dot.
    return sorted((path for path in store.glob("*.mar") if not path.name.startswith(".")), key=by_version)


def listing(
    store: Path,
    registered: Iterable[Mapping[str, Any]] = (),
    recorded: Mapping[tuple[str, str], tuple[str, str]] | None = None,
) -> list[StoredVersion]:
    """Every archive of a store, by name and version. registered: the rows of `Server.models()`. recorded: by name and version,
    the archive and the state of what a server has had before."""
    rows = {row["archive"]: row for row in registered}
    recorded = dict(recorded or {})
    found = []
    for path in archives(store):
        row = rows.pop(path.name, None)
        try:
            with Archive(path) as archive:
                name, version = archive.name_and_version()
                known = _Known(row, recorded.pop((name, version), None))
                digest = archive.digest()
                found.append(
                    StoredVersion(name, version, path.name, **known.fields(), **_measured(archive), digest=digest)
                )
        except UsageError as error:
            found.append(StoredVersion(path.stem, "", path.name, **_Known(row).fields(), problem=str(error)))
    for row in rows.values():
        # Retraining is proving it, or the file has been removed since it was registered.
        problem = "not proved yet" if row["archive"].endswith(UNPROVED) else "the file is gone"
        recorded.pop((row["name"], row["version"]), None)
        found.append(
            StoredVersion(row["name"], row["version"], row["archive"], **_Known(row).fields(), problem=problem)
        )
    for (name, version), (file, state) in recorded.items():
        if state != "retired":
            found.append(StoredVersion(name, version, file, state, problem="the file is gone"))
    return found


@dataclass(frozen=True)
class _Known:
    """What a server knows of a version. row: of `Server.models()`. recorded: archive and state."""

    row: Mapping[str, Any] | None
    recorded: tuple[str, str] | None = None

    def fields(self) -> dict[str, Any]:
        """The fields of a StoredVersion."""
        if self.row:
            default = self.row["default"]
            return {
                "state": "default" if default else "registered",
                "default": default,
                "workers": self.row["workers"],
            }
        return {"state": self.recorded[1]} if self.recorded else {}


def by_version(archive: Path) -> list[tuple[bool, int, str]]:
    """A key to sort archives by: numbers in a name compare as numbers, so 1.10 is above 1.9."""
    parts = re.split(r"(\d+)", archive.stem)
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def as_table(rows: list[StoredVersion]) -> str:
    """The rows as aligned text."""
    lines = [["model", "version", "state", "workers", "threshold", "pipeline", "runtime", "tier", "AUC", "digest"]]
    for row in rows:
        auc = None if row.auc is None else f"{row.auc:.4f}"
        digest = None if row.digest is None else row.digest[:_DIGITS]
        figures = (row.threshold, row.fingerprint, row.runtime, row.tier, auc, digest)
        workers = "-" if row.workers is None else ",".join(row.workers) or "none"
        shown = ["-" if figure is None else str(figure) for figure in figures]
        lines.append([row.name, row.version or "-", row.state, workers, *shown])
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
            "fingerprint": str(metrics["pipeline_fingerprint"])[:_DIGITS],
            "runtime": str(metrics["runtime"]["name"]),
            "tier": str(metrics.get("tier", metrics["runtime"]["tier"])),
            "auc": _number(metrics["evaluation"]["auc"]),
            "metrics": metrics["evaluation"],
        }
    except (LookupError, TypeError, OverflowError) as error:
        raise archive.refused(f"its {METRICS} is not as `skewless build` writes it: {error!r}") from error


def _number(value: Any) -> float | None:
    if value is not None and type(value) not in (int, float):
        raise TypeError(f"{value!r:.60} is no number")
    return None if value is None else float(value)
