"""The decoder of many web backends, pydub with an ffmpeg process, as a stage to compare with. It is never built into an
archive; it needs `pip install skewless[skew]`."""

from __future__ import annotations

import io
import subprocess
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import av
import imageio_ffmpeg
import numpy as np
import torch

from skewless.core.stages import InputError, Payload, Signal, Stage

with warnings.catch_warnings():
    # pydub looks for ffmpeg on the PATH when imported; the program used here is imageio-ffmpeg's.
    warnings.simplefilter("ignore", RuntimeWarning)
    from pydub import AudioSegment
    from pydub.audio_segment import fix_wav_headers
    from pydub.exceptions import CouldntDecodeError


@dataclass(frozen=True)
class DecodePydub(Stage, name="decode_pydub"):
    """Bytes to a float32 waveform `(1, samples)` as `AudioSegment.from_file` and a division by the bit depth give it.

    PCM WAV is read by pydub itself, all else by ffmpeg into integer PCM of the width pydub asks for. Channels are
    averaged in integers, before the division. 8-bit audio comes out 1.0 too low: the backends subtract an offset that
    pydub has already removed.

    Metadata added: those of `decode`, with `peak` over all channels before they are averaged.
    Raises InputError for what ffmpeg cannot decode ("malformed"), and for a recording longer than
    `Payload.max_duration_s` ("too_large").
    """

    unit: ClassVar[str] = "full scale"
    packages: ClassVar[tuple[str, ...]] = ("pydub", "imageio-ffmpeg", "av", "numpy")
    reads: ClassVar[str] = "audio"
    comparison_only: ClassVar[bool] = True

    def __call__(self, signal: Signal) -> Signal:
        payload: Payload = signal.data
        audio = _read(payload.data)
        if len(audio.raw_data) % audio.frame_width:
            raise InputError("the audio ends within a sample; the file is damaged or cut short")
        rate, peak = audio.frame_rate, float(np.abs(_scaled(audio)).max(initial=0.0))
        samples = _scaled(audio.set_channels(1))
        if not samples.size:
            raise InputError("pydub finds no audio samples; record or export it again")
        if samples.size > payload.max_duration_s * rate:
            raise InputError(f"the recording is longer than {payload.max_duration_s:g} s; send an excerpt", "too_large")
        return signal.of(
            torch.from_numpy(samples).unsqueeze(0),
            rate=rate,
            peak=peak,
            num_samples=samples.size,
            duration_s=samples.size / rate,
            complete=True,
        )


def _scaled(audio: AudioSegment) -> np.ndarray:
    """Samples as float32, full scale 1.0, channels interleaved."""
    samples = np.array(audio.get_array_of_samples(), dtype=np.float32)
    if audio.sample_width == 1:
        return samples / 128.0 - 1.0
    return samples / 2.0 ** (8 * audio.sample_width - 1)


def _read(data: bytes) -> AudioSegment:
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        try:
            return AudioSegment(data)
        except CouldntDecodeError:
            # As pydub does: WAV that is not integer PCM goes to ffmpeg.
            return _convert(data)
    return _convert(data)


def _convert(data: bytes) -> AudioSegment:
    """The command that `AudioSegment.from_file` runs, without the ffprobe that it asks for the sample format."""
    codec = _pcm_codec(data)
    with tempfile.TemporaryDirectory() as folder:
        # A file and not a pipe: MP4 is read back and forth.
        Path(folder, "input").write_bytes(data)
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-i", "input", "-acodec", codec, "-vn", "-f", "wav", "-"]
        done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    if done.returncode or not done.stdout:
        reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise InputError(f"ffmpeg cannot decode the audio: {' '.join(reason)}")
    wav = bytearray(done.stdout)
    fix_wav_headers(wav)
    return AudioSegment(bytes(wav))


def _pcm_codec(data: bytes) -> str:
    """pydub's rule: 16 bits for MP3 and AAC, else the decoder's own width (32 for Vorbis and Opus)."""
    try:
        with av.open(io.BytesIO(data)) as file:
            if not file.streams.audio:
                raise InputError("ffmpeg finds no audio track")
            decoder = file.streams.audio[0].codec_context
            lossy = decoder.format.name == "fltp" and decoder.codec.canonical_name in ("mp3", "aac")
            bits = 16 if lossy else decoder.format.bits
    except av.FFmpegError as error:
        raise InputError(f"ffmpeg cannot open the audio: {error}") from error
    return "pcm_u8" if bits == 8 else f"pcm_s{bits}le"
