"""A name that one process at a time may work under, such as a model's version in a store."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from skewless.errors import UsageError

RESERVED = ".reserved"


@dataclass(frozen=True)
class Reservation:
    """An exclusive lock on a file that is there for nothing else. path: the file. descriptor: the open, locked file.

    The kernel releases it when the process ends, however it ends; a file that is left behind then is free to be taken again.
    """

    path: Path
    descriptor: int

    @classmethod
    def take(cls, path: Path) -> Reservation | None:
        """Take it, at once; None where another process has it. Raises UsageError where the file cannot be made."""
        while True:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as error:
                raise UsageError(f"{path.parent} cannot be written: {error.strerror}") from error
            if not _locked(descriptor):
                os.close(descriptor)
                return None
            # Whoever had it may have removed the file after it was opened here: then the lock is on nothing.
            if _is_file_of(descriptor, path):
                return cls(path, descriptor)
            os.close(descriptor)

    @classmethod
    def inherited(cls, path: Path, descriptor: int) -> Reservation:
        """One that the process that started this one took, and passed on. Raises UsageError where it is none."""
        try:
            passed = _is_file_of(descriptor, path) and _locked(descriptor)
        except OSError:
            passed = False
        if not passed:
            raise UsageError(f"file descriptor {descriptor} is no reservation of {path}; leave that option to `start`")
        os.set_inheritable(descriptor, False)
        return cls(path, descriptor)

    def hand_over(self) -> None:
        """Leave it to a process that was started with the descriptor."""
        os.close(self.descriptor)

    def release(self) -> None:
        """Let others have it."""
        # In this order: nobody may lock a file that is about to be removed.
        if _is_file_of(self.descriptor, self.path):
            self.path.unlink()
        os.close(self.descriptor)


def version_file(store: Path, name: str, version: str) -> Path:
    """What is reserved of a store while a version is built or retrained. Hidden, as nothing in it is to be served."""
    return store / f".{name}-{version}{RESERVED}"


@contextlib.contextmanager
def reserved(store: Path, name: str, version: str) -> Iterator[None]:
    """Keep others from building or retraining the same version in a store. Raises UsageError at once where one does."""
    held = Reservation.take(version_file(store, name, version))
    if held is None:
        raise UsageError(
            f"another process is building or retraining {name} {version} in {store}; wait for it, or choose another --version"
        )
    try:
        yield
    finally:
        held.release()


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_file_of(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
