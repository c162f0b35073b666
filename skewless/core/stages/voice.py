"""A voice in 37 numbers: silence removed, librosa's features, each in units of its spread over the training set.

librosa 0.11 is the definition, with its defaults spelt out. `voice_tracks` computes the same bits without importing it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from skewless.core.stages import voice_tracks
from skewless.core.stages.stage import InputError, Signal, Stage, Tolerance


class Feature(NamedTuple):
    """What one number of `voice_features` is called, what it means, and its unit."""

    name: str
    meaning: str
    unit: str


def describe(n_mfcc: int) -> tuple[Feature, ...]:
    """The features that `voice_features` computes with `n_mfcc` coefficients, in its order: 2 n_mfcc + 11."""
    timbre = ["level of the spectrum as a whole", "tilt of the spectrum: low against high frequencies"]
    timbre += [f"shape of the spectrum: {k / 2:g} ripple{'s' * (k > 2)} along the mel scale" for k in range(2, n_mfcc)]
    found = [Feature(f"mfcc_{k}_mean", f"{what}, on average", "dB") for k, what in enumerate(timbre[:n_mfcc])]
    found += [Feature(f"mfcc_{k}_std", f"{what}, how much it varies", "dB") for k, what in enumerate(timbre[:n_mfcc])]
    for name, what, unit in (
        ("centroid", "brightness: centre of gravity of the spectrum", "Hz"),
        ("rolloff", "brightness: frequency below which most of the spectrum lies", "Hz"),
        ("zero_crossing", "noisiness: share of samples where the waveform changes sign", "1"),
        ("rms", "loudness: root mean square of the waveform", "full scale"),
        ("chroma", "spread over the 12 pitch classes: a single clear note is low, noise is high", "1"),
    ):
        found += [
            Feature(f"{name}_mean", f"{what}, on average", unit),
            Feature(f"{name}_std", f"{what}, how much it varies", unit),
        ]
    return (*found, Feature("tempo", "rate of note onsets", "beats per minute"))


FEATURES = describe(n_mfcc=13)


@dataclass(frozen=True)
class RemoveSilence(Stage, name="remove_silence"):
    """The parts that are not silent, joined: `(1, N) -> (1, M)`, M <= N (`librosa.effects.split`).

    A frame of `frame_length` samples every `hop_length`, centred and zero-padded, is silent when its RMS level is
    `top_db` or more below that of the recording's loudest frame. Frames below -100 dB of full scale all have the same
    level, so that nothing is removed from a recording that stays below it; of one whose samples are all zero, nothing is
    left, and it raises InputError "malformed" (librosa keeps it); also for samples so large that their power is not finite.

    The metadata's `num_samples` becomes M; `duration_s` stays the recording's.
    """

    unit: ClassVar[str] = "full scale"
    packages: ClassVar[tuple[str, ...]] = ("numpy",)
    tolerance: ClassVar[Tolerance] = Tolerance(2e-6, 2e-4, "cut out of what the resampler before it gives")

    top_db: float
    frame_length: int
    hop_length: int

    def __post_init__(self):
        self.require(self.top_db > 0, f"top_db is {self.top_db}, expected a positive number of decibels")
        for name in ("frame_length", "hop_length"):
            self.require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, expected a positive number")

    def __call__(self, signal: Signal) -> Signal:
        waveform = _mono(self, signal)
        if not waveform.any():
            raise InputError("the recording is silent: every sample is 0; record it again, with the microphone on")
        with np.errstate(over="ignore", invalid="ignore"):
            loud = voice_tracks.loud_parts(waveform, self.top_db, self.frame_length, self.hop_length)
        if not len(loud):
            raise _too_large(waveform)
        kept = np.concatenate([waveform[start:end] for start, end in loud])
        return signal.of(torch.from_numpy(kept).unsqueeze(0), num_samples=len(kept))

    def needs(self, seconds: float, rate: int) -> float:
        # The loudest frame may be the last one.
        return float("inf")


@dataclass(frozen=True)
class VoiceFeatures(Stage, name="voice_features"):
    """Means and standard deviations over the frames of a recording: `(1, N) -> (1, 2 n_mfcc + 11)` float32.

    In this order, as `describe` names them: MFCC means, MFCC standard deviations, then mean and standard deviation of
    spectral centroid, roll-off, zero-crossing rate, RMS and chroma (over frames and pitch classes), then the tempo.
    Standard deviations are of the population. Frames of `n_fft` samples every `hop_length`, Hann-windowed for spectra,
    centred, zero-padded at the edges (zero crossings: the edge sample repeated).

    MFCC: orthonormal DCT-II of the levels of `n_mels` bands from 0 Hz to half the rate (Slaney's mel scale and norm), in
    decibels, floored 80 dB below the recording's loudest (S. B. Davis, P. Mermelstein, "Comparison of Parametric
    Representations for Monosyllabic Word Recognition in Continuously Spoken Sentences", IEEE TASSP 1980).
    roll_percent: the share of the magnitude spectrum below the roll-off. Chroma: 12 pitch classes around the tuning that
    librosa estimates, each frame's largest scaled to 1 (D. P. W. Ellis, "Chroma feature analysis and synthesis", 2007).
    tempo: in beats per minute, the autocorrelation of the onset strength weighted by a prior around 120
    (D. P. W. Ellis, "Beat Tracking by Dynamic Programming", JNMR 2007). "beat_track" takes the median over the bands for
    the onset strength and gives 0 without any, as `librosa.beat.beat_track` does; "tempo" takes the mean, as
    `librosa.feature.tempo` does, and gives the prior's own tempo without any.

    Every number is finite. Raises InputError "malformed" for less than one frame, which would be padding for the most part,
    and for samples so large that their power is not finite.
    """

    unit: ClassVar[str] = "voice features"
    packages: ClassVar[tuple[str, ...]] = ("numpy", "scipy")
    tolerance: ClassVar[Tolerance] = Tolerance(
        1e-4,
        5e-3,
        "last bits move a roll-off to another bin, or a zero crossing",
        relative=True,
    )

    n_mfcc: int
    n_fft: int
    hop_length: int
    tempo: Literal["beat_track", "tempo"]
    n_mels: int = 128
    roll_percent: float = 0.85

    def __post_init__(self):
        for name in ("n_mfcc", "n_fft", "hop_length", "n_mels"):
            self.require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, expected a positive number")
        self.require(self.n_mfcc <= self.n_mels, f"n_mfcc {self.n_mfcc} exceeds n_mels {self.n_mels}")
        self.require(0 < self.roll_percent < 1, f"roll_percent is {self.roll_percent}, expected a number in (0, 1)")

    def __call__(self, signal: Signal) -> Signal:
        waveform, rate = _mono(self, signal), signal.sampling_rate
        if len(waveform) < self.n_fft:
            raise InputError(
                f"there is {len(waveform) / rate:.3f} s of sound, less than one frame of {self.n_fft / rate:.3f} s; "
                "record something longer"
            )
        with np.errstate(over="ignore", invalid="ignore"):
            values = self._values(waveform, rate)
        if not np.isfinite(values).all():
            raise _too_large(waveform)
        return signal.of(torch.from_numpy(values.astype(np.float32)).unsqueeze(0))

    def _values(self, waveform: NDArray[np.float32], rate: int) -> NDArray[np.float64]:
        n_fft, hop_length = self.n_fft, self.hop_length
        spectrum = voice_tracks.spectrum(waveform, rate, n_fft, hop_length, self.roll_percent)
        level = voice_tracks.mel_level(spectrum.power, rate, n_fft, self.n_mels)
        mfcc = voice_tracks.mfcc(level, self.n_mfcc)
        tracks = (
            spectrum.centroid,
            spectrum.rolloff,
            voice_tracks.zero_crossing_rate(waveform, n_fft, hop_length),
            voice_tracks.rms(waveform, n_fft, hop_length),
            voice_tracks.chroma(spectrum.power, rate, n_fft, spectrum.tuning),
        )
        statistics = [statistic for track in tracks for statistic in (np.mean(track), np.std(track))]
        return np.hstack([np.mean(mfcc, axis=1), np.std(mfcc, axis=1), statistics, [self._tempo(level, rate)]])

    def _tempo(self, level: NDArray[np.float32], rate: int) -> float:
        across_bands: Literal["median", "mean"] = "median" if self.tempo == "beat_track" else "mean"
        onsets = voice_tracks.onset_strength(level, across_bands, self.n_fft, self.hop_length)
        if self.tempo == "beat_track" and not onsets.any():
            return 0.0
        return voice_tracks.tempo(onsets, rate, self.hop_length)

    def needs(self, seconds: float, rate: int) -> float:
        return float("inf")


@dataclass(frozen=True)
class StandardScaler(Stage, name="standard_scaler"):
    """Features in units of their spread over the training set: `(S, F) -> (S, F)` float32, (x - mean) / std.

    mean, std: one number per feature. Both empty: not fitted yet; training fits it and writes them, and running it before
    raises PipelineError. Computed in float64, rounded once.
    """

    unit: ClassVar[str] = "standard deviations"
    cheap: ClassVar[bool] = True
    tolerance: ClassVar[Tolerance] = Tolerance(2e-3, 0.05, "the features' own, over their spread")

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self):
        self.require(len(self.mean) == len(self.std), f"{len(self.mean)} means but {len(self.std)} standard deviations")
        self.require(all(s > 0 for s in self.std), f"std is {list(self.std)}, expected positive numbers")

    @property
    def fitted(self) -> bool:
        return len(self.mean) > 0

    def fit(self, data: torch.Tensor) -> StandardScaler:
        """The scaler with the mean and the population standard deviation of features `(N, F)`, in float64.

        Raises ValueError for fewer than two rows, and for features that are the same in all of them: no recording
        could then say how far from the mean another one is.
        """
        if data.ndim != 2 or len(data) < 2:
            raise ValueError(f"a scaler is fitted to two or more rows of features, got {tuple(data.shape)}")
        constant = (data == data[0]).all(dim=0).nonzero().flatten().tolist()
        if constant:
            listed = ", ".join(f"{k} (counted from 0) is {data[0, k]:g}" for k in constant)
            raise ValueError(
                f"a scaler needs features that vary over the {len(data)} training recordings: feature {listed} in all of "
                "them; add recordings that differ"
            )
        data = data.double()
        std = data.std(dim=0, correction=0)
        return dataclasses.replace(self, mean=tuple(data.mean(dim=0).tolist()), std=tuple(std.tolist()))

    def __call__(self, signal: Signal) -> Signal:
        self.require(
            self.fitted,
            "mean and std are empty, expected the training set's statistics; training fits them and writes them into "
            "the checkpoint's pipeline",
        )
        given = signal.data.shape[-1]
        self.require(given == len(self.mean), f"it was fitted to {len(self.mean)} features, got {given}")
        device = signal.data.device
        mean = torch.tensor(self.mean, dtype=torch.float64, device=device)
        std = torch.tensor(self.std, dtype=torch.float64, device=device)
        return signal.of(((signal.data.double() - mean) / std).float())


def _mono(stage: Stage, signal: Signal) -> NDArray[np.float32]:
    channels = signal.data.shape[0]
    stage.require(channels == 1, f"it takes one channel, got {channels}; add a 'downmix' stage before it")
    return signal.data[0].numpy()


def _too_large(waveform: NDArray[np.float32]) -> InputError:
    return InputError(
        f"the largest sample is {np.abs(waveform).max():.3g} times full scale, and float32 cannot hold its power; export the "
        "recording with samples between -1 and 1"
    )
