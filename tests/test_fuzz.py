"""Whatever the bytes, a reader gives a value or one of its documented errors, within bounded memory, and does nothing else.

Small valid files are damaged where their readers believe them (tests/hostile.py), and read in a process of its own
(tests/reading_process.py). The suite tries the same few hundred files of each kind every time. To look further, with other
files in every run: `SKEWLESS_FUZZ_EXAMPLES=20000 pytest tests/test_fuzz.py`.

What was found is kept in tests/findings/TARGET/ and read again by every run.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from handler.forms import request_of
from skewless.core.request import LONGEST_NAME, PAYLOAD_FIELDS, BatchRequest, Limits, Request, RequestError
from tests import hostile
from tests.reading_process import Acted, Guard, Reader, Target, outcome

FINDINGS = Path(__file__).parent / "findings"
_WANTED = os.environ.get("SKEWLESS_FUZZ_EXAMPLES")


def tried(examples: int) -> settings:
    """So many files, the same ones every time, unless a longer run is asked for."""
    return settings(
        max_examples=int(_WANTED or examples),
        derandomize=_WANTED is None,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink] if _WANTED else [Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


class Files:
    """Gives bytes to a reader under the name that it expects, in folders of their own."""

    NAMES: ClassVar[dict[str, str]] = {
        "safetensors": "weights.safetensors",
        "archive": "a-1.0.mar",
        "store": "a-1.0.mar",
        "references": "a-1.0.mar",
        "scored_archive": "a-1.0.mar",
        "manifest": "manifest.csv",
        "predictions": "predictions.csv",
        "list": "list.csv",
        "pipeline": "pipeline.yaml",
        "model": "model.yaml",
        "recipe": "recipe.yaml",
        "properties": "config.properties",
    }

    def __init__(self, folder: Path):
        self.folder = folder
        self.reader = Reader({target: self.write(target, data, "valid") for target, data in VALID.items()})

    def write(self, target: str, data: bytes, room: str = "hostile") -> Path:
        folder = self.folder / room / target
        if not folder.is_dir():
            folder.mkdir(parents=True)
            for number in range(12):
                (folder / f"{number}.wav").write_bytes(b"x")
        path = folder / self.NAMES.get(target, "file")
        path.write_bytes(data)
        return path

    def check(self, target: str, data: bytes) -> None:
        """Fail unless reading `data` gives a value or a documented error with a message."""
        path = self.write(target, data)
        answer = self.reader(target, path)
        if answer["kind"] == "fault" and _WANTED:
            kept = self.folder / f"fault-{target}"
            shutil.copyfile(path, kept)
            answer["text"] += f"\nkept as {kept}"
        assert answer["kind"] != "fault", answer["text"]


VALID = {
    "decode": hostile.AUDIO["WAV"].seeds()[1],
    "decode_image": hostile.PICTURES["PNG"].seeds()[0],
    "pytorch": hostile.pytorch_files()[0],
    "format": hostile.pytorch_files()[0],
    "keras": hostile.keras_files()[0],
    "pt2": hostile.pt2_file(),
    "safetensors": hostile.safetensors_files()[0],
    "checkpoint": hostile.saved(hostile.checkpoint_document()),
    "archive": hostile.zipped(hostile.archive_members()),
    "store": hostile.zipped(hostile.archive_members()),
    "references": hostile.zipped(hostile.archive_members()),
    "scored_archive": hostile.zipped(hostile.archive_members()),
    "manifest": hostile.manifest_csv(),
    "predictions": hostile.predictions_csv(),
    "list": hostile.predictions_csv(),
    "pipeline": hostile.pipeline_files()[0],
    "model": hostile.model_files()[0],
    "recipe": hostile.recipe_files()[0],
    "properties": (hostile.ROOT / "config.properties").read_bytes(),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Files]:
    made = Files(tmp_path_factory.mktemp("hostile"))
    yield made
    made.reader.close()


def test_every_seed_is_read(files: Files):
    """Else nothing but the first check of a reader would be tried."""
    seeds: dict[str, list[bytes]] = {target: [data] for target, data in VALID.items()} | {
        "decode": [seed for kind in hostile.AUDIO.values() for seed in kind.seeds()],
        "decode_image": [seed for kind in hostile.PICTURES.values() for seed in kind.seeds()],
        "pytorch": hostile.pytorch_files(),
        "keras": hostile.keras_files(),
        "pipeline": hostile.pipeline_files(),
        "model": hostile.model_files(),
        "recipe": hostile.recipe_files(),
    }
    for target, of in seeds.items():
        for seed in of:
            assert files.reader(target, files.write(target, seed))["kind"] == "value", (target, seed[:80])


@pytest.mark.parametrize("container", hostile.AUDIO)
def test_a_recording(files: Files, container: str):
    @tried(100)
    @given(hostile.AUDIO[container].damaged())
    def read(data: bytes) -> None:
        files.check("decode", data)

    read()


@pytest.mark.parametrize("container", hostile.PICTURES)
def test_a_picture(files: Files, container: str):
    @tried(100)
    @given(hostile.PICTURES[container].damaged())
    def read(data: bytes) -> None:
        files.check("decode_image", data)

    read()


IMPORTED: dict[str, tuple[st.SearchStrategy[bytes], int]] = {
    "pytorch": (hostile.pytorch(), 150),
    "keras": (hostile.keras(), 150),
    "pt2": (hostile.pt2(), 60),
    "checkpoint": (hostile.checkpoints(), 60),
    "safetensors": (hostile.Format(hostile.safetensors_files, rb'\A|"|\{|\}|:').damaged(), 100),
    "format": (hostile.Format(lambda: [*hostile.keras_files(), hostile.pt2_file()], hostile.ZIP).damaged(), 100),
}


@pytest.mark.parametrize("target", IMPORTED)
def test_a_trained_model(files: Files, target: str):
    strategy, examples = IMPORTED[target]

    @tried(examples)
    @given(strategy)
    def read(data: bytes) -> None:
        files.check(target, data)

    read()


@pytest.mark.parametrize("target", ["archive", "store", "references", "scored_archive"])
def test_an_archive(files: Files, target: str):
    @tried(100)
    @given(hostile.archives())
    def read(data: bytes) -> None:
        files.check(target, data)

    read()


TEXTS: dict[str, st.SearchStrategy[bytes]] = {
    "manifest": hostile.csv_texts(hostile.manifest_csv()),
    "predictions": hostile.csv_texts(hostile.predictions_csv()),
    "list": hostile.csv_texts(hostile.predictions_csv()),
    "pipeline": hostile.yaml_texts(hostile.pipeline_files()),
    "model": hostile.yaml_texts(hostile.model_files()),
    "recipe": hostile.yaml_texts(hostile.recipe_files()),
    "properties": hostile.properties_texts(),
}


@pytest.mark.parametrize("target", TEXTS)
def test_a_text(files: Files, target: str):
    @tried(150)
    @given(TEXTS[target])
    def read(data: bytes) -> None:
        files.check(target, data)

    read()


FOUND = sorted(path.relative_to(FINDINGS).as_posix() for path in FINDINGS.rglob("*") if path.is_file())


@pytest.mark.parametrize("finding", FOUND)
def test_what_was_found_before(files: Files, finding: str):
    files.check(finding.partition("/")[0], (FINDINGS / finding).read_bytes())


# Files that stand for gigabytes.


@lru_cache(maxsize=1)
def _gigabytes() -> bytes:
    """2 GiB of zeros as DEFLATE has them: one part of 16 MiB, over and over."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    part = packer.compress(bytes(2**24)) + packer.flush(zlib.Z_FULL_FLUSH)
    return part * 128 + packer.flush()


