#!/usr/bin/env python3
"""Let numba compile what the voice features need into its cache (NUMBA_CACHE_DIR), so that no worker has to wait for it."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from skewless.core.stages import STAGES, Signal


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    signal = Signal(torch.rand(1, 44100, generator=torch.Generator().manual_seed(0)) - 0.5, 22050)
    for name, params in (
        ("remove_silence", {"top_db": 20.0, "frame_length": 2048, "hop_length": 512}),
        ("voice_features", {"n_mfcc": 13, "n_fft": 2048, "hop_length": 512, "tempo": "beat_track"}),
    ):
        signal = STAGES[name].from_params(params)(signal)
    print(f"{signal.data.numel()} features of noise: compiled")


if __name__ == "__main__":
    main()
