"""The orca detector: its stages against the float64 oracle and fastai_audio's own calls, its post-processing by hand, and its
corpus."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import pytest
import scipy.signal
import soundfile
import torch
import torchaudio.transforms as AT
from numpy.typing import NDArray

from skewless.core.definition import Definition
from skewless.core.pipeline import Pipeline
from skewless.core.postprocess import build_postprocessor
from skewless.core.postprocess.postprocessor import Part
from skewless.core.postprocess.vote import SecondsVote
from skewless.core.runtimes.eager import EagerRuntime
from skewless.core.stages import STAGES, InputError, PipelineError, Signal
from skewless.demos import orca as corpus
from tests import recordings
from tests.oracles import orca as oracle
from tests.recordings import one_thread  # noqa: F401

# The filterbank is one for another rate: torchaudio warns of the filters that hear nothing.
pytestmark = pytest.mark.filterwarnings("ignore:At least one mel filterbank:UserWarning")

ARCHIVE = Path(__file__).parents[1] / "archive" / "orca"
PIPELINE = Pipeline.from_yaml(ARCHIVE / "pipeline.yaml")
DEFINITION = Definition.read(ARCHIVE)

CASES: dict[str, tuple[int, NDArray]] = {
    "stereo 44.1 kHz": (44100, recordings.coughs(44100, 4.3, channels=2)),
    "exactly two seconds": (48000, recordings.coughs(48000, 2.0)),
    "six channels 22.05 kHz": (22050, recordings.coughs(22050, 2.9, channels=6)),
    "already 20 kHz": (20000, recordings.coughs(20000, 3.7)),
    "shorter than a window": (8000, recordings.coughs(8000, 0.7)),
    "11.025 kHz": (11025, recordings.coughs(11025, 3.0)),
    "faint": (48000, 1e-4 * recordings.coughs(48000, 2.2)),
    "full-scale noise": (44100, np.random.default_rng(0).uniform(-1, 1, (2, 2 * 44100 + 1))),
    "one click": (16000, 0.8 * np.eye(1, 2 * 16000 + 999, 16000)),
    "silence": (48000, np.zeros((1, 96001))),
}


@cache
def expected(case: str) -> dict[str, NDArray]:
    rate, samples = CASES[case]
    decoded = samples.astype(np.float32)
    return {"decode": decoded, **oracle.trace(decoded, rate)}


def run(stage: str, data: NDArray, rate: int, /, **changes: object) -> Signal:
    """One stage of the pipeline, with parameters changed, on data whose metadata are those of a whole recording."""
    metadata = {"num_samples": data.shape[-1], "duration_s": data.shape[-1] / rate}
    return replace(PIPELINE.stages[stage], **changes)(Signal(torch.from_numpy(data), rate, metadata))


def alone(case: str, stage: str) -> tuple[NDArray, NDArray]:
    """A stage's output, and the oracle's for the same input: the oracle's previous output, rounded to float32."""
    names = list(PIPELINE.stages)
    given = expected(case)[names[names.index(stage) - 1]].astype(np.float32)
    source = CASES[case][0]
    of_rate = stage in ("segment", "resample")
    want = getattr(oracle, stage)(given, *([source] if of_rate else [1] if stage == "replicate" else []))
    got = run(stage, given, source if of_rate else 20000).data.numpy()
    assert got.shape == want.shape
    return got, want


def largest_error(got: NDArray, want: NDArray) -> float:
    return float(np.abs(got.astype(np.float64) - want.astype(np.float64)).max())


# Stages

