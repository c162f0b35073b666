"""The model as a service: load an archive, answer requests. Knows no server."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from threading import TIMEOUT_MAX
from typing import Any, Unpack

import torch

from skewless.core.budget import Budget
from skewless.core.cascade import DECISION_EXACT, Cascade, Given
from skewless.core.definition import Definition
from skewless.core.numerics import NumericPolicy, all_finite, reader_threads
from skewless.core.pipeline import Pipeline
from skewless.core.postprocess import Part, Postprocessor
from skewless.core.request import BatchRequest, Limits, Request, RequestError
from skewless.core.runtimes import Runtime
from skewless.core.selftest import SelfTest, self_test
from skewless.core.stages import InputError, InputLimits, Signal

METRICS = "metrics.json"

_log = logging.getLogger(__name__)
_STATUS = {"malformed": 400, "unsupported": 415, "too_large": 413}


@dataclass(frozen=True)
class Response:
    """An answer: an HTTP status and a body of plain JSON types.

    An error's body is `{"code": status, "message": text}`. The code is in the body because not every protocol has a
    status of its own: over gRPC, TorchServe answers OK to every call that reaches a handler.
    """

    status: int
    body: dict[str, Any]

    @classmethod
    def of_error(cls, error: RequestError) -> Response:
        return cls(error.status, {"code": error.status, "message": error.message})


@dataclass(frozen=True)
class Prepared:
    """A request whose file the pipeline has read. signal: the network's input, with the metadata of the file."""

    request: Request
    signal: Signal


@dataclass(frozen=True)
class Inferred:
    """A prepared request with the network's outputs by name, and the runtime that gave them."""

    prepared: Prepared
    outputs: Mapping[str, torch.Tensor]
    runtime: Runtime


@dataclass(frozen=True)
class Scored:
    """What evaluation and the skew report keep of one input: the postprocessor's scores, and the probabilities of the
    recording's parts, such as its segments."""

    scores: tuple[float, ...]
    parts: tuple[Part, ...]

    def chosen(self, threshold: float) -> int:
        """The number of the class that is chosen at this threshold."""
        return Postprocessor.choose(self.scores, threshold)


