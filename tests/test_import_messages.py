"""Files that are no checkpoint, are damaged, or are another network's: what they are is said, and what to do."""

from __future__ import annotations

import gzip
import io
import pickle
import random
import re
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torchvision
import yaml
from onnx import helper
from torch import nn

from skewless.core.definition import Definition
from skewless.core.errors import DefinitionError
from skewless.core.git_lfs import pointer
from skewless.errors import UsageError
from skewless.importers.architecture import describe, keras_application
from skewless.importers.errors import ImportFileError
from skewless.importers.formats import format_of, read
from skewless.importers.keras_graph import check_resnet50
from skewless.importers.pytorch import read_pytorch
from skewless.importers.run import ImportRequest, import_file
from skewless.importers.weights import network_from
from skewless.scaffold import create
from skewless.torchserve.archive import Archive
from skewless.training import checksums
from skewless.training.cache import StageCache, UnreadableRecordings
from skewless.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from skewless.training.checksums import check_members
from skewless.training.manifest import ManifestError, read_manifest
from tests.conftest import ROOT

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 44789234\n"
SAID = "this is a Git LFS pointer to a file of 44,789,234 bytes, not the file itself: run `git lfs pull`"
WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def zipped(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "content")
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.pth"))
    return file.getvalue()


def scripted() -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), file)
    return file.getvalue()


def onnx_graph() -> bytes:
    graph = helper.make_graph([], "g", [], [])
    model = helper.make_model(graph, producer_name="pytorch", opset_imports=[helper.make_opsetid("", 17)])
    return model.SerializeToString()


def arrays() -> bytes:
    file = io.BytesIO()
    np.savez(file, weight=np.ones(3))
    return file.getvalue()