# Largest absolute error of a stage alone; measured: 4e-8, 0, 3e-7, -, 9e-6, 0, 0.
TOLERANCES = {
    "downmix": 1e-7,  # a mean of up to six numbers: a few 2**-24 of their size
    "segment": 0.0,  # a copy
    "resample": 1e-6,  # sums of up to 51 products, each rounded to 2**-24 of itself
    "decibel": 3e-5,  # two roundings of numbers up to 100: 2 x 100 x 2**-24 = 1.2e-5
    "pad_frames": 0.0,  # a copy
    "replicate": 0.0,  # a copy
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stage", TOLERANCES)
def test_stage_alone(stage, case):
    got, want = alone(case, stage)
    assert got.dtype == np.float32
    assert largest_error(got, want) <= TOLERANCES[stage]


@pytest.mark.parametrize("case", CASES)
def test_mel_alone(case):
    """A float32 Fourier transform: the error goes with the segment's loudest bin. Measured: 1.4e-5 of it."""
    got, want = alone(case, "mel")
    loudest = np.maximum(want.max(axis=(1, 2), keepdims=True), 1e-30)
    assert float((np.abs(got - want) / loudest).max()) <= 5e-5


def test_every_stage_but_decode_is_compared():
    assert {"decode", "mel", *TOLERANCES} == set(PIPELINE.stages)


@pytest.mark.parametrize("case", CASES)
def test_whole_pipeline(case):
    """In decibels. Measured: mean 3e-5, 99th percentile 6e-4, largest 0.015, in the bins that upsampling leaves empty."""
    rate, samples = CASES[case]
    got = PIPELINE(recordings.wav(samples.astype(np.float32), rate, "FLOAT")).numpy()
    want = expected(case)["replicate"]
    assert got.shape == want.shape
    assert got.shape[1:] == (1, 256, 312)
    error = np.abs(got - want)
    assert float(error.mean()) <= 1e-4
    assert float(np.quantile(error, 0.99)) <= 2e-3
    assert float(error.max()) <= 0.1


@pytest.mark.parametrize("case", ["stereo 44.1 kHz", "shorter than a window", "silence"])
def test_fastai_audios_own_calls_give_the_same_bits(case):
    """On clips cut beforehand, one file each: its transform without `sample_rate`, zeros behind the decibels.

    Among others in a recording a clip's last bits may change, as torch multiplies larger matrices in other blocks:
    measured, 8e-6 dB.
    """
    rate, samples = CASES[case]
    samples = samples.astype(np.float32)
    mel = AT.MelSpectrogram(n_fft=2560, hop_length=256, n_mels=256, f_min=0.0, f_max=10000.0, pad=0, win_length=None)
    decibel = AT.AmplitudeToDB(top_db=100)
    for second, among_others in enumerate(PIPELINE(recordings.wav(samples, rate, "FLOAT"))):
        clip = samples[:, second * rate : (second + 2) * rate]
        clip = np.pad(clip, ((0, 0), (0, 2 * rate - clip.shape[1])))
        divisor = np.gcd(rate, 20000)
        mono = torch.from_numpy(clip).mean(dim=0).numpy()
        resampled = torch.from_numpy(scipy.signal.resample_poly(mono, 20000 // divisor, rate // divisor))
        spectrogram = decibel(mel(resampled.unsqueeze(0)))
        want = torch.cat((spectrogram, torch.zeros((1, 256, 312 - spectrogram.shape[2]))), 2)
        assert torch.equal(PIPELINE(recordings.wav(clip, rate, "FLOAT"))[0], want)
        torch.testing.assert_close(among_others, want, atol=5e-5, rtol=0)


def test_silence_lies_a_hundred_decibels_under_its_padding():
    out = PIPELINE(recordings.wav(np.zeros((1, 40000)), 16000))
    assert out[..., :157].unique().tolist() == [-100.0]
    assert out[..., 157:].unique().tolist() == [0.0]


def test_top_filters_of_the_declared_rate_hear_nothing():
    """Taken for 16 kHz, the spectrum ends at 8000 Hz: the 18 filters that start above it are empty."""
    filters = PIPELINE.stages["mel"].filterbank(16000)
    assert (filters.sum(dim=0) == 0).nonzero().flatten().tolist() == list(range(238, 256))


@pytest.mark.parametrize("case", CASES)
def test_times_and_number_of_windows(case):
    rate, samples = CASES[case]
    out = PIPELINE.run(recordings.wav(samples.astype(np.float32), rate, "FLOAT"))
    windows = max(1, samples.shape[1] // rate - 1)
    assert out.metadata["segment_times_s"] == [(float(i), i + 2.0) for i in range(windows)]
    assert len(out.data) == windows
    assert not out.metadata["truncated"]
    assert out.metadata["num_samples"] == -(-samples.shape[1] * 20000 // rate)
    assert out.metadata["duration_s"] == samples.shape[1] / rate


def test_the_windows_reach_as_far_as_the_longest_recording():
    """So no accepted recording is truncated."""
    longest = DEFINITION.limits.max_duration_s
    assert PIPELINE.head_s(44100) == PIPELINE.stages["segment"].needs(np.inf, 44100) >= longest


VARIANTS = {
    "cached_16_bit": "pcm: missing here",
    "float_to_32_bit": "pcm: missing here",
    "pad_minimum": "pad_frames.relative_to: 'reference' here, 'minimum' there",
    "filterbank_20k": "mel.rate: 16000 here, 0 there",
    "torchaudio_resampler": "resample.method: 'resample_poly' here, 'sinc_hann' there",
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_differs_in_one_parameter(name):
    assert [str(difference) for difference in PIPELINE.diff(variant(name))] == [VARIANTS[name]]


def variant(name: str) -> Pipeline:
    return Pipeline.from_yaml(ARCHIVE / "variants" / f"{name}.yaml")


def test_there_are_no_other_variants():
    assert {path.stem for path in (ARCHIVE / "variants").iterdir()} == {*VARIANTS, "resample_first"}


def test_the_newest_front_end_differs_in_its_order_its_rounding_and_its_short_recordings():
    assert list(variant("resample_first").stages) == [
        *("decode", "downmix", "resample", "pcm", "segment", "mel", "decibel", "pad_frames", "replicate")
    ]
    assert sorted(str(difference) for difference in PIPELINE.diff(variant("resample_first"))) == [
        "pcm: missing here",
        "resample: missing here",
        "resample: missing there",
        "segment.short: 'pad' here, 'none' there",
    ]


FRONT_ENDS = {"cached_16_bit": ("pcm", oracle.cached_clips), "resample_first": ("segment", oracle.resampled_first)}


@pytest.mark.parametrize("rate", [8000, 20000, 22050, 44100, 48000, 96000])
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
@pytest.mark.parametrize("name", FRONT_ENDS)
def test_the_systems_front_ends_give_the_same(name, subtype, rate):
    """The clips bit for bit, by the libraries that the systems call; the decibels within the last bits that torch's product of
    a larger matrix changes: measured, 8e-6 dB. The recording goes above full scale."""
    stage, clips_of = FRONT_ENDS[name]
    recording = recordings.wav(1.5 * recordings.coughs(rate, 4.3, channels=2), rate, subtype)
    trace = variant(name).trace(recording)
    clips = clips_of(recording)
    assert len(clips) == len(trace[stage]) == 3
    assert np.array_equal(trace[stage].numpy(), np.stack(clips))
    assert len(np.unique(clips)) < 2**16
    want = torch.stack([oracle.spectrogram(clip) for clip in clips])
    torch.testing.assert_close(trace["replicate"], want, atol=5e-5, rtol=0)
    assert torch.equal(variant(name)(recording), trace["replicate"])


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000, 96000])
def test_the_newest_front_end_makes_as_many_windows(rate):
    """Around the lengths at which there is one more, and where there is none."""
    for samples in (1, rate, 2 * rate - 1, 2 * rate, 3 * rate - 1, 3 * rate, 3 * rate + 1):
        recording = recordings.wav(recordings.coughs(rate, 3.1)[:, :samples], rate)
        out = variant("resample_first").run(recording)
        assert len(out.data) == len(oracle.resampled_first(recording)) == len(out.metadata["segment_times_s"])


def test_float_recordings_are_clipped_where_they_become_32_bit_integers():
    """Above full scale alone: what lies within it is kept to the last bit, as are recordings of integers."""
    to_integers = variant("float_to_32_bit").stages["pcm"]
    loud = (1.7 * recordings.coughs(44100, 2.5)).astype(np.float32)
    assert np.abs(loud).max() > 1
    got = to_integers(Signal(torch.from_numpy(loud), 44100, {})).data.numpy()
    assert np.array_equal(
        got, soundfile.read(io.BytesIO(recordings.wav(loud, 44100, "PCM_32")), dtype="float32")[0][None]
    )
    assert np.array_equal(got[np.abs(loud) > 0.01], loud.clip(-1, 1)[np.abs(loud) > 0.01])
    for subtype in ("PCM_16", "PCM_24"):
        integers = recordings.wav(loud, 44100, subtype)
        assert torch.equal(variant("float_to_32_bit")(integers), PIPELINE(integers))
    floats = recordings.wav(loud, 44100, "FLOAT")
    assert not torch.equal(variant("float_to_32_bit")(floats), PIPELINE(floats))


def test_the_cache_replaces_what_is_fainter_than_its_step():
    """A faint sea becomes rounding noise: its quietest tenth of the spectrum rises by more than 20 dB."""
    rng = np.random.default_rng(4)
    sos = scipy.signal.butter(6, 2000, "lowpass", fs=48000, output="sos")
    sea = 1e-3 * scipy.signal.sosfilt(sos, rng.standard_normal(3 * 48000))
    recording = recordings.wav(sea[None].astype(np.float32), 48000, "FLOAT")
    ours, theirs = (pipeline(recording)[..., :157].numpy() for pipeline in (PIPELINE, variant("cached_16_bit")))
    heard = PIPELINE.stages["mel"].filterbank(16000).sum(dim=0).numpy() > 0
    ours, theirs = ours[:, 0, heard], theirs[:, 0, heard]
    faint = ours <= np.quantile(ours, 0.1)
    assert float((theirs - ours)[faint].mean()) > 20
    loud = ours >= np.quantile(ours, 0.9)
    assert float(np.abs(theirs - ours)[loud].mean()) < 1


def test_variants_change_the_networks_input():
    """By what and where: the padding alone, the spectrum alone, or the spectrum a little."""
    rate, samples = CASES["stereo 44.1 kHz"]
    data = recordings.wav(samples.astype(np.float32), rate, "FLOAT")
    ours = PIPELINE(data)
    theirs = {name: variant(name)(data) for name in VARIANTS}
    lowest = ours[..., :157].amin(dim=(1, 2, 3), keepdim=True)
    assert torch.equal(theirs["pad_minimum"][..., :157], ours[..., :157])
    assert torch.equal(theirs["pad_minimum"][..., 157:], lowest.expand(-1, 1, 256, 155))
    assert float((theirs["filterbank_20k"] - ours)[..., :157].abs().mean()) > 3.0
    assert 0.0 < float((theirs["torchaudio_resampler"] - ours).abs().mean()) < 1.0
    for name in ("filterbank_20k", "torchaudio_resampler"):
        assert torch.equal(theirs[name][..., 157:], ours[..., 157:])


# Resampling


def test_the_cough_pipeline_is_the_same():
    cough = Pipeline.from_yaml(ARCHIVE.parent / "cough" / "pipeline.yaml")
    assert cough.fingerprint == "bd7cc5007691cb6efa988e00034a41773c434396a10506548981a89e9fed2994"


def resampled(method: str, data: NDArray, source: int, target: int) -> Signal:
    metadata = {"num_samples": 3 * data.shape[1]}
    return STAGES["resample"](rate=target, method=method)(Signal(torch.from_numpy(data), source, metadata))


RATES = [(44100, 20000), (48000, 22050), (8000, 22050), (11025, 20000), (16000, 16000), (44101, 20000), (96000, 22050)]


@pytest.mark.parametrize("samples", [1, 2, 320, 4801])
@pytest.mark.parametrize(("source", "target"), RATES)
def test_resampling_methods_are_the_libraries_own(source, target, samples):
    """Bit for bit, for several channels or segments, with the length that each library gives."""
    data = np.random.default_rng(samples).uniform(-1, 1, (2, samples)).astype(np.float32)
    divisor = np.gcd(source, target)
    poly = scipy.signal.resample_poly(data, target // divisor, source // divisor, axis=1)
    soxr = librosa.resample(data, orig_sr=source, target_sr=target, res_type="soxr_hq")
    for method, want in (("resample_poly", poly), ("soxr_hq", soxr)):
        out = resampled(method, data, source, target)
        np.testing.assert_array_equal(out.data.numpy(), want, strict=True)
        assert out.rate == target
        whole = np.zeros((1, 3 * samples), dtype=np.float32)
        assert out.metadata["num_samples"] == resampled(method, whole, source, target).data.shape[1]


def test_soxrs_length_is_rounded_as_librosa_rounds_it():
    """Up from the product in float64: 54 samples at 18,900 Hz are 63 at 22,050 Hz, but 54 * (7 / 6) exceeds 63."""
    silence = np.zeros((1, 54), dtype=np.float32)
    out = resampled("soxr_hq", silence, 18900, 22050)
    assert out.data.shape[1] == librosa.resample(silence, orig_sr=18900, target_sr=22050, res_type="soxr_hq").shape[1]
    assert out.data.shape[1] == 64
    assert out.metadata["num_samples"] == 189


@pytest.mark.parametrize("method", ["resample_poly", "soxr_hq"])
@pytest.mark.parametrize("changes", [{"lowpass_filter_width": 64}, {"rolloff": 0.9}])
def test_parameters_of_another_method_are_refused(method, changes):
    with pytest.raises(PipelineError, match=f"'resample'.*do nothing with method {method}.*leave them out"):
        STAGES["resample"].from_params({"rate": 20000, "method": method, **changes})


def test_a_rate_that_needs_an_endless_filter_is_refused():
    with pytest.raises(InputError, match="999983 Hz has too small a common divisor with 20000 Hz") as caught:
        resampled("resample_poly", np.zeros((1, 10), dtype=np.float32), 999983, 20000)
    assert caught.value.kind == "unsupported"


@pytest.mark.parametrize(("source", "target"), [(44100, 20000), (8000, 20000), (44101, 20000), (96000, 16000)])
@pytest.mark.parametrize("seconds", [0.01, 0.1])
def test_resample_poly_needs_no_more_than_it_says(source, target, seconds):
    """The head that it asks for gives the same first seconds, bit for bit; one by ten input samples shorter does not."""
    stage = STAGES["resample"](rate=target, method="resample_poly")
    data = np.random.default_rng(1).uniform(-1, 1, (1, source // 2)).astype(np.float32)
    whole = resampled("resample_poly", data, source, target).data

    def same(head: int) -> bool:
        first = int(seconds * target)
        return torch.equal(resampled("resample_poly", data[:, :head], source, target).data[:, :first], whole[:, :first])

    head = int(np.ceil(stage.needs(seconds, source) * source))
    assert head < data.shape[1]
    assert same(head)
    assert not same(head - 10)


def test_soxr_needs_everything_unless_there_is_nothing_to_do():
    stage = STAGES["resample"](rate=22050, method="soxr_hq")
    assert stage.needs(2.0, 44100) == np.inf
    assert stage.needs(2.0, 22050) == 2.0


STREAMED = {
    "resampled in segments": ["segment", "resample"],
    "resampled as a whole": ["resample", "segment"],
}


@pytest.mark.parametrize("method", ["sinc_hann", "resample_poly", "soxr_hq"])
@pytest.mark.parametrize("order", STREAMED)
def test_streamed_equals_whole(order, method):
    """With a cap on the windows only the head is kept: the same bits and metadata as from the whole recording."""
    params = {
        "segment": {"duration_s": 2.0, "hop_s": 1.0, "max_segments": 2, "tail": "drop"},
        "resample": {"rate": 20000, "method": method},
    }
    stages = [{"decode": {}}, {"downmix": {}}, *({name: params[name]} for name in STREAMED[order])]
    pipeline = Pipeline.from_dict({"name": "x", "stages": stages})
    data = recordings.wav(recordings.coughs(44100, 7.3, channels=2), 44100)
    head, whole = pipeline.run(data), pipeline.run(data, whole=True)
    assert torch.equal(head.data, whole.data)
    assert head.data.shape == (2, 40000)
    assert head.metadata["complete"] == (order == "resampled as a whole" and method == "soxr_hq")
    assert {**head.metadata, "complete": True} == whole.metadata
    assert head.metadata["num_samples"] == -(-round(7.3 * 44100) * 20000 // 44100)
    assert head.metadata["truncated"]


def test_clips_are_resampled_by_themselves():
    """Cut first, a clip's ends are filtered against silence: 20 samples there differ from the whole recording's, no more."""
    rate, samples = CASES["stereo 44.1 kHz"]
    mono = samples.mean(axis=0, keepdims=True).astype(np.float32)
    clips = run("resample", run("segment", mono, rate).data.numpy(), rate).data.numpy()
    whole = oracle.segment(run("resample", mono, rate).data.numpy(), 20000)
    error = np.abs(clips - whole)
    assert largest_error(clips[:, 20:-20], whole[:, 20:-20]) <= TOLERANCES["resample"]
    assert error[1, :20].max() > 1e-4


# Padding

LEVELS = np.random.default_rng(2).uniform(-90, 20, (3, 5, 7)).astype(np.float32)


@pytest.mark.parametrize("frames", [1, 6, 7, 8, 20])
@pytest.mark.parametrize("value_db", [0.0, -12.5])
@pytest.mark.parametrize("relative_to", ["reference", "minimum"])
def test_pad_frames(frames, value_db, relative_to):
    got = run("pad_frames", LEVELS, 20000, frames=frames, value_db=value_db, relative_to=relative_to).data.numpy()
    want = oracle.pad_frames(LEVELS, frames, value_db, relative_to == "minimum")
    # A sum of two numbers up to 90, rounded to 2**-24 of itself; copies and zeros are exact.
    tolerance = 0.0 if value_db == 0.0 or frames <= 7 else 5e-6
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"frames": 0, "value_db": 0.0}, "frames is 0"),
        ({"frames": 312}, "missing parameter value_db"),
        (
            {"frames": 312, "value_db": 0.0, "relative_to": "silence"},
            "relative_to is 'silence', expected 'reference' or 'minimum'",
        ),
    ],
)
def test_wrong_padding_is_refused(params, message):
    with pytest.raises(PipelineError, match=f"stage 'pad_frames'.*{message}"):
        STAGES["pad_frames"].from_params(params)


# Postprocessor

POSTPROCESSOR = DEFINITION.postprocessor


def outputs(*windows: float) -> dict[str, torch.Tensor]:
    """The network's, with these probabilities of a call: multiples of 1/8 are exact in float32."""
    calls = torch.tensor(windows)
    return {"class_probabilities": torch.stack([1 - calls, calls], dim=1)}


def metadata(windows: int, hop_s: float = 1.0, duration_s: float = 2.0) -> dict[str, Any]:
    return {
        "segment_times_s": [(i * hop_s, i * hop_s + duration_s) for i in range(windows)],
        "duration_s": windows + 1.5,
        "analyzed_s": windows + 1.0,
        "truncated": False,
    }


@pytest.mark.parametrize(
    ("windows", "seconds", "score"),
    [
        ([1.0], [1.0, 1.0], 0.0),
        ([1.0, 0.5], [1.0, 0.75, 0.5], 0.5),
        ([0.875, 0.625, 0.125], [0.875, 0.75, 0.375, 0.125], 0.375),
        ([0.0, 0.75, 1.0, 0.5], [0.0, 0.375, 0.875, 0.75, 0.5], 0.5),
        ([0.0, 1.0, 0.0, 1.0, 0.0], [0.0, 0.5, 0.5, 0.5, 0.5, 0.0], 0.5),
        ([0.25, 0.75, 1.0, 0.75, 0.25], [0.25, 0.5, 0.875, 0.875, 0.5, 0.25], 0.5),
    ],
)
def test_seconds_by_hand(windows, seconds, score):
    parts = POSTPROCESSOR.parts(outputs(*windows), metadata(len(windows)))
    assert parts == [Part(float(start), start + 1.0, value) for start, value in enumerate(seconds)]
    assert POSTPROCESSOR.scores(outputs(*windows)) == (score,)
    for threshold in (0.0, 0.25, 0.5, 0.625):
        body = POSTPROCESSOR(outputs(*windows), metadata(len(windows)), threshold)
        positive = [float(start) for start, value in enumerate(seconds) if value > threshold]
        assert body["positive_seconds"] == positive
        assert body["orcaDetected"] == (len(positive) >= 3)
        assert POSTPROCESSOR.read(body) == ((score,), int(len(positive) >= 3))
        assert POSTPROCESSOR.choose((score,), threshold) == int(len(positive) >= 3)


def test_the_response():
    body = POSTPROCESSOR(outputs(0.75, 1.0), metadata(2), 0.75)
    assert body == {
        "global_confidence": 93.75,
        "deciding_confidence": 0.75,
        "orcaDetected": False,
        "threshold_used": 0.75,
        "min_positive_seconds": 3,
        "positive_seconds": [1.0, 2.0],
        "seconds": [
            {"start_s": 0.0, "end_s": 1.0, "confidence": 0.75, "positive": False},
            {"start_s": 1.0, "end_s": 2.0, "confidence": 0.875, "positive": True},
            {"start_s": 2.0, "end_s": 3.0, "confidence": 1.0, "positive": True},
        ],
        "duration_s": 3.5,
        "analyzed_s": 3.0,
        "truncated": False,
    }


@pytest.mark.parametrize("least", [1, 2, 3, 7])
def test_score_exceeds_the_threshold_exactly_when_the_recording_is_positive(least):
    postprocessor = SecondsVote(threshold=0.5, min_positive_s=least, positive_field="found", classes=("other", "call"))
    rng = np.random.default_rng(least)
    seen = Counter()
    for _ in range(200):
        windows = rng.uniform(0, 1, rng.integers(1, 9)).astype(np.float32)
        seconds = oracle.second_confidences(windows)
        (score,) = postprocessor.scores(outputs(*windows.tolist()))
        for threshold in (0.2, 0.5, float(seconds[0])):
            positive = int((seconds > threshold).sum()) >= least
            assert (score > threshold) == positive
            seen[positive] += 1
    assert min(seen[False], seen[True]) > 20


@pytest.mark.parametrize("times", [{"hop_s": 0.5}, {"duration_s": 3.0}, {"hop_s": 2.0}])
def test_other_windows_are_refused(times):
    for use in (POSTPROCESSOR.parts, lambda o, f: POSTPROCESSOR(o, f, 0.5)):
        with pytest.raises(ValueError, match=r"3 windows at .*takes windows of 2 s.*hop_s 1\.0"):
            use(outputs(0.5, 0.5, 0.5), metadata(3, **times))


def test_the_pipelines_windows_are_taken():
    rate, samples = CASES["stereo 44.1 kHz"]
    out = PIPELINE.run(recordings.wav(samples, rate))
    body = POSTPROCESSOR(outputs(0.5, 0.75, 1.0), out.metadata, 0.5)
    assert [second["start_s"] for second in body["seconds"]] == [0.0, 1.0, 2.0, 3.0]
    assert (body["analyzed_s"], body["duration_s"]) == (4.0, 4.3)


def test_the_archives_post_processing():
    assert isinstance(POSTPROCESSOR, SecondsVote)
    assert (POSTPROCESSOR.threshold, POSTPROCESSOR.min_positive_s, POSTPROCESSOR.classes) == (0.5, 3, ("other", "call"))
    assert not POSTPROCESSOR.tuned


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"min_positive_s": 0}, "min_positive_s is 0"),
        ({"min_positive_s": 2.5}, "min_positive_s is 2.5"),
        ({"classes": ["call"]}, r"classes is \['call'\]"),
        ({"minimum": 3}, "minimum"),
    ],
)
def test_wrong_parameters_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build_postprocessor({"seconds_vote": {**DEFINITION.postprocess["seconds_vote"], **changes}})


