"""What a worker counts, on TorchServe's metrics endpoint, and its journal."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ts.metrics.metric_type_enum import MetricTypes

from skewless.core.service import ModelService
from skewless.core.telemetry import Journal, Telemetry

_log = logging.getLogger(__name__)

# The counters skewless_NAME_total, with their labels beside the model's name and version.
_COUNTERS = {
    "files": ("status", "kind"),
    "scores": ("bin",),
    "decisions": ("choice",),
    "truncated": (),
    "journal_lost": (),
}


class Record:
    """Exports the counters, the histogram `skewless_request_seconds`, and the gauge `skewless_reference_scores`: the shares
    of the archive's evaluation in each bin.

    TorchServe's histograms have fixed buckets, made for seconds from 0.005 to 10: so scores are counted by bin.

    model: the manifest's. cache: TorchServe's metrics, of the worker's context.
    """

    def __init__(self, service: ModelService, model: Mapping[str, str], cache: Any):
        name, version = model["modelName"], model["modelVersion"]
        self._journal = Journal.of_environment(name, version)
        self._telemetry = Telemetry(service, name, version, self._journal)
        self._own = [_label(name), _label(version)]
        self._counters = {
            name: _metric(cache, f"skewless_{name}_total", "count", labels, MetricTypes.COUNTER)
            for name, labels in _COUNTERS.items()
        }
        self._seconds = _metric(cache, "skewless_request_seconds", "s", (), MetricTypes.HISTOGRAM)
        self._lost = 0
        # Zeros, so that the first of each is a rise like any other.
        bins = self._telemetry.bins.names
        choices = service.postprocessor.classes
        for key in [("files", "200", "answered"), *(("scores", b) for b in bins), *(("decisions", c) for c in choices)]:
            self._count(key, 0)
        for key in [("truncated",), ("journal_lost",)]:
            self._count(key, 0)
        if reference := self._telemetry.reference:
            gauge = _metric(cache, "skewless_reference_scores", "share", ("bin",), MetricTypes.GAUGE)
            for name, count in zip(bins, reference["counts"], strict=True):
                gauge.add_or_update(count / sum(reference["counts"]), [*self._own, name])

    def __call__(
        self, requests: Sequence[Any], responses: Sequence[Any], headers: Sequence[Mapping[str, Any]], seconds: float
    ) -> None:
        """Record a batch. seconds: that each of its requests took. What goes wrong is logged: the answers are given."""
        try:
            for key, count in self._telemetry.record(requests, responses, headers, seconds).items():
                if count:
                    self._count(key, count)
            for _ in requests:
                self._seconds.add_or_update(round(seconds, 6), self._own)
            if self._journal and self._journal.lost > self._lost:
                lost = self._journal.lost
                self._count(("journal_lost",), lost - self._lost)
                self._lost = lost
        except Exception:
            _log.exception("a batch of %d requests could not be recorded", len(requests))

    def _count(self, key: tuple[str, ...], count: int) -> None:
        name, *labels = key
        self._counters[name].add_or_update(count, [*self._own, *map(_label, labels)])


def _metric(cache: Any, name: str, unit: str, labels: tuple[str, ...], kind: MetricTypes) -> Any:
    return cache.add_metric_to_cache(name, unit, ["model_name", "model_version", *labels], kind)


def _label(value: str) -> str:
    """A label as TorchServe can read it back from the worker's output, where these signs end a label."""
    return "".join("_" if sign in "|,:#" or not sign.isprintable() else sign for sign in value)
