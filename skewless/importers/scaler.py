"""scikit-learn's `StandardScaler`, read as data from a file of pickle's or joblib's, for the stage `standard_scaler`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skewless.core.definition import Definition
from skewless.core.networks import NETWORKS
from skewless.core.pipeline import Pipeline
from skewless.core.stages.voice import StandardScaler, VoiceFeatures, describe
from skewless.importers.errors import ImportFileError
from skewless.importers.pickled import Made
from skewless.importers.pickled_arrays import numbers, read_pickled, texts
from skewless.training.checkpoint import file_digest

# scikit-learn before 0.22 called the module otherwise.
_CLASSES = ("sklearn.preprocessing._data.StandardScaler", "sklearn.preprocessing.data.StandardScaler")
_EPSILON = float(np.finfo(np.float64).eps)

# What scripts around librosa call the features of the stage `voice_features`, by the stage's own names.
_PREFIXES = {"centroid": "spectral_centroid", "rolloff": "spectral_rolloff", "zero_crossing": "zcr"}


@dataclass(frozen=True)
class FittedScaler:
    """What a scaler's file says.

    mean, std: per feature; scaled is (x - mean) / std. A scaler without centring has the mean 0, one without scaling std 1.
    features: the features' names, empty where it was fitted to an array without names. constant: features, counted from 0,
    that were the same in all of the training set, which scikit-learn leaves at their own scale. version: scikit-learn's,
    empty where it is not said. sha256: of the file.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    features: tuple[str, ...]
    constant: tuple[int, ...]
    version: str
    sha256: str


def read_scaler(path: str | Path) -> FittedScaler:
    """A fitted StandardScaler, alone in a file of pickle or joblib (uncompressed, or by zlib, gzip, bz2, lzma or xz).

    No code of the file runs, and neither pickle, joblib nor scikit-learn is asked to load it.
    Raises ImportFileError for a file of something else, and for statistics that are missing, not finite or contradictory.
    """
    path = Path(path)
    if not path.is_file():
        raise ImportFileError(f"there is no file {path}")
    try:
        value = read_pickled(path, _CLASSES)
        if not isinstance(value, Made) or value.function not in _CLASSES:
            raise ImportFileError(f"it holds a {value.function if isinstance(value, Made) else type(value).__name__}")
        if type(value.state) is not dict:
            raise ImportFileError("it holds a StandardScaler without its attributes")
        return _fitted(value.state, file_digest(path))
    except (ValueError, OverflowError) as error:
        raise ImportFileError(
            f"{path} is not taken as a scaler: {error}. Nothing of it ran. Expected is scikit-learn's fitted StandardScaler, "
            "alone in a file: pickle.dump(scaler, file) or joblib.dump(scaler, path). Anything else that computes (x - mean) / std "
            "can be written into the stage standard_scaler of a pipeline file, as mean and std"
        ) from error


def with_scaler(definition: Definition, scaler: FittedScaler) -> tuple[Definition, list[str]]:
    """The definition with the scaler's statistics in its stage `standard_scaler`, and what there is to note.

    The stage computes as scikit-learn's `transform` does on float64 features: the same float64 bits, which it then rounds to
    float32 once, as Keras does with what it is given. On float32 features `transform` rounds mean and difference to float32.
    Raises ImportFileError where there is no one such stage without statistics, where the network takes another number of
    features, and where the scaler names its features in another order than the pipeline computes them in.
    """
    pipeline = definition.pipeline
    stages = [name for name in pipeline.unfitted if isinstance(pipeline.stages[name], StandardScaler)]
    if len(stages) != 1:
        raise ImportFileError(
            f"--scaler is for a pipeline with one stage standard_scaler without statistics; '{pipeline.name}' has {len(stages)}"
        )
    name, parameters = NETWORKS.split(definition.network)
    if name == "mlp" and parameters["inputs"] != len(scaler.mean):
        raise ImportFileError(
            f"the scaler was fitted to {len(scaler.mean)} features, and the network takes {parameters['inputs']}"
        )
    by = f"scikit-learn {scaler.version}'s" if scaler.version else "scikit-learn's"
    notes = [f"the scaler is {by} StandardScaler, fitted to {len(scaler.mean)} features"]
    notes += _check_order(pipeline, stages[0], scaler.features)
    if scaler.constant:
        listed = ", ".join(map(str, scaler.constant))
        notes.append(
            f"feature {listed} (counted from 0) was the same in all of the scaler's training set; it is not "
            "scaled, as scikit-learn does"
        )
    fitted = pipeline.replace(**{stages[0]: StandardScaler(mean=scaler.mean, std=scaler.std)})
    return replace(definition, pipeline=fitted), notes


