"""Voice features, their scaler, network and post-processing: against a float64 oracle, librosa scripts, scikit-learn and Keras."""

import csv
import io
import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import librosa
import numpy as np
import pytest
import sklearn.preprocessing
import soundfile
import torch
from numpy.typing import NDArray

from skewless.core.definition import Definition
from skewless.core.networks.mlp import MLP
from skewless.core.pipeline import Pipeline
from skewless.core.postprocess import build_postprocessor
from skewless.core.stages import InputError, Payload, PipelineError, Signal, voice_tracks
from skewless.core.stages.decode import Decode
from skewless.core.stages.voice import FEATURES, RemoveSilence, StandardScaler, VoiceFeatures, describe
from skewless.demos.talent import FORMATS, LABELS, TAKES_PER_SINGER, examples
from skewless.demos.writer import CorpusError
from skewless.evaluation.feature_pictures import write_pictures
from skewless.training.manifest import read_manifest
from skewless.training.offline_augmentation import NOISE_DB, STRETCH, augmented_copies
from tests import recordings
from tests.conftest import call_skewless
from tests.oracles import librosa_voice
from tests.oracles import talent as oracle
from tests.recordings import one_thread  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
ARCHIVE = ROOT / "archive" / "talent"
PIPELINE = Pipeline.from_yaml(ARCHIVE / "pipeline.yaml")
SILENCE: RemoveSilence = PIPELINE.stages["remove_silence"]
VOICE: VoiceFeatures = PIPELINE.stages["voice_features"]
RATE = 22050


