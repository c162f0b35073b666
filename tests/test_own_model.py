"""A model of one's own: code in the archive's folder, what is refused of it, and the folder that `skewless new` writes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from skewless.core.definition import Definition
from skewless.core.errors import DefinitionError
from skewless.core.pipeline import Pipeline, PipelineError
from skewless.scaffold import create
from tests import recordings

RECORDING = recordings.wav(recordings.coughs(16000, 3.0), 16000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return create("mine", tmp_path)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_own_stage_and_network_compute(folder: Path):
    definition = Definition.read(folder)
    trace = definition.pipeline.trace(RECORDING)
    before, after = trace["resample"], trace["pre_emphasis"]
    assert torch.equal(after[:, 0], before[:, 0])
    assert torch.equal(after[:, 1:], before[:, 1:] - 0.97 * before[:, :-1])
    network = definition.build_network().eval()
    outputs = network.head(network.encode(trace["replicate"]))
    assert 0 < outputs["probability"].item() < 1
    assert definition.classes == ("negative", "positive")
    assert definition.packages >= {"torch", "torchaudio", "soundfile", "av"}


def test_the_source_is_part_of_the_fingerprint(folder: Path):
    before = Definition.read(folder)
    assert list(before.pipeline.code) == ["stages.py"]
    assert set(before.code) == {"network.py", "stages.py"}
    edit(folder / "stages.py", "- self.coefficient * x[:, :-1]", "- self.coefficient * x[:, :-1] * 1.0")
    after = Definition.read(folder)
    assert after.pipeline.fingerprint != before.pipeline.fingerprint
    assert after.code["network.py"] == before.code["network.py"]
    (difference,) = before.pipeline.diff(after.pipeline)
    assert "stages.py" in str(difference)
    with pytest.raises(
        PipelineError, match=r"stages\.py in the folder is not the code that this pipeline was written with"
    ):
        Pipeline.from_dict(before.pipeline.to_dict(), folder)


def test_a_file_that_own_code_imports_is_part_of_it(folder: Path):
    edit(
        folder / "stages.py",
        "        x = signal.data\n",
        "        from .helper import identity\n\n        x = identity(signal.data)\n",
    )
    (folder / "helper.py").write_text("def identity(x):\n    return x\n")
    (folder / "unrelated.py").write_text("raise SystemExit('a script beside the model')\n")
    definition = Definition.read(folder)
    assert set(definition.pipeline.code) == {"helper.py", "stages.py"}
    assert definition.pipeline(RECORDING).shape[1:] == (1, 40, 101)


def test_two_states_of_a_file_are_two_classes(folder: Path):
    first = Definition.read(folder).pipeline
    edit(folder / "stages.py", "x[:, 1:] - self.coefficient", "x[:, 1:] + self.coefficient")
    second = Definition.read(folder).pipeline
    a, b = first.trace(RECORDING)["pre_emphasis"], second.trace(RECORDING)["pre_emphasis"]
    assert not torch.equal(a, b)


STAGE_FAULTS = {
    "unknown name": (("stages.py:PreEmphasis", "emphasis"), r"unknown stage 'emphasis'; .*FILE\.py:Class"),
    "no such file": (("stages.py:PreEmphasis", "other.py:PreEmphasis"), r"there is no other\.py in the folder mine"),
    "outside": (
        ("stages.py:PreEmphasis", "../stages.py:PreEmphasis"),
        r"\.\./stages\.py is outside of the folder mine",
    ),
    "no such class": (("stages.py:PreEmphasis", "stages.py:Emphasis"), r"no class Emphasis; it has: PreEmphasis"),
    "unknown parameter": (
        ("{coefficient: 0.97}", "{coefficient: 0.97, taps: 2}"),
        "unknown parameter taps; it takes: coefficient",
    ),
    "wrong type": (("{coefficient: 0.97}", "{coefficient: '0.97'}"), "coefficient is '0.97', expected a number"),
    "out of range": (
        ("{coefficient: 0.97}", "{coefficient: 1.5}"),
        r"coefficient is 1\.5, expected a number in \[0, 1\)",
    ),
}


@pytest.mark.parametrize("fault", STAGE_FAULTS)
def test_a_pipeline_that_names_it_wrongly_is_refused(folder: Path, fault: str):
    (old, new), message = STAGE_FAULTS[fault]
    edit(folder / "pipeline.yaml", old, new)
    with pytest.raises(PipelineError, match=message) as caught:
        Definition.read(folder)
    assert "pipeline.yaml" in str(caught.value)


CODE_FAULTS = {
    "does not import": (
        "import torch\n",
        "import torch\nimport no_such_package\n",
        r"stages\.py does not import: ModuleNotFoundError",
    ),
    "syntax": ("def __post_init__(self):", "def __post_init__(self)", r"stages\.py does not import: SyntaxError"),
    "clash": ('name="pre_emphasis"', 'name="highpass"', "calls itself 'highpass', which is the name of one of ours"),
    "no shapes": ("waveform `(1, N)` float32 to `(1, N)`.", "for waveforms.", "no docstring that gives the shapes"),
    "another kind": (
        'class PreEmphasis(Stage, name="pre_emphasis")',
        "class PreEmphasis",
        "is no stage: it has to extend",
    ),
    "sibling without a dot": ("import torch\n", "import torch\nimport network\n", "import one another with a dot"),
}


@pytest.mark.parametrize("fault", CODE_FAULTS)
def test_code_that_cannot_be_used_is_refused(folder: Path, fault: str):
    old, new, message = CODE_FAULTS[fault]
    edit(folder / "stages.py", old, new)
    with pytest.raises(DefinitionError, match=message):
        Definition.read(folder)


MODEL_FAULTS = {
    "quoted no": ("tf32: false", "tf32: 'false'", "precision: tf32 is 'false', expected true or false"),
    "unknown limit": ("max_files: 16", "max_file: 16", "limits: unknown parameter max_file; it takes: .*max_files"),
    "text for bytes": (
        "max_bytes: 20000000",
        "max_bytes: 20 MB",
        "limits: max_bytes is '20 MB', expected a whole number",
    ),
    "no such runtime": (
        "eager: {micro_batch: 64}",
        "fast: {}",
        "unknown runtime 'fast'; there are: eager, mnn, onnxruntime",
    ),
    "no batch": ("micro_batch: 64", "micro_batch: 0", "micro_batch is 0, expected at least 1"),
    "a precision that it has not": ("micro_batch: 64", "precision: int8", "precision is 'int8', expected one of fp32"),
    "TorchServe's key": ("precision:", "batchSize: 8\nprecision:", "unknown key batchSize; .*model-config.yaml"),
}


@pytest.mark.parametrize("fault", MODEL_FAULTS)
def test_a_wrong_model_file_is_refused_by_key_and_value(folder: Path, fault: str):
    old, new, message = MODEL_FAULTS[fault]
    edit(folder / "model.yaml", old, new)
    with pytest.raises(DefinitionError, match=message) as caught:
        Definition.read(folder)
    assert str(folder / "model.yaml") in str(caught.value)


def test_a_wrong_network_parameter_is_refused(folder: Path):
    edit(folder / "model.yaml", "{channels: 16}", "{channels: wide}")
    with pytest.raises(DefinitionError, match="channels is 'wide', expected a whole number"):
        Definition.read(folder).build_network()


def test_requirements_are_checked(folder: Path):
    requirements = folder / "requirements.txt"
    requirements.write_text(f"# what stages.py needs\ntorch=={torch.__version__.partition('+')[0]}\nnumpy>=1  # any\n")
    Definition.read(folder)
    requirements.write_text("torch==1.0\nno-such-package\n")
    with pytest.raises(
        DefinitionError, match=r"torch==1\.0 is asked for, .* is installed; no-such-package is not installed"
    ):
        Definition.read(folder)
    requirements.write_text("torch >>> 1\n")
    with pytest.raises(DefinitionError, match=r"line 1: 'torch >>> 1' is no requirement"):
        Definition.read(folder)


def test_a_missing_file_is_named(folder: Path):
    (folder / "model.yaml").unlink()
    with pytest.raises(DefinitionError, match=r"has no model\.yaml"):
        Definition.read(folder)


@pytest.mark.parametrize("like", ["cough", "orca", "talent", "portrait"])
def test_a_folder_like_one_of_ours_is_the_same_model(tmp_path: Path, like: str):
    definition = Definition.read(create("another", tmp_path, like))
    original = Definition.read(Path("archive") / like)
    assert definition.pipeline.name == "another"
    assert definition.pipeline.fingerprint == original.pipeline.fingerprint
    assert (definition.network, definition.postprocess) == (original.network, original.postprocess)
    assert "# DECIDE" in (tmp_path / "another" / "pipeline.yaml").read_text()


def test_wrong_wishes_are_refused(tmp_path: Path):
    for name, like, message in (
        ("../x", None, "the name is '../x'"),
        ("1st", None, "beginning with a letter"),
        ("mine", "coughs", "--like is 'coughs', expected one of cough, orca, portrait, talent"),
    ):
        with pytest.raises(ValueError, match=message):
            create(name, tmp_path, like)
    create("mine", tmp_path)
    with pytest.raises(ValueError, match="exists already"):
        create("mine", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_nothing_is_left_of_a_copy(folder: Path):
    shutil.rmtree(folder)
    assert list(folder.parent.iterdir()) == []
