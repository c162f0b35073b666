"""What makes an archive decision-exact: a fast network beside the exact one, the margin between them, and its proof."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from skewless.core.cascade import Cascade, apart
from skewless.core.definition import FAST, Definition
from skewless.core.networks import Network
from skewless.core.service import ModelService
from skewless.core.stages import InputError
from skewless.errors import BuildError
from skewless.packaging.execution import Execution

# Whose differences give the margin. The proof is on another split.
CALIBRATION_SPLIT = "val"

_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

_Scores = tuple[float, ...]


@dataclass(frozen=True)
class DecisionExact:
    """A fast network in reduced precision, and how sure its margin has to be.

    fast: its runtime and precision, with the recordings that evaluation measured and those that give int8 its value ranges.
    confidence: that the two networks' scores of a new recording are at most the margin's order statistic apart; in (0, 1).
    safety_factor: what that order statistic is multiplied by, for recordings unlike the validation's; at least 1.
    Raises BuildError for a value that is wrong, and a fast network that is not of the reduced tier.
    """

    fast: Execution
    confidence: float = 0.999
    safety_factor: float = 2.0

    def __post_init__(self):
        if self.fast.tier != "reduced":
            raise BuildError(
                f"the fast network of a decision-exact archive is in {self.fast.precision}, expected a reduced precision such "
                "as int8"
            )
        if self.fast.split == CALIBRATION_SPLIT:
            raise BuildError(
                f"--split is {self.fast.split}, which gives the margin; prove it on another split, such as test"
            )
        if not 0.0 < self.confidence < 1.0:
            raise BuildError(f"confidence is {self.confidence}, expected a number between 0 and 1")
        if not (self.safety_factor >= 1.0 and math.isfinite(self.safety_factor)):
            raise BuildError(f"safety factor is {self.safety_factor}, expected a number of at least 1")

    def write(self, network: Network, definition: Definition, folder: Path) -> list[Path]:
        """Write the fast network's files into the archive's folder; returns their paths."""
        (folder / FAST).mkdir()
        return self.fast.write(network, definition, folder / FAST)

    def prove(self, staged: Path, threshold: float, evaluation: Path) -> dict[str, Any]:
        """Run both networks of a staged archive on what evaluation measured: the val split gives the margin, the other one has
        to keep it. Returns what the archive's metrics record of the fast runtime.

        Raises BuildError when a recording's networks are further apart than the margin, for then some threshold would
        decide it otherwise; and for recordings that are not those that evaluation measured.
        """
        definition = Definition.read(staged)
        definition.precision.apply()
        cpu = torch.device("cpu")
        exact, fast = definition.load_runtime(cpu), definition.load_fast_runtime(cpu)
        assert fast is not None  # the staged model.yaml names it
        service = ModelService(definition, exact, metrics={"threshold": threshold})
        calibration = self._scores(Cascade(fast, exact, definition.postprocessor, 0.0), service, evaluation)
        margin = conformal_margin([apart(*both) for both in calibration], self.confidence, self.safety_factor)
        cascade = Cascade(fast, exact, definition.postprocessor, margin["value"])
        proof = self._scores(cascade, service, evaluation, self.fast.split)
        metadata = {**self.fast.metadata(), "margin": {**margin, "split": CALIBRATION_SPLIT}}
        return {**metadata, "measured": self._measure(cascade, service, proof)}

    def _measure(
        self, cascade: Cascade, service: ModelService, both: Sequence[tuple[_Scores, _Scores]]
    ) -> dict[str, Any]:
        """The figures of a split's scores, fast and exact; raises BuildError for any further apart than the margin."""
        found, split = service.postprocessor, self.fast.split
        differences = np.array([apart(*pair) for pair in both])
        repeated = {t: np.array([not found.settled(fast, t, cascade.margin) for fast, _ in both]) for t in _THRESHOLDS}
        now = np.array([not found.settled(fast, service.threshold, cascade.margin) for fast, _ in both])
        # What is served, against the exact network, and what the fast one would decide alone.
        other = np.array([_differ(service, fast, exact) for fast, exact in both])
        beyond = int((~(differences <= cascade.margin)).sum())
        figures = {
            "split": split,
            "recordings": len(both),
            "max_dp": float(differences.max()),
            "beyond_margin": beyond,
            "flips": int((other & ~now).sum()),
            "flips_of_the_fast_network_alone": int(other.sum()),
            "repeated": float(now.mean()),
            "repeated_at_threshold": {str(t): float(each.mean()) for t, each in repeated.items()},
        }
        if beyond:
            raise BuildError(
                f"on {beyond} of the {len(both)} recordings of split '{split}' the {self.fast.precision} network is further from the "
                f"exact one than the margin of {cascade.margin:.4f} (largest |dp| {differences.max():.4f}; decisions change for "
                f"{figures['flips']} at threshold {service.threshold:g}): some threshold would decide them otherwise. Give more "
                "validation recordings or a larger --safety-factor, or build without --decision-exact"
            )
        return figures

    def _scores(
        self, cascade: Cascade, service: ModelService, evaluation: Path, split: str = CALIBRATION_SPLIT
    ) -> list[tuple[_Scores, _Scores]]:
        """The scores of both networks for every recording of a split that evaluation measured."""
        both = []
        for row, recording in tqdm(self.fast.measured(evaluation, split), desc=f"both networks, {split}", unit="file"):
            payload = self.fast.read(row, recording, evaluation)
            try:
                rows = service.definition.prepared.run(payload, **service.input_limits).data
            except InputError as error:
                raise BuildError(f"{recording.path} cannot be read: {error}") from error
            (fast,), (exact,) = cascade.fast([rows]), cascade.exact([rows])
            both.append((service.postprocessor.scores(fast), service.postprocessor.scores(exact)))
        return both