def _inflating(name: str) -> bytes:
    """An archive whose member `name` is 2 GiB of zeros."""
    members = hostile.archive_members() | {name: _gigabytes()}
    data = bytearray(hostile.zipped(members))
    for signature, at in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        named = 30 if signature[2] == 3 else 46
        for found in re.finditer(re.escape(signature), bytes(data)):
            if data[found.start() + named :].startswith(name.encode()):
                data[found.start() + at : found.start() + at + 2] = (8).to_bytes(2, "little")
                size = found.start() + at + 14
                data[size : size + 4] = (2**31).to_bytes(4, "little")
    return bytes(data)


def _laughs() -> bytes:
    """A list of twelve values, of which the last stands for 10^11 of them."""
    values = [b"&a%d [%s]" % (k, b", ".join([b"*a%d" % (k - 1)] * 9)) for k in range(1, 12)]
    return b"[" + b", ".join([b"&a0 [x, x, x]", *values]) + b"]"


BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "manifest of an archive": ("archive", lambda: _inflating(hostile.MANIFEST_FILE)),
    "metrics of an archive": ("store", lambda: _inflating(hostile.METRICS_FILE)),
    "reference in an archive": ("references", lambda: _inflating("references/01.wav")),
    "model.yaml of an archive": ("scored_archive", lambda: _inflating("model.yaml")),
    "configuration of a Keras model": ("keras", lambda: _inflating("config.json")),
    "files in an archive": ("archive", lambda: hostile.zipped([(f"{k}", b"") for k in range(20_000)])),
    "aliases in a pipeline": ("pipeline", lambda: b"name: x\nstages: [resample: {rate: " + _laughs() + b"}]\n"),
    "aliases in a model.yaml": ("model", lambda: hostile.model_files()[0] + b"\nfast_runtime: " + _laughs() + b"\n"),
    "a long pipeline": ("pipeline", lambda: b"name: x\nstages:\n" + b"- decode: {}\n" * 100_000),
    "a long line of a manifest": ("manifest", lambda: b"file_path,label\n" + b"x" * 10_000_000),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_before_it_grows(files: Files, bomb: str):
    target, made = BOMBS[bomb]
    answer = files.reader(target, files.write(target, made()))
    assert answer["kind"] != "fault", answer["text"]
    if target == "store":
        assert "is not a model archive (.mar) that can be used" in answer["text"]
    else:
        assert answer["kind"] == "refusal", answer["text"]


