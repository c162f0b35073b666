"""From new files to a registered version beside the default one, step by step, with progress that others can read."""

from __future__ import annotations

import json
import os
import re
import shutil
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
from skewless.packaging.reservation import RESERVED, Reservation, version_file
from skewless.packaging.signing import SigningKey
from skewless.torchserve import versions
from skewless.torchserve.server import Server
from skewless.torchserve.smoke import smoke_test
from skewless.torchserve.store import UNPROVED, archives
from skewless.training.config import Config
from skewless.training.fit import fit
from skewless.training.manifest import ManifestError, Recording, check_contents, read_manifest

STATUS = "status.json"
LOG = "retrain.log"


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
    """The first whole number above every version that lies in the store, or that the server has or has had, as "N.0"."""
    return f"{_next_number(server, name)}.0"


def _next_number(server: Server, name: str) -> int:
    known = [m["version"] for m in server.models() if m["name"] == name]
    known += versions.Record.read(server.state_dir).versions(name)
    known += [p.stem.removeprefix(f"{name}-") for p in archives(server.model_store) if p.stem.startswith(f"{name}-")]
    numbers = [int(found[0]) for version in known if (found := re.match(r"\d+", version))]
    return max(numbers, default=0) + 1


def check_version(server: Server, name: str, version: str) -> None:
    """Raise UsageError, before hours of training, for a version that could not be built or registered at their end."""
    if not VERSION.fullmatch(version):
        raise UsageError(f"version is {version!r}, expected digits and letters joined by dots, such as 2.0")
    taken = (server.model_store / f"{name}-{version}.mar").exists()
    had = version in versions.Record.read(server.state_dir).versions(name)
    if taken or had or any((m["name"], m["version"]) == (name, version) for m in server.models()):
        raise UsageError(f"{name} {version} exists already; choose another --version")


def reserve_version(server: Server, name: str, version: str | None = None) -> tuple[str, Reservation]:
    """Keep a version from all others, until released or this process ends: the one asked for, or the next that is free.

    Before that, what killed retrainings of this model left is removed. Raises UsageError, at once, for a version that exists
    and for one that another process is building or retraining.
    """
    store = server.model_store
    remove_unproved(server, name)
    number = 0
    # Between a look and the reservation, others may take a version, and finish it: so look again.
    while version is None:
        number = max(number + 1, _next_number(server, name))
        if held := Reservation.take(version_file(store, name, f"{number}.0")):
            if number >= _next_number(server, name):
                return f"{number}.0", held
            held.release()
    check_version(server, name, version)
    held = Reservation.take(version_file(store, name, version))
    if held is None:
        raise UsageError(f"another process is building or retraining {name} {version}; choose another --version")
    try:
        check_version(server, name, version)
    except BaseException:
        held.release()
        raise
    return version, held


def remove_unproved(server: Server, name: str) -> None:
    """Unregister and remove what retrainings of a model left when they were killed before their archive was proved."""
    for path in sorted(server.model_store.glob(f".{name}-*{UNPROVED}")):
        # Those that hold it are still at it.
        if held := Reservation.take(path.with_name(path.name.removesuffix(UNPROVED) + RESERVED)):
            try:
                _remove(server, path)
            finally:
                held.release()


def _remove(server: Server, archive: Path) -> None:
    try:
        for row in server.models():
            if row["archive"] == archive.name:
                versions.withdraw(server, row["name"], row["version"])
    finally:
        archive.unlink(missing_ok=True)


def run_file(out: Path) -> Path:
    """What is reserved of a run's folder while a retraining writes into it."""
    return out / ".reserved"


def reserve_folder(out: Path) -> Reservation:
    """Make a run's folder and keep it from all others, until released or this process ends.

    One whose retraining failed or was killed may be used again: its training goes on where it stopped. Raises UsageError, at
    once, for one where a retraining runs or has succeeded, and for a folder of other files.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the folder {out} cannot be made: {error.strerror}; choose another --out") from error
    found = {path.name for path in out.iterdir()}
    if found and not found & {STATUS, LOG, run_file(out).name}:
        raise UsageError(f"{out} holds other files, such as {min(found)}; choose a new or an empty folder as --out")
    held = Reservation.take(run_file(out))
    if held is None:
        raise UsageError(f"a retraining is running in {out}; choose another --version or --out")
    try:
        if (out / STATUS).exists() and read_status(out).state != "failed":
            raise UsageError(f"{out} already holds a retraining; choose another --version or --out")
    except BaseException:
        held.release()
        raise
    return held


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
    key: SigningKey | None = None,
) -> dict[str, Any]:
    """Train on `rows`, evaluate, build, register without making it the default, and prove what is served; returns the result.

    The archive lies hidden in the model store until it is proved: a restart serves nothing that was not, wherever this ends.
    Whoever calls has reserved the version and the folder, by `reserve_version` and `reserve_folder`.
    references: the recordings that travel in the archive, and that the smoke test sends. key: to sign the archive with.
    `out` receives the run and status.json, which ends as "succeeded" or, with the reason, "failed"; what is raised then
    passes through.
    """
    out.mkdir(parents=True, exist_ok=True)
    status = Status(version, os.getpid())
    name = archive.resolve().name
    unproved = server.model_store / f".{name}-{version}{UNPROVED}"
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
        folder = out / "archive"
        built = build_archive(
            archive, best, out / "evaluation", version, folder, references=references, force=True, key=key
        )
        published = server.model_store / built.path.name
        try:
            shutil.move(built.path, unproved)
            status.write(out, progress=88, step="registering")
            versions.register(server, unproved)
            status.write(out, progress=92, step="proving what is served")
            table = smoke_test(server, name, version)
            failed = [row.path for row in table if not row.passed]
            if failed:
                raise ServerError(
                    f"the smoke test failed for {', '.join(failed)}; the default version goes on as before"
                )
            # TorchServe knows an archive by its file's name, so it registers the proved one anew.
            status.write(out, progress=97, step="publishing")
            versions.withdraw(server, name, version)
            if published.exists():
                raise ServerError(f"{published} was put there meanwhile, by something else than `skewless`")
            unproved.replace(published)
            try:
                model = versions.register(server, published)
            except BaseException:
                published.unlink()
                raise
        except BaseException as error:
            try:
                _remove(server, unproved)
            except ServerError as also:
                raise ServerError(f"{error}; unregistering it failed, too: {also}") from error
            raise
        result = {
            "model": model["name"],
            "version": version,
            "default": model["default"],
            "archive": published.name,
            "warnings": list(built.warnings),
            "max_dp": max(row.max_dp for row in table),
            "metrics": {k: v for k, v in metrics.items() if k not in ("library_versions", "calibration")},
        }
    except BaseException as error:
        status.write(out, state="failed", message=f"{type(error).__name__}: {error}")
        raise
    status.write(out, state="succeeded", progress=100, step="done", message="", result=result)
    return result