def conformal_margin(differences: Sequence[float], confidence: float, safety_factor: float) -> dict[str, Any]:
    """The margin of a split conformal prediction, and what it rests on.

    Of n differences |dp| the k-th smallest, k = ceil((n + 1) confidence), is not exceeded by that of a new recording with at
    least that probability: V. Vovk, A. Gammerman, G. Shafer, "Algorithmic Learning in a Random World", 2005; J. Lei et al.,
    "Distribution-Free Predictive Inference for Regression", JASA 113, 2018. It holds on average over recordings that are
    exchangeable with the n, and not for each kind of recording by itself. Where n is too small, k > n, the largest is taken,
    and the confidence that is reached is n / (n + 1).

    differences: one per recording, in probability. safety_factor: what the order statistic is multiplied by.
    Raises BuildError for differences that are not numbers, and for none.
    """
    n = len(differences)
    if not n or not all(map(math.isfinite, differences)):
        raise BuildError("the margin needs a number for every validation recording, and at least one recording")
    # Of 1000 x 0.999 the float is 999.0000000000001 or so on some way of writing it.
    wanted = math.ceil(round((n + 1) * confidence, 9))
    k = min(wanted, n)
    quantile = sorted(differences)[k - 1]
    return {
        "value": safety_factor * quantile,
        "safety_factor": safety_factor,
        "order_statistic": quantile,
        "rank": k,
        "recordings": n,
        "confidence_asked": confidence,
        "confidence": min(confidence, n / (n + 1)),
    }


def summary(fast: Mapping[str, Any]) -> list[str]:
    """What whoever builds the archive should know of `prove`'s figures: plain sentences."""
    margin, measured = fast["margin"], fast["measured"]
    n, of = margin["recordings"], f"the {margin['recordings']} validation recordings"
    rank = f"the largest |dp| of {of}" if margin["rank"] == n else f"|dp| number {margin['rank']} of {of}"
    lines = [
        f"decision-exact: margin {margin['value']:.4f}, {margin['safety_factor']:g} times {rank} (confidence "
        f"{margin['confidence']:.4g}); of the {measured['recordings']} recordings of split '{measured['split']}' "
        f"{100 * measured['repeated']:.1f} % are run by both networks, and {measured['flips']} decisions differ"
    ]
    if margin["confidence"] < margin["confidence_asked"]:
        needed = math.ceil(round(margin["confidence_asked"] / (1 - margin["confidence_asked"]), 9))
        lines.append(
            f"{n} validation recordings prove the margin with a confidence of {margin['confidence']:.4g}; for "
            f"{margin['confidence_asked']:g} there have to be {needed}"
        )
    return lines


def _differ(service: ModelService, ours: _Scores, theirs: _Scores) -> bool:
    choose = service.postprocessor.choose
    return choose(ours, service.threshold) != choose(theirs, service.threshold)
