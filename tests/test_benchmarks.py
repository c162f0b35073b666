"""The benchmarks run, on a model and recordings that are small enough for a test."""

import json
import math
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks import archive_variants, forward, runtimes, startup, variants, voice
from skewless.core.networks import Network
from skewless.evaluation.evaluate import evaluate
from skewless.packaging.build import build_archive
from skewless.training.checkpoint import load_checkpoint
from skewless.training.manifest import read_manifest
from tests.conftest import Demonstration
from tests.recordings import one_thread  # noqa: F401
from tests.tiny_model import TinyModel, tiny_model  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def archive(tiny_model: TinyModel, tmp_path_factory) -> Path:  # noqa: F811
    """The tiny model as a .mar file."""
    root = tmp_path_factory.mktemp("built")
    definition = tiny_model.definition
    recordings = read_manifest(tiny_model.manifest, tiny_model.manifest.parent, definition.classes)
    checkpoint = load_checkpoint(tiny_model.checkpoint)
    device = torch.device("cpu")
    evaluate(definition, checkpoint, tiny_model.checkpoint, recordings, "test", root / "test", device, references=3)
    return build_archive(tiny_model.archive, tiny_model.checkpoint, root / "test", "1.0", root / "store").path


def rows(text: str) -> list[list[str]]:
    """The cells of a Markdown table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def source(model: TinyModel) -> list[str]:
    return [str(model.archive), "--checkpoint", str(model.checkpoint), "--manifest", str(model.manifest)]


def test_runtimes(archive, capsys):
    runtimes.main([str(archive), str(archive), "--rounds", "2"])
    printed = capsys.readouterr().out
    assert printed.startswith("(32, 3, 224, 224) float32, device cpu, ")
    first, second = rows(printed)
    assert first[:3] == second[:3] == ["tiny-1.0", "eager", "fp32"]
    assert first[-2:] == ["1.00", "0.0e+00"]
    assert second[-1] == "0.0e+00"
    assert all(float(row[4]) >= float(row[5]) > 0 for row in (first, second))


def test_runtimes_measures_how_far_probabilities_are_apart(archive, tmp_path, monkeypatch):
    """By hand: the second archive's logits are one higher."""
    loaded = []

    def shifted(path: Path, folder: Path, device: torch.device):
        service, recordings = load(path, folder, device)
        if loaded:
            network: Network = service.runtime.network
            network.output.bias.data += 1.0
        loaded.append([service.score([recording])[0].scores[0] for recording in recordings])
        return service, recordings

    load = runtimes.load
    monkeypatch.setattr(runtimes, "load", shifted)
    _, (*_, apart) = rows(runtimes.measure([archive, archive], 1, torch.device("cpu"), tmp_path))
    assert len(loaded[0]) == 3
    assert float(apart) == pytest.approx(max(abs(a - b) for a, b in zip(*loaded, strict=True)), rel=0.05)
    assert float(apart) > 0.05


def test_runtimes_refuses_what_is_no_archive(tmp_path, capsys):
    (tmp_path / "x.mar").write_bytes(b"no archive")
    with pytest.raises(SystemExit) as stopped:
        runtimes.main([str(tmp_path / "x.mar")])
    assert stopped.value.code == 2
    assert f"no archive: {tmp_path / 'x.mar'}" in capsys.readouterr().err


FORWARD = ("--batches", "2", "1", "--rounds", "2", "--recordings", "3", "--matmul", "32")


def test_forward(archive, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda encode, dynamic: compiled.append(dynamic) or encode)
    forward.main([str(archive), *FORWARD, "--out", str(out)])
    printed = capsys.readouterr().out
    report = json.loads((out / "forward.json").read_text(encoding="utf-8"))
    names = ["eager fp32, the archive's", "eager fp32", "eager bf16", "torch.compile fp32"]
    assert compiled == [False]
    assert (report["device"], report["reference"], report["notes"]) == ("cpu", "eager fp32", [])
    assert [(row["batch"], row["variant"]) for row in report["network"]] == [(b, n) for b in (1, 2) for n in names]
    # The tiny network's one product: 64 values to 4, two operations each.
    assert report["gflop_per_row"] == 2 * 64 * 4 / 1e9
    for row in report["network"]:
        assert row["rows_per_s"] == pytest.approx(row["batch"] / row["seconds"])
        assert row["tflop_per_s"] == pytest.approx(512e-12 * row["rows_per_s"])
        assert row["times_as_fast"] == 1 or row["variant"] != "eager fp32"
    assert set(report["ceilings_tflop_per_s"]) == {"matmul fp32", "matmul bf16"}
    assert [(row["variant"], row["recordings"]) for row in report["recordings"]] == [(name, 3) for name in names]
    exact, same, reduced, alike = (row["max_abs_dp"] for row in report["recordings"])
    assert max(exact, same, alike) <= 1e-6 < reduced <= 0.02
    assert printed.strip() == (out / "forward.md").read_text(encoding="utf-8").strip()
    assert (out / "forward.png").stat().st_size > 5000