def _fitted(state: Mapping[str, Any], sha256: str) -> FittedScaler:
    centred, scaled = (state.get(name) for name in ("with_mean", "with_std"))
    if type(centred) is not bool or type(scaled) is not bool:
        raise ImportFileError("its StandardScaler does not say with_mean and with_std")
    needed = [name for name, used in (("mean_", centred), ("scale_", scaled), ("var_", scaled)) if used]
    if missing := [name for name in needed if state.get(name) is None]:
        raise ImportFileError(f"its StandardScaler has no {', '.join(missing)}: it was not fitted")
    found = {name: numbers(state[name]) for name in ("mean_", "scale_", "var_") if state.get(name) is not None}
    count = _count(state, found)
    for name, values in found.items():
        if len(values) != count:
            raise ImportFileError(f"its {name} has {len(values)} numbers for {count} features")
        if len(bad := np.flatnonzero(~np.isfinite(values))):
            raise ImportFileError(f"its {name} is {values[bad[0]]} for feature {bad[0]} (counted from 0)")
    names = state.get("feature_names_in_")
    features = () if names is None else texts(names)
    if features and len(features) != count:
        raise ImportFileError(f"it names {len(features)} features and was fitted to {count}")
    constant = _constant(found, numbers(state.get("n_samples_seen_", 0))) if scaled else ()
    version = state.get("_sklearn_version", "")
    return FittedScaler(
        mean=tuple(found["mean_"].tolist()) if centred else (0.0,) * count,
        std=tuple(found["scale_"].tolist()) if scaled else (1.0,) * count,
        features=features,
        constant=constant,
        version=version if type(version) is str else "",
        sha256=sha256,
    )


def _count(state: Mapping[str, Any], found: Mapping[str, NDArray[np.float64]]) -> int:
    """How many features; scikit-learn before 0.24 does not say it apart from the statistics."""
    count = state.get("n_features_in_", len(next(iter(found.values()), ())))
    if type(count) is not int or not 0 < count <= 100_000:
        raise ImportFileError("its StandardScaler does not say how many features it was fitted to")
    return count


def _constant(found: Mapping[str, NDArray[np.float64]], seen: NDArray[np.float64]) -> tuple[int, ...]:
    """The features that scikit-learn takes for constant and gives the scale 1.

    Everywhere else the scale is the root of the variance. "Constant" is a variance within the error of computing it:
    sklearn.preprocessing._data._is_constant_feature; before 0.24, a root below ten times float64's epsilon.
    Raises ImportFileError for a scale that is neither: it was changed after fitting.
    """
    scale, variance = found["scale_"], found["var_"]
    mean = found.get("mean_", np.zeros(len(scale)))
    if len(bad := np.flatnonzero((scale <= 0) | (variance < 0))):
        raise ImportFileError(
            f"its scale_ is {scale[bad[0]]} and its var_ {variance[bad[0]]} for feature {bad[0]} (counted from 0), expected a "
            "positive and a non-negative number"
        )
    if len(seen) not in (1, len(scale)):
        raise ImportFileError(f"its n_samples_seen_ has {len(seen)} numbers for {len(scale)} features")
    root = np.sqrt(variance)
    with np.errstate(over="ignore"):
        error = seen * _EPSILON * variance + (seen * mean * _EPSILON) ** 2
    constant = (scale == 1) & ((variance <= error) | (root < 10 * _EPSILON))
    # A root in float64 is exact; the room is for statistics that somebody has stored in float32.
    if len(bad := np.flatnonzero(~constant & ~np.isclose(scale, root, rtol=1e-6, atol=0))):
        raise ImportFileError(
            f"its scale_ is {scale[bad[0]]} for feature {bad[0]} (counted from 0), and the root of its var_ {root[bad[0]]}: "
            "one of them was changed after fitting"
        )
    return tuple(np.flatnonzero(constant).tolist())


def _check_order(pipeline: Pipeline, scaler: str, given: Sequence[str]) -> list[str]:
    """Hold the scaler's names of features against what the stage before it computes."""
    if not given:
        return []
    names = list(pipeline.stages)
    before = pipeline.stages[names[names.index(scaler) - 1]]
    known = [_aliases(feature.name) for feature in describe(before.n_mfcc)] if isinstance(before, VoiceFeatures) else []
    if not any(name in aliases for name in given for aliases in known):
        return [
            f"the scaler's features are called {given[0]} to {given[-1]}: whether that is the pipeline's order is not known"
        ]
    if len(known) != len(given):
        raise ImportFileError(f"the scaler names {len(given)} features, and the pipeline computes {len(known)}")
    for position, (name, aliases) in enumerate(zip(given, known, strict=True)):
        if name not in aliases:
            raise ImportFileError(
                f"the scaler was fitted to features in another order: its feature {position} (counted from 0) is {name!r}, the "
                f"pipeline's is {' or '.join(map(repr, aliases))}. Its statistics would go to the wrong ones: fit it, and "
                "train the network, on columns in the pipeline's order, or write a stage of your own that computes them in "
                "the scaler's"
            )
    return [f"the scaler's {len(given)} features have the pipeline's order, by their names"]


def _aliases(name: str) -> tuple[str, ...]:
    """A feature's name in the stage `voice_features`, and in scripts around librosa."""
    if name == "tempo":
        return ("tempo", "tempo_0")
    kind, _, statistic = name.rpartition("_")
    if kind.startswith("mfcc_"):
        return (name, f"mfcc_{statistic}_{kind.removeprefix('mfcc_')}")
    return (name, f"{_PREFIXES.get(kind, kind)}_{statistic}")
