"""scikit-learn's StandardScaler from files of pickle and joblib: the same scaled features, and nothing of a file runs."""

from __future__ import annotations

import gzip
import os
import pickle
import random
import struct
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import sklearn
import torch
from joblib.numpy_pickle import NumpyPickler
from numpy.typing import NDArray
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import LabelEncoder, MinMaxScaler, RobustScaler, StandardScaler

from skewless.core.definition import Definition
from skewless.core.pipeline import Pipeline
from skewless.core.stages import Signal
from skewless.core.stages.voice import FEATURES
from skewless.importers import pickled, pickled_arrays
from skewless.importers.agreement import check_servable
from skewless.importers.errors import ImportFileError
from skewless.importers.scaler import FittedScaler, read_scaler, with_scaler
from skewless.training.checkpoint import file_digest
from tests.conftest import ROOT

TALENT = Definition.read(ROOT / "archive" / "talent")
# As the public script behind the document names its features, and orders them.
COLUMNS = [f"mfcc_{statistic}_{k}" for statistic in ("mean", "std") for k in range(13)]
COLUMNS += [
    f"{kind}_{s}" for kind in ("spectral_centroid", "spectral_rolloff", "zcr", "rms", "chroma") for s in ("mean", "std")
]
COLUMNS += ["tempo_0"]


def features(rows: int = 40, seed: int = 0) -> NDArray[np.float64]:
    """Of very different sizes, as a voice's are, around 37 means; a seed changes the rows only."""
    spread = np.random.default_rng(9)
    sizes, means = 10.0 ** spread.uniform(-3, 4, 37), spread.uniform(-300, 300, 37)
    return np.random.default_rng(seed).standard_normal((rows, 37)) * sizes + means


def fitted(**changes: Any) -> StandardScaler:
    """A scaler with some of its attributes changed."""
    scaler = StandardScaler().fit(features())
    vars(scaler).update(changes)
    return scaler


def pickled_to(path: Path, value: Any, protocol: int | None = None) -> Path:
    path.write_bytes(pickle.dumps(value, protocol))
    return path


def scaled(scaler: FittedScaler, data: NDArray) -> NDArray[np.float32]:
    """What the stage `standard_scaler` makes of features, once it has the scaler's statistics."""
    definition, _ = with_scaler(TALENT, scaler)
    return definition.pipeline.stages["standard_scaler"](Signal(torch.from_numpy(data))).data.numpy()


# --- every way to save one


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("how", ["pickle", "joblib", "zlib", "gzip", "bz2", "lzma", "xz"])
def test_every_kind_of_file_gives_the_statistics(tmp_path: Path, protocol: int, how: str):
    theirs = StandardScaler().fit(pd.DataFrame(features(), columns=COLUMNS))
    path = tmp_path / "scaler.pkl"
    if how == "pickle":
        pickled_to(path, theirs, protocol)
    else:
        joblib.dump(theirs, path, compress=0 if how == "joblib" else (how, 3), protocol=protocol)
    found = read_scaler(path)
    assert (found.mean, found.std) == (tuple(theirs.mean_.tolist()), tuple(theirs.scale_.tolist()))
    assert (found.features, found.constant, found.version) == (tuple(COLUMNS), (), sklearn.__version__)
    assert found.sha256 == file_digest(path)


def test_names_of_earlier_versions_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """numpy 1, scikit-learn before 0.22 and the joblib in it, and joblib before 1.2, which did not align arrays."""
    theirs = fitted()
    data = pickle.dumps(theirs, 2)
    old = data.replace(b"numpy._core.", b"numpy.core.").replace(b"preprocessing._data", b"preprocessing.data")
    assert len(data) - len(old) >= 3
    (tmp_path / "old.pkl").write_bytes(old)
    assert read_scaler(tmp_path / "old.pkl").std == tuple(theirs.scale_.tolist())
    create = NumpyPickler._create_array_wrapper

    def unaligned(self: NumpyPickler, array: NDArray) -> Any:
        wrapper = create(self, array)
        del wrapper.numpy_array_alignment_bytes
        return wrapper

    monkeypatch.setattr(NumpyPickler, "_create_array_wrapper", unaligned)
    joblib.dump(theirs, tmp_path / "old.joblib", protocol=2)
    data = (tmp_path / "old.joblib").read_bytes()
    old = data.replace(b"cjoblib.numpy_pickle\n", b"csklearn.externals.joblib.numpy_pickle\n")
    assert old != data
    (tmp_path / "old.joblib").write_bytes(old)
    assert read_scaler(tmp_path / "old.joblib").std == tuple(theirs.scale_.tolist())


