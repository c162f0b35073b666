"""Zip members, inflated no further than a bound: a few kilobytes of a zip can stand for any number of bytes."""

from __future__ import annotations

import zipfile

from skewless.importers.errors import ImportFileError

# Of one file, all members together. Weights do not compress, so this is about the largest file, too.
MAX_BYTES = 4 * 2**30


def check_sizes(archive: zipfile.ZipFile, limit: int = MAX_BYTES) -> None:
    """Raise ImportFileError, naming the largest member, where the members inflate to more than `limit` bytes together.

    What a zip says of a member's size is binding: readers take no more than that out of it.
    """
    members = archive.infolist()
    total = sum(member.file_size for member in members)
    if total > limit:
        largest = max(members, key=lambda member: member.file_size)
        raise ImportFileError(
            f"its members inflate to {total:,} bytes, at most {limit:,} are read; the largest is {largest.filename!r}, from "
            f"{largest.compress_size:,} to {largest.file_size:,} bytes"
        )


def read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, limit: int) -> bytes:
    """A member's bytes; raises ImportFileError, before it inflates anything, for one of more than `limit`."""
    if member.file_size > limit:
        raise ImportFileError(
            f"its member {member.filename!r} inflates from {member.compress_size:,} to {member.file_size:,} bytes, more than "
            f"{limit:,} bytes are not read"
        )
    return archive.read(member)