def sung(seconds: float = 1.5, seed: int = 0) -> NDArray[np.float32]:
    """Two notes with vibrato and harmonics around a pause, in faint noise: (1, N) at 22,050 Hz."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * RATE)) / RATE
    pitch = np.where(time < seconds / 2, 220.0, 277.2) * 2 ** (0.3 / 12 * np.sin(2 * np.pi * 5.5 * time))
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    voice = sum(np.sin(k * phase) / k**1.5 for k in range(1, 12))
    voice *= (np.abs(time - seconds / 2) > 0.15) & (time > 0.1)
    return (0.2 * voice + 1e-3 * rng.standard_normal(len(time))).astype(np.float32)[None]


CASES = {
    "sung": lambda: sung(),
    "another": lambda: sung(1.1, seed=1),
    "tones": lambda: recordings.tones(RATE, 1.0),
    "a tenth of a second": lambda: recordings.tones(RATE, 0.1),
    "noise": lambda: np.random.default_rng(0).uniform(-1, 1, (1, 30001)),
    "clipped": lambda: np.clip(9 * sung(), -1, 1),
    "faint": lambda: 1e-5 * sung(),
    "one frame": lambda: sung()[:, 4000:6048],
    "constant": lambda: np.full((1, RATE), 0.5),
    "one tone": lambda: 0.5 * np.sin(2 * np.pi * 440 / RATE * np.arange(RATE))[None],
}


@cache
def waveform(case: str) -> NDArray[np.float32]:
    return CASES[case]().astype(np.float32)


def run(stage, data: NDArray, rate: int = RATE) -> Signal:
    return stage(Signal(torch.from_numpy(data), rate, {"duration_s": 9.9}))


def features(data: NDArray, rate: int = RATE, **changes: object) -> NDArray[np.float32]:
    return run(replace(VOICE, **changes), data, rate).data[0].numpy()


# ---------------------------------------------------------------------------------------------------- against the oracle


def compare(got: NDArray, want: NDArray) -> None:
    """float32 spectra are some eps = 6e-8 from float64, averaged over frames: up to 2.3e-7 relative measured. A coefficient
    near 0 dB is a difference of levels near -100 dB: up to 2.4e-5 dB measured, so 1e-4 for all but the smallest features."""
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-4)
    small = [k for k, feature in enumerate(FEATURES) if feature.name.startswith(("zero", "rms", "chroma"))]
    np.testing.assert_allclose(got[small], want[small], rtol=2e-6)


@pytest.mark.parametrize("case", CASES)
def test_features_are_the_oracles(case):
    compare(features(waveform(case)), oracle.features(waveform(case)[0]))


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_features_at_other_rates(rate):
    tones = recordings.tones(rate, 0.7).astype(np.float32)
    compare(features(tones, rate), oracle.features(tones[0], rate))


@pytest.mark.parametrize(
    ("changes", "arguments"),
    [
        ({"n_mfcc": 20}, {"count": 20}),
        ({"n_fft": 1024, "hop_length": 200}, {"length": 1024, "hop": 200}),
        ({"roll_percent": 0.5}, {"share": 0.5}),
        ({"tempo": "tempo"}, {"onsets": "mean"}),
    ],
    ids=["coefficients", "frames", "roll-off", "tempo"],
)
def test_feature_parameters(changes, arguments):
    got, want = features(waveform("sung"), **changes), oracle.features(waveform("sung")[0], **arguments)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-4)
    plain = features(waveform("sung"))
    assert got.shape != plain.shape or np.abs(got - plain).max() > 1


@pytest.mark.parametrize("case", CASES)
def test_silence_removal_is_the_oracles(case):
    """The same samples: decibels decide, but nothing here lies within their rounding of the threshold."""
    kept = run(SILENCE, waveform(case))
    want = oracle.remove_silence(waveform(case)[0]).astype(np.float32)
    np.testing.assert_array_equal(kept.data.numpy(), want[None])
    assert kept.metadata == {"duration_s": 9.9, "num_samples": len(want)}


@pytest.mark.parametrize("changes", [{"top_db": 60.0}, {"top_db": 6.0}, {"frame_length": 512, "hop_length": 128}])
def test_silence_parameters(changes):
    names = {"top_db": "top_db", "frame_length": "length", "hop_length": "hop"}
    kept = run(replace(SILENCE, **changes), waveform("sung")).data.numpy()
    want = oracle.remove_silence(waveform("sung")[0], **{names[k]: v for k, v in changes.items()})
    np.testing.assert_array_equal(kept[0], want.astype(np.float32))
    assert kept.shape != run(SILENCE, waveform("sung")).data.shape


def test_pauses_go_and_notes_stay():
    kept = run(SILENCE, waveform("sung")).data
    # 0.1 s before and 0.3 s between the notes are silent, less the half frames that reach into them.
    assert 1.1 < kept.shape[1] / RATE < 1.1 + 4 * 1024 / RATE


# --------------------------------------------------------------------------------------- against a data scientist's script


def script(path: Path, tempo: str = "beat_track") -> NDArray:
    """What a training script does with librosa, written down without this project."""
    y, sr = librosa.load(path, sr=22050, mono=True)
    y = np.concatenate([y[start:end] for start, end in librosa.effects.split(y, top_db=20)])
    mfcc = librosa.feature.mfcc(y=y, sr=sr, n_mfcc=13)
    values = [*np.mean(mfcc, axis=1), *np.std(mfcc, axis=1)]
    for track in (
        librosa.feature.spectral_centroid(y=y, sr=sr),
        librosa.feature.spectral_rolloff(y=y, sr=sr),
        librosa.feature.zero_crossing_rate(y),
        librosa.feature.rms(y=y),
        librosa.feature.chroma_stft(y=y, sr=sr),
    ):
        values += [np.mean(track), np.std(track)]
    if tempo == "beat_track":
        bpm, _ = librosa.beat.beat_track(y=y, sr=sr)
    else:
        bpm = librosa.feature.tempo(y=y, sr=sr)
    return np.array([*values, float(np.squeeze(bpm))])


SCRIPTED = {
    "mono 22.05 kHz": ("wav", 22050, 1),
    "stereo 44.1 kHz": ("wav", 44100, 2),
    "flac 48 kHz": ("flac", 48000, 2),
    "ogg 32 kHz": ("ogg", 32000, 1),
    "mono 8 kHz": ("wav", 8000, 1),
}


@pytest.mark.parametrize("tempo", ["beat_track", "tempo"])
@pytest.mark.parametrize("case", SCRIPTED)
def test_pipeline_gives_the_scripts_bits(case, tempo, tmp_path):
    """From bytes to features, rounded to float32 once: bit for bit, whatever is computed once here and six times there."""
    container, rate, channels = SCRIPTED[case]
    path = tmp_path / f"sung.{container}"
    soundfile.write(path, recordings.coughs(rate, 1.3, channels).T, rate)
    pipeline = PIPELINE.replace(voice_features=replace(VOICE, tempo=tempo)).split("standard_scaler")[0]
    np.testing.assert_array_equal(pipeline(path.read_bytes())[0].numpy(), script(path, tempo).astype(np.float32))


# ------------------------------------------------------------------------------------------- against librosa's functions


def burst() -> NDArray[np.float32]:
    """Exact zeros for most of two seconds: frames without any power, and ties between them."""
    y = np.zeros((1, 2 * RATE), dtype=np.float32)
    y[:, 9000:15000] = waveform("noise")[:, :6000]
    return y


HELD = {
    **{case: lambda case=case: waveform(case) for case in CASES},
    "zeros around a burst": burst,
    "two clicks": lambda: np.eye(1, RATE, 5000, dtype=np.float32) - np.eye(1, RATE, 9000, dtype=np.float32),
    "samples around librosa's zero": lambda: (3e-10 * waveform("noise")).astype(np.float32),
    "8 bits": lambda: (np.round(waveform("sung") * 20) / 20).astype(np.float32),
    "above full scale": lambda: 1e4 * waveform("another"),
    "low hum": lambda: (0.3 * np.sin(2 * np.pi * 60 / RATE * np.arange(RATE)))[None].astype(np.float32),
    "10 s": lambda: sung(10.0, seed=5),
    "60 s": lambda: sung(60.0, seed=6),
}


@pytest.mark.filterwarnings("ignore:Trying to estimate tuning from empty")
@pytest.mark.parametrize("case", HELD)
def test_features_have_librosas_bits(case):
    y = HELD[case]()
    for tempo in ("beat_track", "tempo"):
        stage = replace(VOICE, tempo=tempo)
        np.testing.assert_array_equal(run(stage, y).data[0].numpy(), librosa_voice.features(y[0], RATE, stage))


@pytest.mark.filterwarnings("ignore:Empty filters detected", "ignore:Trying to estimate tuning from empty")
@pytest.mark.parametrize("rate", [200, 4000, 8000, 11025, 16000, 32000, 44100, 48000, 96000])
def test_features_have_librosas_bits_at_any_rate(rate):
    y = sung(0.8, seed=rate)
    np.testing.assert_array_equal(features(y, rate), librosa_voice.features(y[0], rate, VOICE))


@pytest.mark.filterwarnings("ignore:Empty filters detected")
@pytest.mark.parametrize(
    ("n_fft", "hop_length"),
    [(1024, 256), (1024, 200), (1023, 200), (511, 64), (512, 512), (400, 1000), (4096, 1024), (2049, 512), (256, 100)],
)
def test_features_have_librosas_bits_with_any_frames(n_fft, hop_length):
    """Odd frames, frames that do not divide, hops longer than frames."""
    stage = replace(VOICE, n_fft=n_fft, hop_length=hop_length, n_mels=40, n_mfcc=20, roll_percent=0.3)
    y = waveform("sung")
    np.testing.assert_array_equal(run(stage, y).data[0].numpy(), librosa_voice.features(y[0], RATE, stage))


def test_features_have_librosas_bits_whatever_the_length_and_the_tuning():
    """Blocks of frames end anywhere, and every hundredth of a semitone has its own filterbank."""
    rng = np.random.default_rng(8)
    tunings = set()
    for step in range(30):
        length = int(rng.integers(VOICE.n_fft, 2 * RATE))
        pitch = 220 * 2 ** (rng.uniform(-1, 1) / 12)
        phase = 2 * np.pi * pitch / RATE * np.arange(length)
        y = sum(np.sin(k * phase) / k for k in range(1, 9)) * rng.uniform(0.01, 0.2)
        y = (y + 1e-3 * rng.standard_normal(length)).astype(np.float32)
        np.testing.assert_array_equal(
            features(y[None]), librosa_voice.features(y, RATE, VOICE), err_msg=f"recording {step}"
        )
        tunings.add(voice_tracks.spectrum(y, RATE, VOICE.n_fft, VOICE.hop_length, VOICE.roll_percent).tuning)
    assert len(tunings) > 15


@pytest.mark.filterwarnings("ignore:Empty filters detected")
@pytest.mark.parametrize("rate", [8000, RATE, 48000])
def test_constants_are_librosas(rate):
    for n_fft in (2048, 1000, 513):
        np.testing.assert_array_equal(voice_tracks.hann(n_fft), librosa.filters.get_window("hann", n_fft))
        mel = librosa.filters.mel(sr=rate, n_fft=n_fft, n_mels=30)
        np.testing.assert_array_equal(voice_tracks.mel_filterbank(rate, n_fft, 30), mel)
        for tuning in voice_tracks.TUNINGS[:-1:9].tolist():
            want = librosa.filters.chroma(sr=rate, n_fft=n_fft, tuning=tuning)
            np.testing.assert_array_equal(voice_tracks.chroma_filterbank(rate, n_fft, tuning), want)


@pytest.mark.parametrize("case", HELD)
def test_silence_removal_keeps_librosas_samples(case):
    y = HELD[case]()
    odd, apart = {"frame_length": 511, "hop_length": 100}, {"frame_length": 300, "hop_length": 700}
    for changes in ({}, {"top_db": 60.0}, odd, apart):
        stage = replace(SILENCE, **changes)
        np.testing.assert_array_equal(run(stage, y).data[0].numpy(), librosa_voice.remove_silence(y[0], stage))


def test_threads_share_the_constants():
    given = [sung(0.5, seed=k) for k in range(12)]
    want = [features(y) for y in given]
    for kept in (voice_tracks.hann, voice_tracks.mel_filterbank, voice_tracks.chroma_filterbank):
        kept.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        for got, expected in zip(pool.map(features, given), want, strict=True):
            np.testing.assert_array_equal(got, expected)
    with pytest.raises(ValueError, match="read-only"):
        voice_tracks.mel_filterbank(RATE, 2048, 128)[0, 0] = 1.0


def test_another_process_gives_the_same_bits_without_librosa():
    """As a worker that replays its references: what librosa imports takes seconds and 200 MB."""
    code = """
