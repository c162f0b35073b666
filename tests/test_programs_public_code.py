"""Public preprocessing code under instrumentation computes bit for bit what it computes without.

A module of an installed package is copied into a folder of the test's, so that it counts as the user's own code, and a program beside it calls
its functions.
"""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from skewless.programs.program import TracedFunction
from skewless.programs.trace import Trace
from skewless.programs.worker import Function
from tests.programs import inputs

READ = """
import copied
import numpy as np
import soundfile
import torch
from PIL import Image

def recording(path):
    samples, rate = soundfile.read(path, dtype="float32")
    return samples.mean(axis=1), rate

def bits(array):
    return np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)

def network_input(path):
    arrays = computed(path)
    return arrays, [bits(array) for array in arrays]

"""

# Module of a package, what it reads, and a function that calls it.
PROGRAMS = {
    "librosa.feature.spectral": """
def computed(path):
    y, rate = recording(path)
    centroid = copied.spectral_centroid(y=y, sr=rate)
    return [
        centroid, copied.mfcc(y=y, sr=rate), copied.melspectrogram(y=y, sr=rate, htk=True),
        copied.spectral_bandwidth(y=y, sr=rate, centroid=centroid), copied.spectral_contrast(y=y, sr=rate),
        copied.spectral_rolloff(y=y, sr=rate), copied.spectral_flatness(y=y), copied.rms(y=y),
        copied.zero_crossing_rate(y),
    ]
""",
    "librosa.core.spectrum": """
def computed(path):
    y, rate = recording(path)
    spectrum = copied.stft(y, n_fft=512)
    magnitude, phase = copied.magphase(spectrum)
    return [
        magnitude, phase, copied.power_to_db(magnitude**2, ref=np.max),
        copied.amplitude_to_db(magnitude), copied.pcen(magnitude, sr=rate),
        copied.perceptual_weighting(magnitude, np.arange(1, 258)),
        copied.reassigned_spectrogram(y, sr=rate, n_fft=512)[0],
    ]
""",
    "librosa.effects": """
def computed(path):
    y, rate = recording(path)
    trimmed, where = copied.trim(y, top_db=30)
    return [
        trimmed, where, copied.split(y, top_db=30), copied.preemphasis(y), copied.deemphasis(y),
        *copied.hpss(trimmed),
    ]
""",
    "librosa.filters": """
def computed(path):
    return [
        copied.mel(sr=22050, n_fft=1024), copied.mel(sr=22050, n_fft=1024, htk=True, norm=None),
        copied.chroma(sr=22050, n_fft=1024), copied.get_window(("kaiser", 4.0), 400),
        copied.diagonal_filter("hann", 9),
    ]
""",
    "torchaudio.compliance.kaldi": """
def computed(path):
    y, rate = recording(path)
    waveform = torch.from_numpy(y)[None]
    plain = {"sample_frequency": rate, "dither": 0.0}
    return [
        copied.fbank(waveform, num_mel_bins=40, **plain), copied.fbank(waveform, vtln_warp=1.1, use_energy=True, **plain),
        copied.mfcc(waveform, window_type="blackman", **plain), copied.spectrogram(waveform, snip_edges=False, **plain),
        copied.fbank(waveform, sample_frequency=rate, dither=1.0),
    ]
""",
    "torchaudio.functional.functional": """
def computed(path):
    y, rate = recording(path)
    waveform = torch.from_numpy(y)[None]
    power = copied.spectrogram(waveform, 0, torch.hann_window(512), 512, 160, 512, 2.0, False)
    mel = copied.melscale_fbanks(257, 40.0, 8000.0, 64, rate, "slaney", "slaney")
    return [
        power, mel, copied.amplitude_to_DB(power, 10.0, 1e-10, 0.0, 80.0), copied.create_dct(13, 64, "ortho"),
        copied.resample(waveform, rate, 16000), copied.mu_law_decoding(copied.mu_law_encoding(waveform, 256), 256),
        copied.spectral_centroid(waveform, rate, 0, torch.hann_window(512), 512, 160, 512),
        copied.sliding_window_cmn(power[0].T, 100), copied.compute_deltas(power), copied.loudness(waveform, rate),
        copied.add_noise(waveform, waveform.flip(-1), torch.tensor([10.0])),
        copied.mask_along_axis(power, 20, 0.0, 1), copied.fftconvolve(waveform, waveform[:, :100]),
    ]
""",
    "torchaudio.functional.filtering": """
def computed(path):
    y, rate = recording(path)
    waveform = torch.from_numpy(y)[None]
    return [
        copied.highpass_biquad(waveform, rate, 50.0), copied.equalizer_biquad(waveform, rate, 1000.0, 3.0),
        copied.bass_biquad(waveform, rate, 6.0), copied.contrast(waveform), copied.dcshift(waveform, 0.1, 0.05),
        copied.filtfilt(waveform, torch.tensor([1.0, -0.5]), torch.tensor([1.0, 0.2])), copied.gain(waveform, -3.0),
        copied.overdrive(waveform[:, :200]), copied.phaser(waveform[:, :200], rate),
        copied.flanger(waveform[None, :, :200], rate), copied.dither(waveform),
    ]
""",
    "scipy.signal._spectral_py": """
def computed(path):
    y, rate = recording(path)
    frequencies, times, transformed = copied.stft(y, rate, nperseg=400)
    return [
        frequencies, times, transformed, *copied.istft(transformed, rate), *copied.welch(y, rate),
        *copied.spectrogram(y, rate, mode="magnitude"), *copied.periodogram(y, rate, detrend="linear"),
        *copied.coherence(y, y[::-1], rate), copied.lombscargle(np.arange(50.0), y[:50], np.linspace(0.1, 1, 20)),
    ]
""",
    "scipy.signal._signaltools": """
def computed(path):
    y, rate = recording(path)
    y = y[:6000]
    return [
        copied.resample(y, 3000), copied.resample_poly(y, 160, 441), copied.decimate(y, 4), copied.hilbert(y),
        copied.lfilter([1, -0.9], [1.0], y), copied.filtfilt([0.2, 0.2], [1, -0.3], y), copied.medfilt(y, 5),
        copied.detrend(y, bp=[100]), copied.wiener(y, 9), copied.fftconvolve(y, y[:50], mode="same"),
        copied.oaconvolve(y, y[:50]), copied.correlate(y, y[:50]), copied.upfirdn([1, 2, 1], y, 2, 3),
    ]
""",
    "sklearn.preprocessing._data": """
def computed(path):
    y, rate = recording(path)
    rows = y[20000:22000].reshape(-1, 20).astype(np.float64)
    return [
        made.fit_transform(rows) for made in (
            copied.StandardScaler(), copied.MinMaxScaler((-1, 1)), copied.MaxAbsScaler(), copied.Normalizer(),
            copied.RobustScaler(quantile_range=(5, 95)), copied.QuantileTransformer(n_quantiles=20, random_state=0),
            copied.PowerTransformer(), copied.Binarizer(threshold=0.1), copied.KernelCenterer(),
        )[:-1]
    ] + [copied.scale(rows, axis=1), copied.StandardScaler().partial_fit(rows[:50]).partial_fit(rows[50:]).var_]
""",
    "torchvision.transforms.functional": """
def computed(path):
    picture = Image.open(path).convert("RGB")
    pixels = copied.to_tensor(copied.resize(picture, [96, 80], antialias=True))
    return [
        pixels, copied.normalize(pixels, [0.5, 0.4, 0.3], [0.2, 0.2, 0.3]), copied.center_crop(pixels, [64, 64]),
        np.asarray(copied.rotate(picture, 15, expand=True)), copied.affine(pixels, 10, [3, 4], 1.1, [5.0, 0.0]),
        copied.adjust_hue(pixels, 0.2), copied.adjust_gamma(pixels, 0.8), copied.gaussian_blur(pixels, [5, 5]),
        copied.rgb_to_grayscale(pixels), copied.autocontrast(pixels), copied.equalize((pixels * 255).byte()),
        *copied.five_crop(pixels, [32, 32]), copied.pad(pixels, [1, 2], padding_mode="reflect"),
        copied.perspective(pixels, [[0, 0], [79, 0], [79, 95], [0, 95]], [[2, 3], [70, 5], [75, 90], [4, 88]]),
    ]
""",
    "torchvision.transforms.transforms": """
def computed(path):
    torch.manual_seed(3)
    picture = Image.open(path).convert("RGB")
    made = copied.Compose([
        copied.RandomResizedCrop(64), copied.RandomHorizontalFlip(), copied.ColorJitter(0.3, 0.3, 0.3, 0.1),
        copied.RandomApply([copied.GaussianBlur(3)]), copied.ToTensor(), copied.RandomErasing(p=1.0),
        copied.Normalize([0.5, 0.5, 0.5], [0.2, 0.2, 0.2]),
    ])
    return [made(picture), made(picture), copied.TenCrop(32)(made(picture))[3]]
""",
    "PIL.ImageOps": """
def computed(path):
    with Image.open(path) as file:
        upright = copied.exif_transpose(file).convert("RGB")
    return list(map(np.asarray, [
        upright, copied.autocontrast(upright, cutoff=2), copied.equalize(upright), copied.fit(upright, (64, 48)),
        copied.pad(upright, (90, 90), color=(3, 4, 5)), copied.grayscale(upright), copied.posterize(upright, 3),
        copied.colorize(copied.grayscale(upright), "navy", "white", mid="red"), copied.expand(upright, 4, 7),
    ]))
""",
}


