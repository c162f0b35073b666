"""Requests of known answers: an archive's own references, asked by every path, and whether an answer is the promised one."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.load import WrongAnswer, deviation
from benchmarks.soak.hostile import Target
from benchmarks.soak.messages import PATIENCE_S
from skewless.core.definition import Definition
from skewless.core.postprocess import Postprocessor
from skewless.torchserve.client import Answer, Client
from skewless.torchserve.server import name_and_version
from skewless.torchserve.smoke import References


@dataclass(frozen=True)
class Archive:
    """A .mar file, with what it promises. postprocessor: reads scores out of an answer's body."""

    path: Path
    name: str
    version: str
    reads: str
    max_bytes: int
    references: References

    @classmethod
    def load(cls, path: Path, scratch: Path) -> Archive:
        """Read an archive; `scratch` is a folder to unpack it into. Raises UsageError for one without references."""
        name, version = name_and_version(path)
        with zipfile.ZipFile(path) as packed:
            packed.extractall(scratch)
        definition = Definition.read(scratch)
        return cls(
            path,
            name,
            version,
            definition.pipeline.reads,
            definition.limits.max_bytes,
            References.from_archive(path),
        )

    @property
    def target(self) -> Target:
        """What a hostile request is made of."""
        return Target(self.name, self.version, self.reads, min(self.references.payloads, key=len), self.max_bytes)


def check(archive: Archive, number: int, body: Mapping[str, Any]) -> float:
    """How far an answer's probabilities are from the recorded ones of reference `number`.

    Raises WrongAnswer where that is more than the answer's tier allows, where the decision is another one though it is no
    close call, and for an answer of another version or pipeline.
    """
    references = archive.references
    entry = references.entries[number]
    expected = tuple(entry["scores"])
    postprocessor: Postprocessor = references.postprocessor
    try:
        scores, chosen = postprocessor.read(body)
        tier, threshold = body["tier"], body["threshold_used"]
        served = (body["model_version"], body["pipeline_fingerprint"])
    except (KeyError, TypeError, ValueError) as error:
        raise WrongAnswer(
            f"{entry['file']}: no prediction ({type(error).__name__}: {error}): {str(body)[:200]}"
        ) from error
    apart = deviation(scores, expected)
    if tier not in references.tiers:
        raise WrongAnswer(f"{entry['file']}: answered in tier {tier!r}, the archive has {', '.join(references.tiers)}")
    if not apart <= references.tiers[tier]:
        raise WrongAnswer(
            f"{entry['file']}: answered {list(scores)}, expected {list(expected)} within {references.tiers[tier]:g}"
        )
    decided = postprocessor.choose(expected, threshold)
    if chosen != decided and postprocessor.settled(expected, threshold, references.tolerance):
        raise WrongAnswer(f"{entry['file']}: decided for class {chosen}, expected {decided}")
    if served != (archive.version, references.fingerprint):
        raise WrongAnswer(f"{entry['file']}: answered by version {served[0]}, pipeline {str(served[1])[:12]}")
    return apart


def _alone(send: Callable[..., Answer], **how: Any) -> Callable[[Client, Archive, int], tuple[Answer, float]]:
    def ask(client: Client, archive: Archive, number: int) -> tuple[Answer, float]:
        answer = send(
            client,
            archive.name,
            archive.references.payloads[number],
            version=archive.version,
            timeout=PATIENCE_S,
            **how,
        )
        return answer, check(archive, number, answer.body) if answer.status == 200 else 0.0

    return ask


def _beside_a_bad_one(client: Client, archive: Archive, number: int) -> tuple[Answer, float]:
    payloads = archive.references.payloads
    files = {"first": payloads[number], "bad": payloads[number][:50], "last": payloads[number]}
    answer = client.predict_batch_rest(archive.name, files, version=archive.version, timeout=PATIENCE_S)
    if answer.status != 200:
        return answer, 0.0
    results = answer.body.get("results", {})
    if not 400 <= results.get("bad", {}).get("code", 0) < 500:
        raise WrongAnswer(
            f"a file cut short among others got {str(results.get('bad'))[:200]}, expected a 4xx of its own"
        )
    return answer, max(check(archive, number, results.get(name, {})) for name in ("first", "last"))


# Each sends reference `number` of an archive: the answer, and how far it is from the recorded one; raises WrongAnswer.
WAYS: Mapping[str, Callable[[Client, Archive, int], tuple[Answer, float]]] = {
    "REST body": _alone(Client.predict_rest),
    "REST multipart": _alone(Client.predict_rest, multipart=True),
    "REST JSON": _alone(Client.predict_rest, json_key="data"),
    "gRPC": _alone(Client.predict_grpc),
    "REST, beside a bad file": _beside_a_bad_one,
}