# Network


def test_runtime_and_post_processing_take_the_network():
    """Recordings of three and of two windows in one batch, down to the response."""
    images = 20 * torch.randn(5, 1, 64, 78, generator=torch.Generator().manual_seed(3)) - 30
    network = DEFINITION.build_network().eval()
    answers = EagerRuntime(network, torch.device("cpu"))([images[:3], images[3:]])
    assert [len(answer["class_probabilities"]) for answer in answers] == [3, 2]
    for answer, windows in zip(answers, (3, 2), strict=True):
        assert len(POSTPROCESSOR(answer, metadata(windows), 0.5)["seconds"]) == windows + 1


# Corpus


@pytest.fixture(scope="module")
def examples() -> list[corpus.Example]:
    return list(corpus.examples(corpus.MIN_COUNT))


def test_the_corpus_is_the_same_every_time(examples):
    assert list(corpus.examples(3)) == examples[:3]
    assert next(corpus.examples(1, seed=43)).data != examples[0].data
    assert len({example.data for example in examples}) == len({example.name for example in examples}) == len(examples)


def test_groups_lie_in_one_split_and_splits_have_both_labels(examples):
    splits = {example.group: set() for example in examples}
    for example in examples:
        splits[example.group].add(example.split)
    assert all(len(of_group) == 1 for of_group in splits.values())
    pairs = Counter((example.split, example.label) for example in examples)
    assert pairs == {
        (s, label): corpus.SPLITS.count(s) for s in ("train", "val", "test") for label in ("other", "call")
    }