def with_gaps() -> StandardScaler:
    """Then it counts its samples feature by feature."""
    data = features()
    data[3, 5] = data[7, 5] = np.nan
    return StandardScaler().fit(data)


def constant() -> StandardScaler:
    """One feature exactly the same, one as good as the same: the latter's variance is not 0."""
    data = features()
    data[:, 4] = 7.5
    data[::2, 9], data[1::2, 9] = 1e9, np.nextafter(1e9, np.inf)
    scaler = StandardScaler().fit(data)
    assert scaler.scale_[9] == 1 and scaler.var_[9] > 0
    return scaler


SCALERS: dict[str, Callable[[], StandardScaler]] = {
    "plain": fitted,
    "not centred": lambda: StandardScaler(with_mean=False).fit(features()),
    "not scaled": lambda: StandardScaler(with_std=False).fit(features()),
    "neither": lambda: StandardScaler(with_mean=False, with_std=False).fit(features()),
    "sparse": lambda: StandardScaler(with_mean=False).fit(scipy.sparse.csr_matrix(features())),
    "in parts": lambda: StandardScaler().partial_fit(features()[:9]).partial_fit(features()[9:]),
    "weighted": lambda: StandardScaler().fit(features(), sample_weight=np.linspace(0.1, 1, 40)),
    "float32": lambda: StandardScaler().fit(features().astype(np.float32)),
    "gaps": with_gaps,
    "constant": constant,
    "big-endian": lambda: fitted(mean_=fitted().mean_.astype(">f8")),
    "in its own format": lambda: StandardScaler().set_output(transform="pandas").fit(features()),
}


@pytest.mark.parametrize("name", SCALERS)
@pytest.mark.parametrize("save", [pickled_to, lambda path, value: joblib.dump(value, path)], ids=["pickle", "joblib"])
def test_scaled_features_are_scikit_learns(tmp_path: Path, name: str, save: Callable):
    """Bit for bit: both subtract and divide in float64, and what a network takes is that, rounded to float32."""
    theirs = SCALERS[name]()
    save(tmp_path / "scaler", theirs)
    found = read_scaler(tmp_path / "scaler")
    assert found.constant == ((4, 9) if name == "constant" else ())
    data = features(rows=30, seed=1)
    want = (
        theirs.transform(scipy.sparse.csr_matrix(data)).toarray()
        if name == "sparse"
        else np.asarray(theirs.transform(data))
    )
    np.testing.assert_array_equal(scaled(found, data), want.astype(np.float32))


def test_float32_features_are_within_their_rounding(tmp_path: Path):
    """scikit-learn then rounds the mean, the difference, the scale and the quotient to float32, we the quotient: half an eps
    each, 6e-8 of the number that is rounded."""
    theirs = fitted()
    data = features(rows=30, seed=1).astype(np.float32)
    got, want = scaled(read_scaler(pickled_to(tmp_path / "s", theirs)), data), theirs.transform(data)
    assert (np.abs(got - want) <= 2.0**-24 * (np.abs(theirs.mean_ / theirs.scale_) + 4.01 * np.abs(want))).all()


# --- what is no fitted StandardScaler, or contradicts itself

