"""`skewless tune`: what it chooses by given figures, what it writes, what it leaves out; and how cores are counted.

No test depends on how long anything takes.
"""

from __future__ import annotations

import json
import random
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from skewless.core import numerics
from skewless.core.cores import available_cores, cpu_quota
from skewless.core.definition import Definition
from skewless.core.numerics import NumericPolicy
from skewless.core.runtimes import RUNTIMES
from skewless.core.runtimes.eager import EagerRuntime
from skewless.core.runtimes.mnn import MnnRuntime
from skewless.core.runtimes.onnx import OnnxRuntime
from skewless.errors import CheckFailedError, UsageError
from skewless.evaluation.evaluate import evaluate
from skewless.packaging import build
from skewless.packaging.build import build_archive
from skewless.training.checkpoint import load_checkpoint
from skewless.training.manifest import read_manifest
from skewless.tuning import configuration, run
from skewless.tuning.run import Candidate, Measured, Tuning, choose
from skewless.tuning.worker import Setup, crew_of
from tests.conftest import call_skewless
from tests.recordings import one_thread  # noqa: F401
from tests.tiny_model import TinyModel, make


@pytest.fixture(autouse=True)
def without_openvino(monkeypatch: pytest.MonkeyPatch):
    """It may be installed or not."""
    monkeypatch.delitem(RUNTIMES._names, "openvino")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make(tmp_path_factory.mktemp("tuning"))


