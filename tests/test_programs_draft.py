"""A pipeline beside a program, and the stage list drafted from a program's trace."""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from PIL import ExifTags, Image

from skewless.core.pipeline import Pipeline
from skewless.errors import UsageError
from skewless.programs.causes import Compared, Search
from skewless.programs.draft import Draft, draft
from skewless.programs.pipeline_side import PipelineSide, side_of, sides_of
from skewless.programs.program import Recorded, Side, TracedFunction, function_of
from skewless.programs.trace import Trace
from skewless.programs.values import measure
from skewless.programs.worker import ProgramError
from skewless.training.checkpoint import save_checkpoint

COUGH = Path(__file__).resolve().parents[1] / "archive" / "cough" / "pipeline.yaml"
TALENT = COUGH.parents[1] / "talent"

# What archive/cough/pipeline.yaml does, written as people write it.
TRAIN = """
import soundfile
import torch
import torch.nn.functional as F
import torchaudio
import torchaudio.functional as AF

RATE = 16000
MAX_SEGMENTS = 32
to_mel = torchaudio.transforms.MelSpectrogram(
    sample_rate=RATE, n_fft=1024, hop_length=160, n_mels=160, f_min=50.0, f_max=4000.0
)
to_db = torchaudio.transforms.AmplitudeToDB(stype="power", top_db=80.0)


def load(path):
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    waveform = torch.from_numpy(samples.T.copy())
    waveform = waveform / waveform.abs().max()
    waveform = waveform.mean(dim=0, keepdim=True)
    waveform = torchaudio.transforms.Resample(rate, RATE)(waveform)
    return AF.highpass_biquad(waveform, RATE, 50.0)


def cut(waveform):
    length, hop = 2 * RATE, RATE // 2
    starts = range(0, waveform.shape[1] - length + 1, hop)
    return [waveform[:, start : start + length] for start in starts][:MAX_SEGMENTS]


def picture(segment):
    level = to_db(to_mel(segment))
    image = torch.clamp((level + 80) / 80, 0, 1) * 2 - 1
    scale = 224 / max(image.shape[1:])
    height, width = (round(side * scale) for side in image.shape[1:])
    image = F.interpolate(image[None], size=(height, width), mode="bilinear", align_corners=False)[0]
    left, top = (224 - width) // 2, (224 - height) // 2
    image = F.pad(image, (left, 224 - width - left, top, 224 - height - top), value=-1.0)
    return image.half().repeat(3, 1, 1)


def network_input(path):
    bag = torch.stack([picture(segment) for segment in cut(load(path))])
    bag = (bag.float() + 1) / 2
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    return (bag - mean) / std
"""

# All segments at once, stored levels divided by full scale, and the recording's end padded.
BATCHED = """
import numpy as np
import soundfile
import torch
import torchaudio

MAX_WINDOWS = 8
to_mel = torchaudio.transforms.MelSpectrogram(16000, n_fft=512, hop_length=256, n_mels=40, power=1.0)


def network_input(path):
    samples, rate = soundfile.read(path, dtype="int16", always_2d=True)
    waveform = torch.from_numpy(samples.astype(np.float32).T / 32768.0).mean(0)
    length, hop = rate, rate // 2
    count = min(-(-len(waveform) // hop), MAX_WINDOWS)
    padded = torch.nn.functional.pad(waveform, (0, (count - 1) * hop + length))
    windows = torch.stack([padded[n * hop : n * hop + length] for n in range(count)])
    level = torchaudio.functional.amplitude_to_DB(to_mel(windows)[:, None], 10.0, 1e-8, 0.0, 70.0)[:, 0]
    return torch.nn.functional.pad(level, (0, 100 - level.shape[2]), value=-100.0)[:, None]
"""

PICTURE = """
import numpy as np
from PIL import Image, ImageOps

MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)


def network_input(path):
    with Image.open(path) as file:
        upright = ImageOps.exif_transpose(file).convert("RGB")
    small = upright.resize((48, 40), Image.Resampling.BILINEAR)
    levels = np.asarray(small, dtype=np.float32) / 255.0
    return ((levels - MEAN) / STD).transpose(2, 0, 1)[None]
"""

