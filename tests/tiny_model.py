"""A trained model within seconds: the cough detector's pipeline and variants, with a small network of its own."""

from __future__ import annotations

import csv
import io
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from skewless.core.definition import Definition
from skewless.training.config import Config
from skewless.training.fit import fit
from skewless.training.manifest import read_manifest

COUGH = Path(__file__).resolve().parents[1] / "archive" / "cough"

NETWORK = '''\
"""A network small enough to be trained within a test."""

import torch
from torch import nn

from skewless.core.networks import Network


class TinyNetwork(Network):
    """Images `(N, 3, 224, 224)` to features `(N, 4)`: the means of 8 x 8 fields of the first channel, and one
    linear layer."""

    input_name = "images"

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8 * 8, 4)
        self.output = nn.Linear(4, 1)

    def encode(self, x):
        fields = nn.functional.adaptive_avg_pool2d(x[:, 0], 8).flatten(1)
        return torch.tanh(self.project(nn.functional.layer_norm(fields, fields.shape[1:])))

    def logits(self, features):
        return self.output(features)

    def head(self, features):
        logits = self.logits(features)[:, 0]
        return {
            "bag_probability": torch.sigmoid(logits.mean()),
            "segment_probabilities": torch.sigmoid(logits),
            "segment_attention": torch.full_like(logits, 1 / logits.shape[0]),
        }
'''

MODEL = """\
network: {tiny.py:TinyNetwork: {}}
runtime: {eager: {micro_batch: 32}}
postprocess: {bag_threshold: {threshold: 0.5, positive_field: hissing, classes: [tone, noise]}}
precision: {tf32: false, threads: 0}
limits: {max_duration_s: 60.0}
"""


@dataclass(frozen=True)
class TinyModel:
    """What `skewless train` leaves behind: the definition's folder, a manifest beside its recordings, a checkpoint."""

    archive: Path
    manifest: Path
    checkpoint: Path

    @property
    def definition(self) -> Definition:
        return Definition.read(self.archive)


def recording(label: int, seed: int, rate: int = 16000) -> bytes:
    """2.6 s as a WAV file: a tone in faint noise (0), or noise with a faint tone (1)."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(2.6 * rate)) / rate
    tone = np.sin(2 * np.pi * rng.uniform(300, 2500) * time)
    noise = 0.3 * rng.standard_normal(len(time))
    faint = 10 ** rng.uniform(-3, -1.5)
    samples = noise + faint * tone if label else tone + faint * noise
    file = io.BytesIO()
    soundfile.write(file, 0.4 * samples, rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


def make(root: Path) -> TinyModel:
    """Write the folder and 24 recordings below `root`, and train."""
    archive = root / "tiny"
    shutil.copytree(COUGH, archive, ignore=shutil.ignore_patterns("__pycache__", "recipe.yaml"))
    (archive / "tiny.py").write_text(NETWORK, encoding="utf-8")
    (archive / "model.yaml").write_text(MODEL, encoding="utf-8")
    corpus = root / "corpus"
    corpus.mkdir()
    rows = []
    for number, split in enumerate(["train"] * 12 + ["val"] * 6 + ["test"] * 6):
        name, label = f"{number:02d}.wav", number % 2
        (corpus / name).write_bytes(recording(label, seed=number))
        rows.append((name, ("tone", "noise")[label], split))
    manifest = corpus / "manifest.csv"
    with open(manifest, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file_path", "label", "split"), *rows])
    definition = Definition.read(archive)
    config = Config(epochs=12, batch_size=4, learning_rate=0.01, patience=12, augmentation=False)
    recordings = read_manifest(manifest, corpus, definition.classes)
    fit(recordings, definition, config, root / "run", cache_dir=root / "cache", device=torch.device("cpu"))
    return TinyModel(archive, manifest, root / "run" / "best.pth")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make(tmp_path_factory.mktemp("tiny_model"))
