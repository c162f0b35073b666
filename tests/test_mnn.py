"""MNN: the network's numbers, the same ones in any company, and clear words where it cannot run a network."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from skewless.core.definition import Definition
from skewless.core.errors import DefinitionError
from skewless.core.request import Request, RequestError
from skewless.core.runtimes import RuntimeSettings, load_runtime
from skewless.core.runtimes.eager import EagerRuntime
from skewless.core.runtimes.mnn import ENCODER, HEAD, MnnRuntime, _Graph
from skewless.core.runtimes.onnx import OnnxRuntime
from skewless.core.service import ModelService
from tests import recordings
from tests.conftest import ROOT
from tests.test_runtimes import CPU, OWN, apart, examples, lively

_WRITE = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from skewless.core.runtimes import RuntimeSettings
from skewless.core.runtimes.mnn import MnnRuntime
from tests.test_runtimes import examples, lively
network = lively({"attn_mil_resnet": {}}, (3, 64, 64))
MnnRuntime.write(network, Path(sys.argv[2]), RuntimeSettings(), examples((3, 64, 64), 2))
"""
COUGH = ROOT / "archive" / "cough"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("mnn")
    (made / "own.py").write_text(OWN)
    return made


@pytest.fixture(scope="module")
def resnet():
    return lively({"attn_mil_resnet": {}}, (3, 64, 64))


@pytest.fixture(scope="module")
def graphs(resnet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("graphs")
    MnnRuntime.write(resnet, made, RuntimeSettings(), examples((3, 64, 64), 2))
    return made


def runtime(graphs: Path, micro_batch: int = 4) -> MnnRuntime:
    return MnnRuntime(graphs / ENCODER, graphs / HEAD, RuntimeSettings(micro_batch=micro_batch))


@pytest.mark.parametrize("micro_batch", [1, 4, 7])
def test_the_numbers_are_those_of_the_network(graphs: Path, resnet, micro_batch: int):
    """Winograd's algorithm rounds otherwise than the direct sum: 1e-5 of probabilities, a tenth of the exact tier."""
    inputs = examples((3, 64, 64), 1, 2, 9)
    expected = EagerRuntime(resnet, CPU)(inputs)
    assert 0 < apart(runtime(graphs, micro_batch)(inputs), expected) <= 1e-4
    given = runtime(graphs, micro_batch)(inputs)
    assert (
        max(float((a["bag_probability"] - b["bag_probability"]).abs()) for a, b in zip(given, expected, strict=True))
        <= 1e-5
    )


def test_a_recording_has_the_same_bits_in_any_company(graphs: Path):
    inputs = examples((3, 64, 64), 3, 6, 1, 5)
    together = runtime(graphs)(inputs)
    for rows, outputs in zip(inputs, together, strict=True):
        (alone,) = runtime(graphs)([rows])
        assert all(torch.equal(alone[name], outputs[name]) for name in outputs)
    backwards = runtime(graphs)(inputs[::-1])[::-1]
    assert all(torch.equal(a[name], b[name]) for a, b in zip(together, backwards, strict=True) for name in a)


def test_half_precision_rows_are_read_exactly(graphs: Path):
    (rows,) = examples((3, 64, 64), 3)
    (half,) = runtime(graphs)([rows.half()])
    (same,) = runtime(graphs)([rows.half().float()])
    assert all(torch.equal(half[name], same[name]) for name in half)


class Failing:
    """An interpreter that cannot run its session while `code` is set, as MNN reports it: by a number."""

    code = 0

    def __init__(self, interpreter: Any):
        self._interpreter = interpreter
        self.resized = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._interpreter, name)

    def resizeSession(self, session: Any) -> Any:
        self.resized += 1
        return self._interpreter.resizeSession(session)

    def runSession(self, session: Any) -> int:
        return self.code or self._interpreter.runSession(session)


def test_what_mnn_could_not_compute_is_no_answer(graphs: Path):
    """Its outputs would still hold those of the rows before."""
    (rows,) = examples((3, 64, 64), 2)
    graph = _Graph(graphs / ENCODER, 1)
    failing = graph._interpreter = Failing(graph._interpreter)
    (expected,) = graph(rows.numpy()).values()
    failing.code = 3
    with pytest.raises(RuntimeError, match=r"could not run the graph on 2 rows \(its error 3\)"):
        graph(rows.numpy() + 1)
    failing.code, before = 0, failing.resized
    (again,) = graph(rows.numpy()).values()
    assert np.array_equal(again, expected) and failing.resized == before + 1


def test_the_same_network_gives_the_same_bytes(graphs: Path, resnet, tmp_path: Path):
    files = MnnRuntime.write(resnet, tmp_path, RuntimeSettings(), examples((3, 64, 64), 2))
    assert [file.read_bytes() for file in files] == [(graphs / file.name).read_bytes() for file in files]


def test_two_may_be_written_at_once(graphs: Path, resnet, tmp_path: Path):
    """MNN's converter has a file of a fixed name in the folder that it runs in."""
    folders = [tmp_path / str(k) for k in range(3)]
    for folder in folders:
        folder.mkdir()
    command = [sys.executable, "-c", _WRITE, str(ROOT)]
    running = [subprocess.Popen([*command, str(folder)], cwd=tmp_path) for folder in folders]
    assert [process.wait() for process in running] == [0, 0, 0]
    first, *others = [[(folder / file).read_bytes() for file in (ENCODER, HEAD)] for folder in folders]
    assert all(other == first for other in others)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2"]


