"""How many cores this process may use. Inside a container that is fewer than the machine has."""

from __future__ import annotations

import os
from pathlib import Path

_ROOT = Path("/")


def available_cores(root: Path = _ROOT) -> int:
    """The smaller of the process's CPU affinity and `cpu_quota`, rounded down; at least 1.

    Down, because threads beyond a quota are all paused together once it is used up. root: of the file system, for tests.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(root)
    return affinity if quota is None else max(1, min(affinity, int(quota)))


def cpu_quota(root: Path = _ROOT) -> float | None:
    """The smallest quota, in cores, of the control groups that this process is in; None where nothing is limited.

    Reads cpu.max of control groups of version 2, cpu.cfs_quota_us and cpu.cfs_period_us of version 1 (the Linux kernel's
    Documentation/admin-guide/cgroup-v2.rst and Documentation/scheduler/sched-bwc.rst).
    """
    found = []
    for folder in _groups(root):
        limit = (
            _read(folder / "cpu.max") or f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}"
        )
        match limit.split():
            # "max" and -1 stand for no limit.
            case [quota, period] if quota.isdecimal() and period.isdecimal() and int(period):
                found.append(int(quota) / int(period))
    return min(found, default=None)


def _groups(root: Path) -> list[Path]:
    """The folders of the process's control groups and of those around them, each of which may have a limit.

    In a container the topmost folder is often the container's own group, while the path names it as the host does.
    """
    mount = root / "sys/fs/cgroup"
    folders = {mount: None, mount / "cpu": None}
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", maxsplit=2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = mount / "cpu" if controllers else mount
        within = top / path.lstrip("/")
        folders |= {folder: None for folder in (within, *within.parents) if folder.is_relative_to(top)}
    return list(folders)


def _read(path: Path) -> str:
    """A file's text; empty for one that is not there or may not be read, which then says nothing of a limit."""
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
