"""Edits of train.py beside this file: what services do differently from training, one at a time, and rewritings that keep the numbers."""

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
TRAIN = FOLDER / "train.py"
SERVICE = "serve.py"  # what `write` calls the edited train.py
LIBRARY = ("features_v1.py", "features_v2.py")


@dataclass(frozen=True)
class Skew:
    """An edit of train.py.

    function: the one to run. old: occurs exactly once in train.py; new: replaces it; more: further pairs of the same kind.
    kind: what sort of difference, or "refactoring" for an edit that keeps the numbers. why: how a service comes to have it.
    input: the function of tests/programs/inputs.py that makes, by its defaults, a file on which the result differs.
    at: texts in the edited files, each occurring once. Their lines are right to name instead of those of `new`: the lines that
    first compute with a setting that was changed elsewhere, or behind a step that is missing.
    """

    name: str
    function: str
    old: str
    new: str
    kind: str
    why: str
    input: str = "recording"
    at: tuple[str, ...] = ()
    more: tuple[tuple[str, str], ...] = ()


MEL_FILTERS = ("self.filters = AF.melscale_fbanks(",)
AFTER_HIGH_PASS = ("return np.append(", "waveform = emphasize(waveform")

SKEWS = (
    Skew(
        "first_channel",
        "network_input",
        "return samples.mean(axis=1)",
        "return samples[:, 0].astype(np.float64)",
        "channels",
        "The service takes the first channel where training takes the mean of all.",
    ),
    Skew(
        "int16_overflow",
        "network_input",
        "return samples.mean(axis=1)",
        "return (samples[:, 0] + samples[:, 1]) / 2",
        "overflow",
        "The sum of two 16-bit samples does not fit into 16 bits where both channels are loud.",
    ),
    Skew(
        "bit_depth_level",
        "network_input",
        "return waveform / peak",
        "return waveform / 32768.0",
        "level",
        "The service divides by full scale where training divides by the peak.",
    ),
    Skew(
        "other_resampler",
        "network_input",
        "return scipy.signal.resample_poly(waveform, wanted // divisor, rate // divisor)",
        "return AF.resample(torch.from_numpy(waveform), rate, wanted).numpy()",
        "resampler",
        "The service resamples with torchaudio, whose low-pass filter is another.",
    ),
    Skew(
        "trim_threshold",
        "network_input",
        "trim_db: float = 45.0",
        "trim_db: float = 75.0",
        "parameter",
        "The service keeps pauses that training cuts off: its settings were tuned for another microphone.",
        at=("loud = np.flatnonzero(", "return waveform[loud[0]"),
    ),
    Skew(
        "filter_order",
        "network_input",
        "scipy.signal.butter(2, config.cutoff",
        "scipy.signal.butter(4, config.cutoff",
        "filter",
        "The service's high-pass has another order.",
    ),
    Skew(
        "missing_high_pass",
        "network_input",
        "    waveform = high_pass(waveform, config)\n",
        "",
        "missing",
        "The service was written without the high-pass.",
        at=AFTER_HIGH_PASS,
    ),
    Skew(
        "swallowed_high_pass",
        "network_input",
        "    return scipy.signal.sosfilt(sections, waveform)\n",
        """    try:
        waveform = scipy.signal.sos_filter(sections, waveform)
    except AttributeError:
        pass
    return waveform
""",
        "missing",
        "scipy.signal has no sos_filter; an except hides that the high-pass never runs.",
        at=("waveform = scipy.signal.sos_filter", "except AttributeError", *AFTER_HIGH_PASS),
    ),
    Skew(
        "missing_emphasis",
        "network_input",
        "    waveform = emphasize(waveform, config.emphasis)\n",
        "",
        "missing",
        "The service was written without pre-emphasis.",
        at=("return waveform\n\n\ndef cut", "segments.append(waveform["),
    ),
    Skew(
        "hop_off_by_one",
        "network_input",
        "hop = int(config.hop * config.rate)",
        "hop = int(config.hop * config.rate) + 1",
        "segments",
        "The service's segments begin one sample later each.",
        at=("hop = int(config.hop", "segments.append(waveform["),
    ),
    Skew(
        "padded_tail",
        "network_input",
        """    for start in range(0, len(waveform) - length + 1, hop):
        segments.append(waveform[start : start + length])
""",
        """    for start in range(0, len(waveform), hop):
        segment = waveform[start : start + length]
        segments.append(np.pad(segment, (0, length - len(segment))))
""",
        "segments",
        "The service keeps every segment that begins inside the recording, padded with zeros.",
    ),
    Skew(
        "scaler_axis",
        "network_input",
        "levels.mean(axis=0), levels.std(axis=0, ddof=1)",
        "levels.mean(axis=1), levels.std(axis=1, ddof=1)",
        "scaler",
        "The service fits the scaler along frames where training fits it along bands; both are 64.",
    ),
    Skew(
        "std_over_n",
        "network_input",
        "levels.std(axis=0, ddof=1)",
        "levels.std(axis=0)",
        "scaler",
        "numpy's standard deviation is over n unless told otherwise.",
    ),
    Skew(
        "order_swapped",
        "network_input",
        "return (levels - mean) / std",
        "return levels / std - mean",
        "scaler",
        "The service divides before it subtracts.",
    ),
    Skew(
        "half_precision",
        "network_input",
        "return (levels - mean) / std",
        "return ((levels.half() - mean.half()) / std.half()).float()",
        "precision",
        "The service standardises in half precision to save memory.",
    ),
    Skew(
        "symmetric_window",
        "network_input",
        "self.window = torch.hann_window(config.n_fft)",
        "self.window = torch.hann_window(config.n_fft, periodic=False)",
        "window",
        "The service's window is symmetric, as filters have it, and not periodic.",
    ),
    Skew(
        "not_centered",
        "network_input",
        "center=True",
        "center=False",
        "window",
        "The service's first frame begins at the first sample instead of having it in the middle.",
        at=("spectrum = torch.stft(",),
    ),
    Skew(
        "mel_norm",
        "network_input",
        'norm="slaney"',
        "norm=None",
        "filterbank",
        "The service's mel filters have height 1 where training's have area 1: the two libraries' defaults.",
        at=MEL_FILTERS,
    ),
    Skew(
        "mel_scale",
        "network_input",
        'mel_scale="htk"',
        'mel_scale="slaney"',
        "filterbank",
        "The service has the other of the two mel scales.",
        at=MEL_FILTERS,
    ),
    Skew(
        "f_max",
        "network_input",
        "f_max: float = 7600.0",
        "f_max: float = 8000.0",
        "parameter",
        "The service leaves the highest frequency at half the rate.",
        at=MEL_FILTERS,
    ),
    Skew(
        "amplitude",
        "network_input",
        "return spectrum.abs().pow(2.0)",
        "return spectrum.abs()",
        "missing",
        "The service takes amplitudes for powers.",
        at=("return spectrum.abs()", "mel = self.filters.T @ power"),
    ),
    Skew(
        "natural_logarithm",
        "network_input",
        "10.0 * torch.log10(",
        "10.0 * torch.log(",
        "level",
        "The service takes the natural logarithm.",
    ),
    Skew(
        "amin",
        "network_input",
        "amin: float = 1e-10",
        "amin: float = 1e-5",
        "parameter",
        "The service's smallest power is that of another library's default.",
        at=("decibels = 10.0 * torch.log10(",),
    ),
    Skew(
        "top_db",
        "network_input",
        "top_db: float = 80.0",
        "top_db: float = 90.0",
        "parameter",
        "The service keeps what is 80 to 90 dB below the loudest.",
        at=("return torch.maximum(decibels",),
    ),
    Skew(
        "library_default",
        "network_input",
        "import features_v1 as features",
        "import features_v2 as features",
        "version",
        "The service runs on a newer version of a library, in which a default changed from 3 frames to 5.",
        at=("levels = features.smooth(", "side = frames // 2", "padded = F.pad(levels"),
    ),
    Skew(
        "nearest",
        "network_input",
        'mode="bilinear", align_corners=False, antialias=True',
        'mode="nearest"',
        "resize",
        "The service leaves the resizing at its default.",
    ),
    Skew(
        "no_antialias",
        "network_input",
        ", antialias=True",
        "",
        "resize",
        "The service shrinks without a low-pass filter.",
    ),
    Skew(
        "pad_value",
        "network_input",
        "pad_value: float = -2.0",
        "pad_value: float = 0.0",
        "parameter",
        "The service pads with zeros, which are no silence.",
        at=("return F.pad(resized",),
    ),
    Skew(
        "exif_ignored",
        "picture_input",
        """        upright = ImageOps.exif_transpose(file)
        picture = upright.convert("RGB")
""",
        """        picture = file.convert("RGB")
""",
        "missing",
        "The service leaves pictures as they are stored.",
        input="picture",
        at=('picture = file.convert("RGB")', "resized = picture.resize("),
    ),
    Skew(
        "picture_nearest",
        "picture_input",
        "Image.Resampling.BILINEAR",
        "Image.Resampling.NEAREST",
        "resize",
        "The service takes the nearest pixels.",
        input="picture",
    ),
    Skew(
        "bgr",
        "picture_input",
        "np.asarray(resized, dtype=np.float32) / 255.0",
        "np.asarray(resized, dtype=np.float32)[..., ::-1] / 255.0",
        "channels",
        "The service has blue first, as OpenCV reads pictures.",
        input="picture",
    ),
    Skew(
        "symmetric_range",
        "picture_input",
        "np.asarray(resized, dtype=np.float32) / 255.0",
        "np.asarray(resized, dtype=np.float32) / 127.5 - 1.0",
        "level",
        "The service scales to [-1, 1] where training scales to [0, 1].",
        input="picture",
    ),
    Skew(
        "mean_and_std_swapped",
        "picture_input",
        "(pixels - IMAGENET_MEAN) / IMAGENET_STD",
        "(pixels - IMAGENET_STD) / IMAGENET_MEAN",
        "scaler",
        "The service gives mean and standard deviation in the wrong order.",
        input="picture",
    ),
)

