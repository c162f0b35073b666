"""Weights that no training left are refused, and a layer that is rightly so is accepted by name and recorded."""

from __future__ import annotations

import csv
import json
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from skewless.core.definition import Definition
from skewless.core.networks import Network
from skewless.errors import BuildError
from skewless.evaluation.evaluate import evaluate
from skewless.evaluation.scores import service_of
from skewless.importers.run import ImportRequest, import_file
from skewless.importers.weights import network_from
from skewless.packaging.build import build_archive
from skewless.packaging.probes import network_inputs
from skewless.scaffold import create
from skewless.training.checkpoint import CheckpointError, file_digest, load_checkpoint, save_checkpoint
from skewless.training.config import Config
from skewless.training.fit import fit
from skewless.training.manifest import read_manifest
from skewless.training.untrained import MIN_OUTPUT_RANGE, UntrainedError, require_trained, untrained_layers
from tests.conftest import ROOT
from tests.degenerate import KINDS, Weights, degenerate
from tests.tiny_model import TinyModel, recording, tiny_model  # noqa: F401

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Measured:
    """A checkpoint whose last layer has a bias of 0, accepted when it was imported, and its evaluation."""

    archive: Path
    checkpoint: Path
    evaluation: Path


def weights_without_bias(model: TinyModel, folder: Path) -> Path:
    weights = load_checkpoint(model.checkpoint)["model_state_dict"]
    torch.save(weights | {"output.bias": torch.zeros(1)}, folder / "old.pth")
    return folder / "old.pth"


@pytest.fixture(scope="module")
def measured(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Measured:  # noqa: F811
    folder = tmp_path_factory.mktemp("measured")
    old, new = weights_without_bias(tiny_model, folder), folder / "new.pth"
    request = ImportRequest(tiny_model.archive, old, new, tiny_model.archive / "pipeline.yaml", ("tone", "noise"))
    with pytest.raises(
        UntrainedError, match=r"layer 'output' has a bias of exactly 0 .*\n.*--accept-untrained output$"
    ):
        import_file(request)
    assert not new.exists()
    import_file(replace(request, accept_untrained=["output"]))
    rows = read_manifest(tiny_model.manifest, tiny_model.manifest.parent, tiny_model.definition.classes)
    evaluate(tiny_model.definition, load_checkpoint(new), new, rows, "test", folder / "evaluation", CPU)
    return Measured(tiny_model.archive, new, folder / "evaluation")


def test_what_was_accepted_at_import_is_accepted_by_the_build(measured: Measured, tmp_path: Path):
    built = build_archive(measured.archive, measured.checkpoint, measured.evaluation, "1.0", tmp_path)
    with zipfile.ZipFile(built.path) as archive:
        assert json.loads(archive.read("metrics.json"))["accepted_untrained"] == ["output"]
        assert "Accepted by whoever imported or built it, although they look untrained: `output`." in (
            archive.read("MODEL_CARD.md").decode()
        )


def test_the_build_takes_names_too(measured: Measured, tmp_path: Path):
    checkpoint, evaluation = tmp_path / "edited.pth", measured.evaluation
    save_checkpoint(checkpoint, load_checkpoint(measured.checkpoint) | {"accepted_untrained": []})
    metrics = evaluation / "metrics.json"
    before = metrics.read_text()
    metrics.write_text(json.dumps(json.loads(before) | {"checkpoint_sha256": file_digest(checkpoint)}))
    try:
        with pytest.raises(BuildError, match="layer 'output' has a bias of exactly 0 throughout"):
            build_archive(measured.archive, checkpoint, evaluation, "1.0", tmp_path)
        with pytest.raises(BuildError, match=r"layer project is to be accepted, .*; these do: output"):
            build_archive(measured.archive, checkpoint, evaluation, "1.0", tmp_path, accept_untrained=["project"])
        assert [p.name for p in tmp_path.iterdir()] == ["edited.pth"]
        built = build_archive(measured.archive, checkpoint, evaluation, "1.0", tmp_path, accept_untrained=["output"])
    finally:
        metrics.write_text(before)
    with zipfile.ZipFile(built.path) as archive:
        assert json.loads(archive.read("metrics.json"))["accepted_untrained"] == ["output"]


@pytest.fixture
def rows(tmp_path: Path):
    names = []
    for number, split in enumerate(["train"] * 8 + ["val"] * 4):
        (tmp_path / f"{number}.wav").write_bytes(recording(number % 2, seed=number))
        names.append((f"{number}.wav", number % 2, split))
    with open(tmp_path / "manifest.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file_path", "label", "split"), *names])
    return read_manifest(tmp_path / "manifest.csv", tmp_path)


