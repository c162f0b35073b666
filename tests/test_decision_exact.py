"""Decision-exact archives: every decision is the exact network's, and every answer says which network gave it."""

from __future__ import annotations

import json
import random
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
import yaml
from jsonschema import Draft202012Validator

from benchmarks import cascade as cascade_benchmark
from skewless.core.cascade import Cascade, apart
from skewless.core.definition import MODEL, Definition
from skewless.core.errors import DefinitionError
from skewless.core.postprocess import build_postprocessor
from skewless.core.request import Limits, Request
from skewless.core.runtimes import RuntimeSettings
from skewless.core.selftest import SelfTestError
from skewless.core.service import METRICS, ModelService
from skewless.core.stages import Signal
from skewless.errors import BuildError
from skewless.evaluation.evaluate import evaluate
from skewless.packaging import decision_exact
from skewless.packaging.build import build_archive
from skewless.packaging.decision_exact import DecisionExact, conformal_margin, summary
from skewless.packaging.execution import Execution
from skewless.schema import schemas
from skewless.torchserve import smoke
from skewless.training.checkpoint import load_checkpoint
from skewless.training.manifest import Recording, read_manifest
from tests.recordings import one_thread  # noqa: F401
from tests.tiny_model import COUGH, NETWORK, TinyModel, make

CPU = torch.device("cpu")
SOME = [Recording("a.wav", Path("a.wav"), 0, "test"), Recording("b.wav", Path("b.wav"), 0, "train")]

BAG = {"bag_threshold": {"threshold": 0.5, "positive_field": "hissing", "classes": ["tone", "noise"]}}
LABEL = {"label_threshold": {"threshold": 0.5, "positive_field": "noisy", "classes": ["tone", "noise"]}}
VOTE = {
    "seconds_vote": {"threshold": 0.5, "min_positive_s": 2, "positive_field": "noisy", "classes": ["tone", "noise"]}
}
THREE = {"class_probabilities": {"classes": ["a", "b", "c"], "threshold": 0.5}}


# Margins.


@pytest.mark.parametrize(
    ("n", "confidence", "rank", "reached"),
    [
        (9, 0.9, 9, 0.9),
        (99, 0.9, 90, 0.9),
        (100, 0.9, 91, 0.9),
        (999, 0.999, 999, 0.999),
        (1999, 0.999, 1998, 0.999),
        (24, 0.999, 24, 0.96),
        (1, 0.9, 1, 0.5),
    ],
)
def test_the_margin_is_an_order_statistic(n: int, confidence: float, rank: int, reached: float):
    differences = [k / 1000 for k in range(1, n + 1)]
    random.Random(0).shuffle(differences)
    margin = conformal_margin(differences, confidence, 2.0)
    assert (margin["rank"], margin["order_statistic"]) == (rank, rank / 1000)
    assert margin["value"] == 2 * rank / 1000
    assert margin["confidence"] == pytest.approx(reached)
    assert margin["recordings"] == n


def test_the_margin_covers_as_often_as_it_says():
    """Without the safety factor: of new differences from the same source at least so many are within it."""
    generator = random.Random(1)
    covered = 0
    for _ in range(4000):
        *seen, new = (generator.expovariate(1) for _ in range(20))
        covered += new <= conformal_margin(seen, 0.9, 1.0)["value"]
    assert 0.885 <= covered / 4000 <= 0.915


def test_no_margin_without_numbers():
    for differences in ([], [0.1, float("nan")], [float("inf")]):
        with pytest.raises(BuildError, match="a number for every validation recording"):
            conformal_margin(differences, 0.9, 2.0)
    assert apart((0.1, float("nan")), (0.1, 0.5)) == float("inf")
    assert apart((0.25, 0.5), (0.5, 0.25)) == 0.25


def test_a_confidence_that_is_not_reached_is_said():
    figures = {"recordings": 24, "repeated": 0.125, "flips": 0, "split": "test"}
    few = {"margin": conformal_margin([0.01] * 24, 0.999, 2.0), "measured": figures}
    first, second = summary(few)
    assert "margin 0.0200, 2 times the largest |dp| of the 24 validation recordings (confidence 0.96)" in first
    assert "12.5 % are run by both networks, and 0 decisions differ" in first
    assert "for 0.999 there have to be 999" in second
    assert len(summary(few | {"margin": conformal_margin([0.01] * 999, 0.999, 2.0)})) == 1


