"""Send the archive's reference recordings to a running server, by every path, and compare probabilities."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from skewless.core.cascade import apart
from skewless.core.definition import MODEL, read_model
from skewless.core.errors import DefinitionError
from skewless.core.postprocess import Postprocessor, build_postprocessor
from skewless.errors import UsageError
from skewless.torchserve.archive import METRICS, REFERENCE_LIST, Archive
from skewless.torchserve.client import Answer, Client
from skewless.torchserve.server import Server

# Enough requests at once for batches to form, few enough for a small machine's queue.
_CONCURRENCY = 8


@dataclass(frozen=True)
class References:
    """What an archive promises: inputs, and the probabilities that each must get.

    tolerance: how far a probability may be from the evaluated one, and of a decision-exact archive the exact network's.
    tiers: what an answer's `tier` may be, with the tolerance of each.
    """

    postprocessor: Postprocessor
    entries: list[dict[str, Any]]
    payloads: list[bytes]
    fingerprint: str
    tolerance: float
    tiers: dict[str, float]

    @classmethod
    def from_archive(cls, path: Path) -> References:
        """Read them out of a .mar file. Post-processing of the archive's own is imported, as a worker imports it.

        Raises UsageError for an archive that carries none, or that is not as `skewless build` writes it.
        """
        with Archive(path) as archive, tempfile.TemporaryDirectory() as folder:
            entries, metrics = archive.json(REFERENCE_LIST), archive.json_object(METRICS)
            if not entries:
                raise UsageError(
                    f"{path.name} carries no references, so there is nothing to compare its answers with; rebuild it with "
                    "--references synthetic"
                )
            try:
                for name in (MODEL, *metrics["code"]):
                    target = Path(folder, name)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.read(name))
                postprocess = read_model(Path(folder, MODEL))["postprocess"]
                return cls(
                    build_postprocessor(postprocess, folder),
                    [{**entry, "scores": [float(score) for score in entry["scores"]]} for entry in entries],
                    [archive.read(f"references/{entry['file']}") for entry in entries],
                    str(metrics["pipeline_fingerprint"]),
                    float(metrics["runtime"]["tolerance"]),
                    {
                        str(each["tier"]): float(each["tolerance"])
                        for key in ("runtime", "fast_runtime")
                        if (each := metrics.get(key))
                    },
                )
            except (DefinitionError, LookupError, TypeError, ValueError, OverflowError, OSError) as error:
                raise archive.refused(f"its definition, references or metrics: {error}") from error

    def compare(self, entry: dict[str, Any], version: str, body: dict[str, Any]) -> Comparison:
        """One of `entries` with the body that a server's `version` answered to it."""
        scores, chosen = self.postprocessor.read(body)
        difference, tier, problems = apart(scores, entry["scores"]), body["tier"], []
        allowed = self.tiers.get(tier)
        if allowed is None:
            problems.append(f"{entry['file']}: answered in tier {tier!r}, the archive has {', '.join(self.tiers)}")
        elif not difference <= allowed:
            problems.append(f"{entry['file']}: |dp| {difference:.1e} in tier '{tier}', allowed {allowed:g}")
        flipped = chosen != self.postprocessor.choose(tuple(entry["scores"]), body["threshold_used"])
        if flipped and not _is_close_call(entry["scores"], body["threshold_used"], self.tolerance):
            problems.append(
                f"{entry['file']}: decided for {self.postprocessor.classes[chosen]}, evaluated {entry['scores']}"
            )
        served = (body["model_version"], body["pipeline_fingerprint"])
        if served != (version, self.fingerprint):
            problems.append(f"{entry['file']}: answered by version {served[0]}, pipeline {served[1][:12]}")
        return Comparison(difference, allowed, flipped, tuple(problems))