@pytest.mark.parametrize(("trained", "accepted"), [("head", ["body"]), ("all", [])])
def test_training_accepts_an_encoder_that_it_leaves_as_it_was_drawn(rows, tmp_path: Path, trained: str, accepted: list):
    definition = Definition.read(create("mine", tmp_path))
    config = Config(epochs=2, batch_size=4, trained=trained, augmentation=False)
    checkpoint = fit(rows, definition, config, tmp_path / "run", cache_dir=tmp_path / "cache", device=CPU)
    assert checkpoint["accepted_untrained"] == accepted
    network = definition.build_network()
    network.load_state_dict(checkpoint["model_state_dict"])
    assert [finding.layer for finding in untrained_layers(network).findings] == accepted


# --- weights of every kind that nobody evaluated


@dataclass(frozen=True)
class Stepped:
    """An archive's folder, and its network's weights after one step of training on what its pipeline gives for generated
    files. last: the layer that the answer comes out of."""

    folder: Path
    weights: Weights
    last: str


def after_one_step(folder: Path, last: str) -> Stepped:
    definition = Definition.read(folder)
    torch.manual_seed(0)
    network = definition.build_network().train()
    x = torch.cat(list(network_inputs(definition.pipeline)))
    logits = network.logits(network.encode(x))
    ((torch.arange(len(x)) % 2) * logits[:, -1]).mean().backward()
    torch.optim.AdamW(network.parameters(), lr=1e-3).step()
    return Stepped(folder, network.state_dict(), last)


def fastai_names(weights: Weights) -> dict[str, torch.Tensor]:
    """By position, as fastai's cnn_learner names them."""
    body = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    renamed = {}
    for name, value in weights.items():
        part, layer, rest = name.split(".", 2)
        position = f"0.{body[layer]}" if part == "backbone" else f"1.{int(layer) + 2}"
        renamed[f"{position}.{rest}"] = value
    return renamed


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Stepped:
    return after_one_step(create("small", tmp_path_factory.mktemp("small")), "classifier")


@pytest.fixture(scope="module")
def fastai() -> Stepped:
    return after_one_step(ROOT / "archive" / "orca", "classifier.6")


def imported(stepped: Stepped, weights: Weights, folder: Path) -> None:
    named = fastai_names(weights) if stepped.last == "classifier.6" else dict(weights)
    torch.save(named, folder / "old.pth")
    classes = Definition.read(stepped.folder).classes
    pipeline = stepped.folder / "pipeline.yaml"
    import_file(ImportRequest(stepped.folder, folder / "old.pth", folder / "new.pth", pipeline, classes))


@pytest.mark.parametrize("names", ["small", "fastai"])
def test_trained_weights_pass(names: str, request: pytest.FixtureRequest, tmp_path: Path):
    stepped = request.getfixturevalue(names)
    imported(stepped, stepped.weights, tmp_path)
    assert load_checkpoint(tmp_path / "new.pth")["accepted_untrained"] == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", ["small", "fastai"])
def test_degenerate_weights_are_refused(names: str, kind: str, request: pytest.FixtureRequest, tmp_path: Path):
    stepped = request.getfixturevalue(names)
    with pytest.raises(CheckpointError, match=KINDS[kind][1]):
        imported(stepped, degenerate(kind, stepped.weights, stepped.last), tmp_path)
    assert not (tmp_path / "new.pth").exists()