import sys
import torch
from skewless.core.stages import STAGES, Signal
data = torch.frombuffer(bytearray(sys.stdin.buffer.read()), dtype=torch.float32)[None]
STAGES["remove_silence"](top_db=20.0, frame_length=2048, hop_length=512)(Signal(data, 22050))
stage = STAGES["voice_features"](n_mfcc=13, n_fft=2048, hop_length=512, tempo="beat_track")
print(stage(Signal(data, 22050)).data.numpy().tobytes().hex())
heavy = {"librosa", "numba", "sklearn", "scipy.signal", "scipy.stats", "torchaudio"} & set(sys.modules)
assert not heavy, heavy
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, input=waveform("sung").tobytes(), capture_output=True, env=environment
    )
    assert result.returncode == 0, result.stderr.decode()
    assert bytes.fromhex(result.stdout.decode()) == features(waveform("sung")).tobytes()


# ------------------------------------------------------------------------------------------------------ what is refused


def test_a_silent_recording_is_refused():
    with pytest.raises(InputError, match="silent: every sample is 0") as caught:
        PIPELINE.split("standard_scaler")[0](recordings.wav(np.zeros((2, 30000)), 44100))
    assert caught.value.kind == "malformed"


def test_less_than_a_frame_is_refused():
    with pytest.raises(InputError, match=r"0\.093 s of sound, less than one frame of 0\.093 s") as caught:
        features(waveform("sung")[:, :2047])
    assert caught.value.kind == "malformed"


