"""The pipeline contract: reading, trace, fingerprint, difference, and the streamed path against the plain one."""

import copy
import gc
import hashlib
import io
import json
import math
import random
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from skewless.core.pipeline import Difference, Pipeline
from skewless.core.stages import STAGES, PipelineError
from tests import recordings
from tests.recordings import one_thread  # noqa: F401

FILE = Path(__file__).parents[1] / "archive" / "cough" / "pipeline.yaml"

CONTRACT: list[dict[str, dict[str, Any]]] = [
    {"decode": {}},
    {"peak_normalize": {}},
    {"downmix": {}},
    {"resample": {"rate": 16000, "method": "sinc_hann", "lowpass_filter_width": 6, "rolloff": 0.99}},
    {"highpass": {"cutoff_hz": 50.0, "q": 0.707}},
    {"segment": {"duration_s": 2.0, "hop_s": 0.5, "max_segments": 32, "tail": "drop"}},
    {
        "mel": {
            "n_fft": 1024,
            "win_length": 1024,
            "hop_length": 160,
            "n_mels": 160,
            "f_min": 50.0,
            "f_max": 4000.0,
            "power": 2.0,
            "mel_scale": "htk",
            "norm": "none",
            "rate": 0,
        }
    },
    {"decibel": {"top_db": 80.0, "amin": 1e-10, "max_over": "segment"}},
    {"scale": {"low": -80.0, "high": 0.0, "to": [-1.0, 1.0]}},
    {"letterbox": {"size": 224, "pad_value": -1.0}},
    {"cast": {"dtype": "float16"}},
    {"replicate": {"channels": 3}},
    {
        "standardize": {
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "input_range": [-1.0, 1.0],
            "arithmetic": "float32",
        }
    },
]

# The same pipeline as a person would write it: conventions left to their defaults, whole numbers without a point.
TERSE = """\
name: cough
stages:
  - decode: {}
  - peak_normalize: {}
  - downmix: {}
  - resample: {rate: 16000, method: sinc_hann}
  - highpass: {q: 0.707, cutoff_hz: 50}
  - segment: {tail: drop, duration_s: 2, hop_s: 0.5, max_segments: 32}
  - mel: {n_fft: 1024, win_length: 1024, hop_length: 160, n_mels: 160, f_min: 50, f_max: 4000.0, power: 2}
  - decibel: {top_db: 80, amin: 1.0e-10}
  - scale: {low: -80.0, high: 0, to: [-1, 1.0]}
  - letterbox: {size: 224, pad_value: -1}
  - cast: {dtype: float16}
  - replicate: {channels: 3}
  - standardize: {mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}
"""

# Another valid value for every parameter that has one.
CHANGES: dict[tuple[str, str], Any] = {
    ("resample", "rate"): 22050,
    ("resample", "method"): "resample_poly",
    ("resample", "lowpass_filter_width"): 7,
    ("resample", "rolloff"): 0.98,
    ("highpass", "cutoff_hz"): 50.1,
    ("highpass", "q"): 0.7071,
    ("segment", "duration_s"): 2.5,
    ("segment", "hop_s"): 1.0,
    ("segment", "max_segments"): 31,
    ("segment", "tail"): "pad",
    ("mel", "n_fft"): 2048,
    ("mel", "win_length"): 1023,
    ("mel", "hop_length"): 161,
    ("mel", "n_mels"): 128,
    ("mel", "f_min"): 0.0,
    ("mel", "f_max"): 4001.0,
    ("mel", "power"): 1.0,
    ("mel", "mel_scale"): "slaney",
    ("mel", "norm"): "slaney",
    ("mel", "rate"): 16000,
    ("decibel", "top_db"): 79.0,
    ("decibel", "amin"): 2e-10,
    ("decibel", "max_over"): "recording",
    ("scale", "low"): -81.0,
    ("scale", "high"): 1.0,
    ("scale", "to"): [0.0, 1.0],
    ("letterbox", "size"): 225,
    ("letterbox", "pad_value"): 0.0,
    ("replicate", "channels"): 1,
    ("standardize", "mean"): [0.406, 0.456, 0.485],
    ("standardize", "std"): [0.229, 0.224, 0.2250001],
    ("standardize", "input_range"): [0.0, 1.0],
    ("standardize", "arithmetic"): "float16",
}
SINGLE_CHOICE = {("cast", "dtype")}


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.from_yaml(FILE)