# What callers send.

LIMITS = Limits(max_bytes=2000, max_files=5)
_FILE = b"RIFF....WAVE" + bytes(range(256))
_CODED = base64.b64encode(_FILE).decode()
_texts = st.sampled_from([each for each in hostile.NASTY if isinstance(each, str)]) | st.text(max_size=20)
_coded = st.sampled_from(
    [
        _CODED,
        _CODED[:-1],
        f"data:audio/wav;base64,{_CODED}",
        f"data:,{_CODED}",
        f" {_CODED}\n",
        _CODED.replace("+", " "),
        "",
    ]
)
_thresholds = st.sampled_from(
    ["0.5", "nan", "inf", "-1", "1e-400", "0x1", "٠", " 1 ", "1_0", "", "9" * 5000, 0.5, 1, True, None, []]
)
_field_names = st.sampled_from(
    [*PAYLOAD_FIELDS, "threshold", "files", "files[]", "files.", "files.a", "files.b"]
) | _texts.map(lambda name: f"files.{name}")
_json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | _coded | _texts, lambda inner: st.lists(inner, max_size=3)
)
_documents = st.dictionaries(
    st.sampled_from([*PAYLOAD_FIELDS, "threshold", "files"]) | _texts,
    _json_values | _thresholds | st.dictionaries(_texts, _coded | _json_values, max_size=4),
    max_size=4,
)


@st.composite
def _written(draw: st.DrawFn) -> bytes:
    """JSON as a caller may write it: with a byte-order mark, cut short, with one key twice, or nested without end."""
    text = json.dumps(draw(_documents), ensure_ascii=draw(st.booleans()))
    text = draw(st.sampled_from([text, text[:-1], "\ufeff" + text, text + "x", text * 2, "[" * 5000, '{"a":' * 3000]))
    text = text.replace('"data"', '"audio"') if draw(st.booleans()) else text
    return text.encode(draw(st.sampled_from(["utf-8", "utf-16"])), "surrogatepass")


_contents = st.sampled_from([_FILE, b"", bytes(2001)]) | st.binary(max_size=40) | _written()
_fields = st.dictionaries(
    _field_names,
    _contents | _contents.map(bytearray) | _texts | _documents | _thresholds.map(lambda each: str(each).encode()),
    max_size=7,
)
_headers = st.dictionaries(
    st.sampled_from(["X-Threshold", "x-threshold", "Content-Type", "Content-Length", "describe", "data"]) | _texts,
    _texts
    | _thresholds
    | st.sampled_from(["multipart/form-data; boundary=x", "application/json", "9" * 30, "-1", "100"])
    | _documents,
    max_size=4,
)


@tried(1000)
@given(_fields, _headers)
@example({"data": b'{"files": {"\\ud800": ""}}'}, {})
@example({"data": b'{"data": "' + _CODED.encode() + b'", "threshold": ' + b"9" * 5000 + b"}"}, {})
def test_a_request(fields: dict[str, Any], headers: dict[str, Any]):
    check_request(request_of(fields, headers, LIMITS))


def check_request(request: Request | BatchRequest | RequestError) -> None:
    if isinstance(request, RequestError):
        check_refusal(request)
        return
    assert request.threshold is None or 0 <= request.threshold <= 1
    if isinstance(request, Request):
        assert type(request.payload) is bytes and 0 < len(request.payload) <= LIMITS.max_bytes
        return
    assert 1 <= len(request.files) <= LIMITS.max_files
    for name, content in request.files.items():
        assert 0 < len(name) <= LONGEST_NAME
        json.dumps({name: 0}, ensure_ascii=False).encode("utf-8")
        if isinstance(content, RequestError):
            check_refusal(content)
        else:
            assert type(content) is bytes and 0 < len(content) <= LIMITS.max_bytes


def check_refusal(error: RequestError) -> None:
    assert error.status in (400, 413, 415)
    assert error.message.strip() and len(error.message) < 2500
    error.message.encode("utf-8")


def test_the_reading_process_tells_an_act_from_a_refusal(files: Files, tmp_path: Path):
    """The harness itself: a file that is written, and a death, are faults."""

    def writes(path: Path) -> None:
        (path / "written").write_text("x")

    def dies(path: Path) -> None:
        raise KeyError("no")

    guard = Guard(scratch="/nowhere")
    sys.addaudithook(guard)
    assert "Acted" in outcome(Target(writes, (Exception,)), tmp_path, guard)["text"]
    assert not (tmp_path / "written").exists()
    assert outcome(Target(dies, (ValueError,)), tmp_path, guard)["kind"] == "fault"
    assert outcome(Target(dies, (KeyError,)), tmp_path, guard) == {"kind": "refusal", "text": "'no'"}
    assert issubclass(Acted, BaseException) and not issubclass(Acted, Exception)
