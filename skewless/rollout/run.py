"""Moving a rollout: by an operator, or unattended by its policy."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from skewless.errors import ServerError, UsageError
from skewless.rollout import state
from skewless.rollout.gateway import follow
from skewless.rollout.judge import Verdict, assess
from skewless.rollout.kubernetes import write_patches
from skewless.rollout.policy import SHADOW, Policy
from skewless.rollout.state import Rollout, current, exclusive
from skewless.torchserve.server import ROLLOUTS, Server


def steps(policy: Path | None) -> list[tuple[float, bool]]:
    """The steps of a policy's file, or of the default one: percent, and whether it is the shadow. Raises UsageError."""
    named = (Policy.read(policy) if policy else Policy()).steps
    return [(0.0, True) if step == SHADOW else (state.checked_percent(float(step)), False) for step in named]


def first_step(policy: Path | None) -> tuple[float, bool]:
    """Where a rollout begins: percent, and whether it is the shadow."""
    return steps(policy)[0]


def kubernetes_patches(model: str, baseline: str, candidate: str, policy: Path | None, out_dir: Path) -> list[Path]:
    """The policy's steps as patches for a cluster's routes; returns the files in their order. Raises UsageError."""
    percents = [percent for percent, _ in steps(policy) if percent]
    return write_patches(model, baseline, candidate, percents, out_dir)


def step(state_dir: Path, model: str, percent: float | None, why: str, shadow: bool = False) -> Rollout:
    """Move the split to `percent`, or to the policy's next step. Raises UsageError where there is none, or no rollout runs."""
    rollout = current(state_dir, model)
    planned = steps(Path(rollout.policy) if rollout.policy else None)
    if percent is None:
        if (position := rollout.step + 1) >= len(planned):
            raise UsageError(
                f"{rollout.model} is at the last step of its policy, {rollout.percent:g} %; promote it, or name a percentage"
            )
        percent, is_shadow = planned[position]
        shadow = shadow or is_shadow
    else:
        # A policy goes on from the last of its steps that is not beyond.
        reached = [number for number, (planned_percent, _) in enumerate(planned) if planned_percent <= percent]
        position = reached[-1] if reached else 0
    moved = state.move(state_dir, model, percent, why, shadow, position)
    follow(state_dir)
    return moved


def promote(state_dir: Path, model: str, why: str) -> Rollout:
    """As `state.promote`, and the gateway follows."""
    current(state_dir, model)
    server = Server.attach(state_dir)
    with _followed(state_dir):
        return state.promote(server, model, why)


def abort(state_dir: Path, model: str, why: str) -> Rollout:
    """As `state.abort`, and the gateway follows."""
    with _followed(state_dir):
        return state.abort(state_dir, lambda: Server.attach(state_dir), model, why)


def unattended(
    state_dir: Path,
    model: str,
    every_s: float,
    judged: Callable[[Path, Rollout], Verdict] = assess,
    sleep: Callable[[float], None] = time.sleep,
) -> Rollout:
    """Do what the policy says, with a look every `every_s` seconds, until the rollout is promoted or aborted.

    All that it knows is in the rollout's file, so whoever killed it starts it again. An operator may act meanwhile. Raises
    UsageError where another one follows the same rollout, or none runs.
    """
    if not every_s > 0:
        raise UsageError(f"--every is {every_s:g}, expected more than 0 seconds")
    busy = f"another `skewless rollout run {model}` follows this rollout already"
    rollout = current(state_dir, model)
    # What is wrong from the start is told at once; later on it may pass.
    steps(Path(rollout.policy) if rollout.policy else None)
    said = ""
    with exclusive(state_dir / ROLLOUTS / f"{model}.run.lock", busy):
        while rollout.running:
            try:
                done, words = _once(state_dir, rollout, judged)
            except ServerError as error:
                # A TorchServe that is started anew, an operator who acts at this moment, a full disk.
                done, words = False, f"cannot go on now: {error}"
            if words != said:
                print(f"{model}: {words}", file=sys.stderr, flush=True)
                said = words
            if not done:
                sleep(every_s)
            rollout = Rollout.read(state_dir, model) or rollout
    return rollout


def _once(state_dir: Path, rollout: Rollout, judge: Callable[[Path, Rollout], Verdict]) -> tuple[bool, str]:
    """One look. Returns whether something was done, and what in words."""
    model = rollout.model
    # The gateway may have missed the last step, if whoever made it was killed.
    follow(state_dir)
    if rollout.pending == "promote":
        promote(state_dir, model, "completed after an interruption")
        return True, "promoted: completed after an interruption"
    if rollout.pending == "abort":
        abort(state_dir, model, "completed after an interruption")
        return True, "aborted: completed after an interruption"
    found = judge(state_dir, rollout)
    why = "; ".join(found.reasons)
    if found.action == "abort":
        abort(state_dir, model, why)
        return True, f"aborted: {why}"
    if found.action == "promote":
        promote(state_dir, model, why)
        return True, f"promoted: {why}"
    if found.action == "step":
        planned = steps(Path(rollout.policy) if rollout.policy else None)
        if rollout.step + 1 >= len(planned):
            promote(state_dir, model, why)
            return True, f"promoted after the last step: {why}"
        moved = step(state_dir, model, None, why)
        return True, f"{moved.percent:g} %: {why}"
    return False, f"holds at {rollout.percent:g} %: {why}"


@contextlib.contextmanager
def _followed(state_dir: Path) -> Iterator[None]:
    try:
        yield
    finally:
        # In either case: an ending that is interrupted has already decided who goes where.
        follow(state_dir)
