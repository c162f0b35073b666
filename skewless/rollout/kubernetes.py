"""A rollout's steps as patches of Gateway API routes, for a cluster where something else applies them.

They are JSON patches (RFC 6902) of the routes in deploy/kubernetes/overlays/canary, an HTTPRoute and a GRPCRoute, where the first of
`backendRefs` is the baseline and the second the candidate. Each says all that a step needs, so that any of them may be applied
after any other, and twice.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from skewless.core.files import atomic
from skewless.errors import UsageError

_RULE = "/spec/rules/0"
# Kinds of routes, and the Service's port for each.
_PORTS = {"httproute": 8090, "grpcroute": 7090}
# Kubernetes gives names 63 characters, and a Service's is the longest that is made of these.
_LONGEST_NAME = 63


def service(model: str, version: str) -> str:
    """The Service of one version of a model. Raises UsageError where Kubernetes would not take the name."""
    name = f"skewless-{_name(model)}-{_name(version)}"
    if len(name) > _LONGEST_NAME:
        raise UsageError(
            f"{name} is too long a name for Kubernetes, which takes {_LONGEST_NAME} characters; choose a shorter one"
        )
    return name


def write_patches(
    model: str, baseline: str, candidate: str, percents: Sequence[float], out_dir: str | Path
) -> list[Path]:
    """Write the steps of a rollout into a folder, and return the files in their order: a shadow, each of `percents`, promotion, and
    the way back from each of them; a file of each for either kind of route.

    percents: of the requests, for the candidate; from 0.1 to 100, rising. What is in the folder under these names is replaced.
    Raises UsageError.
    """
    out = Path(out_dir)
    old, new = service(model, baseline), service(model, candidate)
    if old == new:
        raise UsageError(
            f"baseline {baseline} and candidate {candidate} are both {old} to Kubernetes; give two versions that differ"
        )
    if (
        not percents
        or any(not 0.1 <= percent <= 100 for percent in percents)
        or list(percents) != sorted(set(percents))
    ):
        raise UsageError(f"the steps are {list(percents)}, expected rising percentages from 0.1 to 100")
    steps: list[tuple[str, float, bool]] = [("shadow", 0, True)]
    steps += [(f"{percent:g}-percent", percent, False) for percent in percents if percent < 100]
    steps.append(("promote", 100, False))
    numbered = [(f"{number:02}-{name}", percent, mirror) for number, (name, percent, mirror) in enumerate(steps)]
    files = {
        f"{name}.{route}.yaml": (route, _patch(old, new, percent, port if mirror else None))
        for name, percent, mirror in [*numbered, ("abort", 0, False)]
        for route, port in _PORTS.items()
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, (route, operations) in files.items():
            how = f"# kubectl patch {route} {_name(model)} --type json --patch-file {name}\n"
            with atomic(out / name) as unfinished:
                unfinished.write_text(how + yaml.safe_dump(operations, sort_keys=False))
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror or error}; choose another folder") from error
    return [out / name for name in files]


def _patch(baseline: str, candidate: str, percent: float, mirror_port: int | None) -> list[dict[str, Any]]:
    # Weights are whole numbers; in thousandths, half a percent is one.
    weight = round(10 * percent)
    mirror = {"type": "RequestMirror", "requestMirror": {"backendRef": {"name": candidate, "port": mirror_port}}}
    return [
        # On a route of other versions nothing is changed.
        {"op": "test", "path": f"{_RULE}/backendRefs/0/name", "value": baseline},
        {"op": "test", "path": f"{_RULE}/backendRefs/1/name", "value": candidate},
        {"op": "replace", "path": f"{_RULE}/backendRefs/0/weight", "value": 1000 - weight},
        {"op": "replace", "path": f"{_RULE}/backendRefs/1/weight", "value": weight},
        {"op": "add", "path": f"{_RULE}/filters", "value": [mirror] if mirror_port else []},
    ]


def _name(part: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-")
