"""The versions of the packages that compute a model's numbers."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version


def library_versions(packages: Iterable[str]) -> dict[str, str]:
    """Python's version and those of the packages, named as pip names them; "not installed" for one that is missing."""
    return {"python": platform.python_version(), **{name: _version(name) for name in sorted(set(packages))}}


def changed_versions(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """How versions differ, in words, such as "torch 2.10.0 then, 2.11.0 now"; empty where they are the same."""
    changed = [f"{name} {then.get(name)} then, {now[name]} now" for name in now if then.get(name) != now[name]]
    return ", ".join(changed)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