@dataclass(frozen=True)
class ModelService:
    """A pipeline, a network behind a runtime, and a postprocessor, with the metrics that belong to them.

    A request goes through `prepare`, `infer` and `answer`, one after the other; `predict` does all three.

    cascade: of a decision-exact archive, its fast network in front of `runtime`, which is the exact one.
    """

    definition: Definition
    runtime: Runtime
    metrics: Mapping[str, Any]
    self_test: SelfTest | None = None
    cascade: Cascade | None = None

    @classmethod
    def load(cls, archive_dir: str | Path, device: torch.device, *, replay: bool = True) -> ModelService:
        """Load an unpacked archive onto a device, put its numeric policy in force, and replay its references.

        replay: False for whoever is about to record the references.
        Raises SelfTestError when they are not reproduced, ValueError when the archive's parts do not fit together.
        """
        root = Path(archive_dir)
        definition = Definition.read(root)
        definition.precision.apply()
        runtime = definition.load_runtime(device)
        metrics = json.loads((root / METRICS).read_text(encoding="utf-8"))
        service = cls(definition, runtime, metrics, cascade=Cascade.load(definition, runtime, metrics, device))
        if not replay:
            return service
        tested = self_test(definition, service.runtime, service.metrics, service.cascade)
        return replace(service, self_test=tested)

    @property
    def pipeline(self) -> Pipeline:
        return self.definition.pipeline

    @property
    def postprocessor(self) -> Postprocessor:
        return self.definition.postprocessor

    @property
    def policy(self) -> NumericPolicy:
        return self.definition.precision

    @property
    def limits(self) -> Limits:
        return self.definition.limits

    @property
    def threshold(self) -> float:
        """The archive's threshold: the one its evaluation chose, else the postprocessor's default."""
        return self.metrics.get("threshold", self.postprocessor.threshold)

    @property
    def tier(self) -> str:
        """What the archive promises: "exact" and "reduced" of every number, "decision-exact" of every decision."""
        return DECISION_EXACT if self.cascade else self.runtime.tier

    @property
    def input_limits(self) -> InputLimits:
        """What one input may be, as `Pipeline.run` takes it."""
        limits = self.limits
        return {
            "min_rate_hz": limits.min_rate_hz,
            "max_rate_hz": limits.max_rate_hz,
            "max_channels": limits.max_channels,
            "max_samples": limits.max_samples,
            "max_duration_s": limits.max_duration_s,
            "max_pixels": limits.max_pixels,
        }

    def predict(self, requests: Sequence[Request | BatchRequest | RequestError]) -> list[Response]:
        """One response per request, in order. A file that cannot be read is answered alone and never fails another,
        whether it came in a request of its own or among others in one."""
        return answer_files(requests, self.limits, lambda files: self.answer(self.infer(self.prepare(files))))

    def prepare(self, requests: Sequence[Request | RequestError]) -> Iterator[Prepared | RequestError]:
        """Read every file through the pipeline; a file's error takes its place.

        Each is read by one of the readers' threads, several at once and a few ahead of whoever takes them: while the network
        works on one, the next are decoded.

        A file that its request's budget has nothing left for is refused: one for which there is no processor time or no time
        left is not read, and one that is too long after those before it goes no further than here.
        """
        reading: deque[tuple[Budget, Future[Prepared | RequestError]]] = deque()
        for request in requests:
            # A file that came in no batch has all limits to itself.
            given = request.budget if isinstance(request, Request) else None
            budget = given or Budget(self.limits)
            reading.append((budget, self._readers.submit(self._prepare, request, budget)))
            # What the network takes of a file can be a thousand times larger than the file: only a few wait.
            if len(reading) > torch.get_num_threads():
                yield _prepared(*reading.popleft())
        while reading:
            yield _prepared(*reading.popleft())

    def infer(self, prepared: Iterable[Prepared | RequestError]) -> Iterator[Inferred | RequestError]:
        """Run the network on all that could be prepared, as soon as there are enough rows for it; errors pass through."""
        waiting: list[Prepared | RequestError] = []
        rows = 0
        for each in prepared:
            waiting.append(each)
            rows += len(each.signal.data) if isinstance(each, Prepared) else 0
            if rows >= self.runtime.rows_at_once:
                yield from self._infer([_in_time(file) for file in waiting])
                waiting, rows = [], 0
        yield from self._infer([_in_time(file) for file in waiting])

    def answer(self, inferred: Iterable[Inferred | RequestError]) -> Iterator[Response]:
        """Turn outputs into responses, each at its request's threshold or else the archive's."""
        for each in inferred:
            yield Response.of_error(each) if isinstance(each, RequestError) else self._answer_or_fault(each)

    def score(self, payloads: Sequence[bytes]) -> list[Scored]:
        """What evaluation calls: every encoded input's scores, by the exact network of two. Raises InputError for one that
        cannot be read."""
        signals = list(self._readers.map(self._read, payloads))
        outputs = self.runtime([signal.data for signal in signals])
        return [
            Scored(self.postprocessor.scores(o), tuple(self.postprocessor.parts(o, s.metadata)))
            for s, o in zip(signals, outputs, strict=True)
        ]

    def describe(self) -> dict[str, Any]:
        """What is served: the versioned metrics, the pipeline, and the numeric policy in force."""
        return {
            "metrics": dict(self.metrics),
            "threshold": self.threshold,
            "pipeline": self.pipeline.to_dict(),
            "pipeline_fingerprint": self.pipeline.fingerprint,
            "tier": self.tier,
            "runtime": _described(self.runtime),
            "fast_runtime": self.cascade and {**_described(self.cascade.fast), "margin": self.cascade.margin},
            "precision": self.policy.report(self.runtime.device),
            "limits": asdict(self.limits),
            "self_test": asdict(self.self_test) if self.self_test else None,
        }

    @cached_property
    def _readers(self) -> ThreadPoolExecutor:
        return reader_threads(torch.get_num_threads())

    def _read(self, payload: bytes, **more: Unpack[InputLimits]) -> Signal:
        limits: InputLimits = {**self.input_limits, **more}
        signal = self.definition.prepared.run(payload, **limits)
        if not all_finite(signal.data):
            peak = signal.metadata.get("peak")
            level = "" if peak is None else f"; its largest sample is {peak:.3g} times full scale"
            raise InputError(
                f"what the network would take of this file has values that are NaN or infinite{level}; export it again"
            )
        self.postprocessor.require_windows(len(signal.data))
        return signal

    def _prepare(self, request: Request | RequestError, budget: Budget) -> Prepared | RequestError:
        if isinstance(request, RequestError):
            return request
        check = budget.reading()
        try:
            # Before anything is read: there may be nothing left for it.
            check()
            return Prepared(request, self._read(request.payload, check=check))
        except RequestError as error:
            return error
        except InputError as error:
            return RequestError(_STATUS[error.kind], str(error))
        except Exception as error:
            # A fault of ours, which must not take the rest of the batch with it.
            _log.exception("preprocessing failed unexpectedly")
            if _is_out_of_memory(error):
                return RequestError(
                    413, "this file is too large to be processed in this server's memory; send a smaller one"
                )
            return RequestError(500, "this file could not be processed; the server's log has the reason")

    def _infer(self, prepared: Sequence[Prepared | RequestError]) -> Iterator[Inferred | RequestError]:
        answers = iter(self._outputs([each for each in prepared if isinstance(each, Prepared)]))
        for each in prepared:
            yield each if isinstance(each, RequestError) else next(answers)

    def _outputs(self, prepared: Sequence[Prepared]) -> list[Inferred | RequestError]:
        """The network's outputs for each file. A file on which it fails gets an error of its own, with its cause."""
        if not prepared:
            return []
        try:
            inputs = [each.signal.data for each in prepared]
            given = self._run(inputs, [self._threshold_of(each.request) for each in prepared])
            return [self._checked(*each) for each in zip(prepared, given, strict=True)]
        except Exception as error:
            # A fault of ours, or too little memory. It must not take the rest of the batch with it.
            if len(prepared) == 1:
                _log.exception("the network failed unexpectedly")
                failed = RequestError(500, "the network failed on this file; the server's log has the reason")
                failed.__cause__ = error
                return [failed]
            _log.exception("the network failed on %d files at once; each is run by itself", len(prepared))
        return [answer for each in prepared for answer in self._outputs([each])]

    def _run(self, inputs: Sequence[torch.Tensor], thresholds: Sequence[float]) -> list[Given]:
        if self.cascade:
            return self.cascade(inputs, thresholds)
        return [Given(outputs, self.runtime) for outputs in self.runtime(inputs)]

    @staticmethod
    def _checked(prepared: Prepared, given: Given) -> Inferred | RequestError:
        if bad := [name for name, values in given.outputs.items() if not all_finite(values)]:
            _log.error("runtime '%s' gave values that are not finite: %s", given.runtime.name, ", ".join(bad))
            return RequestError(500, "the network's answer to this file is not a number; the server's log has more")
        return Inferred(prepared, *given)

    def _threshold_of(self, request: Request) -> float:
        return self.threshold if request.threshold is None else request.threshold

    def _answer_or_fault(self, inferred: Inferred) -> Response:
        try:
            answer = self._answer(inferred)
            # What JSON cannot hold would be met where the answers of the whole batch are written.
            json.dumps(answer.body, allow_nan=False)
            return answer
        except Exception:
            # A fault of the post-processing, which must not take the rest of the batch with it.
            _log.exception("post-processing failed unexpectedly")
            return Response.of_error(
                RequestError(500, "this file could not be answered; the server's log has the reason")
            )

    def _answer(self, inferred: Inferred) -> Response:
        request, signal = inferred.prepared.request, inferred.prepared.signal
        return Response(
            200,
            {
                **self.postprocessor(inferred.outputs, signal.metadata, self._threshold_of(request)),
                "model_version": self.metrics["model_version"],
                "pipeline_fingerprint": self.pipeline.fingerprint,
                "runtime": inferred.runtime.name,
                "precision": inferred.runtime.precision,
                "tier": inferred.runtime.tier,
            },
        )