# Each of these programs runs twice, with the libraries that it is copied from.
pytestmark = pytest.mark.chain


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return {
        "recording": inputs.recording(folder / "recording.wav", seconds=1.2),
        "picture": inputs.picture(folder / "picture.jpg"),
    }


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TracedFunction]:
    """One process for all programs, with torch's threads as they come."""
    first = tmp_path_factory.mktemp("first") / "first.py"
    first.write_text("def network_input(path): ...\n")
    with TracedFunction(Function(first, "network_input", (first.parent,))) as process:
        yield process


def copy(module: str, folder: Path) -> None:
    """Copy a module's source as copied.py, with its imports from its own package told in full; skips where there is none."""
    package = module.rpartition(".")[0]
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")
    if spec is None or spec.origin is None:
        pytest.skip(f"this version of {module.partition('.')[0]} has no {module}")
    source = Path(spec.origin).read_text(encoding="utf-8")
    whole = re.sub(
        r"^(\s*from )(\.+[\w.]*)(?= import)",
        lambda found: found[1] + importlib.util.resolve_name(found[2], package),
        source,
        flags=re.MULTILINE,
    )
    (folder / "copied.py").write_text(whole, encoding="utf-8")


@pytest.mark.parametrize("module", PROGRAMS)
def test_a_public_module_computes_the_same_bits(
    module: str, child: TracedFunction, files: dict[str, Path], tmp_path: Path
) -> None:
    copy(module, tmp_path)
    program = tmp_path / "program.py"
    program.write_text(READ + PROGRAMS[module])
    child.exchange(Function(program, "network_input", (tmp_path,)))
    file = files["picture" if module.startswith(("torchvision", "PIL")) else "recording"]
    plain, traced = child.run(file, plain=True), child.run(file)
    assert len(plain.outputs) >= 6 and not plain.events
    assert traced.outputs == plain.outputs
    assert _lines(traced) >= 10


