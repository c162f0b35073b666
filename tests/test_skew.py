"""The skew report: alignment, comparison, attribution, and the files it writes."""

import base64
import contextlib
import io
import json
import random
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import soundfile
import torch

from skewless.core.postprocess.bag_threshold import BagThreshold
from skewless.core.networks import AttnMILResNet
from skewless.core.pipeline import Pipeline
from skewless.core.runtimes.eager import EagerRuntime
from skewless.core.stages import InputError, Stage
from skewless.skew.align import align
from skewless.skew.page import write_html
from archive.cough.pydub_decode import AudioSegment
from skewless.skew.report import as_text, at_threshold
from skewless.skew.skew import Comparator, Score, Tally, summarize
from scripts import skew_report
from skewless.training.checkpoint import save_checkpoint

ARCHIVE = Path(__file__).resolve().parents[1] / "archive" / "cough"
VARIANTS = sorted(path.stem for path in (ARCHIVE / "variants").glob("*.yaml"))
CHROMIUM = Path("/usr/bin/chromium")
THRESHOLD = 0.5

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
class LeftChannel(Stage, name="left_channel_of_test_skew"):
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


class TinyNetwork(torch.nn.Module):
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
    return lambda candidate: Comparator(reference, candidate, runtime, BagThreshold(THRESHOLD, "positive"))


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
    definition = reference.to_dict()
    definition["stages"] = change(definition["stages"])
    return Pipeline.from_dict(definition)


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
    swap = [{"left_channel_of_test_skew": {}}]
    candidate = reordered(reference, lambda s: s[:2] + s[3:4] + swap + s[4:])
    pair = comparator(candidate)
    assert [str(e) for e in pair.alignment.edits] == ["downmix removed", "left_channel_of_test_skew inserted"]
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


def test_a_recording_that_one_side_cannot_read_names_the_side(comparator, reference):
    pair = comparator(reordered(reference, lambda s: s[:2] + s[3:]))
    with pytest.raises(InputError, match=r"candidate: 'segment' takes one channel"):
        pair.measure("clip", recording("WAV", "PCM_16", channels=2))


def test_alignment_rebuilds_both_pipelines(reference):
    """Whatever is removed, moved, inserted or replaced: no edits give the reference, all give the candidate."""
    stages = reference.to_dict()["stages"]
    others = [{"left_channel_of_test_skew": {}}, {"decode_pydub": {}}, {"downmix": {}}]
    for seed in range(200):
        rng = random.Random(seed)
        ours, theirs = (
            rng.sample(stages + others, rng.randint(1, len(stages))) if rng.random() < 0.5 else
            [s for s in stages if rng.random() < 0.8] or stages
            for _ in range(2)
        )  # fmt: skip
        a, b = (Pipeline.from_dict({"name": "x", "stages": s}) for s in (ours, theirs))
        alignment = align(a, b)
        assert alignment.stages(frozenset()) == tuple(a.stages.values())
        assert alignment.stages(frozenset(range(len(alignment.edits)))) == tuple(b.stages.values())
        assert bool(alignment.edits) == (a.fingerprint != b.fingerprint)


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


def test_decode_pydub_sets_the_facts_of_decode():
    audio = recording("WAV", "PCM_16", channels=2)
    first, second = (Pipeline.from_dict({"name": "x", "stages": [{n: {}}]}) for n in ("decode", "decode_pydub"))
    a, b = first.run(audio), second.run(audio)
    assert a.metadata == b.metadata
    assert b.rate == a.rate
    # pydub averages channels in integers.
    assert torch.allclose(b.data, a.data.mean(dim=0, keepdim=True), atol=1 / 32768)
    # For MP3 pydub asks for 16 bits, which is also what ffmpeg gives when nobody asks.
    lossy = recording("MP3", "MPEG_LAYER_III", rate=44100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AudioSegment, "converter", imageio_ffmpeg.get_ffmpeg_exe())
        own = AudioSegment.from_file_using_temporary_files(io.BytesIO(lossy))
    assert np.array_equal(second(lossy)[0].numpy(), np.array(own.get_array_of_samples(), np.float32) / 32768)
    assert set(second.run(lossy).metadata) == set(a.metadata)
    for broken in (b"no audio at all", audio[:-1], b""):
        with pytest.raises(InputError):
            second.run(broken)
    with pytest.raises(InputError, match="longer than 1 s"):
        second.run(audio, max_duration_s=1.0)


