"""The synthetic corpus: the same every time, labelled rightly, and with no cue but the sound."""

import csv
import io
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from skewless.demos.cough import FORMATS, encode, split_speakers, synthesize, write_corpus
from skewless.demos.writer import CorpusError
from tests.conftest import call_skewless

SETTINGS = {"clips": 24, "seed": 7, "min_seconds": 1.0, "max_seconds": 1.5}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def decode(path: Path) -> tuple[np.ndarray, int]:
    if path.suffix not in (".m4a", ".webm"):
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        return samples.T, rate
    with av.open(str(path)) as file:
        frames = [frame.to_ndarray() for frame in file.decode(audio=0)]
        return np.concatenate(frames, axis=1), file.streams.audio[0].rate


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("corpus") / "demo"
    assert write_corpus(out, **SETTINGS)
    return out


@pytest.fixture(scope="module")
def clips():
    return [synthesize(i, SETTINGS["seed"], min_seconds=1.0, max_seconds=1.5) for i in range(SETTINGS["clips"])]


def test_same_settings_give_the_same_bytes(corpus, tmp_path):
    write_corpus(tmp_path / "again", **SETTINGS)
    for path in filter(Path.is_file, corpus.rglob("*")):
        assert (tmp_path / "again" / path.relative_to(corpus)).read_bytes() == path.read_bytes(), path.name
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_float_wav_carries_no_time_of_writing():
    index = next(i for i in range(0, 100, 2) if synthesize(i, 0, formats=("wav",)).subtype == "FLOAT")
    data = encode(synthesize(index, 0, formats=("wav",)))
    peak = data.index(b"PEAK")
    assert data[peak + 12 : peak + 16] == bytes(4)
    assert soundfile.info(io.BytesIO(data)).subtype == "FLOAT"


def test_streams_are_those_of_version_1():
    """A change of what is synthesised must raise VERSION: two corpora are never mistaken for one."""
    clip = synthesize(11, 42)
    assert (clip.label, clip.speaker, clip.format, clip.rate) == (1, 2, "webm", 48000)
    assert clip.samples.shape == (1, 159444)
    assert np.sqrt(np.mean(clip.samples.astype(float) ** 2)) == pytest.approx(0.0275094, rel=1e-4)
    assert [(e.name, round(e.onset_s, 4), round(e.offset_s, 4)) for e in clip.events] == [
        ("cough", 1.6584, 1.931),
        ("cough", 2.0434, 2.2836),
        ("rumble", 2.4468, 2.9922),
        ("cough", 2.5183, 2.8764),
    ]


def test_manifest_is_balanced_and_keeps_speakers_apart(corpus):
    manifest = rows(corpus / "manifest.csv")
    assert list(manifest[0]) == ["file_path", "cough_label", "split"]
    assert {row["file_path"] for row in manifest} == {f"audio/{path.name}" for path in (corpus / "audio").iterdir()}
    assert Counter((row["split"], row["cough_label"]) for row in manifest) == {
        (split, label): count for split, count in (("train", 8), ("val", 2), ("test", 2)) for label in "01"
    }
    splits_of_speaker: dict[int, set[str]] = {}
    for index, row in enumerate(manifest):
        speaker = synthesize(index, 7, min_seconds=1.0, max_seconds=1.0).speaker
        splits_of_speaker.setdefault(speaker, set()).add(row["split"])
    assert all(len(splits) == 1 for splits in splits_of_speaker.values())


@pytest.mark.parametrize("speakers, held_out", [(3, 1), (6, 1), (60, 12), (61, 12)])
def test_a_fifth_of_the_speakers_is_held_out_twice(speakers, held_out):
    counts = Counter(split_speakers(speakers, seed=1))
    assert counts == {"train": speakers - 2 * held_out, "val": held_out, "test": held_out}


def test_coughs_are_in_the_coughs_only(corpus):
    coughed = {row["file_path"] for row in rows(corpus / "events.csv") if row["event"] == "cough"}
    assert coughed == {row["file_path"] for row in rows(corpus / "manifest.csv") if row["cough_label"] == "1"}


def test_events_are_inside_the_clip_and_louder_than_the_rest(clips):
    for clip in clips:
        seconds = np.arange(clip.samples.shape[1]) / clip.rate
        inside = np.zeros(len(seconds), dtype=bool)
        for event in clip.events:
            assert 0 <= event.onset_s < event.offset_s <= clip.samples.shape[1] / clip.rate
            inside |= (seconds >= event.onset_s) & (seconds < event.offset_s)
        if inside.any() and not inside.all():
            power = (clip.samples[0] - np.median(clip.samples[0])) ** 2
            assert power[inside].mean() > power[~inside].mean()


def test_every_format_decodes_to_what_was_synthesised(corpus, clips):
    seen = set()
    for index, clip in enumerate(clips):
        samples, rate = decode(corpus / "audio" / f"clip-{index:05d}.{clip.format}")
        seen.add(clip.format)
        extra = samples.shape[1] - clip.samples.shape[1]
        assert rate == clip.rate and len(samples) == len(clip.samples)
        assert 0 <= extra < (1024 if clip.format == "m4a" else 1)
        if clip.events:
            assert np.corrcoef(samples[0, : clip.samples.shape[1]], clip.samples[0])[0, 1] > 0.4
    assert seen == set(FORMATS)


def test_recording_does_not_betray_the_label(clips):
    for other, cough in zip(clips[::2], clips[1::2], strict=True):
        assert (other.label, cough.label) == (0, 1)
        assert other.speaker == cough.speaker
        assert (other.format, other.subtype, other.rate) == (cough.format, cough.subtype, cough.rate)
        assert other.samples.shape == cough.samples.shape
        if other.events:
            assert np.abs(other.samples).max() == pytest.approx(np.abs(cough.samples).max(), rel=1e-5)


def test_a_clip_does_not_depend_on_the_number_of_clips(corpus, tmp_path):
    write_corpus(tmp_path / "more", **SETTINGS | {"clips": 26})
    for path in (corpus / "audio").iterdir():
        assert (tmp_path / "more" / "audio" / path.name).read_bytes() == path.read_bytes()


def test_same_corpus_is_left_alone_and_anything_else_refused(corpus, tmp_path):
    before = (corpus / "manifest.csv").stat().st_mtime_ns
    assert not write_corpus(corpus, **SETTINGS)
    assert (corpus / "manifest.csv").stat().st_mtime_ns == before
    with pytest.raises(CorpusError, match="holds a corpus with settings"):
        write_corpus(corpus, **SETTINGS | {"seed": 8})
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CorpusError, match=r"no corpus\.json"):
        write_corpus(tmp_path, **SETTINGS)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"clips": 13}, "even number"),
        ({"clips": 2}, "at least 12"),
        ({"seed": -1}, "negative"),
        ({"min_seconds": 3.0}, "minimum <= maximum"),
        ({"formats": ("wav", "aiff")}, "aiff"),
    ],
)
def test_impossible_settings_are_refused(change, message, tmp_path):
    with pytest.raises(CorpusError, match=message):
        write_corpus(tmp_path / "out", **SETTINGS | change)
    assert not list(tmp_path.iterdir())


def test_command_line_exits_with_2_on_a_directory_in_use(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = call_skewless("corpus", "--kind", "cough", "--out", tmp_path, "--count", 12)
    assert result.returncode == 2
    assert "no corpus.json" in result.stderr and "Traceback" not in result.stderr