SAFETENSORS = (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', np.float32(1).tobytes())
FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", r"is empty \(0 bytes\): copy it again"),
    "LFS": (lambda: LFS, f"is not there: {SAID}"),
    "text": (lambda: b"# Notes\n\nEpoch 3 was best.\n", r"is text, starting with '# Notes\\n\\nEpoch 3 was best.\\n'"),
    "long text": (lambda: "ä".encode() * 5000, f"is text, starting with '{'ä' * 40}'"),
    "text in brackets": (lambda: b'{"epoch": 3}\n', "is text, starting with"),
    "page": (lambda: b"<!DOCTYPE html><html><body>Sign in", "is a web page, .*: the download gave no file"),
    "gzip": (lambda: gzip.compress(b"x"), "is compressed by gzip: unpack it"),
    "tar": (tarred, "is a tar archive: unpack it"),
    "TFLite": (lambda: b"\x1c\0\0\0TFL3" + bytes(40), "is a TensorFlow Lite model: give the checkpoint"),
    "ONNX": (onnx_graph, "is an ONNX graph: give the checkpoint it was made from"),
    "TorchScript": (scripted, r"is TorchScript, .* torch.jit.load and save its state_dict\(\)"),
    "archive": (
        lambda: zipped("MAR-INF/MANIFEST.json", "w.pth"),
        "is a TorchServe archive: unzip it and give the weights",
    ),
    "npz": (arrays, "is NumPy's .npz: save the weights by their names"),
    "npy": (lambda: b"\x93NUMPY\x01\0", "is an array of NumPy's"),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("reader", [format_of, load_checkpoint])
def test_what_a_file_is_is_said(tmp_path: Path, kind: str, reader: Callable):
    """Whether it is to be imported, or to be evaluated or packaged."""
    make, message = FILES[kind]
    path = tmp_path / "model.pth"
    path.write_bytes(make())
    with pytest.raises(CheckpointError, match=message) as error:
        reader(path)
    assert str(error.value).startswith(f"{path} is ")
    assert ("skewless train" if reader is load_checkpoint else "what torch.save wrote") in str(error.value)


def test_safetensors_are_no_checkpoint(tmp_path: Path):
    header, data = SAFETENSORS
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    with pytest.raises(CheckpointError, match="is a safetensors file: `skewless import` makes a checkpoint of it"):
        load_checkpoint(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("inside", "message"), [("weights.h5", "is a folder: give the file"), ("saved_model.pb", "SavedModel")]
)
@pytest.mark.parametrize("reader", [format_of, load_checkpoint])
def test_a_folder_is_said_to_be_one(tmp_path: Path, inside: str, message: str, reader: Callable):
    (tmp_path / inside).touch()
    with pytest.raises(CheckpointError, match=message):
        reader(tmp_path)


def test_a_whole_model_is_said_to_be_one(tmp_path: Path):
    for zipped_ in (True, False):
        torch.save(nn.Linear(2, 2), tmp_path / "model.pth", _use_new_zipfile_serialization=zipped_)
        with pytest.raises(
            ImportFileError,
            match=r"is a whole model, saved with torch.save\(model\): .*'torch.nn.modules.linear.Linear'. Nothing of it ran. "
            r".*torch.save\(model.state_dict\(\), ...\)",
        ):
            read_pytorch(tmp_path / "model.pth")


def test_bytes_of_something_else_are_shown(tmp_path: Path):
    (tmp_path / "model.pth").write_bytes(b"\xa7\xfe\x00\x01 and so on")
    with pytest.raises(
        ImportFileError, match=r"torch.save did not write it; it starts with the bytes a7 fe 00 01 20 61 6e 64"
    ):
        read_pytorch(tmp_path / "model.pth")


def odd_files(folder: Path) -> list[Path]:
    """Files of which torch itself warns, or that it refuses with advice of its own."""
    made = {
        "protocol.pth": pickle.dumps({"a": 1}, 4),
        "zip.pth": b"",
        "csr.pth": b"",
        "text.pth": b"notes",
        "global.pth": pickle.dumps(Path("x"), 2),
    }
    for name, content in made.items():
        (folder / name).write_bytes(content)
    torch.save({"a": torch.ones(2)}, folder / "zip.pth", pickle_protocol=5)
    with warnings.catch_warnings(action="ignore"):
        torch.save({"a": torch.eye(2).to_sparse_csr()}, folder / "csr.pth")
    return [folder / name for name in made]


def test_torchs_own_warnings_do_not_reach_the_terminal(tmp_path: Path):
    script = """
import sys
from skewless.importers.pytorch import read_pytorch
from skewless.training.checkpoint import load_checkpoint
for path in sys.argv[1:]:
    for reader in (read_pytorch, load_checkpoint):
        try:
            reader(path)
        except ValueError as error:
            print(error)
"""
    command = [sys.executable, "-W", "default", "-c", script, *map(str, odd_files(tmp_path))]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, timeout=120)
    assert result.stderr == ""
    assert "weights_only" not in result.stdout and "pytorch.org" not in result.stdout


# --- Git LFS


def test_pointers_are_told_from_other_texts():
    assert pointer(LFS) == SAID
    assert pointer(LFS[:50]) == "this is a Git LFS pointer, not the file itself: run `git lfs pull`"
    assert pointer(b"version: 1\n") == pointer(b"see version https://git-lfs.github.com/spec/v1") == ""


@pytest.mark.parametrize("name", ["pipeline.yaml", "model.yaml", "network.py"])
def test_a_pointer_in_an_archives_folder_is_named(tmp_path: Path, name: str):
    folder = create("mine", tmp_path)
    (folder / name).write_bytes(LFS)
    with pytest.raises(DefinitionError, match=re.escape(f"{name}: {SAID}")):
        _ = Definition.read(folder).code


def test_a_pointer_as_an_exported_network_is_named(tmp_path: Path):
    folder = create("mine", tmp_path)
    model = yaml.safe_load((folder / "model.yaml").read_text()) | {"network": {"exported": "model.pt2"}}
    (folder / "model.yaml").write_text(yaml.safe_dump(model))
    (folder / "model.pt2").write_bytes(LFS)
    with pytest.raises(DefinitionError, match=re.escape(f"model.pt2: {SAID}")):
        Definition.read(folder).build_network()


