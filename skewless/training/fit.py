"""Training: AdamW, early stopping on validation AUC, resumable epoch by epoch."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from sklearn.metrics import average_precision_score
from torch import nn
from torchvision.models import ResNet18_Weights
from tqdm import tqdm

from skewless.core.definition import Definition
from skewless.core.networks import NETWORKS, Network
from skewless.core.own_code import OwnCode, file_of
from skewless.core.pipeline import Pipeline
from skewless.core.postprocess import Postprocessor
from skewless.core.versions import library_versions
from skewless.evaluation.metrics import auc, one_against_rest
from skewless.packaging.probes import try_probes
from skewless.training.cache import Entry, StageCache
from skewless.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from skewless.training.config import Config
from skewless.training.inputs import Inputs, measure_batch_statistics
from skewless.training.losses import LOSSES, Batch, Loss
from skewless.training.manifest import Recording, check_contents, manifest_digest, require_every_class, select
from skewless.training.offline_augmentation import augmented_recordings
from skewless.training.record import stage_outputs, stage_sources
from skewless.training.untrained import untrained_layers


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
        scaler's statistics, its network, its post-processing and the digests of its own code. It also keeps what evaluation
        has to reproduce: every validation recording's scores, and what skewless.training.record keeps of the stages.
    out: receives best.pth and last.pth; a run found there is continued if its config, pipeline, network and manifest
        are the same, and refused otherwise. Raises ManifestError, UnreadableRecordings, CheckpointError, ValueError.
    on_epoch: called after every epoch with its figures.
    """
    check_contents(recordings)
    definition.precision.apply()
    postprocessor = definition.postprocessor
    cache = StageCache(cache_dir, definition.pipeline)
    _check_config(config, definition, cache)
    _try_probes(definition.pipeline)
    loss_definition, loss = _loss_of(config, definition)
    train, val = _prepare(recordings, config, cache, postprocessor.classes, cache_dir / "augmented", skip_unreadable)
    cache.fit(train)
    run = {
        "config": asdict(config) | {"loss": loss_definition},
        # Of a loss of the folder's own. It is no part of what is served.
        "training_code": OwnCode(definition.folder).digests(
            file for name in loss_definition if (file := file_of(name)) is not None
        ),
        "pipeline": cache.pipeline.to_dict(),
        "pipeline_fingerprint": cache.pipeline.fingerprint,
        "network": definition.network,
        "postprocess": definition.postprocess,
        "code": definition.code,
        "manifest_sha256": manifest_digest(recordings),
    }
    out.mkdir(parents=True, exist_ok=True)
    last = _resume(out / "last.pth", run)
    computed_by = {
        "library_versions": library_versions(definition.packages),
        "stage_sources": stage_sources(definition),
        "stage_outputs": stage_outputs(cache.pipeline, val),
    }

    torch.manual_seed(config.seed)
    network = definition.build_network()
    if config.backbone_weights:
        _load_backbone(network, config.backbone_weights)
    network.to(device)
    _check_together(network, loss, cache, val[0], postprocessor, device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    labels = torch.tensor([entry.recording.label for entry in train])
    counts = torch.bincount(labels, minlength=len(postprocessor.classes)).float().to(device)
    history: list[dict[str, float]] = []
    if last is not None:
        network.load_state_dict(last["model_state_dict"])
        optimizer.load_state_dict(last["optimizer_state_dict"])
        history = last["history"]
        print(f"continuing {out} after epoch {last['epoch']}", file=sys.stderr)
    inputs = Inputs(network, cache, config.augmentation, device)
    if config.trained == "head":
        if last is None and not config.backbone_weights:
            measure_batch_statistics(network, inputs, train, config.batch_size)
        inputs.freeze(train + val)

    while len(history) < config.epochs and not _exhausted(history, config.patience):
        # As the rate is a function of the history, so is every random number of the epoch: nothing but weights and
        # optimizer state has to survive an interruption.
        epoch, started = len(history) + 1, time.perf_counter()
        rate = config.rate(history)
        for group in optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(config.seed * 10_000 + epoch)
        train_loss = _train_epoch(network, loss, counts, optimizer, inputs, train, config, epoch)
        scores, val_loss = _validate(network, loss, counts, postprocessor, inputs, val)
        history.append(
            {
                "epoch": epoch,
                "learning_rate": rate,
                "train_loss": train_loss,
                "val_loss": val_loss,
                **_ranking([entry.recording.label for entry in val], np.array(scores)),
                "seconds": time.perf_counter() - started,
            }
        )
        checkpoint = {
            **run,
            **computed_by,
            **{k: history[-1][k] for k in ("epoch", "val_auc", "val_ap")},
            "validation_scores": {entry.sha256: list(of_one) for entry, of_one in zip(val, scores, strict=True)},
            "model_state_dict": {k: v.cpu() for k, v in network.state_dict().items()},
            "optimizer_state_dict": optimizer.state_dict(),
            "history": history,
            # An encoder that was left as it was drawn is meant to be so.
            "accepted_untrained": [f.layer for f in untrained_layers(network).findings]
            if config.trained == "head"
            else [],
        }
        if _best_epoch(history) == epoch:
            save_checkpoint(out / "best.pth", checkpoint)
        save_checkpoint(out / "last.pth", checkpoint)
        shown = history[-1]
        print(
            f"epoch {epoch}: train loss {train_loss:.4f}, val loss {val_loss:.4f}, val AUC {shown['val_auc']:.4f}, "
            f"val AP {shown['val_ap']:.4f}, {shown['seconds']:.1f} s",
            file=sys.stderr,
        )
        on_epoch(shown)
    best = load_checkpoint(out / "best.pth")
    # The chosen epoch's file ends with that epoch; the picture of the training wants the whole run.
    if best["history"] != history:
        save_checkpoint(out / "best.pth", best | {"history": history})
    return load_checkpoint(out / "best.pth")


def _check_together(
    network: Network, loss: Loss, cache: StageCache, entry: Entry, postprocessor: Postprocessor, device: torch.device
) -> None:
    """Raise ValueError, before an epoch is spent, unless the network takes what the pipeline gives, the post-processing what
    the network gives, and the loss both. One recording is run in evaluation, which draws no random number."""
    x = cache.finish(cache.load(entry.path)).to(device)
    outputs: dict[str, torch.Tensor] = {}
    network.eval()
    try:
        with torch.inference_mode():
            outputs = network.head(network.encode(x))
            found, classes = len(postprocessor.scores(outputs)), len(postprocessor.classes)
            if found != (1 if classes == 2 else classes):
                raise ValueError(
                    f"the post-processing gives {found} scores, expected one per class, or one for two classes"
                )
            counts = torch.ones(len(postprocessor.classes), device=device)
            label = torch.tensor([entry.recording.label], device=device)
            loss(network, Batch([x], label, counts, frozen=False))
    except (RuntimeError, LookupError, TypeError, ValueError, NotImplementedError) as error:
        given = ", ".join(f"{name} {tuple(value.shape)}" for name, value in outputs.items()) or "nothing"
        raise ValueError(
            f"pipeline, network, loss and post-processing do not fit together: the pipeline gives {tuple(x.shape)}, the network "
            f"gives {given}, there are {len(postprocessor.classes)} classes; {type(error).__name__}: {error}"
        ) from error


def _try_probes(pipeline: Pipeline) -> None:
    """Raise PipelineError, before recordings are read, for a pipeline that fails on a kind of file that a server will get,
    such as a stereo recording. Stages that training has to fit, and those behind them, are left out."""
    try_probes(pipeline.split(pipeline.unfitted[0])[0] if pipeline.unfitted else pipeline)


def _check_config(config: Config, definition: Definition, cache: StageCache) -> None:
    """Raise ValueError for settings that this definition cannot be trained with."""
    pipeline = definition.pipeline
    if definition.network_files:
        raise ValueError(
            f"an exported network ({', '.join(definition.network_files)}) cannot be trained; `skewless import` takes it as "
            "it is"
        )
    if config.augmentation and cache.unit != "image value":
        raise ValueError(
            f"augmentation is of scaled spectrograms, pipeline '{pipeline.name}' gives values in {cache.unit}; "
            "train without (--no-augmentation, or augmentation: false)"
        )
    if config.offline_augmentation and pipeline.reads != "audio":
        raise ValueError(
            f"offline augmentation is of recordings, pipeline '{pipeline.name}' reads {pipeline.reads}s; expected "
            "offline_augmentation: 0"
        )


def _loss_of(config: Config, definition: Definition) -> tuple[dict[str, Any], Loss]:
    """The loss that the recipe asks for, else the network's own: its definition, and what it defines."""
    own = OwnCode(definition.folder)
    name, _ = NETWORKS.split(definition.network)
    chosen = config.loss or {NETWORKS.find(name, own).default_loss: {}}
    loss = LOSSES.build(chosen, own)
    if config.trained == "head" and loss.trains_encoder:
        raise ValueError(f"with loss '{next(iter(chosen))}' this network is trained as a whole; choose trained: all")
    return chosen, loss


def _prepare(
    recordings: list[Recording],
    config: Config,
    cache: StageCache,
    classes: Sequence[str],
    augmented: Path,
    skip_unreadable: bool,
) -> tuple[list[Entry], list[Entry]]:
    """The entries of the training split, with its augmented copies, and of the validation split."""
    train, val = (select(recordings, split, classes) for split in ("train", "val"))
    if config.offline_augmentation:
        train = train + augmented_recordings(train, config.offline_augmentation, config.seed, augmented)
    prepared, validation = (cache.prepare(rows, skip_unreadable=skip_unreadable) for rows in (train, val))
    for entries in (prepared, validation):
        require_every_class([entry.recording for entry in entries], "what could be read", classes)
    return prepared, validation


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
    network: Network,
    loss: Loss,
    counts: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    inputs: Inputs,
    entries: list[Entry],
    config: Config,
    epoch: int,
) -> float:
    """One pass over the entries in random order; the mean loss of its batches."""
    network.train()
    generator = torch.Generator().manual_seed(config.seed * 10_000 + epoch)
    order = torch.randperm(len(entries), generator=generator).tolist()
    losses = []
    batches = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
    # Batch normalisation needs two inputs.
    batches = [b for b in batches if len(b) > 1]
    for indices in tqdm(batches, desc=f"epoch {epoch}/{config.epochs}", unit="batch", leave=False):
        x = [inputs(entries[i], generator) for i in indices]
        labels = torch.tensor([entries[i].recording.label for i in indices], device=x[0].device)
        value = loss(network, Batch(x, labels, counts, inputs.frozen))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return float(np.mean(losses))


