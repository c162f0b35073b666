"""One bad file never hurts its batch, and a number that is none passes no gate."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks import load
from handler.entry import SkewlessHandler
from skewless.core import load_error
from skewless.core.cascade import Cascade
from skewless.core.definition import Definition
from skewless.core.networks.keras_resnet50 import KerasResNet50
from skewless.core.pipeline import Pipeline
from skewless.core.postprocess import build_postprocessor
from skewless.core.request import BatchRequest, Request, RequestError
from skewless.core.selftest import SelfTestError
from skewless.core.selftest import record as selftest_record
from skewless.core.selftest.compare import StageDiffersError, compare_stages
from skewless.core.selftest.record import kind, summary
from skewless.core.selftest.replay import _Replay
from skewless.core.service import ModelService, Prepared, Response
from skewless.core.stages import InputError, PipelineError, Signal, Stage
from skewless.core.stages.decode import LARGEST_LEVEL, Decode
from skewless.core.stages.waveform import Downmix
from skewless.errors import BuildError, UsageError
from skewless.evaluation.metrics import auc, best_threshold, measure_classes, measure_two_classes
from skewless.evaluation.scores import Prediction
from skewless.importers import evidence, inflated, keras_file
from skewless.importers.errors import ImportFileError
from skewless.importers.formats import format_of
from skewless.importers.keras_file import read_keras
from skewless.importers.pytorch import read_pytorch
from skewless.packaging.probes import try_probes
from skewless.packaging.references import check_spread, stage_references
from skewless.skew.measure import Comparator
from skewless.torchserve import smoke
from skewless.training.config import Config
from skewless.training.fit import _check_together, fit
from skewless.training.manifest import ManifestError, Recording, read_manifest, select
from skewless.tuning.run import Candidate, _measure
from skewless.tuning.worker import Done, Task
from tests.conftest import ROOT, call_skewless
from tests.recordings import one_thread, wav  # noqa: F401

CPU = torch.device("cpu")
NAN, INF = math.nan, math.inf

LABEL = {"label_threshold": {"threshold": 0.5, "classes": ["quiet", "loud"], "positive_field": "loud"}}
THREE = {"class_probabilities": {"classes": ["a", "b", "c"], "threshold": 0.5}}


# --- a service whose parts fail when they are told to

BAD = 2.0  # the peak of the file that something fails on


def tone(level: float) -> bytes:
    """A short recording with this peak."""
    samples = 0.1 * np.sin(np.arange(2000) / 5)
    samples[1000] = level
    return wav(samples[None], 8000, "FLOAT")


FILES = [tone(level) for level in (0.25, 0.5, BAD, 0.75)]
REQUESTS = [Request(data) for data in FILES]


@dataclass(frozen=True)
class Fails(Stage, name="fails"):
    """Passes a recording on, but for one with the peak BAD, of which it does what it is told."""

    how: str = ""

    def __call__(self, signal: Signal) -> Signal:
        if signal.metadata["peak"] != BAD:
            return signal
        if self.how == "raises":
            raise RuntimeError("a fault of the stage")
        if self.how == "own memory":
            raise MemoryError
        if self.how == "torch's memory":
            torch.empty(2**47, dtype=torch.uint8)
        return signal.of(signal.data * {"gives NaN": NAN, "gives infinity": INF}.get(self.how, 1.0))


class Network:
    """A runtime that gives each recording's peak as its probability, but 1.0 for the one with the peak BAD.

    on_bad: what happens to a batch with that one. calls: how many recordings there were in each call.
    """

    precision, tolerance, rows_at_once = "fp32", 1e-4, 100
    device = CPU

    def __init__(self, name: str = "eager", tier: str = "exact", on_bad: Callable[[], float] = lambda: 1.0):
        self.name, self.tier, self._on_bad = name, tier, on_bad
        self.calls: list[int] = []

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        self.calls.append(len(inputs))
        peaks = [float(rows.abs().max()) for rows in inputs]
        return [{"probability": torch.tensor(self._on_bad() if peak == BAD else peak)} for peak in peaks]


def raises() -> float:
    raise RuntimeError("a fault of the network")


def out_of_memory() -> float:
    raise MemoryError


def service_of(network: Any, how: str = "", cascade: Cascade | None = None) -> ModelService:
    pipeline = Pipeline("short", [Decode(), Downmix(), Fails(how)])
    cough = Definition.read(ROOT / "archive" / "cough")
    definition = replace(cough, pipeline=pipeline, runtime={"eager": {}}, postprocess=LABEL)
    return ModelService(definition, network, {"model_version": "1", "threshold": 0.6}, cascade=cascade)


def answers(
    service: ModelService, requests: Sequence[Request | BatchRequest | RequestError] = REQUESTS
) -> list[Response]:
    """What is answered, once it is known that the others get what they get alone, and that JSON holds it all."""
    given = service.predict(requests)
    for response in given:
        json.dumps(response.body, allow_nan=False)
    if requests is REQUESTS:
        usual = service_of(Network()).predict(REQUESTS)
        assert [r.status for r in usual] == [200] * 4
        others = [0, 1, 3]
        scores = [(given[k].status, given[k].body.get("probability")) for k in others]
        assert scores == [(200, usual[k].body["probability"]) for k in others]
    return given


# --- reading

ARCHIVES = ("cough", "orca", "talent")


def reader(archive: str) -> ModelService:
    """A service that reads as the archive does, as far as nothing has to be trained."""
    definition = Definition.read(ROOT / "archive" / archive)
    if unfitted := definition.pipeline.unfitted:
        definition = replace(definition, pipeline=definition.pipeline.split(unfitted[0])[0])
    return ModelService(definition, Network(), {})  # type: ignore[arg-type]


def voice(peak: float) -> NDArray[np.float32]:
    """3 s at 16 kHz with this largest sample."""
    time = np.arange(48000) / 16000
    samples = np.sin(2 * np.pi * 220 * time) + 0.1 * np.random.default_rng(0).standard_normal(len(time))
    return (samples * (peak / np.abs(samples).max())).astype(np.float32)[None]


@pytest.mark.parametrize("archive", ARCHIVES)
@pytest.mark.parametrize("peak", [1e10, 1e17, 3e38])
def test_levels_that_no_recording_has_are_malformed(archive: str, peak: float):
    (answer,) = reader(archive).prepare([Request(wav(voice(peak), 16000, "FLOAT"))])
    assert isinstance(answer, RequestError) and answer.status == 400
    assert f"a sample is {peak:.3g} times full scale, at most 2.15e+09 times" in answer.message


@pytest.mark.parametrize("archive", ARCHIVES)
@pytest.mark.parametrize("spike", [False, True])
def test_the_largest_level_is_read_in_every_archive(archive: str, spike: bool):
    """The whole recording as loud as that, or one sample of it."""
    samples = voice(1.0 if spike else LARGEST_LEVEL)
    samples[0, 20000] = LARGEST_LEVEL
    (prepared,) = reader(archive).prepare([Request(wav(samples, 16000, "FLOAT"))])
    assert isinstance(prepared, Prepared), prepared
    assert prepared.signal.metadata["peak"] == LARGEST_LEVEL
    assert bool(prepared.signal.data.isfinite().all())


@pytest.mark.parametrize("how", ["gives NaN", "gives infinity"])
def test_an_input_that_is_not_finite_is_refused_alone(how: str):
    network = Network()
    bad = answers(service_of(network, how))[2]
    assert bad.status == 400
    assert "NaN or infinite" in bad.body["message"] and "largest sample is 2 times full scale" in bad.body["message"]
    assert sum(network.calls) == 3


def test_evaluation_refuses_what_serving_refuses():
    with pytest.raises(InputError, match="NaN or infinite"):
        service_of(Network(), "gives NaN").score([FILES[2]])


@pytest.mark.parametrize("how", ["own memory", "torch's memory"])
def test_too_little_memory_for_one_file_is_its_own_413(how: str, caplog: pytest.LogCaptureFixture):
    bad = answers(service_of(Network(), how))[2]
    assert (bad.status, bad.body["code"]) == (413, 413)
    assert "too large to be processed in this server's memory" in bad.body["message"]
    assert caplog.records[-1].exc_info


def test_a_fault_of_the_pipeline_is_no_advice_to_the_sender(caplog: pytest.LogCaptureFixture):
    service = service_of(Network())
    stages = [Decode(), *(s for s in reader("cough").pipeline.stages.values() if s.name == "segment")]
    broken = replace(service, definition=replace(service.definition, pipeline=Pipeline("mono", stages)))
    stereo = Request(wav(np.zeros((2, 9000)), 8000))
    (answer,) = broken.prepare([stereo])
    assert isinstance(answer, RequestError)
    assert (answer.status, answer.message) == (500, "this file could not be processed; the server's log has the reason")
    assert "stage 'segment': it takes one channel, got 2; add a 'downmix'" in caplog.text


# --- the network


def test_outputs_that_are_not_finite_are_that_files_fault_alone(caplog: pytest.LogCaptureFixture):
    network = Network(on_bad=lambda: NAN)
    bad = answers(service_of(network))[2]
    assert bad.status == 500 and "not a number" in bad.body["message"]
    assert network.calls == [4]
    assert "runtime 'eager' gave values that are not finite: probability" in caplog.text


@pytest.mark.parametrize("fault", [raises, out_of_memory])
def test_where_the_network_fails_each_file_is_run_by_itself(
    fault: Callable[[], float], caplog: pytest.LogCaptureFixture
):
    network = Network(on_bad=fault)
    bad = answers(service_of(network))[2]
    assert bad.status == 500 and "the network failed on this file" in bad.body["message"]
    assert network.calls == [4, 1, 1, 1, 1]
    assert "failed on 4 files at once" in caplog.text and caplog.records[-1].exc_info


def test_a_batch_that_is_too_much_at_once_is_answered_file_by_file():
    network = Network()
    right = Network.__call__

    class Small(Network):
        def __call__(self, inputs: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
            self.calls.append(len(inputs))
            if len(inputs) > 1:
                raise RuntimeError("out of memory")
            return right(network, inputs)

    small = Small()
    assert [answer.status for answer in answers(service_of(small))] == [200] * 4
    assert small.calls == [4, 1, 1, 1, 1]


def test_too_few_outputs_are_nobody_elses():
    class Forgetful(Network):
        def __call__(self, inputs: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
            return super().__call__(inputs)[: -1 if len(inputs) > 1 else None]

    assert [answer.status for answer in answers(service_of(Forgetful()))] == [200] * 4


def cascade(fast: Any, exact: Any) -> ModelService:
    return service_of(exact, cascade=Cascade(fast, exact, build_postprocessor(LABEL), 0.05))


@pytest.mark.parametrize(("fast", "exact"), [(raises, float), (lambda: 0.6, raises)])
def test_through_two_networks_one_bad_file_fails_alone(fast: Callable[[], float], exact: Callable[[], float]):
    """With the fast one failing, and with the exact one, which is asked where a score is at the threshold."""
    service = cascade(Network("openvino", "reduced", fast), Network(on_bad=exact))
    given = answers(service)
    assert [answer.status for answer in given] == [200, 200, 500, 200]
    assert [answer.body["tier"] for answer in given if answer.status == 200] == ["reduced"] * 3


def test_a_fast_answer_that_is_no_number_is_given_by_the_exact_network():
    class Half(Network):
        """Its probability is a number, and another output is none."""

        def __call__(self, inputs: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
            given = super().__call__(inputs)
            return [each | {"other": torch.tensor(NAN if each["probability"] == 1.0 else 0.0)} for each in given]

    for fast in (Network("openvino", "reduced", lambda: NAN), Half("openvino", "reduced")):
        given = answers(cascade(fast, Network()))
        assert [answer.body["tier"] for answer in given] == ["reduced", "reduced", "exact", "reduced"]
        assert given[2].body["probability"] == 1.0


@pytest.mark.parametrize("margin", [NAN, INF, -0.1])
def test_a_margin_that_settles_everything_or_nothing_is_refused(margin: float):
    with pytest.raises(ValueError, match=r"the margin is .*, expected a number of at least 0"):
        Cascade(Network(), Network(), build_postprocessor(LABEL), margin)  # type: ignore[arg-type]


# --- the answer


@pytest.mark.parametrize("value", [NAN, INF, torch.tensor(1.0), b"bytes", {1, 2}], ids=repr)
def test_an_answer_that_json_cannot_hold_is_that_files_fault_alone(value: object, caplog: pytest.LogCaptureFixture):
    service = service_of(Network())
    right = service.definition.postprocessor

    class Odd:
        threshold, classes, require_windows = right.threshold, right.classes, right.require_windows

        def __call__(self, outputs: Any, metadata: Any, threshold: float) -> dict[str, Any]:
            body = right(outputs, metadata, threshold)
            return body | ({"seconds": [value]} if metadata["peak"] == BAD else {})

    service.definition.__dict__["postprocessor"] = Odd()
    bad = answers(service)[2]
    assert bad.status == 500 and "could not be answered" in bad.body["message"]
    assert caplog.records[-1].exc_info
    together = BatchRequest({str(k): data for k, data in enumerate(FILES)})
    (one,) = answers(service, [together])
    assert (one.status, one.body["succeeded"], one.body["failed"]) == (200, 3, 1)
    assert one.body["results"]["2"]["code"] == 500


class Context:
    """What TorchServe hands to a handler beside the requests."""

    def __init__(self, headers: Sequence[dict[str, str]]):
        self.headers, self.statuses, self.types = headers, {}, {}

    def get_all_request_header(self, number: int) -> dict[str, str]:
        return self.headers[number]

    def set_response_content_type(self, number: int, value: str) -> None:
        self.types[number] = value

    def set_response_status(self, code: int, phrase: str, number: int) -> None:
        self.statuses[number] = code


def test_the_handler_writes_each_answer_by_itself(caplog: pytest.LogCaptureFixture):
    """Among them a description with a NaN, which no file is to blame for, and a request that cannot be parsed."""
    handler = SkewlessHandler()
    service = service_of(Network(on_bad=lambda: NAN))
    handler.service = replace(service, metrics={**service.metrics, "auc": NAN})

    class Bomb(dict):
        def __contains__(self, key: object) -> bool:
            raise RecursionError("a fault of the parser")

    data: list[dict[str, Any]] = [{"body": FILES[0]}, {}, {"body": FILES[2]}, Bomb(body=FILES[1]), {"body": FILES[3]}]
    headers = [{}, {"describe": "True"}, {}, {}, {}]
    context = Context(headers)
    bodies = [json.loads(body, parse_constant=pytest.fail) for body in handler.handle(data, context)]
    assert [context.statuses[k] for k in range(5)] == [200, 500, 500, 500, 200]
    assert set(context.types.values()) == {"application/json"}
    assert [bodies[k]["probability"] for k in (0, 4)] == [0.25, 0.75]
    assert all(bodies[k]["code"] == 500 for k in (1, 2, 3))
    assert "cannot be written as JSON" in caplog.text and "a request could not be read" in caplog.text


# --- found before it is served


def mono(archive: str = "cough") -> Definition:
    """An archive whose pipeline takes one channel only."""
    definition = Definition.read(ROOT / "archive" / archive)
    stages = [stage for stage in definition.pipeline.stages.values() if stage.name != "downmix"]
    return replace(definition, pipeline=Pipeline("mono", stages))


@pytest.mark.parametrize("archive", ["cough", "orca"])
def test_a_pipeline_without_a_downmix_fails_on_the_stereo_probe(archive: str):
    with pytest.raises(
        PipelineError, match=r"'mono' cannot take a stereo recording, the probe impulse.wav: .*'downmix'"
    ):
        try_probes(mono(archive).pipeline)


@pytest.mark.parametrize("choice", ["evaluation", "synthetic", "none"])
def test_no_archive_is_built_of_it(choice: str, tmp_path: Path):
    service = ModelService(mono(), Network(), {})  # type: ignore[arg-type]
    with pytest.raises(PipelineError, match="cannot take a stereo recording"):
        stage_references(choice, tmp_path / "evaluation", "test", tmp_path, service)


def test_no_recording_is_read_to_train_it(tmp_path: Path):
    (tmp_path / "a.wav").write_bytes(tone(0.5))
    rows = [Recording("a.wav", tmp_path / "a.wav", 0, "train")]
    with pytest.raises(PipelineError, match="cannot take a stereo recording"):
        fit(rows, mono(), Config(), tmp_path / "out", cache_dir=tmp_path / "cache", device=CPU)
    assert not (tmp_path / "out").exists()


def test_a_fault_of_any_stage_is_found_by_the_probes():
    @dataclass(frozen=True)
    class Picky(Stage, name="picky"):
        def __call__(self, signal: Signal) -> Signal:
            return signal.of(signal.data[:, : 3 * signal.sampling_rate].reshape(-1, 7))

    with pytest.raises(PipelineError, match=r"cannot take such a file, the probe .*shape"):
        try_probes(Pipeline("picky", [Decode(), Downmix(), Picky()]))


def test_a_probe_that_gives_no_numbers_is_left_out():
    @dataclass(frozen=True)
    class Odd(Stage, name="odd"):
        def __call__(self, signal: Signal) -> Signal:
            return signal.of(signal.data * (NAN if signal.rate == 8000 else 1.0))

    taken, refused = try_probes(Pipeline("x", [Decode(), Downmix(), Odd()]))
    assert list(refused) == ["clipped.wav"] and "NaN or infinite" in refused["clipped.wav"]
    assert len(taken) == 5


# --- NaN passes no gate


def test_nothing_that_is_no_number_is_recorded(tmp_path: Path):
    for how, network, message in (
        ("gives NaN", Network(), "stage 'fails' is NaN or infinite for reference bad.wav"),
        ("gives infinity", Network(), "stage 'fails' is NaN or infinite for reference bad.wav"),
        ("", Network(on_bad=lambda: NAN), "the network's probability is NaN or infinite for reference bad.wav"),
    ):
        definition = replace(service_of(network, how).definition, folder=tmp_path)
        (tmp_path / "references").mkdir(exist_ok=True)
        (tmp_path / "references" / "bad.wav").write_bytes(FILES[2])
        with pytest.raises(ValueError, match=message):
            selftest_record(definition, network)  # type: ignore[arg-type]
        assert [path.name for path in (tmp_path / "references").iterdir()] == ["bad.wav"]


@pytest.mark.parametrize("at", [0, 1000, 1999])
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_stage_that_gives_nan_differs_from_its_record(at: int, value: float):
    @dataclass(frozen=True)
    class Late(Stage, name="late"):
        value: float

        def __call__(self, signal: Signal) -> Signal:
            data = signal.data.clone()
            data[0, at] = data[0, at] if self.value == 0 else self.value
            return signal.of(data)

    pipeline, broken = (Pipeline("x", [Decode(), Late(each)]) for each in (0.0, value))
    steps = list(pipeline.steps(FILES[0]))
    kinds, values = {n: kind(s.data) for n, s in steps}, {n: summary(s.data) for n, s in steps}
    assert len(list(compare_stages(pipeline, FILES[0], kinds, values))) == 2
    with pytest.raises(StageDiffersError, match="stage 'late'"):
        list(compare_stages(broken, FILES[0], kinds, values))
    # Nor is anything within the tolerance of a record that holds one.
    with pytest.raises(StageDiffersError, match="stage 'late'"):
        list(compare_stages(broken, FILES[0], kinds, {n: summary(s.data) for n, s in broken.steps(FILES[0])}))


def test_the_self_test_fails_on_outputs_that_are_no_numbers():
    recorded = {"01.wav/network/p": torch.tensor([0.5, 0.5]), "02.wav/network/p": torch.tensor([NAN, 0.5])}
    replay = _Replay(Path(), recorded, {}, SimpleNamespace(packages=()))  # type: ignore[arg-type]
    replay.check_outputs("01.wav", {"p": torch.tensor([0.5, 0.5])}, 1e-4)
    for file, outputs in (
        ("01.wav", [0.5, NAN]),
        ("01.wav", [NAN, 0.5]),
        ("01.wav", [0.5, INF]),
        ("02.wav", [NAN, 0.5]),
    ):
        with pytest.raises(SelfTestError, match="p is off by"):
            replay.check_outputs(file, {"p": torch.tensor(outputs)}, 1e-4)


def test_the_self_test_fails_on_a_fast_network_that_gives_no_numbers():
    class Fast(Network):
        tolerance = 0.02

        def __call__(self, inputs: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
            return [{"class_probabilities": torch.tensor([0.2, 0.2, NAN])} for _ in inputs]

    postprocessor = build_postprocessor(THREE)
    replay = _Replay(Path(), {}, {}, SimpleNamespace(packages=(), postprocessor=postprocessor))  # type: ignore[arg-type]
    entries = [{"file": "01.wav", "scores": [0.2, 0.2, 0.6]}]
    right = {"class_probabilities": torch.tensor([0.2, 0.2, 0.6])}
    exact: Any = Network()
    with pytest.raises(SelfTestError, match=r"'fast network' differs on 01\.wav"):
        inputs = {"01.wav": torch.zeros(1)}
        replay.check_cascade(Cascade(Fast(), exact, postprocessor, 0.1), entries, inputs, {"01.wav": right})  # type: ignore[arg-type]


def references_of(scores: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    return [{"file": f"{k}.wav", "source": f"{k}.wav", "scores": list(each)} for k, each in enumerate(scores)]


def test_references_with_a_probability_that_is_no_number_are_refused(tmp_path: Path):
    check_spread(references_of([[0.1], [0.5], [0.9]]))
    for scores in ([[0.1], [NAN], [0.9]], [[NAN], [0.1], [0.9]], [[0.1], [INF]], [[0.1, 0.1, NAN], [0.9, 0.9, 0.9]]):
        with pytest.raises(BuildError, match=r"has the probabilities \[.*(nan|inf).*\], expected numbers"):
            check_spread(references_of(scores))
    service = service_of(Network())
    broken = replace(service, runtime=Network(on_bad=lambda: NAN))
    paths = []
    for number, data in enumerate(FILES):
        paths.append(tmp_path / f"{number}.wav")
        paths[-1].write_bytes(data)
    for each, out in ((service, tmp_path / "good"), (broken, tmp_path / "bad")):
        out.mkdir()
        if each is service:
            stage_references(paths, tmp_path, "test", out, each)
            continue
        with pytest.raises(BuildError, match="expected numbers"):
            stage_references(paths, tmp_path, "test", out, each)
        assert not (out / "references" / "references.json").exists()


@pytest.mark.parametrize("at", [0, 1, 2])
def test_the_smoke_test_and_the_benchmark_find_a_score_that_is_no_number(at: int):
    served, evaluated = [0.2, 0.2, 0.6], [0.2, 0.2, 0.6]
    references = smoke.References(
        build_postprocessor(THREE), references_of([evaluated, evaluated]), [b"0", b"1"], "f", 1e-4, {"exact": 1e-4}
    )

    def send(payload: bytes) -> SimpleNamespace:
        scores = list(served)
        scores[at] = NAN if payload == b"1" else scores[at]
        body = {"label": "c", "probabilities": dict(zip("abc", scores, strict=True)), "threshold_used": 0.5}
        body |= {"tier": "exact", "model_version": "1", "pipeline_fingerprint": "f"}
        return SimpleNamespace(status=200, body=body, seconds=0.0)

    row = smoke._measure("path", send, references, "1", 1)
    assert not row.passed and not row.max_dp <= 1e-4
    scores = list(served)
    scores[at] = NAN
    lane = SimpleNamespace(expected={"x": evaluated}, reference={"x": evaluated}, tolerance=1e-4)
    assert load.check(lane, SimpleNamespace(kind="x"), served) == 0  # type: ignore[arg-type]
    with pytest.raises(load.WrongAnswer):
        load.check(lane, SimpleNamespace(kind="x"), scores)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [NAN, 0.6])
def test_tuning_leaves_out_a_runtime_of_which_one_worker_gives_no_numbers(value: float):
    class Crew:
        rows = 1

        def run(self, task: Task) -> list[Done]:
            second = value if task.runtime == "mnn" else 0.5
            return [Done(0.0, 1.0, ((0.5,),)), Done(0.0, 1.0, ((second,),))]

    candidates = [Candidate("eager", 32, 2, 1), Candidate("mnn", 1, 2, 1)]
    measured, excluded = _measure(candidates, {2: Crew()}, [(0.5,)], 1, 0.0)  # type: ignore[dict-item]
    assert [each.candidate.runtime for each in measured] == ["eager"]
    assert [each.runtime for each in excluded] == ["mnn"] and "is off by" in excluded[0].reason


def test_a_skew_report_is_of_numbers():
    network = Network(on_bad=lambda: NAN)
    pipeline = service_of(network).pipeline
    pair = Comparator(pipeline, pipeline, network, build_postprocessor(LABEL))  # type: ignore[arg-type]
    assert pair.measure("fine", FILES[0]).change == 0
    with pytest.raises(PipelineError, match="the network gives values that are NaN or infinite"):
        pair.measure("bad", FILES[2])


def test_an_import_goes_on_where_another_pipeline_gives_no_numbers(monkeypatch: pytest.MonkeyPatch):
    service = service_of(Network())
    rows = [Recording(f"{k}.wav", Path(f"{k}.wav"), k % 2, "val") for k in range(4)]

    def predicted(_: ModelService, __: list[Recording], name: str) -> list[Prediction]:
        values = (0.1, 0.9, 0.2, NAN if name == "other" else 0.8)
        return [Prediction(row, "", (value,), ()) for row, value in zip(rows, values, strict=True)]

    monkeypatch.setattr(evidence, "service_of", lambda *_: service)
    monkeypatch.setattr(evidence, "predict", predicted)
    given: Any = {"device": CPU, "recorded_auc": None, "recorded": {}}
    trials = evidence.compare(
        service.definition, {}, dict.fromkeys(("chosen", "other"), service.pipeline), rows, **given
    )
    assert [each.auc for each in trials] == [1.0, None]
    assert "1 of 4 recordings have a score that is NaN" in trials[1].failure


# --- figures


def test_figures_are_of_numbers():
    labels, scores = np.array([0, 1, 0, 1]), np.array([0.1, NAN, 0.3, 0.9])
    for figure in (
        lambda: auc(labels, scores[:, None]),
        lambda: best_threshold(labels, scores),
        lambda: measure_two_classes(labels, scores, 0.5),
        lambda: measure_classes(np.array([0, 1, 2, 1]), np.stack([scores] * 3, axis=1), "abc", 0.5),
    ):
        with pytest.raises(ValueError, match="1 of 4 recordings have a score that is NaN or infinite"):
            figure()


def test_figures_are_of_as_many_classes_as_there_are_scores():
    labels = np.array([0, 1, 2, 1])
    with pytest.raises(ValueError, match=r"labels are of 3 classes, and 1 score per recording tells 2 apart"):
        auc(labels, np.full((4, 1), 0.5))
    with pytest.raises(ValueError, match=r"labels are of 3 classes, and 1 score per recording tells 2 apart"):
        measure_two_classes(labels, np.full(4, 0.5), 0.5)
    with pytest.raises(ValueError, match=r"labels are of 4 classes, and 3 scores per recording tell 3 apart"):
        auc(np.array([0, 1, 2, 3]), np.full((4, 3), 0.3))
    with pytest.raises(ValueError, match="two scores per recording; of two classes there is one"):
        auc(np.array([0, 1]), np.full((2, 2), 0.5))


def test_a_manifest_of_other_classes_is_refused(tmp_path: Path):
    rows = ["file_path,label,split"]
    for number, label in enumerate(("quiet", "loud", "other") * 2):
        (tmp_path / f"{number}.wav").write_bytes(tone(number / 10))
        rows.append(f"{number}.wav,{label},train")
    (tmp_path / "three.csv").write_text("\n".join(rows))
    (tmp_path / "two.csv").write_text("\n".join(row for row in rows if "other" not in row))
    with pytest.raises(ManifestError, match=r"row 4: label is 'other', expected one of .*quiet, loud"):
        read_manifest(tmp_path / "three.csv", tmp_path, ("quiet", "loud"))
    three = ("quiet", "loud", "other")
    with pytest.raises(ManifestError, match="has 2 quiet, 2 loud, 0 other recordings; it needs some of each"):
        select(read_manifest(tmp_path / "two.csv", tmp_path, three), "train", three)


@pytest.mark.parametrize(("count", "classes"), [(1, 3), (2, 2), (4, 3)])
def test_training_refuses_another_number_of_scores_than_classes(count: int, classes: int):
    outputs = torch.full((count,), 0.5)
    network = SimpleNamespace(eval=lambda: None, encode=lambda x: x, head=lambda x: {"p": outputs})
    names = tuple("abcd"[:classes])
    postprocessor = SimpleNamespace(classes=names, scores=lambda given: tuple(given["p"].tolist()))
    cache = SimpleNamespace(load=lambda path: torch.zeros(1), finish=lambda kept: kept)
    entry = SimpleNamespace(path=Path(), recording=SimpleNamespace(label=0))
    with pytest.raises(ValueError, match=f"the post-processing gives {count} scores, expected one per class"):
        _check_together(network, lambda *_: None, cache, entry, postprocessor, CPU)  # type: ignore[arg-type]


# --- imports


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_a_checkpoint_that_inflates_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inflated.check_sizes, "__defaults__", (1_000_000,))
    torch.save({"model_state_dict": {"a": torch.zeros(100_000)}}, tmp_path / "plain.pth")
    members = {}
    with zipfile.ZipFile(tmp_path / "plain.pth") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    # torch reads compressed members: where they are small, they are read as before.
    assert list(read_pytorch(zipped(tmp_path / "compressed.pth", members)).weights) == ["a"]
    for name in ("plain/data/0", "plain/extra"):
        bomb = zipped(tmp_path / "bomb.pth", members | {name: bytes(1_000_001)})
        assert bomb.stat().st_size < 10_000
        with pytest.raises(
            ImportFileError, match=rf"bomb.pth: its members inflate to .*'{name}', from .* to 1,000,001 bytes"
        ):
            read_pytorch(bomb)
    refused = call_skewless("import", ROOT / "archive" / "cough", tmp_path / "bomb.pth", "--out", tmp_path / "out.pth")
    assert refused.returncode == 2, refused.stderr
    assert "--pipeline" in refused.stderr or "inflate" in refused.stderr
    pipeline = ROOT / "archive" / "cough" / "pipeline.yaml"
    arguments = ("import", ROOT / "archive" / "cough", tmp_path / "bomb.pth", "--out", tmp_path / "out.pth")
    refused = call_skewless(*arguments, "--pipeline", pipeline)
    assert (refused.returncode, "inflate" in refused.stderr) == (2, True), refused.stderr
    assert not (tmp_path / "out.pth").exists()


@pytest.fixture(scope="module")
def resnet() -> KerasResNet50:
    definition = Definition.read(ROOT / "archive" / "portrait")
    return definition.build_network()  # type: ignore[return-value]


@pytest.mark.parametrize("member", ["config.json", "model.weights.h5"])
def test_a_keras_file_that_inflates_without_end_is_refused(
    member: str, resnet: KerasResNet50, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("_MAX_CONFIG", "_MAX_WEIGHTS"):
        monkeypatch.setattr(keras_file, name, 1_000_000)
    members = {"config.json": b"{}", "model.weights.h5": b""} | {member: bytes(1_000_001)}
    with pytest.raises(ImportFileError, match=rf"'{member}' inflates from [\d,]+ to 1,000,001 bytes"):
        read_keras(zipped(tmp_path / "bomb.keras", members), resnet)


def test_a_compressed_array_of_hdf5_is_refused(resnet: KerasResNet50, tmp_path: Path):
    """HDF5 inflates such a piece of an array to its end, whatever the array's shape says."""
    path = tmp_path / "bomb.weights.h5"
    with h5py.File(path, "w") as root:
        group = root.create_group("layers/conv1_conv/vars")
        group.attrs["name"] = "conv1_conv"
        group.create_dataset("0", data=np.zeros((7, 7, 3, 64), np.float32), compression="gzip")
    with pytest.raises(
        ImportFileError, match=r"layers/conv1_conv/vars/0 is compressed \(gzip\), expected 37,632 bytes"
    ):
        read_keras(path, resnet)