def test_pointers_as_recording_manifest_and_archive_are_named(tmp_path: Path):
    (tmp_path / "a.wav").write_bytes(LFS)
    (tmp_path / "m.csv").write_text("file_path,label,split\na.wav,0,test\n")
    cache = StageCache(tmp_path / "cache", Definition.read(create("mine", tmp_path)).pipeline)
    with pytest.raises(UnreadableRecordings, match=re.escape(SAID)):
        cache.prepare(read_manifest(tmp_path / "m.csv", tmp_path))
    (tmp_path / "m.csv").write_bytes(LFS)
    with pytest.raises(ManifestError, match=re.escape(SAID)):
        read_manifest(tmp_path / "m.csv", tmp_path)
    (tmp_path / "mine-1.0.mar").write_bytes(LFS)
    with pytest.raises(UsageError, match=re.escape(SAID)):
        Archive(tmp_path / "mine-1.0.mar")


# --- checksums


def flipped(path: Path, content: bytes) -> None:
    """Change one bit in the middle of `content`, wherever it is in the file."""
    data = bytearray(path.read_bytes())
    at = data.find(content)
    assert at > 0
    data[at + len(content) // 2] ^= 1
    path.write_bytes(data)


NUMBERS = torch.linspace(1, 2, 64)


def test_a_changed_weight_is_noticed_before_torch_reads_it(tmp_path: Path):
    path = tmp_path / "old.pth"
    torch.save({"a": NUMBERS}, path)
    assert check_members(path) == ""
    flipped(path, NUMBERS.numpy().tobytes())
    assert not torch.equal(torch.load(path)["a"], NUMBERS)  # torch itself does not look
    with pytest.raises(
        ImportFileError, match=r"old/data/0 of .*old.pth does not match its checksum: the file is damaged; copy"
    ):
        read(path, "pytorch", Definition.read(ROOT / "archive" / "cough"))
    with pytest.raises(CheckpointError, match=r"old/data/0 of .*old.pth does not match its checksum"):
        load_checkpoint(path)


def test_a_file_without_checksums_is_noted_and_not_refused(tmp_path: Path):
    path = tmp_path / "old.pth"
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a.weight": NUMBERS}, path)
    finally:
        torch.serialization.set_crc32_options(before)
    definition = Definition.read(ROOT / "archive" / "cough")
    note = "the file has no checksums: it would not be noticed if it had been damaged on the way"
    assert note in read(path, "pytorch", definition).notes
    torch.save({"a.weight": NUMBERS}, path, _use_new_zipfile_serialization=False)
    assert note in read(path, "pytorch", definition).notes
    torch.save({"a.weight": NUMBERS}, path)
    assert note not in read(path, "pytorch", definition).notes


@pytest.mark.parametrize(
    ("compression", "message"),
    [(zipfile.ZIP_STORED, "does not match its checksum"), (zipfile.ZIP_DEFLATED, "cannot be read|does not match")],
)
def test_a_changed_keras_file_is_refused(tmp_path: Path, compression: int, message: str):
    path = tmp_path / "model.keras"
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("config.json", "{}")
        archive.writestr(
            "model.weights.h5", torch.randn(500, generator=torch.Generator().manual_seed(0)).numpy().tobytes()
        )
    assert check_members(path) == ""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("model.weights.h5")
    data = bytearray(path.read_bytes())
    data[member.header_offset + 30 + len(member.filename) + member.compress_size // 2] ^= 8
    path.write_bytes(data)
    with pytest.raises(
        ImportFileError, match=rf"model.weights.h5 of .*model.keras ({message}).*: the file is damaged; copy"
    ):
        read(path, format_of(path), Definition.read(ROOT / "archive" / "portrait"))


def test_what_inflates_without_end_is_left_to_who_refuses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checksums, "_MAX_INFLATED", 1000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", bytes(5000))
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_: pytest.fail("it was inflated"))
    check_members(tmp_path / "a.zip")


def test_a_changed_exported_network_is_refused(tmp_path: Path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(40 * 101, 2))
    dynamic = {0: torch.export.Dim("windows")}
    program = torch.export.export(network, (torch.randn(2, 1, 40, 101),), dynamic_shapes=(dynamic,))
    folder = create("mine", tmp_path)
    torch.export.save(program, folder / "model.pt2")
    model = yaml.safe_load((folder / "model.yaml").read_text())
    model["network"] = {"exported": {"file": "model.pt2", "outputs": ["logits"]}}
    (folder / "model.yaml").write_text(yaml.safe_dump(model))
    flipped(folder / "model.pt2", network[1].weight.detach().numpy().tobytes())
    with pytest.raises(
        ImportFileError, match=r"weight_0 of .*model.pt2 does not match its checksum: the file is damaged"
    ):
        import_file(ImportRequest(folder, folder / "model.pt2", tmp_path / "new.pth"))


def test_random_damage_of_our_own_checkpoint_is_refused(tmp_path: Path):
    path, generator = tmp_path / "best.pth", random.Random(0)
    save_checkpoint(path, {"weights": torch.randn(2000)})
    whole = path.read_bytes()
    for _ in range(20):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole) // 4, len(whole) // 2)] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="does not match its checksum"):
            load_checkpoint(path)