CAFFE = """
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


def network_input(path):
    levels = np.array(Image.open(path).convert("RGB"), dtype=np.float32)
    planes = torch.from_numpy(levels).permute(2, 0, 1)[None]
    resized = F.interpolate(planes, size=(64, 64), mode="bilinear", align_corners=False)
    return resized.flip(1) - torch.tensor([103.939, 116.779, 123.68]).view(1, 3, 1, 1)
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two channels that differ, 3.2 s at 22.05 kHz: bursts, and pauses that are more than 80 dB below them."""
    rng = np.random.default_rng(0)
    rate, count = 22050, 70560
    time = np.arange(count) / rate
    bursts = sum(
        np.where(time >= begin, np.exp((begin - time) / 0.05), 0.0) * rng.standard_normal(count) * loud
        for begin, loud in ((0.4, 0.3), (1.3, 0.1), (2.2, 0.05))
    )
    waveform = bursts[:, None] * [1.0, 0.8] + rng.normal(0, 2e-5, (count, 2)) + 3e-4
    path = tmp_path_factory.mktemp("recording") / "bursts.wav"
    soundfile.write(path, waveform.clip(-1, 1), rate, subtype="PCM_16")
    return path


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture that its metadata says to turn by 90 degrees."""
    x, y = np.meshgrid(np.linspace(0, 1, 121), np.linspace(0, 1, 85))
    pixels = np.stack([200 * x, 150 * y**2, 90 + 60 * np.sin(25 * x * y)], axis=-1)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(pixels.astype(np.uint8)).save(path, exif=exif)
    return path


def program(folder: Path, text: str, name: str = "train.py") -> str:
    (folder / name).write_text(text)
    return f"{folder / name}:network_input"


def traced(text: str, file: Path, folder: Path) -> Trace:
    with TracedFunction(function_of(program(folder, text))) as side:
        return side.run(file)


def drafted(text: str, file: Path, folder: Path) -> Draft:
    return draft(traced(text, file, folder), file)


def line_of(text: str, part: str) -> int:
    (found,) = [n for n, line in enumerate(text.splitlines(), start=1) if part in line]
    return found


def stages(drafted: Draft) -> list[dict[str, object]]:
    return yaml.safe_load(drafted.text)["stages"]


def compare(reference: Side, candidate: Side, file: Path) -> Compared:
    search = Search(reference, candidate)
    return search.compare(file.name, reference.run(file), candidate.run(file), lambda side, plan: side.run(file, plan))


def fingerprint(drafted: Draft) -> str:
    return Pipeline.from_dict(yaml.safe_load(drafted.text)).fingerprint


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TracedFunction]:
    with TracedFunction(function_of(program(tmp_path_factory.mktemp("train"), TRAIN))) as side:
        yield side


# --- drafts


def test_a_program_that_does_what_a_pipeline_does_becomes_that_pipeline(recording: Path, train: TracedFunction):
    found = draft(train.run(recording), recording)

    assert fingerprint(found) == Pipeline.from_yaml(COUGH).fingerprint
    assert found.closeness is not None and found.closeness[1] < 1e-6
    assert found.coverage == 1 and not found.unrecognised
    assert "they stand for 100% of the lines" in found.text and "they stand for 100% of the lines" in found.as_text()
    mel = found.recognised[6]
    assert mel.stage.name == "mel" and line_of(TRAIN, "to_db(to_mel") in {site.line for site in mel.lines}


def test_an_unknown_step_is_named_where_it_stands_and_the_draft_goes_on_behind_it(recording: Path, tmp_path: Path):
    step = "    waveform = torch.cat([waveform[:, :1], waveform[:, 1:] - 0.97 * waveform[:, :-1]], dim=1)\n"
    text = TRAIN.replace("    return AF.highpass", step + "    return AF.highpass")

    found = drafted(text, recording, tmp_path)

    assert [str(site) for site in found.unrecognised] == [f"train.py:{line_of(text, '0.97')}"]
    lines = found.text.splitlines()
    at = next(n for n, line in enumerate(lines) if "# not recognised" in line)
    assert f"train.py:{line_of(text, '0.97')}  torch.cat([waveform[:, :1]" in lines[at]
    assert lines[at - 1].startswith("  - resample") and lines[at + 1].startswith("  - highpass")
    assert fingerprint(found) == Pipeline.from_yaml(COUGH).fingerprint
    assert found.closeness is None and 0.9 < found.coverage < 1
    assert "1 line on the way to the output not recognised" in found.text


def test_what_comes_last_and_is_unknown_is_left_open_at_the_end(recording: Path, tmp_path: Path):
    text = TRAIN.replace("return (bag - mean) / std", "return torch.fft.fft2((bag - mean) / std).abs()")
    found = drafted(text, recording, tmp_path)
    assert [site.line for site in found.unrecognised] == [line_of(text, "fft2")]
    assert found.text.splitlines()[-1].startswith("  # not recognised: train.py")
    assert found.closeness is None and len(found.recognised) == 13


def test_segments_of_all_at_once_with_padded_tails_and_stored_levels(recording: Path, tmp_path: Path):
    found = drafted(BATCHED, recording, tmp_path)
    assert stages(found) == [
        {"decode": {}},
        {"downmix": {}},
        {"segment": {"duration_s": 1.0, "hop_s": 0.5, "max_segments": 8, "tail": "pad"}},
        {
            "mel": {
                **{"n_fft": 512, "win_length": 512, "hop_length": 256, "n_mels": 40, "f_min": 0.0, "f_max": 8000.0},
                **{"power": 1.0, "mel_scale": "htk", "norm": "none", "rate": 16000},
            }
        },
        {"decibel": {"top_db": 70.0, "amin": 1e-8, "max_over": "segment"}},
        {"pad_frames": {"frames": 100, "value_db": -100.0, "relative_to": "reference"}},
        {"replicate": {"channels": 1}},
    ]
    assert found.closeness is not None and found.closeness[1] < 1e-6


def test_levels_as_they_are_stored_are_recognised_before_an_unknown_line(recording: Path, tmp_path: Path):
    text = TRAIN.replace('dtype="float32"', 'dtype="int16"').replace("samples.T.copy())", "samples.T.copy()).float()")
    text = text.replace("waveform / waveform.abs().max()", "waveform * waveform.abs()")
    text = text.replace("keepdim=True)\n", "keepdim=True) / 32768**2\n", 1)
    found = drafted(text, recording, tmp_path)
    assert [site.line for site in found.unrecognised] == [line_of(text, "waveform.abs()"), line_of(text, "32768")]
    assert found.recognised[0].stage.name == "decode"
    assert [site.line for site in found.recognised[0].lines] == [
        line_of(text, "soundfile.read"),
        line_of(text, "copy()"),
    ]


def test_a_filter_of_another_design_is_accepted_as_close_and_said_to_be(recording: Path, tmp_path: Path):
    text = TRAIN.replace(
        "return AF.highpass_biquad(waveform, RATE, 50.0)",
        'sos = scipy.signal.butter(2, 60.0, "highpass", fs=RATE, output="sos")\n'
        "    return torch.from_numpy(scipy.signal.sosfilt(sos, waveform.double().numpy())).float()",
    ).replace("import soundfile", "import scipy.signal\nimport soundfile")
    found = drafted(text, recording, tmp_path)
    highpass = next(each for each in found.recognised if each.stage.name == "highpass")
    assert highpass.stage.params() == {"cutoff_hz": 60.0, "q": 0.7071068}
    assert highpass.relative is not None and 1e-7 < highpass.relative < 1e-3
    assert found.closeness is not None and not found.unrecognised


def test_a_filter_that_no_stage_computes_is_not_taken_for_one(recording: Path, tmp_path: Path):
    text = TRAIN.replace("AF.highpass_biquad(waveform, RATE, 50.0)", "AF.bandpass_biquad(waveform, RATE, 900.0)")
    found = drafted(text, recording, tmp_path)
    assert [site.line for site in found.unrecognised] == [line_of(text, "bandpass")]
    assert "highpass" not in [each.stage.name for each in found.recognised]


def test_a_floor_that_no_segment_reaches_is_the_sources_and_said_to_be(recording: Path, tmp_path: Path):
    found = drafted(TRAIN.replace("top_db=80.0", "top_db=190.0"), recording, tmp_path)
    assert {"decibel": {"top_db": 190.0, "amin": 1e-10, "max_over": "segment"}} in stages(found)
    assert "no segment reaches the floor of top_db" in found.text


def test_a_swallowed_exception_and_a_recording_of_one_channel_are_told(recording: Path, tmp_path: Path):
    text = TRAIN.replace(
        "    return AF.highpass_biquad(waveform, RATE, 50.0)",
        "    try:\n        waveform = torchaudio.transforms.HighpassBiquad(RATE, 50.0)(waveform)\n"
        "    except AttributeError:\n        pass\n    return waveform",
    )
    samples, rate = soundfile.read(recording)
    mono = tmp_path / "mono.wav"
    soundfile.write(mono, samples[:, 0], rate, subtype="PCM_16")
    found = drafted(text, mono, tmp_path)
    assert any("swallowed AttributeError" in note for note in found.notes)
    assert any("one channel" in note for note in found.notes)
    assert not {"highpass", "downmix"} & {each.stage.name for each in found.recognised}


@pytest.mark.parametrize(("argument", "method"), [(", Image.Resampling.BILINEAR", "pil_bilinear"), ("", "pil_bicubic")])
def test_pictures_standardised_with_channels_last(photo: Path, tmp_path: Path, argument: str, method: str):
    found = drafted(PICTURE.replace(", Image.Resampling.BILINEAR", argument), photo, tmp_path)
    assert stages(found) == [
        {"decode_image": {"background": [], "min_side": 1, "orientation": "upright"}},
        {"resize": {"height": 40, "width": 48, "method": method}},
        {
            "standardize": {
                **{"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
                **{"input_range": [0.0, 255.0], "arithmetic": "float32"},
            }
        },
    ]
    assert found.closeness is not None and found.closeness[1] < 1e-6 and found.coverage == 1


def test_pictures_in_caffes_way(photo: Path, tmp_path: Path):
    found = drafted(CAFFE, photo, tmp_path)
    assert stages(found) == [
        {"decode_image": {"background": [], "min_side": 1, "orientation": "stored"}},
        {"resize": {"height": 64, "width": 64, "method": "bilinear"}},
        {"caffe_preprocess": {"mean_bgr": [103.939, 116.779, 123.68]}},
    ]
    assert found.closeness is not None and found.closeness[1] < 1e-6


def test_a_program_of_which_nothing_is_known_gives_an_empty_list(tmp_path: Path):
    numbers = tmp_path / "numbers.npy"
    np.save(numbers, np.arange(64.0))
    found = drafted("import numpy as np\n\n\ndef network_input(x):\n    return np.sqrt(x)\n", numbers, tmp_path)
    assert stages(found) == [] and found.coverage == 0 and found.closeness is None
    assert [site.line for site in found.unrecognised] == [5]


def test_a_draft_needs_the_traced_file_and_an_array(recording: Path, tmp_path: Path):
    trace = traced(PICTURE, _picture(tmp_path), tmp_path)
    with pytest.raises(UsageError, match=r"the trace is one of small\.png, not of bursts\.wav"):
        draft(trace, recording)
    with pytest.raises(UsageError, match="cannot be read"):
        draft(trace, tmp_path / "gone" / "small.png")
    nothing = traced("def network_input(path):\n    return None\n", recording, tmp_path)
    with pytest.raises(UsageError, match="returned no array"):
        draft(nothing, recording)


def _picture(folder: Path) -> Path:
    path = folder / "small.png"
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(path)
    return path


# --- a pipeline as a side


@dataclass(frozen=True)
class Change:
    """One parameter of the pipeline that differs, the line of the program that sets it, and that stage's line."""

    old: str
    new: str
    program: str
    stage: str


