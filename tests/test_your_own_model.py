"""docs/your-own-model.md, run as it stands, with nothing of this repository but its wheel."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.chain

# A file that the page shows, or a block of commands, in the page's order.
STEP = re.compile(r"^`(?P<file>[\w./-]+)`:\n\n```\w+\n(?P<text>.*?)^```|^```bash\n(?P<commands>.*?)^```", re.M | re.S)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A new virtual environment with the built wheel. The packages that it depends on are those of this environment, by
    their folder: there they are not installed a second time, and what is installed editable there is not seen."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", folder, ROOT], check=True, capture_output=True)
    (wheel,) = folder.glob("skewless-*.whl")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    purelib = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    Path(purelib, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--force-reinstall",
        "--disable-pip-version-check",
    ]
    subprocess.run([*install, wheel], check=True, capture_output=True)
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return kept | {"PATH": f"{python.parent}{os.pathsep}{kept['PATH']}", "OMP_NUM_THREADS": "1"}


def test_the_wheel_knows_nothing_of_the_checkout(environment: dict[str, str], tmp_path: Path):
    shown = subprocess.run(
        ["python", "-c", "import json, sys, skewless; print(json.dumps([skewless.__file__, *sys.path]))"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    places = json.loads(shown.stdout)
    assert "site-packages" in places[0]
    assert str(ROOT) not in [place.rstrip("/") for place in places]


def test_the_page_from_new_to_proven(environment: dict[str, str], tmp_path: Path):
    text = (ROOT / "docs" / "your-own-model.md").read_text(encoding="utf-8")
    steps = list(STEP.finditer(text))
    assert sum(bool(step["file"]) for step in steps) == 6
    printed = ""
    try:
        for step in steps:
            if step["file"]:
                path = tmp_path / step["file"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(step["text"])
            elif not step["commands"].startswith("pip install"):
                done = subprocess.run(
                    ["bash", "-euo", "pipefail", "-c", step["commands"]],
                    cwd=tmp_path,
                    env=environment,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                assert done.returncode == 0, step["commands"] + done.stdout + done.stderr
                printed += done.stdout
    finally:
        subprocess.run(["skewless", "serve", "stop"], cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert printed.count("12 of 12 paths serve the reference probabilities") == 2
    assert '"howling": ' in printed
    skew = json.loads((tmp_path / "runs" / "skew" / "skew.json").read_text())
    assert skew["first_divergence"]["stage"] == "pcen"
    assert (tmp_path / "runs" / "skew" / "index.html").is_file()