# --- networks


def shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def torchvisions(name: str, **more) -> nn.Module:
    with torch.device("meta"):
        return torchvision.models.get_model(name, weights=None, **more)


@pytest.mark.parametrize(
    ("name", "text", "model"),
    [
        (
            "resnet50",
            "a ResNet-50 by its layers (3, 4, 6, 3) in torchvision's names, 3 input channels, 7 outputs",
            "resnet50",
        ),
        (
            "resnet34",
            "a ResNet-34 by its layers (3, 4, 6, 3) in torchvision's names, 3 input channels, 7 outputs",
            "resnet34",
        ),
        ("resnext50_32x4d", "torchvision's resnext50_32x4d, 3 input channels, 7 outputs", "resnext50_32x4d"),
        ("mobilenet_v2", "torchvision's mobilenet_v2, 3 input channels, 7 outputs", "mobilenet_v2"),
        ("mobilenet_v3_small", "torchvision's mobilenet_v3_small, 3 input channels, 7 outputs", "mobilenet_v3_small"),
        ("efficientnet_b0", "torchvision's efficientnet_b0, 3 input channels, 7 outputs", "efficientnet_b0"),
        ("vgg11", "torchvision's vgg11, 3 input channels, 7 outputs", "vgg11"),
        ("densenet121", "torchvision's densenet121, 3 input channels, 7 outputs", "densenet121"),
        ("vit_b_16", "torchvision's vit_b_16, 3 input channels, 7 outputs", "vit_b_16"),
        ("squeezenet1_0", "a network of torchvision's family squeezenet, 3 input channels", None),
    ],
)
def test_torchvisions_networks_are_recognised(name: str, text: str, model: str | None):
    found = describe(shapes(torchvisions(name, num_classes=7)))
    assert found is not None and (found.text, found.model) == (text, model)


def test_networks_of_other_names_and_heads_are_recognised():
    resnet = torchvisions("resnet18")
    resnet.conv1, resnet.fc = nn.Conv2d(1, 64, 7, bias=False), nn.Sequential(nn.Linear(512, 16), nn.Linear(16, 2))
    found = describe({f"model.{name}": shape for name, shape in shapes(resnet).items()})
    assert found is not None
    assert found.text == "a ResNet-18 by its layers (2, 2, 2, 2) in torchvision's names, 1 input channel, 2 outputs"
    assert found.model is None  # its head has two layers
    positions = {"layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    body = {
        n.replace(n[:6], f"0.{positions[n[:6]]}", 1): s
        for n, s in shapes(torchvisions("resnet34")).items()
        if n[:6] in positions
    }
    found = describe(body)
    assert found is not None and found.text.startswith("a ResNet-34 by its layers (3, 4, 6, 3) in fastai's names")
    assert describe({"a.weight": (2, 3)}) is None


