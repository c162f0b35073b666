"""Checkpoints that another training script wrote: read without running code, held against what they record.

Such a file has weights, at best the configuration and the validation AUC beside them, but not the preprocessing they
were trained behind. That has to be said by whoever imports it; `compare` shows which pipeline reproduces the record.
"""

from __future__ import annotations

import csv
import io
import pickle
import re
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from skewless.core.definition import Definition
from skewless.core.numerics import TOLERANCES
from skewless.core.pipeline import Pipeline
from skewless.evaluation.references import MIN_REFERENCE_SPREAD
from skewless.evaluation.scores import predict, service_of
from skewless.training.cache import UnreadableRecordings
from skewless.training.checkpoint import CheckpointError, file_digest, load_checkpoint, network_of, save_checkpoint
from skewless.training.manifest import Recording

# What the parameters of a pipeline and a network are called in the training scripts that wrote such files.
_PIPELINE_NAMES = {
    "sample_rate": ("resample", "rate"),
    "segment_duration": ("segment", "duration_s"),
    "hop_length": ("segment", "hop_s"),
    "max_segments_per_file": ("segment", "max_segments"),
    "n_fft": ("mel", "n_fft"),
    "hop_length_fft": ("mel", "hop_length"),
    "n_mels": ("mel", "n_mels"),
    "f_min": ("mel", "f_min"),
    "f_max": ("mel", "f_max"),
}
_NETWORK_NAMES = ("attn_hidden", "dropout")

# Added by nn.DataParallel and by torch.compile.
_PREFIXES = ("module.", "_orig_mod.")

# AUCs closer than this are not told apart: records are rounded to four digits, and a GPU's arithmetic reorders pairs.
_AUC_NOISE = 5e-4


class LegacyError(CheckpointError):
    """A file that cannot be imported; the message says what is wrong with it and what to do."""


@dataclass(frozen=True)
class Legacy:
    """What a file says: its weights by name, without prefixes; epoch and val_auc are None where it has none."""

    sha256: str
    weights: dict[str, torch.Tensor]
    epoch: int | None
    val_auc: float | None
    config: dict[str, Any]


class _NumpyDtype:
    """Stands in for numpy.dtype while a file is read: numpy's own would act on any state that the file gives it."""

    def __init__(self, code: str, *_: Any):
        if code not in ("f4", "f8", "i4", "i8"):
            raise pickle.UnpicklingError(f"it holds a numpy scalar of type {code!r}; save plain Python numbers")
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        if order not in ("<", ">"):
            raise pickle.UnpicklingError(f"it holds a numpy scalar of byte order {order!r}, expected '<' or '>'")
        self.code = order + self.code


def _numpy_scalar(dtype: _NumpyDtype, data: bytes) -> float | int:
    """A numpy scalar's pickled parts as a plain Python number."""
    return np.frombuffer(data, dtype.code).item()


_SAFE_GLOBALS = [
    (_NumpyDtype, "numpy.dtype"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),  # as numpy 1 spells it
]


def read_legacy(path: str | Path) -> Legacy:
    """Read a `.pth` of another training script onto the CPU, as plain data.

    Accepted: a dict with the weights under `model_state_dict`, `state_dict` or `model`, and optionally `epoch`, `val_auc` (a
    Python number, a numpy scalar or a tensor) and `config` (a dict); or a state dict alone. Prefixes that
    `nn.DataParallel` and `torch.compile` put before every key are removed. Whatever else the file would have Python
    import or call is refused by name: nothing of it runs.
    Raises LegacyError.
    """
    if not Path(path).is_file():
        raise LegacyError(f"there is no file {path}")
    try:
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its unpickler or zip reader does
        raise LegacyError(_why_unreadable(Path(path), str(error) or type(error).__name__)) from error
    if not isinstance(content, Mapping):
        raise LegacyError(f"{path} holds a {type(content).__name__}, expected a dict of weights")
    if "pipeline_fingerprint" in content:
        raise LegacyError(f"{path} already says which pipeline trained it; use it as it is, there is nothing to import")
    config = content.get("config")
    if config is not None and not isinstance(config, Mapping):
        raise LegacyError(f"{path}: config is a {type(config).__name__}, expected a dict; save vars(config)")
    return Legacy(
        sha256=file_digest(path),
        weights=_weights(path, content),
        epoch=_epoch(path, content.get("epoch")),
        val_auc=_val_auc(path, content.get("val_auc")),
        config=dict(config or {}),
    )


