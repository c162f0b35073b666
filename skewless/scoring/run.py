"""A scoring run: files to workers, their rows to parts, the parts to one Parquet file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from skewless.core.cores import available_cores
from skewless.errors import LoadError, ScoringError, UsageError
from skewless.scoring import worker
from skewless.scoring.files import File, list_files
from skewless.torchserve.archive import METRICS, MODEL, Archive

if TYPE_CHECKING:
    import psutil

    from skewless.scoring.parts import Parts

# Files that a worker is given at once. Few, because those that it has answered are lost when the run is killed meanwhile.
_CHUNK = 32
_MOST_CHUNKS = 20_000  # Ray's driver keeps some kilobytes for each
_PART_ROWS = 1_000
# A worker that dies, as of too little memory, is started again, but not for ever: a file may be what kills it.
_RESTARTS = 3
_STORE_BYTES = 256 * 2**20

# Set before Ray is imported: no report to its makers, no log on the terminal but what ends a run.
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_LOG_LEVEL": "ERROR",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# Ray's own switch for a machine that is no part of a cluster: all its processes listen on 127.0.0.1 only.
_ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


@dataclass(frozen=True)
class Mar:
    """What an archive says of itself. threads: for one worker; 0 where it leaves that to torch."""

    path: Path
    sha256: str
    name: str
    version: str
    fingerprint: str
    threads: int

    @classmethod
    def read(cls, path: Path) -> Mar:
        """Raises UsageError for a file that is not there, or is no archive of this project's."""
        with Archive(path) as packed:
            name, version = packed.name_and_version()
            metrics, model = packed.json_object(METRICS), packed.yaml(MODEL)
            try:
                fingerprint, threads = metrics["pipeline_fingerprint"], model["precision"].get("threads", 0)
            except (LookupError, TypeError, AttributeError) as error:
                raise packed.refused(f"it is not as `skewless build` writes it: {error!r}") from error
        if not isinstance(fingerprint, str) or type(threads) is not int:
            raise packed.refused(f"its pipeline's fingerprint is {fingerprint!r:.80}, its threads are {threads!r:.80}")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(path, digest, name, version, fingerprint, threads)