def test_many_layers_of_one_kind_are_counted(fastai: Stepped):
    network = network_from(degenerate("all 0", fastai.weights, ""), Definition.read(fastai.folder))
    layers = sum(isinstance(layer, nn.Conv2d | nn.Linear) for layer in network.modules())
    with pytest.raises(UntrainedError) as error:
        require_trained(network)
    lines = str(error.value).splitlines()
    assert sum(line.endswith("has weights that are all 0") for line in lines) == 5
    assert f"  and {layers - 5} more layers alike" in lines
    with pytest.raises(UntrainedError, match=rf"these do: backbone.conv1, .* and {layers - 5} more$"):
        require_trained(network, ["x"])


def test_what_cannot_be_computed_with_is_refused_wherever_a_checkpoint_is_used(tiny_model: TinyModel):  # noqa: F811
    """In a checkpoint of one's own training, too, and whoever accepts it."""
    checkpoint = load_checkpoint(tiny_model.checkpoint)
    checkpoint["model_state_dict"]["output.bias"][0] = float("inf")
    with pytest.raises(CheckpointError, match=r"output.bias has 1 of 1 values that are NaN or infinite"):
        service_of(tiny_model.definition, checkpoint, CPU)


# --- the outputs


class Answering(Network):
    """Rows `(N, 4)` to a logit each, `gain` times their mean, and to attention, which depends on their number alone."""

    def __init__(self, gain: float = 1.0, bias: float = 0.8):
        super().__init__()
        self.output = nn.Linear(4, 1)
        nn.init.constant_(self.output.bias, bias)
        with torch.no_grad():
            self.output.weight.copy_(gain * torch.tensor([[0.9, -0.6, 0.3, 1.2]]))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def head(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        probability = torch.sigmoid(self.output(features)[:, 0])
        return {"probability": probability.mean(), "attention": torch.full_like(probability, 1 / len(probability))}


INPUTS = [torch.eye(4)[:1], torch.eye(4)[1:], 3 * torch.eye(4)]


def test_outputs_that_hardly_vary_are_refused_unless_accepted():
    assert require_trained(Answering(), inputs=INPUTS) == []
    flat = Answering(gain=1e-4)
    with pytest.raises(
        UntrainedError,
        match=rf"\n  outputs: .* for 3 generated files .* apart, .* expected {MIN_OUTPUT_RANGE} or more\n.*"
        "--accept-untrained outputs$",
    ):
        require_trained(flat, inputs=INPUTS)
    (note,) = require_trained(flat, ["outputs"], inputs=INPUTS)
    assert note.startswith("accepted although it looks untrained: outputs: they hardly depend on the input")
    require_trained(flat, recorded=["outputs"], inputs=INPUTS)
    with pytest.raises(UntrainedError, match="layer outputs is to be accepted, but does not look untrained; none does"):
        require_trained(Answering(), ["outputs"], inputs=INPUTS)


def test_probabilities_near_0_are_told_apart():
    """A trained network may be sure of all generated files: 1e-13 and 4e-13 are different answers."""
    assert require_trained(Answering(bias=-29.0), inputs=INPUTS) == []


def test_outputs_that_are_not_finite_cannot_be_accepted():
    class Dividing(Answering):
        def head(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logit": self.output(features) / (features - features)}

    with pytest.raises(UntrainedError, match="outputs: logit is NaN or infinite for a generated file") as error:
        require_trained(Dividing(), ["outputs"], inputs=INPUTS)
    assert "--accept-untrained" not in str(error.value)


def test_a_network_that_does_not_take_the_input_is_an_error():
    with pytest.raises(
        CheckpointError, match=r"does not take what the pipeline gives, \(2, 5\): .*; give the pipeline"
    ):
        require_trained(Answering(), inputs=[torch.ones(2, 5), torch.zeros(2, 5)])


def test_too_few_inputs_are_said():
    note = "the network was not tried: the pipeline makes 1 different inputs of the generated files"
    assert note in require_trained(Answering(gain=0.0), ["output"], inputs=[*INPUTS[:1] * 3, torch.ones(0, 4)])


def test_accepted_outputs_are_recorded(tiny_model: TinyModel, tmp_path: Path):  # noqa: F811
    weights = load_checkpoint(tiny_model.checkpoint)["model_state_dict"]
    weights["output.weight"] *= 1e-6
    torch.save(weights, tmp_path / "old.pth")
    pipeline = tiny_model.archive / "pipeline.yaml"
    request = ImportRequest(tiny_model.archive, tmp_path / "old.pth", tmp_path / "new.pth", pipeline, ("tone", "noise"))
    with pytest.raises(UntrainedError, match="outputs: they hardly depend on the input"):
        import_file(request)
    import_file(replace(request, accept_untrained=["outputs"]))
    assert load_checkpoint(tmp_path / "new.pth")["accepted_untrained"] == ["outputs"]


# --- what is sound


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "convnext_tiny", "shufflenet_v2_x0_5"])
def test_torchvisions_networks_pass_after_one_step(name: str):
    torch.manual_seed(0)
    network = torchvision.models.get_model(name, weights=None).train()
    assert untrained_layers(network).findings
    nn.functional.cross_entropy(network(torch.randn(2, 3, 64, 64)), torch.tensor([0, 1])).backward()
    torch.optim.SGD(network.parameters(), lr=1e-3).step()
    assert untrained_layers(network).findings == ()