CHANGES = (
    Change("f_max: 4000.0", "f_max: 3500.0", "to_mel = torchaudio", "- mel"),
    Change("top_db: 80.0", "top_db: 60.0", "to_db(to_mel", "- decibel"),
    Change("cutoff_hz: 50.0", "cutoff_hz: 80.0", "AF.highpass_biquad", "- highpass"),
)


def test_a_pipeline_and_the_same_program_have_no_cause(recording: Path, train: TracedFunction):
    for path in (COUGH, COUGH.parent):
        with PipelineSide(path) as pipeline:
            for pair in ((pipeline, train), (train, pipeline)):
                compared = compare(*pair, recording)
                assert compared.first_same and compared.same and not compared.causes


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ("low: -80.0", "low: -78.0", ("torch.clamp((level", "- scale")),
        ("0.225]", "0.235]", ("std = torch.tensor", "- standardize")),
    ],
)
def test_a_stage_of_several_operators_is_named_and_no_line_before_it(
    old: str, new: str, lines: tuple[str, str], recording: Path, train: TracedFunction, tmp_path: Path
):
    path = tmp_path / "pipeline.yaml"
    path.write_text(COUGH.read_text().replace(old, new))
    with PipelineSide(path) as pipeline:
        pipeline.beside = train
        for pair, expected in (
            ((pipeline, train), line_of(TRAIN, lines[0])),
            ((train, pipeline), line_of(path.read_text(), lines[1])),
        ):
            compared = compare(*pair, recording)
            assert {cause.parting.site.line for cause in compared.causes} == {expected}
            first = compared.causes[0]
            # The first operator, or the constant.
            assert first.parting.events[0].operation in ("+", "-", "std", "torch.tensor")