@dataclass(frozen=True)
class Crew:
    """How many workers there are, and torch's threads in each."""

    workers: int
    threads: int

    @classmethod
    def of(cls, cores: int, wanted: int | None, threads: int) -> Crew:
        """Workers x threads is what there are cores for, unless more are wanted.

        threads: the archive's; 0: one in each worker, or as many as the wanted workers leave. One is the best use of a core
        where there are files enough to keep every core busy.
        """
        workers = wanted or max(1, cores // (threads or 1))
        return cls(workers, threads or max(1, cores // workers))


@dataclass(frozen=True)
class Summary:
    """What a run did. files: all; resumed: those of them that an earlier, interrupted run had done. unreadable: the rows
    without an answer: file_path, status, error. seconds: of this run; files_per_s: from the first rows on, without the start
    of the workers; None where all rows came at once. workers is 0 where none was left to do."""

    out: Path
    archive: Mapping[str, Any]
    files: int
    resumed: int
    unreadable: list[dict[str, Any]]
    workers: int
    threads: int
    seconds: float
    files_per_s: float | None

    def _crew(self) -> str:
        if not self.workers:
            return "every file had been scored before"
        return f"workers: {self.workers}, threads of each: {self.threads}"

    def text(self) -> str:
        """For people. The first reasons only; the result has all."""
        archive, count = self.archive, len(self.unreadable)
        speed = f", {self.files_per_s:.1f} files/s once the workers were ready" if self.files_per_s else ""
        earlier = f" ({self.resumed} of them by an interrupted run)" if self.resumed else ""
        lines = [
            f"{self.out}: {self.files} files{earlier} by {archive['name']} {archive['version']}, pipeline "
            f"{archive['pipeline_fingerprint'][:12]}; {count} could not be read",
            f"{self._crew()}, {self.seconds:.1f} s{speed}",
            *(f"  {row['file_path']}: {row['status'] or 'not sent'}: {row['error']}" for row in self.unreadable[:50]),
        ]
        if count > 50:
            lines.append(f"  and {count - 50} more: the rows whose status is not 200")
        return "\n".join(lines)


def score(
    archive: Path,
    source: Path,
    out: Path,
    *,
    root: Path | None = None,
    workers: int | None = None,
    threshold: float | None = None,
    address: str | None = None,
    part_seconds: float = 10.0,
) -> Summary:
    """Score every file of a folder or a list, and write one row for each, in order, to `out`.

    archive: a .mar. source, root: as `list_files` has them. workers: None for as many as the machine, or the cluster, has
    cores for. threshold: instead of the archive's, in [0, 1]. address: a Ray cluster's; None for this machine alone.
    part_seconds: how often the rows so far are kept, in `OUT.parts`; a run that finds them there goes on after them.

    Each file is answered by itself, so its numbers do not depend on the files beside it: they are those of a server that gets
    it as a lone request. Raises UsageError and ListError for what cannot be done, LoadError for an archive that does not pass
    its self-test here, ScoringError where workers die.
    """
    started = time.monotonic()
    _require_extra()
    from skewless.scoring.parts import Parts

    mar = Mar.read(archive)
    with Parts.opened(out) as parts:
        stated = {
            "name": mar.name,
            "version": mar.version,
            "pipeline_fingerprint": mar.fingerprint,
            "sha256": mar.sha256,
        }
        options = {
            "archive": stated,
            "threshold": threshold,
            "input": str(source.absolute()),
            "root": None if root is None else str(root.absolute()),
        }
        files = parts.begin(options, list_files(source, root, out))
        done = resumed = parts.count()
        crew, speed = Crew(0, 0), None
        if done < len(files):
            with _ray(address, workers, mar.threads, parts) as (ray, crew, folder):
                batches = _batches(ray, mar, files[done:], crew, threshold, folder)
                with tqdm(total=len(files), initial=done, desc="scoring", unit="file") as bar:
                    speed = _collect(batches, parts, files, done, mar, part_seconds, bar)
        unreadable = parts.merge()
    seconds = time.monotonic() - started
    return Summary(out, stated, len(files), resumed, unreadable, crew.workers, crew.threads, seconds, speed)


def _collect(
    batches: Iterator[list[dict[str, Any]]],
    parts: Parts,
    files: list[File],
    done: int,
    mar: Mar,
    part_seconds: float,
    bar: tqdm,
) -> float | None:
    """Keep the rows as they come, in the files' order; returns files per second from the first ones on."""
    waiting: list[dict[str, Any]] = []
    first: tuple[float, int] | None = None
    kept_at = now = time.monotonic()
    try:
        for rows in batches:
            if fault := rows[0].get(worker.FAULT):
                raise LoadError(f"a worker could not load {mar.path}: {fault}")
            expected = [file.file_path for file in files[done + len(waiting) :][: len(rows)]]
            if [row["file_path"] for row in rows] != expected:
                raise ScoringError(f"the rows of {expected[0]} and others came out of their order; run it again")
            waiting += [row | {"model_name": mar.name} for row in rows]
            bar.update(len(rows))
            now = time.monotonic()
            first = first or (now, done + len(waiting))
            if now - kept_at >= part_seconds or len(waiting) >= _PART_ROWS:
                parts.write(done, waiting)
                done, waiting, kept_at = done + len(waiting), [], now
    finally:
        # Also when it is interrupted: what is there need not be computed again.
        if waiting:
            parts.write(done, waiting)
            done += len(waiting)
    if done < len(files):
        raise ScoringError(f"Ray ended with {done} of {len(files)} files; run the same command again to go on")
    return (done - first[1]) / (now - first[0]) if first and now > first[0] and done > first[1] else None


def _batches(
    ray: ModuleType, mar: Mar, files: list[File], crew: Crew, threshold: float | None, folder: str | None
) -> Iterator[list[dict[str, Any]]]:
    """Rows of some files at a time, in order. Raises ScoringError where a worker dies more often than it is started again."""
    import pyarrow as pa

    # The process that runs it must not import another skewless than the archive's.
    ray.cloudpickle.register_pickle_by_value(worker)
    packed = ray.put(mar.path.read_bytes())
    size = max(1, min(_CHUNK, len(files) // (8 * crew.workers)), -(-len(files) // _MOST_CHUNKS))
    chunks = [files[start : start + size] for start in range(0, len(files), size)]
    tables = [pa.Table.from_pylist([file._asdict() for file in chunk]) for chunk in chunks]
    # Of max_restarts, which later versions of Ray than ours take in another way.
    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    scored = ray.data.from_arrow(tables).map_batches(
        worker.Scorer,
        fn_constructor_args=(packed, crew.threads, threshold, folder),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(crew.workers, len(chunks)), max_tasks_in_flight_per_actor=2),
        num_cpus=crew.threads,
        max_restarts=_RESTARTS,
        max_task_retries=_RESTARTS,
    )
    count = 0
    try:
        for batch in scored.iter_batches(batch_size=None, batch_format="pyarrow"):
            rows = [json.loads(row) for row in batch["row"].to_pylist()]
            count += len(rows)
            yield rows
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()
        raise ScoringError(
            f"the workers ended at {files[min(count, len(files) - 1)].file_path} or one of the next "
            f"{2 * crew.workers * size} files: {type(error).__name__}: {' '.join(reason[-3:])}. The rows before it are kept: run the same "
            "command again to go on, with fewer --workers if memory was short"
        ) from error


@contextlib.contextmanager
def _ray(
    address: str | None, workers: int | None, threads: int, parts: Parts
) -> Iterator[tuple[ModuleType, Crew, str | None]]:
    """Ray, connected to a cluster or started on this machine, with how many workers fit, and the folder that they share here.

    Ended on leaving, and with it every process that was started here.
    """
    # Of another Ray that runs here, whose address may be in the environment, nothing is touched: "local" starts a new one.
    os.environ.update(_QUIET | ({} if address else _ALONE))
    import ray
    import ray.data

    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address:
        with _unheard(Path(os.devnull)):
            ray.init(address, **common)
        try:
            yield ray, Crew.of(int(ray.cluster_resources().get("CPU", 1)), workers, threads), None
        finally:
            ray.shutdown()
        return
    import psutil

    crew = Crew.of(available_cores(), workers, threads)
    # Ray puts sockets there, whose paths may have 107 characters.
    scratch = Path(tempfile.mkdtemp(prefix="skewless-", dir="/tmp" if Path("/tmp").is_dir() else None))
    parts.keep_in_mind(scratch)
    try:
        with _unheard(scratch / "start.log"):
            ray.init(
                "local",
                num_cpus=crew.workers * crew.threads,
                num_gpus=0,
                include_dashboard=False,
                object_store_memory=_STORE_BYTES,
                _temp_dir=str(scratch),
                _node_ip_address="127.0.0.1",
                **common,
            )
        yield ray, crew, str(scratch)
    finally:
        started = _processes(scratch)
        ray.shutdown()
        # It does not wait for its workers, and those have nothing more to do.
        _, left = psutil.wait_procs(started, timeout=1)
        for straggler in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                straggler.kill()
        psutil.wait_procs(left, timeout=10)
        _remove(scratch)


def _processes(scratch: Path) -> list[psutil.Process]:
    """Ray's processes here: those that this one started with the folder on their command line, and their own."""
    import psutil

    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if str(scratch) in " ".join(child.cmdline()):
                found += [child, *child.children(recursive=True)]
    return found


@contextlib.contextmanager
def _unheard(log: Path) -> Iterator[None]:
    """Send what compiled code writes to standard error to a file: that Ray has read its log level, for one."""
    sys.stderr.flush()
    with open(log, "wb") as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _remove(folder: Path) -> None:
    # Processes that are about to end may still write into it.
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.05)
    raise ScoringError(f"the temporary folder {folder} cannot be removed; remove it yourself")


def _require_extra() -> None:
    # Looked for only: Ray reads its settings when it is imported.
    if missing := [name for name in ("ray", "pyarrow", "pandas", "psutil") if find_spec(name) is None]:
        raise UsageError(
            f"scoring needs the package '{missing[0]}', which is not installed: pip install 'skewless[score]'"
        )
