"""What Git LFS leaves in place of a file whose content was not fetched: a text of three lines."""

from __future__ import annotations

import re

_POINTER = re.compile(rb"version https://(git-lfs\.github\.com|hawser\.github\.com)/spec/v")


def pointer(start: bytes) -> str:
    """What to say of a file that begins with these bytes if they are a pointer, such as "this is a Git LFS pointer ..."; empty
    for any other file. Its form: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md."""
    if not _POINTER.match(start):
        return ""
    size = re.search(rb"\nsize (\d{1,18})\s", start)
    of = f" to a file of {int(size[1]):,} bytes" if size else ""
    return f"this is a Git LFS pointer{of}, not the file itself: run `git lfs pull`"