OF_SOMETHING_ELSE: dict[str, tuple[Any, str]] = {
    "MinMaxScaler": (MinMaxScaler().fit(features()), r"import 'sklearn\.preprocessing\._data\.MinMaxScaler'"),
    "RobustScaler": (RobustScaler().fit(features()), r"RobustScaler'\. Nothing of it ran\. Expected .* fitted StandardScaler"),
    "Pipeline": (make_pipeline(fitted()), r"import 'sklearn\.pipeline\.Pipeline'"),
    "LabelEncoder": (LabelEncoder().fit(["bad", "good"]), r"LabelEncoder'"),
    "bundle": ({"scaler": fitted()}, "it holds a dict"),
    "pair": ((fitted(), fitted()), "it holds a tuple"),
    "array": (np.ones(37), r"it holds a numpy\._core"),
    "not fitted": (StandardScaler(), "no mean_, scale_, var_: it was not fitted"),
    "NaN": (fitted(mean_=np.full(37, np.nan)), r"mean_ is nan for feature 0 \(counted from 0\)"),
    "infinite": (fitted(scale_=np.full(37, np.inf)), "scale_ is inf"),
    "zero": (fitted(scale_=np.zeros(37)), "scale_ is 0.0 and its var_"),
    "negative": (fitted(scale_=-fitted().scale_), "expected a positive"),
    "changed": (fitted(scale_=2 * fitted().scale_), "the root of its var_ .*: one of them was changed after fitting"),
    "shorter": (fitted(mean_=np.ones(36)), "mean_ has 36 numbers for 37 features"),
    "table": (fitted(mean_=np.ones((37, 1))), "another number of dimensions"),
    "list": (fitted(mean_=[1.0] * 37), "a list where an array is expected"),
    "objects": (fitted(mean_=np.array([1.0] * 37, dtype=object)), "bytes are expected|numbers of type 'O'"),
    "complex": (fitted(mean_=np.ones(37, complex)), "numbers of type 'c16'"),
    "dates": (fitted(mean_=np.ones(37, "M8[s]")), "numbers of type 'M8'"),
    "records": (fitted(mean_=np.ones(37, [("a", "f8")])), "numbers of type 'V8'"),
    "names": (fitted(feature_names_in_=np.array(COLUMNS[:36], dtype=object)), "names 36 features and was fitted to 37"),
    "other names": (fitted(feature_names_in_=np.arange(37)), "something else than texts"),
    "settings": (fitted(with_mean="yes"), "does not say with_mean"),
    "count": (fitted(n_features_in_=10**12), "does not say how many features"),
    "samples": (fitted(n_samples_seen_=np.ones(5)), "n_samples_seen_ has 5 numbers"),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_SOMETHING_ELSE)
@pytest.mark.parametrize("save", [pickled_to, lambda path, value: joblib.dump(value, path)], ids=["pickle", "joblib"])
def test_something_else_is_refused(tmp_path: Path, name: str, save: Callable):
    value, message = OF_SOMETHING_ELSE[name]
    save(tmp_path / "scaler.pkl", value)
    with pytest.raises(ImportFileError, match=rf"scaler\.pkl is not taken as a scaler: .*{message}"):
        read_scaler(tmp_path / "scaler.pkl")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "breaks off|exhausted"),
        (b"mean,std\n1,2\n", "no pickle"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"Git LFS pointer.*git lfs pull"),
        (b"PK\x03\x04 a zip", "no pickle"),
        (b"\x89HDF\r\n\x1a\n", "no pickle"),
        (b"\x04\x22\x4d\x18 lz4", r"lz4.*compress=0"),
        (b"\x78\x9c damaged", "compressed, and damaged"),
        (gzip.compress(pickle.dumps(1))[:-9], "compressed, and breaks off"),
        (pickle.dumps(fitted()) + pickle.dumps(LabelEncoder()), "goes on for .* bytes after its first value"),
        (b"\0" * (pickled_arrays.MAX_BYTES + 1), "4,194,305 bytes, more than 4,194,304 are not read"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_files_are_refused(tmp_path: Path, data: bytes, message: str):
    (tmp_path / "scaler.pkl").write_bytes(data)
    with pytest.raises(ImportFileError, match=message):
        read_scaler(tmp_path / "scaler.pkl")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(ImportFileError, match="there is no file"):
        read_scaler(tmp_path / "scaler.pkl")


@pytest.mark.parametrize("save", [pickled_to, lambda path, value: joblib.dump(value, path)], ids=["pickle", "joblib"])
def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path, save: Callable):
    path = tmp_path / "scaler.pkl"
    save(path, fitted(feature_names_in_=np.array(COLUMNS, dtype=object)))
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ImportFileError):
            read_scaler(path)


