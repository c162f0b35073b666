"""Decoding against pydub's, of every format that is read, whole, damaged and cut short.

What is measured: PCM and lossless formats are exact, to the last bit the format holds. Lossy files are decoded by both
sides with the codec's delay removed, so they are compared sample by sample at lag zero; pydub rounds to 16 bits,
which leaves half a step, 2**-16, and the decoders' own arithmetic adds less than a tenth of that. Opus in Ogg is the
exception: libopus and FFmpeg's own decoder were seen 1.5 steps apart.
"""

import collections
import itertools
import math
import multiprocessing
import struct
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import signal
from scipy.optimize import linear_sum_assignment

from skewless.core.pipeline import Pipeline
from skewless.core.stages import STAGES, InputError, Payload, Signal
from skewless.core.stages.decode import identify
from tests import recordings
from tests.oracles import cough as oracle
from tests.recordings import one_thread  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
PIPELINE = Pipeline.from_yaml(ROOT / "archive" / "cough" / "pipeline.yaml")
STEP = 2.0**-15  # of 16-bit samples

CONTAINERS = {
    "wav8": "WAV",
    "wav16": "WAV",
    "wav24": "WAV",
    "wav32": "WAV",
    "wav_float": "WAV",
    "wav_double": "WAV",
    "wav_mulaw": "WAV",
    "aiff": "AIFF",
    "flac": "FLAC",
    "flac24": "FLAC",
    "vorbis": "Ogg",
    "opus": "Opus",
    "mp3": "MP3",
    "mp3_vbr": "MP3",
    "m4a": "MP4",
    "m4a_faststart": "MP4",
    "alac": "MP4",
    "aac": "AAC",
    "webm": "WebM",
    "webm_vorbis": "WebM",
    "mkv8": "WebM",
    "mkv32": "WebM",
    "mkv_double": "WebM",
}


def decode(data: bytes, **limits: float) -> Signal:
    return STAGES["decode"]()(Signal(Payload(data, **limits)))


def refusal(data: bytes) -> InputError:
    """The error of the whole pipeline."""
    with pytest.raises(InputError) as caught:
        PIPELINE(data)
    return caught.value


def largest_error(a: NDArray, b: NDArray) -> float:
    """Over the samples that both have."""
    length = min(a.shape[1], b.shape[1])
    return float(np.abs(a[:, :length].astype(np.float64) - b[:, :length]).max())


# What the formats hold


def test_containers_are_told_by_their_bytes():
    assert set(CONTAINERS) == set(recordings.ENCODERS)
    assert {encoder: identify(recordings.recording(encoder)) for encoder in CONTAINERS} == CONTAINERS


# Bits that a format keeps of 32-bit samples.
BITS = {
    "wav8": 8,
    "wav16": 16,
    "wav24": 24,
    "wav32": 32,
    "wav_float": 24,
    "wav_double": 32,
    "aiff": 16,
    "flac": 24,  # pydub's ffmpeg takes 24 bits for wider samples
    "mkv8": 8,
    "mkv32": 32,
    "mkv_double": 32,
}


@pytest.mark.parametrize("encoder", BITS)
def test_lossless_formats_keep_every_bit(encoder):
    """Within one step of the format, or of float32's 24 bits for samples up to 0.5."""
    samples = recordings.tones(16000, 0.3, channels=2)
    out = decode(recordings.encode(samples, 16000, encoder, sample_width=4))
    assert out.rate == 16000
    assert out.data.dtype == torch.float32
    assert out.data.shape == samples.shape
    error = largest_error(out.data.numpy(), samples)
    assert error <= max(2.0 ** (1 - BITS[encoder]), 2.0**-25)
    if BITS[encoder] < 24:
        # A format taken for a wider one would be off by this much.
        assert error > 2.0 ** (-1 - BITS[encoder])


LOSSLESS = ["wav8", "wav16", "wav24", "wav32", "wav_float", "wav_double", "wav_mulaw", "aiff", "flac", "flac24", "alac"]


