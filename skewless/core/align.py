"""Two pipelines side by side, and the edits that turn one into the other: what `Pipeline.diff` and the skew report read."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from skewless.core.own_code import reference as own_name
from skewless.core.stages import Stage

if TYPE_CHECKING:  # a pipeline compares itself with another by this module
    from skewless.core.pipeline import Pipeline


@dataclass(frozen=True)
class Edit:
    """One change on the way from the reference to the candidate.

    stage: the changed stage's key in the reference, for an inserted one in the candidate. successor: of a replaced stage,
    the key of the one in its place. changes: parameter to (before, after); None on a side that does not have the
    parameter. For a stage of own code also the files that differ, with the start of their SHA-256.
    """

    kind: Literal["parameters", "replaced", "moved", "removed", "inserted"]
    stage: str
    successor: str = ""
    changes: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)

    def __str__(self) -> str:
        changed = ", ".join(f"{name} {before} → {after}" for name, (before, after) in self.changes.items())
        if self.kind == "parameters":
            return f"{self.stage}: {changed}"
        if self.kind == "replaced":
            return f"{self.stage} replaced by {self.successor}"
        return f"{self.stage} {self.kind}" + (f", {changed}" if changed else "")


@dataclass(frozen=True)
class Row:
    """One place in the alignment.

    reference, candidate: the key and the stage that each pipeline has there, or None. edit: the number of the edit that
    makes the two sides differ, or None where they are the same.
    """

    reference: tuple[str, Stage] | None
    candidate: tuple[str, Stage] | None
    edit: int | None = None

    @property
    def paired(self) -> bool:
        return self.reference is not None and self.candidate is not None

    @property
    def first(self) -> tuple[str, Stage]:
        """The reference's key and stage, or the candidate's where only that has one."""
        side = self.reference or self.candidate
        if side is None:
            raise ValueError("a row needs a stage on at least one side")
        return side

    @property
    def label(self) -> str:
        """The stage's key, the reference's where both have one."""
        return self.first[0]


@dataclass(frozen=True)
class Alignment:
    """Two pipelines side by side, and the edits that turn the first into the second, in pipeline order."""

    rows: tuple[Row, ...]
    edits: tuple[Edit, ...]

    def stages(self, applied: frozenset[int]) -> tuple[Stage, ...]:
        """The reference's stages with some of the edits applied: none gives the reference, all the candidate."""
        sides = [row.candidate if row.edit in applied else row.reference for row in self.rows]
        return tuple(side[1] for side in sides if side is not None)

    def definition(self, row: Row) -> str:
        """How the definitions differ at a row, in words."""
        if row.edit is None:
            return "same"
        edit = self.edits[row.edit]
        if edit.kind == "parameters":
            return str(edit).removeprefix(f"{edit.stage}: ")
        if edit.kind == "replaced":
            return f"replaced by {edit.successor}"
        if edit.kind == "moved":
            return "moved away in candidate" if row.candidate is None else "moved here in candidate"
        return "missing in candidate" if row.candidate is None else "added in candidate"


def definition_name(stage: Stage) -> str:
    """How a pipeline file names the stage: "mel", or "stages.py:PreEmphasis" for one of own code."""
    return own_name(type(stage)) or stage.name


def changed_parameters(before: Stage, after: Stage) -> dict[str, tuple[Any, Any]]:
    """Parameter to its two values, where they differ; None on a side that does not have the parameter."""
    names = {**before.params(), **after.params()}
    values = {name: (_parameter(before, name), _parameter(after, name)) for name in names}
    return {name: (a, b) for name, (a, b) in values.items() if a != b}


def _parameter(stage: Stage, name: str) -> Any:
    # A default that `params` leaves out, such as segment's `short`, is an attribute all the same.
    return stage.params().get(name, getattr(stage, name, None))


def align(reference: Pipeline, candidate: Pipeline) -> Alignment:
    """Align stages by name, in order, by difflib.

    A stage that only changed its place is one edit on two rows. Between two matches, the first stage that is left on
    each side is taken for the other's replacement, then the second, and the rest is removed or inserted.
    """
    ours, theirs = list(reference.stages.items()), list(candidate.stages.items())
    blocks = difflib.SequenceMatcher(
        a=[definition_name(stage) for _, stage in ours],
        b=[definition_name(stage) for _, stage in theirs],
        autojunk=False,
    ).get_opcodes()
    moves = _moves(
        [i for tag, i0, i1, _, _ in blocks if tag != "equal" for i in range(i0, i1)],
        [j for tag, _, _, j0, j1 in blocks if tag != "equal" for j in range(j0, j1)],
        ours,
        theirs,
    )
    origins = {j: i for i, j in moves.items()}
    files = _changed_files(reference.code, candidate.code)
    rows: list[Row] = []
    edits: list[Edit] = []
    numbers: dict[int, int] = {}

    def add(i: int | None, j: int | None) -> None:
        a, b = (None if i is None else ours[i]), (None if j is None else theirs[j])
        origin = i if j is None else origins.get(j)
        if origin in moves:
            if origin not in numbers:
                numbers[origin] = len(edits)
                key, stage = ours[origin]
                edits.append(Edit("moved", key, changes=_changes(stage, theirs[moves[origin]][1], files)))
            rows.append(Row(a, b, numbers[origin]))
            return
        if a and b and definition_name(a[1]) == definition_name(b[1]):
            changes = _changes(a[1], b[1], files)
            if not changes:
                rows.append(Row(a, b))
                return
            edits.append(Edit("parameters", a[0], changes=changes))
        elif a and b:
            edits.append(Edit("replaced", a[0], successor=b[0]))
        elif a:
            edits.append(Edit("removed", a[0]))
        elif b:
            edits.append(Edit("inserted", b[0]))
        rows.append(Row(a, b, len(edits) - 1))

    for _, i, i1, j, j1 in blocks:
        for pi, pj in zip(
            [k for k in range(i, i1) if k not in moves], [k for k in range(j, j1) if k not in origins], strict=False
        ):
            for k in range(i, pi):
                add(k, None)
            for k in range(j, pj):
                add(None, k)
            add(pi, pj)
            i, j = pi + 1, pj + 1
        for k in range(i, i1):
            add(k, None)
        for k in range(j, j1):
            add(None, k)
    return Alignment(tuple(rows), tuple(edits))


def _moves(
    removed: list[int], added: list[int], ours: list[tuple[str, Stage]], theirs: list[tuple[str, Stage]]
) -> dict[int, int]:
    """Which of the removed stages come back elsewhere: index in the reference to index in the candidate."""
    found: dict[int, int] = {}
    for i in removed:
        name = definition_name(ours[i][1])
        twins = [j for j in added if definition_name(theirs[j][1]) == name and j not in found.values()]
        if twins:
            found[i] = twins[0]
    return found


def _changes(before: Stage, after: Stage, files: Mapping[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    """What differs between two stages of one name: parameters and, for stages of own code, the code."""
    found = changed_parameters(before, after)
    return {**found, **files} if own_name(type(before)) else found


def _changed_files(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, tuple[str | None, str | None]]:
    """Files of own code that both pipelines use and that differ, with the first 12 digits of either SHA-256.

    Which of its files a stage needs is not known, so every stage of own code counts as changed with any of them.
    """
    shared = sorted(set(before) & set(after))
    return {file: (before[file][:12], after[file][:12]) for file in shared if before[file] != after[file]}
