"""Training: AdamW on a cosine schedule, early stopping on validation AUC, resumable epoch by epoch."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import nn
from torchvision.models import ResNet18_Weights
from tqdm import tqdm

from handler.networks import build_network
from handler.pipeline import Pipeline
from handler.precision import NumericPolicy
from handler.references import library_versions
from training.augment import augment
from training.cache import SpectrogramCache
from training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from training.manifest import Recording, manifest_digest, require_both_labels, select

Entry = tuple[Recording, Path]


@dataclass(frozen=True)
class Config:
    """The recipe. Everything here is stored in the checkpoint; two runs with equal configs give equal weights on one
    machine. backbone_weights: "" (random), "imagenet" (torchvision downloads them) or a ResNet-18 state-dict file.
    segment_loss: weight of a second loss on a recording's highest segment logit (max-pooling multiple-instance
    learning), beside the one on its bag logit; without it nothing trains the segment head."""

    epochs: int = 20
    batch_size: int = 8
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    patience: int = 5
    seed: int = 42
    segment_loss: float = 0.5
    augmentation: bool = True
    backbone_weights: str = ""

    def __post_init__(self):
        if self.segment_loss < 0:
            raise ValueError(f"segment_loss is {self.segment_loss}, expected 0 or more")
        if self.epochs < 1 or self.batch_size < 2 or self.patience < 1:
            raise ValueError(
                f"epochs {self.epochs}, batch_size {self.batch_size}, patience {self.patience}: expected at least 1, 2 and 1"
            )


def fit(
    recordings: list[Recording],
    pipeline: Pipeline,
    definitions: dict[str, Any],
    config: Config,
    out: Path,
    *,
    cache_dir: Path,
    device: torch.device,
    skip_unreadable: bool = False,
) -> dict[str, Any]:
    """Train on the `train` split, choose the epoch by the `val` split; returns the best checkpoint.

    definitions: the archive's `network` and `decision`, stored with the weights.
    out: receives best.pth and last.pth; a run found there is continued if its config, pipeline, network and manifest
        are the same, and refused otherwise. Raises ManifestError, UnreadableRecordings, CheckpointError, ValueError.
    """
    NumericPolicy().apply()
    train_rows, val_rows = select(recordings, "train"), select(recordings, "val")
    run = {
        "config": asdict(config),
        "pipeline": pipeline.to_dict(),
        "pipeline_fingerprint": pipeline.fingerprint,
        "network": definitions["network"],
        "decision": definitions["decision"],
        "manifest_sha256": manifest_digest(recordings),
    }
    out.mkdir(parents=True, exist_ok=True)
    last = _resume(out / "last.pth", run)
    cache = SpectrogramCache(cache_dir, pipeline)
    train = cache.prepare(train_rows, skip_unreadable=skip_unreadable)
    val = cache.prepare(val_rows, skip_unreadable=skip_unreadable)
    for entries in (train, val):
        require_both_labels([recording for recording, _ in entries], "what could be read")

    torch.manual_seed(config.seed)
    network = build_network(definitions["network"])
    if config.backbone_weights:
        _load_backbone(network, config.backbone_weights)
    network.to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    positives = sum(r.label for r, _ in train)
    pos_weight = torch.tensor((len(train) - positives) / positives, device=device)
    history: list[dict[str, float]] = []
    if last is not None:
        network.load_state_dict(last["model_state_dict"])
        optimizer.load_state_dict(last["optimizer_state_dict"])
        history = last["history"]
        print(f"continuing {out} after epoch {last['epoch']}")

    while len(history) < config.epochs and not _exhausted(history, config.patience):
        epoch = len(history) + 1
        started = time.perf_counter()
        # The cosine schedule (Loshchilov and Hutter, "SGDR", ICLR 2017) is a function of the epoch alone, and so is
        # every random number: nothing but weights and optimizer state has to survive an interruption.
        rate = 0.5 * config.learning_rate * (1 + math.cos(math.pi * (epoch - 1) / config.epochs))
        for group in optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(config.seed * 10_000 + epoch)
        losses = _train_epoch(network, optimizer, cache, train, pos_weight, config, epoch, device)
        probabilities, val_loss = _validate(network, cache, val, pos_weight, device)
        labels = [r.label for r, _ in val]
        history.append(
            {
                "epoch": epoch,
                "learning_rate": rate,
                "train_loss": float(np.mean(losses)),
                "val_loss": val_loss,
                "val_auc": float(roc_auc_score(labels, probabilities)),
                "val_ap": float(average_precision_score(labels, probabilities)),
                "seconds": time.perf_counter() - started,
            }
        )
        checkpoint = {
            **run,
            **{k: history[-1][k] for k in ("epoch", "val_auc", "val_ap")},
            "model_state_dict": {k: v.cpu() for k, v in network.state_dict().items()},
            "optimizer_state_dict": optimizer.state_dict(),
            "library_versions": library_versions(),
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


def _train_epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    cache: SpectrogramCache,
    entries: list[Entry],
    pos_weight: torch.Tensor,
    config: Config,
    epoch: int,
    device: torch.device,
) -> list[float]:
    network.train()
    generator = torch.Generator().manual_seed(config.seed * 10_000 + epoch)
    order = torch.randperm(len(entries), generator=generator).tolist()
    losses = []
    batches = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
    # Batch normalisation of the bag head needs two recordings.
    batches = [b for b in batches if len(b) > 1]
    for indices in tqdm(batches, desc=f"epoch {epoch}/{config.epochs}", unit="batch", leave=False):
        items = []
        for i in indices:
            spectrograms = torch.from_numpy(np.load(entries[i][1]))
            if config.augmentation:
                spectrograms = augment(spectrograms, generator)
            items.append(cache.finish(spectrograms))
        x, mask = _collate(items, device)
        labels = torch.tensor([float(entries[i][0].label) for i in indices], device=device)
        _, _, segment_logits, bag_logit = network(x, mask)
        highest = segment_logits.masked_fill(~mask, -torch.inf).amax(dim=1)
        loss = F.binary_cross_entropy_with_logits(bag_logit, labels, pos_weight=pos_weight)
        loss = loss + config.segment_loss * F.binary_cross_entropy_with_logits(highest, labels, pos_weight=pos_weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _collate(items: list[torch.Tensor], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Recordings `(S_i, 3, 224, 224)` to one padded `(B, S, 3, 224, 224)` and its mask `(B, S)`."""
    x = nn.utils.rnn.pad_sequence(items, batch_first=True)
    lengths = torch.tensor([len(item) for item in items])
    mask = torch.arange(x.shape[1]).unsqueeze(0) < lengths.unsqueeze(1)
    return x.to(device), mask.to(device)


def _validate(
    network: nn.Module,
    cache: SpectrogramCache,
    entries: list[Entry],
    pos_weight: torch.Tensor,
    device: torch.device,
) -> tuple[list[float], float]:
    """Each recording's probability, and the mean loss."""
    network.eval()
    probabilities, losses = [], []
    for recording, path in _progress(entries):
        x, mask = _collate([cache.finish(torch.from_numpy(np.load(path)))], device)
        with torch.inference_mode():
            probability, _, _, logit = network(x, mask)
            label = torch.tensor([float(recording.label)], device=device)
            losses.append(F.binary_cross_entropy_with_logits(logit, label, pos_weight=pos_weight).item())
        probabilities.append(probability.item())
    return probabilities, float(np.mean(losses))


def _progress(entries: list[Entry]) -> Iterator[Entry]:
    yield from tqdm(entries, desc="validation", unit="clip", leave=False)


def _load_backbone(network: nn.Module, source: str) -> None:
    """ResNet-18 weights into the backbone, without the classifier; raises ValueError when keys are missing."""
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