def _why_unreadable(path: Path, message: str) -> str:
    advice = (
        "Nothing of it ran. Where it was written, save plain values instead: "
        'torch.save({"model_state_dict": model.state_dict(), "config": vars(config), "epoch": ..., "val_auc": ...}, ...)'
    )
    named = re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", message)
    if named:
        return f"{path} is refused: reading it would import and run '{named[1]}'. {advice}"
    # A pickle of another protocol, which torch does not look into.
    foreign = "Unsupported operand" in message
    if foreign and (name := _first_global(path)):
        return f"{path} is refused: it is no file that torch.save writes, and asks for '{name}' first. {advice}"
    # torch's own advice, before and after the reason, is to allow running code.
    reason = message.partition("WeightsUnpickler error:")[2] or message.partition("In PyTorch 2.6")[0]
    reason = "torch.save did not write it" if foreign else reason.strip().splitlines()[0].strip()
    return f"{path} is not a checkpoint that loads without running code: {reason}"


class _Asked(Exception):
    """A pickle asked for a global."""


class _Asking(pickle.Unpickler):
    """Raises _Asked with the first global that a pickle asks for, before anything is imported or called."""

    def find_class(self, module: str, name: str) -> Any:
        raise _Asked(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return None


def _first_global(path: Path) -> str:
    """The first global of a pickle, or of the pickle in a zip; empty when it breaks off before."""
    data = path.read_bytes()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            data = b"".join(archive.read(n) for n in archive.namelist() if n.endswith("/data.pkl"))
    try:
        _Asking(io.BytesIO(data)).load()
    except _Asked as asked:
        return str(asked)
    except Exception:  # damaged bytes raise anything; the file is refused either way
        return ""
    return ""


def _weights(path: str | Path, content: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    wrappers = [k for k in ("model_state_dict", "state_dict", "model") if k in content]
    if len(wrappers) > 1:
        raise LegacyError(f"{path} has both {' and '.join(wrappers)}; keep the one that was evaluated")
    weights = content[wrappers[0]] if wrappers else content
    if not isinstance(weights, Mapping) or not weights:
        raise LegacyError(f"{path} has no weights: {wrappers[0] if wrappers else 'the file'} is {weights!r:.60}")
    other = [str(k) for k, v in weights.items() if not isinstance(k, str) or not isinstance(v, torch.Tensor)]
    if other:
        expected = (
            "expected tensors by name"
            if wrappers
            else "expected 'model_state_dict', 'state_dict', 'model' or tensors only"
        )
        listed = f"{', '.join(other[:8])}{', ...' if len(other) > 8 else ''}"
        raise LegacyError(f"{path} has keys without a tensor ({listed}); {expected}")
    while prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in weights)), ""):
        weights = {k.removeprefix(prefix): v for k, v in weights.items()}
    return dict(weights)


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def _epoch(path: str | Path, value: Any) -> int | None:
    epoch = _number(value)
    if epoch is not None and (type(epoch) is not int or epoch < 0):
        raise LegacyError(f"{path}: epoch is {epoch!r}, expected a whole number")
    return epoch


def _val_auc(path: str | Path, value: Any) -> float | None:
    auc = _number(value)
    if auc is not None and (type(auc) not in (int, float) or not 0 <= auc <= 1):
        raise LegacyError(f"{path}: val_auc is {auc!r}, expected a number in [0, 1]")
    return None if auc is None else float(auc)