def test_residual_branches_that_start_at_0_pass():
    torch.manual_seed(0)
    network = torchvision.models.resnet50(zero_init_residual=True).train()
    for _ in range(2):
        nn.functional.cross_entropy(network(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
        torch.optim.SGD(network.parameters(), lr=1e-3).step()
    # As after a long training: both signs, where the scales started at 0.
    assert (network.layer1[0].bn3.weight < 0).any() and (network.layer1[0].bn3.weight > 0).any()
    assert untrained_layers(network).findings == ()


def normalised(*scale: float) -> nn.Sequential:
    """Four layers with normalisations, trained; their scales drawn from N(mean, deviation)."""
    torch.manual_seed(0)
    made = nn.Sequential(*(part for _ in range(4) for part in (nn.Linear(32, 32), nn.BatchNorm1d(32))))
    for layer in made[1::2]:
        nn.init.normal_(layer.weight, *scale)
        nn.init.normal_(layer.bias)
        nn.init.normal_(layer.running_mean)
    return made


def test_scales_around_0_are_refused_and_frozen_ones_are_not():
    with pytest.raises(UntrainedError, match="layer 'network' has scales around 0 in every normalisation"):
        require_trained(normalised(0.0, 0.02))
    network = normalised(1.0, 0.3)
    nn.init.normal_(network[1].weight, 0.0, 0.1)  # one residual branch
    nn.init.ones_(network[3].weight)  # frozen
    require_trained(network)


def test_layers_of_one_spread_are_noted():
    notes = "all layers of network spread their weights alike (standard deviation 0.02), as if drawn at random"
    network = normalised(1.0, 0.3)
    for layer in network[::2]:
        nn.init.normal_(layer.weight, 0.0, 0.02)
    assert require_trained(network) == [notes]
    with torch.no_grad():
        network[0].weight *= 1.5
    assert require_trained(network) == []


def test_scales_of_0_are_noted():
    network = normalised(1.0, 0.3)
    nn.init.zeros_(network[1].weight)
    assert "scales are all 0, so that nothing of the input comes through, in 1" in require_trained(network)


@pytest.mark.parametrize(
    "layer",
    [
        nn.LayerNorm((4, 5)),
        nn.BatchNorm2d(3),
        nn.PReLU(8),
        nn.ParameterDict({"layer_scale": torch.full((8, 1, 1), 1e-6)}),
        nn.ParameterDict({"class_token": torch.zeros(1, 1, 8)}),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_scale_or_a_token_may_be_constant(layer: nn.Module):
    assert not any("weights that are all" in str(f) for f in untrained_layers(nn.Sequential(layer)).findings)


@pytest.mark.parametrize(
    "layer", [nn.Linear(9, 1), nn.Conv2d(1, 1, 3), nn.Embedding(3, 4), nn.MultiheadAttention(4, 2)]
)
@pytest.mark.parametrize("number", [0.0, 1.0, -3.5])
def test_a_kernel_may_not_be_constant(layer: nn.Module, number: float):
    for name, parameter in layer.named_parameters():
        if "weight" in name:
            nn.init.constant_(parameter, number)
    found = [str(finding) for finding in untrained_layers(nn.Sequential(layer)).findings]
    assert f"layer '0' has weights that are all {number:g}" in found
