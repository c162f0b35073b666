"""The Dockerfile's steps, run here without Docker: what it copies suffices, and what it edits is what it means to."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import venv
from pathlib import Path

import pytest

from skewless.torchserve.launch import read_properties
from tests.conftest import ROOT
from tests.test_packages import share_packages

DOCKERFILE = (ROOT / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the image has under /app before the package is installed."""
    folder = tmp_path_factory.mktemp("context")
    for source, target in re.findall(r"^COPY (\S+) (\S+)$", DOCKERFILE, re.MULTILINE):
        path = folder / target
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            path = path / source if target.endswith(("/", ".")) else path
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / source, path)
    return folder


@pytest.fixture(scope="module")
def installed(context: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process in the image: the package is installed from what was copied, and nothing else of this
    repository is there. Packages that it depends on are this environment's."""
    folder = tmp_path_factory.mktemp("image") / "venv"
    venv.create(folder, with_pip=True)
    share_packages(folder)
    install = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, context / "source"], check=True, capture_output=True)
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return kept | {"PATH": f"{folder / 'bin'}{os.pathsep}{kept['PATH']}"}


def command_of(pattern: str) -> list[str]:
    """The words of a command in the Dockerfile."""
    (found,) = re.findall(pattern, DOCKERFILE, re.MULTILINE | re.DOTALL)
    return re.findall(r'"([^"]+)"', found)


def test_the_image_can_run_its_commands(installed: dict[str, str], tmp_path: Path):
    """Those that the Dockerfile names, as far as they go without archives."""
    for pattern in (r"^CMD (\[.*?\])", r"^    CMD (\[.*?\])"):
        shown = subprocess.run(
            [*command_of(pattern), "--help"], cwd=tmp_path, env=installed, capture_output=True, text=True, check=False
        )
        assert shown.returncode == 0, shown.stderr
    status = subprocess.run(
        command_of(r"^    CMD (\[.*?\])"), cwd=tmp_path, env=installed, capture_output=True, text=True, check=False
    )
    assert (status.returncode, "no server is running" in status.stdout) == (1, True), status.stderr


def test_the_image_has_the_lock_and_no_tools():
    installed = re.findall(r"pip install .*?(?:-r (\S+)|--no-deps (\S+))", DOCKERFILE)
    assert installed == [("requirements.txt", ""), ("", "./source")]
    names = re.findall(r"^([\w.-]+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert not {"pytest", "keras", "ruff", "mypy"} & set(names)


def test_image_opens_inference_and_metrics_but_not_management(context: Path, tmp_path: Path):
    shutil.copy(context / "source" / "config.properties", tmp_path)
    (edit,) = re.findall(r"^RUN (sed .*? config\.properties)", DOCKERFILE, re.MULTILINE)
    subprocess.run(edit, shell=True, cwd=tmp_path, check=True)
    before, after = read_properties(ROOT / "config.properties"), read_properties(tmp_path / "config.properties")
    changed = {key: value for key, value in after.items() if before[key] != value}
    assert changed == {
        "inference_address": "http://0.0.0.0:8080",
        "metrics_address": "http://0.0.0.0:8082",
        "grpc_inference_address": "0.0.0.0",
    }


def test_build_context_is_what_the_image_copies():
    allowed = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    copied = re.findall(r"^COPY (\S+) ", DOCKERFILE, re.MULTILINE)
    assert {source.split("/")[0] for source in copied} == allowed
