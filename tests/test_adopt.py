"""Taking over a model from its service: the pipeline is found by what the service answered, and goes into the archive."""

from __future__ import annotations

import csv
import json
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from skewless.adoption import trials as trials_module
from skewless.adoption.adopt import AdoptRequest, adopt
from skewless.adoption.folder import write_folder
from skewless.adoption.recorded import RecordError, part_name, read_recorded
from skewless.adoption.report import as_text, verdict, write_html
from skewless.adoption.trials import Candidate, single_edits
from skewless.core.networks.resnet_fastai import ResNetFastai
from skewless.core.pipeline import Pipeline
from skewless.errors import UsageError
from skewless.evaluation.scores import Prediction, predict, service_of
from skewless.importers.errors import ImportFileError
from skewless.training.checkpoint import load_checkpoint
from skewless.training.manifest import ManifestError, read_manifest
from tests.conftest import ROOT, run_skewless
from tests.recordings import one_thread  # noqa: F401
from tests.tiny_model import TinyModel, tiny_model  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

Record = Callable[[Path, Pipeline], list[Prediction]]


@pytest.fixture(scope="module")
def old_weights(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The weights alone, as another training script saves them."""
    path = tmp_path_factory.mktemp("old") / "old.pth"
    torch.save(load_checkpoint(tiny_model.checkpoint)["model_state_dict"], path)
    return path


@pytest.fixture(scope="module")
def manifest(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Twelve labelled files, without splits."""
    path = tmp_path_factory.mktemp("labelled") / "manifest.csv"
    rows = read_manifest(tiny_model.manifest, tiny_model.manifest.parent, tiny_model.definition.classes)[12:]
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file_path", "label"), *((row.path, row.label) for row in rows)])
    return path


@pytest.fixture
def record(tiny_model: TinyModel, manifest: Path) -> Record:  # noqa: F811
    """What a service with this pipeline answers, written down with six decimals."""
    service = service_of(tiny_model.definition, load_checkpoint(tiny_model.checkpoint), torch.device("cpu"))
    rows = read_manifest(manifest, manifest.parent, tiny_model.definition.classes, split="val")

    def write(path: Path, pipeline: Pipeline) -> list[Prediction]:
        predictions = predict(replace(service, definition=replace(service.definition, pipeline=pipeline)), rows, "")
        with open(path, "w", newline="", encoding="utf-8") as file:
            written = csv.writer(file)
            written.writerow(["file_path", "probability", "when"])
            written.writerows((p.recording.file_path, f"{p.scores[0]:.6f}", "2026-01-12") for p in predictions)
        return predictions

    return write


def variant(model: TinyModel, name: str) -> Pipeline:
    return Pipeline.from_yaml(model.archive / "variants" / f"{name}.yaml")


def request(model: TinyModel, weights: Path, folder: Path, **more) -> AdoptRequest:
    said = {"classes": ("tone", "noise")}
    return AdoptRequest(model.archive, weights, folder / "record.csv", folder / "out", imported=said, **more)


def test_the_variant_that_the_service_runs_is_found_packaged_and_proven(
    tiny_model: TinyModel,  # noqa: F811
    old_weights: Path,
    manifest: Path,
    record: Record,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    served = variant(tiny_model, "no_highpass")
    record(tmp_path / "record.csv", served)
    asked = request(tiny_model, old_weights, tmp_path, manifest=manifest, threshold=0.4, version="2.1")
    report = adopt(asked)
    assert report["best"]["name"] == "variants/no_highpass.yaml"
    gap = report["best"]["gap"]
    assert gap["reproduced"] and gap["largest"] <= 0.5e-6 + 1e-6  # the record's rounding, and float32
    assert gap["compared"] == report["record"]["files"] == 12 and report["record"]["unused"] == ["when"]
    assert [t["name"] for t in report["trials"] if t["gap"]["reproduced"]] == ["variants/no_highpass.yaml"]
    adopted = report["adopted"]
    with zipfile.ZipFile(adopted["archive"]) as archive:
        metrics = json.loads(archive.read("metrics.json"))
        card = archive.read("MODEL_CARD.md").decode()
    assert metrics["pipeline_fingerprint"] == served.fingerprint
    assert metrics["threshold"] == 0.4 and metrics["model_version"] == "2.1"
    assert metrics["evaluation"]["imported_from"]["reproduces"]["numbers"] == 12
    assert "this archive reproduces what the service that ran them before had answered for 12 files" in card
    # What the archive's own pipeline would change is the difference of both services' answers.
    own = record(tmp_path / "own.csv", tiny_model.definition.pipeline)
    theirs = record(tmp_path / "record.csv", served)
    apart = [abs(a.scores[0] - b.scores[0]) for a, b in zip(own, theirs, strict=True)]
    assert report["instead"]["largest"] == pytest.approx(max(apart), abs=1e-6)
    assert report["instead"]["edits"] == ["highpass inserted"]
    told = as_text(report)
    assert "variants/no_highpass.yaml is what the service computes: all 12 recorded numbers" in told
    page = tmp_path / "index.html"
    write_html(report, page)
    shown = page.read_text(encoding="utf-8")
    assert shown.count("<circle") == 12 and "<script" not in shown and "http" not in shown.replace("http-equiv", "")
    # Run again, nothing is computed again; what was kept of other weights is.
    computed = []
    answer = trials_module.Laboratory._answer
    monkeypatch.setattr(
        trials_module.Laboratory, "_answer", lambda self, *given: computed.append(1) or answer(self, *given)
    )
    assert adopt(asked)["best"] == report["best"] and not computed
    adopt(replace(asked, threshold=0.6))
    assert computed


def test_a_service_between_two_variants_is_found_by_edits(
    tiny_model: TinyModel,  # noqa: F811
    old_weights: Path,
    manifest: Path,
    record: Record,
    tmp_path: Path,
):
    served = variant(tiny_model, "tail_only").to_dict()
    served["stages"] = [stage for stage in served["stages"] if "highpass" not in stage]
    pipeline = Pipeline.from_dict(served, tiny_model.archive)
    record(tmp_path / "record.csv", pipeline)
    report = adopt(request(tiny_model, old_weights, tmp_path, manifest=manifest))
    assert report["best"]["name"] == "variants/tail_only.yaml, highpass removed"
    assert report["best"]["fingerprint"] == pipeline.fingerprint and report["best"]["gap"]["reproduced"]
    written = Pipeline.from_yaml(tmp_path / "out" / "tiny" / "pipeline.yaml")
    assert written.fingerprint == pipeline.fingerprint
    assert load_checkpoint(tmp_path / "out" / "best.pth")["pipeline_fingerprint"] == pipeline.fingerprint


def test_a_stage_that_no_archive_carries_is_replaced_by_one_that_can_be_served(
    tiny_model: TinyModel,  # noqa: F811
    old_weights: Path,
    manifest: Path,
    record: Record,
    tmp_path: Path,
):
    record(tmp_path / "record.csv", variant(tiny_model, "onnx_backend"))
    report = adopt(request(tiny_model, old_weights, tmp_path, manifest=manifest))
    assert report["best"]["name"] == "variants/onnx_backend.yaml" and not report["best"]["servable"]
    adopted = report["adopted"]
    assert "decode_pydub replaced by decode" in adopted["pipeline"] and adopted["reproduced"]
    assert "Built is" in as_text(report)


def test_a_record_of_other_weights_builds_nothing_unless_accepted(
    tiny_model: TinyModel,  # noqa: F811
    old_weights: Path,
    manifest: Path,
    record: Record,
    tmp_path: Path,
):
    predictions = record(tmp_path / "record.csv", tiny_model.definition.pipeline)
    with open(tmp_path / "record.csv", "w", encoding="utf-8") as file:
        file.write("file_path,probability\n")
        # In the reverse order, the probabilities are other files'.
        for p, other in zip(predictions, reversed(predictions), strict=True):
            file.write(f"{p.recording.file_path},{other.scores[0]:.6f}\n")
    options = (
        "--predictions",
        tmp_path / "record.csv",
        "--manifest",
        manifest,
        "--out",
        tmp_path / "out",
        "--classes",
        "tone,noise",
    )
    refused = run_skewless("adopt", tiny_model.archive, old_weights, *options, check=False)
    assert refused.returncode == 1
    assert "No pipeline reproduces the 12 recorded numbers of 12 files" in refused.stdout
    assert "So nothing was built" in refused.stdout
    assert not (tmp_path / "out" / "model_store").exists() and not (tmp_path / "out" / "best.pth").exists()
    assert "Not reproduced" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    report = adopt(request(tiny_model, old_weights, tmp_path, manifest=manifest, accept_closest=True))
    assert Path(report["adopted"]["archive"]).is_file() and not report["adopted"]["reproduced"]


def test_files_may_lie_in_a_folder_for_each_class(
    tiny_model: TinyModel,  # noqa: F811
    old_weights: Path,
    manifest: Path,
    record: Record,
    tmp_path: Path,
):
    record(tmp_path / "record.csv", tiny_model.definition.pipeline)
    for row in read_manifest(manifest, manifest.parent, ("tone", "noise"), split="val"):
        folder = tmp_path / "files" / ("Tone", "noise")[row.label]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(row.path, folder)
    # The record has the files' names alone.
    report = adopt(request(tiny_model, old_weights, tmp_path, files=tmp_path / "files"))
    assert report["best"]["name"] == "pipeline.yaml" and report["record"]["files"] == 12
    assert report["instead"] is None and report["adopted"]["auc"] == 1.0
    (tmp_path / "files" / "hum").mkdir()
    with pytest.raises(ManifestError, match="has the folder hum; the classes are tone, noise"):
        adopt(request(tiny_model, old_weights, tmp_path, files=tmp_path / "files"))


def test_what_holds_something_else_is_left_alone(tiny_model: TinyModel, old_weights: Path, tmp_path: Path):  # noqa: F811
    mine = tmp_path / "out" / "tiny" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine", encoding="utf-8")
    (tmp_path / "record.csv").write_text("file_path,probability\n", encoding="utf-8")
    with pytest.raises(UsageError, match="holds something else"):
        adopt(request(tiny_model, old_weights, tmp_path, manifest=tiny_model.manifest))
    assert mine.read_text(encoding="utf-8") == "mine"


def test_edits_are_those_of_the_variants_other_words_and_stages_left_out(tiny_model: TinyModel):  # noqa: F811
    base = Candidate("pipeline.yaml", tiny_model.definition.pipeline)
    names = [
        edit.name.removeprefix("pipeline.yaml, ")
        for edit in single_edits(base, [Candidate("t", variant(tiny_model, "tail_only"))], tiny_model.archive)
    ]
    assert names[0] == "segment: tail drop → pad"
    assert "resample: method sinc_hann → soxr_hq" in names and "mel: mel_scale htk → slaney" in names
    assert "highpass removed" in names and "decode removed" not in names
    assert "pcm of 16 bits (floor) inserted after resample" in names and not any("after mel" in name for name in names)


def test_a_file_that_was_replaced_is_answered_anew(
    tiny_model: TinyModel,  # noqa: F811
    manifest: Path,
    tmp_path: Path,
):
    checkpoint = load_checkpoint(tiny_model.checkpoint)
    service = service_of(tiny_model.definition, checkpoint, torch.device("cpu"))
    first, second = read_manifest(manifest, manifest.parent, tiny_model.definition.classes, split="val")[:2]
    candidate = Candidate("pipeline.yaml", tiny_model.definition.pipeline)

    def answered(source: Path) -> Mapping[str, float]:
        row = replace(first, path=Path(shutil.copy(source, tmp_path / "a.wav")))
        (answer,) = (
            trials_module.Laboratory(service, 0.5, tmp_path / "trials", "").run(candidate, [row], "").answers.values()
        )
        return answer

    assert answered(first.path) == answered(first.path) != answered(second.path)


def test_what_is_said_where_the_pipeline_is_found_and_nothing_could_be_built():
    gap = {"reproduced": True, "largest": 0.0, "mean": 0.0, "missing": 0, "worst": ""}
    best = {"name": "pipeline.yaml", "servable": True, "gap": gap}
    record = {"numbers": 3, "files": 3}
    reasons = {"pipeline.yaml": "the graph's logit is off by 2e-3; choose eager"}
    report = {"best": best, "record": record, "trials": [best], "not_packaged": reasons}
    told = verdict(report)
    assert told[1] == "pipeline.yaml cannot be packaged: the graph's logit is off by 2e-3; choose eager"
    assert told[2].startswith("So nothing was built. Mend that, for instance with --runtime eager")
    other = {"pipeline": "variants/other.yaml", "reproduced": True, "largest": 1e-6}
    told = verdict(report | {"adopted": other})
    assert told[2].startswith("Built is variants/other.yaml") and "imitates" not in " ".join(told)


# The folder of its own.


def test_the_folder_has_what_the_weights_and_their_owner_say(tmp_path: Path):
    weights = ResNetFastai(depth=18, channels=3, classes=4).state_dict()
    torch.save(weights, tmp_path / "old.pth")
    definition, changed = write_folder(ROOT / "archive" / "orca", tmp_path / "orca", tmp_path / "old.pth", (), 0.25)
    assert changed == {"channels": 3, "classes": 4, "threshold": 0.25}
    ((name, parameters),) = definition.network.items()
    assert (name, parameters["depth"], parameters["channels"], parameters["classes"]) == ("resnet_fastai", 18, 3, 4)
    assert definition.postprocessor.threshold == 0.25
    assert (tmp_path / "orca" / "variants" / "pad_minimum.yaml").is_file()


def test_classes_are_put_into_the_order_of_the_outputs_unless_a_yes_would_become_a_no(tmp_path: Path):
    torch.save({"a": torch.ones(1)}, tmp_path / "old.pth")
    order = ("human", "avatar", "animal")
    for archive, classes, written in (
        ("portrait", order, order),
        ("talent", ("bad", "good"), ("bad", "good")),
    ):
        folder = ROOT / "archive" / archive
        definition, _ = write_folder(folder, tmp_path / archive, tmp_path / "old.pth", classes, None)
        assert definition.classes == written
    for classes in (("good", "poor"), ("good", "bad")):
        with pytest.raises(UsageError, match="talented is true for good: it would become true for"):
            write_folder(ROOT / "archive" / "talent", tmp_path / "t", tmp_path / "old.pth", classes, None)


# What the service wrote down.


def written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_per_cent_and_rounding_decide_how_close_is_the_same(tmp_path: Path):
    path = written(tmp_path / "r.csv", "file_path,global_confidence,label", "a.wav,87.25,call", "b/c.wav,0,other")
    recorded = read_recorded(path, ["a.wav", "d/c.wav"], {"global_confidence", "probability"})
    assert recorded.values == {"a.wav": {"global_confidence": 87.25}, "d/c.wav": {"global_confidence": 0.0}}
    field = recorded.field("global_confidence")
    assert (field.scale, field.decimals) == (87.25, 2)
    assert field.allowed == pytest.approx(1e-4 * 87.25 + 0.005)
    assert field.noise == pytest.approx(5e-6 * 87.25 + 0.005)
    assert recorded.unused == ("label",)


def test_a_row_may_be_a_window(tmp_path: Path):
    path = written(tmp_path / "r.csv", "file_path,start_s,probability", "a.wav,0,0.5", "a.wav,1.0,1e-3")
    recorded = read_recorded(path, ["a.wav"], {"probability"})
    assert recorded.values == {"a.wav": {part_name(0.0): 0.5, "probability at 1 s": 1e-3}}
    assert recorded.field("probability at 1 s").decimals == 3


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["file_path,score", "a.wav,0.5"],
            r"has the columns file_path, score; it needs file_path and one of probability",
        ),
        (["probability", "0.5"], "it needs file_path"),
        (["file_path,start_s", "a.wav,0"], "it needs file_path and probability for each start_s"),
        (["file_path,probability", "a.wav,high"], "row 2: probability is 'high', expected a number"),
        (["file_path,probability", "a.wav,nan"], "row 2: probability is 'nan', expected a number"),
        (
            ["file_path,probability", "a.wav,0.5", "a.wav,0.6"],
            "row 3: 'a.wav' has another probability in an earlier row",
        ),
        (
            ["file_path,probability", "z.wav,0.5"],
            "has none of the labelled files; it has 'z.wav', the first labelled file is",
        ),
        (["file_path,probability"], "has no rows"),
        (["file_path,probability", "c.wav,0.5"], "2 labelled files are called 'c.wav'; write the path"),
    ],
)
def test_a_record_that_cannot_be_compared_is_refused(tmp_path: Path, lines: list[str], message: str):
    with pytest.raises(RecordError, match=re.escape(message) if "(" in message else message):
        read_recorded(written(tmp_path / "r.csv", *lines), ["a.wav", "x/c.wav", "y/c.wav"], {"probability"})


