"""Time the voice features against librosa's own functions, on recordings of several lengths.

    python -m benchmarks.voice --rounds 30

Run it from the repository's root. Both compute in turn, with silence removed first, in CPU time: a ratio is of one round.
Every answer is compared, bit for bit.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from skewless.core.pipeline import Pipeline
from skewless.core.stages import Signal
from skewless.core.stages.voice import RemoveSilence, VoiceFeatures
from tests.oracles import librosa_voice

ARCHIVE = Path(__file__).resolve().parents[1] / "archive" / "talent"


def sung(seconds: float, rate: int) -> NDArray[np.float32]:
    """A note with vibrato and overtones in noise, silent for the last tenth: `(N,)`."""
    t = np.arange(round(seconds * rate)) / rate
    phase = 2 * np.pi * 220 * t + 0.8 * np.sin(2 * np.pi * 5.5 * t)
    note = sum(np.sin(k * phase) / k for k in range(1, 12)) * (t < 0.9 * seconds)
    return (0.2 * note + 1e-3 * np.random.default_rng(0).standard_normal(len(t))).astype(np.float32)


def measure(seconds: float, rounds: int, rate: int = 22050) -> str:
    """One row of the table; raises AssertionError where a bit differs."""
    stages = Pipeline.from_yaml(ARCHIVE / "pipeline.yaml").stages
    silence, features = stages["remove_silence"], stages["voice_features"]
    assert isinstance(silence, RemoveSilence) and isinstance(features, VoiceFeatures)
    y = sung(seconds, rate)
    ours, theirs = [], []
    # Round 0 warms up.
    for _ in range(rounds + 1):
        start = time.process_time()
        got = features(silence(Signal(torch.from_numpy(y)[None], rate))).data[0].numpy()
        between = time.process_time()
        want = librosa_voice.features(librosa_voice.remove_silence(y, silence), rate, features)
        ours.append(between - start)
        theirs.append(time.process_time() - between)
        np.testing.assert_array_equal(got, want)
    ratio = statistics.median(b / a for a, b in zip(ours[1:], theirs[1:], strict=True))
    ms, librosa_ms = (1e3 * statistics.median(times[1:]) for times in (ours, theirs))
    return f"| {seconds:g} | {ms:.1f} | {librosa_ms:.1f} | {ratio:.1f} |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, nargs="+", default=[1.0, 3.0, 10.0, 60.0])
    args = parser.parse_args(argv)
    # Threads would wait for one another, and CPU time would count that.
    torch.set_num_threads(1)
    print("| seconds | ms | ms with librosa | ratio |\n|---|---|---|---|")
    for seconds in args.seconds:
        print(measure(seconds, args.rounds))


if __name__ == "__main__":
    main()