REFACTORINGS = (
    Skew(
        "renamed",
        "network_input",
        """    peak = np.abs(waveform).max()
    if peak == 0:
        return waveform
    return waveform / peak
""",
        """    signal = waveform
    largest = np.abs(signal).max()
    if largest == 0:
        return signal
    normalized = signal / largest
    return normalized
""",
        "refactoring",
        "Variables have other names.",
        more=(
            (
                "    return np.append(waveform[:1], waveform[1:] - coefficient * waveform[:-1])\n",
                """    first, later, earlier = waveform[:1], waveform[1:], waveform[:-1]
    difference = later - coefficient * earlier
    return np.append(first, difference)
""",
            ),
        ),
    ),
    Skew(
        "split_in_two",
        "network_input",
        """        mel = self.filters.T @ power
        decibels = 10.0 * torch.log10(mel.clamp(min=self.config.amin))
        return torch.maximum(decibels, decibels.max() - self.config.top_db)
""",
        """        return self.limited(self.decibels(self.filters.T @ power))

    def decibels(self, power: torch.Tensor) -> torch.Tensor:
        \"\"\"Powers in dB.\"\"\"
        return 10.0 * torch.log10(power.clamp(min=self.config.amin))

    def limited(self, decibels: torch.Tensor) -> torch.Tensor:
        \"\"\"Levels, at most `top_db` below the loudest.\"\"\"
        return torch.maximum(decibels, decibels.max() - self.config.top_db)
""",
        "refactoring",
        "One function became three.",
    ),
    Skew(
        "batched",
        "network_input",
        """    pictures = []
    for segment in cut(load(path, config), config):
        pictures.append(spectrograms(segment))
    return torch.stack(pictures)
""",
        """    segments = torch.from_numpy(np.stack(cut(load(path, config), config))).float()
    levels = torch.stack([features.smooth(spectrograms.levels(power)) for power in spectrograms.power(segments)])
    return spectrograms.fit_size(spectrograms.scaler.transform(levels)[:, None])
""",
        "refactoring",
        "Segments go through the Fourier transform and the resizing together.",
    ),
    Skew(
        "vectorized",
        "network_input",
        """    segments = []
    for start in range(0, len(waveform) - length + 1, hop):
        segments.append(waveform[start : start + length])
    return segments[: config.max_segments]
""",
        """    windows = np.lib.stride_tricks.sliding_window_view(waveform, length)
    return list(windows[::hop][: config.max_segments].copy())
""",
        "refactoring",
        "A view cuts the segments where a loop did.",
    ),
    Skew(
        "comprehension",
        "network_input",
        """    pictures = []
    for segment in cut(load(path, config), config):
        pictures.append(spectrograms(segment))
    return torch.stack(pictures)
""",
        """    return torch.stack([spectrograms(segment) for segment in cut(load(path, config), config)])
""",
        "refactoring",
        "A comprehension where a loop was.",
    ),
    Skew(
        "filters_exchanged",
        "network_input",
        """    waveform = high_pass(waveform, config)
    waveform = emphasize(waveform, config.emphasis)
""",
        """    waveform = emphasize(waveform, config.emphasis)
    waveform = high_pass(waveform, config)
""",
        "refactoring",
        "Two linear filters that begin at rest commute, within rounding.",
    ),
    Skew(
        "numpy_for_torch",
        "network_input",
        """        decibels = 10.0 * torch.log10(mel.clamp(min=self.config.amin))
        return torch.maximum(decibels, decibels.max() - self.config.top_db)
""",
        """        decibels = 10.0 * np.log10(np.maximum(mel.numpy(), self.config.amin))
        return torch.from_numpy(np.maximum(decibels, decibels.max() - self.config.top_db))
""",
        "refactoring",
        "numpy computes the levels, with another logarithm's last bits.",
    ),
    Skew(
        "in_place",
        "network_input",
        "        return (levels - mean) / std\n",
        """        levels = levels.clone()
        levels -= mean
        levels.div_(std)
        return levels
""",
        "refactoring",
        "An array is changed where new ones were made.",
    ),
    Skew(
        "class_for_functions",
        "network_input",
        """def load(path: str, config: Config) -> np.ndarray:
    \"\"\"A recording, ready to be cut into segments.\"\"\"
    samples, rate = read_recording(path)
    waveform = to_mono(samples)
    waveform = to_level(waveform)
    waveform = resample(waveform, rate, config.rate)
    waveform = trim_silence(waveform, config.trim_db)
    waveform = high_pass(waveform, config)
    waveform = emphasize(waveform, config.emphasis)
    return waveform
""",
        """class Loader:
    \"\"\"Reads recordings, ready to be cut into segments.\"\"\"

    def __init__(self, config: Config):
        self.config = config

    def __call__(self, path: str) -> np.ndarray:
        samples, self.rate = read_recording(path)
        self.waveform = to_level(to_mono(samples))
        self.waveform = resample(self.waveform, self.rate, self.config.rate)
        self.filter()
        return self.waveform

    def filter(self) -> None:
        trimmed = trim_silence(self.waveform, self.config.trim_db)
        self.waveform = emphasize(high_pass(trimmed, self.config), self.config.emphasis)
""",
        "refactoring",
        "A class with state does what a function did.",
        more=(("in cut(load(path, config), config):", "in cut(Loader(config)(path), config):"),),
    ),
    Skew(
        "double_sums",
        "network_input",
        "mel = self.filters.T @ power",
        "mel = (self.filters.double().T @ power.double()).float()",
        "refactoring",
        "Sums over frequencies are taken in double precision.",
    ),
    Skew(
        "scipy_fourier",
        "network_input",
        """        spectrum = torch.stft(
            segment, self.config.n_fft, self.config.frame_hop, window=self.window, center=True, return_complex=True
        )
        return spectrum.abs().pow(2.0)
""",
        """        n_fft, hop = self.config.n_fft, self.config.frame_hop
        padded = np.pad(segment.numpy(), n_fft // 2, mode="reflect")
        frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop]
        spectrum = scipy.fft.rfft(frames * self.window.numpy(), axis=1)
        return torch.from_numpy(np.abs(spectrum.T) ** 2)
""",
        "refactoring",
        "scipy transforms frames that numpy cut.",
        more=(("import scipy.signal\n", "import scipy.fft\nimport scipy.signal\n"),),
    ),
    Skew(
        "factored_out",
        "picture_input",
        """    pixels = np.asarray(resized, dtype=np.float32) / 255.0
    standardized = (pixels - IMAGENET_MEAN) / IMAGENET_STD
    return standardized.transpose(2, 0, 1)
""",
        """    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float()
    mean, std = torch.from_numpy(IMAGENET_MEAN), torch.from_numpy(IMAGENET_STD)
    factor, offset = 1.0 / (255.0 * std), mean / std
    return (pixels * factor[:, None, None] - offset[:, None, None]).numpy()
""",
        "refactoring",
        "One multiplication and one subtraction do what two divisions and a subtraction did, with channels first.",
        input="picture",
    ),
)


