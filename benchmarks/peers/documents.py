"""A Flask backend for coughs as a team wrote it before it had Skewless, rebuilt from its written description.

An upload is converted to WAV by pydub, which starts an ffmpeg process for all that is not called `.wav`. Peak normalisation, downmix, resampling to 16 kHz and
the 50 Hz high-pass follow; then segments of 2 s every 0.5 s, at most 32, each turned into a spectrogram on its own and
kept in half precision. The step to [0, 1] is computed in half precision, too, where training goes back to float32, so the
probabilities differ a little from the evaluated ones. The network runs eagerly, one request at a time per process.

The description has the high-pass as `torchaudio.transforms.HighpassBiquad`, which no torchaudio has; the function it means
is `torchaudio.functional.highpass_biquad`. It reads the WAV by `torchaudio.load`, which now needs FFmpeg's shared libraries;
the same 16-bit samples are read by soundfile here.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import soundfile
import torch
import torchaudio
import torchaudio.transforms as T
from flask import Flask, jsonify, request
from pydub import AudioSegment
from safetensors.torch import load_file
from torch.nn import functional as F

from benchmarks.peers.eager import FOLDER
from skewless.core.definition import Definition
from skewless.core.networks.attn_mil_resnet import AttnMILResNet

AudioSegment.converter = imageio_ffmpeg.get_ffmpeg_exe()

RATE, SEGMENT_S, HOP_S, MAX_SEGMENTS = 16_000, 2.0, 0.5, 32
THRESHOLD = 0.61


class Processor:
    """From a WAV file to spectrograms in half precision, one segment at a time."""

    def __init__(self) -> None:
        self.mel = T.MelSpectrogram(
            sample_rate=RATE,
            n_fft=1024,
            win_length=1024,
            hop_length=160,
            n_mels=160,
            f_min=50.0,
            f_max=4000.0,
            power=2.0,
        )
        self.decibel = T.AmplitudeToDB(stype="power", top_db=80)

    def load_audio(self, path: Path) -> torch.Tensor:
        """`(1, samples)` at 16 kHz."""
        samples, rate = soundfile.read(path, dtype="int16", always_2d=True)
        waveform = torch.from_numpy(samples.T.copy()).float()
        if waveform.abs().max() > 0:
            waveform = waveform / waveform.abs().max()
        if waveform.shape[0] > 1:
            waveform = waveform.mean(dim=0, keepdim=True)
        if rate != RATE:
            waveform = T.Resample(rate, RATE)(waveform)
        return torchaudio.functional.highpass_biquad(waveform, RATE, 50.0)

    def extract_segments(self, waveform: torch.Tensor) -> list[torch.Tensor]:
        """`(1, 32000)` each; only those that fit into the recording."""
        length, hop = int(SEGMENT_S * RATE), int(HOP_S * RATE)
        if waveform.shape[1] < length:
            waveform = F.pad(waveform, (0, length - waveform.shape[1]))
        return [waveform[:, start : start + length] for start in range(0, waveform.shape[1] - length + 1, hop)]

    def waveform_to_mel_3ch(self, waveform: torch.Tensor) -> torch.Tensor:
        """`(3, 224, 224)` float16 in [-1, 1]."""
        decibels = self.decibel(self.mel(waveform))
        image = torch.clamp((decibels + 80) / 80, 0, 1) * 2 - 1
        return letterbox_to_square(image, 224).squeeze(0).repeat(3, 1, 1).half()


def letterbox_to_square(x: torch.Tensor, side: int) -> torch.Tensor:
    """`(1, H, W)` to `(1, side, side)`, padded with -1."""
    _, height, width = x.shape
    scale = min(side / height, side / width)
    size = (round(height * scale), round(width * scale))
    resized = F.interpolate(x.unsqueeze(0), size=size, mode="bilinear", align_corners=False).squeeze(0)
    down, right = side - size[0], side - size[1]
    return F.pad(resized, (right // 2, right - right // 2, down // 2, down - down // 2), value=-1.0)


class CoughModel:
    """The network with the archive's weights."""

    def __init__(self, folder: Path) -> None:
        (parameters,) = Definition.read(folder).network.values()
        self.model = AttnMILResNet(**parameters)
        self.model.load_state_dict(load_file(folder / "weights.safetensors"))
        self.model.eval()
        self.processor = Processor()
        self.mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 1, 3, 1, 1)
        self.std = torch.tensor([0.229, 0.224, 0.225]).view(1, 1, 3, 1, 1)

    def predict(self, wav: Path) -> tuple[float, list[float]]:
        """The recording's probability and those of its segments."""
        segments = self.processor.extract_segments(self.processor.load_audio(wav))[:MAX_SEGMENTS]
        x = torch.stack([self.processor.waveform_to_mel_3ch(segment) for segment in segments]).unsqueeze(0)
        x = ((x + 1) / 2.0 - self.mean) / self.std
        mask = torch.ones(1, x.shape[1], dtype=torch.bool)
        with torch.no_grad():
            bag, parts, _, _ = self.model(x, mask)
        return float(bag.item()), parts.squeeze(0).numpy().tolist()


app = Flask(__name__)
model = CoughModel(Path(os.environ[FOLDER]))


@app.get("/health")
def health() -> Any:
    return jsonify(status="ok")


@app.post("/api/detect-cough")
def detect_cough() -> Any:
    file = request.files["audio"]
    threshold = float(request.form.get("threshold", THRESHOLD))
    with tempfile.TemporaryDirectory() as folder:
        sent, wav = Path(folder, f"sent{Path(file.filename or '').suffix}"), Path(folder, "converted.wav")
        file.save(sent)
        # Unlike `from_file`, it asks no ffprobe, which imageio-ffmpeg does not carry.
        decoded = AudioSegment.from_file_using_temporary_files(str(sent))
        decoded.set_sample_width(2).export(wav, format="wav")
        probability, parts = model.predict(wav)
    return jsonify(
        file_probability=probability,
        coughDetected=probability > threshold,
        threshold_used=threshold,
        segment_probabilities=parts,
    )