@pytest.fixture(scope="module")
def root(tmp_path_factory, reference):
    """A folder with a checkpoint, a manifest, three recordings and a broken one."""
    root = tmp_path_factory.mktemp("skew")
    (root / "audio" / "sub").mkdir(parents=True)
    names = {"a.ogg": 1, "b.ogg": 0, "sub/c <&>.ogg": 0}
    for seed, name in enumerate(names):
        (root / "audio" / name).write_bytes(recording(seed=seed))
    rows = ["file_path,cough_label,split", *(f"{name},{label},test" for name, label in names.items())]
    (root / "list.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (root / "audio" / "broken.wav").write_bytes(b"RIFF....WAVE")
    torch.manual_seed(0)
    save_checkpoint(
        root / "best.pth",
        {
            "epoch": 1,
            "model_state_dict": AttnMILResNet().state_dict(),
            "pipeline": reference.to_dict(),
            "pipeline_fingerprint": reference.fingerprint,
            "network": {"attn_mil_resnet": {}},
            "postprocess": {"bag_threshold": {"threshold": THRESHOLD, "positive_field": "positive"}},
            "history": [],
        },
    )
    return root


def command(root, *extra, candidate="tail_only", source=("--audio", "audio"), out="out"):
    """Run the command line; returns what it printed."""
    arguments = ["--reference", ARCHIVE / "pipeline.yaml", "--candidate", ARCHIVE / "variants" / f"{candidate}.yaml"]
    arguments += ["--checkpoint", root / "best.pth", source[0], root / source[1], "--out", root / out, *extra]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", ["skew_report.py", *map(str, arguments)])
        skew_report.main()
    return printed.getvalue()


@pytest.fixture(scope="module")
def written(root):
    """The report of a folder: what is printed, skew.json and index.html."""
    printed = command(root, "--worst", "1", out="folder")
    return printed, *((root / "folder" / name).read_text(encoding="utf-8") for name in ("skew.json", "index.html"))


def test_report_of_a_folder(root, written):
    printed, text, page = written
    assert "first part at 'segment'" in printed
    assert "broken.wav" in printed
    assert "3x32000 → 7x32000" in printed
    report = json.loads(text)
    assert report["recordings_compared"] == 3
    assert [u["name"] for u in report["unreadable"]] == ["broken.wav"]
    assert report["metrics"] is None
    assert report["checkpoint"]["trained_with_reference"]
    for content in (text, page):
        assert str(root) not in content
        assert str(ARCHIVE) not in content
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


def test_report_of_a_manifest_has_metrics(root):
    source = ("--manifest", "list.csv")
    command(
        root, "--audio-root", root / "audio", "--worst", "0", "--limit", "2", source=source, candidate="pytorch_backend"
    )
    report = json.loads((root / "out" / "skew.json").read_text(encoding="utf-8"))
    assert [(r["name"], r["label"]) for r in report["recordings"]] == [
        ("a.ogg", "positive"),
        ("sub/c <&>.ogg", "negative"),
    ]
    assert report["metrics"]["reference"].keys() == report["metrics"]["candidate"].keys() >= {"auc", "f1"}
    assert report["first_divergence"]["stage"] == "standardize"


@pytest.mark.parametrize(
    ("extra", "source", "message"),
    [
        (["--threshold", "2"], ("--audio", "audio"), "expected a number in"),
        (["--limit", "0"], ("--audio", "audio"), "expected at least 1"),
        (["--candidate", "absent.yaml"], ("--audio", "audio"), "absent.yaml"),
        (["--checkpoint", __file__], ("--audio", "audio"), "is not a checkpoint"),
        ([], ("--audio", "nowhere"), "expected a folder"),
        (["--split", "val"], ("--manifest", "list.csv"), "there is no file"),
        (
            ["--split", "val", "--audio-root", "{root}/audio"],
            ("--manifest", "list.csv"),
            "no recordings in split 'val'",
        ),
    ],
)
def test_wrong_input_exits_with_2(capsys, root, extra, source, message):
    with pytest.raises(SystemExit) as stopped:
        command(root, *(e.format(root=root) for e in extra), source=source)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


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
    before, after = Score((0.6, 0.3, 0.1), ()), Score((0.35, 0.45, 0.2), ())
    rows = [
        replace(same, name="changed", label=0, reference=before, candidate=after),
        replace(same, name="kept", label=1, reference=after, candidate=after),
        replace(same, name="last", label=2, reference=Score((0.0, 0.1, 0.9), ()), candidate=Score((0.0, 0.2, 0.8), ())),
    ]
    report = summarize(pair.alignment, rows, 0.7, ("animal", "avatar", "human"))
    changes = [entry["change"] for entry in report["recordings"]]
    assert changes == pytest.approx([-0.25, 0.0, -0.1])
    assert report["together"]["flips"] == 1
    assert report["recordings"][0]["chosen"] == {"reference": "animal", "candidate": "avatar"}
    assert report["metrics"]["reference"]["accuracy"] == 1.0
    assert report["metrics"]["candidate"]["accuracy"] == pytest.approx(2 / 3)
    assert at_threshold(report) == ""
    assert at_threshold(report | {"classes": ["no", "yes"]}) == " at threshold 0.7"
