"""A process that reads hostile files for the tests, so that a crash or a flood of memory ends it and not the tests.

`python -m tests.reading_process` takes lines `{"target": ..., "path": ...}` and answers each with what reading gave: a value,
one of the documented errors, or a fault. While it reads, nothing may be started, connected to, deleted or written outside
of its temporary folder, and it has 1.5 GiB of address space beyond what it had before, and a minute.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.demonstration import ROOT

MORE_BYTES = 3 * 2**29
LONGEST_S = 60
_ACTS = (
    *("os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.putenv", "os.spawn", "os.system", "pty.spawn"),
    *("os.chmod", "os.link", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate", "shutil.rmtree"),
    *("socket.bind", "socket.connect", "subprocess.Popen", "urllib.Request"),
)


class Acted(BaseException):
    """Reading did something to the world. No `except Exception` catches it."""


@dataclass
class Guard:
    watching: bool = False
    scratch: str = ""

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.watching:
            return
        # Of a folder that is removed as a whole, files go by their names in it: what counts is the folder.
        in_folder = event in ("os.remove", "os.rmdir") and arguments[1] >= 0
        inside = in_folder or (bool(arguments) and str(arguments[0]).startswith(self.scratch))
        if event in _ACTS and not inside:
            raise Acted(f"{event} {arguments!r:.200}")
        if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+") and not inside:
            raise Acted(f"{event} {arguments!r:.200}")

    @contextmanager
    def on(self) -> Iterator[None]:
        self.watching = True
        try:
            yield
        finally:
            self.watching = False


@dataclass(frozen=True)
class Target:
    """What reads a file, and the errors by which it may refuse one."""

    read: Callable[[Path], Any]
    refusals: tuple[type[Exception], ...]


def targets() -> dict[str, Target]:
    """By name. Imported here, because the tests need the names alone."""
    import torch

    from skewless.core.definition import Definition, read_model
    from skewless.core.errors import DefinitionError
    from skewless.core.networks.exported import ExportedNetwork
    from skewless.core.networks.pt2 import ExportedError
    from skewless.core.pipeline import Pipeline
    from skewless.core.runtimes.eager import EagerRuntime
    from skewless.core.runtimes.runtime import DEFAULTS
    from skewless.core.stages import InputError, Payload, PipelineError, Signal
    from skewless.core.stages.decode import Decode
    from skewless.core.stages.image import DecodeImage
    from skewless.errors import UsageError
    from skewless.importers.errors import ImportFileError
    from skewless.importers.evidence import read_predictions
    from skewless.importers.formats import format_of
    from skewless.importers.keras_file import read_keras
    from skewless.importers.pytorch import read_pytorch
    from skewless.scoring.files import ListError, list_files
    from skewless.scoring.run import Mar
    from skewless.torchserve import launch
    from skewless.torchserve.archive import NAME, name_and_version
    from skewless.torchserve.smoke import References
    from skewless.torchserve.store import as_table, listing
    from skewless.training.checkpoint import CheckpointError, load_checkpoint, network_of, trained
    from skewless.training.manifest import ManifestError, read_manifest
    from skewless.training.recipe import read_recipe
    from tests.hostile import KERAS_NETWORK, LINEAR

    def decode(path: Path) -> Any:
        signal = Decode()(Signal(Payload(path.read_bytes(), max_duration_s=60.0)))
        assert signal.data.dtype == torch.float32 and signal.data.ndim == 2 and signal.data.isfinite().all()
        assert signal.rate > 0 and signal.metadata["num_samples"] == signal.data.shape[1] > 0
        return tuple(signal.data.shape)

    def decode_image(path: Path) -> Any:
        stage = DecodeImage(background=(255, 255, 255), min_side=1)
        levels = stage(Signal(Payload(path.read_bytes(), max_pixels=1_000_000))).data
        assert levels.shape[:2] == (1, 3) and float(levels.min()) >= 0 and float(levels.max()) <= 255
        return tuple(levels.shape)

    def pytorch(path: Path) -> Any:
        file = read_pytorch(path)
        assert file.weights and all(isinstance(value, torch.Tensor) for value in file.weights.values())
        return sorted(file.weights)

    def checkpoint(path: Path) -> Any:
        content = load_checkpoint(path)
        definition = Definition.read(ROOT / "archive" / "talent")
        return network_of(content, trained(definition, content)).state_dict().keys()

    def weights(path: Path) -> Any:
        return EagerRuntime.load(path.parent, LINEAR, torch.device("cpu"), DEFAULTS)

    def mar(path: Path) -> Any:
        name, version = name_and_version(path)
        assert NAME.fullmatch(name) and NAME.fullmatch(version)
        return name, version

    def store(path: Path) -> Any:
        return as_table(listing(path.parent))

    def manifest(path: Path) -> Any:
        return read_manifest(path, path.parent)

    def properties(path: Path) -> Any:
        return launch.with_ports(launch.read_properties(path), None)

    return {
        "decode": Target(decode, (InputError,)),
        "decode_image": Target(decode_image, (InputError,)),
        "pytorch": Target(pytorch, (ImportFileError,)),
        "format": Target(format_of, (ImportFileError,)),
        "keras": Target(lambda path: read_keras(path, KERAS_NETWORK()).notes, (ImportFileError,)),
        "pt2": Target(lambda path: ExportedNetwork.from_file(path).output_names, (ExportedError,)),
        "safetensors": Target(weights, (ValueError,)),
        "checkpoint": Target(checkpoint, (CheckpointError, DefinitionError)),
        "archive": Target(mar, (UsageError,)),
        "store": Target(store, ()),
        "references": Target(lambda path: len(References.from_archive(path).payloads), (UsageError,)),
        "scored_archive": Target(lambda path: Mar.read(path).version, (UsageError,)),
        "manifest": Target(manifest, (ManifestError,)),
        "predictions": Target(read_predictions, (ImportFileError,)),
        "list": Target(lambda path: list(list_files(path, None, path.parent / "out")), (ListError,)),
        "pipeline": Target(Pipeline.from_yaml, (PipelineError,)),
        "model": Target(read_model, (DefinitionError,)),
        "recipe": Target(lambda path: read_recipe(path, "training"), (ValueError,)),
        "properties": Target(properties, (UsageError,)),
    }


def outcome(target: Target, path: Path, guard: Guard) -> dict[str, str]:
    """`kind` is "value", "refusal" or "fault"; `text` is the error's message, or a fault's traceback."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            with guard.on():
                value = target.read(path)
            found = {"kind": "value", "text": f"{value!r:.500}"}
        except target.refusals as error:
            found = {"kind": "refusal", "text": str(error)}
        except BaseException:
            found = {"kind": "fault", "text": traceback.format_exc()}
    if found["kind"] == "refusal" and (not found["text"].strip() or _unprintable(found["text"])):
        return {"kind": "fault", "text": f"a message that cannot be shown: {found['text']!a}"}
    # Of code, such as a file that stays open or a number that overflows; a UserWarning is about the file.
    if of_code := [each for each in warned if not issubclass(each.category, UserWarning)]:
        return {"kind": "fault", "text": f"a warning: {of_code[0].message!a} from {of_code[0].filename}"}
    return found