def test_operators_of_a_stage_give_the_stages_numbers(recording: Path, photo: Path, tmp_path: Path):
    caffe = tmp_path / "caffe.yaml"
    caffe.write_text(
        "name: x\nstages:\n  - decode_image: {background: [], min_side: 1}\n"
        "  - caffe_preprocess: {mean_bgr: [103.939, 116.779, 123.68]}\n"
    )
    half = tmp_path / "half.yaml"
    half.write_text(COUGH.read_text().replace("arithmetic: float32", "arithmetic: float16"))
    for path, file in ((COUGH, recording), (half, recording), (caffe, photo)):
        with PipelineSide(path) as side:
            (output,) = side.run(file).outputs
        expected = Pipeline.from_yaml(path)(file.read_bytes())
        assert output.digest == measure(expected.numpy()).digest


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.stage)
def test_the_line_and_the_stage_that_differ_are_named_in_both_directions(
    change: Change, recording: Path, train: TracedFunction, tmp_path: Path
):
    path = tmp_path / "pipeline.yaml"
    path.write_text(COUGH.read_text().replace(change.old, change.new))
    lines = line_of(TRAIN, change.program), line_of(path.read_text(), change.stage)
    with PipelineSide(path) as pipeline:
        for pair, expected in (((pipeline, train), lines), ((train, pipeline), lines[::-1])):
            compared = compare(*pair, recording)
            (cause,) = compared.causes
            assert cause.counterpart is not None and cause.counterpart.site is not None
            assert (cause.parting.site.line, cause.counterpart.site.line) == expected
            assert compared.same and not compared.first_same


