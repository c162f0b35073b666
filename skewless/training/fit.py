"""Training: AdamW, early stopping on validation AUC, resumable epoch by epoch."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import ResNet18_Weights
from tqdm import tqdm

from skewless.core.definition import Definition
from skewless.core.postprocess import Postprocessor
from skewless.core.stages import InputError
from skewless.core.versions import library_versions
from skewless.training.augment import augment
from skewless.training.cache import StageCache
from skewless.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from skewless.training.config import Config
from skewless.training.losses import Objective, objective_of
from skewless.training.manifest import Recording, manifest_digest, require_every_class, select
from skewless.training.offline_augmentation import copies

Entry = tuple[Recording, Path]


def fit(
    recordings: list[Recording],
    definition: Definition,
    config: Config,
    out: Path,
    *,
    cache_dir: Path,
    device: torch.device,
    skip_unreadable: bool = False,
    on_epoch: Callable[[dict[str, float]], None] = lambda epoch: None,
) -> dict[str, Any]:
    """Train on the `train` split, choose the epoch by the `val` split; returns the best checkpoint.

    definition: what is trained; the checkpoint keeps its pipeline, with what stages take from the training set, such as a
        scaler's statistics, its network, its post-processing and the digests of its own code.
    out: receives best.pth and last.pth; a run found there is continued if its config, pipeline, network and manifest
        are the same, and refused otherwise. Raises ManifestError, UnreadableRecordings, CheckpointError, ValueError.
    on_epoch: called after every epoch with its figures.
    """
    definition.precision.apply()
    pipeline, postprocessor = definition.pipeline, definition.postprocessor
    train_rows, val_rows = (select(recordings, split, postprocessor.classes) for split in ("train", "val"))
    cache = StageCache(cache_dir, pipeline)
    if config.augmentation and cache.unit != "image value":
        raise ValueError(
            f"augmentation is of scaled spectrograms, pipeline '{pipeline.name}' gives values in {cache.unit}; "
            "train without (--no-augmentation, or augmentation: false)"
        )
    if config.copies and pipeline.reads != "audio":
        raise ValueError(f"copies are of recordings, pipeline '{pipeline.name}' reads {pipeline.reads}s: copies: 0")
    if config.copies:
        train_rows = train_rows + _copies_of(train_rows, config, cache_dir / "copies")
    train = cache.prepare(train_rows, skip_unreadable=skip_unreadable)
    val = cache.prepare(val_rows, skip_unreadable=skip_unreadable)
    for entries in (train, val):
        require_every_class([recording for recording, _ in entries], "what could be read", postprocessor.classes)
    cache.fit(train)
    run = {
        "config": asdict(config),
        "pipeline": cache.pipeline.to_dict(),
        "pipeline_fingerprint": cache.pipeline.fingerprint,
        "network": definition.network,
        "postprocess": definition.postprocess,
        "code": definition.code,
        "manifest_sha256": manifest_digest(recordings),
    }
    out.mkdir(parents=True, exist_ok=True)
    last = _resume(out / "last.pth", run)

    torch.manual_seed(config.seed)
    network = definition.build_network()
    if network.files:
        raise ValueError(
            f"an exported network ({', '.join(network.files)}) cannot be trained; `skewless import` takes it as it is"
        )
    if config.backbone_weights:
        _load_backbone(network, config.backbone_weights)
    network.to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    labels = torch.tensor([r.label for r, _ in train])
    counts = torch.bincount(labels, minlength=len(postprocessor.classes)).float().to(device)
    objective = objective_of(network, counts, config.segment_loss, frozen=config.trained == "head")
    history: list[dict[str, float]] = []
    if last is not None:
        network.load_state_dict(last["model_state_dict"])
        optimizer.load_state_dict(last["optimizer_state_dict"])
        history = last["history"]
        print(f"continuing {out} after epoch {last['epoch']}")
    inputs = _Inputs(network, cache, config, device)
    if config.trained == "head":
        if last is None and not config.backbone_weights:
            _measure_batch_statistics(network, inputs, train, config.batch_size)
        inputs.freeze(train + val)

    while len(history) < config.epochs and not _exhausted(history, config.patience):
        epoch = len(history) + 1
        started = time.perf_counter()
        # As the rate is a function of the history, so is every random number of the epoch: nothing but weights and
        # optimizer state has to survive an interruption.
        rate = config.rate(history)
        for group in optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(config.seed * 10_000 + epoch)
        losses = _train_epoch(network, objective, optimizer, inputs, train, config, epoch)
        scores, val_loss = _validate(network, objective, postprocessor, inputs, val)
        history.append(
            {
                "epoch": epoch,
                "learning_rate": rate,
                "train_loss": float(np.mean(losses)),
                "val_loss": val_loss,
                **_ranking([r.label for r, _ in val], scores),
                "seconds": time.perf_counter() - started,
            }
        )
        checkpoint = {
            **run,
            **{k: history[-1][k] for k in ("epoch", "val_auc", "val_ap")},
            "model_state_dict": {k: v.cpu() for k, v in network.state_dict().items()},
            "optimizer_state_dict": optimizer.state_dict(),
            "library_versions": library_versions(definition.packages),
            "history": history,
        }
        if _best_epoch(history) == epoch:
            save_checkpoint(out / "best.pth", checkpoint)
        save_checkpoint(out / "last.pth", checkpoint)
        shown = history[-1]
        print(
            f"epoch {epoch}: train loss {shown['train_loss']:.4f}, val loss {val_loss:.4f}, val AUC {shown['val_auc']:.4f}, "
            f"val AP {shown['val_ap']:.4f}, {shown['seconds']:.1f} s"
        )
        on_epoch(shown)
    best = load_checkpoint(out / "best.pth")
    # The chosen epoch's file ends with that epoch; the picture of the training wants the whole run.
    if best["history"] != history:
        save_checkpoint(out / "best.pth", best | {"history": history})
    return load_checkpoint(out / "best.pth")


def _resume(path: Path, run: dict[str, Any]) -> dict[str, Any] | None:
    """The interrupted run's last checkpoint, or None; raises CheckpointError when it is of another run."""
    if not path.exists():
        return None
    last = load_checkpoint(path)
    different = [k for k, v in run.items() if last.get(k) != v]
    if different:
        raise CheckpointError(
            f"{path.parent} holds a run with another {', '.join(different)}; choose another --out, or delete that folder"
        )
    return last