@pytest.mark.parametrize("stage", [SILENCE, VOICE])
def test_samples_whose_power_is_not_finite_are_refused(stage):
    with pytest.raises(InputError, match=r"largest sample is \S+e\+25 times full scale") as caught:
        run(stage, np.float32(1e26) * waveform("sung"))
    assert caught.value.kind == "malformed"


@pytest.mark.parametrize("stage", [SILENCE, VOICE])
def test_two_channels_are_refused(stage):
    with pytest.raises(PipelineError, match=f"stage '{stage.name}': it takes one channel, got 2; add a 'downmix'"):
        run(stage, np.repeat(waveform("sung"), 2, axis=0))


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (SILENCE, {"top_db": 0.0}),
        (SILENCE, {"hop_length": 0}),
        (VOICE, {"n_mfcc": 129}),
        (VOICE, {"n_fft": -1}),
        (VOICE, {"roll_percent": 1.0}),
        (StandardScaler(), {"mean": (1.0,)}),
        (StandardScaler(), {"mean": (1.0, 2.0), "std": (1.0, 0.0)}),
    ],
)
def test_impossible_parameters_are_refused(stage, changes):
    with pytest.raises(PipelineError, match=f"stage '{stage.name}'"):
        replace(stage, **changes)


def test_all_of_a_recording_is_needed():
    """The loudest frame may be the last; no head of the recording is enough."""
    assert PIPELINE.head_s(44100) == float("inf")