# Decisions.


def cases(names: int, generator: random.Random) -> tuple[tuple[float, ...], float, float]:
    """Scores, a threshold and a margin; often on a grid, where differences are exactly the margin."""
    grid = generator.random() < 0.5
    value = (lambda: generator.randrange(0, 33) / 32) if grid else generator.random
    scores = tuple(value() for _ in range(names))
    return scores, value(), generator.choice((0.0, 1 / 32, 0.1, 0.3)) if grid else generator.random() / 4


def decided(postprocessor, scores: tuple[float, ...], threshold: float) -> tuple[int, bool]:
    chosen = postprocessor.choose(scores, threshold)
    return chosen, len(scores) > 1 and scores[chosen] >= threshold


@pytest.mark.parametrize("definition", [BAG, LABEL, VOTE, THREE], ids=lambda d: next(iter(d)))
def test_no_movement_within_the_margin_changes_a_settled_decision(definition: dict[str, Any]):
    postprocessor, generator = build_postprocessor(definition), random.Random(2)
    count = 3 if definition is THREE else 1
    settled = 0
    for _ in range(5000):
        scores, threshold, margin = cases(count, generator)
        if not postprocessor.settled(scores, threshold, margin):
            continue
        settled += 1
        moves = [*product((-margin, 0.0, margin), repeat=count)]
        moves += [tuple(generator.uniform(-margin, margin) for _ in scores) for _ in range(5)]
        for move in moves:
            moved = tuple(score + by for score, by in zip(scores, move, strict=True))
            expected = decided(postprocessor, scores, threshold)
            assert decided(postprocessor, moved, threshold) == expected, (scores, moved, threshold, margin)
    assert 500 < settled < 5000


@pytest.mark.parametrize("definition", [BAG, THREE], ids=lambda d: next(iter(d)))
def test_what_is_not_settled_could_change(definition: dict[str, Any]):
    """Not more is repeated than has to be: on the margin's ends, a hair's breadth further, a decision is another."""
    postprocessor, generator = build_postprocessor(definition), random.Random(3)
    count = 3 if definition is THREE else 1
    open_ = 0
    for _ in range(3000):
        scores, threshold, margin = cases(count, generator)
        if postprocessor.settled(scores, threshold, margin):
            continue
        open_ += 1
        far = margin + 1e-12
        moved = [
            tuple(s + by for s, by in zip(scores, move, strict=True)) for move in product((-far, far), repeat=count)
        ]
        assert len({decided(postprocessor, each, threshold) for each in [scores, *moved]}) > 1
    assert open_ > 100


def test_what_is_no_number_is_not_settled():
    for scores, found in (((float("nan"),), BAG), ((0.9, float("nan"), 0.0), THREE), ((float("nan"), 0.9, 0.0), THREE)):
        assert not build_postprocessor(found).settled(scores, 0.5, 0.01)


# The service.


class Fixed:
    """A runtime that gives each recording, whose rows all hold its number, a probability from a list."""

    def __init__(self, name: str, tier: str, probabilities: Sequence[float]):
        self.name, self.tier, self.precision = name, tier, {"exact": "fp32", "reduced": "int8"}[tier]
        self.tolerance, self.device, self.settings = 0.02, CPU, RuntimeSettings(micro_batch=4)
        self.probabilities, self.asked, self.rows_at_once = probabilities, [], 4

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        numbers = [int(rows[0, 0]) for rows in inputs]
        self.asked += numbers
        return [{"probability": torch.tensor(self.probabilities[n], dtype=torch.float64)} for n in numbers]


EXACT = [0.10, 0.48, 0.52, 0.90, 0.62]
FAST = [0.12, 0.51, 0.50, 0.88, 0.59]


@pytest.fixture
def service() -> ModelService:
    """Five recordings; the file of each is its number."""
    exact, fast = Fixed("mnn", "exact", EXACT), Fixed("openvino", "reduced", FAST)
    postprocessor = build_postprocessor(LABEL)
    prepared = SimpleNamespace(run=lambda payload, **limits: Signal(torch.full((2, 3), float(payload))))
    definition = SimpleNamespace(
        postprocessor=postprocessor,
        prepared=prepared,
        limits=Limits(),
        pipeline=SimpleNamespace(fingerprint="f"),
    )
    metrics = {"model_version": "1.0", "threshold": 0.5}
    return ModelService(definition, exact, metrics, cascade=Cascade(fast, exact, postprocessor, 0.05))  # type: ignore[arg-type]


