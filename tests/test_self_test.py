"""A tampered archive does not load: TorchServe's own worker refuses it, and the version already serving goes on."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from skewless.core.selftest import SelfTestError
from skewless.core.service import ModelService
from skewless.packaging.build import build_archive
from skewless.packaging.execution import Execution
from tests.conftest import SERVED, Demonstration, run_skewless


def edit_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def other_cutoff(root: Path) -> None:
    edit_text(root / "pipeline.yaml", "cutoff_hz: 50.0", "cutoff_hz: 60.0")


def half_precision(root: Path) -> None:
    edit_text(root / "pipeline.yaml", "arithmetic: float32", "arithmetic: float16")


def no_highpass(root: Path) -> None:
    edit_text(root / "pipeline.yaml", "- highpass: {cutoff_hz: 50.0, q: 0.707}\n", "")


def padded_tail(root: Path) -> None:
    edit_text(root / "pipeline.yaml", "tail: drop", "tail: pad")


def one_weight(root: Path) -> None:
    weights = load_file(root / "weights.safetensors")
    weights["backbone.layer3.0.conv1.weight"][0, 0, 1, 1] += 1e-3
    save_file(weights, root / "weights.safetensors")


def one_byte_of_a_graph(root: Path) -> None:
    """In the middle of the file are weights."""
    graph = bytearray((root / "encoder.mnn").read_bytes())
    graph[len(graph) // 2] ^= 1
    (root / "encoder.mnn").write_bytes(graph)


def tf32_rounding(root: Path) -> None:
    """What a GPU with TF32 does to a convolution: its inputs keep 10 bits of mantissa."""
    with open(root / "skewless" / "core" / "runtimes" / "eager.py", "a") as file:
        file.write(
            "\n_exact = torch.nn.Conv2d._conv_forward\n"
            "_round = lambda x: ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)\n"
            "torch.nn.Conv2d._conv_forward = lambda self, x, w, b: _exact(self, _round(x), _round(w), b)\n"
        )


TAMPERED: dict[Callable[[Path], None], str] = {
    other_cutoff: "stage 'highpass' differs on ",
    no_highpass: "stage 'segment' differs on 01",
    padded_tail: "stage 'segment' differs on ",
    half_precision: "stage 'standardize' ",
    one_weight: "stage 'network' is not as built: weights.safetensors",
    one_byte_of_a_graph: "stage 'network' is not as built: encoder.mnn",
    tf32_rounding: "stage 'network' differs on ",
}


@pytest.fixture(scope="module")
def eager(demonstration: Demonstration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration's checkpoint in an archive that PyTorch runs."""
    parts = (demonstration.definition, demonstration.checkpoint, demonstration.evaluation)
    return build_archive(*parts, "1.0", tmp_path_factory.mktemp("eager"), execution=Execution("eager")).path


@pytest.fixture
def unpacked(request: pytest.FixtureRequest, demonstration: Demonstration, tmp_path: Path) -> Path:
    """The demonstration's archive; PyTorch's where the test tampers with what only that one has."""
    tamper = request.node.callspec.params["tamper"] if hasattr(request.node, "callspec") else None
    path = request.getfixturevalue("eager") if tamper in (one_weight, tf32_rounding) else demonstration.archive
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "unpacked")
    return tmp_path / "unpacked"


@pytest.mark.parametrize("tamper", [t for t in TAMPERED if t is not tf32_rounding], ids=lambda t: t.__name__)
def test_first_difference_is_named(unpacked: Path, tamper: Callable[[Path], None]):
    tamper(unpacked)
    with pytest.raises(SelfTestError, match=TAMPERED[tamper]) as error:
        ModelService.load(unpacked, torch.device("cpu"))
    assert "\n" not in str(error.value)


def test_versions_then_and_now_are_named(unpacked: Path):
    recorded = json.loads((unpacked / "references" / "stages.json").read_text())
    recorded["library_versions"]["torch"] = "2.10.0"
    (unpacked / "references" / "stages.json").write_text(json.dumps(recorded))
    # Other versions alone are no error: numbers decide.
    assert ModelService.load(unpacked, torch.device("cpu")).self_test.max_dp <= SERVED
    other_cutoff(unpacked)
    with pytest.raises(SelfTestError, match=r"torch 2\.10\.0 then, 2\.11\.0.* now"):
        ModelService.load(unpacked, torch.device("cpu"))


def test_untouched_archive_passes(unpacked: Path):
    proof = ModelService.load(unpacked, torch.device("cpu")).self_test
    assert proof.recordings == 14
    assert proof.max_dp <= SERVED


@pytest.mark.parametrize("tamper", [other_cutoff, one_byte_of_a_graph, tf32_rounding], ids=lambda t: t.__name__)
def test_torchserve_refuses_it_and_goes_on_serving(server, client, demonstration, unpacked, tamper):
    tamper(unpacked)
    manifest = unpacked / "MAR-INF" / "MANIFEST.json"
    edit_text(manifest, '"modelVersion": "1.0"', f'"modelVersion": "{tamper.__name__}"')
    target = demonstration.store / f"cough-{tamper.__name__}.mar"
    shutil.make_archive(str(target), "zip", unpacked)
    target.with_suffix(".mar.zip").rename(target)
    try:
        result = run_skewless("register", target, "--default", "--state-dir", server.state_dir, check=False)
        assert result.returncode == 1
        assert f"self-test: {TAMPERED[tamper]}" in result.stderr
        assert [m["version"] for m in server.models() if m["name"] == "cough"] == ["1.0"]
        (recording,) = (demonstration.evaluation / "references").glob("08.*")
        assert client.predict_rest("cough", recording.read_bytes()).body["model_version"] == "1.0"
    finally:
        target.unlink()
