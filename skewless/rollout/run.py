"""Moving a rollout: by an operator, or unattended by its policy."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skewless.errors import ServerError, UsageError
from skewless.rollout import state
from skewless.rollout.gateway import follow
from skewless.rollout.state import FOLDER, Rollout, current, exclusive
from skewless.torchserve.server import Server

SHADOW = "shadow"
_DEFAULT_STEPS: tuple[str | float, ...] = (SHADOW, 5.0, 25.0, 50.0, 100.0)


@dataclass(frozen=True)
class Judged:
    """What the policy says of a rollout now. action: "step", "hold", "abort" or "promote". text: for people. data: for --json."""

    action: str
    reasons: list[str]
    text: str
    data: Any


def steps(policy: Path | None) -> list[tuple[float, bool]]:
    """The steps of a policy's file, or of the default one: percent, and whether it is the shadow. Raises UsageError."""
    if importlib.util.find_spec("skewless.rollout.policy"):
        module = importlib.import_module("skewless.rollout.policy")
        named = (module.Policy.read(policy) if policy else module.Policy()).steps
    elif policy:
        raise UsageError(f"{policy} cannot be read: this installation has no skewless.rollout.policy")
    else:
        named = _DEFAULT_STEPS
    return [(0.0, True) if step == SHADOW else (state.checked_percent(float(step)), False) for step in named]


def first_step(policy: Path | None) -> tuple[float, bool]:
    """Where a rollout begins: percent, and whether it is the shadow."""
    return steps(policy)[0]


def verdict(state_dir: Path, rollout: Rollout) -> Judged | None:
    """What the policy says of a rollout that runs; None where nothing judges."""
    if not importlib.util.find_spec("skewless.rollout.judge"):
        return None
    return _judged(state_dir, rollout)


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
    return _end(state_dir, model, why, state.promote)


def abort(state_dir: Path, model: str, why: str) -> Rollout:
    """As `state.abort`, and the gateway follows."""
    return _end(state_dir, model, why, state.abort)


def unattended(
    state_dir: Path,
    model: str,
    every_s: float,
    judged: Callable[[Path, Rollout], Judged | None] = verdict,
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
    if judged is verdict and not importlib.util.find_spec("skewless.rollout.judge"):
        raise UsageError("this installation has nothing that judges a rollout; step, promote or abort it yourself")
    said = ""
    with exclusive(state_dir / FOLDER / f"{model}.run.lock", busy):
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


def _once(state_dir: Path, rollout: Rollout, judge: Callable[[Path, Rollout], Judged | None]) -> tuple[bool, str]:
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
    if found is None:
        return False, "nothing judges it"
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


def _end(state_dir: Path, model: str, why: str, action: Callable[[Server, str, str], Rollout]) -> Rollout:
    current(state_dir, model)
    server = Server.attach(state_dir)
    try:
        return action(server, model, why)
    finally:
        # In either case: a promotion that is interrupted already sends everybody to the candidate.
        follow(state_dir)


def _judged(state_dir: Path, rollout: Rollout) -> Judged:
    judge = importlib.import_module("skewless.rollout.judge")
    found = judge.assess(state_dir, rollout)
    return Judged(found.action, list(found.reasons), judge.as_text(found), found)
