"""The skew report: alignment, comparison, attribution, and the files it writes."""

import base64
import io
import json
import random
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from skewless.core.align import align
from skewless.core.networks import Network
from skewless.core.pipeline import Pipeline
from skewless.core.postprocess.bag_threshold import BagThreshold
from skewless.core.runtimes.eager import EagerRuntime
from skewless.core.service import Scored
from skewless.core.stages import InputError, PipelineError, Stage
from skewless.skew.aggregate import summarize
from skewless.skew.compare import skew_report
from skewless.skew.measure import Comparator, Tally
from skewless.skew.page import write_html
from skewless.skew.pictures import Example, segment_images, waveform
from skewless.skew.report import as_text, threshold_phrase
from tests.recordings import FFMPEG, AudioSegment
from tests.tiny_model import TinyModel, tiny_model  # noqa: F401

ARCHIVE = Path(__file__).resolve().parents[1] / "archive" / "cough"
VARIANTS = sorted(path.stem for path in (ARCHIVE / "variants").glob("*.yaml"))
CHROMIUM = Path("/usr/bin/chromium")
THRESHOLD = 0.5
CLASSES = ("negative", "positive")

# First diverging stage and the paired stage that shows it, for a lossy recording that is not at full level.
FIRST = {
    "no_highpass": ("highpass", "missing in candidate", "segment"),
    "pytorch_backend": ("standardize", "arithmetic float32 → float16", "standardize"),
    "onnx_backend": ("decode", "replaced by decode_pydub", "decode"),
    "bit_depth_only": ("peak_normalize", "missing in candidate", "downmix"),
    "tail_only": ("segment", "tail drop → pad", "segment"),
    "coupled_top_db": ("decibel", "max_over segment → recording", "decibel"),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads of small operations wait for one another where processors are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class LeftChannel(Stage, name="left_channel"):
    """The first channel: `(C, N)` to `(1, N)`."""

    unit = "full scale"

    def __call__(self, signal):
        return signal.of(signal.data[:1])


def recording(format="OGG", subtype="VORBIS", channels=1, seed=0, rate=16000):
    """3.2 s: near silence, then noise and a tone at half level over a rumble."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(3.2 * rate)) / rate
    # Loud in the last half second only: of three segments of 2 s every 0.5 s, two are 80 dB and more below the third.
    level = np.where(time < 2.7, 1e-7, 0.3)[:, None]
    samples = level * rng.standard_normal((len(time), channels)) * 0.3
    samples += (level * np.sin(2 * np.pi * 700 * time)[:, None]) + level * 0.3 * np.sin(2 * np.pi * 20 * time)[:, None]
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, subtype=subtype)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def reference():
    return Pipeline.from_yaml(ARCHIVE / "pipeline.yaml")


def variant(name):
    return Pipeline.from_yaml(ARCHIVE / "variants" / f"{name}.yaml")


class TinyNetwork(Network):
    """Random weights over a coarse view of the image; cheap, and moved by small changes of the input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.project = torch.nn.Linear(3 * 32 * 32, 16)

    def encode(self, x):
        return torch.tanh(3 * self.project(torch.nn.functional.adaptive_avg_pool2d(x, 32).flatten(1)))

    def head(self, features):
        return {
            "bag_probability": torch.sigmoid(features.mean(dim=0).sum()),
            "segment_probabilities": torch.sigmoid(features.sum(dim=1)),
        }


@pytest.fixture(scope="module")
def runtime():
    return EagerRuntime(TinyNetwork(), torch.device("cpu"))


@pytest.fixture(scope="module")
def comparator(reference, runtime):
    return lambda candidate: Comparator(reference, candidate, runtime, BagThreshold(THRESHOLD, "positive", CLASSES))


@pytest.fixture(scope="module")
def measured(comparator):
    """Every variant on one lossy recording: name -> (alignment, measurement, summary)."""
    found = {}
    for name in VARIANTS:
        pair = comparator(variant(name))
        measurement = pair.measure("clip.ogg", recording())
        found[name] = (pair.alignment, measurement, summarize(pair.alignment, [measurement], THRESHOLD))
    return found


def test_every_variant_is_expected():
    assert set(VARIANTS) == set(FIRST)


@pytest.mark.parametrize("name", VARIANTS)
def test_first_diverging_stage(measured, name):
    first = measured[name][2]["first_divergence"]
    assert (first["stage"], first["definition"], first["seen_at"]) == FIRST[name]
    before = measured[name][2]["stages"][: first["row"]]
    assert all(stage["same"] for stage in before)


@pytest.mark.parametrize("name", VARIANTS)
def test_increments_in_order_add_up_to_the_whole_change(measured, name):
    _, measurement, report = measured[name]
    (entry,) = report["recordings"]
    assert abs(sum(entry["in_order"]) - measurement.change) < 1e-6
    assert abs(sum(entry["alone"]) + entry["interaction"] - measurement.change) < 1e-6
    assert measurement.change != 0


def test_edits_of_the_onnx_backend(measured):
    assert [str(edit) for edit in measured["onnx_backend"][0].edits] == [
        "decode replaced by decode_pydub",
        "peak_normalize removed",
        "downmix removed",
        "highpass removed",
        "segment: tail drop → pad",
        "cast removed",
    ]
    downmix = measured["onnx_backend"][2]["edits"][2]
    assert downmix["inputs_changed_alone"] == 0, "a mono recording has nothing to mix down"
    assert downmix["alone"]["max_abs"] == 0


def test_another_segment_count_is_compared_over_the_overlap(measured):
    stages = {s["stage"]: s for s in measured["tail_only"][2]["stages"]}
    assert stages["segment"]["shapes"] == [{"reference": [3, 32000], "candidate": [7, 32000], "recordings": 1}]
    assert stages["segment"]["difference"]["values"] == 3 * 32000
    assert stages["segment"]["difference"]["max"] == 0
    assert not stages["segment"]["same"]


def test_reference_probability_is_the_served_one(comparator, reference, runtime):
    audio = recording(seed=1)
    measurement = comparator(variant("no_highpass")).measure("clip", audio)
    (outputs,) = runtime([reference(audio)])
    assert measurement.reference.scores == (float(outputs["bag_probability"]),)
    assert [p.probability for p in measurement.reference.parts] == outputs["segment_probabilities"].tolist()


def test_identical_pipelines(comparator, reference):
    pair = comparator(reference)
    report = summarize(pair.alignment, [pair.measure("clip", recording(), 1)], THRESHOLD)
    assert report["first_divergence"] is None
    assert report["edits"] == []
    assert report["together"] == {"mean": 0, "mean_abs": 0, "max_abs": 0, "flips": 0, "recordings": 1}
    assert all(stage["same"] and stage["definition"] == "same" for stage in report["stages"])


def test_a_definition_may_differ_without_effect(comparator):
    """16-bit WAV is read alike by both decoders."""
    pair = comparator(variant("onnx_backend"))
    report = summarize(pair.alignment, [pair.measure("clip", recording("WAV", "PCM_16"))], THRESHOLD)
    assert report["stages"][0]["same"]
    assert report["stages"][0]["definition"] == "replaced by decode_pydub"
    assert report["first_divergence"]["stage"] == "peak_normalize"


def reordered(reference, change):
    """The reference with its list of stages changed."""
    return Pipeline("changed", change(list(reference.stages.values())))


def test_a_moved_stage_is_one_edit(comparator, reference):
    pair = comparator(reordered(reference, lambda s: [s[0], s[2], s[1], *s[3:]]))
    assert [str(edit) for edit in pair.alignment.edits] == ["downmix moved"]
    mono = pair.measure("mono", recording("WAV", "PCM_16"))
    report = summarize(pair.alignment, [mono], THRESHOLD)
    assert report["first_divergence"] is None
    assert report["inputs_identical"] == 1
    assert mono.change == 0
    stereo = pair.measure("stereo", recording("WAV", "PCM_16", channels=2))
    first = summarize(pair.alignment, [mono, stereo], THRESHOLD)["first_divergence"]
    assert (first["stage"], first["definition"]) == ("downmix", "moved here in candidate")
    assert (first["seen_at"], first["recordings"]) == ("peak_normalize", 1)


def test_edits_that_only_run_together_are_counted_together(comparator, reference, tmp_path):
    candidate = reordered(reference, lambda s: [*s[:2], s[3], LeftChannel(), *s[4:]])
    pair = comparator(candidate)
    assert [str(e) for e in pair.alignment.edits] == ["downmix removed", "left_channel inserted"]
    measurement = pair.measure("clip", recording("WAV", "PCM_16", channels=2))
    report = summarize(pair.alignment, [measurement], THRESHOLD)
    removed, inserted = report["edits"]
    assert removed["in_order"] is None
    assert removed["counted_with"] == 1
    assert removed["alone"]["recordings"] == 0
    assert "one channel" in next(iter(removed["cannot_run"]["alone"]))
    assert inserted["in_order"]["mean"] == pytest.approx(measurement.change, abs=1e-6)
    assert report["interaction"]["recordings"] == 0
    assert "cannot run" in as_text({**report, **CONTEXT})
    write_html({**report, **CONTEXT}, [], tmp_path / "index.html")
    assert "cannot run" in (tmp_path / "index.html").read_text(encoding="utf-8")


CONTEXT = {
    "reference": {"file": "a.yaml", "fingerprint": "0" * 64},
    "candidate": {"file": "b.yaml", "fingerprint": "1" * 64},
    "checkpoint": {"file": "c.pth", "epoch": 1, "sha256": "2" * 64, "trained_with_reference": False,
                   "pipeline_fingerprint": "3" * 64},
    "source": "one recording",
    "precision": {"device": "cpu"},
    "library_versions": {},
    "unreadable": [],
}  # fmt: skip


def test_a_pipeline_that_cannot_run_names_the_side(comparator, reference):
    pair = comparator(reordered(reference, lambda s: s[:2] + s[3:]))
    with pytest.raises(PipelineError, match=r"^candidate pipeline: stage 'segment': it takes one channel, got 2"):
        pair.measure("clip", recording("WAV", "PCM_16", channels=2))


def test_alignment_rebuilds_both_pipelines(reference):
    """Whatever is removed, moved, inserted or replaced: no edits give the reference, all give the candidate."""
    stages = list(reference.stages.values())
    others = [
        LeftChannel(),
        variant("onnx_backend").stages["decode_pydub"],
        replace(reference.stages["highpass"], q=1.0),
    ]
    for seed in range(200):
        rng = random.Random(seed)
        ours, theirs = (
            rng.sample(stages + others, rng.randint(1, len(stages))) if rng.random() < 0.5 else
            [s for s in stages if rng.random() < 0.8] or stages
            for _ in range(2)
        )  # fmt: skip
        a, b = Pipeline("x", ours), Pipeline("x", theirs)
        alignment = align(a, b)
        assert alignment.stages(frozenset()) == tuple(a.stages.values())
        assert alignment.stages(frozenset(range(len(alignment.edits)))) == tuple(b.stages.values())
        assert bool(alignment.edits) == bool(a.diff(b)) == (a.fingerprint != b.fingerprint)


def test_tally_agrees_with_numpy():
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.standard_normal((2, 5000)).astype(np.float32)) for _ in range(2))
    b[0, :2500] = a[0, :2500]
    distance = (a.double() - b.double()).abs().numpy()
    tally = Tally.of(a, b)
    tally.add(Tally.of(a, b))
    found = tally.summary()
    assert found["values"] == 20000
    assert found["share_affected"] == 0.75
    assert found["max"] == distance.max()
    assert found["mean"] == pytest.approx(distance.mean())
    assert found["p99"] == pytest.approx(np.quantile(distance, 0.99), rel=0.01)