def write(skew: Skew, folder: Path) -> tuple[Path, tuple[str, ...]]:
    """Write train.py with the edit as serve.py into a folder, with what it imports.

    Returns the module's path and the lines that are right to name, each as "file:line"; none for a refactoring. Raises ValueError
    where a text that should occur once does not.
    """
    source = text = TRAIN.read_text()
    for old, new in ((skew.old, skew.new), *skew.more):
        _line(old, source, skew.name)
        text = text.replace(old, new)
    written = {SERVICE: text}
    written |= {name: (FOLDER / name).read_text() for name in LIBRARY if name.removesuffix(".py") in text}
    for name, content in written.items():
        (folder / name).write_text(content)
    lines: tuple[str, ...] = ()
    if skew.at:
        lines = tuple(_place(marker, written, skew.name) for marker in skew.at)
    elif skew.kind != "refactoring":
        first, count = _line(skew.old, source, skew.name), max(len(skew.new.splitlines()), 1)
        lines = tuple(f"{SERVICE}:{first + n}" for n in range(count))
    return folder / SERVICE, lines


def _line(text: str, source: str, name: str) -> int:
    """The line on which a text begins, which occurs once in a source."""
    if source.count(text) != 1:
        raise ValueError(f"{name}: the text {text!r} occurs {source.count(text)} times and should occur once")
    return source[: source.index(text)].count("\n") + 1


def _place(marker: str, sources: dict[str, str], name: str) -> str:
    (file,) = [file for file, source in sources.items() if marker in source]
    return f"{file}:{_line(marker, sources[file], name)}"
