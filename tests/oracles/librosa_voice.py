"""What the voice stages' numbers are defined by: librosa's own functions, one after the other."""

from typing import Any

import librosa
import numpy as np
from numpy.typing import NDArray

from skewless.core.stages.voice import RemoveSilence, VoiceFeatures


def remove_silence(y: NDArray[np.float32], stage: RemoveSilence) -> NDArray[np.float32]:
    """Of a recording (N,), the parts that are not silent, joined."""
    parts = librosa.effects.split(y, top_db=stage.top_db, frame_length=stage.frame_length, hop_length=stage.hop_length)
    return np.concatenate([y[start:end] for start, end in parts])


def features(y: NDArray[np.float32], rate: int, stage: VoiceFeatures) -> NDArray[np.float32]:
    """Of a recording (N,): (2 n_mfcc + 11,)."""
    n_fft, hop = stage.n_fft, stage.hop_length
    about: dict[str, Any] = {"sr": rate, "n_fft": n_fft}
    magnitude = np.abs(librosa.stft(y, n_fft=n_fft, hop_length=hop))
    power = magnitude**2
    level = librosa.power_to_db(librosa.feature.melspectrogram(S=power, n_mels=stage.n_mels, **about))
    mfcc = librosa.feature.mfcc(S=level, n_mfcc=stage.n_mfcc)
    tracks = (
        librosa.feature.spectral_centroid(S=magnitude, **about),
        librosa.feature.spectral_rolloff(S=magnitude, roll_percent=stage.roll_percent, **about),
        librosa.feature.zero_crossing_rate(y, frame_length=n_fft, hop_length=hop),
        librosa.feature.rms(y=y, frame_length=n_fft, hop_length=hop),
        librosa.feature.chroma_stft(S=power, **about),
    )
    statistics = [value for track in tracks for value in (np.mean(track), np.std(track))]
    across_bands = np.median if stage.tempo == "beat_track" else np.mean
    onsets = librosa.onset.onset_strength(S=level, hop_length=hop, aggregate=across_bands, **about)
    bpm = 0.0
    if stage.tempo == "tempo" or onsets.any():
        bpm = librosa.feature.tempo(onset_envelope=onsets, sr=rate, hop_length=hop)[0]
    return np.hstack([np.mean(mfcc, axis=1), np.std(mfcc, axis=1), statistics, bpm]).astype(np.float32)