# ----------------------------------------------------------------------------------------------------------- the scaler


def test_a_scaler_is_scikit_learns():
    """Statistics in float64, where a mean some 1e5 times the deviation costs five of its sixteen digits: 8e-12 measured.
    Scaled values are rounded to float32 once: eps = 6e-8 of each."""
    rng = np.random.default_rng(3)
    data = (rng.standard_normal((50, 37)) * 10.0 ** rng.uniform(-3, 4, 37) + rng.uniform(-300, 300, 37)).astype(
        np.float32
    )
    fitted = StandardScaler().fit(torch.from_numpy(data))
    theirs = sklearn.preprocessing.StandardScaler().fit(data.astype(np.float64))
    np.testing.assert_allclose(fitted.mean, theirs.mean_, rtol=1e-12)
    np.testing.assert_allclose(fitted.std, theirs.scale_, rtol=1e-10)
    got = run(fitted, data).data
    assert got.dtype == torch.float32
    want = theirs.transform(data.astype(np.float64))
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-7, atol=1e-6)
    np.testing.assert_allclose(got.numpy(), oracle.standard_scaler(data, fitted.mean, fitted.std), rtol=1e-7)


def test_a_fitted_scaler_survives_its_file():
    fitted = StandardScaler().fit(torch.from_numpy(np.random.default_rng(4).standard_normal((9, 37))))
    pipeline = PIPELINE.replace(standard_scaler=fitted)
    assert Pipeline.from_dict(pipeline.to_dict()).stages["standard_scaler"] == fitted
    assert pipeline.fingerprint != PIPELINE.fingerprint


def test_an_unfitted_scaler_does_not_run():
    assert not StandardScaler().fitted
    assert PIPELINE.unfitted == ["standard_scaler"]
    with pytest.raises(PipelineError, match="'standard_scaler': mean and std are empty, expected the training set's"):
        PIPELINE(recordings.wav(waveform("sung"), RATE))


def test_a_scaler_takes_what_it_was_fitted_to():
    fitted = StandardScaler().fit(torch.rand(5, 37))
    assert fitted.fitted
    with pytest.raises(PipelineError, match="fitted to 37 features, got 36"):
        run(fitted, np.zeros((1, 36), dtype=np.float32))


def test_a_feature_that_never_varies_cannot_be_scaled():
    data = torch.rand(6, 4)
    data[:, 2] = 120.5
    with pytest.raises(ValueError, match=r"feature 2 \(counted from 0\) is 120\.5 in all of them"):
        StandardScaler().fit(data)
    with pytest.raises(ValueError, match="two or more rows"):
        StandardScaler().fit(data[:1])


# ------------------------------------------------------------------------------------------------ network and post-processing