def test_every_decision_is_the_exact_networks(service: ModelService):
    for threshold in [None, *(k / 50 for k in range(51))]:
        answers = service.predict([Request(str(n).encode(), threshold) for n in range(5)])
        for number, answer in enumerate(answers):
            at = 0.5 if threshold is None else threshold
            assert answer.body["noisy"] is (EXACT[number] > at), (number, at)
            repeated = abs(FAST[number] - at) <= 0.05
            given = ("mnn", "fp32", "exact", EXACT) if repeated else ("openvino", "int8", "reduced", FAST)
            if abs(abs(FAST[number] - at) - 0.05) > 1e-9:
                *said, probabilities = given
                assert [answer.body[key] for key in ("runtime", "precision", "tier")] == said
                assert answer.body["probability"] == probabilities[number]


def test_a_requests_own_threshold_asks_the_exact_network(service: ModelService):
    assert service.cascade is not None
    exact = service.cascade.exact
    (far,) = service.predict([Request(b"3")])
    assert (far.body["runtime"], exact.asked) == ("openvino", [])
    (near,) = service.predict([Request(b"3", 0.89)])
    assert (near.body["runtime"], near.body["noisy"], exact.asked) == ("mnn", True, [3])
    exact.asked.clear()
    answers = service.predict([Request(b"3"), Request(b"0", 0.1), Request(b"1"), Request(b"0")])
    assert [a.body["runtime"] for a in answers] == ["openvino", "mnn", "mnn", "openvino"]
    assert sorted(exact.asked) == [0, 1]


def test_scores_are_the_exact_networks(service: ModelService):
    assert [scored.scores for scored in service.score([b"0", b"3"])] == [(EXACT[0],), (EXACT[3],)]
    assert service.tier == "decision-exact"
    assert replace(service, cascade=None).tier == "exact"


def test_outputs_that_cannot_be_scored_are_left_to_the_exact_network(service: ModelService):
    assert service.cascade is not None
    whole = service.cascade.fast.probabilities
    service.cascade.fast.probabilities = [[0.1, 0.2], *whole[1:]]  # a probability that is two
    answers = service.predict([Request(b"0"), Request(b"3")])
    assert [(a.status, a.body["runtime"]) for a in answers] == [(200, "mnn"), (200, "openvino")]


# Definitions.


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"onnxruntime": {"precision": "int8"}},
            r"absorb is \[\], expected the runtime's \['replicate', 'standardize'\]",
        ),
        ({"onnxruntime": {"absorb": ["replicate", "standardize"]}}, "expected fp32 and a reduced precision"),
        ({"onnxruntime": {"precision": "int4"}}, "precision is 'int4'"),
        ({"eager": {"precision": "int8"}}, "expected one of fp32"),
        ({"tensorflow": {}}, "unknown runtime 'tensorflow'"),
        ({}, "expected one 'name"),
        (None, "expected one 'name"),
    ],
)
def test_a_wrong_fast_runtime_is_refused(tmp_path: Path, entry: Any, message: str):
    content = yaml.safe_load((COUGH / MODEL).read_text())
    for name in ("pipeline.yaml",):
        (tmp_path / name).write_text((COUGH / name).read_text())
    (tmp_path / MODEL).write_text(yaml.safe_dump(content | {"fast_runtime": entry}))
    with pytest.raises(DefinitionError, match=message):
        Definition.read(tmp_path)


def test_the_schema_knows_the_fast_runtime():
    validator = Draft202012Validator(schemas()["model"])
    content = yaml.safe_load((COUGH / MODEL).read_text())
    right = {"openvino": {"precision": "int8", "absorb": ["replicate", "standardize"]}}
    assert validator.is_valid(content | {"fast_runtime": right})
    assert not validator.is_valid(content | {"fast_runtime": {"openvino": {"precison": "int8"}}})
    assert not validator.is_valid(content | {"fast_runtme": right})


