"""From new files to a registered version beside the default one, step by step, with progress that others can read."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from skewless.core.definition import Definition
from skewless.core.files import atomic
from skewless.errors import ServerError, UsageError
from skewless.evaluation.evaluate import evaluate
from skewless.packaging.build import VERSION, build_archive
from skewless.torchserve.server import Server
from skewless.torchserve.smoke import smoke_test
from skewless.training.config import Config
from skewless.training.fit import fit
from skewless.training.manifest import ManifestError, Recording, check_contents, read_manifest

STATUS = "status.json"


@dataclass
class Status:
    """What a poller reads. state: running, succeeded or failed; progress: percent; step: what is being done; message: how
    it stands, or why it failed; result: metrics and the registered version, at the end."""

    version: str
    pid: int
    state: str = "running"
    progress: int = 0
    step: str = "starting"
    message: str = ""
    started: float = field(default_factory=time.time)
    updated: float = field(default_factory=time.time)
    result: dict[str, Any] = field(default_factory=dict)

    def write(self, out: Path, **changes: Any) -> None:
        """Set fields and write the file; a reader sees the old one or the new one, whole."""
        for name, value in changes.items():
            setattr(self, name, value)
        self.updated = time.time()
        with atomic(out / STATUS) as unfinished:
            unfinished.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def read_status(out: Path) -> Status:
    """The status of a retraining; of one whose process is gone before its end, "failed". Raises UsageError without any."""
    try:
        status = Status(**json.loads((out / STATUS).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UsageError(f"{out} has no {STATUS}: no retraining was started there") from None
    except (ValueError, TypeError) as error:
        raise UsageError(f"{out / STATUS} is not a retraining's status: {error}") from error
    if status.state == "running" and not _is_alive(status):
        status.state, status.message = (
            "failed",
            f"its process {status.pid} ended during '{status.step}'; see retrain.log",
        )
    return status


def _is_alive(status: Status) -> bool:
    try:
        process = psutil.Process(status.pid)
        # A process that is younger than the status is another one with the same number.
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= status.started + 1
    except psutil.NoSuchProcess:
        return False


def next_version(server: Server, name: str) -> str:
    """The first whole number above every version that is registered or lies in the store, as "N.0"."""
    known = [m["version"] for m in server.models() if m["name"] == name]
    known += [p.stem.removeprefix(f"{name}-") for p in server.model_store.glob(f"{name}-*.mar")]
    numbers = [int(found[0]) for version in known if (found := re.match(r"\d+", version))]
    return f"{max(numbers, default=0) + 1}.0"


def check_version(server: Server, name: str, version: str) -> None:
    """Raise UsageError, before hours of training, for a version that could not be built or registered at their end."""
    if not VERSION.fullmatch(version):
        raise UsageError(f"version is {version!r}, expected digits and letters joined by dots, such as 2.0")
    taken = (server.model_store / f"{name}-{version}.mar").exists()
    if taken or any((m["name"], m["version"]) == (name, version) for m in server.models()):
        raise UsageError(f"{name} {version} exists already; choose another --version")


def merged(sources: Sequence[tuple[Path, Path]], classes: Sequence[str]) -> list[Recording]:
    """The rows of several (manifest, root), each of which says its own splits or has them assigned.

    Raises ManifestError for a recording that two of them have, whatever its file is called, for a group that they have in
    two splits, and for what `check_contents` refuses.
    """
    rows: list[Recording] = []
    splits: dict[str, str] = {}
    for number, (manifest, root) in enumerate(sources, start=1):
        for row in read_manifest(manifest, root, classes):
            if row.group and splits.setdefault(row.group, row.split) != row.split:
                raise ManifestError(
                    f"{manifest}: group {row.group!r} is in split {row.split} here and in {splits[row.group]} elsewhere; give "
                    "both the same in a split column"
                )
            # Two folders may use the same relative names.
            rows.append(replace(row, file_path=f"{number}/{row.file_path}"))
    for first, *others in check_contents(rows).values():
        for other in others:
            if _source(first) != _source(other):
                raise ManifestError(
                    f"{first.path} of manifest {_source(first)} and {other.path} of manifest {_source(other)} are the same "
                    "recording, byte for byte; list it in one of them"
                )
    return rows


def _source(row: Recording) -> str:
    """The number of the manifest, from 1, that a merged row is from."""
    return row.file_path.partition("/")[0]


def retrain(
    archive: Path,
    rows: list[Recording],
    config: Config,
    version: str,
    out: Path,
    server: Server,
    cache_dir: Path,
    references: Literal["evaluation", "synthetic"] = "evaluation",
) -> dict[str, Any]:
    """Train on `rows`, evaluate, build, register without making it the default, and prove what is served; returns the result.

    references: the recordings that travel in the archive, and that the smoke test sends.
    `out` receives the run and status.json, which ends as "succeeded" or, with the reason, "failed"; what is raised then
    passes through.
    """
    out.mkdir(parents=True, exist_ok=True)
    status = Status(version, os.getpid())
    try:
        definition = Definition.read(archive)

        def trained(epoch: dict[str, float]) -> None:
            message = f"epoch {epoch['epoch']} of at most {config.epochs}: validation AUC {epoch['val_auc']:.3f}"
            status.write(out, progress=10 + int(60 * epoch["epoch"] / config.epochs), step="training", message=message)

        status.write(out, progress=2, step="preprocessing", message=f"{len(rows)} files")
        device = torch.device("cpu")
        checkpoint = fit(rows, definition, config, out / "train", cache_dir=cache_dir, device=device, on_epoch=trained)
        status.write(out, progress=70, step="evaluating", message="")
        best = out / "train" / "best.pth"
        metrics = evaluate(definition, checkpoint, best, rows, "test", out / "evaluation", device)
        status.write(out, progress=80, step="building")
        built = build_archive(archive, best, out / "evaluation", version, server.model_store, references=references)
        try:
            status.write(out, progress=88, step="registering")
            model = server.register(built.path, default=False)
            status.write(out, progress=94, step="proving what is served")
            table = smoke_test(server, model["name"], version)
            failed = [row.path for row in table if not row.passed]
            if failed:
                raise ServerError(
                    f"the smoke test failed for {', '.join(failed)}; the default version goes on as before"
                )
        except BaseException:
            # In the store it would be registered with all others when a container starts.
            built.path.unlink(missing_ok=True)
            if any((m["name"], m["version"]) == (archive.resolve().name, version) for m in server.models()):
                server.unregister(archive.resolve().name, version)
            raise
        result = {
            "model": model["name"],
            "version": version,
            "default": model["default"],
            "archive": built.path.name,
            "warnings": list(built.warnings),
            "max_dp": max(row.max_dp for row in table),
            "metrics": {k: v for k, v in metrics.items() if k not in ("library_versions", "calibration")},
        }
    except BaseException as error:
        status.write(out, state="failed", message=f"{type(error).__name__}: {error}")
        raise
    status.write(out, state="succeeded", progress=100, step="done", message="", result=result)
    return result