def test_the_network_is_the_keras_model():
    """The same weights in Keras 3's own layers: float32 sums of up to 256 products: 9e-8 measured, 2.4e-7 of the logit."""
    # Here: the other tests need not wait for the import.
    from tests.keras_on_torch import keras

    assert keras.backend.backend() == "torch"
    torch.manual_seed(0)
    network = Definition.read(ARCHIVE).build_network()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if value.is_floating_point() and value.ndim == 1:
                # Away from their starting values, variances above zero.
                value.copy_(torch.rand(value.shape, generator=generator) + (0.5 if "norm" in name else -0.5))
    network.eval()
    model = keras.Sequential([keras.layers.Input((37,))])
    for units, rate in zip((256, 128, 64), (0.3, 0.3, 0.2), strict=True):
        model.add(keras.layers.Dense(units, activation="relu"))
        model.add(keras.layers.Dropout(rate))
        model.add(keras.layers.BatchNormalization())
    model.add(keras.layers.Dense(32, activation="relu"))
    model.add(keras.layers.Dropout(0.2))
    model.add(keras.layers.Dense(1, activation="sigmoid"))
    dense = [layer for layer in model.layers if isinstance(layer, keras.layers.Dense)]
    norms = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    for layer, linear in zip(dense, [*(h.linear for h in network.hidden), network.output], strict=True):
        layer.set_weights([linear.weight.detach().numpy().T, linear.bias.detach().numpy()])
    for layer, hidden in zip(norms, network.hidden[:-1], strict=True):
        norm = hidden.norm
        assert (layer.epsilon, 1 - layer.momentum) == pytest.approx((norm.eps, norm.momentum), rel=1e-9)
        layer.set_weights([v.detach().numpy() for v in (norm.weight, norm.bias, norm.running_mean, norm.running_var)])
    x = np.random.default_rng(2).standard_normal((20, 37)).astype(np.float32)
    want = model.predict(x, verbose=0)[:, 0]
    assert np.ptp(want) > 0.1
    with torch.no_grad():
        encoded = network.encode(torch.from_numpy(x))
        outputs = [network.head(encoded[k : k + 1]) for k in range(len(x))]
        logits = network.logits(encoded)
    assert encoded.shape == (20, 32) and logits.shape == (20, 1)
    np.testing.assert_allclose([o["probability"].item() for o in outputs], want, atol=1e-5, rtol=0)
    # Row by row sums may round otherwise than in a batch.
    np.testing.assert_allclose([o["logit"].item() for o in outputs], logits[:, 0], atol=1e-5)


def test_the_network_starts_as_keras_starts_it():
    torch.manual_seed(0)
    network = MLP()
    for linear in [*(h.linear for h in network.hidden), network.output]:
        limit = (6 / sum(linear.weight.shape)) ** 0.5  # Glorot's uniform
        assert 0.9 * limit < linear.weight.abs().max() <= limit
        assert not linear.bias.any()
    with pytest.raises(ValueError, match="expected one dropout per hidden layer"):
        MLP(hidden=(8, 4), dropout=(0.1,))


def test_the_answer_names_the_label_and_is_as_sure_as_that_label():
    postprocessor = Definition.read(ARCHIVE).postprocessor
    assert postprocessor.classes == LABELS == ("poor", "good")
    good = postprocessor({"probability": torch.tensor(0.75)}, {"duration_s": 2.5}, 0.5)
    assert good == {
        "label": "good",
        "confidence": 0.75,
        "probability": 0.75,
        "talented": True,
        "threshold_used": 0.5,
        "duration_s": 2.5,
    }
    poor = postprocessor({"probability": torch.tensor(0.75)}, {"duration_s": 2.5}, 0.75)
    assert (poor["label"], poor["confidence"], poor["talented"]) == ("poor", 0.25, False)  # strictly above
    for body in (good, poor):
        assert json.loads(json.dumps(body)) == body
        assert postprocessor.read(body) == ((0.75,), int(body["talented"]))
    for classes in (["good"], ["good", "good"], ["a", "b", "c"]):
        with pytest.raises(ValueError, match="expected a list of two different names"):
            build_postprocessor(
                {"label_threshold": {"threshold": 0.5, "classes": classes, "positive_field": "talented"}}
            )


# ---------------------------------------------------------------------------------------------------------- the archive


VARIANTS = sorted((ARCHIVE / "variants").glob("*.yaml"))


@pytest.fixture(scope="module")
def takes():
    return list(examples(24, seed=7))