def test_the_pipeline_reads_the_corpus(examples):
    """Training examples are one window each, to the sample; the others recordings of 8 to 12 s."""
    for example in examples:
        out = PIPELINE.run(example.data)
        assert torch.isfinite(out.data).all()
        if example.split == "train":
            assert (len(out.data), out.metadata["duration_s"]) == (1, 2.0)
        else:
            assert 8.0 <= out.metadata["duration_s"] <= 12.0
            assert len(out.data) == int(out.metadata["duration_s"]) - 1


def test_container_rate_and_channels_tell_nothing(examples):
    """Every second file is recorded as the one before it, whose label is the other one."""

    def format_of(example: corpus.Example) -> tuple[int, int, str, str]:
        info = soundfile.info(io.BytesIO(example.data))
        return info.samplerate, info.channels, info.format, info.subtype

    formats = [format_of(example) for example in examples]
    assert formats[::2] == formats[1::2]
    assert [example.label for example in examples[:2]] == ["other", "call"]
    assert {f[0] for f in formats} == {20000, 44100, 48000}
    assert {f[1] for f in formats} == {1, 2}
    assert {f[2] for f in formats} == {"WAV", "FLAC"}


def test_bouts_are_equally_loud():
    """Scenes of both classes without the sea: the mean level of thirty each, whose standard error is about 0.7 dB."""
    levels = {label: [] for label in corpus.LABELS}
    for index in range(60):
        label = corpus.LABELS[index % 2]
        kinds = corpus.CALLS if label == "call" else corpus.CONFUSERS
        bout = corpus._bout(corpus.stream(7, index), 2 * corpus.RATE, 0.05, 1.95, kinds, 0.25)
        levels[label].append(10 * np.log10(np.mean(bout**2)))
    assert abs(np.mean(levels["call"]) - np.mean(levels["other"])) < 3.0
