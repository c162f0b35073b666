"""The archives that a rollout is tried with: one that serves, a new version as good as it, and four that are worse.

All have the same trained weights, so what differs is what was changed here, and nothing else. Three of them have another
pipeline: somebody imported the weights behind the wrong preprocessing, and evaluation, which has the same one, did not notice.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.rollout.commands import skewless
from skewless import resources
from skewless.core.definition import MODEL, PIPELINE

NAME = "cough"
BASELINE = "1.0"

Content = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """A version to roll out. change: what its model.yaml has otherwise. pipeline: what its pipeline.yaml has otherwise, if anything.
    expected: how its rollout has to end. because: a word that the reasons for it have to contain."""

    version: str
    title: str
    expected: str
    because: str = ""
    model: Callable[[Content], None] | None = None
    pipeline: Callable[[list[Content]], None] | None = None


def _longer_recordings(model: Content) -> None:
    model["limits"] |= {"max_duration_s": 1200.0, "max_read_s": 5.0}


def _on_one_thread(model: Content) -> None:
    model["runtime"] = {"eager": {}}
    model["precision"]["threads"] = 1


# A fault that neither the corpus nor the build's own recordings meet: none of them has 24 kHz.
FAULTY = '''"""A stage that writes down what a recording was made for."""

from dataclasses import dataclass
from typing import ClassVar

from skewless.core.stages import Signal, Stage, Tolerance

MADE_FOR = {
    **{8000: "telephone", 16000: "speech", 22050: "radio"},
    **{32000: "broadcast", 44100: "music", 48000: "video"},
}


@dataclass(frozen=True)
class MadeFor(Stage, name="made_for"):
    unit: ClassVar[str] = "full scale"
    tolerance: ClassVar[Tolerance] = Tolerance(1e-6, 1e-4, "that of the decoder")

    def __call__(self, signal: Signal) -> Signal:
        return signal.of(signal.data, made_for=MADE_FOR[signal.sampling_rate])
'''


def _made_for_written_down(stages: list[Content]) -> None:
    stages.insert(1, {"made_for.py:MadeFor": {}})


def _level_by_bit_depth(stages: list[Content]) -> None:
    # What services that decode by pydub do: 16 bits are divided by 32,768, and no peak is looked for.
    at = next(number for number, stage in enumerate(stages) if "peak_normalize" in stage)
    del stages[at]


def _smaller_pictures(stages: list[Content]) -> None:
    next(stage["letterbox"] for stage in stages if "letterbox" in stage)["size"] = 112


CANDIDATES = (
    Candidate("2.0", "as good: takes recordings of 20 minutes", "promoted", model=_longer_recordings),
    Candidate(
        "2.1",
        "more errors: fails on recordings of 24 kHz",
        "aborted",
        "failed requests",
        pipeline=_made_for_written_down,
    ),
    Candidate("2.2", "slower: one thread, not optimised", "aborted", "slow requests", model=_on_one_thread),
    Candidate("2.3", "skewed: no peak normalisation", "aborted", "peak_normalize", pipeline=_level_by_bit_depth),
    Candidate("2.4", "faster: spectrograms of half the size", "aborted", "letterbox", pipeline=_smaller_pictures),
)


def build(demo: Path, wanted: Sequence[Candidate], store: Path, scratch: Path, key: Path) -> None:
    """Write the baseline and the candidates into `store`, signed by `key`.

    demo: a folder with the corpus, the training run and the evaluation of archive/cough, as the quickstart leaves them.
    """
    checkpoint, evaluation = demo / "train" / "best.pth", demo / "evaluation"
    _build(resources.ARCHIVES / NAME, checkpoint, evaluation, BASELINE, store, key)
    weights = scratch / "weights.pth"
    torch.save(torch.load(checkpoint, weights_only=True)["model_state_dict"], weights)
    for candidate in wanted:
        folder = scratch / candidate.version / NAME
        _write_definition(candidate, folder)
        own, measured = checkpoint, evaluation
        if candidate.pipeline:
            own, measured = folder.parent / "best.pth", folder.parent / "evaluation"
            manifest: list[str | Path] = ["--manifest", demo / "corpus" / "manifest.csv"]
            said: list[str | Path] = ["--pipeline", folder / PIPELINE, "--classes", "negative,positive"]
            skewless("import", folder, weights, *said, "--out", own)
            skewless("evaluate", folder, "--checkpoint", own, *manifest, "--out", measured)
        _build(folder, own, measured, candidate.version, store, key)


def _write_definition(candidate: Candidate, folder: Path) -> None:
    """archive/cough with the candidate's changes. Its folder's name is the model's."""
    shutil.copytree(resources.ARCHIVES / NAME, folder, ignore=shutil.ignore_patterns("variants", "__pycache__"))
    if candidate.model:
        model = yaml.safe_load((folder / MODEL).read_text(encoding="utf-8"))
        candidate.model(model)
        (folder / MODEL).write_text(yaml.safe_dump(model, sort_keys=False), encoding="utf-8")
    if candidate.pipeline:
        (folder / "made_for.py").write_text(FAULTY, encoding="utf-8")
        pipeline = yaml.safe_load((folder / PIPELINE).read_text(encoding="utf-8"))
        candidate.pipeline(pipeline["stages"])
        (folder / PIPELINE).write_text(yaml.safe_dump(pipeline, sort_keys=False), encoding="utf-8")


def _build(folder: Path, checkpoint: Path, evaluation: Path, version: str, store: Path, key: Path) -> None:
    given: list[str | Path] = ["--checkpoint", checkpoint, "--evaluation", evaluation, "--version", version]
    skewless("build", folder, *given, "--sign", key, "--out", store)