def test_a_network_that_mnn_computes_otherwise_is_refused(folder: Path, tmp_path: Path):
    """It makes whole numbers of what `Pooling` divides by the count of rows."""
    with pytest.raises(ValueError, match=r"MNN does not compute this network.*probability is off by.*'onnxruntime'"):
        MnnRuntime.write(
            lively({"own.py:Pooling": {}}, (1, 12, 16), folder), tmp_path, RuntimeSettings(), examples((1, 12, 16), 3)
        )
    assert not list(tmp_path.iterdir())


def test_a_damaged_graph_is_refused(graphs: Path, tmp_path: Path):
    for file in (ENCODER, HEAD):
        (tmp_path / file).write_bytes((graphs / file).read_bytes()[:500])
    with pytest.raises(ValueError, match=r"cannot open head\.mnn.*build the archive again"):
        runtime(tmp_path)


def test_rows_of_another_shape_are_refused(graphs: Path):
    with pytest.raises(ValueError, match=r"takes rows \(3, 64, 64\), got \(1, 64, 64\)"):
        runtime(graphs)(examples((1, 64, 64), 2))


def test_it_stays_on_the_cpu(graphs: Path, caplog: pytest.LogCaptureFixture):
    with pytest.raises(ValueError, match=r"not on device 'cuda'.*runtime 'eager'"):
        MnnRuntime.load(graphs, {}, torch.device("cuda"), RuntimeSettings())
    with caplog.at_level("INFO"):
        loaded = load_runtime({"mnn": {}}, {}, graphs, torch.device("cuda", 0))
    assert loaded.device == CPU
    assert "'mnn' computes on the CPU" in caplog.text


def test_without_the_package(graphs: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "MNN", None)
    with pytest.raises(ValueError, match="pip install MNN"):
        runtime(graphs)


def test_nothing_is_printed_where_json_goes(graphs: Path):
    """MNN's own lines about the processor come from C, on the standard output."""
    code = (
        "import json, sys; from pathlib import Path\n"
        "from skewless.core.runtimes.mnn import MnnRuntime\n"
        "folder = Path(sys.argv[1]); print(json.dumps('before'))\n"
        "MnnRuntime(folder / 'encoder.mnn', folder / 'head.mnn'); print(json.dumps('after'))"
    )
    done = subprocess.run([sys.executable, "-c", code, graphs], cwd=ROOT, capture_output=True, text=True, check=True)
    assert list(map(json.loads, done.stdout.splitlines())) == ["before", "after"]


def absorbing(*names: str) -> Definition:
    read = Definition.read(COUGH)
    return replace(read, runtime={"eager": {"absorb": list(names)}})


def test_absorbed_stages_change_no_bit_in_eager_mode():
    plain, absorbed = absorbing(), absorbing("replicate", "standardize")
    network = plain.build_network()
    payload = recordings.wav(recordings.coughs(16000, 3), 16000)
    assert plain.prepared.run(payload).data.shape == (3, 3, 224, 224)
    assert absorbed.prepared.run(payload).data.shape == (3, 224, 224)
    (a,), (b,) = (
        EagerRuntime(network, CPU, absorbed=each.absorbed)([each.prepared.run(payload).data])
        for each in (plain, absorbed)
    )
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", [MnnRuntime, OnnxRuntime])
def test_absorbed_stages_are_written_with_the_network(kind, tmp_path: Path):
    plain, absorbed = absorbing(), absorbing("replicate", "standardize")
    network = lively(plain.network, (3, 224, 224))
    payload = recordings.wav(recordings.coughs(16000, 3), 16000)
    rows = absorbed.prepared.run(payload).data
    settings = RuntimeSettings(absorb=("replicate", "standardize"))
    kind.write(network, tmp_path, settings, [rows], absorbed.absorbed)
    loaded = kind.load(tmp_path, {}, CPU, settings, absorbed.absorbed)
    assert apart(loaded([rows]), EagerRuntime(network, CPU)([plain.prepared.run(payload).data])) <= 1e-4


@pytest.mark.parametrize("names", [("replicate",), ("standardize", "replicate"), ("mel",), ("cast", "standardize")])
def test_only_the_last_stages_can_be_absorbed(tmp_path: Path, names: tuple[str, ...]):
    for file in COUGH.glob("*.yaml"):
        (tmp_path / file.name).write_text(file.read_text().replace("[replicate, standardize]", f"[{', '.join(names)}]"))
    with pytest.raises(DefinitionError, match=r"absorb is \[.*expected the pipeline's last stages in order"):
        Definition.read(tmp_path)


def test_files_are_read_ahead_and_answered_in_order(resnet):
    """More files than are read ahead, some of them broken: every answer in its place, as when it comes alone."""
    definition = absorbing("replicate", "standardize")
    service = ModelService(definition, EagerRuntime(resnet, CPU, absorbed=definition.absorbed), {"model_version": "1"})
    payloads = [recordings.wav(recordings.coughs(16000, 2 + 0.5 * (k % 3)), 16000) for k in range(6)]
    payloads[3] = b"no sound"
    requests: list[Request | RequestError] = [Request(payload) for payload in payloads]
    requests.insert(1, RequestError(400, "refused before"))
    together = service.predict(requests)
    assert [answer.status for answer in together] == [200, 400, 200, 200, 415, 200, 200]
    for request, answer in zip(requests, together, strict=True):
        (alone,) = service.predict([request])
        assert alone.status == answer.status
        if answer.status == 200:
            assert abs(alone.body["file_probability"] - answer.body["file_probability"]) <= 1e-6
            assert len(alone.body["segment_probabilities"]) == len(answer.body["segment_probabilities"])
