"""The CRC-32 that a zip keeps of each member, which torch.load does not look at."""

from __future__ import annotations

import zipfile
from pathlib import Path

_CHUNK = 2**20
_MAX_INFLATED = 4 * 2**30  # bytes; whoever reads more out of a compressed zip refuses it


class ChecksumError(ValueError):
    """A member that is not what was written; the message names it."""


def check_members(path: str | Path) -> str:
    """Read every member of a zip against its checksum; returns what there is to note, empty where all have one.

    A checksum of 0 stands for none, as `torch.serialization.set_crc32_options(False)` has torch.save write it; files that
    are no zip, such as those of torch before 1.6, have none either. Some 2 GB per second.
    Raises ChecksumError for a member with another checksum or one that cannot be read, and what zipfile raises for a zip
    without a directory.
    """
    none = "the file has no checksums: it would not be noticed if it had been damaged on the way"
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":
            return none
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if member.file_size]
        with_checksum = [member for member in members if member.CRC]
        bounded = sum(member.file_size for member in members) <= _MAX_INFLATED
        for member in with_checksum:
            if not bounded and member.compress_type != zipfile.ZIP_STORED:
                continue
            try:
                with archive.open(member) as content:
                    while content.read(_CHUNK):
                        pass
            except Exception as error:  # damaged bytes raise anything
                wrong = "does not match its checksum"
                if "Bad CRC-32" not in str(error):
                    wrong = f"cannot be read ({str(error) or type(error).__name__})"
                raise ChecksumError(
                    f"{member.filename} of {path} {wrong}: the file is damaged; copy it again"
                ) from error
    return "" if len(with_checksum) == len(members) else none