def test_a_program_that_computes_all_segments_at_once_is_met_with_all_at_once(recording: Path, tmp_path: Path):
    other = tmp_path / "other.yaml"
    text = drafted(BATCHED, recording, tmp_path).text
    other.write_text(text.replace("amin: 1.0e-08", "amin: 1.0e-02"))
    lines = line_of(text, "- decibel"), line_of(BATCHED, "amplitude_to_DB")
    train, pipeline = sides_of(program(tmp_path, BATCHED), str(other))
    for pair, expected in (((train, pipeline), lines[0]), ((pipeline, train), lines[1])):
        compared = compare(*pair, recording)
        assert compared.same and [cause.parting.site.line for cause in compared.causes] == [expected]
    train.close()
    pipeline.close()


def test_a_pipelines_events_are_its_stages_with_their_parameters(recording: Path):
    with PipelineSide(COUGH) as side:
        trace = side.run(recording)
        plain = side.run(recording, plain=True)
    assert trace.outputs == plain.outputs and not plain.events
    expected = Pipeline.from_yaml(COUGH)(recording.read_bytes()).numpy()
    assert trace.outputs[0].digest == measure(expected).digest and trace.outputs[0].shape == expected.shape
    segments = [event for event in trace.events if event.operation == "highpass"]
    assert len(segments) == 1 and segments[0].call is not None
    assert segments[0].call.function == "skewless.core.stages.waveform.Highpass"
    assert dict(segments[0].call.arguments) == {"cutoff_hz": "50.0", "q": "0.707"}
    assert segments[0].call.given == ("cutoff_hz", "q")
    assert segments[0].site.text == "highpass: {cutoff_hz: 50.0, q: 0.707}"
    mels = [event for event in trace.events if event.operation == "mel"]
    assert [event.occurrence for event in mels] == list(range(len(expected)))
    assert trace.sources == {"pipeline.yaml": COUGH.read_text()} and "torchaudio" in trace.versions


def test_arrays_beyond_the_memory_are_noted(recording: Path):
    with PipelineSide(COUGH, memory=2**20) as side:
        trace = side.run(recording)
    assert sum(array.nbytes for array in trace.arrays.values()) <= 2**20
    assert any("more arrays than fit into memory" in note for note in trace.notes)


