"""Which stages of our catalogue a traced program may have computed next, with parameters from its calls, its source and its values."""

from __future__ import annotations

import ast
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from skewless.core.stages import PipelineError, Signal, Stage
from skewless.core.stages.decode import Decode
from skewless.core.stages.image import CaffePreprocess, DecodeImage, Resize
from skewless.core.stages.network_input import Cast, Replicate, Standardize
from skewless.core.stages.segment import Segment
from skewless.core.stages.spectrogram import Decibel, Letterbox, Mel, PadFrames, Scale
from skewless.core.stages.voice import RemoveSilence, StandardScaler, VoiceFeatures
from skewless.core.stages.waveform import Downmix, Highpass, PeakNormalize, Resample
from skewless.programs.trace import Call, Event, Trace
from skewless.programs.values import canonical

# Where neither the values nor the source tell how many segments are taken at most.
MANY_SEGMENTS = 10_000
# All segments together, overlaps counted: 256 MiB.
_MOST_NUMBERS = 2**26
# A number that was fitted to values is written with so few digits that it stays within these shares of it.
_ROUNDINGS = (1e-5, 1e-6, 2e-3)


@dataclass(frozen=True)
class Proposal:
    """A stage to try. note: what of it the trace does not show."""

    stage: Stage
    note: str = ""


class Evidence:
    """What a trace says about parameters: its calls, and the numbers that its source binds to names."""

    def __init__(self, trace: Trace, events: Sequence[Event]):
        self.trace, self.events = trace, events
        self.calls = [event.call for event in trace.events if event.call is not None]
        self.half = any(item.dtype == "float16" for event in trace.events for item in event.outputs)
        self._numbers: dict[str, list[float]] = defaultdict(list)
        for text in trace.sources.values():
            for name, number in _bound_numbers(ast.parse(text)):
                self._numbers[name.lower()].append(number)

    def named(self, *parts: str) -> list[float]:
        """The numbers that the source binds to a name with all these parts in it, in its order."""
        found = (n for name, numbers in self._numbers.items() if all(part in name for part in parts) for n in numbers)
        return list(dict.fromkeys(found))

    def arguments(self, name: str, package: str = "") -> Iterator[dict[str, Any]]:
        """The arguments of the calls of a function, whatever module it is in; arrays are left out."""
        for call in self.calls:
            if call.function.removesuffix(".__init__").rpartition(".")[2] == name and call.package.startswith(package):
                yield _literals(call)

    def called(self, *names: str) -> bool:
        return any(call.function.rpartition(".")[2] in names for call in self.calls)


