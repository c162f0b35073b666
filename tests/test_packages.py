"""pyproject.toml, the locks and the wheel: they agree, and the wheel has what an installed skewless needs."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SERVING = ("serving", "training", "audio", "voice", "images", "onnx", "mnn")


def share_packages(folder: Path) -> None:
    """Give a new virtual environment the packages of this one, by their folder: not installed a second time, and without
    what is installed editable here."""
    (purelib,) = folder.glob("lib/python*/site-packages")
    (purelib / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")


def pins(file: str) -> dict[str, str]:
    """Versions by name; of an entry for another Python or system, too."""
    found = re.findall(r"^([\w.-]+)(?:\[[\w,-]+\])?==([^;#\s]+)", (ROOT / file).read_text(), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


def asked_for(*extras: str) -> list[Requirement]:
    """What pyproject.toml asks for here, with extras of its own resolved."""
    texts = [*PROJECT["dependencies"], *(text for extra in extras for text in PROJECT["optional-dependencies"][extra])]
    found = []
    for requirement in map(Requirement, texts):
        if requirement.name == "skewless":
            found += asked_for(*requirement.extras)
        elif requirement.marker is None or requirement.marker.evaluate():
            found.append(requirement)
    return found


@pytest.mark.parametrize(("file", "extras"), [("requirements.txt", SERVING), ("requirements-dev.txt", ("dev",))])
def test_a_lock_is_what_is_asked_for_and_brought_along(file: str, extras: tuple[str, ...]):
    locked = pins("requirements.txt") | (pins(file) if file != "requirements.txt" else {})
    seen, waiting = set(), asked_for(*extras)
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        # torch pins CUDA's libraries itself.
        if name.startswith(("nvidia-", "cuda-")) or name == "triton":
            continue
        assert name in locked, f"{file} lacks {requirement}"
        assert requirement.specifier.contains(locked[name], prereleases=True), f"{name} {locked[name]}: {requirement}"
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        for text in distribution(name).requires or ():
            further = Requirement(text)
            chosen = [{"extra": extra} for extra in ("", *requirement.extras)]
            if further.marker is None or any(further.marker.evaluate(each) for each in chosen):
                waiting.append(further)
    elsewhere = {"audioop-lts", "colorama", "standard-aifc", "standard-chunk", "standard-sunau"}
    assert set(locked) - {name for name, _ in seen} <= elsewhere


def test_this_environment_is_the_locked_one():
    different = {
        name: (version, distribution(name).version)
        for name, version in (pins("requirements.txt") | pins("requirements-dev.txt")).items()
        if name not in ("audioop-lts", "colorama", "standard-aifc", "standard-chunk", "standard-sunau")
        and distribution(name).version != version
    }
    assert not different


def test_the_wheel_has_what_skewless_needs_and_no_tests(tmp_path: Path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", tmp_path, ROOT], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("skewless-*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        started = file.getinfo("skewless/torchserve/verifying_python").external_attr >> 16
        metadata = file.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    for folder in ("handler", "archive"):
        ours = {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".yaml")}
        assert {f"skewless/resources/{name}" for name in ours} <= names
    ours = {p.relative_to(ROOT).as_posix() for p in (ROOT / "skewless").rglob("*") if p.suffix in (".py", ".yaml")}
    wanted = {*ours, *(f"skewless/torchserve/{name}" for name in ("inference.proto", "log4j2.xml"))}
    assert wanted | {"skewless/resources/config.properties"} <= names
    # TorchServe starts it in the place of Python.
    assert started & 0o111 == 0o111
    roots = {name.split("/")[0] for name in names}
    assert roots == {"skewless", next(root for root in roots if root.endswith(".dist-info"))}
    # For users' test suites, and no test of ours.
    ours = {"skewless/testing.py"}
    assert not [name for name in names - ours if "test" in Path(name).name and "selftest" not in name]
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: <3.14,>=3.11" in metadata
