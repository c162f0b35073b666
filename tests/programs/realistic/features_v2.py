"""Version 2 of a small library of features."""

import torch
import torch.nn.functional as F


def smooth(levels: torch.Tensor, frames: int = 5) -> torch.Tensor:
    """The moving mean of levels (bands, frames) over time, with the edge values repeated."""
    side = frames // 2
    padded = F.pad(levels, (side, side), mode="replicate")
    return padded.unfold(-1, frames, 1).mean(dim=-1)