def check_config(config: Mapping[str, Any], pipeline: Pipeline, network: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The names on which a training script's configuration and a pipeline with its network agree; those that neither
    is known by are left alone. Raises LegacyError with both values for each one they contradict each other on."""
    agreed, contradictions = [], []
    ((network_name, network_params),) = network.items()
    for name, (stage, parameter) in _PIPELINE_NAMES.items():
        if name in config:
            ours = [getattr(s, parameter) for s in pipeline.stages.values() if s.name == stage]
            if ours and isinstance(config[name], int | float) and set(ours) == {config[name]}:
                agreed.append(name)
            else:
                has = f"{stage}.{parameter} is {', '.join(map(repr, ours))}" if ours else f"there is no stage '{stage}'"
                contradictions.append(f"  {name} is {config[name]!r} in the checkpoint, {has} in the pipeline")
    for name in _NETWORK_NAMES:
        if name in config and name in network_params:
            if isinstance(config[name], int | float) and network_params[name] == config[name]:
                agreed.append(name)
            else:
                ours = f"{network_name}.{name} is {network_params[name]!r} in the archive's model-config.yaml"
                contradictions.append(f"  {name} is {config[name]!r} in the checkpoint, {ours}")
    if contradictions:
        listed = "\n".join(contradictions)
        raise LegacyError(
            f"the checkpoint's configuration contradicts what it is imported with:\n{listed}\n"
            "Choose the --pipeline and --archive that it was trained with."
        )
    return agreed


def check_servable(pipeline: Pipeline) -> None:
    """Raises LegacyError for a pipeline with stages that no archive carries, such as another decoder to compare with."""
    foreign = [s.name for s in pipeline.stages.values() if s.comparison_only]
    if foreign:
        raise LegacyError(
            f"pipeline '{pipeline.name}' has the stage {', '.join(foreign)}, which exists to compare with and cannot be "
            "served; import with the nearest pipeline that can, and measure what that changes"
        )


def network_from(weights: Mapping[str, torch.Tensor], definition: Definition) -> nn.Module:
    """The network with these weights, each in the network's own type, in eval mode.

    Raises CheckpointError for keys that are missing, unexpected or of another shape; LegacyError for values that are
    not finite or that another type would change (float16 to float32 never does, float64 to float32 nearly always).
    """
    for name, value in weights.items():
        plain = type(value) in (torch.Tensor, nn.Parameter) and value.layout == torch.strided
        if not plain or value.is_quantized or value.is_nested or value.is_meta:
            raise LegacyError(f"{name} is not a plain dense tensor; save model.state_dict() of the float32 model")
    fitted = network_of({"model_state_dict": weights}, definition)
    converted = {}
    for name, like in fitted.state_dict().items():
        value = weights[name].detach()
        if value.is_floating_point() != like.is_floating_point():
            raise LegacyError(f"{name} is {value.dtype}, expected {like.dtype}")
        exact = value.double()
        if not exact.isfinite().all():
            bad = int((~exact.isfinite()).sum())
            raise LegacyError(
                f"{name} has {bad} of {exact.numel()} values that are NaN or infinite; the training diverged"
            )
        converted[name] = value.to(like.dtype)
        if not torch.equal(converted[name].double(), exact):
            raise LegacyError(
                f"{name} is {value.dtype} and changes when converted to {like.dtype}, which the network computes in; "
                "evaluate and save the model in that type"
            )
    return network_of({"model_state_dict": converted}, definition)


def check_trained(network: nn.Module) -> list[str]:
    """Refuse weights that no training has shaped: a fresh head, an ImageNet backbone under one, random numbers.

    The network is judged part by part (its direct children), because a part that is fresh spoils the answer however
    well the others are trained, while a frozen one that was trained before (ImageNet's backbone) does not:

    1. A batch normalisation whose running mean is still all 0 and variance all 1 never saw a batch. Reading data moves
       them at once, and pretrained weights bring their own.
    2. A part whose batch normalisations all still have scale 1 and shift 0, to the last bit, and whose linear layers
       all still lie within PyTorch's initial range, never saw an optimizer step: the first one moves every shift off
       0. (Running data through a fresh network in training mode passes 1, and fails here.)

    `num_batches_tracked` is no evidence: torchvision's ImageNet weights load with 0. A part without batch normalisation
    whose linear layers lie within the initial range is reported and not refused, as small steps may leave it there.
    Neither rule can tell which data a trained part was trained on; a measured AUC can.

    Returns the notes. Raises LegacyError naming the parts and what is wrong with each.
    """
    problems, notes = [], []
    for part, child in network.named_children():
        norms = [(f"{part}.{n}".rstrip("."), m) for n, m in child.named_modules() if isinstance(m, _BatchNorm)]
        linears = [m for m in child.modules() if isinstance(m, nn.Linear)]
        unseen = [
            name for name, m in norms if m.track_running_stats and _all(m.running_mean, 0) and _all(m.running_var, 1)
        ]
        shifts = [m for _, m in norms if m.affine]
        untouched = all(_all(m.weight, 1) and _all(m.bias, 0) for m in shifts) and all(map(_looks_initial, linears))
        if unseen:
            more = f" and {len(unseen) - 1} more" if len(unseen) > 1 else ""
            problems.append(
                f"  {part}: {unseen[0]}{more} still has running mean 0 and variance 1, so it never saw a batch"
            )
        elif shifts and untouched:
            problems.append(f"  {part}: every scale is still 1 and every shift 0, so it never saw an optimizer step")
        elif linears and untouched:
            notes.append(f"{part} still looks like its random initial values: what it computes may mean nothing")
    if problems:
        listed = "\n".join(problems)
        raise LegacyError(
            f"these are not trained weights:\n{listed}\nSave the trained model's state_dict(), and load it with strict=True "
            "wherever it passes through other code: strict=False leaves what does not match at its initial values."
        )
    return notes


def _all(values: torch.Tensor, initial: float) -> bool:
    return bool((values == initial).all())


def _looks_initial(layer: nn.Linear) -> bool:
    # nn.Linear draws weights and biases from U(-1/sqrt(in_features), 1/sqrt(in_features)). float16 may round up.
    bound = layer.in_features**-0.5 * (1 + 2**-10)
    return all(bool((values.abs() <= bound).all()) for values in layer.parameters())


def as_checkpoint(legacy: Legacy, network: nn.Module, definition: Definition) -> dict[str, Any]:
    """A checkpoint with the keys that training writes. What the file does not say is None or empty, and epoch 0."""
    return {
        "config": legacy.config,
        "pipeline": definition.pipeline.to_dict(),
        "pipeline_fingerprint": definition.pipeline.fingerprint,
        "network": definition.network,
        "postprocess": definition.postprocess,
        "code": definition.code,
        "manifest_sha256": None,
        "epoch": legacy.epoch or 0,
        "val_auc": legacy.val_auc,
        "val_ap": None,
        # Cloned: a view would be saved with all that it is a view of.
        "model_state_dict": {k: v.clone() for k, v in network.state_dict().items()},
        "optimizer_state_dict": {},
        "library_versions": {},
        "validation_scores": {},
        "stage_sources": {},
        "stage_outputs": {},
        "history": [],
        "imported_from": {"sha256": legacy.sha256, "epoch": legacy.epoch, "val_auc": legacy.val_auc},
    }


def write(path: Path, checkpoint: dict[str, Any]) -> None:
    """Save the checkpoint, and let it appear under its name once it has been read back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}-") as scratch:
        unfinished = Path(scratch, path.name)
        save_checkpoint(unfinished, checkpoint)
        load_checkpoint(unfinished)
        unfinished.replace(path)


def read_predictions(path: str | Path) -> dict[str, float]:
    """Probabilities by file_path, from a CSV with the columns file_path and probability. Raises LegacyError."""
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        absent = [c for c in ("file_path", "probability") if c not in (reader.fieldnames or [])]
        if absent:
            raise LegacyError(f"{path}: no column {', '.join(absent)}; it needs file_path, probability")
        predictions: dict[str, float] = {}
        for row, record in enumerate(reader, start=2):
            name, text = record["file_path"], record["probability"]
            try:
                probability = float(text or "")
            except ValueError:
                probability = float("nan")
            if not 0 <= probability <= 1:
                raise LegacyError(f"{path}, row {row}: probability is {text!r}, expected a number in [0, 1]")
            if predictions.setdefault(name, probability) != probability:
                raise LegacyError(f"{path}, row {row}: {name!r} has another probability in an earlier row")
    return predictions


@dataclass(frozen=True)
class Trial:
    """What the weights answer behind one pipeline, held against the record.

    auc_gap is |AUC - recorded AUC|; mean_dp and max_dp are over the recordings with a recorded probability. None where
    nothing is recorded, and everywhere when the pipeline could not be run, for the reason in `failure`.
    """

    name: str
    auc: float | None = None
    auc_gap: float | None = None
    mean_dp: float | None = None
    max_dp: float | None = None
    failure: str = ""


def compare(
    definition: Definition,
    checkpoint: dict[str, Any],
    candidates: Mapping[str, Pipeline],
    rows: Sequence[Recording],
    device: torch.device,
    *,
    recorded_auc: float | None,
    recorded: Mapping[str, float],
) -> list[Trial]:
    """One trial per candidate, in order, with a progress bar each; the first is the chosen one, which has to work.

    recorded_auc: of these very rows, or None. recorded: probabilities by file_path, as many of the rows as there are.
    Raises LegacyError when the chosen pipeline cannot be run, or gives all recordings nearly the same probability;
    UnreadableRecordings when it cannot read some of them.
    """
    service = service_of(definition, checkpoint, device)
    labels = [r.label for r in rows]
    trials: list[Trial] = []
    for name, pipeline in candidates.items():
        try:
            predictions = predict(
                replace(service, definition=replace(service.definition, pipeline=pipeline)), list(rows), name
            )
        except UnreadableRecordings as error:
            if not trials:
                raise
            trials.append(Trial(name, failure=f"cannot read {len(error.failures)} recording(s)"))
            continue
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            if not trials:
                raise LegacyError(f"{name} does not give what the network takes: {reason}") from error
            trials.append(Trial(name, failure=reason))
            continue
        probabilities = [p.scores[0] for p in predictions]
        if not trials:
            _check_spread(name, probabilities)
        auc = float(roc_auc_score(labels, probabilities))
        dp = [abs(p.scores[0] - recorded[n]) for p in predictions if (n := p.recording.file_path) in recorded]
        trials.append(
            Trial(
                name,
                auc,
                None if recorded_auc is None else abs(auc - recorded_auc),
                float(np.mean(dp)) if dp else None,
                max(dp) if dp else None,
            )
        )
    return trials


def _check_spread(name: str, probabilities: list[float]) -> None:
    low, high = min(probabilities), max(probabilities)
    if not high - low >= MIN_REFERENCE_SPREAD:
        raise LegacyError(
            f"behind {name} all {len(probabilities)} recordings get a probability between {low:.4f} and {high:.4f}, expected "
            f"a range of at least {MIN_REFERENCE_SPREAD}: the network looks untrained, or the pipeline is not its own"
        )


@dataclass(frozen=True)
class Verdict:
    """A sentence for the terminal, and whether the chosen pipeline is in doubt."""

    text: str
    doubtful: bool


def judge(trials: Sequence[Trial], rows: Sequence[Recording]) -> Verdict:
    """Which pipeline reproduces the record best, and whether the chosen one (the first) is as good.

    By recorded probabilities where there are any: as good is within the exact tier's tolerance everywhere, or within twice the best
    one's mean difference. Else by the AUC, the share of pairs of recordings in the right order: as good is within half
    a pair, or _AUC_NOISE, of the best one's gap.
    """
    chosen = trials[0]
    if chosen.mean_dp is not None:
        measured = sorted((t for t in trials if t.mean_dp is not None), key=lambda t: t.mean_dp)
        best = measured[0]
        alike = [t for t in measured if t.max_dp <= TOLERANCES["exact"] or t.mean_dp <= 2 * best.mean_dp]
        reproduced = best.max_dp <= TOLERANCES["exact"]
        what, more = "the recorded probabilities", ""
        shown = {t.name: f"mean |dp| {t.mean_dp:.1e}, largest {t.max_dp:.1e}" for t in measured}
    elif chosen.auc_gap is not None:
        measured = sorted((t for t in trials if t.auc_gap is not None), key=lambda t: t.auc_gap)
        best = measured[0]
        positives = sum(r.label for r in rows)
        noise = max(0.5 / (positives * (len(rows) - positives)), _AUC_NOISE)
        alike = [t for t in measured if t.auc_gap - best.auc_gap <= noise]
        reproduced = best.auc_gap <= noise
        what, more = (
            "the recorded validation AUC",
            " Recorded probabilities (--predictions) tell pipelines apart far better.",
        )
        shown = {t.name: f"off by {t.auc_gap:.4f}" for t in measured}
    else:
        return Verdict("Nothing recorded to compare with: neither a val_auc of this split nor --predictions.", False)
    if not reproduced:
        return Verdict(
            f"None of these pipelines reproduces {what}; the closest is {best.name} ({shown[best.name]}), chosen is "
            f"{chosen.name} ({shown[chosen.name]}). Either the recordings, the weights or the preprocessing are not those of "
            f"the record, or it was computed in lower precision (TF32 on a GPU: some 1e-3).{more}",
            True,
        )
    if chosen not in alike:
        return Verdict(
            f"{best.name} reproduces {what} ({shown[best.name]}); the chosen {chosen.name} does not "
            f"({shown[chosen.name]}). The checkpoint was most likely trained behind {best.name}.",
            True,
        )
    others = [t.name for t in alike if t != chosen]
    too = f" So do, as far as {len(rows)} recordings can tell: {', '.join(others)}.{more}" if others else ""
    return Verdict(f"{chosen.name} reproduces {what} ({shown[chosen.name]}).{too}", False)