def _is_out_of_memory(error: Exception) -> bool:
    # torch raises a RuntimeError, with these words.
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def _described(runtime: Runtime) -> dict[str, Any]:
    return {key: getattr(runtime, key) for key in ("name", "precision", "tier", "tolerance")}


def _prepared(budget: Budget, reading: Future[Prepared | RequestError]) -> Prepared | RequestError:
    """What came of reading a file, if its request may have so long a recording; waited for while its batch has time."""
    while True:
        try:
            found = reading.result(min(budget.left_s, TIMEOUT_MAX))
            break
        except TimeoutError:
            if late := budget.late():
                reading.cancel()
                return late
    duration_s = found.signal.metadata.get("duration_s") if isinstance(found, Prepared) else None
    too_long = None if duration_s is None else budget.add(duration_s)
    return too_long or found


def _in_time(file: Prepared | RequestError) -> Prepared | RequestError:
    """The file, or its refusal where the batch has no time left to run the network on it."""
    if isinstance(file, RequestError) or file.request.budget is None:
        return file
    return file.request.budget.late() or file


def answer_files(
    requests: Sequence[Request | BatchRequest | RequestError],
    limits: Limits,
    answer: Callable[[Sequence[Request | RequestError]], Iterator[Response]],
) -> list[Response]:
    """One response per request: `answer` gives one per file, and those of one request are put together again.

    The files are answered in turn, the first of every request before the second of any: one file does not wait for another
    request's sixty-four, and where the batch's time runs out, it is theirs that are left.
    """
    budgets = Budget.of_batch(limits, len(requests))
    files = [_files(request, budget) for request, budget in zip(requests, budgets, strict=True)]
    turns = sorted((turn, number) for number, own in enumerate(files) for turn in range(len(own)))
    answers = dict(zip(turns, answer([files[number][turn] for turn, number in turns]), strict=True))
    return [
        _together(request, [answers[turn, number] for turn in range(len(files[number]))])
        for number, request in enumerate(requests)
    ]


def _files(request: Request | BatchRequest | RequestError, budget: Budget) -> list[Request | RequestError]:
    if isinstance(request, BatchRequest):
        files = request.files.values()
        return [file if isinstance(file, RequestError) else Request(file, request.threshold, budget) for file in files]
    return [request if isinstance(request, RequestError) else replace(request, budget=budget)]


def _together(request: Request | BatchRequest | RequestError, answers: Sequence[Response]) -> Response:
    """The one answer, or, for a request with several files, each file's own under its name and a count of failures."""
    if not isinstance(request, BatchRequest):
        return answers[0]
    named = dict(zip(request.files, answers, strict=True))
    failed = sum(answer.status != 200 for answer in named.values())
    results = {name: answer.body for name, answer in named.items()}
    return Response(200, {"results": results, "succeeded": len(named) - failed, "failed": failed})
