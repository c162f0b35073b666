"""A pipeline is data: an ordered list of named stages, from encoded bytes to the network's input."""

from __future__ import annotations

import hashlib
import json
import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

import torch
import yaml

from skewless.core.align import align, changed_parameters, definition_name
from skewless.core.errors import DefinitionError
from skewless.core.own_code import OwnCode, file_of
from skewless.core.stages import STAGES, InputLimits, Payload, PipelineError, Signal, Stage
from skewless.core.stages.fused import Step, plan
from skewless.core.yaml_file import read_yaml


@dataclass(frozen=True)
class Difference:
    """One way in which two pipelines differ. `parameter` is empty when the whole stage is missing on one side."""

    stage: str
    parameter: str
    ours: Any
    theirs: Any

    def __str__(self) -> str:
        if not self.parameter:
            return f"{self.stage}: {'missing here' if self.ours is None else 'missing there'}"
        return f"{self.stage}.{self.parameter}: {self.ours!r} here, {self.theirs!r} there"


class Pipeline:
    """Named stages, run in order.

    The same object serves training, evaluation, packaging and serving. `fingerprint` identifies the stage list with
    every parameter spelt out, and the source of stages of the folder's own: equal fingerprints mean equal definitions,
    however the files were written.

    code: SHA-256 of the Python files that the folder's own stages are in, by name; empty where all stages are ours.
    """

    def __init__(self, name: str, stages: list[Stage], code: Mapping[str, str] | None = None):
        if not stages:
            raise PipelineError(f"pipeline '{name}' has no stages")
        self.name = name
        self.code = dict(code or {})
        self.stages: dict[str, Stage] = {}
        for stage in stages:
            # A stage used twice is told apart by its position among its namesakes: "scale", "scale_2".
            uses = sum(s.name == stage.name for s in self.stages.values())
            self.stages[f"{stage.name}_{uses + 1}" if uses else stage.name] = stage

    @classmethod
    def from_yaml(cls, path: str | Path, folder: str | Path | None = None) -> Pipeline:
        """Read a pipeline file; raises PipelineError naming the file, the stage and the parameter that is wrong.

        folder: where Python files with stages of one's own are; the file's own folder, or for a file in `variants/` the
            one above.
        """
        path = Path(path)
        if folder is None:
            folder = path.resolve().parent
            folder = folder.parent if folder.name == "variants" else folder
        try:
            return cls.from_dict(read_yaml(path), folder)
        except DefinitionError as error:
            raise PipelineError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, definition: Any, folder: str | Path | None = None) -> Pipeline:
        """`{"name": ..., "stages": [{stage: {parameter: value}}, ...]}`, as `to_dict` writes it.

        Raises PipelineError for a definition that is wrong, and for one whose `code` is not that of the folder.
        """
        if not isinstance(definition, Mapping) or set(definition) - {"code"} != {"name", "stages"}:
            raise PipelineError("a pipeline has exactly two keys: 'name' and 'stages'")
        if not isinstance(definition["stages"], list):
            raise PipelineError("'stages' must be a list of 'name: {parameters}'")
        code = None if folder is None else OwnCode(folder)
        stages: list[Stage] = []
        files: set[str] = set()
        try:
            for item in definition["stages"]:
                name, params = STAGES.split(item)
                stages.append(STAGES.find(name, code).from_params(params))
                if (file := file_of(name)) is not None:
                    files.add(file)
            digests = code.digests(files) if code and files else {}
        except PipelineError:
            raise
        except DefinitionError as error:
            raise PipelineError(str(error)) from error
        recorded = definition.get("code", digests)
        if not isinstance(recorded, Mapping):
            raise PipelineError(f"'code' is {recorded!r}, expected the SHA-256 of each Python file by name")
        if changed := [each for each in {**digests, **recorded} if digests.get(each) != recorded.get(each)]:
            raise PipelineError(
                f"{', '.join(sorted(map(str, changed)))} in the folder is not the code that this pipeline was written with; put the "
                "file back, or train again with the new one"
            )
        return cls(str(definition["name"]), stages, digests)

    def to_dict(self) -> dict[str, Any]:
        """The normalised definition: every parameter of every stage, in plain YAML types, and the digests of own code."""
        stages = [{definition_name(s): s.params()} for s in self.stages.values()]
        return {"name": self.name, **({"code": dict(self.code)} if self.code else {}), "stages": stages}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=110)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the normalised stage list and its own code, 64 hex digits. The pipeline's name is not part of it."""
        return fingerprint_of(self.to_dict())

    @property
    def packages(self) -> set[str]:
        """The packages that compute the network's input, as pip names them."""
        return {package for stage in self.stages.values() for package in stage.packages}

    def __call__(self, payload: bytes) -> torch.Tensor:
        """The network's input for one encoded recording or image, e.g. `(segments, 3, 224, 224)` float32.

        Raises InputError for an input that cannot be turned into numbers.
        """
        return self.run(payload).data

    def run(self, payload: bytes, *, whole: bool = False, **limits: Unpack[InputLimits]) -> Signal:
        """As calling the pipeline, with the metadata about the input beside the tensor. It runs `plan`.

        limits: `max_duration_s`, `max_pixels` and the others, as Payload has them.
        whole: keep every decoded sample instead of only the head that can reach the output, and run the plain stages. The
        result is the same; memory then grows with the recording. It is what the fast path is tested against.
        """
        if whole:
            return deque(self.steps(payload, whole=True, **limits), maxlen=1).pop()[1]
        given = Payload(payload, self.head_s, **limits)
        signal = Signal(given)
        with torch.no_grad():
            for step in self.plan:
                signal = step(signal)
                given.check()
        return signal

    def trace(self, payload: bytes, *, whole: bool = False) -> dict[str, torch.Tensor]:
        """Every stage's output by stage name, in order."""
        return {name: signal.data for name, signal in self.steps(payload, whole=whole)}

    def steps(
        self, payload: bytes, *, whole: bool = False, **limits: Unpack[InputLimits]
    ) -> Iterator[tuple[str, Signal]]:
        """Run stage by stage, yielding `(stage name, signal)`."""
        head_s = (lambda rate: math.inf) if whole else self.head_s
        yield from self.resume(Signal(Payload(payload, head_s, **limits)))

    def resume(self, signal: Signal) -> Iterator[tuple[str, Signal]]:
        """Run all stages on a signal, such as the one a `split` pipeline's first part gave."""
        for name, stage in self.stages.items():
            # Not around the yield: the caller would go on without gradients, for good if it stops half-way.
            with torch.no_grad():
                signal = stage(signal)
            yield name, signal

    def head_s(self, rate: int) -> float:
        """Seconds from the start of a recording at `rate` Hz that determine the output; `math.inf`: all of it."""
        seconds = math.inf
        for stage in reversed(self.stages.values()):
            seconds = stage.needs(seconds, rate)
        return seconds

    @cached_property
    def plan(self) -> list[Step]:
        """The stages as `run` runs them: neighbours that can be computed together are one step, with the same result."""
        return plan(list(self.stages.values()))

    @property
    def reads(self) -> str:
        """What the pipeline starts from: "audio" or "image"."""
        return next(iter(self.stages.values())).reads

    @property
    def last_stage(self) -> str:
        """The name of the stage whose result the network takes."""
        return next(reversed(self.stages))

    @property
    def unfitted(self) -> list[str]:
        """The stages that lack what training takes from its recordings, such as a scaler's statistics."""
        return [name for name, stage in self.stages.items() if not stage.fitted]

    @property
    def comparison_only(self) -> list[str]:
        """The stages that imitate another system's fault, to measure it, and that no archive carries."""
        return [stage.name for stage in self.stages.values() if stage.comparison_only]

    def replace(self, **stages: Stage) -> Pipeline:
        """The same pipeline with other stages under these names."""
        return Pipeline(self.name, [stages.get(name, stage) for name, stage in self.stages.items()], self.code)

    def with_fitted_stages_of(self, trained: Pipeline) -> Pipeline:
        """The same pipeline, with what training has fitted: where a stage here lacks its statistics, `trained`'s stage of
        that name takes its place. So a `standard_scaler: {}` gets the mean and the deviation of a checkpoint's."""
        found = {name: trained.stages[name] for name in self.unfitted if name in trained.stages}
        return self.replace(**{name: stage for name, stage in found.items() if stage.name == self.stages[name].name})

    def split(self, before: str) -> tuple[Pipeline, Pipeline]:
        """Two pipelines, the second starting with stage `before`; raises PipelineError when there is no such stage."""
        names = list(self.stages)
        if before not in names or names.index(before) == 0:
            raise PipelineError(f"pipeline '{self.name}' cannot be split before '{before}'; it has: {', '.join(names)}")
        stages, at = list(self.stages.values()), names.index(before)
        return Pipeline(self.name, stages[:at], self.code), Pipeline(self.name, stages[at:], self.code)

    def diff(self, other: Pipeline) -> list[Difference]:
        """Where this pipeline ("here") and another ("there") differ: stages missing on one side, parameters, and own code.

        Stages are aligned in order, so a moved stage shows as missing in one place on each side. Empty exactly when
        the fingerprints are equal.
        """
        found = []
        for row in align(self, other).rows:
            a, b = (side and side[1] for side in (row.reference, row.candidate))
            if a and b and definition_name(a) == definition_name(b):
                found += [Difference(a.name, name, *pair) for name, pair in changed_parameters(a, b).items()]
            else:
                found += [Difference(a.name, "", a.params(), None)] if a else []
                found += [Difference(b.name, "", None, b.params())] if b else []
        for file in sorted({*self.code, *other.code}):
            if self.code.get(file) != other.code.get(file):
                found.append(Difference("code", file, self.code.get(file), other.code.get(file)))
        return found


def fingerprint_of(definition: Mapping[str, Any]) -> str:
    """The fingerprint of a normalised definition, as `Pipeline.to_dict` gives it, without building the pipeline."""
    parts = [definition["stages"], definition["code"]] if definition.get("code") else definition["stages"]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
