"""docs/from-seed-apis.md: every command of it, run as it stands by somebody who has the files that it names."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from skewless.demos.talent import MIN_COUNT, examples
from skewless.torchserve.retrain import Status, read_status
from skewless.torchserve.server import Server
from tests.conftest import ROOT, Demonstration

BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SETUP, COUGH, TALENT, RETRAIN, DEFAULT, PICTURES, LOAD, PORTRAIT = BLOCK.findall(
    (ROOT / "docs" / "from-seed-apis.md").read_text(encoding="utf-8")
)
# On the machine that evaluated, served probabilities differ by 0 to 6e-8: what batching does to a float32.
SAME = 5e-5


def reference(made: Demonstration, number: int) -> tuple[bytes, float | list[float]]:
    """One of the references, and the score or scores that evaluation recorded for it."""
    folder = made.evaluation / "references"
    entry = json.loads((folder / "references.json").read_text())[number]
    scores = entry["scores"]
    return (folder / entry["file"]).read_bytes(), scores[0] if len(scores) == 1 else scores


@dataclass(frozen=True)
class Reader:
    """Somebody with a checkout's scripts, a running server, and files. scores: what evaluation recorded for them."""

    folder: Path
    scores: dict[str, float | list[float]]

    def runs(self, block: str) -> str:
        """What a block prints, after the one that sets the variables."""
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        # Retraining beside a server's workers, more threads would only wait for each other.
        environment = os.environ | {"PATH": path, "no_proxy": "*", "OMP_NUM_THREADS": "1"}
        script = ("bash", "-euo", "pipefail", "-c", SETUP + block)
        done = subprocess.run(script, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def answers(self, block: str) -> list[Any]:
        """The JSON that a block prints, one answer after the other."""
        text, found = self.runs(block).strip(), []
        while text:
            answer, end = json.JSONDecoder().raw_decode(text)
            found.append(answer)
            text = text[end:].lstrip()
        return found


@pytest.fixture(scope="module")
def reader(
    server: Server,
    demonstration: Demonstration,
    others: dict[str, Demonstration],
    tmp_path_factory: pytest.TempPathFactory,
) -> Reader:
    """The page's working directory: what it takes from the checkout, and the files that it names."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("archive",):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".server").symlink_to(server.state_dir)
    scores = {}
    for name, made, number in (
        ("cough.wav", demonstration, 0),
        ("audio.wav", others["talent"], 0),
        ("audio1.wav", others["talent"], 0),
        ("audio2.wav", others["talent"], -1),
        ("portrait.jpg", others["portrait"], 0),
    ):
        payload, scores[name] = reference(made, number)
        (folder / name).write_bytes(payload)
    corpus = others["talent"].corpus
    (folder / "recordings").symlink_to(corpus)
    unheard = {example.label: example.data for example in examples(MIN_COUNT, seed=7)}
    for name, label in (("good_singer1.wav", "good"), ("bad_singer1.wav", "poor")):
        (folder / name).write_bytes(unheard[label])
    return Reader(folder, scores)


def test_the_page_names_no_file_that_is_not_there():
    text = (ROOT / "docs" / "from-seed-apis.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:archive|docs)/[\w./-]+\w", text)) | {"config.properties"}
    assert len(named) > 3
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_cough_backend(reader: Reader, demonstration: Demonstration):
    own, form, query = reader.answers(COUGH)
    for answer in (own, form, query):
        assert answer["file_probability"] == pytest.approx(reader.scores["cough.wav"], abs=SAME)
        assert answer["coughDetected"] is (answer["file_probability"] > answer["threshold_used"])
    chosen = json.loads((demonstration.evaluation / "metrics.json").read_text())["threshold"]
    assert [answer["threshold_used"] for answer in (own, form, query)] == [chosen, 0.61, 0.61]


def test_the_talent_api(reader: Reader):
    health, (model,), single, batch = reader.answers(TALENT)
    assert health == {"status": "Healthy"}
    described = model["customizedMetadata"]
    assert [worker["status"] for worker in model["workers"]] == ["READY"]
    assert {"pipeline", "threshold", "limits", "self_test"} <= set(described)
    assert {"accuracy", "precision", "recall", "f1", "confusion"} <= set(
        described["metrics"]["evaluation"]["at_best_threshold"]
    )
    assert {"label", "confidence", "talented"} <= set(single)
    assert single["probability"] == pytest.approx(reader.scores["audio.wav"], abs=SAME)
    assert (batch["succeeded"], batch["failed"]) == (2, 0)
    for name, file in (("first", "audio1.wav"), ("second", "audio2.wav")):
        assert batch["results"][name]["probability"] == pytest.approx(reader.scores[file], abs=SAME)


def test_what_the_page_says_is_refused(reader: Reader):
    ask = 'curl -H "Authorization: Bearer $TOKEN" "$INFERENCE/predictions/{}" {}\n'
    repeated, threshold, untold = reader.answers(
        ask.format("talent", "-F files=@audio1.wav -F files=@audio2.wav")
        + ask.format("cough", "-F audio=@cough.wav -F threshold=61")
        + 'curl -F audio=@cough.wav "$INFERENCE/predictions/cough"'
    )
    assert repeated["code"] == threshold["code"] == untold["code"] == 400
    assert "files.1=@FILE" in repeated["message"]
    assert "'61'" in threshold["message"]
    assert "Token" in untold["message"]


def test_the_talent_apis_retraining(reader: Reader, server: Server):
    started, _, status = reader.runs(RETRAIN).partition("\n")
    version, number = re.match(r"talent (\d+\.0): process (\d+)", started).groups()
    status = Status(**json.loads(status))
    try:
        assert (status.version, status.pid) == (version, int(number))
        # On a slow machine it has ended before the second command has begun.
        assert status.state in ("running", "succeeded")
        deadline = time.monotonic() + 300
        while status.state == "running":
            assert time.monotonic() < deadline, status
            time.sleep(0.5)
            status = read_status(reader.folder / "runs" / "retrain" / "new")
        assert (status.state, status.progress) == ("succeeded", 100), status
        assert status.result["default"] is False
        # The new files are in training: the test is the old one.
        assert status.result["metrics"]["recordings"] == sum(
            row.endswith(",test") for row in (reader.folder / "recordings" / "manifest.csv").read_text().splitlines()
        )
        again = 'curl -H "Authorization: Bearer $TOKEN" -F file=@audio.wav "$INFERENCE/predictions/talent{}"\n'
        default, new = reader.answers(again.format("") + again.format(f"/{version}"))
        assert (default["model_version"], new["model_version"]) == ("1.0", version)
        server.set_default("talent", version)
        (changed,) = reader.answers(DEFAULT)
        assert "1.0" in changed["status"]
        assert [m["version"] for m in server.models() if m["name"] == "talent" and m["default"]] == ["1.0"]
    finally:
        if any((m["name"], m["version"]) == ("talent", version) for m in server.models()):
            server.set_default("talent", "1.0")
            server.unregister("talent", version)
        (server.model_store / f"talent-{version}.mar").unlink(missing_ok=True)


def test_the_talent_apis_visualizations(reader: Reader):
    reader.runs(PICTURES)
    made = reader.folder / "pictures"
    assert {path.name for path in made.iterdir()} == {"mfcc.png", "spectral.png", "features.json", "features.md"}
    assert len(json.loads((made / "features.json").read_text())["features"]) == 37


def test_the_talent_apis_load_test(reader: Reader):
    lines = reader.runs(LOAD).splitlines()
    assert len(lines) == 20
    assert all(re.fullmatch(r"200 \d+\.\d+ s", line) for line in lines), lines


def test_the_profile_picture_api(reader: Reader):
    for answer in reader.answers(PORTRAIT):
        assert list(answer["probabilities"]) == ["animal", "avatar", "human"]
        assert list(answer["probabilities"].values()) == pytest.approx(reader.scores["portrait.jpg"], abs=SAME)
        assert answer["label"] == max(answer["probabilities"], key=answer["probabilities"].get)
        assert answer["confident"] is (answer["confidence"] >= 0.7)
