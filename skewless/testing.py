"""For test suites: hold a service's preprocessing to its training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from skewless.errors import UsageError
from skewless.programs.diff import diff
from skewless.programs.match import RTOL
from skewless.programs.pipeline_side import sides_of
from skewless.programs.report import as_text

Program = Callable[..., Any] | str | Path


def assert_same(
    train_function: Program,
    serve_function: Program,
    files: Iterable[str | Path],
    *,
    atol: float | None = None,
    rtol: float = RTOL,
    code: Sequence[str | Path] = (),
) -> None:
    """Fail where the service computes something else than training, with the lines at which it does.

        def test_the_service_is_the_training():
            assert_same(precompute.network_input, app.network_input, Path("tests/recordings").glob("*.wav"))

    train_function, serve_function: functions of modules, each called with a file's path, or what `skewless diff` takes: "FILE.py:function",
    a pipeline.yaml, a model's folder, an archive. Both are loaded afresh in processes of their own, from their source: what a test
    has patched in them is not seen.
    rtol: results closer than this share of training's largest number are the same. atol: results no further apart than this,
    in their own unit, are accepted, too. code: further folders whose modules are the user's.

    Raises AssertionError with the report of `skewless diff` in words, and UsageError for a function that cannot be found.
    """
    paths = sorted(Path(file) for file in files)
    reference, candidate = sides_of(_named(train_function), _named(serve_function), [Path(each) for each in code])
    try:
        report = diff(reference, candidate, paths, rtol=rtol, progress=False)
    finally:
        reference.close()
        candidate.close()
    close = [
        each["same"]
        or (
            atol is not None
            and not each["rows"]
            and each["input_largest"] is not None
            and each["input_largest"] <= atol
        )
        for each in report["files"]
    ]
    if not all(close) or report["unreadable"]:
        raise AssertionError(as_text(report))


def _named(program: Program) -> str:
    if not callable(program):
        return str(program)
    file, name = inspect.getsourcefile(inspect.unwrap(program)), getattr(program, "__qualname__", "")
    if file is None or "<" in name or not name:
        raise UsageError(
            f"{program!r} cannot be found in a file again: name a function of a module, not one made inside of another"
        )
    return f"{file}:{name}"
