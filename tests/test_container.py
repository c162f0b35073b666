"""The Dockerfile's steps, run here without Docker: what it copies suffices, and what it edits is what it means to."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from skewless.torchserve.launch import read_properties
from tests.conftest import ROOT


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A folder with what the image has under /app."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    for source, target in re.findall(r"^COPY (\S+) (\S+)$", dockerfile, re.MULTILINE):
        path = tmp_path / target
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, path, dirs_exist_ok=True)
        else:
            path = path / source if target == "." else path
            path.mkdir(parents=True, exist_ok=True) if target.endswith("/") else path.parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / source, path)
    return tmp_path


@pytest.mark.parametrize("script", ["serve", "register", "smoke_test", "request", "compile_features"])
def test_image_has_what_its_scripts_import(image: Path, script: str):
    command = [sys.executable, f"scripts/{script}.py", "--help"]
    result = subprocess.run(command, cwd=image, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_image_opens_inference_and_metrics_but_not_management(image: Path):
    (edit,) = re.findall(r"^RUN (sed .*? config\.properties)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    subprocess.run(edit, shell=True, cwd=image, check=True)
    before, after = read_properties(ROOT / "config.properties"), read_properties(image / "config.properties")
    changed = {key: value for key, value in after.items() if before[key] != value}
    assert changed == {
        "inference_address": "http://0.0.0.0:8080",
        "metrics_address": "http://0.0.0.0:8082",
        "grpc_inference_address": "0.0.0.0",
    }


def test_build_context_is_what_the_image_copies():
    allowed = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    copied = re.findall(r"^COPY (\S+) ", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert {source.split("/")[0] for source in copied} == allowed