def _best_epoch(history: list[dict[str, float]]) -> int:
    """The first epoch of highest validation AUC; among equals, the lowest validation loss."""
    return int(max(history, key=lambda h: (h["val_auc"], -h["val_loss"]))["epoch"])


def _exhausted(history: list[dict[str, float]], patience: int) -> bool:
    return bool(history) and len(history) - _best_epoch(history) >= patience


_SMALL = 4096  # values


class _Inputs:
    """A training or validation entry as the network's input, or, once frozen, as its features."""

    def __init__(self, network: nn.Module, cache: StageCache, config: Config, device: torch.device):
        self._network, self._cache, self._device = network, cache, device
        self._augmentation = config.augmentation
        self._features: dict[Path, torch.Tensor] = {}
        self._small: dict[Path, torch.Tensor] = {}

    @property
    def frozen(self) -> bool:
        return bool(self._features)

    def __call__(self, entry: Entry, generator: torch.Generator | None = None) -> torch.Tensor:
        """`(S, ...)` on the device; augmented where a generator is given and the recipe says so."""
        if self.frozen:
            return self._features[entry[1]]
        kept = self._small.get(entry[1])
        if kept is None:
            kept = self._cache.load(entry[1])
            # A row of features takes longer to find on disk than all the rest of its step.
            if kept.numel() <= _SMALL:
                self._small[entry[1]] = kept
        if generator is not None and self._augmentation:
            kept = augment(kept, generator)
        return self._cache.finish(kept).to(self._device)

    def freeze(self, entries: list[Entry]) -> None:
        """Encode every entry once; from here on features are what is given."""
        self._network.eval()
        features = {}
        for entry in tqdm(entries, desc="features", unit="file"):
            with torch.no_grad():
                features[entry[1]] = self._network.encode(self(entry))
        self._features = features