def _validate(
    network: Network,
    loss: Loss,
    counts: torch.Tensor,
    postprocessor: Postprocessor,
    inputs: Inputs,
    entries: list[Entry],
) -> tuple[list[tuple[float, ...]], float]:
    """Each entry's scores, and the mean loss."""
    network.eval()
    scores, losses = [], []
    for entry in tqdm(entries, desc="validation", unit="file", leave=False):
        x = inputs(entry)
        label = torch.tensor([entry.recording.label], device=x.device)
        with torch.inference_mode():
            features = x if inputs.frozen else network.encode(x)
            scores.append(postprocessor.scores(network.head(features)))
            # Where features suffice, nothing is encoded twice.
            given = (x, inputs.frozen) if loss.trains_encoder else (features, True)
            losses.append(loss(network, Batch([given[0]], label, counts, given[1])).item())
    return scores, float(np.mean(losses))


def _ranking(labels: list[int], scores: np.ndarray) -> dict[str, float]:
    """AUC and average precision; with more than two classes the mean over each class against the rest."""
    return {
        "val_auc": auc(np.array(labels), scores),
        "val_ap": float(average_precision_score(*one_against_rest(np.array(labels), scores))),
    }


def _load_backbone(network: Network, source: str) -> None:
    """ResNet-18 weights into the backbone, without the classifier; raises ValueError when keys are missing."""
    backbone = getattr(network, "backbone", None)
    if not isinstance(backbone, nn.Module):
        raise ValueError("backbone_weights are for networks with a ResNet-18 inside; this one has none")
    if source == "imagenet":
        weights = ResNet18_Weights.DEFAULT.get_state_dict(progress=True)
    elif source.endswith(".safetensors"):
        weights = load_file(source)
    else:
        weights = torch.load(source, map_location="cpu", weights_only=True)
    outcome = backbone.load_state_dict({k: v for k, v in weights.items() if not k.startswith("fc.")}, strict=False)
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
