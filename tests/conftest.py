"""What the slow tests share: small trained models, packaged, and a TorchServe that serves them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from skewless.torchserve.client import Client
from skewless.torchserve.server import Server

ROOT = Path(__file__).resolve().parents[1]


def run_script(
    name: str, *arguments: object, check: bool = True, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run scripts/NAME.py as a user would, from the repository's root."""
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *map(str, arguments)]
    env = {**os.environ, **(environment or {})}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=env)
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result


@dataclass(frozen=True)
class Demonstration:
    """The files of one small run of the whole chain."""

    name: str
    corpus: Path
    run: Path
    evaluation: Path
    store: Path

    @property
    def manifest(self) -> Path:
        return self.corpus / "manifest.csv"

    @property
    def checkpoint(self) -> Path:
        return self.run / "best.pth"

    @property
    def archive(self) -> Path:
        return self.store / f"{self.name}-1.0.mar"


def demonstrate(
    name: str, root: Path, store: Path, corpus: tuple, training: tuple, references: int, **environment: str
) -> Demonstration:
    """Corpus, training, evaluation and archive, by the scripts."""
    run = partial(run_script, environment=environment)
    made = Demonstration(name, root / "corpus", root / "run", root / "evaluation", store)
    definition = ("--archive", f"archive/{name}")
    run("make_corpus", "--out", made.corpus, *corpus)
    run_script(
        "train", *definition, "--manifest", made.manifest, "--out", made.run, "--cache", root / "cache", *training
    )
    run(
        "evaluate",
        "--checkpoint",
        made.checkpoint,
        "--manifest",
        made.manifest,
        "--out",
        made.evaluation,
        "--references",
        references,
    )
    build = ("--checkpoint", made.checkpoint, "--evaluation", made.evaluation, "--out", made.store)
    run("build_archive", *definition, *build, "--version", "1.0")
    return made


@pytest.fixture(scope="session")
def demonstration(tmp_path_factory: pytest.TempPathFactory) -> Demonstration:
    """A small cough detector."""
    root = tmp_path_factory.mktemp("demonstration")
    training = ("--epochs", 3, "--learning-rate", 1e-3)
    return demonstrate("cough", root, root / "store", ("--clips", 40), training, references=8)


# Each by its own recipe, only smaller.
OTHERS = {
    "orca": (("--count", 72), ("--epochs", 3, "--batch-size", 4)),
    "talent": (("--count", 72), ()),
    "portrait": (("--count", 54), ()),
}


@pytest.fixture(scope="session")
def others(
    demonstration: Demonstration, server: Server, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Demonstration]:
    """The other archives, by name, registered with the same server."""

    def make(name: str) -> Demonstration:
        corpus, training = OTHERS[name]
        recipe = ("--recipe", f"archive/{name}/recipe.yaml")
        return demonstrate(
            *(name, tmp_path_factory.mktemp(name), demonstration.store, (*recipe, *corpus), (*recipe, *training)),
            references=4,
            OMP_NUM_THREADS="1",
        )

    # Two at a time, each with a thread of its own: so both cores are busy, and neither waits for the other.
    with ThreadPoolExecutor(2) as pool:
        made = dict(zip(OTHERS, pool.map(make, OTHERS), strict=True))
    for one in made.values():
        run_script("register", one.archive, "--default", "--state-dir", server.state_dir)
    return made


@pytest.fixture(scope="session")
def server(demonstration: Demonstration, tmp_path_factory: pytest.TempPathFactory):
    """A TorchServe on free ports that serves the demonstration as the default version of `cough`."""
    state_dir = tmp_path_factory.mktemp("server")
    running = Server.start(demonstration.store, state_dir, ports="free")
    try:
        run_script("register", demonstration.archive, "--default", "--state-dir", state_dir)
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="session")
def client(server: Server):
    with Client(server) as connected:
        yield connected