@pytest.fixture(scope="module")
def scaler(takes) -> StandardScaler:
    first, _ = PIPELINE.split("standard_scaler")
    return StandardScaler().fit(torch.cat([first(take.data) for take in takes]))


@pytest.mark.parametrize("path", VARIANTS, ids=lambda path: path.stem)
def test_a_variant_differs_by_more_than_its_tolerance(path, takes, scaler):
    """What a self-test must catch: no variant hides behind the room that rounding is given."""
    variant = Pipeline.from_yaml(path)
    assert variant.name == f"talent-{path.stem}"
    assert 1 <= len(PIPELINE.diff(variant)) <= 3
    if variant.unfitted:
        variant = variant.replace(standard_scaler=scaler)
    complete = PIPELINE.replace(standard_scaler=scaler)
    resampled = [take.data for take in takes if decoded(take.data).rate != RATE][:2]
    error = np.abs(np.concatenate([(complete(data) - variant(data)).numpy() for data in resampled]))
    assert error.max() > scaler.tolerance.largest
    assert error.mean() > scaler.tolerance.mean


def test_there_are_variants():
    assert {path.stem for path in VARIANTS} == {"no_scaler", "no_silence_removal", "rate_16k", "sinc_resampler"}


def test_features_are_described_in_the_stages_order():
    assert len(FEATURES) == 37 == features(waveform("sung")).shape[0]
    assert [f.name for f in FEATURES[:2]] == ["mfcc_0_mean", "mfcc_1_mean"]
    assert [f.name for f in FEATURES[13:15]] == ["mfcc_0_std", "mfcc_1_std"]
    assert FEATURES[-1].name == "tempo"
    assert len({f.name for f in FEATURES}) == 37
    assert all(f.meaning and f.unit for f in FEATURES)
    assert [len(describe(count)) for count in (1, 13, 20)] == [13, 37, 51]


# ------------------------------------------------------------------------------------------------------ augmented copies


def decoded(data: bytes) -> Signal:
    return Decode()(Signal(Payload(data)))


def test_copies_are_the_same_every_time_and_each_is_another():
    data = recordings.wav(recordings.tones(16000, 0.8, 2), 16000)
    made = augmented_copies(data, 4, seed=1)
    assert made == augmented_copies(data, 4, seed=1)
    assert made[:2] == augmented_copies(data, 2, seed=1)
    assert len({data, *made, *augmented_copies(data, 4, seed=2)}) == 9
    assert augmented_copies(data, 0, seed=1) == []
    with pytest.raises(ValueError, match="count -1"):
        augmented_copies(data, -1, seed=1)
    with pytest.raises(InputError):
        augmented_copies(b"RIFF, but nothing else", 1, seed=1)


def test_what_each_copy_changes():
    rate, seconds = 16000, 1.5
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)[None]
    # Not "FLOAT": such a file has the time in it, and what is drawn for a copy depends on the file's digest.
    data = recordings.wav(tone, rate, "PCM_24")
    original = decoded(data).data
    for seed in range(3):
        shifted, stretched, noisy = (decoded(copy) for copy in augmented_copies(data, 3, seed))
        assert {shifted.rate, stretched.rate, noisy.rate} == {rate}
        # Semitones and speed, by the loudest frequency (to 1 / 1.5 s = 0.7 Hz) and the length.
        assert shifted.data.shape == original.shape
        assert 0.05 < abs(12 * np.log2(loudest(shifted) / 440)) <= 2.05
        assert round(original.shape[1] / STRETCH[1]) <= stretched.data.shape[1] <= round(original.shape[1] / STRETCH[0])
        assert stretched.data.shape != original.shape
        assert abs(loudest(stretched) - 440) <= 1.4
        added = noisy.data - original
        below_db = -20 * np.log10(float(added.std() / original.square().mean().sqrt()))
        assert NOISE_DB[0] - 0.2 <= below_db <= NOISE_DB[1] + 0.2  # the level of 24,000 random numbers is 0.05 dB off


def loudest(signal: Signal) -> float:
    spectrum = np.abs(np.fft.rfft(signal.data[0].numpy()))
    return float(spectrum.argmax() * signal.rate / signal.data.shape[1])


