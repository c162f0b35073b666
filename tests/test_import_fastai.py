"""Residual networks under fastai's head: the same numbers as fastai's own layers and as a port's, by either one's weights, from
either kind of file."""

from __future__ import annotations

import csv
import os
import shutil
import struct
import zipfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
import yaml
from torch import nn

from skewless.core.definition import Definition
from skewless.core.networks import build_network
from skewless.core.networks.resnet_fastai import ResNetFastai
from skewless.core.numerics import TOLERANCES
from skewless.core.runtimes import RUNTIMES, RuntimeSettings, load_runtime
from skewless.core.runtimes.eager import EagerRuntime
from skewless.evaluation.evaluate import evaluate
from skewless.importers.errors import ImportFileError
from skewless.importers.fastai import rename, shape_of
from skewless.importers.formats import format_of
from skewless.importers.pytorch import read_pytorch
from skewless.importers.run import ImportRequest, ImportResult, import_file
from skewless.importers.safetensors_file import read_safetensors
from skewless.importers.weights import network_from
from skewless.packaging.build import build_archive
from skewless.training.checkpoint import CheckpointError, load_checkpoint, network_of
from skewless.training.manifest import read_manifest
from tests.conftest import ROOT
from tests.recordings import coughs, one_thread, tones, wav  # noqa: F401

ARCHIVE = ROOT / "archive" / "orca"
CPU = torch.device("cpu")
DEPTHS = (18, 34, 50)
SHAPES = [(depth, channels, classes) for depth in DEPTHS for channels, classes in ((1, 2), (3, 5))]


class ConcatPool(nn.Module):
    def __init__(self):
        super().__init__()
        self.ap, self.mp = nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.mp(x), self.ap(x)], 1)


def residual(depth: int, channels: int) -> nn.Module:
    network = getattr(torchvision.models, f"resnet{depth}")(weights=None)
    network.conv1 = nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
    return network


def head_of(features: int, classes: int) -> list[nn.Module]:
    hidden = [nn.BatchNorm1d(features), nn.Dropout(0.25), nn.Linear(features, 512), nn.ReLU(inplace=True)]
    return [nn.Flatten(), *hidden, nn.BatchNorm1d(512), nn.Dropout(0.5), nn.Linear(512, classes)]


def fastais(depth: int, channels: int, classes: int) -> nn.Module:
    """What fastai 1's `cnn_learner` builds, by its `create_body` and `create_head`."""
    network = residual(depth, channels)
    body = nn.Sequential(*list(network.children())[:-2])
    return nn.Sequential(body, nn.Sequential(ConcatPool(), *head_of(2 * network.fc.in_features, classes)))