def contract_with(stage: str, **params: Any) -> dict[str, Any]:
    """The contract's definition with parameters of one stage set anew."""
    stages = copy.deepcopy(CONTRACT)
    next(item for item in stages if stage in item)[stage].update(params)
    return {"name": "cough", "stages": stages}


# Reading


def test_the_archives_file_is_the_contract(pipeline):
    assert pipeline.to_dict() == {"name": "cough", "stages": CONTRACT}


def test_unspoken_conventions_give_the_same_pipeline(pipeline, tmp_path):
    path = tmp_path / "terse.yaml"
    path.write_text(TERSE)
    terse = Pipeline.from_yaml(path)
    assert terse.to_dict() == {"name": "cough", "stages": CONTRACT}
    assert terse.fingerprint == pipeline.fingerprint


def test_a_written_pipeline_reads_back(pipeline, tmp_path):
    path = tmp_path / "again.yaml"
    path.write_text(pipeline.to_yaml())
    again = Pipeline.from_yaml(path)
    assert again.to_dict() == pipeline.to_dict()
    assert again.fingerprint == pipeline.fingerprint
    assert Pipeline.from_dict(json.loads(json.dumps(pipeline.to_dict()))).fingerprint == pipeline.fingerprint


WRONG = {
    "unknown stage": ("- reverb: {mix: 0.5}", "unknown stage 'reverb'.*resample"),
    "unknown parameter": ("- highpass: {cutoff: 50}", "stage 'highpass'.*unknown parameter cutoff.*cutoff_hz"),
    "unknown parameter of none": ("- downmix: {weights: [1]}", "stage 'downmix'.*unknown parameter weights"),
    "parameter that is no name": ("- scale: {1: 2}", "stage 'scale'.*unknown parameter 1"),
    "missing parameter": ("- letterbox: {size: 224}", "stage 'letterbox'.*missing parameter pad_value"),
    "two missing": ("- replicate: {}", "stage 'replicate'.*missing parameter channels"),
    "quoted number": ("- replicate: {channels: '3'}", "stage 'replicate'.*channels is '3'.*int"),
    "yes for a number": ("- replicate: {channels: yes}", "stage 'replicate'.*channels is True.*int"),
    "float for an int": ("- replicate: {channels: 3.0}", "stage 'replicate'.*channels is 3.0.*int"),
    "null": ("- highpass: {cutoff_hz: null}", "stage 'highpass'.*cutoff_hz is None.*float"),
    "no for a float": ("- highpass: {cutoff_hz: no}", "stage 'highpass'.*cutoff_hz is False.*float"),
    "exponent without a point": ("- decibel: {top_db: 80, amin: 1e-10}", "stage 'decibel'.*amin is '1e-10'.*float"),
    "number for a list": ("- scale: {low: -80, high: 0, to: 1}", "stage 'scale'.*to is 1.*list"),
    "text in a list": ("- scale: {low: -80, high: 0, to: [0, one]}", r"stage 'scale'.*to\[1\] is 'one'.*float"),
    "unknown choice": ("- cast: {dtype: int8}", "stage 'cast'.*dtype is 'int8'.*float16"),
    "list for a choice": ("- cast: {dtype: [float16]}", "stage 'cast'.*dtype"),
    "zero rate": ("- resample: {rate: 0}", "stage 'resample'.*rate is 0"),
    "rolloff above 1": ("- resample: {rate: 16000, rolloff: 1.01}", "stage 'resample'.*rolloff is 1.01"),
    "no zero crossing": ("- resample: {rate: 8, lowpass_filter_width: 0}", "'resample'.*lowpass_filter_width is 0"),
    "negative cutoff": ("- highpass: {cutoff_hz: -50}", "stage 'highpass'.*cutoff_hz is -50"),
    "zero q": ("- highpass: {cutoff_hz: 50, q: 0}", "stage 'highpass'.*q is 0"),
    "zero hop": ("- segment: {duration_s: 2, hop_s: 0, max_segments: 1, tail: drop}", "stage 'segment'.*hop_s is 0"),
    "no window": ("- segment: {duration_s: 0, hop_s: 1, max_segments: 1, tail: pad}", "'segment'.*duration_s is 0"),
    "no segment": ("- segment: {duration_s: 2, hop_s: 1, max_segments: 0, tail: pad}", "'segment'.*max_segments is 0"),
    "window over n_fft": (
        "- mel: {n_fft: 512, win_length: 513, hop_length: 160, n_mels: 64, f_min: 0, f_max: 4000}",
        "stage 'mel'.*win_length 513.*n_fft 512",
    ),
    "f_min over f_max": (
        "- mel: {n_fft: 512, win_length: 512, hop_length: 160, n_mels: 64, f_min: 4000, f_max: 50}",
        "stage 'mel'.*f_min 4000.*f_max 50",
    ),
    "zero hop_length": (
        "- mel: {n_fft: 512, win_length: 512, hop_length: 0, n_mels: 64, f_min: 0, f_max: 4000}",
        "stage 'mel'.*hop_length is 0",
    ),
    "zero top_db": ("- decibel: {top_db: 0}", "stage 'decibel'.*top_db is 0"),
    "zero amin": ("- decibel: {top_db: 80, amin: 0}", "stage 'decibel'.*amin is 0"),
    "low over high": ("- scale: {low: 0, high: -80, to: [0, 1]}", "stage 'scale'.*low 0.*high -80"),
    "three ends": ("- scale: {low: 0, high: 1, to: [0, 1, 2]}", r"stage 'scale'.*to is \[0.0, 1.0, 2.0\]"),
    "no pixel": ("- letterbox: {size: 0, pad_value: 0}", "stage 'letterbox'.*size is 0"),
    "no channel": ("- replicate: {channels: 0}", "stage 'replicate'.*channels is 0"),
    "two means, one std": ("- standardize: {mean: [0, 0], std: [1]}", "stage 'standardize'.*2 means but 1"),
    "zero std": ("- standardize: {mean: [0], std: [0]}", r"stage 'standardize'.*std is \[0.0\]"),
    "empty mean and std": ("- standardize: {mean: [], std: []}", "stage 'standardize'.*(mean|std)"),
    "reversed range": ("- standardize: {mean: [0], std: [1], input_range: [1, 0]}", "'standardize'.*input_range is"),
    "no parameters": ("- decode:", "stage 'decode'.*None.*{}"),
    "a bare name": ("- decode", "stage is 'decode', expected one"),
    "two stages in one item": ("- {decode: {}, downmix: {}}", "expected one"),
    "an infinite window": (
        "- segment: {duration_s: .inf, hop_s: 1, max_segments: 1, tail: drop}",
        "stage 'segment'.*duration_s is inf",
    ),
    "NaN for a pad value": ("- letterbox: {size: 224, pad_value: .nan}", "stage 'letterbox'.*pad_value is nan"),
    "infinity in a list": ("- standardize: {mean: [.inf], std: [1]}", "stage 'standardize'.*mean"),
}


