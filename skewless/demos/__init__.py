"""Corpora for demonstrations, each made by the project itself: `skewless.demos.KIND`.

A module has `VERSION`, raised whenever a byte of any example changes, and either `examples(count, seed)`, which yields
Examples, or, where a corpus has settings of its own, `write_corpus(out, count, seed, **settings)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from skewless.demos.writer import CorpusError, write

KINDS = tuple(
    sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in ("__init__", "synthesis", "writer"))
)


def write_corpus(
    kind: str,
    out: Path,
    count: int,
    seed: int = 42,
    progress: Callable[[Iterable], Iterable] = iter,
    **settings: Any,
) -> bool:
    """Write a corpus of `count` examples under `out`; False, having written nothing, if the same one is there already.

    progress: wraps what is iterated over (tqdm does). Raises CorpusError for settings that the kind does not have or
    cannot meet, and for a directory that holds anything else.
    """
    if kind not in KINDS:
        raise CorpusError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
    module = import_module(f"skewless.demos.{kind}")
    if hasattr(module, "write_corpus"):
        return module.write_corpus(out, count, seed, progress=progress, **settings)
    if settings:
        raise CorpusError(f"a corpus of kind {kind!r} has no setting {', '.join(settings)}")
    if seed < 0 or count < module.MIN_COUNT:
        raise CorpusError(f"seed {seed}, count {count}: expected at least 0 and {module.MIN_COUNT}")
    made = {"synthesiser": kind, "version": module.VERSION, "seed": seed, "count": count}
    return write(out, made, progress(module.examples(count, seed)), module.__doc__ or "")