def test_values_that_a_stage_cannot_take_are_refused(recording: Path, train: TracedFunction, tmp_path: Path):
    with PipelineSide(COUGH) as side:
        trace = side.run(recording)
        mel = next(event for event in trace.events if event.operation == "mel")
        with pytest.raises(ProgramError, match=r"pipeline\.yaml:10 \(mel\) cannot take the value"):
            side.run(recording, {(mel.site, 0): {"": np.zeros((7, 5), np.float32)}})
        foreign = train.run(recording).events[0].site
        with pytest.raises(ProgramError, match=r"has no stage at train\.py"):
            side.run(recording, {(foreign, 0): {"": np.zeros(3)}})
        with pytest.raises(ProgramError, match=r"cannot take text\.wav: not a known audio format"):
            (tmp_path / "text.wav").write_text("no audio")
            side.run(tmp_path / "text.wav")
        with pytest.raises(ProgramError, match="cannot take gone"):
            side.run(tmp_path / "gone.wav")


def test_what_an_argument_names(recording: Path, train: TracedFunction, tmp_path: Path):
    train.run(recording, plain=True).write(tmp_path / "train.trace")
    for text, kind in (
        (program(tmp_path, TRAIN), TracedFunction),
        (str(tmp_path / "train.trace"), Recorded),
        (str(COUGH), PipelineSide),
        (str(COUGH.parent), PipelineSide),
    ):
        side = side_of(text)
        side.close()
        assert type(side) is kind


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training", "'training' names no program: write FILE.py:function, a trace"),
        ("train.py", "write FILE.py:function"),
        ("gone.yaml", "there is no file gone.yaml"),
        ("gone.mar", "no such archive"),
        (".", "has no pipeline.yaml, so it is no model's folder"),
    ],
)
def test_what_names_no_program_is_refused(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        side_of(text)


def test_an_archive_is_unpacked_while_it_is_used(recording: Path, tmp_path: Path):
    path = tmp_path / "cough.mar"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(COUGH, "pipeline.yaml")
    side = PipelineSide(path)
    trace = side.run(recording)
    side.close()
    with PipelineSide(COUGH) as same:
        assert trace.outputs == same.run(recording).outputs


@pytest.mark.parametrize(
    ("member", "message"), [("model.yaml", "it has no pipeline.yaml"), ("../pipeline.yaml", "no name inside a folder")]
)
def test_an_archive_that_is_none_is_refused(member: str, message: str, tmp_path: Path):
    path = tmp_path / "odd.mar"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, "name: x")
    with pytest.raises(UsageError, match=message):
        PipelineSide(path)


def test_statistics_come_from_the_checkpoint(tmp_path: Path):
    with pytest.raises(
        UsageError, match=r"standard_scaler.*lacks the statistics of a training set; give the checkpoint"
    ):
        PipelineSide(TALENT)
    definition = Pipeline.from_yaml(TALENT / "pipeline.yaml").to_dict()
    unfitted = dict(definition, stages=list(definition["stages"]))
    definition["stages"][-1] = {"standard_scaler": {"mean": [0.5] * 37, "std": [2.0] * 37}}
    for name, pipeline in (("best.pth", definition), ("empty.pth", unfitted)):
        fingerprint = Pipeline.from_dict(pipeline).fingerprint
        empty = "model_state_dict network postprocess code validation_scores stage_sources stage_outputs"
        checkpoint: dict[str, object] = {key: {} for key in empty.split()}
        save_checkpoint(
            tmp_path / name,
            {**checkpoint, "epoch": 1, "history": [], "pipeline": pipeline, "pipeline_fingerprint": fingerprint},
        )
    with PipelineSide(TALENT, tmp_path / "best.pth") as side:
        assert side.pipeline.stages["standard_scaler"].params() == {"mean": [0.5] * 37, "std": [2.0] * 37}
    with pytest.raises(UsageError, match="has none either"):
        PipelineSide(TALENT, tmp_path / "empty.pth")


def test_a_stage_that_is_written_once_and_used_twice_is_refused(tmp_path: Path):
    path = tmp_path / "pipeline.yaml"
    path.write_text("name: x\nstages:\n  - decode: {}\n  - &again\n    peak_normalize: {}\n  - *again\n")
    with pytest.raises(UsageError, match="written once and used twice"):
        PipelineSide(path)