# ------------------------------------------------------------------------------------------------------------ the corpus


def test_the_corpus_is_the_same_every_time(takes):
    """And a take does not depend on how many there are; only the splits do."""
    again = list(examples(12, seed=7))
    assert [t.data for t in again] == [t.data for t in takes[:12]]
    assert again[0].data != next(examples(12, seed=8)).data
    with pytest.raises(CorpusError, match="even number"):
        next(examples(13))


def test_labels_singers_and_splits(takes):
    assert Counter((t.split, t.label) for t in takes) == {
        (split, label): count for split, count in (("train", 8), ("val", 2), ("test", 2)) for label in LABELS
    }
    splits: dict[str, set[str]] = {}
    for take in takes:
        splits.setdefault(take.group, set()).add(take.split)
    assert len(splits) == len(takes) // TAKES_PER_SINGER
    assert all(len(of_one) == 1 for of_one in splits.values())


def test_the_recording_does_not_betray_the_label(takes):
    for poor, good in zip(takes[::2], takes[1::2], strict=True):
        assert (poor.label, good.label) == LABELS
        assert poor.group == good.group and Path(poor.name).suffix == Path(good.name).suffix
        mine, other = decoded(poor.data), decoded(good.data)
        assert mine.data.shape == other.data.shape and mine.rate == other.rate
        # Their peaks were equal before a lossy codec.
        assert mine.metadata["peak"] == pytest.approx(other.metadata["peak"], rel=0.2)
        assert 2.0 <= mine.metadata["duration_s"] <= 4.1
    assert {Path(t.name).suffix for t in takes} == {f".{f}" for f in FORMATS}


# --------------------------------------------------------------------------------------------------------- the pictures


@pytest.fixture(scope="module")
def manifest(takes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("takes")
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["file_path", "label", "group", "split"])
    for take in takes[:8]:
        path = folder / take.name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(take.data)
        writer.writerow([take.name, take.label, take.group, "train"])
    (folder / "manifest.csv").write_text(text.getvalue())
    return folder / "manifest.csv"


def test_pictures_and_table_of_the_features(manifest, tmp_path):
    rows = read_manifest(manifest, manifest.parent, LABELS)
    table = write_pictures(rows, PIPELINE, LABELS, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "features.json",
        "features.md",
        "mfcc.png",
        "spectral.png",
    ]
    assert json.loads((tmp_path / "out" / "features.json").read_text()) == table
    assert table["recordings"] == {"poor": 4, "good": 4}
    assert [entry["name"] for entry in table["features"]] == [f.name for f in FEATURES]
    first, _ = PIPELINE.split("standard_scaler")
    centroids = [float(first(r.path.read_bytes())[0, 26]) for r in rows if r.label == 1]
    entry = table["features"][26]
    assert entry["name"] == "centroid_mean"
    assert entry["classes"]["good"]["mean"] == pytest.approx(np.mean(centroids), rel=1e-9)
    assert entry["classes"]["good"]["std"] == pytest.approx(np.std(centroids), rel=1e-9)
    lines = (tmp_path / "out" / "features.md").read_text().splitlines()
    assert sum(line.startswith("| ") and "`" in line for line in lines) == 37
    for picture in ("mfcc.png", "spectral.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")


def test_pictures_want_voice_features_and_both_classes(manifest, tmp_path):
    rows = read_manifest(manifest, manifest.parent, LABELS)
    with pytest.raises(ValueError, match="no stage 'voice_features'"):
        write_pictures(rows, Pipeline.from_yaml(ROOT / "archive" / "cough" / "pipeline.yaml"), LABELS, tmp_path / "out")
    with pytest.raises(ValueError, match="no recording of class good"):
        write_pictures([r for r in rows if r.label == 0], PIPELINE, LABELS, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line_exits_with_2(manifest, tmp_path):
    given = ("--manifest", manifest, "--out", tmp_path / "out", "--split", "test")
    result = call_skewless("features", ARCHIVE, *given)
    assert result.returncode == 2
    assert "there is no recording of class poor, good" in result.stderr
    assert not (tmp_path / "out").exists()