def test_what_proves_nothing_is_refused():
    fast = Execution("onnxruntime", "int8", SOME, "test", SOME)
    for arguments, message in [
        ((replace(fast, precision="fp32"),), "expected a reduced precision"),
        ((replace(fast, split="val"),), "--split is val"),
        ((fast, 1.0), "confidence is 1.0"),
        ((fast, 0.99, 0.5), "safety factor is 0.5"),
        ((fast, 0.99, float("nan")), "safety factor is nan"),
    ]:
        with pytest.raises(BuildError, match=message):
            DecisionExact(*arguments)


# Archives, of a small network with two convolutions.

CONVOLUTIONS = NETWORK.replace(
    "        self.project = nn.Linear(8 * 8, 4)",
    "        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1))\n"
    "        self.project = nn.Linear(8 * 8, 4)",
).replace("nn.functional.adaptive_avg_pool2d(x[:, 0], 8)", "nn.functional.avg_pool2d(self.body(x[:, :1]), 28)")


@dataclass(frozen=True)
class Made:
    model: TinyModel
    evaluation: Path
    recordings: list[Recording]

    def build(self, out: Path, **changed: Any) -> Path:
        fast = Execution("onnxruntime", "int8", self.recordings, "test", self.recordings)
        both = DecisionExact(fast, **changed)
        archive, checkpoint = self.model.archive, self.model.checkpoint
        return build_archive(archive, checkpoint, self.evaluation, "1.0", out, decision_exact=both).path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("decision_exact")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.tiny_model.NETWORK", CONVOLUTIONS)
        model = make(root)
    definition = model.definition
    recordings = read_manifest(model.manifest, model.manifest.parent, definition.classes)
    checkpoint = load_checkpoint(model.checkpoint)
    evaluate(definition, checkpoint, model.checkpoint, recordings, "test", root / "evaluation", CPU, references=4)
    return Made(model, root / "evaluation", recordings)


