"""What dies or fills up, what a client then sees, and what is lost. Linux only.

    python -m benchmarks.faults model_store/cough-1.0.mar

Servers of its own, on free ports of 127.0.0.1, serve copies of the archive in a temporary folder, while callers send its
references by REST and gRPC and hold every answer against the evaluated probabilities. Meanwhile workers are killed, the server is
killed, the archive is cut and replaced, the disk fills up (a tmpfs, where mounting is allowed), and a worker runs out of memory.
Prints a table. Exits with 1 when an answer was wrong, or more was lost than what the killed processes were working on.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import soundfile

from benchmarks.command import scratch_folder
from skewless.errors import LoadError, ServerError, UsageError
from skewless.torchserve import versions
from skewless.torchserve.client import Answer, Client
from skewless.torchserve.server import Server, name_and_version
from skewless.torchserve.smoke import References

# How far an answer may be from the evaluated probability: half of what the exact tier allows.
TOLERANCE = 5e-5
PATIENCE_S = 120.0  # for a worker to come back


@dataclass(frozen=True)
class Canaries:
    """An archive's references: requests whose right answers are known."""

    name: str
    version: str
    references: References

    @classmethod
    def of(cls, archive: Path) -> Canaries:
        """Read them out of an archive. Raises UsageError for one that carries none."""
        return cls(*name_and_version(archive), References.from_archive(archive))

    def deviation(self, number: int, answer: Answer) -> float:
        """How far the answer to a reference is from its evaluated probabilities; infinite where it answers another model."""
        scores, _ = self.references.postprocessor.read(answer.body)
        expected = self.references.entries[number]["scores"]
        if answer.body["pipeline_fingerprint"] != self.references.fingerprint:
            return float("inf")
        return max(abs(a - b) for a, b in zip(scores, expected, strict=True))


@dataclass
class Seen:
    """What the callers saw. right: answers within TOLERANCE; wrong: other answers; failed: (status, message) of the rest.
    furthest: of the answers from their probabilities. longest_s: wait for an answer."""

    right: int = 0
    wrong: int = 0
    failed: Counter[tuple[int, str]] = field(default_factory=Counter)
    furthest: float = 0.0
    longest_s: float = 0.0

    @property
    def lost(self) -> int:
        return self.failed.total()

    @property
    def words(self) -> str:
        """The failures as a sentence's part."""
        return "; ".join(f"{count} x {status} {message}" for (status, message), count in sorted(self.failed.items()))


class Callers:
    """So many callers, half of them by REST and half by gRPC, each sending its next reference once it has its answer.

    Example: `with Callers(server, canaries, 8) as callers: ...; callers.wait_for(20)`, then `callers.seen`.
    """

    def __init__(self, server: Server, canaries: Canaries, count: int = 8) -> None:
        self.seen = Seen()
        self._canaries = canaries
        self._client = Client(server)
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._call, args=(number,)) for number in range(count)]

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._client.close()

    def wait_for(self, more: int) -> None:
        """Return once there are so many more right answers. Raises ServerError when that takes longer than PATIENCE_S."""
        with self._changed:
            wanted = self.seen.right + more
            if not self._changed.wait_for(lambda: self.seen.right >= wanted, PATIENCE_S):
                raise ServerError(
                    f"{self.seen.right} of {wanted} right answers after {PATIENCE_S:g} s: {self.seen.words}"
                )

    def _call(self, number: int) -> None:
        payloads = self._canaries.references.payloads
        send = self._client.predict_grpc if number % 2 else self._client.predict_rest
        while not self._stop.is_set():
            chosen = number % len(payloads)
            number += 1
            answer = send(self._canaries.name, payloads[chosen], version=self._canaries.version)
            with self._changed:
                self._count(chosen, answer)
                self._changed.notify_all()
            if answer.status != 200:
                # Without a server the next would fail within a millisecond.
                self._stop.wait(0.1)

    def _count(self, chosen: int, answer: Answer) -> None:
        seen = self.seen
        seen.longest_s = max(seen.longest_s, answer.seconds)
        if answer.status != 200:
            message = str(answer.body.get("message"))
            # A connection that is refused names the objects of this process.
            seen.failed[answer.status, "no connection" if "onnect" in message else message[:80]] += 1
            return
        apart = self._canaries.deviation(chosen, answer)
        seen.furthest = max(seen.furthest, apart)
        if apart <= TOLERANCE:
            seen.right += 1
        else:
            seen.wrong += 1