NAMES = ("../outside", "../../outside", "/tmp/skewless-outside", "a/../../outside", "..\\outside")


def test_names_in_a_zip_never_lead_out_of_it(resnet: KerasResNet50, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Importing writes no member to a disk at all."""
    folder = tmp_path / "inside" / "folder"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    torch.save({"model_state_dict": {"a": torch.zeros(3)}}, "plain.pth")
    with zipfile.ZipFile("plain.pth") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    extra = dict.fromkeys(NAMES, b"outside")
    zipped(Path("evil.pth"), members | extra)
    zipped(Path("evil.keras"), {"config.json": b"{}", "model.weights.h5": b""} | extra)
    zipped(Path("evil.pt2"), {"x/archive_format": b"pt2", "x/models/model.json": b"{}"} | extra)
    before = sorted(tmp_path.rglob("*"))
    assert [format_of(Path(name)) for name in ("evil.pth", "evil.keras", "evil.pt2")] == [
        "pytorch",
        "keras",
        "exported",
    ]
    with pytest.raises(ImportFileError):
        read_pytorch("evil.pth")
    with pytest.raises(ImportFileError):
        read_keras("evil.keras", resnet)
    assert (
        call_skewless(
            "import", ROOT / "archive" / "portrait", folder / "evil.pt2", "--out", folder / "o.pth"
        ).returncode
        == 2
    )
    assert sorted(tmp_path.rglob("*")) == before and not Path("/tmp/skewless-outside").exists()


def test_code_that_an_archive_names_never_leads_out_of_the_smoke_tests_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    metrics = {
        "code": {"../../outside.py": "0"},
        "pipeline_fingerprint": "f",
        "runtime": {"tier": "exact", "tolerance": 1e-4},
    }
    model = (ROOT / "archive" / "cough" / "model.yaml").read_bytes()
    members = {
        "references/references.json": json.dumps(references_of([[0.1]])).encode(),
        "references/0.wav": b"",
        "metrics.json": json.dumps(metrics).encode(),
        "model.yaml": model,
        "../../outside.py": b"raise SystemExit",
    }
    path = zipped(tmp_path / "evil.mar", members)
    with pytest.raises(UsageError, match=r"has the file '../../outside.py', which is no name inside a folder"):
        smoke.References.from_archive(path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["evil.mar", "temporary"]


def test_no_models_name_leads_out_of_the_folder_of_load_errors(tmp_path):
    for name in ("../outside", "/outside", "a/../../outside"):
        assert load_error.path(tmp_path, name, "1.0") == tmp_path / "outside-1.0.json"