def _unprintable(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def main() -> None:
    guard, known = Guard(), targets()
    sys.addaudithook(guard)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    with tempfile.TemporaryDirectory() as scratch:
        tempfile.tempdir = guard.scratch = scratch
        for line in sys.stdin:
            asked = json.loads(line)
            if asked["target"] == "limit":
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                most = pages * resource.getpagesize() + MORE_BYTES
                resource.setrlimit(resource.RLIMIT_AS, (most, most))
                answer = {"kind": "value", "text": f"{most:,} bytes"}
            else:
                # Of the processor's time: a few kilobytes that take a minute have no end.
                used = resource.getrusage(resource.RUSAGE_SELF)
                until = int(used.ru_utime + used.ru_stime) + LONGEST_S
                resource.setrlimit(resource.RLIMIT_CPU, (until, resource.RLIM_INFINITY))
                answer = outcome(known[asked["target"]], Path(asked["path"]), guard)
            print(json.dumps(answer), file=answers, flush=True)


class Reader:
    """The process, from the tests' side. Started anew after it has died."""

    def __init__(self, warm_up: dict[str, Path]):
        self._warm_up = warm_up
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, target: str, path: Path) -> dict[str, str]:
        if self._process is None:
            self._start()
        answer = self._ask(target, str(path))
        return answer or {"kind": "fault", "text": f"the process that read {path.name} died, see its standard error"}

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "MALLOC_ARENA_MAX": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.reading_process"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        # Before the limit: what is loaded once, of code and of libraries, is no part of what a file costs.
        for target, path in self._warm_up.items():
            answer = self._ask(target, str(path))
            assert answer and answer["kind"] == "value", (target, answer)
        assert self._ask("limit", "")

    def _ask(self, target: str, path: str) -> dict[str, str] | None:
        assert self._process and self._process.stdin and self._process.stdout
        try:
            print(json.dumps({"target": target, "path": path}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._process.wait()
            self._process = None
            return None
        return json.loads(line)


if __name__ == "__main__":
    main()