@dataclass(frozen=True)
class Row:
    """One fault. sees: by a client. lost: of what was accepted. back_s: until a right answer came again; None where there was
    no gap. sound: nothing was wrong, and no more lost than the fault explains."""

    fault: str
    sees: str
    lost: str
    back_s: float | None
    sound: bool
    furthest: float = 0.0


def worker_pid(server: Server, canaries: Canaries) -> int | None:
    """The process of a model's first worker that is ready; None while there is none."""
    (model,) = server.manage("GET", f"/models/{canaries.name}/{canaries.version}").json()
    return next((worker["pid"] for worker in model["workers"] if worker["status"] == "READY"), None)


def wait_for_worker(server: Server, canaries: Canaries, other_than: int | None = None) -> int:
    """The process of a worker that is ready, another one than given. Raises ServerError after PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    while (pid := worker_pid(server, canaries)) is None or pid == other_than or not alive(pid):
        if time.monotonic() > deadline:
            raise ServerError(f"no worker is ready after {PATIENCE_S:g} s")
        time.sleep(0.1)
    return pid


def alive(pid: int) -> bool:
    """Whether a process runs. One that has ended stays as a zombie where nobody asks for its end."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def batch_size(server: Server, canaries: Canaries) -> int:
    """How many requests a worker takes at once."""
    return server.manage("GET", f"/models/{canaries.name}/{canaries.version}").json()[0]["batchSize"]


def killed_workers(server: Server, canaries: Canaries, kills: int = 6, every_s: float = 10.0) -> Row:
    """Kill a worker so often, under load. At most what it was working on may be lost, and nothing that waits in the queue."""
    at_most, back = batch_size(server, canaries), 0.0
    with Callers(server, canaries) as callers:
        for _ in range(kills):
            callers.wait_for(10)
            time.sleep(every_s)
            pid = wait_for_worker(server, canaries)
            killed = time.perf_counter()
            os.kill(pid, signal.SIGKILL)
            wait_for_worker(server, canaries, other_than=pid)
            back = max(back, time.perf_counter() - killed)
        callers.wait_for(10)
    seen = callers.seen
    return Row(
        f"a worker killed {kills} times, every {every_s:g} s, 8 callers",
        f"{seen.words}; {seen.right} right; the longest wait {seen.longest_s:.1f} s",
        f"{seen.lost}: what the worker had taken (batches of {at_most})",
        back,
        seen.wrong == 0 and seen.lost <= kills * at_most and {status for status, _ in seen.failed} <= {500, 507},
        seen.furthest,
    )


def killed_server(server: Server, canaries: Canaries) -> tuple[Row, Server]:
    """Kill TorchServe itself under load, start another one in the same state directory, and bring back what was registered.

    Its worker is stopped before, as if it computed something long: it would not notice that its server is gone.
    """
    # As an operator would, so that it is recorded.
    versions.set_default(server, canaries.name, canaries.version)
    with Callers(server, canaries) as callers:
        callers.wait_for(10)
        pid = wait_for_worker(server, canaries)
        before = callers.seen.lost
        os.kill(pid, signal.SIGSTOP)
        os.kill(server.pid, signal.SIGKILL)
        killed = time.perf_counter()
    seen = callers.seen
    dropped = seen.lost - before
    again = Server.start(server.model_store, server.state_dir, ports="free")
    versions.restore(again, versions.Restored())
    with Callers(again, canaries) as callers:
        callers.wait_for(1)
        back = time.perf_counter() - killed
    after = callers.seen
    orphaned = alive(pid)
    if orphaned:
        os.kill(pid, signal.SIGKILL)
    row = Row(
        "TorchServe killed, then `serve start`",
        f"503, no connection, until it is registered again; {seen.right} right before, {after.right} after",
        f"{dropped}: every request that was waiting for its answer",
        back,
        seen.wrong == after.wrong == after.lost == 0 and not orphaned,
        max(seen.furthest, after.furthest),
    )
    return row, again


