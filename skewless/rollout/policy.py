"""What a rollout does by itself: its steps, and how much worse the candidate may be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from skewless.core.catalogue import check
from skewless.core.errors import DefinitionError
from skewless.core.yaml_file import read_yaml
from skewless.errors import UsageError

SHADOW: Literal["shadow"] = "shadow"


@dataclass(frozen=True)
class Policy:
    """When to step, hold, abort and promote. A file needs only what is to be other than here.

    steps: what the candidate gets, one step after the other: "shadow", which is a copy of every request, or a percentage of
        the clients. After the last one it is promoted.
    min_requests: that the candidate has answered in a step before the step can end; as many of the baseline, while it has
        traffic.
    max_hours: for one step. A rollout that has not moved on by then is aborted.
    step_when: "nothing_wrong": a step ends with min_requests, unless something has been found to be wrong. "within_tolerance":
        it ends when every comparison is shown to be within its tolerance, which takes many more requests.
    alpha: the probability that a candidate that is within every tolerance is ever aborted by a comparison, over the whole
        rollout, however often somebody looks. Each comparison gets an equal part of it.
    unit: of decisions and refusals. "client": the first file of each client counts, because the split is by client and the files
        of one resemble one another. "request": every file, for clients that send only one, or that are alike.

    What the candidate may be worse by, each as a difference of rates, 0.01 being one in a hundred:
    max_error_increase: of requests that failed through no fault of the caller's.
    max_refusal_change: of files that are refused as unreadable or too large, in either direction.
    max_decision_change: of the files decided for a class, in either direction.
    max_slow_increase: of requests that take longer than 95 % of the baseline's do; 0.1: three times as many as the 5 %.
    max_flips: the share of shadowed files that the two versions decide otherwise.
    max_dp: how far the two probabilities of any one shadowed file may be apart; None for any.
    hold_psi: the population stability index of live probabilities, candidate against baseline, from which a step is not ended;
        None for never. 0.25 is the customary sign of another distribution. It is not made for being looked at again and again,
        so it never aborts.
    """

    steps: tuple[Literal["shadow"] | float, ...] = (SHADOW, 5.0, 25.0, 50.0, 100.0)
    min_requests: int = 500
    max_hours: float = 72.0
    step_when: Literal["nothing_wrong", "within_tolerance"] = "nothing_wrong"
    alpha: float = 0.05
    unit: Literal["client", "request"] = "client"
    max_error_increase: float = 0.01
    max_refusal_change: float = 0.02
    max_decision_change: float = 0.05
    max_slow_increase: float = 0.1
    max_flips: float = 0.1
    max_dp: float | None = None
    hold_psi: float | None = None

    def __post_init__(self):
        percents = [step for step in self.steps if not isinstance(step, str)]
        if not self.steps or SHADOW in self.steps[1:]:
            raise ValueError(
                f"steps is {list(self.steps)}, expected percentages, with or without one 'shadow' before them"
            )
        if any(not 0 < each <= 100 for each in percents) or percents != sorted(set(percents)):
            raise ValueError(f"steps is {list(self.steps)}, expected rising percentages over 0 and up to 100")
        if self.min_requests < 1 or self.max_hours <= 0:
            raise ValueError(
                f"min_requests is {self.min_requests} and max_hours {self.max_hours:g}, expected at least 1 and more than 0"
            )
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha is {self.alpha:g}, expected a number between 0 and 1, such as 0.05")
        for name, value in vars(self).items():
            if name.startswith("max_") and name != "max_hours" and value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value:g}, expected a number in [0, 1]")
        if self.hold_psi is not None and self.hold_psi <= 0:
            raise ValueError(f"hold_psi is {self.hold_psi:g}, expected more than 0, such as 0.25")

    @classmethod
    def read(cls, path: str | Path) -> Policy:
        """The policy of a YAML file. Raises UsageError, naming the file, the key and what was expected."""
        path = Path(path)
        try:
            content = read_yaml(path)
            if not isinstance(content, dict):
                raise DefinitionError(f"it is {content!r:.60}, expected keys and values such as min_requests: 500")
            return cls(**check(cls, content, "policy"))
        except FileNotFoundError:
            raise UsageError(f"there is no policy {path}") from None
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: {error}") from error