def test_forward_says_what_it_did_not_measure(archive, tmp_path, capsys, monkeypatch):
    def broken(encode, dynamic):
        def fail(rows):
            raise RuntimeError("no compiler\nand a long trace")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    forward.main([str(archive), *FORWARD, "--out", str(tmp_path / "out")])
    report = json.loads((tmp_path / "out" / "forward.json").read_text(encoding="utf-8"))
    assert report["notes"] == ["torch.compile is missing: it does not work here: no compiler"]
    assert {row["variant"] for row in report["network"]} == {"eager fp32, the archive's", "eager fp32", "eager bf16"}
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "cuda:99"), "--device is cuda:99, expected cpu"),
        (("--device", "meta"), "--device is meta, expected cpu"),
        (("--batches", "0", "2"), "--batches has 0, expected numbers from 1"),
        (("--rounds", "0"), "--rounds is 0, expected at least 1"),
        (("--eager-archive", "no.mar"), "no.mar is no archive"),
    ],
)
def test_forward_refuses_wrong_arguments(archive, tmp_path, capsys, arguments: tuple[str, ...], message: str):
    with pytest.raises(SystemExit) as stopped:
        forward.main([str(archive), *arguments, "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_archive_variants(tiny_model, capsys):  # noqa: F811
    archive_variants.main(source(tiny_model))
    printed = capsys.readouterr().out
    assert printed.startswith("6 files of split 'test', threshold 0.5")
    trained, *others = rows(printed)
    assert trained[0] == "(as trained)"
    assert [row[0] for row in others] == [
        f"`{path.stem}`" for path in sorted((tiny_model.archive / "variants").glob("*.yaml"))
    ]
    found = {row[0]: row for row in others}
    assert found["`tail_only`"][1] == "segment"
    assert float(found["`tail_only`"][2]) > 0
    for row in others:
        assert row[4].endswith(" of 6")
        assert 0 <= float(row[5]) <= 1


def test_variants(tiny_model, tmp_path, capsys):  # noqa: F811
    variants.main([*source(tiny_model), "--out", str(tmp_path / "out")])
    table = json.loads((tmp_path / "out" / "variants.json").read_text(encoding="utf-8"))
    names = {path.stem for path in (tiny_model.archive / "variants").glob("*.yaml")}
    assert {(row["variant"], row["condition"]) for row in table} == {(n, c) for n in names for c in variants.CONDITIONS}
    assert all(math.isfinite(row["max_dp"]) and row["mean_dp"] <= row["max_dp"] for row in table)
    clean = {row["variant"]: row for row in table if row["condition"] == "clean"}
    assert clean["tail_only"]["mean_dp"] > clean["pytorch_backend"]["mean_dp"]
    assert len(rows(capsys.readouterr().out)) == len(table)
    assert (tmp_path / "out" / "variants.png").stat().st_size > 5000


def test_variants_are_of_recordings(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        variants.main([str(tmp_path), "--checkpoint", "c", "--manifest", "m", "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "has no variants/*.yaml" in capsys.readouterr().err


def test_voice(capsys, monkeypatch):
    voice.main(["--rounds", "1", "--seconds", "0.5", "1"])
    cells = rows(capsys.readouterr().out)
    assert [row[0] for row in cells] == ["0.5", "1"]
    assert all(float(value) > 0 for row in cells for value in row)
    monkeypatch.setattr(voice.librosa_voice, "features", lambda *_: torch.zeros(37).numpy())
    with pytest.raises(AssertionError, match="Arrays are not equal"):
        voice.main(["--rounds", "1", "--seconds", "0.5"])


def test_startup(demonstration: Demonstration, capsys):
    """A registration with a TorchServe of the benchmark's own."""
    startup.main([str(demonstration.archive), "--rounds", "1"])
    bare, cough = rows(capsys.readouterr().out)
    assert (bare[0], cough[0]) == ("bare", "cough-1.0")
    assert float(cough[1]) == pytest.approx(demonstration.archive.stat().st_size / 1e6, abs=0.05)
    assert 0 < float(cough[3]) < float(cough[2])
    for _, _, _, _, rss, uss, pss, _ in (bare, cough):
        assert 50 < int(uss) <= int(pss) <= int(rss) < 5000
    # The network's weights alone are 45 MB.
    assert int(cough[5]) > int(bare[5]) + 45
    assert int(cough[7]) == pytest.approx(int(cough[4]) - int(bare[4]), abs=1)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("no.mar", [], "no archive: "),
        ("empty.mar", [], "empty.mar carries no recording to send"),
        ("empty.mar", ["--rounds", "0"], "--rounds is 0, expected at least 1"),
    ],
)
def test_startup_refuses(name, arguments, said, tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "empty.mar", "w") as packed:
        packed.writestr("references/references.json", "[]")
    with pytest.raises(SystemExit) as stopped:
        startup.main([str(tmp_path / name), *arguments])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    ["preprocessing", "runtimes", "archive_variants", "variants", "voice", "serving", "startup", "planted_skews"],
)
def test_each_runs_as_its_docstring_says(name):
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"python -m benchmarks.{name} " in done.stdout