@dataclass(frozen=True)
class Comparison:
    """An answer beside its reference. difference: the largest of the scores'. allowed: its tier's tolerance, None for a tier that the
    archive does not have. flipped: whether another class was chosen."""

    difference: float
    allowed: float | None
    flipped: bool
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One path's result over some files. max_dp is NaN when an answer was no prediction; problems says why. tolerance: the
    largest of the answers' tiers; an answer beyond its own tier's is among the problems."""

    path: str
    files: int
    max_dp: float
    flips: int
    p50_ms: float
    p95_ms: float
    problems: tuple[str, ...]
    tolerance: float

    @property
    def passed(self) -> bool:
        return not self.problems and self.max_dp <= self.tolerance


def smoke_test(server: Server, model: str, version: str | None = None) -> list[Row]:
    """One row for each way to ask: REST raw body, REST multipart and gRPC, the default and the versioned path, one at
    a time and concurrently. Only the default version is asked for by the default path.

    Raises UsageError when the model or the version is not registered.
    """
    registered = {m["version"]: m for m in server.models() if m["name"] == model}
    if not registered:
        raise UsageError(f"no model '{model}' is registered; register one with `skewless register`")
    default = next((v for v, m in registered.items() if m["default"]), None)
    asked = version or default
    if asked is None or asked not in registered:
        raise UsageError(f"{model} has no version {asked}; registered: {', '.join(sorted(registered))}")
    with Client(server) as client:
        archive = client.describe(model, asked, customized=False)["modelUrl"]
        references = References.from_archive(server.model_store / archive)
        return [
            _measure(name, send, references, asked, workers)
            for name, send, workers in tqdm(list(_paths(client, model, asked, asked == default)), desc="smoke test")
        ]


def _paths(
    client: Client, model: str, version: str, is_default: bool
) -> Iterator[tuple[str, Callable[[bytes], Answer], int]]:
    kinds: dict[str, Callable[..., Answer]] = {
        "REST body": client.predict_rest,
        "REST multipart": partial(client.predict_rest, multipart=True),
        "gRPC": client.predict_grpc,
    }
    for kind, send in kinds.items():
        for asked in ([None] if is_default else []) + [version]:
            for workers in (1, _CONCURRENCY):
                how = "one at a time" if workers == 1 else f"{workers} at once"
                where = f"version {asked}" if asked else "default"
                yield f"{kind}, {where}, {how}", partial(send, model, version=asked), workers


def _measure(path: str, send: Callable[..., Answer], references: References, version: str, workers: int) -> Row:
    with ThreadPoolExecutor(workers) as pool:
        answers = list(pool.map(send, references.payloads))
    compared, problems, unanswered = [], [], 0
    for entry, answer in zip(references.entries, answers, strict=True):
        if answer.status != 200:
            problems.append(f"{entry['file']}: {answer.status} {answer.body.get('message')}")
            unanswered += 1
            continue
        compared.append(references.compare(entry, version, answer.body))
        problems += compared[-1].problems
    milliseconds = [1000 * answer.seconds for answer in answers]
    return Row(
        path,
        len(answers),
        float("nan") if unanswered else max(each.difference for each in compared),
        sum(each.flipped for each in compared),
        float(np.percentile(milliseconds, 50)),
        float(np.percentile(milliseconds, 95)),
        tuple(problems),
        max((each.allowed for each in compared if each.allowed is not None), default=references.tolerance),
    )


def _is_close_call(scores: list[float], threshold: float, tolerance: float) -> bool:
    """Whether scores within the tolerance of these may decide otherwise."""
    if len(scores) == 1:
        return abs(scores[0] - threshold) <= tolerance
    first, second = sorted(scores)[-1:-3:-1]
    return first - second <= 2 * tolerance


def as_table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    width = max(len(row.path) for row in rows)
    lines = [f"{'path':{width}}  files  max |dp|  flips  p50 ms  p95 ms"]
    for row in rows:
        lines.append(
            f"{row.path:{width}}  {row.files:5}  {row.max_dp:8.1e}  {row.flips:5}  {row.p50_ms:6.0f}  {row.p95_ms:6.0f}"
            + ("" if row.passed else "  FAILED")
        )
        lines += [f"    {problem}" for problem in row.problems]
    return "\n".join(lines)
