"""Reading a model archive (.mar) that anybody may have made: names that are only names, and sizes with an end.

An archive is a zip. Nothing of it is imported here. What a worker does with an archive that is registered is another matter:
an archive is code.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, cast

from skewless.core.errors import DefinitionError
from skewless.core.git_lfs import pointer
from skewless.core.yaml_file import MAX_BYTES, parse_yaml
from skewless.errors import UsageError

MANIFEST, METRICS, MODEL = "MAR-INF/MANIFEST.json", "metrics.json", "model.yaml"
REFERENCE_LIST = "references/references.json"  # its references, and what each must get
SIGNATURE = "signature.json"  # over every other member
MAX_JSON_BYTES = 32 * 2**20
MAX_FILE_BYTES = 64 * 2**20  # a reference is sent as a request, and this is the largest that config.properties lets in
MAX_READ_BYTES = 2**30  # of all members together
MAX_MEMBERS = 10_000

# They become parts of addresses and of files' names.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
# What zipfile raises for a damaged archive; RuntimeError where it has a password or is compressed in another way.
_DAMAGE = (
    *(OSError, EOFError, LookupError, ValueError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)
_LINK = 0o120000
# Before each file of a zip: signature, version, flags, method, time, date, CRC, two sizes, lengths of the name and of what follows it.
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_SIZES_FOLLOW = 0x8


class Archive:
    """An archive that is open for reading: `with Archive(path) as archive: archive.json(METRICS)`.

    Every method raises UsageError, which names the file and what is wrong with it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._left = MAX_READ_BYTES
        try:
            with self.path.open("rb") as file:
                lfs = pointer(file.read(1024))
        except OSError:
            lfs = ""
        if lfs:
            raise UsageError(f"{path}: {lfs}")
        try:
            self._zip = zipfile.ZipFile(path)
        except FileNotFoundError:
            raise UsageError(f"{path}: no such archive; build it first") from None
        except _DAMAGE as error:
            raise self.refused(error) from error
        try:
            self._check_members()
        except UsageError:
            self._zip.close()
            raise

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._zip.close()

    def __contains__(self, member: object) -> bool:
        return isinstance(member, str) and member in self._zip.NameToInfo

    def read(self, member: str, limit: int = MAX_FILE_BYTES) -> bytes:
        """A member's bytes, never more than `limit` of them, whatever its header says."""
        if member not in self:
            raise self.refused(f"it has no {member!r:.100}")
        try:
            with self._zip.open(member) as file:
                data = file.read(limit + 1)
        except _DAMAGE as error:
            raise self.refused(f"its {member} cannot be read: {error!r}") from error
        self._left -= len(data)
        if len(data) > limit or self._left < 0:
            raise self.refused(
                f"its {member} has more than {limit:,} bytes, or all that is read of it more than {MAX_READ_BYTES:,}"
            )
        return data

    def json(self, member: str) -> Any:
        """What a member that is JSON holds."""
        try:
            return json.loads(self.read(member, MAX_JSON_BYTES))
        except (ValueError, RecursionError) as error:
            raise self.refused(f"its {member} is not JSON: {error}") from error

    def json_object(self, member: str) -> dict[str, Any]:
        """What a member that is a JSON object holds."""
        content = self.json(member)
        if not isinstance(content, dict):
            raise self.refused(f"its {member} is {content!r:.60}, expected an object")
        return content

    def yaml(self, member: str) -> Any:
        """What a member that is YAML holds."""
        try:
            return parse_yaml(self.read(member, MAX_BYTES))
        except DefinitionError as error:
            raise self.refused(f"its {member}: {error}") from error

    def name_and_version(self) -> tuple[str, str]:
        """Model name and version, as the manifest states them."""
        model = self.json_object(MANIFEST).get("model")
        if not isinstance(model, dict):
            raise self.refused(f"its {MANIFEST} has no 'model'")
        return self._name("name", model.get("modelName")), self._name("version", model.get("modelVersion"))

    def digests(self) -> dict[str, str]:
        """SHA-256 of every file but the signature, in hexadecimal, by name."""
        found = {}
        for info in sorted(self._zip.infolist(), key=lambda info: info.filename):
            if info.is_dir() or info.filename == SIGNATURE:
                continue
            try:
                with self._zip.open(info) as file:
                    digest = hashlib.file_digest(cast(zipfile.ZipExtFile, file), "sha256")
                found[info.filename] = digest.hexdigest()
            except _DAMAGE as error:
                raise self.refused(f"its {info.filename} cannot be read: {error!r}") from error
        return found

    def digest(self) -> str:
        """SHA-256 of what the archive holds, in hexadecimal: of the lines "SHA-256  name" of its files, sorted by name, without its
        signature. Archives of the same files have the same one, however they were zipped and whoever signed them."""
        return digest_of(self.digests())

    def extract(self, folder: Path) -> None:
        """Write every file but the signature into a new folder."""
        members = [info for info in self._zip.infolist() if info.filename != SIGNATURE]
        try:
            self._zip.extractall(folder, members)
        except _DAMAGE as error:
            raise self.refused(f"it cannot be unpacked: {error!r}") from error

    def check_layout(self) -> None:
        """Raise UsageError unless the files are the same for those who read the zip from its start as for those who begin with
        the list at its end: TorchServe does the one, this module the other."""
        position = 0
        with open(self.path, "rb") as file:
            for info in sorted(self._zip.infolist(), key=lambda info: info.header_offset):
                file.seek(position)
                header = file.read(_LOCAL_HEADER.size)
                if info.header_offset != position or len(header) < _LOCAL_HEADER.size:
                    raise self.refused(
                        f"there are bytes before its {info.filename} that its list of files does not have"
                    )
                _, _, flags, method, _, _, *sizes, name, extra = _LOCAL_HEADER.unpack(header)
                listed = [info.CRC, info.compress_size, info.file_size]
                if flags & _SIZES_FOLLOW or method != info.compress_type or sizes != listed:
                    raise self.refused(f"its {info.filename} is described in two ways")
                position += _LOCAL_HEADER.size + name + extra + info.compress_size
        if position != self._zip.start_dir:
            raise self.refused("there are bytes behind its files that its list of files does not have")

    def _name(self, what: str, value: Any) -> str:
        if not isinstance(value, str) or not NAME.fullmatch(value):
            raise self.refused(
                f"its {what} is {value!r:.100}, expected 1 to 100 letters, digits, '_', '.' and '-', beginning with a letter "
                "or a digit"
            )
        return value

    def refused(self, why: object) -> UsageError:
        """The error to raise for this archive."""
        return UsageError(f"{self.path} is not a model archive (.mar) that can be used: {why}")

    def _check_members(self) -> None:
        members = self._zip.infolist()
        if len(members) > MAX_MEMBERS:
            raise self.refused(f"it has {len(members):,} files, expected at most {MAX_MEMBERS:,}")
        # Of two, another program may take the one that was not looked at.
        name, count = Counter(info.filename for info in members).most_common(1)[0] if members else ("", 0)
        if count > 1:
            raise self.refused(f"it has {count} files {name!r:.100}")
        for info in members:
            # orig_filename: zipfile cuts a name at its first NUL, others do not.
            outside = ".." in PurePosixPath(info.filename).parts or info.filename.startswith("/")
            if outside or set(info.orig_filename) & set("\\\0") or (info.external_attr >> 16) & 0o170000 == _LINK:
                raise self.refused(f"it has the file {info.orig_filename!r:.100}, which is no name inside a folder")


def digest_of(digests: Mapping[str, str]) -> str:
    """`Archive.digest` from what `Archive.digests` gives."""
    lines = [f"{digest}  {name}\n" for name, digest in sorted(digests.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def name_and_version(archive: str | Path) -> tuple[str, str]:
    """Model name and version that an archive states in MAR-INF/MANIFEST.json. Raises UsageError."""
    with Archive(archive) as mar:
        return mar.name_and_version()
