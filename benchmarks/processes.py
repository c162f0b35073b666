"""What a server's processes cost: CPU seconds and memory of a process and all that it started. Linux only."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import psutil


def family(pid: int) -> list[psutil.Process]:
    """The process and its descendants that are alive; empty when it has ended."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def cpu_seconds(pid: int) -> float:
    """User and system seconds of the family so far.

    Those of descendants that have ended, such as an ffmpeg process per upload, count with the process that waited for them.
    """
    total = 0.0
    for process in family(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def peak_bytes(pid: int) -> int:
    """The sum of the resident high-water marks (VmHWM) of the family's living processes.

    Pages that processes share, such as those of libraries, count once for each of them.
    """
    total = 0
    for process in family(pid):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    total += 1024 * int(line.split()[1])
    return total


def pause(pid: int) -> None:
    """Stop the family from running (SIGSTOP), the process itself first; return when none runs any more.

    The system stops a process that is in the middle of a call a moment after the signal.
    """
    members = family(pid)
    for process in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()
    while any(_is_alive(process) and process.status() != psutil.STATUS_STOPPED for process in members):
        time.sleep(0.001)


def resume(pid: int) -> None:
    """Let a paused family run again, the process itself last, so that it does not miss its children."""
    for process in reversed(family(pid)):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()


def stop_family(pid: int, timeout: float = 20.0) -> None:
    """End the process, then what is left of its descendants, by their ids; kill those that do not end in time.

    The process itself first, so that a server may end its workers in order.
    """
    members = family(pid)
    # A paused process would notice nothing.
    resume(pid)
    for chosen, kill in ((members[:1], False), (members[1:], False), (members, True)):
        left = [process for process in chosen if _is_alive(process)]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                if kill:
                    process.kill()
                else:
                    process.terminate()
        deadline = time.monotonic() + timeout
        while any(map(_is_alive, left)) and time.monotonic() < deadline:
            time.sleep(0.05)


def _is_alive(process: psutil.Process) -> bool:
    try:
        # Where nobody reaps orphans (a container's first process), an ended one stays as a zombie.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
