"""Small trained models for the tests, made once and kept while the code and the recipe are the same.

`python -m tests.demonstration NAME FOLDER` makes one: corpus, training and evaluation of an archive of this repository.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "runs" / "tests"

# Each archive by its own recipe, only smaller: what differs in its corpus and its training, and how many references.
SMALL: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "cough": ({"count": 120}, {"epochs": 4}, 8),
    "orca": ({"count": 72}, {"epochs": 3, "batch_size": 4}, 4),
    "talent": ({"count": 72}, {}, 4),
    "portrait": ({"count": 54}, {}, 4),
}


@dataclass(frozen=True)
class Demonstration:
    """The files of one small run of the whole chain; `store` is the test session's own."""

    name: str
    folder: Path
    store: Path

    @property
    def definition(self) -> Path:
        return ROOT / "archive" / self.name

    @property
    def corpus(self) -> Path:
        return self.folder / "corpus"

    @property
    def manifest(self) -> Path:
        return self.corpus / "manifest.csv"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "run" / "best.pth"

    @property
    def evaluation(self) -> Path:
        return self.folder / "evaluation"

    @property
    def archive(self) -> Path:
        return self.store / f"{self.name}-1.0.mar"


def trained(name: str, store: Path) -> Demonstration:
    """The demonstration of an archive, from the folder of kept ones or made now. `store` is left to the caller to fill."""
    folder = KEPT / f"{name}-{_digest(name)}"
    KEPT.mkdir(parents=True, exist_ok=True)
    with _lock(KEPT / f"{name}.lock"):
        if not (folder / "evaluation" / "metrics.json").is_file():
            # Those of other code are of no use any more.
            for old in KEPT.glob(f"{name}-*"):
                shutil.rmtree(old)
            made = subprocess.run(
                [sys.executable, "-m", "tests.demonstration", name, str(folder)],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
            )
            assert made.returncode == 0, made.stdout + made.stderr
    return Demonstration(name, folder, store)


def _digest(name: str) -> str:
    """Of everything that the trained numbers depend on: code, recipe, packages."""
    files = [
        p for room in ("core", "training", "evaluation", "demos") for p in (ROOT / "skewless" / room).rglob("*.py")
    ]
    files += [*(ROOT / "archive" / name).glob("*.yaml"), *ROOT.glob("requirements*.txt"), Path(__file__)]
    whole = hashlib.sha256()
    for path in sorted(files):
        whole.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return whole.hexdigest()[:16]


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make(name: str, folder: Path) -> None:
    """Corpus, training and evaluation into `folder`."""
    import torch

    from skewless.core.definition import Definition
    from skewless.demos import write_corpus
    from skewless.evaluation.evaluate import evaluate
    from skewless.training.config import config_of
    from skewless.training.fit import fit
    from skewless.training.manifest import read_manifest
    from skewless.training.recipe import read_recipe

    torch.set_num_threads(1)
    corpus, training, references = SMALL[name]
    recipe = ROOT / "archive" / name / "recipe.yaml"
    definition = Definition.read(ROOT / "archive" / name)
    corpus, training = read_recipe(recipe, "corpus") | corpus, read_recipe(recipe, "training") | training
    write_corpus(out=folder / "corpus", **corpus)
    rows = read_manifest(folder / "corpus" / "manifest.csv", folder / "corpus", definition.classes)
    cpu = torch.device("cpu")
    checkpoint = fit(rows, definition, config_of(training), folder / "run", cache_dir=folder / "cache", device=cpu)
    evaluate(definition, checkpoint, folder / "run" / "best.pth", rows, "test", folder / "evaluation", cpu, references)
    shutil.rmtree(folder / "cache")
    print(json.dumps({"name": name, "epoch": checkpoint["epoch"]}))


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
