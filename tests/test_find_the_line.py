"""docs/find-the-line.md: its commands, run as they stand, and what it says of them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(?P<kind>bash)?\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.chain
def test_the_page_from_two_functions_to_the_lines(tmp_path: Path):
    page = (ROOT / "docs" / "find-the-line.md").read_text(encoding="utf-8")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    commands = [line for block in BLOCK.finditer(page) if block["kind"] for line in block["text"].splitlines()]
    assert len(commands) == 5
    codes, printed = [], ""
    for command in commands:
        program, *rest = command.split()
        done = subprocess.run(
            [sys.executable, *(["-m", "skewless"] if program == "skewless" else []), *rest],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        codes.append(done.returncode)
        printed += done.stdout
        assert done.returncode in (0, 1), command + done.stderr
    assert codes == [0, 1, 0, 1, 0]
    assert (tmp_path / "diff" / "index.html").is_file()
    # What the page quotes is what is printed, but for where its lines are broken.
    told = " ".join(printed.split())
    quoted = [block["text"] for block in BLOCK.finditer(page) if not block["kind"] and "backend_onnx" in block["text"]]
    assert len(quoted) == 2
    for each in quoted:
        assert " ".join(each.split()) in told