@pytest.fixture(scope="module")
def evaluation(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "evaluation"
    definition, checkpoint = tiny_model.definition, load_checkpoint(tiny_model.checkpoint)
    recordings = read_manifest(tiny_model.manifest, tiny_model.manifest.parent, definition.classes)
    evaluate(definition, checkpoint, tiny_model.checkpoint, recordings, "test", out, torch.device("cpu"), references=3)
    return out


@pytest.fixture
def archive(tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the model's folder, on a machine with two cores where MNN cannot execute the network."""

    def refuse(*_: object):
        raise ValueError("no such operator")

    monkeypatch.setattr(MnnRuntime, "write", refuse)
    monkeypatch.setattr(run, "MICRO_BATCHES", (1, 32))
    monkeypatch.setattr(run, "available_cores", lambda: 2)
    return shutil.copytree(tiny_model.archive, tmp_path / "tiny")


def tuned(archive: Path, tiny_model: TinyModel, evaluation: Path, **changes) -> Tuning:
    settings = {"workers": 1, "rounds": 1, "cell_seconds": 0} | changes
    return run.tune(archive, tiny_model.checkpoint, evaluation, **settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def measured(runtime: str, micro_batch: int, workers: int, ratio: float, variation: float = 1.0) -> Measured:
    return Measured(
        Candidate(runtime, micro_batch, workers, 4 // workers), 10 * ratio, 1 / ratio, ratio, variation, 0.0
    )


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        # The fastest, where nothing is near it.
        ([("eager", 32, 1, 1.0), ("mnn", 4, 1, 2.0), ("mnn", 32, 4, 2.2)], 2),
        # Within 3 % the fewest workers, before the smallest micro-batch.
        ([("mnn", 1, 4, 2.0), ("mnn", 8, 1, 1.95), ("mnn", 16, 1, 1.97)], 1),
        # Just beyond 3 %.
        ([("mnn", 8, 1, 2.0), ("mnn", 4, 1, 1.93)], 0),
        # Memory being equal, the faster.
        ([("eager", 4, 1, 1.00), ("onnxruntime", 4, 1, 1.01), ("mnn", 4, 1, 0.9)], 1),
        # All being equal, the name.
        ([("onnxruntime", 4, 1, 1.0), ("eager", 4, 1, 1.0)], 1),
    ],
)
def test_the_rule(rows: list[tuple[str, int, int, float]], expected: int):
    figures = [measured(*row) for row in rows]
    wanted = figures[expected]
    for seed in range(5):
        random.Random(seed).shuffle(figures)
        assert choose(figures) == wanted


@pytest.mark.parametrize(("variation", "noted"), [(1.05, False), (1.5, True)])
def test_a_busy_machine_is_noted(variation: float, noted: bool):
    rows = [measured("eager", 32, 1, 1.0), measured("mnn", 4, 1, 2.0, variation)]
    about = {"machine": {"cpu": "x", "available_cores": 4}, "workload": "w", "reference": "eager", "rounds": 3}
    text = Tuning(rows, (), rows[1], {}, about).text()
    assert ("differ by up to a factor of 1.50" in text) == noted


def test_measures_writes_and_reads_back(archive: Path, tiny_model: TinyModel, evaluation: Path, tmp_path: Path):
    model, server = archive / "model.yaml", archive / "model-config.yaml"
    model.write_text("# Mine.\n" + model.read_text().replace("{eager: {micro_batch: 32}}", "{eager: {}}  # for now"))
    before = server.read_text()
    found = tuned(archive, tiny_model, evaluation)
    assert {(each.candidate.runtime, each.candidate.micro_batch) for each in found.measured} == {
        (runtime, size) for runtime in ("eager", "onnxruntime") for size in (1, 32)
    }
    assert all(each.ratio > 0 and each.rows_per_s > 0 and each.max_dp <= 1e-4 for each in found.measured)
    (eager,) = (each for each in found.measured if each.candidate == Candidate("eager", 32, 1, 2))
    assert (eager.ratio, eager.max_dp) == (1.0, 0.0)
    chosen = choose(found.measured).candidate

    definition = Definition.read(archive)
    assert definition.runtime == {chosen.runtime: {"micro_batch": chosen.micro_batch}}
    assert (definition.precision, definition.limits) == (NumericPolicy(threads=2), tiny_model.definition.limits)
    assert model.read_text().startswith("# Mine.\n")
    assert f"runtime: {{{chosen.runtime}: {{micro_batch: {chosen.micro_batch}}}}}  # for now\n" in model.read_text()
    assert server.read_text() == before.replace("maxWorkers: 4", "maxWorkers: 1")
    document = json.loads((archive / "tuning.json").read_text())
    assert document == found.document()
    assert (document["configuration"]["workers"], len(document["candidates"])) == (1, 5)
    assert document["machine"]["cpu"] and document["versions"]["torch"] and str(tmp_path) not in json.dumps(document)
    assert [path.name for path in found.written] == ["model.yaml", "model-config.yaml", "tuning.json"]
    assert not list(archive.glob(".*"))

    # The archive carries the figures, as long as it is what they were measured for.
    path = build_archive(archive, tiny_model.checkpoint, evaluation, "1.0", tmp_path / "store").path
    with zipfile.ZipFile(path) as packed:
        assert json.loads(packed.read("metrics.json"))["tuning"] == document
    model.write_text(model.read_text().replace("threads: 2", "threads: 1"))
    assert build._tuning(Definition.read(archive)) == {}


def test_a_trial_writes_nothing(archive: Path, tiny_model: TinyModel, evaluation: Path):
    before, threads = contents(archive), torch.get_num_threads()
    found = tuned(archive, tiny_model, evaluation, dry_run=True)
    assert contents(archive) == before
    assert found.written == () and "nothing was written" in found.text()
    assert torch.get_num_threads() == threads


def test_wrong_numbers_and_what_cannot_run_are_out(
    archive: Path, tiny_model: TinyModel, evaluation: Path, monkeypatch: pytest.MonkeyPatch
):
    right = OnnxRuntime.__call__

    def slightly_off(self, inputs):
        return [
            {name: value + 1e-3 * (self.settings.micro_batch == 32) for name, value in each.items()}
            for each in right(self, inputs)
        ]

    monkeypatch.setattr(OnnxRuntime, "__call__", slightly_off)
    found = tuned(archive, tiny_model, evaluation)
    assert {(each.candidate.runtime, each.candidate.micro_batch) for each in found.measured} == {
        ("eager", 1),
        ("eager", 32),
        ("onnxruntime", 1),
    }
    mnn, onnx = found.excluded
    assert (mnn.runtime, mnn.candidate) == ("mnn", None) and "no such operator" in mnn.reason
    assert onnx.candidate == Candidate("onnxruntime", 32, 1, 2)
    assert "a score is off by 1.0e-03 from eager's, allowed 0.0001" in onnx.reason
    assert "left out: onnxruntime, micro-batch 32, 1 x 2 threads: a score is off" in found.text()
    listed = json.loads((archive / "tuning.json").read_text())["candidates"]
    assert [each["runtime"] for each in listed if "excluded" in each] == ["mnn", "onnxruntime"]


@pytest.mark.parametrize("value", [float("nan"), None])
def test_a_runtime_that_fails_later(
    value: float | None, archive: Path, tiny_model: TinyModel, evaluation: Path, monkeypatch: pytest.MonkeyPatch
):
    right = OnnxRuntime.__call__

    def call(self, inputs):
        if self.settings.micro_batch not in run.MICRO_BATCHES:
            return right(self, inputs)  # while the graph is written
        if value is None:
            raise RuntimeError("out of memory")
        return [
            dict.fromkeys(("bag_probability", "segment_probabilities", "segment_attention"), torch.tensor(value))
        ] * len(inputs)

    monkeypatch.setattr(OnnxRuntime, "__call__", call)
    found = tuned(archive, tiny_model, evaluation, dry_run=True)
    wanted = [None, Candidate("onnxruntime", 1, 1, 2), Candidate("onnxruntime", 32, 1, 2)]
    assert [each.candidate for each in found.excluded] == wanted
    assert ("not a number" if value else "RuntimeError: out of memory") in found.excluded[1].reason


def test_eager_mode_has_to_run(archive: Path, tiny_model: TinyModel, evaluation: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(EagerRuntime, "__call__", fail)
    with pytest.raises(CheckFailedError, match="which the others are compared with, failed: RuntimeError: out of mem"):
        tuned(archive, tiny_model, evaluation)


def test_several_workers_at_once(archive: Path, tiny_model: TinyModel, evaluation: Path):
    found = tuned(archive, tiny_model, evaluation, workers=2, dry_run=True)
    assert {each.candidate.runtime for each in found.measured} == {"eager", "onnxruntime"}
    assert {(each.candidate.workers, each.candidate.threads) for each in found.measured} == {(2, 1)}
    assert (found.configuration["workers"], found.configuration["threads"]) == (2, 1)
    for each in found.measured:
        rows = int(found.about["workload"].split()[2])
        assert each.rows_per_s * each.seconds == pytest.approx(2 * rows)


def test_a_worker_that_ends(tmp_path: Path, archive: Path, capfd: pytest.CaptureFixture):
    folder = shutil.copytree(archive, tmp_path / "eager")
    (tmp_path / "no.wav").write_bytes(b"no recording")
    save_file(Definition.read(folder).build_network().state_dict(), folder / "weights.safetensors")
    setup = Setup({"eager": folder}, (tmp_path / "no.wav",), 1)
    ended = "worker 1 of 2 ended with exit code 1 while it loaded"
    with pytest.raises(CheckFailedError, match=ended), crew_of(2, setup):
        pass
    assert "no.wav cannot be read" in capfd.readouterr().err
    with pytest.raises(ValueError, match=r"no\.wav cannot be read"), crew_of(1, setup):
        pass


def test_the_command(archive: Path, tiny_model: TinyModel, evaluation: Path, tmp_path: Path):
    def called(*options: object, folder: Path = archive, evaluated: Path = evaluation):
        return call_skewless("tune", folder, "--checkpoint", tiny_model.checkpoint, "--evaluation", evaluated, *options)

    before = contents(archive)
    done = called("--workers", 1, "--rounds", 1, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert (printed["written"], len(printed["candidates"]), printed["rounds"]) == ([], 5, 1)
    assert "tuning" in done.stderr

    done = called("--workers", 3)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--workers is 3, expected at most 2" in done.stderr
    done = called(evaluated=tmp_path)
    assert (done.returncode, "there is no" in done.stderr) == (2, True)

    # An evaluation whose figures are not this network's.
    other = shutil.copytree(evaluation, tmp_path / "other")
    entries = json.loads((other / "references" / "references.json").read_text())
    entries[0]["scores"][0] += 0.01
    (other / "references" / "references.json").write_text(json.dumps(entries))
    done = called("--workers", 1, "--rounds", 1, evaluated=other)
    assert (done.returncode, done.stdout) == (1, "")
    assert "eager gives the references other scores than the evaluation recorded, by 1.0e-02" in done.stderr

    reduced = shutil.copytree(archive, tmp_path / "reduced")
    text = (reduced / "model.yaml").read_text()
    (reduced / "model.yaml").write_text(text.replace("{eager: {", "{onnxruntime: {precision: int8, "))
    done = called(folder=reduced)
    assert (done.returncode, "only fp32 is measured" in done.stderr) == (2, True)
    assert contents(archive) == before


MODEL = """\
# The network.
network: {mlp: {inputs: 37}}
runtime: {eager: {micro_batch: 32}}   # what executes it
postprocess: {label_threshold: {classes: [poor, good]}}
precision: {tf32: false, threads: 0}
limits: {}
"""
SERVER = "# Workers.\nminWorkers: 1\nmaxWorkers: 4   # at most\nbatchSize: 8\n"
CHOSEN = {"mnn": {"micro_batch": 4, "absorb": ["replicate", "standardize"]}}


def rewritten(folder: Path, model: str = MODEL, server: str = SERVER) -> tuple[str, str]:
    (folder / "model.yaml").write_bytes(model.encode())
    (folder / "model-config.yaml").write_bytes(server.encode())
    model, server = configuration.rewritten(folder, CHOSEN, 2, 3).values()
    return model, server


def test_only_the_values_change(tmp_path: Path):
    model, server = rewritten(tmp_path)
    line = "runtime: {mnn: {micro_batch: 4, absorb: [replicate, standardize]}}   # what executes it"
    assert model == MODEL.replace("runtime: {eager: {micro_batch: 32}}   # what executes it", line).replace(
        "threads: 0", "threads: 2"
    )
    assert server == "# Workers.\nminWorkers: 3\nmaxWorkers: 3   # at most\nbatchSize: 8\n"
    assert rewritten(tmp_path, model, server) == (model, server)
    windows = rewritten(tmp_path, MODEL.replace("\n", "\r\n"), SERVER.replace("\n", "\r\n"))
    assert windows == (model.replace("\n", "\r\n"), server.replace("\n", "\r\n"))


def test_other_layouts(tmp_path: Path):
    block = MODEL.replace(
        "runtime: {eager: {micro_batch: 32}}   # what executes it", "runtime:\n  eager:\n    micro_batch: 8\n"
    )
    block = block.replace("precision: {tf32: false, threads: 0}", "precision:\n  tf32: false\n\n# Of a request.")
    model, server = rewritten(tmp_path, block.replace("# Of a request.", ""), "batchSize: 8")
    content = yaml.safe_load(model)
    assert content["runtime"] == CHOSEN and content["precision"] == {"tf32": False, "threads": 2}
    assert {**content, "runtime": 0, "precision": 0} == {**yaml.safe_load(block), "runtime": 0, "precision": 0}
    assert server == "batchSize: 8\nminWorkers: 3\nmaxWorkers: 3\n"
    for name in ("runtime", "precision"):
        at = "    micro_batch: 8\n" if name == "runtime" else "  tf32: false\n"
        with pytest.raises(UsageError, match=rf"comment stands inside the value of {name}"):
            rewritten(tmp_path, block.replace("# Of a request.", "").replace(at, at + "  # mine\n"))
    with pytest.raises(UsageError, match="minWorkers cannot be replaced without touching other lines"):
        rewritten(tmp_path, MODEL, "{batchSize: 8}")
    with pytest.raises(UsageError, match="is not YAML"):
        rewritten(tmp_path, MODEL, "a: [")
    (tmp_path / "model-config.yaml").unlink()
    with pytest.raises(UsageError, match=r"there is no .*model-config\.yaml"):
        configuration.rewritten(tmp_path, CHOSEN, 2, 3)


def test_files_appear_together_or_not_at_all(tmp_path: Path):
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text("old")
    with pytest.raises(UnicodeEncodeError):
        configuration.write({tmp_path / "a.yaml": "new", tmp_path / "b.yaml": "\ud800"}, tmp_path / "t.json", {})
    assert contents(tmp_path) == {"a.yaml": b"old", "b.yaml": b"old"}


@pytest.mark.parametrize(
    ("files", "quota", "cores"),
    [
        ({}, None, 8),
        # Version 2; in a container, the topmost folder is its own group.
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2.0, 2),
        ({"sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2.5, 2),
        ({"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5, 1),
        ({"sys/fs/cgroup/cpu.max": "1600000 100000\n"}, 16.0, 8),
        # The own group or one around it, the smaller of them.
        (
            {
                "proc/self/cgroup": "0::/a.slice/b.service\n",
                "sys/fs/cgroup/a.slice/cpu.max": "300000 100000",
                "sys/fs/cgroup/a.slice/b.service/cpu.max": "400000 100000",
                "sys/fs/cgroup/other/cpu.max": "100000 100000",
            },
            3.0,
            3,
        ),
        # Version 1; -1: no limit.
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, None, 8),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 4.0, 4),
        (
            {
                "proc/self/cgroup": "4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n0::/y\n",
                "sys/fs/cgroup/cpu/docker/x/cpu.cfs_quota_us": "150000",
                "sys/fs/cgroup/cpu/docker/x/cpu.cfs_period_us": "50000",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            3.0,
            3,
        ),
    ],
)
def test_cores(files: dict[str, str], quota: float | None, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert (cpu_quota(tmp_path), available_cores(tmp_path)) == (quota, cores)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3})
    assert available_cores(tmp_path) == 1


def test_threads_are_no_more_than_the_cores_that_may_be_used(monkeypatch: pytest.MonkeyPatch):
    def threads(wanted: int, has: int, cores: int) -> int:
        monkeypatch.setattr(numerics, "available_cores", lambda: cores)
        torch.set_num_threads(has)
        NumericPolicy(threads=wanted).apply()
        return torch.get_num_threads()

    assert threads(0, has=4, cores=2) == 2
    assert threads(0, has=1, cores=2) == 1
    assert threads(3, has=1, cores=2) == 3
    reported = NumericPolicy().report(torch.device("cpu"))
    assert (reported["threads"], reported["num_threads"], reported["available_cores"]) == (0, 3, 2)