def _measure_batch_statistics(
    network: nn.Module, inputs: Callable[[Entry], torch.Tensor], entries: list[Entry], batch_size: int
) -> None:
    """Batch normalisation's running statistics as averages over one pass, for an encoder that is not trained."""
    layers = [m for m in network.modules() if isinstance(m, _BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    network.train()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # PyTorch's word for a cumulative average
    for start in tqdm(range(0, len(entries), batch_size), desc="batch statistics", unit="batch"):
        batch = torch.cat([inputs(entry) for entry in entries[start : start + batch_size]])
        if len(batch) > 1:
            with torch.no_grad():
                network.encode(batch)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


# What computes an augmented copy.
_MAKERS = ("librosa", "numpy", "scipy", "soundfile", "av")


def _copies_of(recordings: list[Recording], config: Config, folder: Path) -> list[Recording]:
    """Augmented copies as files, each in its recording's split and group. Of an unreadable recording there are none:
    `StageCache.prepare` reports it."""
    folder.mkdir(parents=True, exist_ok=True)
    # Made by other code or other libraries, a copy is another one.
    maker = json.dumps(library_versions(_MAKERS)).encode() + Path(copies.__code__.co_filename).read_bytes()
    made = []
    for recording in tqdm(recordings, desc="augmented copies", unit="file"):
        data = recording.path.read_bytes()
        name = f"{hashlib.sha256(maker + data).hexdigest()}-{config.seed}"
        paths = [folder / f"{name}-{number}.wav" for number in range(config.copies)]
        if not all(path.exists() for path in paths):
            try:
                audio = copies(data, config.copies, config.seed)
            except InputError:
                continue
            for path, copy in zip(paths, audio, strict=True):
                unfinished = path.with_suffix(f".{os.getpid()}.tmp")
                unfinished.write_bytes(copy)
                unfinished.replace(path)
        made += [
            replace(recording, file_path=f"{recording.file_path}, copy {number}", path=path)
            for number, path in enumerate(paths, start=1)
        ]
    return made


def _train_epoch(
    network: nn.Module,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    inputs: _Inputs,
    entries: list[Entry],
    config: Config,
    epoch: int,
) -> list[float]:
    network.train()
    generator = torch.Generator().manual_seed(config.seed * 10_000 + epoch)
    order = torch.randperm(len(entries), generator=generator).tolist()
    losses = []
    batches = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
    # Batch normalisation needs two inputs.
    batches = [b for b in batches if len(b) > 1]
    for indices in tqdm(batches, desc=f"epoch {epoch}/{config.epochs}", unit="batch", leave=False):
        x = [inputs(entries[i], generator) for i in indices]
        labels = torch.tensor([entries[i][0].label for i in indices], device=x[0].device)
        loss = objective.loss(x, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _validate(
    network: nn.Module, objective: Objective, postprocessor: Postprocessor, inputs: _Inputs, entries: list[Entry]
) -> tuple[np.ndarray, float]:
    """Each input's scores `(N, 1 or classes)`, and the mean loss."""
    network.eval()
    scores, losses = [], []
    for entry in _progress(entries):
        x = inputs(entry)
        with torch.inference_mode():
            features = x if inputs.frozen else network.encode(x)
            scores.append(postprocessor.scores(network.head(features)))
            losses.append(objective.loss([x], torch.tensor([entry[0].label], device=x.device)).item())
    return np.array(scores), float(np.mean(losses))


def _ranking(labels: list[int], scores: np.ndarray) -> dict[str, float]:
    """AUC and average precision; with more than two classes the mean over each class against the rest."""
    truth = np.array(labels) if scores.shape[1] == 1 else np.eye(scores.shape[1])[labels]
    scores = scores[:, 0] if scores.shape[1] == 1 else scores
    return {
        "val_auc": float(roc_auc_score(truth, scores)),
        "val_ap": float(average_precision_score(truth, scores)),
    }


def _progress(entries: list[Entry]) -> Iterator[Entry]:
    yield from tqdm(entries, desc="validation", unit="file", leave=False)


def _load_backbone(network: nn.Module, source: str) -> None:
    """ResNet-18 weights into the backbone, without the classifier; raises ValueError when keys are missing."""
    if not hasattr(network, "backbone"):
        raise ValueError("backbone_weights are for networks with a ResNet-18 inside; this one has none")
    if source == "imagenet":
        weights = ResNet18_Weights.DEFAULT.get_state_dict(progress=True)
    elif source.endswith(".safetensors"):
        weights = load_file(source)
    else:
        weights = torch.load(source, map_location="cpu", weights_only=True)
    outcome = network.backbone.load_state_dict(
        {k: v for k, v in weights.items() if not k.startswith("fc.")}, strict=False
    )
    if outcome.missing_keys or outcome.unexpected_keys:
        raise ValueError(
            f"{source} is no ResNet-18 state dict: missing {outcome.missing_keys[:3]}, unexpected {outcome.unexpected_keys[:3]}"
        )


def describe_run(checkpoint: dict[str, Any]) -> str:
    """One line for the terminal."""
    seconds = [h["seconds"] for h in checkpoint["history"]]
    return json.dumps(
        {
            "best_epoch": checkpoint["epoch"],
            "val_auc": round(checkpoint["val_auc"], 4),
            "val_ap": round(checkpoint["val_ap"], 4),
            "epochs": len(seconds),
            "median_seconds_per_epoch": round(float(np.median(seconds)), 1),
        }
    )