@pytest.mark.parametrize(
    ("encoder", "rate", "channels"),
    [
        *itertools.product(LOSSLESS, [8000, 44100], [1, 2]),
        # Not wav_float: with more than two channels or above 48 kHz its header is of the extensible kind, in which
        # pydub takes float samples for integers.
        *itertools.product(["wav16", "flac", "aiff"], [22050, 96000], [1]),
        *itertools.product(["wav16", "flac", "aiff"], [48000], [6, 8]),
        ("alac", 48000, 6),
    ],
)
def test_lossless_formats_equal_pydub(encoder, rate, channels):
    """16-bit samples, so that pydub has every bit too. 24 bits pydub fills up to 32 with ones for negative samples:
    less than a step of 2**-23."""
    data = recordings.recording(encoder, rate, channels, 0.5)
    out, (pydub_rate, samples) = decode(data), recordings.pydub_decode(data)
    assert out.rate == pydub_rate == rate
    assert out.data.shape == samples.shape == (channels, rate // 2)
    assert largest_error(out.data.numpy(), samples) <= (2.0**-23 if encoder == "wav24" else 0.0)


def test_facts_are_the_whole_recordings():
    samples = np.zeros((2, 22050), dtype=np.float32)
    samples[0, 100], samples[1, 22000] = 0.25, -0.75
    data = recordings.wav(samples, 44100, "FLOAT")
    for head_s in (math.inf, 0.1):
        out = decode(data, head_s=lambda rate, head_s=head_s: head_s)
        assert out.data.shape == (2, min(22050, int(head_s * 44100) if head_s < 1 else 22050))
        stated = {
            "peak": 0.75,
            "num_samples": 22050,
            "duration_s": 0.5,
            "complete": head_s == math.inf,
        }
        assert {name: out.metadata[name] for name in stated} == stated


LOSSY = [
    *itertools.product(["vorbis", "m4a", "webm_vorbis"], [8000, 16000, 22050, 44100, 96000], [1]),
    *itertools.product(["mp3", "mp3_vbr", "aac"], [8000, 16000, 22050, 44100], [1]),
    *itertools.product(["opus", "webm"], [8000, 16000, 22050, 44100, 48000], [1]),
    *itertools.product(["vorbis", "opus", "mp3", "mp3_vbr", "m4a", "aac", "webm", "webm_vorbis"], [44100], [2]),
    *itertools.product(["vorbis", "opus", "m4a", "webm"], [48000], [6]),
    *itertools.product(["vorbis", "opus"], [48000], [8]),
]


@pytest.mark.parametrize(("encoder", "rate", "channels"), LOSSY)
def test_lossy_formats_equal_pydub(encoder, rate, channels):
    """Sample by sample at lag zero, within the half step to which pydub rounds; Opus in Ogg within three steps.

    Channels are matched to one another first: libsndfile gives more than two in Vorbis' order, FFmpeg in WAV's; the
    downmix does not tell them apart. Opus in Ogg may be decoded at the rate it was made from, which pydub never does:
    then both are brought to 16 kHz, and what the codec's own resampler did differently stays below -40 dB.
    """
    data = recordings.recording(encoder, rate, channels)
    out, (pydub_rate, samples) = decode(data), recordings.pydub_decode(data)
    ours = out.data.numpy()
    assert len(ours) == len(samples) == channels
    if out.rate != pydub_rate:
        assert encoder == "opus"
        ours, samples = oracle.resample(ours, out.rate), oracle.resample(samples, pydub_rate)
        length = min(ours.shape[1], samples.shape[1])
        difference = ours[:, :length] - samples[:, :length]
        assert np.sum(difference**2) < 1e-4 * np.sum(samples**2)
        return
    errors = np.array([[largest_error(a[None], b[None]) for b in samples] for a in ours])
    pairs = linear_sum_assignment(errors)
    if channels <= 2:
        assert list(pairs[1]) == list(range(channels))
    assert errors[pairs].max() <= (3.0 if encoder == "opus" else 0.6) * STEP
    # Two channels are not one and the same.
    assert channels == 1 or np.abs(ours[0] - ours[1]).max() > 0.1


@pytest.mark.parametrize(
    ("encoder", "rate"), [(e, r) for e, r, c in LOSSY if c == 1 and (e != "opus" or r == 48000) and r < 96000]
)
def test_lossy_formats_are_as_long_as_pydubs(encoder, rate):
    """To the sample: padding at the codec's end must not become sound, nor a segment of its own."""
    data = recordings.recording(encoder, rate, 1)
    out, (pydub_rate, samples) = decode(data), recordings.pydub_decode(data)
    assert out.data.shape[1] / out.rate == samples.shape[1] / pydub_rate


# Samples of codec delay that are left after decoding. Raw AAC has nowhere to say that its first 1024 are padding.
DELAYS = {"vorbis": 0, "opus": 0, "mp3": 0, "mp3_vbr": 0, "m4a": 0, "webm": 0, "webm_vorbis": 0, "aac": 1024}


@pytest.mark.parametrize("encoder", DELAYS)
def test_codec_delay_is_removed(encoder):
    """Against the samples that were encoded, at 48 kHz: the lag of the highest correlation. Codecs keep the shape of
    noise only roughly, hence the low bound on its height."""
    source = recordings.coughs(48000, 1.0)[0]
    out = decode(recordings.encode(source[None], 48000, encoder))
    assert out.rate == 48000
    decoded = out.data[0].numpy()
    scores = signal.correlate(decoded, source, mode="full", method="fft")
    lags = signal.correlation_lags(len(decoded), len(source), mode="full")
    assert lags[scores.argmax()] == DELAYS[encoder]
    assert scores.max() > 0.5 * np.linalg.norm(source) * np.linalg.norm(decoded)


def test_webm_is_webm_whatever_it_is_called(tmp_path):
    """A browser's recording uploaded as speech.wav: the name is no argument of anything, and the bytes are not WAV."""
    data = recordings.recording("webm")
    path = tmp_path / "speech.wav"
    path.write_bytes(data)
    assert identify(path.read_bytes()) == "WebM"
    _, samples = recordings.pydub_decode(data)
    assert largest_error(decode(path.read_bytes()).data.numpy(), samples) <= 0.6 * STEP
    # A WAV header before WebM's bytes does not make it one either.
    assert refusal(b"RIFF\x00\x00\x00\x00WAVE" + data).kind == "malformed"


def isolated(work: Callable[[Connection], None]) -> tuple[list, int | None]:
    """What `work` sends from a process of its own, and that process' exit status. A decoder that follows a wrong
    pointer takes its process down: here only this one."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    sent = []
    while ours.poll(60):
        try:
            sent.append(ours.recv())
        except EOFError:
            break
    process.join(5)
    process.kill()
    return sent, process.exitcode


@pytest.mark.parametrize("encoder", ["m4a", "webm", "webm_vorbis"])
def test_eight_planar_channels_do_not_crash(encoder):
    data = recordings.recording(encoder, 48000, 8)
    sent, status = isolated(lambda pipe: pipe.send(decode(data).data.numpy()))
    assert status == 0
    assert sent[0].shape[0] == 8
    assert largest_error(sent[0], recordings.pydub_decode(data)[1]) <= 0.6 * STEP


# Files as programs write them that cannot seek back: to a pipe, or while recording


def with_data_size(data: bytes, size: int, riff_size: int | None = None) -> bytes:
    at = data.index(b"data") + 4
    data = data[:at] + struct.pack("<I", size) + data[at + 4 :]
    return data if riff_size is None else data[:4] + struct.pack("<I", riff_size) + data[8:]


@pytest.mark.parametrize("riff_size", [None, 0, 0xFFFFFFFF])
def test_wav_of_unknown_size_is_read_to_its_end(riff_size):
    data = recordings.recording("wav16")
    piped = with_data_size(data, 0xFFFFFFFF, riff_size)
    assert torch.equal(decode(piped).data, decode(data).data)


PIPED = {
    "wav": ("-f", "wav"),
    "flac": ("-f", "flac"),
    "vorbis": ("-c:a", "libvorbis", "-f", "ogg"),
    "opus": ("-c:a", "libopus", "-f", "ogg"),
    "mp3": ("-f", "mp3"),
    "mp3 variable rate": ("-q:a", "4", "-f", "mp3"),
    "mp3 without a table": ("-write_xing", "0", "-f", "mp3"),
    "mp3 variable rate without a table": ("-write_xing", "0", "-q:a", "4", "-f", "mp3"),
    "fragmented mp4": ("-c:a", "aac", "-f", "mp4", "-movflags", "frag_keyframe+empty_moov"),
    "webm": ("-c:a", "libopus", "-f", "webm"),
    "live webm": ("-c:a", "libopus", "-f", "webm", "-live", "1"),
}


@pytest.mark.parametrize(
    ("name", "loud_first"), [*itertools.product(PIPED, [False]), *((name, True) for name in PIPED if "mp3" in name)]
)
def test_piped_files_equal_pydub(name, loud_first):
    """All of it: without a stated length there must still be no sample too few. One half is silent, so that a length
    guessed from the first frame's bit rate is far off, above or below."""
    halves = [np.zeros((1, 44100)), recordings.coughs(44100, 2.0)]
    source = np.concatenate(halves[::-1] if loud_first else halves, axis=1)
    data = recordings.ffmpeg("-i", "-", *PIPED[name], "-", data=recordings.wav(source, 44100))
    out, (rate, samples) = decode(data), recordings.pydub_decode(data)
    assert out.rate == rate
    # The last frame of a fragmented MP4 is padded, and nothing but its own duration says so: pydub keeps the padding.
    assert 0 <= samples.shape[1] - out.data.shape[1] <= (1023 if name == "fragmented mp4" else 0)
    assert largest_error(out.data.numpy(), samples) <= (3.0 if name == "opus" else 0.6) * STEP


def with_video(tmp_path: Path, container: str, video_s: float, audio_at_s: float) -> bytes:
    """A 3 s recording that starts `audio_at_s` into a video of `video_s`."""
    path = tmp_path / f"video.{container}"
    codecs = ("mpeg4", "aac") if container == "mp4" else ("libvpx", "libopus")
    picture = f"color=size=32x32:rate=5:duration={video_s}"
    inputs = ("-itsoffset", str(audio_at_s), "-i", "-", "-f", "lavfi", "-i", picture)
    sound = recordings.wav(recordings.tones(48000, 3.0), 48000)
    recordings.ffmpeg(*inputs, "-c:v", codecs[0], "-c:a", codecs[1], str(path), data=sound)
    return path.read_bytes()


@pytest.mark.parametrize("container", ["mp4", "webm"])
@pytest.mark.parametrize(("video_s", "audio_at_s"), [(2.0, 0.0), (3.6, 0.0), (3.0, 0.4)])
def test_the_sound_of_a_video_is_whole(tmp_path, container, video_s, audio_at_s):
    """A camera's picture may begin before and end after its sound: that does not make the sound truncated."""
    out = decode(with_video(tmp_path, container, video_s, audio_at_s))
    assert out.metadata["duration_s"] == pytest.approx(3.0, abs=0.05)


@pytest.mark.parametrize("encoder", ["m4a", "webm", "mp3", "flac"])
def test_a_title_that_is_not_utf8_is_no_hindrance(encoder):
    samples = recordings.tones(16000, 0.5)
    plain = recordings.encode(samples, 16000, encoder, options=("-metadata", "title=Cafe2019"))
    latin = plain.replace(b"Cafe2019", b"Caf\xe9\xe8\xff19")
    assert latin != plain
    assert torch.equal(decode(latin).data, decode(plain).data)


# Input that is refused


PNG = bytes.fromhex("89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de")
NOT_AUDIO = {
    "text": b"I am no recording, I am a sentence.",
    "one letter": b"R",
    "json": b'{"audio": "UklGRg=="}',
    "html": b"<!DOCTYPE html><html><body>404</body></html>",
    "png": PNG,
    "jpeg": bytes.fromhex("ffd8ffe000104a46494600010100000100010000ffdb0043"),
    "zip": b"PK\x03\x04" + bytes(40),
    "pdf": b"%PDF-1.7\n" + bytes(40),
    "zeros": bytes(1000),
    "avi": b"RIFF\x24\x00\x00\x00AVI LIST" + bytes(40),
    "midi": b"MThd\x00\x00\x00\x06" + bytes(40),
}


@pytest.mark.parametrize("data", NOT_AUDIO.values(), ids=NOT_AUDIO)
def test_what_is_no_audio_is_unsupported(data):
    error = refusal(data)
    assert error.kind == "unsupported"
    assert "WAV" in str(error)
    assert data[:8].hex(" ") in str(error)


def header(encoder: str, size: int) -> bytes:
    return recordings.recording(encoder)[:size]


def without_samples(subtype: str) -> bytes:
    return recordings.wav(np.zeros((1, 0)), 16000, subtype)


MALFORMED = {
    "nothing": b"",
    "wav: header only": header("wav16", 44),
    "wav: half a header": header("wav16", 20),
    "wav: RIFF and WAVE": header("wav16", 12),
    "wav: no sample": without_samples("PCM_16"),
    "wav: no float sample": without_samples("FLOAT"),
    "flac: header only": header("flac", 42),
    "ogg: first page only": header("vorbis", 58),
    "mp3: ten bytes of ID3": header("mp3", 10),
    "m4a: ftyp only": header("m4a", 28),
    "webm: head only": header("webm", 40),
    "wav: zero channels": header("wav16", 22) + b"\x00\x00" + recordings.recording("wav16")[24:],
    "wav: zero rate": header("wav16", 24) + bytes(4) + recordings.recording("wav16")[28:],
    "utf-16 text, whose mark looks like MPEG audio": "Grüße".encode("utf-16"),
    "mp4 with a picture and no sound": None,
}


@pytest.mark.parametrize("name", MALFORMED)
def test_empty_recordings_are_malformed(name, tmp_path):
    data = MALFORMED[name]
    if data is None:
        path = tmp_path / "silent.mp4"
        recordings.ffmpeg("-f", "lavfi", "-i", "color=size=32x32:rate=5:duration=1", "-c:v", "mpeg4", str(path))
        data = path.read_bytes()
    error = refusal(data)
    assert error.kind == "malformed"
    assert len(str(error)) > 20


TRUNCATED = ["wav16", "wav24", "wav_float", "aiff", "flac", "vorbis", "opus", "mp3", "mp3_vbr", "m4a", "m4a_faststart"]


@pytest.mark.parametrize("fraction", [0.03, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("encoder", [*TRUNCATED, "alac", "aac", "webm", "webm_vorbis"])
def test_a_truncated_recording_is_refused(encoder, fraction):
    """Not scored on the part that arrived."""
    data = recordings.recording(encoder, 16000, 1, 3.0)
    error = refusal(data[: int(fraction * len(data))])
    assert error.kind == "malformed"


@pytest.mark.parametrize("encoder", ["wav16", "wav24", "wav_float", "aiff", "flac", "vorbis", "opus", "aac"])
def test_one_lost_byte_is_noticed(encoder):
    """At the very end, in formats that end with sound: MP3 ends with padding, M4A with tags, WebM with an index."""
    assert refusal(recordings.recording(encoder, 16000, 1, 3.0)[:-1]).kind == "malformed"


def pages(data: bytes) -> Iterator[int]:
    """Where the pages of an Ogg file begin."""
    position = data.find(b"OggS")
    while position >= 0:
        yield position
        position = data.find(b"OggS", position + 4)


@pytest.mark.parametrize("encoder", ["vorbis", "opus"])
def test_an_ogg_file_that_lacks_whole_pages_is_refused(encoder):
    """The last page of a complete stream says so (RFC 3533, header type 4)."""
    data = recordings.recording(encoder, 16000, 1, 6.0)
    *_, last_but_one, last = pages(data)
    assert data[last + 5] & 4
    for cut in (last, last_but_one):
        assert refusal(data[:cut]).kind == "malformed"


def test_what_cannot_be_detected():
    """A live WebM states no duration, raw AAC not even a number of frames: cut between two frames, each is a shorter
    recording, and no reader can tell."""
    sound = recordings.wav(recordings.tones(48000, 3.0), 48000)
    live = recordings.ffmpeg("-i", "-", *PIPED["live webm"], "-", data=sound)
    assert 1.0 < decode(live[: len(live) // 2]).metadata["duration_s"] < 2.0
    adts = recordings.recording("aac", 48000, 1, 3.0)
    frame, frames = 0, []
    while frame < len(adts):
        frames.append(frame)
        frame += (adts[frame + 3] & 3) << 11 | adts[frame + 4] << 3 | adts[frame + 5] >> 5
    assert frame == len(adts)
    assert decode(adts[: frames[50]]).metadata["num_samples"] == 50 * 1024


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 20000, 19 * 16000 - 1], ids=["first", "inside", "after the head"])
def test_samples_that_are_no_numbers_are_refused(value, position):
    samples = np.full((2, 19 * 16000), 0.1, dtype=np.float32)
    samples[1, position] = value
    error = refusal(recordings.wav(samples, 16000, "FLOAT"))
    assert error.kind == "malformed"
    assert "NaN or infinite" in str(error)


@pytest.mark.parametrize("encoder", ["wav16", "flac", "mp3", "m4a", "webm"])
def test_a_recording_over_the_limit_is_too_large(encoder):
    data = recordings.recording(encoder)
    duration_s = decode(data).metadata["duration_s"]
    assert PIPELINE.run(data, max_duration_s=duration_s).metadata["duration_s"] == duration_s
    with pytest.raises(InputError, match=r"longer than 1\.4 s") as caught:
        PIPELINE.run(data, max_duration_s=1.4)
    assert caught.value.kind == "too_large"


def test_an_odd_rate_is_unsupported():
    """44099 Hz has no common divisor with 16 kHz: the kernel would take gigabytes."""
    error = refusal(recordings.wav(recordings.tones(44099, 0.5), 44099))
    assert error.kind == "unsupported"
    assert "44099" in str(error)


# Recordings at the edge that are scored


EDGE = ["wav8", "wav16", "wav_float", "flac", "vorbis", "opus", "mp3", "m4a", "webm"]


@pytest.mark.parametrize("encoder", EDGE)
def test_silence_gives_numbers(encoder):
    out = PIPELINE(recordings.encode(np.zeros((2, 24000)), 16000, encoder))
    assert out.shape[1:] == (3, 224, 224)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("encoder", EDGE)
def test_ten_milliseconds_give_one_segment(encoder):
    out = PIPELINE.run(recordings.encode(recordings.tones(48000, 0.01), 48000, encoder))
    assert out.data.shape == (1, 3, 224, 224)
    assert torch.isfinite(out.data).all()
    assert out.metadata["duration_s"] < 0.07


def test_one_sample_gives_one_segment():
    out = PIPELINE(recordings.wav(np.array([[0.5]]), 16000))
    assert out.shape == (1, 3, 224, 224)
    assert torch.isfinite(out).all()


def test_8_bit_with_an_offset():
    """Unsigned bytes around 128; what is constant stays in the samples and is removed by the high-pass."""
    data = recordings.wav(np.full((1, 32000), 0.5), 16000, "PCM_U8")
    assert set(data[44:]) == {192}
    trace = PIPELINE.trace(data)
    assert torch.equal(trace["decode"], torch.full((1, 32000), 0.5))
    assert trace["highpass"][0, 16000:].abs().max() < 1e-3
    assert torch.isfinite(trace["standardize"]).all()


@pytest.mark.parametrize("peak", [1e-40, 1e-30, 2.0**31])
def test_float_samples_of_any_size_give_numbers(peak):
    """Also below the smallest normal float32, whose reciprocal is infinite."""
    out = PIPELINE(recordings.wav(np.float32(peak) * recordings.tones(16000, 2.0), 16000, "FLOAT"))
    assert torch.isfinite(out).all()


# Damage at random: a number or an InputError, never another exception


FUZZED = ["wav16", "wav24", "wav_float", "flac", "vorbis", "opus", "mp3", "m4a", "webm", "aac"]
CASES_EACH = 16


def damage(data: bytes, seed: list[int]) -> bytes:
    """Flipped bits, a cut, an insertion or an overwritten stretch; every second time near the file's head."""
    rng = np.random.default_rng(seed)
    reach = max(64, len(data) // 20) if seed[-1] % 2 else len(data)
    damaged, at = bytearray(data), int(rng.integers(reach))
    match seed[-1] // 2 % 4:
        case 0:
            for _ in range(int(rng.integers(1, 9))):
                damaged[int(rng.integers(reach))] ^= 1 << int(rng.integers(8))
        case 1:
            del damaged[at : at + int(rng.integers(1, 200))]
        case 2:
            damaged[at:at] = rng.bytes(int(rng.integers(1, 200)))
        case 3:
            damaged[at : at + 8] = rng.bytes(8)
    return bytes(damaged)


def outcome(data: bytes) -> str:
    try:
        return "finite" if torch.isfinite(PIPELINE(data)).all() else "not finite"
    except InputError:
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("encoder", FUZZED)
def test_damaged_files_give_numbers_or_are_refused(encoder):
    # Without the random numbers that muxers put into headers, the files are the same every time.
    data = recordings.encode(recordings.coughs(16000, 1.0), 16000, encoder, options=("-fflags", "+bitexact"))
    cases = [damage(data, [FUZZED.index(encoder), case]) for case in range(CASES_EACH)]

    def work(pipe: Connection) -> None:
        for case in cases:
            pipe.send(outcome(case))

    sent, status = isolated(work)
    assert status == 0, f"crashed in case {len(sent)}"
    found = collections.Counter(sent)
    assert found["finite"] + found["refused"] == CASES_EACH, found
    assert found["refused"] > 0