@pytest.mark.parametrize("save", [pickled_to, lambda path, value: joblib.dump(value, path)], ids=["pickle", "joblib"])
def test_damage_is_refused_or_leaves_a_scaler_that_agrees_with_itself(tmp_path: Path, save: Callable):
    path, generator, refused = tmp_path / "scaler.pkl", random.Random(0), 0
    save(path, fitted())
    data = path.read_bytes()
    for _ in range(300):
        damaged = bytearray(data)
        damaged[generator.randrange(len(data))] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            found = read_scaler(path)
        except ImportFileError:
            refused += 1
        else:
            assert len(found.mean) == len(found.std) and min(found.std) > 0 and np.isfinite(found.mean).all()
    assert refused > 100


# --- files that mean harm


class Evil:
    """Unpickling it touches a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


class Evaluated(Evil):
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"open({str(self.marker)!r}, 'w')",)


@pytest.mark.parametrize(("kind", "name"), [(Evil, "posix.system"), (Evaluated, "builtins.eval")])
@pytest.mark.parametrize("place", ["whole", "in it", "in a list", "in an array", "behind"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("write", [pickle.dumps, None], ids=["pickle", "joblib"])
def test_what_would_run_code_is_refused_by_name(
    tmp_path: Path, kind: type[Evil], name: str, place: str, protocol: int, write: Callable | None
):
    marker, path = tmp_path / "ran", tmp_path / "scaler.pkl"
    evil = kind(marker)
    array = np.empty(37, dtype=object)
    array[3] = evil
    value: Any = {
        "whole": evil,
        "in it": fitted(copy=evil),
        "in a list": [1, {"a": (evil,)}],
        "in an array": fitted(feature_names_in_=array),
        "behind": fitted(zzz=evil),
    }[place]
    if write is None:
        joblib.dump(value, path, protocol=protocol)
    else:
        path.write_bytes(write(value, protocol))
    with pytest.raises(ImportFileError, match=rf"import '{name}'\. Nothing of it ran"):
        read_scaler(path)
    assert not marker.exists()


def instructions(*parts: bytes) -> bytes:
    return b"".join(parts) + b"."


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


ARRAY = b"cnumpy._core.numeric\n_frombuffer\n"
FLOAT64 = (
    b"cnumpy\ndtype\n" + text("f8") + b"\x89\x88\x87R(K\x03" + text("<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
)
SCALER = b"csklearn.preprocessing._data\nStandardScaler\n)\x81"


def with_mean(mean: bytes) -> bytes:
    """A scaler whose mean_ is what these operations make."""
    flags = text("with_mean") + b"\x88" + text("with_std") + b"\x89"
    return instructions(SCALER, b"}(", flags, text("mean_"), mean, b"ub")


def nested(opening: bytes, closing: bytes, count: int) -> bytes:
    return opening * count + b"N" + closing * count


# What the file holds, and a part of the message.
HOSTILE: dict[str, tuple[bytes, str]] = {
    "an import alone": (instructions(b"cthis\ns\n"), "import 'this.s'"),
    "an import of a part": (instructions(b"cnumpy\nlib.npyio.load\n"), "import 'numpy.lib.npyio.load'"),
    "a name in two texts": (instructions(text("os"), text("system"), b"\x93"), "import 'os.system'"),
    "a class of old": (instructions(b"(ios\nsystem\n"), "the operation INST"),
    "another class of old": (instructions(b"(cnumpy\nndarray\no"), "the operation OBJ"),
    "keywords": (instructions(b"cnumpy\nndarray\n)}\x92"), "the operation NEWOBJ_EX"),
    "a persistent id": (instructions(b"Pid\n"), "the operation PERSID"),
    "an extension": (instructions(b"\x82\x01"), "the operation EXT1"),
    "a call of a text": (instructions(text("os.system"), b")R"), "no Named to work on"),
    "a call of a result": (instructions(SCALER, b")R"), "no Named to work on"),
    "a state for a list": (instructions(b"]}b"), "no Made to work on"),
    "a state set twice": (instructions(SCALER, b"}b}b"), "sets the state .* twice"),
    "bytes of 2^60": (instructions(b"\x8e" + struct.pack("<Q", 2**60)), "no pickle, or a damaged one"),
    "a bytearray of 2^60": (instructions(b"\x96" + struct.pack("<Q", 2**60)), "no pickle, or a damaged one"),
    "a text of 2^31": (instructions(b"X" + struct.pack("<I", 2**31)), "no pickle, or a damaged one"),
    "a frame of 2^60": (instructions(b"\x95" + struct.pack("<Q", 2**60), b"N"), "it holds a NoneType"),
    "a number of 2^31 bytes": (instructions(b"\x8b" + struct.pack("<i", 2**31 - 1)), "no pickle, or a damaged one"),
    "a number of many digits": (instructions(b"I" + b"9" * 10_000 + b"\n"), "no pickle, or a damaged one"),
    "a memory place of 2^32": (instructions(b"Nr" + struct.pack("<I", 2**32 - 1)), "it holds a NoneType"),
    "a memory place that is empty": (instructions(b"h\x07"), "no pickle, or a damaged one"),
    "an array of 10^9": (
        with_mean(ARRAY + b"(C\x08aaaaaaaa" + FLOAT64 + b"J\x00\xca\x9a\x3b\x85" + text("C") + b"tR"),
        "8 bytes for 1,000,000,000 numbers",
    ),
    "an array of 10^9 of joblib": (
        with_mean(
            b"cjoblib.numpy_pickle\nNumpyArrayWrapper\n)\x81}("
            + b"".join((text("shape"), b"J\x00\xca\x9a\x3b\x85", text("order"), text("C"), text("dtype"), FLOAT64))
            + b"ub"
        ),
        "breaks off .* before the end of an array",
    ),
    "a number of joblib's of 2^60 lengths": (
        with_mean(
            b"cjoblib.numpy_pickle\nNumpyArrayWrapper\n)\x81}("
            + b"".join((text("shape"), b"\x8a\x08\0\0\0\0\0\0\0\x40\x85", text("order"), text("C"), text("dtype"), FLOAT64))
            + b"ub"
        ),
        "Overflow|breaks off|no pickle, or a damaged one",
    ),
    # Of which each holds the one before it twice: 2^10000 values, if somebody walked through them.
    "lists of lists": (
        with_mean(b"(]q\0" + b"".join(b"](h%ch%ceq%c" % (k % 2, k % 2, (k + 1) % 2) for k in range(9999)) + b"l"),
        "a list where an array is expected",
    ),
    "a list of itself": (with_mean(b"]q\0h\0a"), "a list where an array is expected"),
    "tuples in tuples": (with_mean(nested(b"", b"\x85", 90_000)), "a tuple where an array is expected"),
    "lists in lists": (with_mean(nested(b"(", b"l", 40_000)), "a list where an array is expected"),
    "objects in objects": (with_mean(b"cnumpy\ndtype\n" * 10_000 + b")" + b"R\x85" * 9_999 + b"R"), "numpy.dtype where an array is expected"),
    "marks": (instructions(b"(" * 90_000), "no pickle, or a damaged one"),
    "a million values": (instructions(b"N" * 10**6), "more than 100,000 operations"),
    # 400,000 characters, each time in another encoding: 8 GB, if each were made.
    "a long text many times": (
        with_mean(
            b"(c_codecs\nencode\nq\1" + text("a" * 400_000) + b"q\0" + text("latin1") + b"q\2"
            + b"h\1h\0h\2\x86R" * 16_000 + b"l"
        ),
        "a list where an array is expected",
    ),
    "keys that collide": (
        instructions(b"}(", b"".join(b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"N" for k in range(1, 40_000)), b"u"),
        "something else than a text for a key",
    ),
    "zeros of 2^28 bytes": (zlib.compress(bytes(2**28)), "inflates from .* to more than 4,194,304 bytes"),
    "two values": (instructions(b"NN"), "ends with more than one value"),
    "a mark left": (instructions(b"N("), "an operation has no object to work on"),
    "another byte order": (with_mean(ARRAY + b"(C\x08aaaaaaaa" + FLOAT64.replace(text("<"), text("=")) + b"K\x01\x85" + text("C") + b"tR"), "numbers of type 'f8', expected f4, f8"),
    "nested bombs": (zlib.compress(zlib.compress(bytes(2**26))), "no pickle, or a damaged one"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_files_that_mean_harm_are_refused(tmp_path: Path, name: str):
    data, message = HOSTILE[name]
    path = tmp_path / "scaler.pkl"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ImportFileError, match=message):
            read_scaler(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64e6
    assert "this" not in sys.modules


def test_the_operations_above_are_those_of_a_pickle(tmp_path: Path):
    """The parts that the hostile files are made of are read where nothing is wrong with them."""
    one = ARRAY + b"(C\x08" + struct.pack("<d", 2.5) + FLOAT64 + b"K\x01\x85" + text("C") + b"tR"
    (tmp_path / "s").write_bytes(with_mean(one))
    assert read_scaler(tmp_path / "s").mean == (2.5,)


def test_nothing_that_reads_a_scaler_could_unpickle():
    for module in (pickled, pickled_arrays, sys.modules[read_scaler.__module__]):
        assert not {"pickle", "joblib", "sklearn", "importlib"} & set(vars(module))


# --- into the pipeline


def named(names: list[str]) -> FittedScaler:
    return FittedScaler((0.0,) * 37, (1.0,) * 37, tuple(names), (), "1.9.1", "")


def test_the_statistics_go_into_the_stage_without_any():
    definition, notes = with_scaler(TALENT, named([]))
    check_servable(definition.pipeline)
    stage = definition.pipeline.stages["standard_scaler"]
    assert (stage.mean, stage.std) == ((0.0,) * 37, (1.0,) * 37)
    assert TALENT.pipeline.with_fitted_stages_of(definition.pipeline).fingerprint == definition.pipeline.fingerprint
    assert notes == ["the scaler is scikit-learn 1.9.1's StandardScaler, fitted to 37 features"]


@pytest.mark.parametrize(
    "names",
    [COLUMNS, [*COLUMNS[:-1], "tempo"], [feature.name for feature in FEATURES]],
    ids=["their script", "their first script", "the stage's own"],
)
def test_features_in_the_pipelines_order_are_taken(names: list[str]):
    _, notes = with_scaler(TALENT, named(names))
    assert "the scaler's 37 features have the pipeline's order, by their names" in notes


def test_features_in_another_order_are_refused():
    swapped = [*COLUMNS[:28], COLUMNS[29], COLUMNS[28], *COLUMNS[30:]]
    message = r"feature 28 \(counted from 0\) is 'spectral_rolloff_std', the pipeline's is 'rolloff_mean' or 'spectral_rolloff_mean'"
    with pytest.raises(ImportFileError, match=message):
        with_scaler(TALENT, named(swapped))
    with pytest.raises(ImportFileError, match=r"feature 36 \(counted from 0\) is 'bpm'"):
        with_scaler(TALENT, named([*COLUMNS[:-1], "bpm"]))


def test_names_that_say_nothing_are_noted():
    _, notes = with_scaler(TALENT, named([f"x{k}" for k in range(37)]))
    assert any("called x0 to x36: whether that is the pipeline's order is not known" in note for note in notes)


def test_a_scaler_that_does_not_fit_is_refused(tmp_path: Path):
    few = StandardScaler().fit(features()[:, :36])
    with pytest.raises(ImportFileError, match="fitted to 36 features, and the network takes 37"):
        with_scaler(TALENT, read_scaler(pickled_to(tmp_path / "s", few)))
    again, _ = with_scaler(TALENT, named([]))
    for definition in (
        again,
        replace(TALENT, pipeline=Pipeline.from_yaml(ROOT / "archive" / "cough" / "pipeline.yaml")),
    ):
        with pytest.raises(ImportFileError, match=r"one stage standard_scaler without statistics; '\w+' has 0"):
            with_scaler(definition, named([]))


def test_the_message_without_a_scaler_names_the_option():
    with pytest.raises(
        ImportFileError, match=r"without the statistics of the training set.*StandardScaler as --scaler"
    ):
        check_servable(TALENT.pipeline)
