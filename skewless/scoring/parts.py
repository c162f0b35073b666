"""The finished rows of a run that has not ended yet, in a folder beside its result: what a second run goes on from."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from skewless.core.files import atomic
from skewless.errors import UsageError
from skewless.scoring.files import File

_RUN, _FILES, _SCRATCH = "run.json", "files.parquet", "scratch"
_AT_ONCE = 10_000  # rows that are in memory when the parts are put together

# The columns that every result has, in this order; those of the answer are between them.
_FIRST = {"file_path": pa.string(), "status": pa.int64(), "error": pa.string(), "sha256": pa.string()}
_THEN = {"decision": pa.string(), "threshold": pa.float64()}
_LAST = {
    name: pa.string()
    for name in ("body", "model_name", "model_version", "pipeline_fingerprint", "runtime", "precision", "tier")
}
_KNOWN = _FIRST | _THEN | _LAST


class Parts:
    """The folder `OUT.parts`: what is to be scored and by what, and the rows so far.

    Rows come in the order of the files, so a number says which are there: a part is named after its first row's, and the
    next file to score is the one after the last row. Every file appears whole or not at all.
    """

    def __init__(self, out: Path):
        self._out = out
        self.folder = out.with_name(out.name + ".parts")

    @classmethod
    @contextlib.contextmanager
    def opened(cls, out: Path) -> Iterator[Parts]:
        """The folder, locked against a second run. Raises UsageError where one is under way, or where `out` is there already."""
        parts = cls(out)
        if out.exists() and not parts._started:
            raise UsageError(f"{out} is there already; remove it, or give another --out")
        parts.folder.mkdir(parents=True, exist_ok=True)
        with open(parts.folder / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"another run is writing {out} at this moment; wait for its end") from None
            try:
                yield parts
            finally:
                # Nothing to go on from: it has not begun, or it is finished.
                if not parts._started:
                    shutil.rmtree(parts.folder)

    @property
    def _started(self) -> bool:
        return (self.folder / _RUN).is_file()

    def begin(self, run: Mapping[str, Any], files: Iterator[File]) -> list[File]:
        """The files to score, all of them, in order: of an interrupted run those that it had listed, else `files`.

        run: what decides the rows, by names that a user knows. Raises UsageError where the interrupted run had other values.
        """
        self._remove_scratch()
        if self._started:
            then = json.loads((self.folder / _RUN).read_text(encoding="utf-8"))
            if changed := [name for name in run if run[name] != then.get(name)]:
                was = "; ".join(f"{name} {then.get(name)!r}, now {run[name]!r}" for name in changed)
                raise UsageError(
                    f"{self.folder} has the rows of an interrupted run with another {was}. Give what it was started with to "
                    f"go on, or remove the folder to begin anew"
                )
            return [File(row["file_path"], row["path"]) for row in pq.read_table(self.folder / _FILES).to_pylist()]
        for old in self._parts:
            old.unlink()
        listed = list(files)
        with atomic(self.folder / _FILES) as unfinished:
            pq.write_table(pa.Table.from_pylist([file._asdict() for file in listed]), unfinished)
        # Last: without it, nothing in the folder counts.
        with atomic(self.folder / _RUN) as unfinished:
            unfinished.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
        return listed

    def keep_in_mind(self, scratch: Path) -> None:
        """Write down a temporary folder, which the next run removes where this one is killed."""
        with atomic(self.folder / _SCRATCH) as unfinished:
            unfinished.write_text(str(scratch), encoding="utf-8")

    def _remove_scratch(self) -> None:
        note = self.folder / _SCRATCH
        if note.is_file():
            # What a killed run has left; processes of it may still be about to end.
            shutil.rmtree(note.read_text(encoding="utf-8"), ignore_errors=True)
            note.unlink()

    @property
    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.parquet"))

    def count(self) -> int:
        """How many rows there are. Raises UsageError where a part is missing."""
        rows = 0
        for part in self._parts:
            if part.name != _name(rows):
                raise UsageError(f"{self.folder} lacks {_name(rows)}; remove the folder to begin anew")
            rows += pq.read_metadata(part).num_rows
        return rows

    def write(self, start: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep rows, the first of which is number `start`."""
        with atomic(self.folder / _name(start)) as unfinished:
            pq.write_table(_table(rows), unfinished)

    def merge(self) -> list[dict[str, Any]]:
        """Put all parts together as the result, after which they count no more; returns the rows without an answer: file_path, status, error."""
        schema = _common([pq.read_schema(part) for part in self._parts])
        unreadable: list[dict[str, Any]] = []
        self._out.parent.mkdir(parents=True, exist_ok=True)
        with atomic(self._out) as unfinished, pq.ParquetWriter(unfinished, schema, compression="zstd") as writer:
            for table in _together(self._parts, schema):
                writer.write_table(table)
                shown = table.select(["file_path", "status", "error"]).to_pylist()
                unreadable += [row for row in shown if row["status"] != 200]
        (self.folder / _RUN).unlink()
        return unreadable


def _name(start: int) -> str:
    return f"part-{start:012}.parquet"


def _table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows with columns of their own as a table; what a row does not have is null."""
    names = dict.fromkeys([*_KNOWN, *(name for row in rows for name in row)])
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        kinds = {type(value) for value in values} - {type(None)}
        # An answer of own post-processing may have a number in one file and a word in another.
        if name not in _KNOWN and len(kinds) > 1 and not kinds <= {int, float}:
            values = [None if value is None else str(value) for value in values]
        columns[name] = pa.array(values, pa.float64() if _is_score(name) else _KNOWN.get(name))
    return pa.table(columns)


def _is_score(name: str) -> bool:
    return name == "score" or name.startswith("score_")


def _common(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """Columns that hold those of all parts: file and scores first, then the answer's own fields by name, then what answered."""
    types: dict[str, set[pa.DataType]] = {}
    for schema in schemas:
        for field in schema:
            types.setdefault(field.name, set()).add(field.type)
    scores = [name for name in types if _is_score(name)]
    others = sorted(set(types) - set(scores) - set(_KNOWN))
    return pa.schema([(name, _widest(types[name])) for name in (*_FIRST, *scores, *_THEN, *others, *_LAST)])


def _widest(types: set[pa.DataType]) -> pa.DataType:
    found = types - {pa.null()}
    if len(found) == 1:
        return found.pop()
    return pa.float64() if found == {pa.int64(), pa.float64()} else pa.string()


def _together(parts: Sequence[Path], schema: pa.Schema) -> Iterator[pa.Table]:
    """The parts' rows in order, many at a time: a part may have one."""
    tables: list[pa.Table] = []
    for part in parts:
        table = pq.read_table(part)
        for field in schema:
            if field.name not in table.schema.names:
                table = table.append_column(field, pa.nulls(len(table), field.type))
        tables.append(table.select(schema.names).cast(schema))
        if sum(map(len, tables)) >= _AT_ONCE:
            yield pa.concat_tables(tables).combine_chunks()
            tables = []
    if tables:
        yield pa.concat_tables(tables).combine_chunks()