def test_a_window_that_is_not_cut_counts_as_a_difference(tmp_path: Path, tiny_model: TinyModel):  # noqa: F811
    path = written(tmp_path / "r.csv", "file_path,start_s,probability", "a.wav,0,0.5", "a.wav,7,0.5")
    recorded = read_recorded(path, ["a.wav"], {"probability"})
    answers = {"a.wav": {part_name(0.0): 0.5}}
    trial = trials_module.Trial(Candidate("p", tiny_model.definition.pipeline), answers)
    gap = trial.gap(recorded)
    assert gap is not None and not gap.reproduced and (gap.missing, gap.mean, gap.largest) == (1, 0.5, 1.0)


def test_wrong_use_is_exit_code_2_and_names_the_value(
    tiny_model: TinyModel,  # noqa: F811
    old_weights: Path,
    manifest: Path,
    tmp_path: Path,
):
    (tmp_path / "empty.csv").write_text("file_path,probability\n", encoding="utf-8")
    base = (
        "adopt",
        tiny_model.archive,
        old_weights,
        "--classes",
        "tone,noise",
        "--out",
        tmp_path / "out",
        "--predictions",
    )
    for more, message in (
        ((tmp_path / "empty.csv",), "either --files, a folder for each class, or --manifest"),
        (
            (tmp_path / "empty.csv", "--files", tmp_path / "none"),
            "expected a folder that has one for each class: tone, noise",
        ),
        ((tmp_path / "no.csv", "--manifest", manifest), "there is no file"),
        ((tmp_path / "empty.csv", "--manifest", manifest), "empty.csv has no rows"),
    ):
        ended = run_skewless(*base, *more, check=False)
        assert ended.returncode == 2 and message in ended.stderr, ended.stderr
        assert not (tmp_path / "out").exists()
    with pytest.raises(
        ImportFileError, match=f"--classes is required.* {tiny_model.archive / 'model.yaml'} has tone, noise"
    ):
        adopt(
            replace(
                request(tiny_model, old_weights, tmp_path, manifest=manifest),
                predictions=tmp_path / "empty.csv",
                imported={},
            )
        )
