"""CPU time from encoded bytes to the network's input: an archive's plain stages against what serving runs.

    python -m benchmarks.preprocessing [archive/cough] [--threads 1] [--repeats 20]

Five uploads as people send them, made here: 5 s and 17.5 s of 44.1 kHz stereo WAV, 5 s of it as Ogg Vorbis, 9.8 s of 48 kHz
mono WebM/Opus, 60 s of MP3. Both paths run in turn on each, and the smallest CPU time of every step counts: what others do
on the machine only adds to it. Stops when a bit of the two results differs. "without the end" leaves out `replicate` and
`standardize`, which a runtime may take over.
"""

import argparse
import io
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

import av
import numpy as np
import soundfile
import torch

from skewless.core.pipeline import Pipeline
from skewless.core.stages import Payload, Signal
from skewless.core.stages.fused import Fused, Step


def uploads() -> dict[str, bytes]:
    """Encoded recordings by name."""
    return {
        "WAV, 5 s": _written(_sound(44100, 5.0, 2), 44100, "WAV", "PCM_16"),
        "Ogg, 5 s": _written(_sound(44100, 5.0, 2), 44100, "OGG", "VORBIS"),
        "WAV, 17.5 s": _written(_sound(44100, 17.5, 2), 44100, "WAV", "PCM_16"),
        "WebM, 9.8 s": _encoded(_sound(48000, 9.8, 1), 48000, "webm", "libopus", 64000),
        "the same as WAV": _written(_sound(48000, 9.8, 1), 48000, "WAV", "PCM_16"),
        "MP3, 60 s": _encoded(_sound(44100, 60.0, 2), 44100, "mp3", "libmp3lame", 128000),
    }


def _sound(rate: int, seconds: float, channels: int) -> np.ndarray:
    """Bursts of noise that fade, over a hum: `(channels, samples)` float32."""
    rng = np.random.default_rng(0)
    time = np.arange(round(rate * seconds)) / rate
    bursts = rng.standard_normal((channels, len(time))) * np.exp(-(time % 0.8) / 0.06)
    return (0.12 * bursts + 0.03 * np.sin(2 * np.pi * 110 * time)).clip(-1, 1).astype(np.float32)


def _written(samples: np.ndarray, rate: int, container: str, subtype: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples.T, rate, format=container, subtype=subtype)
    return file.getvalue()


def _encoded(samples: np.ndarray, rate: int, container: str, codec: str, bit_rate: int) -> bytes:
    file = io.BytesIO()
    layout = "mono" if len(samples) == 1 else "stereo"
    with av.open(file, "w", format=container) as out:
        stream = cast(av.AudioStream, out.add_stream(codec, rate=rate, layout=layout, bit_rate=bit_rate))
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
        frame.rate, frame.pts = rate, 0
        for each in (frame, None):
            out.mux(stream.encode(each))
    return file.getvalue()


def timed(pipeline: Pipeline, steps: Sequence[Step], payload: bytes) -> Iterator[tuple[float, Signal]]:
    """Each step's CPU seconds and result."""
    signal = Signal(Payload(payload, pipeline.head_s))
    with torch.no_grad():
        for step in steps:
            started = time.process_time()
            signal = step(signal)
            yield time.process_time() - started, signal


def compare(pipeline: Pipeline, payload: bytes, repeats: int) -> dict[str, list[float]]:
    """The smallest CPU seconds of every step, of the plain path and of the fast one. Raises ValueError when they differ."""
    paths: dict[str, list[Step]] = {"plain": list(pipeline.stages.values()), "fast": pipeline.plan}
    best = {name: [float("inf")] * len(steps) for name, steps in paths.items()}
    for _ in range(repeats):
        results = {}
        for name, steps in paths.items():
            taken, signals = zip(*timed(pipeline, steps, payload), strict=True)
            best[name] = list(map(min, best[name], taken))
            results[name] = signals[-1].data
        if not torch.equal(results["plain"], results["fast"]):
            raise ValueError("the fast path does not give the bits of the plain stages")
    return best


def name_of(step: Step) -> str:
    """A step's stages in a few words, such as "segment ... standardize"."""
    stages = step.stages if isinstance(step, Fused) else (step,)
    names = [stage.name for stage in stages]  # type: ignore[attr-defined]  # a step that is not fused is a stage
    return names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"


def report(pipeline: Pipeline, payloads: dict[str, bytes], repeats: int, say: Callable[[str], None] = print) -> None:
    names = list(pipeline.stages)
    at = names.index("replicate") if names[-2:] == ["replicate", "standardize"] else len(names)
    shortened = pipeline.split(names[at])[0] if at < len(names) else pipeline
    say("CPU milliseconds | plain | fast | times | fast, without the end\n--- | --- | --- | --- | ---")
    details = []
    for name, payload in payloads.items():
        best = compare(pipeline, payload, repeats)
        plain, fast = sum(best["plain"]), sum(best["fast"])
        short = sum(compare(shortened, payload, repeats)["fast"])
        say(f"{name} | {plain * 1e3:.1f} | {fast * 1e3:.1f} | {plain / fast:.1f} | {short * 1e3:.1f}")
        paths: dict[str, Sequence[Step]] = {"plain": list(pipeline.stages.values()), "fast": pipeline.plan}
        for path, steps in paths.items():
            parts = (f"{name_of(s)} {t * 1e3:.2f}" for s, t in zip(steps, best[path], strict=True))
            details.append(f"{name}, {path}: {', '.join(parts)}")
    say("\n" + "\n".join(details))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.preprocessing", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "archive", nargs="?", type=Path, default=Path("archive/cough"), help="a folder with pipeline.yaml"
    )
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args(argv)
    try:
        pipeline = Pipeline.from_yaml(arguments.archive / "pipeline.yaml")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if pipeline.reads != "audio":
        parser.error(
            f"{arguments.archive} reads {pipeline.reads}s, expected an archive of recordings, such as archive/cough"
        )
    torch.set_num_threads(arguments.threads)
    report(pipeline, uploads(), arguments.repeats)


if __name__ == "__main__":
    main()