def changed_archive(server: Server, canaries: Canaries) -> Row:
    """Cut, then remove the archive of a version that is served, and kill its worker: the next one reads the unpacked copy."""
    archive = server.model_store / f"{canaries.name}-{canaries.version}.mar"
    whole = archive.read_bytes()
    try:
        with Callers(server, canaries) as callers:
            callers.wait_for(10)
            archive.write_bytes(whole[: len(whole) // 2])
            callers.wait_for(10)
            pid = wait_for_worker(server, canaries)
            archive.unlink()
            os.kill(pid, signal.SIGKILL)
            wait_for_worker(server, canaries, other_than=pid)
            callers.wait_for(10)
    finally:
        archive.write_bytes(whole)
    seen = callers.seen
    return Row(
        "the archive of a served version cut, then removed, and its worker killed",
        f"nothing but the killed worker: {seen.words}; {seen.right} right",
        f"{seen.lost}: what the worker had taken",
        None,
        seen.wrong == 0 and seen.lost <= batch_size(server, canaries),
        seen.furthest,
    )


def altered(archive: Path, target: Path, version: str, change: Callable[[str, bytes], bytes]) -> Path:
    """A copy of an archive as another version, whose members `change` has altered: their checksums fit."""
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            content = old.read(info)
            if info.filename == "MAR-INF/MANIFEST.json":
                content = content.replace(
                    f'"modelVersion": "{name_and_version(archive)[1]}"'.encode(),
                    f'"modelVersion": "{version}"'.encode(),
                )
            new.writestr(info, change(info.filename, content))
    return target


def refused_archives(server: Server, canaries: Canaries) -> Row:
    """Register what was an archive of this version: cut in the middle, with one bit flipped, and with other weights."""
    archive = server.model_store / f"{canaries.name}-{canaries.version}.mar"
    told = []
    target = archive.with_name("changed.mar")
    with Callers(server, canaries) as callers:
        for what, make in {
            "cut": lambda: target.write_bytes(archive.read_bytes()[:-1000]),
            "a bit flipped": lambda: target.write_bytes(_flipped(altered(archive, target, "9.1", lambda _, c: c))),
            "weights scaled": lambda: altered(archive, target, "9.2", scaled(archive)),
        }.items():
            make()
            try:
                server.register(target)
            except (UsageError, LoadError) as error:
                told.append(f"{what}: {str(error).splitlines()[0]}")
            else:
                told.append(f"{what}: REGISTERED")
            target.unlink()
            callers.wait_for(3)
    seen = callers.seen
    sound = seen.wrong == seen.lost == 0 and not any("REGISTERED" in each for each in told)
    return Row("an archive cut or altered, then registered", "; ".join(told), "0", None, sound, seen.furthest)


def _flipped(archive: Path) -> bytes:
    """An archive's bytes with one bit of its largest member's content flipped."""
    with zipfile.ZipFile(archive) as packed:
        largest = max(packed.infolist(), key=lambda info: info.compress_size)
    content = bytearray(archive.read_bytes())
    content[largest.header_offset + largest.compress_size // 2] ^= 1
    return bytes(content)


def scaled(archive: Path) -> Callable[[str, bytes], bytes]:
    """A change for `altered`: some of the archive's weights become larger by half."""
    with zipfile.ZipFile(archive) as packed:
        names = json.loads(packed.read("metrics.json"))["weights_sha256"]
        largest = max(names, key=lambda name: packed.getinfo(name).file_size)

    def change(name: str, content: bytes) -> bytes:
        if name != largest:
            return content
        # Past the header, and not the whole file: in between there may be other things than weights.
        start = len(content) * 2 // 3 // 4 * 4
        end = start + min(4096, len(content) // 6 // 4 * 4)
        floats = np.frombuffer(content[start:end], np.float32) * np.float32(1.5)
        return content[:start] + floats.tobytes() + content[end:]

    return change


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of this size at `folder`. Raises PermissionError where mounting is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(folder)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode != 0:
        raise PermissionError(f"mounting is not allowed here: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)


def fill(folder: Path) -> Path:
    """Fill a file system; the file that does."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return filler


def remount(folder: Path, how: str) -> None:
    """Make a mounted file system "ro" or "rw"."""
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True, capture_output=True)


def full_disk(archive: Path, canaries: Canaries, disk: Path) -> Row:
    """Serve from a disk, then fill it, and ask for all that writes: answers go on, the rest says what is missing."""
    (disk / "store").mkdir()
    served = Path(shutil.copy(archive, disk / "store" / f"{canaries.name}-{canaries.version}.mar"))
    server = Server.start(disk / "store", disk / "state", ports="free")
    told = []
    try:
        server.register(served, default=True)
        with Callers(server, canaries) as callers:
            callers.wait_for(10)
            second = altered(served, disk / "store" / "second.mar", "9.3", lambda _, content: content)
            filler = fill(disk)
            callers.wait_for(10)
            try:
                server.register(second)
                told.append("register: REGISTERED")
            except ServerError as error:
                told.append(f"register: {str(error).splitlines()[0]}")
            pid = wait_for_worker(server, canaries)
            os.kill(pid, signal.SIGKILL)
            wait_for_worker(server, canaries, other_than=pid)
            callers.wait_for(10)
            filler.unlink()
            server.register(second)
            callers.wait_for(10)
    finally:
        server.stop()
    seen = callers.seen
    return Row(
        "the disk of the server's folder full, and a worker killed meanwhile",
        f"{'; '.join(told)}. Answers go on: {seen.right} right, {seen.words}",
        f"{seen.lost}: what the killed worker had taken; lines of the log",
        None,
        seen.wrong == 0 and "REGISTERED" not in " ".join(told) and seen.lost <= 8,
        seen.furthest,
    )


def short_of_memory(server: Server, canaries: Canaries, spare_mb: int, payload: bytes) -> tuple[Row, Answer]:
    """Leave a worker only so much more memory than it has, and send it a request that needs more, under load."""
    pid = wait_for_worker(server, canaries)
    worker = psutil.Process(pid)
    with Callers(server, canaries, 4) as callers, Client(server) as client:
        callers.wait_for(10)
        before = worker.rlimit(psutil.RLIMIT_AS)
        limit = worker.memory_info().vms + spare_mb * 2**20
        worker.rlimit(psutil.RLIMIT_AS, (limit, before[1]))
        answer = client.predict_rest(canaries.name, payload, version=canaries.version)
        callers.wait_for(10)
        survived = alive(pid) and worker_pid(server, canaries) == pid
        if survived:
            worker.rlimit(psutil.RLIMIT_AS, before)
        callers.wait_for(10)
    seen = callers.seen
    what = "the worker goes on" if survived else "the worker died and was started anew"
    row = Row(
        f"a worker with {spare_mb} MB to spare (RLIMIT_AS), asked for more",
        f"the large request: {answer.status} {answer.body.get('message')}; {what}; neighbours: {seen.right} right {seen.words}",
        f"{seen.lost}",
        None,
        answer.status != 200 and seen.wrong == 0 and (seen.lost == 0 or not survived),
        seen.furthest,
    )
    return row, answer


def long_recording(seconds: float, rate: int = 48000, channels: int = 2) -> bytes:
    """Noise as a WAV file."""
    samples = 0.1 * np.random.default_rng(0).standard_normal((int(seconds * rate), channels))
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def as_table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| fault | what a client sees | lost | back after | max dp |", "|---|---|---|---|---|"]
    for row in rows:
        back = "-" if row.back_s is None else f"{row.back_s:.1f} s"
        sound = "" if row.sound else " **UNEXPECTED**"
        sees, lost = (text.replace("|", "\\|").replace("\n", " ") for text in (row.sees, row.lost))
        lines.append(f"| {row.fault}{sound} | {sees} | {lost} | {back} | {row.furthest:.1e} |")
    return "\n".join(lines)


def measure(archive: Path, kills: int, every_s: float, scratch: Path) -> list[Row]:
    """Every fault in turn. Raises UsageError, LoadError or ServerError where a server does not come up, or back."""
    canaries = Canaries.of(archive)
    store = scratch / "store"
    store.mkdir()
    served = Path(shutil.copy(archive, store / f"{canaries.name}-{canaries.version}.mar"))
    server = Server.start(store, scratch / "state", ports="free")
    rows: list[Row] = []

    def note(row: Row) -> None:
        rows.append(row)
        print(f"{'as expected' if row.sound else 'UNEXPECTED'}: {row.fault}: {row.sees}", file=sys.stderr, flush=True)

    try:
        server.register(served, default=True)
        note(killed_workers(server, canaries, kills, every_s))
        row, server = killed_server(server, canaries)
        note(row)
        note(changed_archive(server, canaries))
        note(refused_archives(server, canaries))
        note(short_of_memory(server, canaries, 0, long_recording(120))[0])
    finally:
        server.stop()
    try:
        with small_disk(scratch / "disk", 3 * archive.stat().st_size // 10**6 + 60) as disk:
            note(full_disk(archive, canaries, disk))
    except PermissionError as error:
        print(f"the disk was not filled: {error}", file=sys.stderr)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("archive", type=Path, metavar="ARCHIVE", help="one that reads recordings, with references")
    parser.add_argument("--kills", type=int, default=6, help="of workers under load (6)")
    parser.add_argument("--every", type=float, default=10.0, metavar="SECONDS", help="between them (10)")
    args = parser.parse_args(argv)
    if args.kills < 1 or args.every < 0:
        parser.error(f"--kills {args.kills} --every {args.every}: expected at least 1, and 0 seconds or more")
    with scratch_folder(parser) as scratch:
        rows = measure(args.archive, args.kills, args.every, scratch)
    print(as_table(rows))
    sys.exit(not all(row.sound for row in rows))


if __name__ == "__main__":
    main()