def test_decode_pydub_sets_the_metadata_of_decode(reference):
    audio = recording("WAV", "PCM_16", channels=2)
    first = Pipeline("x", [reference.stages["decode"]])
    second = Pipeline("x", [variant("onnx_backend").stages["decode_pydub"]])
    a, b = first.run(audio), second.run(audio)
    assert a.metadata == b.metadata
    assert b.rate == a.rate
    # pydub averages channels in integers.
    assert torch.allclose(b.data, a.data.mean(dim=0, keepdim=True), atol=1 / 32768)
    # For MP3 pydub asks for 16 bits, which is also what ffmpeg gives when nobody asks.
    lossy = recording("MP3", "MPEG_LAYER_III", rate=44100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AudioSegment, "converter", FFMPEG)
        own = AudioSegment.from_file_using_temporary_files(io.BytesIO(lossy))
    assert np.array_equal(second(lossy)[0].numpy(), np.array(own.get_array_of_samples(), np.float32) / 32768)
    assert set(second.run(lossy).metadata) == set(a.metadata)
    for broken in (b"no audio at all", audio[:-1], b""):
        with pytest.raises(InputError):
            second.run(broken)
    with pytest.raises(InputError, match="longer than 1 s"):
        second.run(audio, max_duration_s=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of three recordings and a broken one."""
    folder = tmp_path_factory.mktemp("recordings")
    (folder / "sub").mkdir()
    for seed, name in enumerate(("a.ogg", "b.ogg", "sub/c <&>.ogg")):
        (folder / name).write_bytes(recording(seed=seed))
    (folder / "broken.wav").write_bytes(b"RIFF....WAVE")
    return folder


def compare(model: TinyModel, out: Path, candidate: str = "tail_only", **options):
    path = model.archive / "variants" / f"{candidate}.yaml"
    return skew_report(model.definition, model.checkpoint, path, out, **options)


@pytest.fixture(scope="module")
def written(tiny_model, folder, tmp_path_factory):  # noqa: F811
    """The report of a folder: as text, skew.json and index.html."""
    out = tmp_path_factory.mktemp("report")
    text = as_text(compare(tiny_model, out, files=folder, examples=1))
    return text, *((out / name).read_text(encoding="utf-8") for name in ("skew.json", "index.html"))


def test_report_of_a_folder(folder, tiny_model, written):  # noqa: F811
    printed, text, page = written
    assert "first part at 'segment'" in printed
    assert "broken.wav" in printed
    assert "3x32000 → 7x32000" in printed
    report = json.loads(text)
    assert report["reference"]["file"] == "pipeline.yaml"
    assert report["recordings_compared"] == 3
    assert [u["name"] for u in report["unreadable"]] == ["broken.wav"]
    assert report["metrics"] is None
    assert report["threshold"] == THRESHOLD
    assert report["checkpoint"]["trained_with_reference"]
    assert {"torch", "torchaudio", "av"} <= set(report["library_versions"])
    for content in (text, page):
        assert str(folder) not in content
        assert str(tiny_model.archive.parent) not in content
    assert "c &lt;&amp;&gt;.ogg" in page


def test_page_is_self_contained(written):
    page = written[2]
    assert set(re.findall(r'(?:src|href)="([a-z]+:)', page)) == {"data:"}
    assert not re.search(r"<(script|link|iframe|object)\b|@import|url\((?!#)", page)
    pictures = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]+)" width="\d+" alt="([^"]+)"', page)
    assert len(pictures) == page.count("<img ") > 6
    for data, alt in pictures:
        svg = base64.b64decode(data).decode()
        assert len(alt) > 20
        assert not re.search(r'href="(?!#|data:)', svg)


def test_report_of_a_manifest_has_metrics(tiny_model, tmp_path):  # noqa: F811
    report = compare(
        tiny_model,
        tmp_path,
        candidate="onnx_backend",
        reference=tiny_model.archive / "variants" / "no_highpass.yaml",
        manifest=tiny_model.manifest,
        limit=2,
        examples=0,
        threshold=0.25,
    )
    assert report == json.loads((tmp_path / "skew.json").read_text(encoding="utf-8"))
    assert [(r["name"], r["label"]) for r in report["recordings"]] == [("18.wav", "tone"), ("23.wav", "noise")]
    assert report["metrics"]["reference"].keys() == report["metrics"]["candidate"].keys() >= {"auc", "f1"}
    assert report["threshold"] == 0.25
    assert report["reference"]["file"] == "no_highpass.yaml"
    assert not report["checkpoint"]["trained_with_reference"]
    assert "trained with another pipeline than this reference" in as_text(report)
    # What only the candidate computes with is listed, too.
    assert "pydub" in report["library_versions"]


WRONG = {
    "threshold": ({"threshold": 2.0}, "threshold is 2.0, expected a number in"),
    "limit": ({"limit": 0}, "limit is 0, expected at least 1"),
    "examples": ({"examples": -1}, "examples is -1, expected 0 or more"),
    "candidate": ({"candidate": "absent"}, r"no pipeline file .*absent.yaml"),
    "reference": ({"reference": Path("absent.yaml")}, "no pipeline file absent.yaml"),
    "folder": ({"files": Path("nowhere")}, "nowhere, expected a folder"),
    "neither": ({"files": None}, "either a manifest or a folder"),
    "both": ({"manifest": Path("list.csv")}, "either a manifest or a folder"),
    "root of a folder": ({"root": Path("nowhere")}, "a root belongs to a manifest"),
    "no manifest": ({"files": None, "manifest": Path("list.csv")}, "there is no manifest list.csv"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_named(tiny_model, folder, tmp_path, options, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        compare(tiny_model, tmp_path / "out", **{"files": folder, **options})
    assert not (tmp_path / "out").exists()


def test_nothing_to_compare_is_said(tiny_model, tmp_path):  # noqa: F811
    manifest = tmp_path / "list.csv"
    manifest.write_text("file_path,label,split\n18.wav,tone,train\n", encoding="utf-8")
    with pytest.raises(ValueError, match="there is no file"):
        compare(tiny_model, tmp_path / "out", manifest=manifest)
    with pytest.raises(ValueError, match="no recordings in split 'val'"):
        compare(tiny_model, tmp_path / "out", manifest=manifest, root=tiny_model.manifest.parent, split="val")
    with pytest.raises(ValueError, match="split is 'dev', expected one of train, val, test"):
        compare(tiny_model, tmp_path / "out", manifest=manifest, split="dev")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no files"):
        compare(tiny_model, tmp_path / "out", files=tmp_path / "empty")
    (tmp_path / "empty" / "broken.wav").write_bytes(b"RIFF....WAVE")
    with pytest.raises(ValueError, match=r"none of the 1 files can be read:\n  broken\.wav: "):
        compare(tiny_model, tmp_path / "out", files=tmp_path / "empty")
    with pytest.raises(ValueError, match="is text, starting with"):
        compare(replace(tiny_model, checkpoint=manifest), tmp_path / "out", files=tmp_path / "empty")


STAGE = '''\
from dataclasses import dataclass
from typing import ClassVar

from skewless.core.stages import Stage


@dataclass(frozen=True)
class Louder(Stage, name="louder"):
    """The samples times `factor`: `(1, N)` to `(1, N)`."""

    unit: ClassVar[str] = "full scale"

    factor: float

    def __call__(self, signal):
        return signal.of(self.factor * signal.data)
'''


def with_louder(folder: Path, code: str, factor: float, reference: Pipeline) -> Pipeline:
    """The reference with a stage of the folder's own code after the high-pass."""
    folder.mkdir()
    (folder / "louder.py").write_text(code, encoding="utf-8")
    stages = reference.to_dict()["stages"]
    stages.insert(5, {"louder.py:Louder": {"factor": factor}})
    return Pipeline.from_dict({"name": "x", "stages": stages}, folder)


def test_stages_of_own_code_are_aligned_by_name_and_compared_by_their_code(comparator, reference, tmp_path):
    first = with_louder(tmp_path / "first", STAGE, 1.0, reference)
    copied = with_louder(tmp_path / "copied", STAGE, 1.0, reference)
    louder = with_louder(tmp_path / "louder", STAGE, 0.5, reference)
    rewritten = with_louder(tmp_path / "rewritten", STAGE.replace("self.factor *", "2 * self.factor *"), 1.0, reference)
    assert align(first, copied).edits == ()
    assert first.diff(copied) == []
    assert [str(edit) for edit in align(first, louder).edits] == ["louder: factor 1.0 → 0.5"]
    assert [str(difference) for difference in first.diff(louder)] == ["louder.factor: 1.0 here, 0.5 there"]
    (edit,) = align(first, rewritten).edits
    assert re.fullmatch(r"louder: louder\.py [0-9a-f]{12} → [0-9a-f]{12}", str(edit))
    (difference,) = first.diff(rewritten)
    assert (difference.stage, difference.parameter) == ("code", "louder.py")
    assert (difference.ours, difference.theirs) == (first.code["louder.py"], rewritten.code["louder.py"])
    pair = Comparator(first, rewritten, comparator(reference)._runtime, BagThreshold(THRESHOLD, "positive", CLASSES))
    report = summarize(pair.alignment, [pair.measure("clip", recording())], THRESHOLD)
    assert report["first_divergence"]["stage"] == "louder"
    assert report["edits"][0]["in_order"]["mean"] == pytest.approx(report["together"]["mean"], abs=1e-9)


def test_pictures_take_the_units_from_the_stages(comparator, reference, tmp_path):
    """Of a stage of one's own, too: its output is the waveform before segmentation."""
    pipeline = with_louder(tmp_path / "own", STAGE, 0.5, reference)
    pair = comparator(pipeline)
    report = summarize(pair.alignment, [pair.measure("clip", recording())], THRESHOLD)
    example = Example(report["recordings"][0], *pair.traces(recording()))
    peaks = [float(re.search(rf"{words}", waveform(example).alt)[1]) for words in
             (r"peak ([\d.]+) in the reference", r"([\d.]+) in the candidate")]  # fmt: skip
    assert peaks[1] == pytest.approx(peaks[0] / 2, abs=2e-3)
    assert {name: unit for name, (_, unit) in example.candidate.items()}["louder"] == "full scale"
    # A stage that passes values on keeps the unit of those before it.
    assert example.candidate["replicate"].unit == example.candidate["cast"].unit == "image value"
    assert "output of 'cast'" in segment_images(example)[0].title


@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no browser at {CHROMIUM}")
def test_page_in_a_browser(written, tmp_path):
    """Every picture loads, and the page is no wider than a phone."""
    probe = """<script>addEventListener("load", () => { const all = [...document.images];
      document.body.dataset.probe = [all.length, all.filter(i => i.naturalWidth > 0).length,
        document.documentElement.scrollWidth - innerWidth].join(",") })</script>"""
    (tmp_path / "page.html").write_text(written[2].replace("</head>", probe + "</head>"), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--window-size=500,900"]  # fmt: skip
    done = subprocess.run(
        [CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "page.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    shutil.rmtree(tmp_path / "profile")
    images, loaded, overflow = map(int, re.search(r'data-probe="([^"]+)"', done.stdout)[1].split(","))
    assert images == loaded > 5
    assert overflow <= 0


def test_three_classes_have_no_threshold(comparator, reference):
    """By hand: the change is told in the class that the reference chooses, and the decision changes with the highest."""
    pair = comparator(reference)
    same = pair.measure("clip", recording())
    before, after = Scored((0.6, 0.3, 0.1), ()), Scored((0.35, 0.45, 0.2), ())
    rows = [
        replace(same, name="changed", label=0, reference=before, candidate=after),
        replace(same, name="kept", label=1, reference=after, candidate=after),
        replace(
            same, name="last", label=2, reference=Scored((0.0, 0.1, 0.9), ()), candidate=Scored((0.0, 0.2, 0.8), ())
        ),
    ]
    report = summarize(pair.alignment, rows, 0.7, ("animal", "avatar", "human"))
    changes = [entry["change"] for entry in report["recordings"]]
    assert changes == pytest.approx([-0.25, 0.0, -0.1])
    assert report["together"]["flips"] == 1
    assert report["recordings"][0]["chosen"] == {"reference": "animal", "candidate": "avatar"}
    assert report["metrics"]["reference"]["accuracy"] == 1.0
    assert report["metrics"]["candidate"]["accuracy"] == pytest.approx(2 / 3)
    assert threshold_phrase(report) == ""
    assert threshold_phrase(report | {"classes": ["no", "yes"]}) == " at threshold 0.7"


@pytest.mark.parametrize("path", sorted(ARCHIVE.parent.glob("*/variants/*.yaml")), ids=lambda path: path.stem)
def test_every_variant_of_every_archive_is_read_and_differs(path):
    archive = Pipeline.from_yaml(path.parents[1] / "pipeline.yaml")
    found = Pipeline.from_yaml(path)
    assert found.reads == archive.reads
    assert archive.diff(found)
    assert align(archive, found).edits