CONSTRUCTS = {
    "numba": """
import numba
from numba import guvectorize, njit, vectorize
from numba.experimental import jitclass

@njit
def power(x):
    total = 0.0
    for i in range(len(x)):
        total += x[i] * x[i]
    return total / len(x)

@numba.jit(nopython=True)
def differences(x):
    return x[1:] - x[:-1] * power(x)

def doubled(x):
    return x * 2 + 1

fast = njit(doubled)

@vectorize(["float64(float64)"])
def clipped(x):
    return min(x, 0.5)

@guvectorize(["void(float64[:], float64[:])"], "(n)->(n)")
def cumulated(x, out):
    total = 0.0
    for i in range(x.shape[0]):
        total += x[i]
        out[i] = total

@jitclass([("mean", numba.float64)])
class Mean:
    def __init__(self, x):
        self.mean = x.mean()

    def removed(self, x):
        return x - self.mean

def computed(x):
    lowered = Mean(x).removed(x)
    return differences(x), fast(x), clipped(x), cumulated(x), lowered, njit(lambda v: v * 3)(x)
""",
    "torch.compile": """
import torch

@torch.compile(backend="eager")
def scaled(v):
    return (v * 2 + 1)[..., :3]

def computed(x):
    return scaled(torch.from_numpy(x)) + 1
""",
    "transforms": """
import torch

def standardized(row):
    return (row - row.mean()) / (row.std() + 1e-3)

def energy(v):
    return (v ** 2).sum() * 3

class Gain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("gain", torch.full((2,), 1.5))

    def forward(self, v):
        return v[:2] * self.gain

def computed(x):
    tensor = torch.from_numpy(x)
    return (
        torch.vmap(standardized)(tensor.reshape(4, -1)), torch.func.grad(energy)(tensor),
        torch.func.jacrev(lambda v: v * v)(tensor[:4]), torch.jit.trace(Gain(), tensor[:4])(tensor * 2),
        torch.fx.symbolic_trace(Gain())(tensor),
    )
""",
    "types": """
import numpy as np
import torch

def computed(x):
    tensor = torch.from_numpy(x)
    later = np.array(["2020-01-01", "2020-01-05"], dtype="datetime64[D]") + np.timedelta64(1, "D")
    spectrum = torch.fft.fft(tensor)
    nested = torch.nested.nested_tensor([tensor[:3], tensor[:5]]) * 2
    return (
        (tensor > 0).to(torch.float8_e4m3fn).float(), tensor.bfloat16() * 2, (later - later[0]).astype(float),
        spectrum.conj() * spectrum, spectrum.conj().imag, torch.nested.to_padded_tensor(nested, 0.0),
        torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8).dequantize() + 1,
    )
""",
}


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_what_reads_or_traces_functions_computes_the_same(name: str, child: TracedFunction, tmp_path: Path) -> None:
    if name == "numba" and importlib.util.find_spec(name) is None:
        pytest.skip("numba is not installed")
    program, file = tmp_path / "program.py", tmp_path / "x.npy"
    np.save(file, np.sin(np.arange(16.0)))
    program.write_text(CONSTRUCTS[name])
    child.exchange(Function(program, "computed", (tmp_path,)))
    plain, traced = child.run(file, plain=True), child.run(file)
    assert traced.outputs == plain.outputs and plain.outputs
    assert traced.events


def _lines(trace: Trace) -> int:
    """How many lines of the copied module computed something."""
    return len({event.site.line for event in trace.events if event.site.file == "copied.py"})
