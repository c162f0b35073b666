"""A worker imports what its archive uses, and nothing else: memory and seconds of every worker."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from torch import nn

from skewless.core.definition import MODEL, PIPELINE, Definition
from skewless.core.networks import Network, build_network
from skewless.core.runtimes import runtime_settings
from skewless.core.selftest.record import ENTRIES, REFERENCES, record
from skewless.core.service import METRICS
from skewless.packaging.build import copy_code
from tests import recordings
from tests.conftest import ROOT

# None of these is needed to answer a request: torchvision brings torch._dynamo, which brings sympy, 140 MB together.
NEVER = (
    *("torchvision", "torch._dynamo", "torch._inductor", "torch.onnx", "sympy", "onnx", "onnxscript", "_tools"),
    *("scipy.signal", "scipy.stats", "sklearn", "librosa", "numba", "matplotlib", "pandas", "h5py", "PIL"),
    *("typer", "requests", "grpc", "psutil", "pydub", "ray"),
)

PROGRAM = """
import json, sys
from pathlib import Path
from types import SimpleNamespace

folder, *files = sys.argv[1:]
sys.path.insert(0, folder)
import handler.entry
from skewless.core.request import Request

serving = handler.entry.SkewlessHandler()
serving.initialize(SimpleNamespace(manifest={"model": {}}, system_properties={"model_dir": folder}))
seen = []
for file in files:
    (answer,) = serving.service.predict([Request(Path(file).read_bytes())])
    seen.append([answer.status, list(sys.modules)])
print(json.dumps(seen))
"""


class Small(Network):
    """Images `(N, 3, 224, 224)`, with the outputs of the cough detector's network."""

    input_name = "images"

    def __init__(self):
        super().__init__()
        self.body, self.last = nn.Conv2d(3, 8, 16, stride=16), nn.Linear(8, 1)

    def encode(self, x):
        return torch.relu(self.body(x)).mean((2, 3))

    def head(self, features):
        logits = self.last(features)[:, 0]
        return {
            "bag_probability": torch.sigmoid(logits.mean()),
            "segment_probabilities": torch.sigmoid(logits),
            "segment_attention": torch.softmax(logits, dim=0),
        }


VOICE = """\
name: voice
stages:
  - decode: {}
  - downmix: {}
  - resample: {rate: 22050, method: soxr_hq}
  - remove_silence: {top_db: 20.0, frame_length: 2048, hop_length: 512}
  - voice_features: {n_mfcc: 13, n_fft: 2048, hop_length: 512, tempo: beat_track}
"""


def unpacked(folder: Path, name: str, runtime: dict[str, Any]) -> Path:
    """What a worker finds: the code, the definition of `archive/name` on a runtime, a small network's files, a reference."""
    copy_code(folder)
    source = ROOT / "archive" / name
    model = yaml.safe_load((source / MODEL).read_text(encoding="utf-8")) | {"runtime": runtime}
    (folder / MODEL).write_text(yaml.safe_dump(model), encoding="utf-8")
    pipeline = VOICE if name == "talent" else (source / PIPELINE).read_text(encoding="utf-8")
    (folder / PIPELINE).write_text(pipeline, encoding="utf-8")
    definition = Definition.read(folder)
    payload = recordings.wav(0.3 * np.random.default_rng(0).standard_normal((2, 3 * 44100)).clip(-3, 3), 44100)
    torch.manual_seed(0)
    network = (build_network(model["network"]) if name == "talent" else Small()).eval()
    found, settings = runtime_settings(runtime)
    example = definition.prepared.run(payload).data
    written = found.write(network, folder, settings, [example], definition.absorbed)
    metrics = {
        "model_version": "1.0",
        "pipeline": definition.pipeline.to_dict(),
        "postprocess": definition.postprocess,
        "code": definition.code,
        "weights_sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in written},
    }
    (folder / METRICS).write_text(json.dumps(metrics), encoding="utf-8")
    (folder / REFERENCES).mkdir()
    (folder / REFERENCES / "01.wav").write_bytes(payload)
    (folder / REFERENCES / ENTRIES).write_text("[]", encoding="utf-8")
    record(definition, definition.load_runtime(torch.device("cpu")))
    return folder


@pytest.mark.parametrize(
    ("name", "runtime"),
    [
        ("cough", {"mnn": {"micro_batch": 4, "absorb": ["replicate", "standardize"]}}),
        ("cough", {"onnxruntime": {}}),
        ("talent", {"eager": {}}),
    ],
)
def test_a_worker_imports_what_its_archive_uses(name: str, runtime: dict[str, Any], tmp_path: Path):
    folder = unpacked(tmp_path / "model", name, runtime)
    sound = 0.3 * np.random.default_rng(1).standard_normal((1, 3 * 44100)).clip(-3, 3)
    (tmp_path / "a.wav").write_bytes(recordings.wav(sound, 44100))
    soundfile.write(tmp_path / "a.flac", sound.T, 44100)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), str(tmp_path / "a.wav"), str(tmp_path / "a.flac")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (first, modules), (second, afterwards) = json.loads(done.stdout.splitlines()[-1])
    assert (first, second) == (200, 200)
    assert sorted({*NEVER} & {*afterwards}) == []
    # FFmpeg's libraries are for the containers that libsndfile does not read.
    assert "av" not in modules
    assert "av" in afterwards
    (chosen,) = runtime
    assert {"MNN", "onnxruntime"} & {*afterwards} == {"mnn": {"MNN"}, "onnxruntime": {"onnxruntime"}}.get(chosen, set())