@pytest.mark.parametrize(("stage", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_stage_is_refused_by_file_stage_and_parameter(stage, message, tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(f"name: wrong\nstages:\n  {stage}\n")
    with pytest.raises(PipelineError, match=message) as caught:
        Pipeline.from_yaml(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "exactly two keys"),
        ("name: x", "exactly two keys"),
        ("name: x\nstages: []\nversion: 2", "exactly two keys"),
        ("- decode: {}", "exactly two keys"),
        ("name: x\nstages: {decode: {}}", "must be a list"),
        ("name: x\nstages: []", "no stages"),
        ("name: [x\nstages: 3", "while parsing"),
    ],
)
def test_a_wrong_file_is_refused_by_name(text, message, tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(PipelineError, match=message) as caught:
        Pipeline.from_yaml(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        Pipeline.from_yaml(tmp_path / "nowhere.yaml")


# Trace


def test_trace_has_every_stage_in_order_with_its_shape_and_type(pipeline):
    data = recordings.wav(recordings.coughs(44100, 5.0, channels=2), 44100)
    trace = pipeline.trace(data)
    assert [(name, tuple(x.shape), x.dtype) for name, x in trace.items()] == [
        ("decode", (2, 220500), torch.float32),
        ("peak_normalize", (2, 220500), torch.float32),
        ("downmix", (1, 220500), torch.float32),
        ("resample", (1, 80000), torch.float32),
        ("highpass", (1, 80000), torch.float32),
        ("segment", (7, 32000), torch.float32),
        ("mel", (7, 160, 201), torch.float32),
        ("decibel", (7, 160, 201), torch.float32),
        ("scale", (7, 160, 201), torch.float32),
        ("letterbox", (7, 224, 224), torch.float32),
        ("cast", (7, 224, 224), torch.float16),
        ("replicate", (7, 3, 224, 224), torch.float16),
        ("standardize", (7, 3, 224, 224), torch.float32),
    ]
    assert torch.equal(trace["standardize"], pipeline(data))
    assert torch.equal(trace["standardize"], pipeline.run(data).data)


def test_stages_leave_their_input_alone(pipeline):
    """Each output of a trace is still what it was when the whole has run."""
    data = recordings.wav(recordings.coughs(16000, 2.5), 16000)
    kept = {name: signal.data.clone() for name, signal in pipeline.steps(data)}
    trace = pipeline.trace(data)
    assert all(torch.equal(trace[name], kept[name]) for name in kept)
    assert torch.equal(pipeline(data), pipeline(data))


def test_a_stage_used_twice_is_traced_twice():
    definition = {"name": "x", "stages": [{"decode": {}}, {"downmix": {}}, {"peak_normalize": {}}, {"downmix": {}}]}
    pipeline = Pipeline.from_dict(definition)
    assert list(pipeline.stages) == ["decode", "downmix", "peak_normalize", "downmix_2"]
    assert list(pipeline.trace(recordings.wav(np.ones((2, 10)) / 2, 8000))) == list(pipeline.stages)
    assert pipeline.to_dict() == definition


def test_no_gradient_is_recorded(pipeline):
    assert not pipeline(recordings.wav(recordings.coughs(16000, 1.0), 16000)).requires_grad
    assert torch.is_grad_enabled()


# Fingerprint


def test_fingerprint_is_the_hash_of_the_stages(pipeline):
    """As a reader of the archive would compute it, in another language if need be."""
    text = json.dumps(CONTRACT, sort_keys=True)
    assert pipeline.fingerprint == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("seed", range(3))
def test_fingerprint_ignores_key_order_name_and_whole_numbers_spelling(pipeline, seed):
    shuffle = random.Random(seed).sample

    def respelled(value: Any, original_type: type) -> Any:
        if isinstance(value, list):
            return tuple(respelled(item, float) for item in value)
        return int(value) if original_type is float and value == int(value) else value

    stages = []
    for item in CONTRACT:
        ((name, params),) = item.items()
        keys = shuffle(list(params), len(params))
        stages.append({name: {key: respelled(params[key], type(params[key])) for key in keys}})
    other = Pipeline.from_dict({"stages": stages, "name": "another"})
    assert other.fingerprint == pipeline.fingerprint
    assert other.diff(pipeline) == []


def test_fingerprint_ignores_the_sign_of_zero(pipeline):
    """0.0 == -0.0, so a difference could not be shown."""
    other = Pipeline.from_dict(contract_with("scale", high=-0.0))
    assert (other.fingerprint == pipeline.fingerprint) == (pipeline.diff(other) == [])


def test_every_parameter_is_changed_below(pipeline):
    every = {(name, param) for name, stage in pipeline.stages.items() for param in stage.params()}
    assert set(CHANGES) | SINGLE_CHOICE == every


@pytest.mark.parametrize(("stage", "param"), CHANGES, ids=lambda x: x)
def test_any_change_of_a_parameter_changes_the_fingerprint_and_is_shown(pipeline, stage, param):
    value = CHANGES[stage, param]
    other = Pipeline.from_dict(contract_with(stage, **{param: value}))
    assert other.fingerprint != pipeline.fingerprint
    before = pipeline.stages[stage].params()[param]
    assert pipeline.diff(other) == [Difference(stage, param, before, value)]
    assert other.diff(pipeline) == [Difference(stage, param, value, before)]
    assert str(pipeline.diff(other)[0]) == f"{stage}.{param}: {before!r} here, {value!r} there"


@pytest.mark.parametrize(("stage", "param"), sorted(SINGLE_CHOICE))
def test_other_values_of_a_single_choice_are_refused(stage, param):
    with pytest.raises(PipelineError, match=f"'{stage}'.*{param} is 'other'"):
        Pipeline.from_dict(contract_with(stage, **{param: "other"}))


# Differences between stage lists


def listed(*names: str) -> Pipeline:
    """The contract's stages of these names, in this order."""
    params = {name: params for item in CONTRACT for name, params in item.items()}
    return Pipeline.from_dict({"name": "x", "stages": [{name: params[name]} for name in names]})


def texts(ours: Pipeline, theirs: Pipeline) -> list[str]:
    return [str(difference) for difference in ours.diff(theirs)]


def test_a_stage_missing_on_one_side_is_shown():
    full, less = listed("decode", "downmix", "highpass"), listed("decode", "highpass")
    assert texts(full, less) == ["downmix: missing there"]
    assert texts(less, full) == ["downmix: missing here"]
    assert full.diff(less) == [Difference("downmix", "", {}, None)]
    assert full.fingerprint != less.fingerprint


def test_a_stage_added_at_an_end_is_shown_with_its_parameters():
    less, full = listed("decode", "downmix"), listed("decode", "downmix", "replicate")
    assert less.diff(full) == [Difference("replicate", "", None, {"channels": 3})]


def test_a_moved_stage_is_shown_in_both_places():
    ours = listed("decode", "peak_normalize", "downmix", "resample")
    theirs = listed("decode", "downmix", "peak_normalize", "resample")
    assert ours.fingerprint != theirs.fingerprint
    assert sorted(texts(ours, theirs)) in (
        ["downmix: missing here", "downmix: missing there"],
        ["peak_normalize: missing here", "peak_normalize: missing there"],
    )


def test_a_replaced_stage_is_shown_on_both_sides():
    assert sorted(texts(listed("decode", "downmix"), listed("decode", "segment"))) == [
        "downmix: missing there",
        "segment: missing here",
    ]


def test_a_missing_stage_does_not_hide_a_changed_parameter(pipeline):
    definition = contract_with("standardize", arithmetic="float16")
    definition["stages"] = [item for item in definition["stages"] if "cast" not in item]
    assert texts(pipeline, Pipeline.from_dict(definition)) == [
        "cast: missing there",
        "standardize.arithmetic: 'float32' here, 'float16' there",
    ]


def test_a_repeated_stage_is_compared_in_its_place():
    def clamps(first: float, second: float) -> Pipeline:
        scales = [{"scale": {"low": -80, "high": high, "to": [0, 1]}} for high in (first, second)]
        return Pipeline.from_dict({"name": "x", "stages": [{"decode": {}}, *scales]})

    assert clamps(0, 1).diff(clamps(0, 2)) == [Difference("scale", "high", 1.0, 2.0)]
    assert clamps(0, 1).diff(clamps(0, 1)) == []
    assert texts(clamps(0, 1), clamps(1, 0))


# Split


@pytest.mark.parametrize("before", [name for item in CONTRACT[1:] for name in item])
def test_a_split_pipeline_resumes_to_the_same(pipeline, before):
    data = recordings.wav(recordings.coughs(22050, 3.1, channels=2), 22050)
    whole = pipeline.run(data)
    first, second = pipeline.split(before)
    assert [*first.stages, *second.stages] == list(pipeline.stages)
    assert next(iter(second.stages)) == before
    *_, (last, signal) = second.resume(first.run(data))
    assert last == "standardize"
    assert torch.equal(signal.data, whole.data)
    assert {k: v for k, v in signal.metadata.items() if k != "complete"} == {
        k: v for k, v in whole.metadata.items() if k != "complete"
    }


def test_a_split_pipeline_resumes_a_long_recording_to_the_same(pipeline):
    """Split before the segments, the first half cannot know that a head would do."""
    data = recordings.wav(recordings.coughs(8000, 19.0), 8000)
    whole = pipeline.run(data)
    for before in ("resample", "segment", "mel"):
        first, second = pipeline.split(before)
        *_, (_, signal) = second.resume(first.run(data))
        assert torch.equal(signal.data, whole.data)
        assert signal.metadata["truncated"]


@pytest.mark.parametrize("before", ["decode", "reverb", ""])
def test_an_impossible_split_is_refused(pipeline, before):
    with pytest.raises(PipelineError, match=f"'cough' cannot be split before '{before}'; it has: decode, peak"):
        pipeline.split(before)


# The streamed path, which keeps only the head, against the plain one


def loud_ending(rate: int, samples: int, channels: int) -> bytes:
    """Noise whose peak is five samples before its end."""
    noise = np.random.default_rng([rate, samples]).integers(-9000, 9000, (channels, samples)).astype(np.int16)
    noise[-1, -5] = 21000
    return recordings.wav(noise, rate)


def same_streamed_and_plain(pipeline: Pipeline, data: bytes) -> dict[str, Any]:
    """Asserts the same bits and metadata by both paths; returns the streamed path's metadata."""
    streamed, plain = pipeline.run(data), pipeline.run(data, whole=True)
    assert plain.metadata["complete"]
    assert torch.equal(streamed.data, plain.data)
    assert {**streamed.metadata, "complete": None} == {**plain.metadata, "complete": None}
    return dict(streamed.metadata)


AROUND = {
    "a sample below 17.5 s": (17.5, -1),
    "17.5 s": (17.5, 0),
    "a sample above 17.5 s": (17.5, 1),
    "just beyond the head": (17.502, 0),
    "a sample below 18 s": (18.0, -1),
    "18 s": (18.0, 0),
    "a sample above 18 s": (18.0, 1),
    "20.3 s": (20.3, 0),
}


@pytest.mark.parametrize("duration", AROUND)
@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000, 96000])
def test_streamed_equals_plain(pipeline, rate, duration):
    """Up to the segments; what follows sees one segment at a time."""
    seconds, extra = AROUND[duration]
    samples = round(seconds * rate) + extra
    data = loud_ending(rate, samples, channels=2 if rate in (22050, 44100) else 1)
    metadata = same_streamed_and_plain(pipeline.split("mel")[0], data)
    assert metadata["peak"] == 21000 / 32768
    assert metadata["duration_s"] == samples / rate
    assert metadata["complete"] == (seconds == 17.5)
    # The 32nd segment ends at 17.5 s and the 33rd at 18 s, at 16 kHz, where lengths are rounded up.
    resampled = math.ceil(samples * 16000 / rate)
    assert metadata["truncated"] == (resampled >= 288000)
    assert metadata["analyzed_s"] == min(17.5 if resampled >= 280000 else 17.0, samples / rate)


def test_streamed_equals_plain_where_the_resampled_length_is_rounded(pipeline):
    """3175189 samples at 176.4 kHz are 287999.003 at 16 kHz: torchaudio makes 287999, a sample short of the
    33rd segment."""
    data = loud_ending(176400, 3175189, channels=1)
    metadata = same_streamed_and_plain(pipeline.split("mel")[0], data)
    assert not metadata["complete"]


def test_streamed_equals_plain_to_the_networks_input(pipeline):
    assert same_streamed_and_plain(pipeline, loud_ending(44100, round(18.4 * 44100), channels=2))["truncated"]


@pytest.mark.parametrize(
    ("stage", "params"),
    [
        ("segment", {"tail": "pad"}),
        ("segment", {"max_segments": 3}),
        ("segment", {"duration_s": 0.5, "hop_s": 0.75, "max_segments": 4}),
        ("resample", {"lowpass_filter_width": 64}),
        ("resample", {"rate": 44100}),
    ],
)
def test_streamed_equals_plain_with_other_parameters(stage, params):
    pipeline = Pipeline.from_dict(contract_with(stage, **params)).split("mel")[0]
    assert not same_streamed_and_plain(pipeline, loud_ending(22050, round(18.9 * 22050), channels=1))["complete"]


def test_the_head_is_no_longer_than_needed(pipeline):
    """17.5 s and the reach of the resampler's kernel: under a millisecond."""
    for rate in (8000, 16000, 44100, 96000):
        decoded = pipeline.trace(loud_ending(rate, 18 * rate, channels=1))["decode"]
        assert 17.5 * rate <= decoded.shape[1] <= 17.5015 * rate


def test_without_segments_everything_is_kept():
    data = loud_ending(8000, 20 * 8000, channels=1)
    assert listed("decode", "downmix", "resample").trace(data)["decode"].shape == (1, 160000)


def test_memory_does_not_grow_with_the_recording(pipeline):
    """20 minutes of FLAC at 8 kHz are 38 MB as float32; a head of 17.5 s and a block of 65536 take 0.8 MB."""
    tone = (9000 * np.sin(np.arange(20 * 60 * 8000) * 0.3)).astype(np.int16)
    file = io.BytesIO()
    soundfile.write(file, tone, 8000, format="FLAC", subtype="PCM_16")
    data = file.getvalue()
    gc.collect()
    tracemalloc.start()
    try:
        decoded = next(pipeline.steps(data))[1]
        _, highest = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert decoded.data.shape[1] <= 17.5015 * 8000
    assert decoded.metadata["duration_s"] == 1200.0
    assert highest < 4_000_000


def test_stopping_half_way_leaves_gradients_on(pipeline):
    steps = pipeline.steps(loud_ending(16000, 48000, channels=1))
    assert next(steps)[0] == "decode"
    assert torch.is_grad_enabled()


# What training fits


TALENT = FILE.parents[1] / "talent" / "pipeline.yaml"


def scaled(mean: float) -> Pipeline:
    bare = Pipeline.from_yaml(TALENT)
    return bare.replace(standard_scaler=STAGES["standard_scaler"]((mean,) * 37, (1.0,) * 37))


def test_an_unfitted_stage_is_completed_by_the_trained_one():
    bare = Pipeline.from_yaml(TALENT)
    assert bare.unfitted == ["standard_scaler"]
    assert scaled(0.5).unfitted == []
    assert bare.with_fitted_stages_of(scaled(0.5)).fingerprint == scaled(0.5).fingerprint
    # What is already fitted stays, and what the other does not have cannot be taken from it.
    assert scaled(1.0).with_fitted_stages_of(scaled(0.5)).fingerprint == scaled(1.0).fingerprint
    first, _ = scaled(0.5).split(before="standard_scaler")
    assert bare.with_fitted_stages_of(first).unfitted == ["standard_scaler"]


def test_other_statistics_are_another_pipeline():
    (difference,) = scaled(0.5).diff(scaled(0.25))
    assert (difference.stage, difference.parameter) == ("standard_scaler", "mean")
    assert scaled(0.5).fingerprint != scaled(0.25).fingerprint


def test_what_a_pipeline_reads():
    assert Pipeline.from_yaml(FILE).reads == "audio"
    assert Pipeline.from_yaml(FILE.parents[1] / "portrait" / "pipeline.yaml").reads == "image"