def _bound_numbers(tree: ast.AST) -> Iterator[tuple[str, float]]:
    for node in ast.walk(tree):
        pairs: list[tuple[str, ast.expr | None]] = []
        if isinstance(node, ast.Assign):
            pairs = [(ast.unparse(target), node.value) for target in node.targets]
        elif isinstance(node, ast.AnnAssign):
            pairs = [(ast.unparse(node.target), node.value)]
        elif isinstance(node, ast.keyword) and node.arg:
            pairs = [(node.arg, node.value)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("AmplitudeToDB") and len(node.args) > 1:
            pairs = [("top_db", node.args[1])]
        elif isinstance(node, ast.arguments):
            named = [*node.posonlyargs, *node.args][-len(node.defaults) :] if node.defaults else []
            pairs = [(a.arg, d) for a, d in zip(named, node.defaults, strict=True)]
            pairs += [(a.arg, d) for a, d in zip(node.kwonlyargs, node.kw_defaults, strict=True)]
        for name, value in pairs:
            if value is not None and (number := _constant(value)) is not None:
                yield name, number


def _constant(node: ast.expr) -> float | None:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _constant(node.operand)
        return None if inner is None else -inner
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return node.value
    return None


def _literals(call: Call) -> dict[str, Any]:
    found = {}
    for name, text in call.arguments.items():
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            # An array or an object: it is described in words.
            continue
    return found


def propose(signal: Signal, evidence: Evidence, later: Sequence[Event], given: np.ndarray | None) -> Iterator[Proposal]:
    """Stages for what comes after a signal, the more likely parameters first.

    later: the program's events that follow from the first segment (or from the whole), in order. given: the numbers of
    that segment in the program.
    """
    data = signal.data
    if "segment_times_s" not in signal.metadata and signal.rate is not None and data.ndim == 2:
        yield from _on_waveform(signal, evidence, later, given)
    elif data.ndim == 2 and signal.rate is not None:
        yield from itertools.chain(
            _resamplers(signal, evidence), _highpasses(signal, evidence), _mels(signal, evidence)
        )
        yield from _scalers(evidence)
    elif data.ndim == 3:
        yield from _on_spectrogram(signal, evidence, later)
    elif data.ndim == 4:
        yield from _on_picture(signal, evidence, later)


def decoders(evidence: Evidence) -> Iterator[Proposal]:
    """The stages that a pipeline may begin with."""
    yield Proposal(Decode())
    turns = ("upright", "stored") if evidence.called("exif_transpose", "imread") else ("stored", "upright")
    for turn, background in itertools.product(turns, ((), (255, 255, 255), (0, 0, 0))):
        yield Proposal(DecodeImage(background=background, min_side=1, orientation=turn))  # type: ignore[arg-type]


# --- waveforms and segments


def _on_waveform(
    signal: Signal, evidence: Evidence, later: Sequence[Event], given: np.ndarray | None
) -> Iterator[Proposal]:
    if len(signal.data) > 1:
        yield Proposal(Downmix())
    yield Proposal(PeakNormalize())
    yield from _resamplers(signal, evidence)
    yield from _highpasses(signal, evidence)
    if len(signal.data) > 1:
        return
    for found in evidence.arguments("split", "librosa"):
        yield from _made(RemoveSilence, {"top_db": 60, "frame_length": 2048, "hop_length": 512}, found)
    yield from _segments(signal, evidence, later, given)
    for found in evidence.arguments("mfcc", "librosa"):
        tempos = ("beat_track", "tempo") if evidence.called("beat_track") else ("tempo", "beat_track")
        for tempo in tempos:
            defaults = {"n_mfcc": 20, "n_fft": 2048, "hop_length": 512, "n_mels": 128, "roll_percent": 0.85}
            yield from _made(VoiceFeatures, {**defaults, "tempo": tempo}, found)
    yield from _mels(signal, evidence)


def _resamplers(signal: Signal, evidence: Evidence) -> Iterator[Proposal]:
    rate = signal.sampling_rate
    for found in (*evidence.arguments("Resample"), *evidence.arguments("resample", "torchaudio")):
        names = {"rate": "new_freq", "lowpass_filter_width": "lowpass_filter_width", "rolloff": "rolloff"}
        yield from _made(
            Resample,
            {"method": "sinc_hann"},
            {ours: found[theirs] for ours, theirs in names.items() if theirs in found},
        )
    for found in evidence.arguments("resample_poly", "scipy"):
        if {"up", "down"} <= set(found) and rate * found["up"] % found["down"] == 0:
            yield from _made(Resample, {"rate": rate * found["up"] // found["down"], "method": "resample_poly"}, {})
    for name, wanted in (("load", "sr"), ("resample", "target_sr"), ("resample", "out_rate")):
        for found in evidence.arguments(name):
            if isinstance(found.get(wanted), int | float):
                yield from _made(Resample, {"rate": int(found[wanted]), "method": "soxr_hq"}, {})


def _highpasses(signal: Signal, evidence: Evidence) -> Iterator[Proposal]:
    for found in evidence.arguments("highpass_biquad"):
        if "cutoff_freq" in found:
            yield from _made(
                Highpass, {"cutoff_hz": float(found["cutoff_freq"]), "q": float(found.get("Q", 0.707))}, {}
            )
    for found in evidence.arguments("butter", "scipy"):
        if found.get("N") == 2 and str(found.get("btype")).startswith("h") and isinstance(found.get("Wn"), int | float):
            cutoff = found["Wn"] * (1.0 if found.get("fs") else signal.sampling_rate / 2)
            for q in (0.7071068, 0.707):
                yield from _made(Highpass, {"cutoff_hz": float(cutoff), "q": q}, {})


def _segments(
    signal: Signal, evidence: Evidence, later: Sequence[Event], given: np.ndarray | None
) -> Iterator[Proposal]:
    rate, wave = signal.sampling_rate, signal.data[0].numpy() if given is None else np.squeeze(given)
    if wave.ndim != 1:
        return
    offsets: dict[int, set[int]] = defaultdict(set)
    for array in _arrays(evidence.trace, later):
        parts = array[None] if array.ndim == 1 else array[:3]
        for part in parts if array.ndim <= 2 else ():
            if 1 < part.size != wave.size and (at := _offset(wave, part)) is not None:
                offsets[part.size].add(at)
    limits = [int(n) for n in evidence.named("max", "seg") + evidence.named("max", "win") if n >= 1]
    for length, found in sorted(offsets.items(), key=lambda each: -len(each[1])):
        if 0 not in found or (len(found) == 1 and length < wave.size and not evidence.named("hop")):
            continue
        notes, hop = [], min(found - {0}, default=0)
        if not hop:
            hop = _hop_named(evidence, rate, length)
            notes.append("there is one segment, so hop_s is not seen")
        if (wave.size // hop + 1) * length > _MOST_NUMBERS:
            # Such as a waveform less its first sample: no segments.
            continue
        counts = [len(found)] if length * 2 < wave.size else []
        fitting = {max(1, 1 + (wave.size - length) // hop), -(-wave.size // hop)}
        for tail, most in itertools.product(("drop", "pad"), (*limits, *counts, MANY_SEGMENTS)):
            told = list(notes)
            if len({min(count, most) for count in fitting}) == 1:
                told.append("what happens to a rest at the end is not seen")
            if most == MANY_SEGMENTS:
                told.append("no limit is seen, so max_segments is a large number")
            values = {
                "duration_s": _seconds(length, rate),
                "hop_s": _seconds(hop, rate),
                "max_segments": most,
                "tail": tail,
            }
            for proposal in _made(Segment, values, {}):
                yield Proposal(proposal.stage, "; ".join(told))


def _offset(wave: np.ndarray, part: np.ndarray) -> int | None:
    """Where a part begins in a waveform, None where it is no part of it. Zeros may follow behind the waveform's end."""
    loudest = int(np.argmax(np.abs(part)))
    for at in np.flatnonzero(wave == part[loudest])[:64] - loudest:
        inside = wave[max(at, 0) : at + part.size]
        if at >= 0 and np.array_equal(part[: inside.size], inside) and not part[inside.size :].any():
            return int(at)
    return None


def _hop_named(evidence: Evidence, rate: int, length: int) -> int:
    seconds = [n for n in evidence.named("hop") if 0 < n * rate <= length]
    return int(seconds[0] * rate) if seconds else length


def _seconds(samples: int, rate: int) -> float:
    """The shortest decimal number of seconds that `segment` takes for so many samples."""
    exact = samples / rate
    shown = next((r for digits in range(1, 17) if int((r := round(exact, digits)) * rate) == samples), exact)
    return shown if int(shown * rate) == samples else math.nextafter(exact, math.inf)


def _mels(signal: Signal, evidence: Evidence) -> Iterator[Proposal]:
    banks = [
        *evidence.arguments("MelSpectrogram"),
        *({**f, "sample_rate": f.get("sr")} for f in evidence.arguments("melspectrogram", "librosa")),
    ]
    for fourier, bank in itertools.product(
        (*evidence.arguments("stft"), *evidence.arguments("spectrogram", "torchaudio")),
        (*evidence.arguments("melscale_fbanks"), *evidence.arguments("mel", "librosa")),
    ):
        for power in (2.0, 1.0):
            banks.append({"power": power, **bank, **{k: v for k, v in fourier.items() if k != "normalized"}})
    for found in banks:
        rate = found.get("sample_rate") or found.get("sr") or signal.sampling_rate
        n_fft = found.get("n_fft", 2048 if "sr" in found else 400)
        window = found.get("win_length") or n_fft
        slaney = found.get("mel_scale", "htk" if found.get("htk", "sr" not in found) else "slaney")
        norm = found.get("norm", "slaney" if "sr" in found else None)
        top = found.get("f_max", found.get("fmax"))
        values = {
            "n_fft": n_fft,
            "win_length": window,
            "hop_length": found.get("hop_length") or window // (4 if "sr" in found else 2),
            "n_mels": found.get("n_mels", 128),
            "f_min": float(found.get("f_min", found.get("fmin", 0.0))),
            "f_max": float(top or rate / 2),
            "power": float(found.get("power") or 2.0),
            "mel_scale": slaney,
            "norm": norm or "none",
            "rate": 0 if rate == signal.sampling_rate else int(rate),
        }
        yield from _made(Mel, values, {})


def _scalers(evidence: Evidence) -> Iterator[Proposal]:
    for event in evidence.trace.events:
        state = {i.path: evidence.trace.arrays.get(i.digest) for i in (*event.inputs, *event.outputs)}
        mean, std = state.get(".mean_"), state.get(".scale_")
        if mean is not None and std is not None:
            yield Proposal(StandardScaler(mean=tuple(map(float, mean)), std=tuple(map(float, std))))
            return


# --- spectrograms and pictures


def _on_spectrogram(signal: Signal, evidence: Evidence, later: Sequence[Event]) -> Iterator[Proposal]:
    x, rows = canonical(signal.data[0].numpy()), len(signal.data)
    arrays = [first for array in _arrays(evidence.trace, later) for first in _firsts(array, rows)]
    same = [array for array in arrays if array.shape == x.shape]
    yield from _decibels(evidence, same)
    yield from _scales(x, rows, evidence, later)
    for array in arrays:
        if array.ndim == 2 and x.ndim == 2 and len(array) == len(x) and array.shape[1] != x.shape[1]:
            yield from _pads(x, array)
    for size in dict.fromkeys(len(a) for a in arrays if a.ndim == 2 and a.shape[0] == a.shape[1]):
        corners = [float(a[at]) for a in arrays if a.shape == (size, size) for at in ((0, 0), (0, -1), (-1, 0))][:3]
        values = [*_pad_values(evidence), *(nice(c) for c in corners)]
        yield from (p for v in dict.fromkeys(values) for p in _made(Letterbox, {"size": size, "pad_value": v}, {}))
    if evidence.half:
        yield Proposal(Cast("float16"))
    channels = {a.shape[0] for a in arrays if a.ndim == 3} | {a.shape[-1] for a in arrays if a.ndim == 3}
    yield from (Proposal(Replicate(n)) for n in sorted(channels | {1}) if n in (1, 2, 3, 4))


def _pad_values(evidence: Evidence) -> Iterator[float]:
    for found in (*evidence.arguments("pad"), *evidence.arguments("full")):
        value = found.get("value", found.get("fill_value"))
        if isinstance(value, int | float):
            yield float(value)


def _decibels(evidence: Evidence, same: Sequence[np.ndarray]) -> Iterator[Proposal]:
    calls = [*evidence.arguments("amplitude_to_DB"), *evidence.arguments("power_to_db")]
    told = [f["top_db"] for f in calls if f.get("top_db")] + [n for n in evidence.named("top_db") if n > 0]
    # Where the floor is reached, it is so far below the largest; half decibels are what people write.
    seen = [round(2 * span) / 2 for a in same if abs(2 * (span := float(np.ptp(a))) - round(2 * span)) < 2e-3]
    amins = [f["amin"] for f in calls if f.get("amin")] + evidence.named("amin") + evidence.named("eps") + [1e-10]
    for top_db, amin, over in itertools.product(
        dict.fromkeys([*told, *seen]), dict.fromkeys(amins), ("segment", "recording")
    ):
        note = "" if top_db in seen else "no segment reaches the floor of top_db; the number is the source's"
        for proposal in _made(Decibel, {"top_db": float(top_db), "amin": float(amin), "max_over": over}, {}):
            yield Proposal(proposal.stage, note)


def _scales(x: np.ndarray, rows: int, evidence: Evidence, later: Sequence[Event]) -> Iterator[Proposal]:
    """A clamp, with linear steps before and after it."""

    def like_x(events: Sequence[Event]) -> Iterator[np.ndarray]:
        every = (first for array in _arrays(evidence.trace, events) for first in _firsts(array, rows))
        return (array for array in every if array.shape == x.shape)

    for at, event in enumerate(later):
        limits = _limits(event)
        if limits is None or not event.inputs:
            continue
        unclamped = replace(event, outputs=event.inputs[:1])
        before, clamped = next(like_x([unclamped]), None), next(like_x([event]), None)
        if before is None or clamped is None or (first := line(x, before)) is None or first[0] <= 0:
            continue
        low, high = ((limit - first[1]) / first[0] for limit in limits)
        # What comes last stands for most lines.
        for each in (*reversed(list(like_x(later[at + 1 :]))), clamped):
            if (second := line(clamped, each)) is not None and second[0] > 0:
                ends = [second[0] * limit + second[1] for limit in limits]
                for share in _ROUNDINGS:
                    near = [nice(n, share, abs(high - low)) for n in (low, high)]
                    to = [nice(n, share, abs(ends[1] - ends[0])) for n in ends]
                    yield from _made(Scale, {"low": near[0], "high": near[1], "to": tuple(to)}, {})


def _limits(event: Event) -> tuple[float, float] | None:
    """The limits of a clamp, in whatever way its library is given them."""
    if event.call is None or event.operation.rpartition(".")[2] not in ("clamp", "clip", "clamp_", "clip_"):
        return None
    found = {name: n for name, n in _literals(event.call).items() if isinstance(n, int | float)}
    numbers = [found[name] for name in ("min", "max", "a_min", "a_max", "0", "1", "2") if name in found]
    return (float(numbers[0]), float(numbers[1])) if len(numbers) == 2 and numbers[0] < numbers[1] else None


def _pads(x: np.ndarray, array: np.ndarray) -> Iterator[Proposal]:
    frames, value = array.shape[1], float(array[0, -1])
    if frames < x.shape[1]:
        for proposal in _made(PadFrames, {"frames": frames, "value_db": 0.0, "relative_to": "reference"}, {}):
            yield Proposal(proposal.stage, "nothing is padded here, so value_db is not seen")
        return
    reference = {"frames": frames, "value_db": nice(value), "relative_to": "reference"}
    above = {"frames": frames, "value_db": nice(value - float(x.min()), 1e-5, 1.0), "relative_to": "minimum"}
    whole = (2 * value).is_integer()
    for values in (reference, above) if whole else (above, reference):
        yield from _made(PadFrames, values, {})


# What programs resize by, the commonest first; pil_bicubic is Pillow's default.
_RESIZING = ("bilinear", "pil_bilinear", "pil_nearest", "pil_bicubic", "pil_lanczos", "bicubic", "area")


def _on_picture(signal: Signal, evidence: Evidence, later: Sequence[Event]) -> Iterator[Proposal]:
    x = canonical(signal.data[:1].numpy())
    arrays = list(_arrays(evidence.trace, later))
    channels = signal.data.shape[1]
    if len(signal.data) == 1:
        sizes = {a.shape[:2] for a in arrays if a.ndim == 3 and a.shape[-1] == channels}
        sizes |= {a.shape[1:] for a in arrays if a.ndim == 3 and a.shape[0] == channels}
        for (height, width), method in itertools.product(sorted(sizes), _RESIZING):
            yield from _made(Resize, {"height": height, "width": width, "method": method}, {})
    if evidence.half:
        yield Proposal(Cast("float16"))
    planes = x.reshape(channels, *signal.data.shape[2:])
    firsts = (first for array in arrays for first in _firsts(array, len(signal.data)))
    same = [plane for a in firsts if (plane := _channels_first(a, planes.shape)) is not None]
    # What comes last stands for most lines.
    same.reverse()
    ranges = [ends for each in same if (fit := line(planes, each)) and fit[0] > 0 if (ends := _ends(*fit)) in _RANGES]
    for each in same:
        if channels == 3 and signal.rate is None:
            means = [float(np.mean(each[c] - planes[2 - c])) * -1 for c in range(3)]
            for share in _ROUNDINGS:
                mean = tuple(nice(m, share, 1.0) for m in means)
                yield from _made(CaffePreprocess, {"mean_bgr": mean}, {})
        fits = [line(planes[c], each[c]) for c in range(channels)]
        known = [fit for fit in fits if fit is not None and fit[0] > 0]
        if len(known) < channels:
            continue
        for (low, high), share in itertools.product(dict.fromkeys([*ranges, (0.0, 1.0)]), _ROUNDINGS):
            std = [1 / (a * (high - low)) for a, _ in known]
            offsets = [-(a * low + b) * s for (a, b), s in zip(known, std, strict=True)]
            values = {
                "input_range": (low, high),
                "mean": tuple(nice(m, share, s) for m, s in zip(offsets, std, strict=True)),
                "std": tuple(nice(s, share) for s in std),
            }
            for arithmetic in ("float32", "float16") if evidence.half else ("float32",):
                yield from _made(Standardize, {**values, "arithmetic": arithmetic}, {})


# What programs map to [0, 1] before they subtract a mean.
_RANGES = ((-1.0, 1.0), (0.0, 255.0))


def _ends(a: float, b: float) -> tuple[float, float]:
    """What a x + b maps to 0 and to 1."""
    low, high = -b / a, (1 - b) / a
    return nice(low, 2e-3, high - low), nice(high, 2e-3, high - low)


def _channels_first(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    if array.ndim == 3 and array.shape == shape:
        return array
    if array.ndim == 3 and array.shape == (*shape[1:], shape[0]):
        return np.moveaxis(array, -1, 0)
    return array[None] if shape[0] == 1 and array.shape == shape[1:] else None


# --- numbers


def _arrays(trace: Trace, events: Sequence[Event]) -> Iterator[np.ndarray]:
    for event in events:
        for item in event.outputs:
            if (array := trace.arrays.get(item.digest)) is not None and array.size > 1:
                yield canonical(array)


def _firsts(array: np.ndarray, rows: int) -> Iterator[np.ndarray]:
    """An array, and its first row where it may hold all segments."""
    yield array
    if rows > 1 and array.ndim > 1 and len(array) == rows:
        yield array[0]


def line(x: np.ndarray, y: np.ndarray) -> tuple[float, float] | None:
    """(a, b) with y = a x + b for all numbers, None where there is no such line."""
    if x.shape != y.shape:
        return None
    places = np.linspace(0, x.size - 1, min(x.size, 4096)).astype(np.int64)
    u, v = x.reshape(-1)[places].astype(np.float64), y.reshape(-1)[places].astype(np.float64)
    spread = float(u.var())
    if not spread or not np.isfinite(u).all() or not np.isfinite(v).all():
        return None
    a = float(((u - u.mean()) * (v - v.mean())).mean()) / spread
    b = float(v.mean()) - a * float(u.mean())
    return (a, b) if np.abs(a * u + b - v).max() <= 2e-3 * max(float(np.abs(v).max()), 1e-30) else None


def nice(number: float, share: float = 1e-5, size: float = 0.0) -> float:
    """The number with as few digits as keep it within `share` of itself, or of `size` where that is larger."""
    allowed = share * max(abs(number), size)
    if not math.isfinite(number) or abs(number) <= share * size:
        return 0.0
    digits = range(1 - math.ceil(math.log10(abs(number))), 12)
    return next((r for d in digits if abs((r := round(number, d)) - number) <= allowed), number) + 0.0


def _made(kind: type[Stage], values: Mapping[str, Any], over: Mapping[str, Any]) -> Iterator[Proposal]:
    """A proposal with these parameters, none where the stage does not take them. over: those of a call with the same names."""
    known = kind.__dataclass_fields__
    parameters = {**values, **{name: value for name, value in over.items() if name in known and value is not None}}
    try:
        yield Proposal(kind.from_params(parameters))
    except PipelineError:
        # The call has values that no stage of ours takes, such as a filter of order 4.
        return
