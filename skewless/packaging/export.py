"""From a checkpoint to a file that other programs run without this project: an ONNX graph, or a program of torch.export."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from skewless.core.definition import Definition
from skewless.core.networks import Network
from skewless.core.networks.program import program_of
from skewless.core.pipeline import Pipeline
from skewless.core.runtimes import RuntimeSettings
from skewless.core.runtimes.onnx import OnnxRuntime
from skewless.core.stages import Signal, Stage
from skewless.core.stages.spectrogram import Mel
from skewless.packaging.probes import network_inputs, probes
from skewless.training.checkpoint import network_of, trained


def export_checkpoint(
    definition: Definition, checkpoint: dict[str, Any], out: Path, *, format: str = "onnx", whole_path: bool = False
) -> Path:
    """Write a checkpoint's network, for one recording of any number of rows S, in float32; returns `out`.

    In: what the pipeline gives for a recording, `(S, ...)` float32. Out: what the network's `head` gives, by its names.
    format: "onnx", a graph whose input has the network's `input_name`; it takes the features of earlier rows too, as
        OnnxRuntime explains. "pt2", what `torch.export.load` reads: `program.module()(rows)` gives a dict, and a model.yaml
        serves it as `network: {exported: {file: model.pt2, per: recording}}`.
    whole_path: start at the waveforms `(S, samples)` float32 that enter the pipeline's `mel` stage, one recording's
        segments, resampled and filtered as the stages before `mel` do. The input is then called `waveforms`.
    Raises CheckpointError for a checkpoint of another definition; ValueError for an unknown format, for a network that cannot
    be written so, and with `whole_path` for a pipeline without `segment` and then `mel`.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}, expected one of {', '.join(FORMATS)}")
    definition = trained(definition, checkpoint)
    network = network_of(checkpoint, definition)
    out.parent.mkdir(parents=True, exist_ok=True)
    if whole_path:
        network, example = _with_mel(network, definition.pipeline)
    else:
        example = next(network_inputs(definition.pipeline))
    with tempfile.TemporaryDirectory() as scratch:
        written = _WRITERS[format](network, example, Path(scratch))
        shutil.move(written, out)
    return out


def _write_onnx(network: Network, example: torch.Tensor, folder: Path) -> Path:
    (path,) = OnnxRuntime.write(network, folder, RuntimeSettings(), [example])
    return path


def _write_pt2(network: Network, example: torch.Tensor, folder: Path) -> Path:
    path = folder / "model.pt2"
    program = program_of(_Answer(network), example.shape[1:])
    program.example_inputs = None  # zeros, which nothing reads
    torch.export.save(program, path)
    return path


_WRITERS = {"onnx": _write_onnx, "pt2": _write_pt2}
FORMATS = tuple(_WRITERS)


class _Answer(nn.Module):
    """One recording's rows `(S, ...)` to what the network's `head` gives."""

    def __init__(self, network: Network):
        super().__init__()
        self.network = network

    def forward(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.network.head(self.network.encode(rows))


def _with_mel(network: Network, pipeline: Pipeline) -> tuple[Network, torch.Tensor]:
    """The network with the stages from `mel` on in front of it, and an example of its input `(S, samples)`."""
    names = list(pipeline.stages)
    if "mel" not in names or "segment" not in names[: names.index("mel")]:
        raise ValueError(
            f"pipeline '{pipeline.name}' has the stages {', '.join(names)}, expected `segment` and then `mel`, where the whole "
            "path starts; export without it"
        )
    before, after = pipeline.split("mel")
    signal = before.run(next(iter(probes(pipeline.reads).values())))
    mel, *stages = after.stages.values()
    # `mel` is our stage's name, which no class of one's own may have.
    return _WholePath(network, cast(Mel, mel), stages, signal.sampling_rate), signal.data


class _WholePath(Network):
    """Waveforms `(S, samples)` through the pipeline's own stages, with mel's Fourier transform as a convolution, and then
    through the network."""

    input_name = "waveforms"

    filterbank: torch.Tensor
    basis: torch.Tensor

    def __init__(self, network: Network, mel: Mel, stages: Sequence[Stage], rate: int):
        super().__init__()
        self.network, self.stages = network, stages
        self.margin, self.hop, self.exponent = mel.n_fft // 2, mel.hop_length, mel.power / 2
        filterbank = mel.filterbank(mel.rate or rate)
        # Frequencies outside every filter contribute nothing.
        heard = filterbank.any(dim=1)
        self.register_buffer("filterbank", filterbank[heard])
        self.register_buffer("basis", _fourier_basis(mel)[:, heard].flatten(0, 1).unsqueeze(1))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Waveforms `(N, samples)` to the network's features `(N, F)`."""
        padded = F.pad(x.unsqueeze(1), (self.margin, self.margin), mode="reflect")
        real, imaginary = F.conv1d(padded, self.basis, stride=self.hop).chunk(2, dim=1)
        spectrum = (real.square() + imaginary.square()) ** self.exponent
        signal = Signal(torch.matmul(spectrum.transpose(1, 2), self.filterbank).transpose(1, 2))
        for stage in self.stages:
            signal = stage(signal)
        return self.network.encode(signal.data)

    def head(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """The network's own outputs, from one recording's features `(S, F)`."""
        return self.network.head(features)


def _fourier_basis(mel: Mel) -> torch.Tensor:
    """Windowed cosines and sines, `(2, n_fft // 2 + 1, n_fft)`: the discrete Fourier transform of a real frame."""
    left = (mel.n_fft - mel.win_length) // 2
    window = F.pad(torch.hann_window(mel.win_length, dtype=torch.float64), (left, mel.n_fft - mel.win_length - left))
    # The phase modulo a turn, in integers: exact, whatever n_fft.
    turns = torch.outer(torch.arange(mel.n_fft // 2 + 1), torch.arange(mel.n_fft)) % mel.n_fft
    phase = 2 * torch.pi * turns.double() / mel.n_fft
    return (torch.stack([phase.cos(), phase.sin()]) * window).float()
