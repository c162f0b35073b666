"""Candidates for the pipeline of the old service, and what the weights answer behind each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
from tqdm import tqdm

from skewless.adoption.recorded import Recorded, part_name
from skewless.core.align import align, definition_name
from skewless.core.files import atomic
from skewless.core.numerics import all_finite
from skewless.core.pipeline import Pipeline
from skewless.core.service import ModelService
from skewless.core.stages import InputError, PipelineError, Stage
from skewless.core.stages.pcm import Pcm
from skewless.evaluation.scores import score_columns
from skewless.training.checkpoint import file_digest
from skewless.training.manifest import Recording

# Fields of an answer that say what was asked for, and not what was found.
_ASKED = {
    *("threshold_used", "window_threshold", "min_positive_seconds", "min_positive_windows"),
    *("width", "height", "duration_s", "analyzed_s"),
}


@dataclass(frozen=True)
class Candidate:
    """A pipeline that may be the old service's.

    name: for people, such as "variants/no_highpass.yaml" or that with an edit. file: it is read from, None for one that an
    edit made.
    """

    name: str
    pipeline: Pipeline
    file: Path | None = None

    @property
    def servable(self) -> bool:
        return not self.pipeline.comparison_only


@dataclass(frozen=True)
class Trial:
    """What the weights answer behind one candidate.

    answers: by file, numbers by name. failure: why it could not be run; there are no answers then.
    """

    candidate: Candidate
    answers: Mapping[str, Mapping[str, float]]
    failure: str = ""

    def gap(self, recorded: Recorded) -> Gap | None:
        """How far the answers are from the record, on the files that were run; None for a trial that failed."""
        if self.failure:
            return None
        total, count, largest, within, same, missing, worst = 0.0, 0, 0.0, True, True, 0, ""
        for file, answer in self.answers.items():
            for name, value in recorded.values.get(file, {}).items():
                field = recorded.field(name)
                if name in answer:
                    apart = abs(answer[name] - value)
                    within &= apart <= field.allowed
                    same &= apart <= field.noise
                    share = apart / field.scale
                else:
                    missing, share = missing + 1, 1.0
                total, count = total + share, count + 1
                if share > largest:
                    largest, worst = share, file
        if not count:
            return None
        return Gap(total / count, largest, within and not missing, same and not missing, missing, count, worst)


@dataclass(frozen=True)
class Gap:
    """mean, largest: of the differences to the record, as shares of each quantity's scale. reproduced: every one is within
    what is allowed; same: within what one computation leaves. missing: recorded numbers that the answers do not have, such
    as of a window that is not cut; each counts as a difference of 1. compared: how many numbers. worst: the file with the largest difference."""

    mean: float
    largest: float
    reproduced: bool
    same: bool
    missing: int
    compared: int
    worst: str


class Laboratory:
    """Runs candidates behind one service's network, and keeps what they answered in a folder, to go on from there."""

    def __init__(self, service: ModelService, threshold: float, folder: Path, key: str):
        """key: what the answers depend on beside the pipeline and the files, such as the digest of the weights."""
        self.service, self.threshold = service, threshold
        self._folder, self._key = folder, key
        self._digests: dict[Path, str] = {}

    def run(self, candidate: Candidate, rows: Sequence[Recording], label: str) -> Trial:
        """Answers for every file, with a progress bar. What was kept of an earlier run is not computed again.

        A file that this pipeline cannot read, and numbers that the network does not take, end the trial as a failure.
        """
        pipeline = candidate.pipeline.with_fitted_stages_of(self.service.pipeline)
        if pipeline.unfitted:
            lacks = f"its stage {', '.join(pipeline.unfitted)} lacks the training set's statistics"
            return Trial(candidate, {}, f"{lacks}; give scikit-learn's StandardScaler as --scaler")
        kept = self._kept(pipeline)
        missing = [row for row in rows if self._digest(row.path) not in kept]
        failure = ""
        try:
            # A bar that ends at once would only push the others off the screen.
            for row in tqdm(missing, desc=label, unit="file", leave=False, disable=not missing):
                kept[self._digest(row.path)] = self._answer(pipeline, row.path.read_bytes())
        except (InputError, PipelineError) as error:
            failure = f"{row.file_path}: {str(error).splitlines()[0]}"
        finally:
            if missing:
                self._keep(pipeline, kept)
        if failure:
            return Trial(candidate, {}, failure)
        return Trial(candidate, {row.file_path: kept[self._digest(row.path)] for row in rows})

    def names(self, rows: Sequence[Recording], candidates: Iterable[Candidate]) -> set[str]:
        """The names of the numbers in an answer, by the first candidate that answers the first file.

        Raises PipelineError, with each one's reason, where none does.
        """
        failures = []
        for candidate in candidates:
            trial = self.run(candidate, rows[:1], candidate.name)
            if not trial.failure:
                (answer,) = trial.answers.values()
                return set(answer)
            failures.append(f"  {candidate.name}: {trial.failure}")
        raise PipelineError("none of the pipelines gives what the network takes:\n" + "\n".join(failures))

    def _answer(self, pipeline: Pipeline, payload: bytes) -> dict[str, float]:
        postprocessor = self.service.postprocessor
        try:
            signal = pipeline.run(payload, **self.service.input_limits)
            if not all_finite(signal.data):
                raise InputError("the network's input has values that are NaN or infinite")
            postprocessor.require_windows(len(signal.data))
            (outputs,) = self.service.runtime([signal.data])
            body = postprocessor(outputs, signal.metadata, self.threshold)
            scores = postprocessor.scores(outputs)
            parts = postprocessor.parts(outputs, signal.metadata)
        except (InputError, PipelineError):
            raise
        # Stages in an order that nobody meant fail in any way, and so does a network behind them.
        except Exception as error:
            raise PipelineError(f"it does not give what the network takes: {error}") from error
        if not all(map(all_finite, outputs.values())):
            raise PipelineError("the network gives values that are NaN or infinite for what the pipeline gives")
        numbers = {n: float(v) for n, v in body.items() if type(v) in (int, float) and n not in _ASKED}
        for name, score in zip(score_columns(postprocessor.classes), scores, strict=True):
            numbers.setdefault(name, float(score))
        return numbers | {part_name(part.start_s): float(part.probability) for part in parts}

    def _digest(self, path: Path) -> str:
        """What a file's answers are kept under: another file of the same name is another file."""
        if path not in self._digests:
            self._digests[path] = file_digest(path)
        return self._digests[path]

    def _file(self, pipeline: Pipeline) -> Path:
        return self._folder / f"{pipeline.fingerprint[:16]}.json"

    def _kept(self, pipeline: Pipeline) -> dict[str, dict[str, float]]:
        try:
            kept = json.loads(self._file(pipeline).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return kept["answers"] if (kept["fingerprint"], kept["key"]) == (pipeline.fingerprint, self._key) else {}

    def _keep(self, pipeline: Pipeline, answers: Mapping[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        content = {"fingerprint": pipeline.fingerprint, "key": self._key, "answers": answers}
        with atomic(self._file(pipeline)) as unfinished:
            unfinished.write_text(json.dumps(content), encoding="utf-8")


def distinct(candidates: Iterable[Candidate], known: Iterable[Candidate] = ()) -> list[Candidate]:
    """The candidates, each definition once, without those that are `known`."""
    seen = {each.pipeline.fingerprint for each in known}
    found = []
    for each in candidates:
        if each.pipeline.fingerprint not in seen:
            seen.add(each.pipeline.fingerprint)
            found.append(each)
    return found


def single_edits(base: Candidate, others: Iterable[Candidate], folder: Path) -> Iterator[Candidate]:
    """`base` with one thing changed: every single edit on the way to each of the `others`, as the skew report lists them;
    every other word that a parameter takes, such as another resampling method; samples rounded to 16 bits after a step, as in a
    file; and every stage left out.

    folder: the archive's, for stages of its own code. What cannot be built is left out.
    """
    for other in others:
        alignment = align(base.pipeline, other.pipeline)
        for number, change in enumerate(alignment.edits):
            yield from _built(base, str(change), alignment.stages(frozenset({number})), folder)
    stages = base.pipeline.stages
    for key, stage in stages.items():
        for name, value in _other_words(stage):
            params = {**stage.params(), name: value}
            yield from _changed(base, f"{key}: {name} {getattr(stage, name)} → {value}", key, params, folder)
    listed = list(stages.values())
    for at, (key, stage) in enumerate(stages.items(), start=1):
        # What a file between two steps leaves: a cache, an upload, another program.
        if stage.unit == "full scale" and not isinstance(stage, Pcm):
            for rounding in get_args(get_type_hints(Pcm)["rounding"]):
                edit = f"pcm of 16 bits ({rounding}) inserted after {key}"
                yield from _built(base, edit, [*listed[:at], Pcm(16, rounding), *listed[at:]], folder)
    for key in list(stages)[1:]:
        yield from _built(base, f"{key} removed", [s for k, s in stages.items() if k != key], folder)


def servable_edits(base: Candidate, others: Iterable[Candidate], folder: Path) -> Iterator[Candidate]:
    """`base` without its stages that no archive carries: each replaced or left out on the way to one of the `others`, alone or
    together with one more edit of that way, as a decoder that mixes channels itself needs a `downmix` in its place."""
    for other in others:
        alignment = align(base.pipeline, other.pipeline)
        numbers = range(len(alignment.edits))
        foreign = frozenset(
            row.edit
            for row in alignment.rows
            if row.edit is not None and row.reference and row.reference[1].comparison_only
        )
        for more in [foreign, *(foreign | {number} for number in numbers if number not in foreign)]:
            edit = ", ".join(str(alignment.edits[number]) for number in sorted(more))
            yield from (c for c in _built(base, edit, alignment.stages(more), folder) if c.servable)


def _other_words(stage: Stage) -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(type(stage))
    for field in fields(stage):
        hint, value = hints[field.name], getattr(stage, field.name)
        if get_origin(hint) is Literal:
            yield from ((field.name, word) for word in get_args(hint) if word != value)
        elif hint is bool:
            yield field.name, not value


def _built(base: Candidate, edit: str, stages: Iterable[Stage], folder: Path) -> Iterator[Candidate]:
    yield from _parsed(base, edit, [{definition_name(stage): stage.params()} for stage in stages], folder)


def _changed(base: Candidate, edit: str, key: str, params: Mapping[str, Any], folder: Path) -> Iterator[Candidate]:
    listed = [{definition_name(s): params if k == key else s.params()} for k, s in base.pipeline.stages.items()]
    yield from _parsed(base, edit, listed, folder)


def _parsed(base: Candidate, edit: str, stages: list[dict[str, Any]], folder: Path) -> Iterator[Candidate]:
    name = base.pipeline.name
    try:
        yield Candidate(f"{base.name}, {edit}", Pipeline.from_dict({"name": name, "stages": stages}, folder))
    except PipelineError:
        # A word that does not go with the stage's other parameters: no pipeline, so no candidate.
        return


def closest(trials: Iterable[Trial], recorded: Recorded) -> list[tuple[Gap, Trial]]:
    """The trials that ran, the one closest to the record first; of equals, in their order."""
    found = [(gap, trial) for trial in trials if (gap := trial.gap(recorded)) is not None]
    return sorted(found, key=lambda each: (not each[0].reproduced, each[0].mean))


def spread(rows: Sequence[Recording], recorded: Recorded, count: int) -> list[Recording]:
    """At most `count` recorded files whose first recorded numbers are evenly spread from the lowest to the highest."""
    have = sorted(
        (row for row in rows if row.file_path in recorded.values),
        key=lambda row: next(iter(recorded.values[row.file_path].values())),
    )
    places = np.linspace(0, len(have) - 1, min(count, len(have))).round().astype(int)
    return [have[place] for place in dict.fromkeys(places.tolist())]