@pytest.fixture(scope="module")
def built(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.build(tmp_path_factory.mktemp("store"))


@pytest.fixture
def unpacked(built: Path, tmp_path: Path) -> Path:
    with zipfile.ZipFile(built) as archive:
        archive.extractall(tmp_path / "unpacked")
    return tmp_path / "unpacked"


def test_an_archive_carries_both_networks(unpacked: Path, made: Made):
    metrics = json.loads((unpacked / METRICS).read_text())
    fast = metrics["fast_runtime"]
    assert metrics["tier"] == "decision-exact"
    assert (metrics["runtime"]["name"], metrics["runtime"]["tier"]) == ("eager", "exact")
    assert (fast["name"], fast["precision"], fast["tier"]) == ("onnxruntime", "int8", "reduced")
    assert set(metrics["weights_sha256"]) == {"weights.safetensors", "fast/model.onnx"}
    margin, measured = fast["margin"], fast["measured"]
    assert (margin["recordings"], margin["split"], margin["safety_factor"]) == (6, "val", 2.0)
    assert margin["confidence"] == pytest.approx(6 / 7)
    assert margin["value"] == 2 * margin["order_statistic"] > 0
    assert (measured["recordings"], measured["beyond_margin"], measured["flips"]) == (6, 0, 0)
    assert measured["max_dp"] <= margin["value"]

    service = ModelService.load(unpacked, CPU)
    described = service.describe()
    assert described["tier"] == "decision-exact"
    assert described["fast_runtime"]["margin"] == margin["value"]
    assert 0 < service.self_test.max_dp_fast <= margin["value"]
    exact = replace(service, cascade=None)
    seen = set()
    for recording in made.recordings:
        payload = recording.path.read_bytes()
        (scored,) = exact.score([payload])
        for threshold in (None, scored.scores[0], max(0.0, scored.scores[0] - margin["value"]), 0.01, 0.99):
            (ours,), (theirs,) = (each.predict([Request(payload, threshold)]) for each in (service, exact))
            assert ours.body["hissing"] is theirs.body["hissing"]
            seen.add((ours.body["runtime"], ours.body["tier"]))
            if ours.body["tier"] == "exact":
                assert ours.body == theirs.body
    assert seen == {("eager", "exact"), ("onnxruntime", "reduced")}


def test_the_same_inputs_give_the_same_bytes(made: Made, built: Path, tmp_path: Path):
    assert made.build(tmp_path).read_bytes() == built.read_bytes()


def spoil(root: Path, **margin: float) -> None:
    metrics = json.loads((root / METRICS).read_text())
    metrics["fast_runtime"]["margin"] |= margin
    (root / METRICS).write_text(json.dumps(metrics))


def test_a_processor_that_exceeds_the_margin_is_refused(unpacked: Path):
    spoil(unpacked, value=1e-9)
    with pytest.raises(SelfTestError, match=r"'fast network' differs on .* from the exact network, allowed 0\.0000"):
        ModelService.load(unpacked, CPU)


def test_a_processor_on_which_the_fast_network_leaves_its_tier_is_refused(unpacked: Path, monkeypatch):
    from skewless.core.runtimes.onnx import OnnxRuntime

    right = OnnxRuntime.__call__
    # As saturating sums are: other numbers than where the archive was built.
    off = lambda self, inputs: [  # noqa: E731
        {k: (v + 0.03 if k == "bag_probability" else v) for k, v in each.items()} for each in right(self, inputs)
    ]
    monkeypatch.setattr(OnnxRuntime, "__call__", off)
    spoil(unpacked, value=1.0)
    with pytest.raises(SelfTestError, match=r"'fast network' differs on .* from evaluation, allowed 0\.0200"):
        ModelService.load(unpacked, CPU)


def test_a_fast_network_that_was_not_built_is_refused(unpacked: Path):
    graph = unpacked / "fast" / "model.onnx"
    whole = graph.read_bytes()
    other = onnx.load(graph)
    other.producer_name = "somebody else"
    onnx.save(other, graph)
    with pytest.raises(SelfTestError, match=r"not as built: fast/model.onnx has SHA-256"):
        ModelService.load(unpacked, CPU)
    graph.write_bytes(whole)
    metrics = json.loads((unpacked / METRICS).read_text())
    (unpacked / METRICS).write_text(json.dumps({k: v for k, v in metrics.items() if k != "fast_runtime"}))
    with pytest.raises(ValueError, match=r"metrics\.json has no margin"):
        ModelService.load(unpacked, CPU)


def test_the_build_refuses_networks_that_are_further_apart(made: Made, tmp_path: Path, monkeypatch):
    narrow = lambda differences, *settings: conformal_margin(differences, *settings) | {"value": 1e-9}  # noqa: E731
    monkeypatch.setattr(decision_exact, "conformal_margin", narrow)
    with pytest.raises(BuildError, match=r"on [1-6] of the 6 recordings of split 'test' the int8 network is further"):
        made.build(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_build_asks_for_what_it_needs(made: Made, tmp_path: Path):
    fast = Execution("onnxruntime", "int8", made.recordings, "test", made.recordings)
    arguments = (made.model.archive, made.model.checkpoint, made.evaluation, "1.0", tmp_path)
    with pytest.raises(BuildError, match="needs --references"):
        build_archive(*arguments, decision_exact=DecisionExact(fast), references="none")
    other = [r for r in made.recordings if r.split != "val"]
    with pytest.raises(BuildError, match=r"lacks 6 of the 6 recordings .* split 'val'"):
        build_archive(*arguments, decision_exact=DecisionExact(replace(fast, recordings=other)))
    assert not list(tmp_path.iterdir())


def test_the_benchmark_measures_both_networks(built: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(cascade_benchmark, "THRESHOLDS", (0.5,))
    table = cascade_benchmark.measure(built, None, 1, tmp_path)
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| 0")]
    assert [row[-1] for row in rows[:-1]] == ["0"] * (len(rows) - 1)
    assert len(rows) in (2, 3)
    with pytest.raises(ValueError, match="is not decision-exact"):
        cascade_benchmark.measure(without_fast(built, tmp_path / "single.mar"), None, 1, tmp_path / "single")


def without_fast(archive: Path, target: Path) -> Path:
    """The same archive with its exact network alone."""
    with zipfile.ZipFile(archive) as whole, zipfile.ZipFile(target, "w") as single:
        for name in whole.namelist():
            content = whole.read(name)
            if name == MODEL:
                content = yaml.safe_dump(
                    {k: v for k, v in yaml.safe_load(content).items() if k != "fast_runtime"}
                ).encode()
            single.writestr(name, content)
    return target


# OpenVINO, the runtime that such archives are for.


@pytest.fixture(scope="module")
def openvino_graphs(made: Made, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The small network in both precisions, its eager runtime, and inputs."""
    pytest.importorskip("openvino", reason="OpenVINO is an extra")
    from skewless.core.runtimes.eager import EagerRuntime
    from skewless.core.runtimes.openvino import OpenVinoRuntime
    from skewless.training.checkpoint import network_of

    network = network_of(load_checkpoint(made.model.checkpoint), made.model.definition)
    inputs = [made.model.definition.pipeline(each.path.read_bytes()) for each in made.recordings[:6]]
    inputs.append(torch.cat(inputs))
    runtimes = {"eager": EagerRuntime(network, CPU)(inputs), "inputs": inputs}
    for precision in ("fp32", "int8"):
        folder, settings = tmp_path_factory.mktemp(precision), RuntimeSettings(precision, micro_batch=4)
        OpenVinoRuntime.write(network, folder, settings, iter(inputs))
        runtimes[precision] = OpenVinoRuntime.load(folder, {}, CPU, settings)
        runtimes[f"{precision} whole"] = OpenVinoRuntime.load(folder, {}, CPU, RuntimeSettings(precision, 100))
    return runtimes


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", 1e-5), ("int8", 0.02)])
def test_openvino_gives_the_networks_numbers(openvino_graphs: dict[str, Any], precision: str, allowed: float):
    inputs, runtime = openvino_graphs["inputs"], openvino_graphs[precision]
    ours = runtime(inputs)
    worst = 0.0
    for mine, eager in zip(ours, openvino_graphs["eager"], strict=True):
        assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in eager.items()}
        worst = max(worst, float((mine["bag_probability"] - eager["bag_probability"]).abs()))
    assert worst <= allowed
    assert (worst > 1e-6) is (precision == "int8")
    # Again, in other company, and cut otherwise: the same, to the last bit.
    for other in (
        runtime(inputs),
        [runtime([each])[0] for each in inputs],
        openvino_graphs[f"{precision} whole"](inputs),
    ):
        for a, b in zip(ours, other, strict=True):
            if precision == "int8" or len(b["segment_probabilities"]) < 4:
                assert all(torch.equal(a[name], b[name]) for name in a)
            assert float((a["bag_probability"] - b["bag_probability"]).abs()) <= 1e-6
    assert runtime([]) == []


def test_openvino_says_where_it_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from skewless.core.runtimes.openvino import OpenVinoRuntime

    with pytest.raises(ValueError, match="computes on the CPU, not on device 'cuda'"):
        OpenVinoRuntime.load(tmp_path, {}, torch.device("cuda"), RuntimeSettings())
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ValueError, match=r"pip install 'skewless\[openvino\]'"):
        OpenVinoRuntime.load(tmp_path, {}, CPU, RuntimeSettings())
    with pytest.raises(ValueError, match="is written with openvino, onnx"):
        OpenVinoRuntime.write(torch.nn.Identity(), tmp_path, RuntimeSettings(), [])  # type: ignore[arg-type]


# The smoke test.


@pytest.mark.parametrize(
    ("tier", "off", "decision", "problems"),
    [
        ("reduced", 0.015, 0, []),
        ("exact", 0.015, 0, ["in tier 'exact', allowed 0.0001"]),
        ("reduced", 0.03, 0, ["in tier 'reduced', allowed 0.02"]),
        ("reduced", 0.015, 1, ["decided for"]),
        ("half", 0.0, 0, ["answered in tier 'half'"]),
    ],
)
def test_the_smoke_test_holds_each_answer_to_its_tier(
    built: Path, tier: str, off: float, decision: int, problems: list[str]
):
    references = smoke.References.from_archive(built)
    assert (references.tolerance, references.tiers) == (1e-4, {"exact": 1e-4, "reduced": 0.02})
    scores = {
        payload: entry["scores"][0] for payload, entry in zip(references.payloads, references.entries, strict=True)
    }

    def send(payload: bytes) -> SimpleNamespace:
        served = scores[payload] + off
        # Far from every score, so that none is a close call.
        body = {"file_probability": served, "threshold_used": 2.0, "hissing": bool(decision), "tier": tier}
        body |= {"model_version": "1.0", "pipeline_fingerprint": references.fingerprint}
        return SimpleNamespace(status=200, body=body, seconds=0.0)

    row = smoke._measure("path", send, references, "1.0", 1)
    assert row.passed is not bool(problems)
    for wanted in problems:
        assert all(wanted in problem for problem in row.problems)
