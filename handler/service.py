"""The model as a service: load an archive, answer requests. Knows no server."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from handler.decisions import build_decision
from handler.decisions.bag_threshold import BagThreshold
from handler.definition import read_config
from handler.pipeline import Pipeline
from handler.precision import NumericPolicy
from handler.references import SelfTest, self_test
from handler.request import Limits, Request, RequestError
from handler.runtimes import Runtime, load_runtime
from handler.stages import InputError, Signal

_log = logging.getLogger(__name__)
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
class ModelService:
    """A pipeline, a network behind a runtime, and a decision, with the metrics that belong to them."""

    pipeline: Pipeline
    runtime: Runtime
    decision: BagThreshold
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
        policy = NumericPolicy(**config["precision"])
        policy.apply()
        return cls(
            pipeline=Pipeline.from_yaml(root / "pipeline.yaml"),
            runtime=load_runtime(config, root, device),
            decision=build_decision(config["decision"]),
            metrics=json.loads((root / "metrics.json").read_text(encoding="utf-8")),
            policy=policy,
            limits=Limits(**config["limits"]),
        )

    @property
    def threshold(self) -> float:
        """The archive's threshold: the one its evaluation chose, else the decision's default."""
        return self.metrics.get("threshold", self.decision.threshold)

    def predict(self, requests: Sequence[Request | RequestError]) -> list[Response]:
        """One response per request, in order. A request that cannot be read is answered alone and never fails another."""
        prepared = [self._prepare(request) for request in requests]
        good = [p for p in prepared if isinstance(p, Signal)]
        outputs = iter(self.runtime([signal.data for signal in good]))
        return [
            Response.of_error(p) if isinstance(p, RequestError) else self._answer(request, p, next(outputs))
            for request, p in zip(requests, prepared, strict=True)
        ]

    def score(self, recordings: Sequence[bytes]) -> list[tuple[float, Signal, dict[str, torch.Tensor]]]:
        """For each recording its probability, the pipeline's result and the network's outputs: what training's
        evaluation calls. Raises InputError for a recording that cannot be read."""
        signals = [self.pipeline.run(data, max_duration_s=self.limits.max_duration_s) for data in recordings]
        outputs = self.runtime([signal.data for signal in signals])
        return [(self.decision.score(o), s, o) for s, o in zip(signals, outputs, strict=True)]

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

    def _prepare(self, request: Request | RequestError) -> Signal | RequestError:
        if isinstance(request, RequestError):
            return request
        try:
            return self.pipeline.run(request.payload, max_duration_s=self.limits.max_duration_s)
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
