"""The model as a service: load an archive, answer requests. Knows no server."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from handler.decisions import Decision, Part, build_decision
from handler.definition import read_config
from handler.pipeline import Pipeline
from handler.precision import NumericPolicy
from handler.references import SelfTest, self_test
from handler.request import BatchRequest, Limits, Request, RequestError
from handler.runtimes import Runtime, load_runtime
from handler.stages import InputError, Signal

T = TypeVar("T")

_log = logging.getLogger(__name__)
_AT_ONCE = 8  # files that are in memory as the network takes them
_STATUS = {"malformed": 400, "unsupported": 415, "too_large": 413}


@dataclass(frozen=True)
class Response:
    """An answer: an HTTP status and a body of plain JSON types.

    An error's body is `{"code": status, "message": text}`, as TorchServe's own errors are. The code is in the body
    because TorchServe answers every gRPC call that reaches a handler with OK.
    """

    status: int
    body: dict[str, Any]

    @classmethod
    def of_error(cls, error: RequestError) -> Response:
        return cls(error.status, {"code": error.status, "message": error.message})


@dataclass(frozen=True)
class Scored:
    """What evaluation and parity keep of one input: the decision's scores, and what its parts got."""

    scores: tuple[float, ...]
    parts: list[Part]


@dataclass(frozen=True)
class ModelService:
    """A pipeline, a network behind a runtime, and a decision, with the metrics that belong to them."""

    pipeline: Pipeline
    runtime: Runtime
    decision: Decision
    metrics: Mapping[str, Any]
    policy: NumericPolicy = NumericPolicy()
    limits: Limits = Limits()
    proof: SelfTest | None = None

    @classmethod
    def load(cls, archive_dir: str | Path, device: torch.device) -> ModelService:
        """Load an unpacked archive onto a device, put its numeric policy in force, and prove it by its references.

        Raises SelfTestError when it does not reproduce them, ValueError when its parts do not fit together.
        """
        service = cls.unproven(archive_dir, device)
        return replace(service, proof=self_test(service, Path(archive_dir)))

    @classmethod
    def unproven(cls, archive_dir: str | Path, device: torch.device) -> ModelService:
        """As `load`, without the replay: for whoever is about to record the references."""
        root = Path(archive_dir)
        config = read_config(root / "model-config.yaml")
        policy = _settings("precision", NumericPolicy, config)
        policy.apply()
        return cls(
            pipeline=Pipeline.from_yaml(root / "pipeline.yaml"),
            runtime=load_runtime(config, root, device),
            decision=build_decision(config["decision"]),
            metrics=json.loads((root / "metrics.json").read_text(encoding="utf-8")),
            policy=policy,
            limits=_settings("limits", Limits, config),
        )

    @property
    def threshold(self) -> float:
        """The archive's threshold: the one its evaluation chose, else the decision's default."""
        return self.metrics.get("threshold", self.decision.threshold)

    @property
    def input_limits(self) -> dict[str, float]:
        """What one input may be at most, as `Pipeline.run` takes it."""
        return {"max_duration_s": self.limits.max_duration_s, "max_pixels": self.limits.max_pixels}

    def predict(self, requests: Sequence[Request | BatchRequest | RequestError]) -> list[Response]:
        """One response per request, in order. A file that cannot be read is answered alone and never fails another,
        whether it came in a request of its own or among others in one."""
        singles = [single for request in requests for single in _singles(request)]
        # A few at a time: what the network takes of a file can be a thousand times larger than the file.
        parts = (singles[start : start + _AT_ONCE] for start in range(0, len(singles), _AT_ONCE))
        answers = (answer for part in parts for answer in self._answers(part))
        return [
            _together({name: next(answers) for name in request.files})
            if isinstance(request, BatchRequest)
            else next(answers)
            for request in requests
        ]

    def score(self, payloads: Sequence[bytes]) -> list[Scored]:
        """What evaluation calls: every encoded input's scores. Raises InputError for one that cannot be read."""
        signals = [self.pipeline.run(data, **self.input_limits) for data in payloads]
        outputs = self.runtime([signal.data for signal in signals])
        return [
            Scored(self.decision.scores(o), self.decision.parts(o, s.facts))
            for s, o in zip(signals, outputs, strict=True)
        ]

    def describe(self) -> dict[str, Any]:
        """What is served: the versioned metrics, the pipeline, and the numeric policy in force."""
        return {
            "metrics": dict(self.metrics),
            "threshold": self.threshold,
            "pipeline": self.pipeline.to_dict(),
            "pipeline_fingerprint": self.pipeline.fingerprint,
            "runtime": {k: getattr(self.runtime, k) for k in ("name", "precision", "tier", "tolerance")},
            "precision": self.policy.report(self.runtime.device),
            "limits": asdict(self.limits),
            "self_test": asdict(self.proof) if self.proof else None,
        }

    def _answers(self, singles: Sequence[Request | RequestError]) -> list[Response]:
        prepared = [self._prepare(single) for single in singles]
        good = [p for p in prepared if isinstance(p, Signal)]
        outputs = iter(self.runtime([signal.data for signal in good]))
        return [
            Response.of_error(p) if isinstance(p, RequestError) else self._answer(single, p, next(outputs))
            for single, p in zip(singles, prepared, strict=True)
        ]

    def _prepare(self, request: Request | RequestError) -> Signal | RequestError:
        if isinstance(request, RequestError):
            return request
        try:
            return self.pipeline.run(request.payload, **self.input_limits)
        except InputError as error:
            return RequestError(_STATUS[error.kind], str(error))
        except Exception:
            # A fault of ours, which must not take the rest of the batch with it.
            _log.exception("preprocessing failed unexpectedly")
            return RequestError(500, "this file could not be processed; the server's log has the reason")

    def _answer(self, request: Request, signal: Signal, outputs: Mapping[str, torch.Tensor]) -> Response:
        threshold = self.threshold if request.threshold is None else request.threshold
        return Response(
            200,
            {
                **self.decision(outputs, signal.facts, threshold),
                "model_version": self.metrics["model_version"],
                "pipeline_fingerprint": self.pipeline.fingerprint,
                "runtime": self.runtime.name,
                "precision": self.runtime.precision,
                "tier": self.runtime.tier,
            },
        )


def _settings(name: str, kind: type[T], config: Mapping[str, Any]) -> T:
    given = config[name]
    try:
        return kind(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model-config.yaml: {name} is {given!r}: {error}") from error


def _singles(request: Request | BatchRequest | RequestError) -> list[Request | RequestError]:
    if not isinstance(request, BatchRequest):
        return [request]
    files = request.files.values()
    return [file if isinstance(file, RequestError) else Request(file, request.threshold) for file in files]


def _together(answers: Mapping[str, Response]) -> Response:
    """The answer to a request with several files: each file's own under its name, with a count of those that failed."""
    failed = sum(answer.status != 200 for answer in answers.values())
    results = {name: answer.body for name, answer in answers.items()}
    return Response(200, {"results": results, "succeeded": len(answers) - failed, "failed": failed})
