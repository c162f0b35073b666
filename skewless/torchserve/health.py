"""Whether a server does what it is there for: it lives, and it gives a reference the number that the archive promises.

Two questions, because their answers have two consequences. A server that is not alive is started again. One that is alive and not
ready gets no requests until it is.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import requests

from skewless.core.files import atomic
from skewless.errors import ServerError, UsageError
from skewless.torchserve.archive import REFERENCE_LIST, Archive
from skewless.torchserve.server import HEALTH, PHASE, Server, bearer, session

# With every request of a check, so that it can be told from a user's.
HEADERS = {"Content-Type": "application/octet-stream", "X-Skewless-Check": "health"}

Phase = Literal["starting", "serving", "draining"]


@dataclass(frozen=True)
class Check:
    """What became of one thing that was looked at. seconds: what its request took; None where none was sent."""

    what: str
    passed: bool
    detail: str
    seconds: float | None = None


def set_phase(state_dir: Path, phase: Phase) -> None:
    """Write down how far a server in the foreground is."""
    with atomic(state_dir / PHASE) as unfinished:
        unfinished.write_text(phase + "\n")


def phase(state_dir: Path) -> str:
    """How far the server in `state_dir` is; one that was started in the background serves from its start."""
    try:
        return (state_dir / PHASE).read_text().strip()
    except FileNotFoundError:
        return "serving"


def alive(server: Server, timeout: float) -> list[Check]:
    """Whether TorchServe answers at all: nothing is computed, and a busy server or a worker that is started anew passes."""
    started = time.monotonic()
    try:
        with session() as connection:
            url, token = f"{server.inference_url}/ping", server.token("inference")
            answer = connection.get(url, headers=bearer(token), timeout=timeout)
    except (requests.RequestException, ServerError) as error:
        return [Check("TorchServe", False, f"does not answer: {error}")]
    return [Check("TorchServe", True, f"answers with {answer.status_code}", time.monotonic() - started)]


def ready(server: Server, timeout: float) -> list[Check]:
    """Whether requests may come: every archive is loaded, and the default version of every model gives its smallest reference the
    probability that the archive recorded, within its tier's tolerance.

    timeout: in seconds, for each answer. An archive without references, or whose file is gone, is ready when its workers are.
    """
    if (now := phase(server.state_dir)) != "serving":
        return [Check("server", False, f"is {now}")]
    try:
        models = [model for model in server.models() if model["default"]]
    except ServerError as error:
        return [Check("TorchServe", False, f"does not answer: {error}")]
    if not models:
        return [Check("server", False, "serves no model; register an archive with `skewless register`")]
    return [_check_model(server, model, timeout) for model in models]


def as_text(checks: list[Check]) -> str:
    """A line for each check."""
    lines = []
    for check in checks:
        took = "" if check.seconds is None else f" ({1000 * check.seconds:.0f} ms)"
        lines.append(f"{'ok' if check.passed else 'FAILED':6}  {check.what}: {check.detail}{took}")
    return "\n".join(lines)


def _check_model(server: Server, model: dict[str, Any], timeout: float) -> Check:
    what = f"{model['name']} {model['version']}"
    if "READY" not in model["workers"]:
        return Check(what, False, f"workers {', '.join(model['workers']) or 'none'}")
    path = server.model_store / model["archive"]
    try:
        reference = _smallest_reference(path)
    except UsageError as error:
        return Check(what, True, f"a worker is ready; no reference was compared: {error}")
    if reference is None:
        return Check(what, True, "a worker is ready; the archive carries no references to compare")
    file, payload = reference
    started = time.monotonic()
    try:
        answer = _ask(server, f"/predictions/{model['name']}/{model['version']}", payload, timeout)
    except (requests.RequestException, ServerError) as error:
        return Check(what, False, f"reference {file} was not answered: {error}", time.monotonic() - started)
    seconds = time.monotonic() - started
    if answer.status_code != 200:
        return Check(
            what, False, f"reference {file} was answered with {answer.status_code}: {answer.text:.200}", seconds
        )
    body = answer.json()
    passed, detail = _compare(server.state_dir, path, file, model["version"], body)
    return Check(what, passed, f"reference {file} {detail}", seconds)


def _smallest_reference(path: Path) -> tuple[str, bytes] | None:
    """Name and bytes of the reference with the fewest bytes; None for an archive without any."""
    with Archive(path) as archive:
        entries = archive.json(REFERENCE_LIST) if REFERENCE_LIST in archive else []
        try:
            names = [f"references/{entry['file']}" for entry in entries]
        except (LookupError, TypeError) as error:
            raise archive.refused(f"its {REFERENCE_LIST} is not as `skewless build` writes it: {error!r}") from error
        payloads = {name: archive.read(name) for name in names}
    if not payloads:
        return None
    name = min(payloads, key=lambda name: (len(payloads[name]), name))
    return name.removeprefix("references/"), payloads[name]


def _ask(server: Server, path: str, payload: bytes, timeout: float) -> requests.Response:
    token = server.token("inference")
    with session() as connection:
        url = server.inference_url + path
        answer = connection.post(url, payload, headers=HEADERS | bearer(token), timeout=timeout)
        if answer.status_code == 400 and (renewed := server.token("inference")) != token:
            # Someone else has renewed the token since.
            answer = connection.post(url, payload, headers=HEADERS | bearer(renewed), timeout=timeout)
    return answer


def _compare(state_dir: Path, path: Path, file: str, version: str, body: dict[str, Any]) -> tuple[bool, str]:
    """Whether an answer is the recorded one, and in words."""
    # Reading scores out of an answer takes the archive's post-processing, and with it torch: two seconds and 600 MB, which a
    # probe every few seconds cannot cost. An answer that was found right once is right when it is given again, to the last digit.
    state = path.stat()
    key = [path.name, state.st_size, state.st_mtime_ns, file, body]
    kept = state_dir / HEALTH
    known = _read_known(kept)
    if known.get(path.name) == key:
        return True, "has its recorded probability, to the digits that were compared before"
    from skewless.torchserve.smoke import References

    references = References.from_archive(path)
    (entry,) = (entry for entry in references.entries if entry["file"] == file)
    found = references.compare(entry, version, body)
    passed, detail = not found.problems, f"is {found.difference:.1e} from its recorded probability"
    if found.problems:
        detail = "is not as recorded: " + "; ".join(found.problems)
    if passed:
        # On a full disk, the next check compares again.
        with contextlib.suppress(OSError), atomic(kept) as unfinished:
            unfinished.write_text(json.dumps(known | {path.name: key}))
    return passed, detail


def _read_known(kept: Path) -> dict[str, Any]:
    try:
        known = json.loads(kept.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