class Port(nn.Module):
    """The same without fastai: torchvision's network with another pooling and another last layer."""

    def __init__(self, depth: int, channels: int, classes: int):
        super().__init__()
        self.model = residual(depth, channels)
        self.model.avgpool = ConcatPool()
        self.model.fc = nn.Sequential(*head_of(2 * self.model.fc.in_features, classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


LAYOUTS: dict[str, Callable[[int, int, int], nn.Module]] = {"fastai": fastais, "port": Port}


def images(channels: int, count: int = 5, seed: int = 3) -> torch.Tensor:
    return 20 * torch.randn(count, channels, 64, 78, generator=torch.Generator().manual_seed(seed)) - 30


def settled(network: nn.Module, x: torch.Tensor) -> nn.Module:
    """As if trained: scales, shifts and running statistics that are no initial ones, and outputs that depend on the input."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = None  # the plain mean over what it sees
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    with torch.no_grad():
        network.train()(x)
    return network.eval()


@cache
def trained(layout: str, depth: int = 18, channels: int = 1, classes: int = 2) -> nn.Module:
    torch.manual_seed(depth)
    return settled(LAYOUTS[layout](depth, channels, classes), images(channels, 24, seed=4))


def definition_of(depth: int, channels: int = 1, classes: int = 2) -> dict[str, Any]:
    return {"resnet_fastai": {"depth": depth, "channels": channels, "classes": classes, "dropout": 0.5}}


def network_with(weights: Mapping[str, torch.Tensor], *shape: int) -> ResNetFastai:
    network = build_network(definition_of(*shape))
    network.load_state_dict(rename(weights))
    assert isinstance(network, ResNetFastai)
    return network.eval()


# Network


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_networks_numbers_are_theirs_bit_for_bit(layout: str, shape: tuple[int, int, int]):
    theirs = trained(layout, *shape)
    network, x = network_with(theirs.state_dict(), *shape), images(shape[1])
    with torch.inference_mode():
        want, features = theirs(x), network.encode(x)
        got = network.head(features)
    assert features.shape == (5, 4096 if shape[0] == 50 else 1024)
    assert float(want.std(dim=0).min()) > 0.01
    assert torch.equal(got["class_logits"], want)
    assert torch.equal(got["class_probabilities"], want.softmax(dim=1))
    assert torch.equal(network(x), want)


def test_maximum_comes_before_average():
    learner = trained("fastai", 50)
    network, x = network_with(learner.state_dict(), 50), images(1)
    with torch.inference_mode():
        maps, features = learner[0](x), network.encode(x)
    torch.testing.assert_close(features[:, :2048], maps.amax(dim=(2, 3)), atol=0, rtol=0)
    torch.testing.assert_close(features[:, 2048:], maps.mean(dim=(2, 3)), atol=1e-5, rtol=0)


def test_state_dict_reads_like_the_network():
    keys = set(build_network(definition_of(50)).state_dict())
    classifier = {f"classifier.{n}.{kind}" for n in (0, 2, 4, 6) for kind in ("weight", "bias")}
    classifier |= {
        f"classifier.{n}.{kind}" for n in (0, 4) for kind in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert {key for key in keys if not key.startswith("backbone.")} == classifier
    assert {key for key in keys if key.startswith("backbone.")} == {
        f"backbone.{key}" for key in residual(50, 1).state_dict() if not key.startswith("fc.")
    }


def test_parameters_reach_the_layers():
    parameters = {"depth": 34, "channels": 3, "classes": 5, "dropout": 0.2}
    built = build_network({"resnet_fastai": parameters})
    assert shape_of(built.state_dict()) == {"depth": 34, "channels": 3, "classes": 5}
    assert [module.p for module in built.classifier if isinstance(module, nn.Dropout)] == [0.1, 0.2]
    assert built.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 5)


@pytest.mark.parametrize("depth", [0, 51, "50", None])
def test_another_depth_is_refused(depth: Any):
    with pytest.raises(ValueError, match=f"depth is {depth!r}, expected 18, 34 or 50"):
        build_network({"resnet_fastai": {"depth": depth}})


def test_the_archives_runtime_computes_fifty_layers(tmp_path: Path):
    network, runtime = network_with(trained("fastai", 50).state_dict(), 50), Definition.read(ARCHIVE).runtime
    inputs = [images(1, 1), images(1, 5)]
    RUNTIMES[next(iter(runtime))].write(network, tmp_path, RuntimeSettings(), iter(inputs))
    loaded = load_runtime(runtime, definition_of(50), tmp_path, CPU)
    for ours, exact in zip(loaded(inputs), EagerRuntime(network, CPU)(inputs), strict=True):
        assert ours["class_probabilities"].shape == exact["class_probabilities"].shape
        apart = (ours["class_probabilities"] - exact["class_probabilities"]).abs().max()
        assert float(apart) <= TOLERANCES[loaded.tier]


# What a file's weights are of


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_shape_is_told_from_the_weights(shape: tuple[int, int, int]):
    expected = dict(zip(("depth", "channels", "classes"), shape, strict=True))
    port = trained("port", *shape).state_dict()
    assert shape_of(trained("fastai", *shape).state_dict()) == expected
    assert shape_of(port) == expected
    assert shape_of({name.removeprefix("model."): value for name, value in port.items()}) == expected
    assert shape_of(rename(port)) == expected


def without(weights: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in weights.items() if key != name}


def wide() -> nn.Module:
    """With fastai's names, the layers of fifty, and other sizes."""
    network = torchvision.models.wide_resnet50_2(weights=None)
    return nn.Sequential(nn.Sequential(*list(network.children())[:-2]), nn.Sequential(ConcatPool(), *head_of(4096, 2)))


@pytest.mark.parametrize(
    "weights",
    [
        {},
        {"0.0.weight": torch.ones(64, 1, 7, 7)},
        without(fastais(18, 1, 2).state_dict(), "1.4.bias"),
        {**fastais(18, 1, 2).state_dict(), "1.9.weight": torch.ones(2)},
        {**Port(18, 1, 2).state_dict(), "conv1.weight": torch.ones(64, 1, 7, 7)},
        {**fastais(18, 1, 2).state_dict(), "0.0.weight": torch.ones(64, 0, 7, 7)},
        wide().state_dict(),
        torchvision.models.resnet18(weights=None).state_dict(),
    ],
    ids=["none", "one", "one missing", "one more", "two sets of names", "no channels", "wide", "another head"],
)
def test_other_weights_have_no_such_shape(weights: dict[str, torch.Tensor]):
    assert shape_of(weights) is None


def test_names_of_two_layouts_are_not_mixed():
    """Neither weight takes the other one's place."""
    both = {**Port(18, 1, 2).state_dict(), "conv1.weight": torch.ones(64, 1, 7, 7)}
    assert rename(both) == both


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # fastai 2 leaves out this bias.
        (lambda w: without(w, "1.4.bias"), r"1 missing \(classifier\.2\.bias\)"),
        (lambda w: without(w, "0.7.1.bn2.running_var"), r"1 missing \(backbone\.layer4\.1\.bn2\.running_var\)"),
        (lambda w: {**w, "1.9.weight": torch.ones(2)}, r"1 unexpected \(1\.9\.weight\)"),
        (lambda w: {**w, "0.4.0.conv3.weight": torch.ones(2)}, r"1 unexpected \(backbone\.layer1\.0\.conv3\.weight\)"),
        (lambda w: {**w, "1.8.bias": torch.ones(3)}, r"1 of another shape \(classifier\.6\.bias\)"),
        (lambda w: {**w, "0.0.weight": torch.ones(64, 3, 7, 7)}, r"1 of another shape \(backbone\.conv1\.weight\)"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, message: str):
    weights = change(trained("fastai").state_dict())
    with pytest.raises(CheckpointError, match=message):
        network_from(rename(weights), Definition.read(ARCHIVE))


# Import


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def optimizer_state() -> dict[str, Any]:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.Adam([parameter], betas=(0.9, 0.99))
    parameter.grad = torch.ones(2)
    optimizer.step()
    return optimizer.state_dict()


def archive_with(folder: Path, *shape: int) -> Path:
    """The orca detector's folder with a network of that depth, channels and classes, on PyTorch."""
    archive = folder / "orca"
    shutil.copytree(ARCHIVE, archive)
    model = yaml.safe_load((archive / "model.yaml").read_text())
    (archive / "model.yaml").write_text(
        yaml.safe_dump(model | {"network": definition_of(*shape), "runtime": {"eager": {}}})
    )
    return archive


def imported(archive: Path, path: Path) -> ImportResult:
    return import_file(
        ImportRequest(
            archive, path, path.parent / "best.pth", archive / "pipeline.yaml", Definition.read(archive).classes
        )
    )


def network_in(result: ImportResult, archive: Path) -> nn.Module:
    return network_of(load_checkpoint(result.checkpoint), Definition.read(archive))


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize(
    ("layout", "file"),
    [
        ("fastai", "learn.save"),
        ("fastai", "state dict"),
        ("port", "state dict"),
        ("port", "parallel"),
        ("port", "safetensors"),
        ("fastai", "safetensors"),
    ],
)
def test_every_kind_of_file_becomes_a_checkpoint(tmp_path: Path, depth: int, layout: str, file: str):
    theirs, archive, path = trained(layout, depth), archive_with(tmp_path, depth), tmp_path / "model"
    weights = theirs.state_dict()
    if file == "safetensors":
        safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    elif file == "learn.save":
        saved(path, {"model": weights, "opt": optimizer_state()})
    else:
        saved(path, {f"module.{k}": v for k, v in weights.items()} if file == "parallel" else weights)
    result = imported(archive, path)
    assert result.format == ("safetensors" if file == "safetensors" else "pytorch")
    assert "it records no configuration" in result.text()
    assert not any("float" in note for note in result.notes)
    with torch.inference_mode():
        assert torch.equal(network_in(result, archive)(images(1)), theirs(images(1)))


def test_safetensors_do_not_say_which_pipeline(tmp_path: Path):
    safetensors.torch.save_file(trained("port").state_dict(), tmp_path / "model")
    with pytest.raises(ImportFileError, match="--pipeline is required"):
        import_file(ImportRequest(ARCHIVE, tmp_path / "model", tmp_path / "best.pth"))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("file", ["state dict", "safetensors"])
def test_half_precision_is_taken_exactly_and_said(tmp_path: Path, kind: torch.dtype, file: str):
    half = Port(18, 1, 2)
    half.load_state_dict(trained("port").state_dict())
    half = half.to(kind).eval()
    path = tmp_path / "model"
    if file == "safetensors":
        safetensors.torch.save_file(half.state_dict(), path)
    else:
        saved(path, half.state_dict())
    result = imported(ARCHIVE, path)
    name = str(kind).removeprefix("torch.")
    assert any(f"its weights are {name}: each is the same number in float32" in note for note in result.notes)
    weights = network_in(result, ARCHIVE).state_dict()
    for key, value in rename(half.state_dict()).items():
        assert weights[key].dtype == (torch.float32 if value.is_floating_point() else torch.int64)
        assert torch.equal(weights[key].to(value.dtype), value), key
        assert torch.equal(weights[key].double(), value.double()), key


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("asked", [(18, 1, 2), (34, 1, 2), (50, 3, 2), (50, 1, 5)], ids=str)
def test_another_network_is_named_and_its_line_imports_it(tmp_path: Path, layout: str, asked: tuple[int, int, int]):
    archive = archive_with(tmp_path, *asked)
    path = saved(tmp_path / "old.pth", trained(layout, 50).state_dict())
    with pytest.raises(ImportFileError) as error:
        imported(archive, path)
    message = str(error.value)
    assert "the file holds fastai's ResNet-50 (input channels: 1, classes: 2)" in message
    assert "asks for ResNet-{} (input channels: {}, classes: {})".format(*asked) in message
    assert "\n" not in message and len(message) < 400
    assert not (tmp_path / "best.pth").exists()
    line = message.split("`")[1]
    assert yaml.safe_load(line) == {"network": definition_of(50)}
    model = yaml.safe_load((archive / "model.yaml").read_text()) | yaml.safe_load(line)
    (archive / "model.yaml").write_text(yaml.safe_dump(model))
    assert imported(archive, path).checkpoint.is_file()


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_an_exported_learner_is_refused_and_nothing_of_it_runs(tmp_path: Path):
    """`learn.export()` pickles the model itself, and whatever it holds."""
    learner = trained("fastai")
    path = saved(tmp_path / "export.pkl", {"model": learner, "data": Evil(tmp_path / "ran")})
    with pytest.raises(
        ImportFileError, match=r"export\.pkl is a whole model.*Nothing of it ran.*model\.state_dict\(\)"
    ):
        read_pytorch(path)
    path = saved(tmp_path / "evil.pth", {"model": learner.state_dict(), "opt": Evil(tmp_path / "ran")})
    with pytest.raises(ImportFileError, match=r"evil\.pth is refused.*mkdir"):
        read_pytorch(path)
    assert not (tmp_path / "ran").exists()


# Safetensors


def with_header(header: str, data: bytes = bytes(8), length: int | None = None) -> bytes:
    encoded = header.encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def tensor(dtype: str = "F32", shape: str = "[2]", offsets: str = "[0,8]") -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (with_header(f'{{"a":{tensor()}}}', length=2000), "damaged, or no safetensors file"),
        (with_header(f'{{"a":{tensor()}}}', length=10), "damaged, or no safetensors file"),
        (with_header(f'{{"a":{tensor()}'), "damaged, or no safetensors file"),
        (with_header(f'{{"a":{tensor()},"b":{tensor()}}}'), "invalid offset"),
        (with_header(f'{{"a":{tensor(offsets="[4,12]")}}}', bytes(12)), "invalid offset"),
        (with_header(f'{{"a":{tensor(offsets="[8,0]")}}}'), "invalid offset"),
        (with_header(f'{{"a":{tensor(shape="[4]", offsets="[0,16]")}}}'), "not fully covered"),
        (with_header(f'{{"a":{tensor()}}}', bytes(16)), "not fully covered"),
        (with_header(f'{{"a":{tensor(shape="[3]")}}}'), "damaged, or no safetensors file"),
        (with_header(f'{{"a":{tensor(shape="[-2]")}}}'), "damaged, or no safetensors file"),
        (with_header(f'{{"a":{tensor(shape="[4611686018427387904,4]")}}}'), "overflow"),
        (with_header(f'{{"a":{tensor(dtype="X32")}}}'), "damaged, or no safetensors file"),
        (with_header('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"), "recursion limit"),
        (with_header(f'{{"__metadata__":{{"a":1}},"a":{tensor()}}}'), "damaged, or no safetensors file"),
        (with_header("{}", b""), "has no weights"),
        (with_header(f'{{"a":{tensor(dtype="F8_E4M3", shape="[8]")}}}'), "a is torch.float8_e4m3fn, expected"),
        (with_header(f'{{"a":{tensor(dtype="F4", shape="[16]")}}}'), "a is torch.float4_e2m1fn_x2, expected"),
        (with_header(f'{{"a":{tensor(dtype="C64", shape="[1]")}}}'), "a is torch.complex64, expected"),
    ],
    ids=str,
)
def test_damaged_and_hostile_safetensors_are_refused(tmp_path: Path, data: bytes, message: str):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    assert format_of(path) == "safetensors"
    with pytest.raises(ImportFileError, match=message) as error:
        read_safetensors(path)
    assert str(path) in str(error.value)


def test_a_length_that_no_header_has_is_not_safetensors(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(with_header(f'{{"a":{tensor()}}}', length=2**40))
    with pytest.raises(ImportFileError, match="is not a checkpoint"):
        imported(ARCHIVE, path)


# The whole way


@pytest.mark.filterwarnings("ignore:At least one mel filterbank:UserWarning")
def test_fifty_layers_are_imported_evaluated_and_built(tmp_path: Path):
    """What the archive then computes is the port's own, bit for bit."""
    archive, corpus = archive_with(tmp_path, 50), tmp_path / "corpus"
    corpus.mkdir()
    rows = [("file_path", "label", "split")]
    for number, split in enumerate(("val", "val", "test", "test")):
        name, sound = f"{number}.wav", (coughs, tones)[number % 2](20000, 3.0 + number / 8)
        (corpus / name).write_bytes(wav(sound, 20000))
        rows.append((name, ("other", "call")[number % 2], split))
    with open(corpus / "manifest.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    definition = Definition.read(archive)
    recordings = read_manifest(corpus / "manifest.csv", corpus, definition.classes)
    windows = [definition.pipeline((corpus / name).read_bytes()).float() for name, *_ in rows[1:]]

    torch.manual_seed(0)
    port = settled(Port(50, 1, 2), torch.cat(windows))
    safetensors.torch.save_file(port.state_dict(), tmp_path / "model.safetensors")
    result = imported(archive, tmp_path / "model.safetensors")
    checkpoint = load_checkpoint(result.checkpoint)
    metrics = evaluate(
        definition, checkpoint, result.checkpoint, recordings, "test", tmp_path / "test", CPU, references=2
    )
    assert metrics["imported_from"]["format"] == "safetensors"
    built = build_archive(archive, result.checkpoint, tmp_path / "test", "1.0", tmp_path / "store")

    with zipfile.ZipFile(built.path) as packed:
        packed.extractall(tmp_path / "unpacked")
    runtime = Definition.read(tmp_path / "unpacked").load_runtime(CPU)
    for x in windows:
        with torch.inference_mode():
            want = port(x).softmax(dim=1)
        (got,) = runtime([x])
        assert torch.equal(got["class_probabilities"], want)