def test_another_network_is_named_and_few_names_are_listed():
    definition = Definition.read(ROOT / "archive" / "cough")
    weights = {name: torch.zeros(shape) for name, shape in shapes(torchvisions("resnet50", num_classes=2)).items()}
    with pytest.raises(ImportFileError) as error:
        network_from(weights, definition)
    first, second = str(error.value).splitlines()
    assert len(first) < 700 and re.search(r"\d+ missing \((\S+, ){4}\S+ and \d+ more\)", first)
    assert second == (
        "The file has a ResNet-50 by its layers (3, 4, 6, 3) in torchvision's names, 3 input channels, 2 outputs. The archive's "
        "network is attn_mil_resnet, a ResNet-18 by its layers (2, 2, 2, 2) in torchvision's names, 3 input channels, 1 output. "
        "Choose the archive of the file's network, or write `network: {torchvision: resnet50, classes: 2}` into "
        f"{definition.folder / 'model.yaml'}"
    )


@pytest.mark.parametrize(
    ("name", "last"), [("mobilenet_v2", "classifier.1"), ("resnet18", "fc"), ("vit_b_16", "heads.head")]
)
@pytest.mark.parametrize("prefix", ["", "model.", "backbone."])
def test_torchvisions_own_names_are_imported(tmp_path: Path, name: str, last: str, prefix: str):
    """What the message advises works: the same numbers under our names."""
    folder = create("mine", tmp_path)
    model = yaml.safe_load((folder / "model.yaml").read_text()) | {"network": {"torchvision": name, "classes": 2}}
    (folder / "model.yaml").write_text(yaml.safe_dump(model))
    definition = Definition.read(folder)
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name, weights=None, num_classes=2).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.01
    assert last + ".weight" in theirs.state_dict()
    torch.save({prefix + key: value for key, value in theirs.state_dict().items()}, tmp_path / "old.pth")
    network = network_from(read(tmp_path / "old.pth", "pytorch", definition).weights, definition)
    x = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(network.logits(network.encode(x)), theirs(x))


@pytest.mark.parametrize(
    ("layers", "network"),
    [
        (["Conv1", "expanded_conv_depthwise", "block_1_expand"], "MobileNetV2"),
        (["conv1", "conv_dw_1", "conv_pw_1"], "MobileNet"),
        (["stem_conv", "block1a_dwconv"], "EfficientNet"),
        (["block1_conv1", "block5_conv3"], "VGG16"),
        (["block1_conv1", "block5_conv3", "block5_conv4"], "VGG19"),
        (["conv1_conv", "conv2_block1_1_conv", "conv2_block6_concat", "pool2_conv"], "DenseNet"),
        (["conv1_conv", "conv2_block1_preact_bn"], "ResNet V2"),
        ([f"conv{s}_block{b}_{c}_conv" for s, n in ((2, 3), (3, 4), (4, 23), (5, 3)) for b in range(1, n + 1) for c in (1, 2, 3)], "ResNet101"),
        (["conv2d", "dense"], ""),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_kerass_networks_are_recognised(layers: list[str], network: str):
    assert keras_application(layers) == network
    if network:
        with pytest.raises(
            ImportFileError, match=f"this is a {network}, and the archive's network is keras_resnet50: choose"
        ):
            check_resnet50(layers)
    else:
        check_resnet50(layers)


def test_hdf5s_own_checksums_are_checked(tmp_path: Path):
    from skewless.importers.keras_file import _dataset, _read_weight

    path = tmp_path / "w.h5"
    with h5py.File(path, "w") as root:
        root.create_dataset("a", data=NUMBERS.numpy(), fletcher32=True)
    with h5py.File(path) as root:
        assert torch.equal(_read_weight(_dataset(root, "a"), NUMBERS.shape), NUMBERS)
    flipped(path, NUMBERS.numpy().tobytes())
    with (
        h5py.File(path) as root,
        pytest.raises(ImportFileError, match="/a does not match its checksum: the file is damaged"),
    ):
        _read_weight(_dataset(root, "a"), NUMBERS.shape)
