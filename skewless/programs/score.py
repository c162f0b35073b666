"""The scores that a trained network gives what two programs return."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from skewless.core.definition import Definition
from skewless.core.stages import InputError, PipelineError
from skewless.evaluation.scores import service_of
from skewless.programs.causes import Score
from skewless.training.checkpoint import load_checkpoint


def network_score(archive: Path, checkpoint: Path, file: Path) -> tuple[Score, float]:
    """(a function from a network's input to the scores of its classes, the threshold of the decision).

    archive: the model's folder. file: one that its own pipeline reads, which tells how many axes an input has; a leading axis of
    length 1, of a batch, is taken off. The network runs on the CPU. Raises DefinitionError, CheckpointError and ValueError for a model that cannot
    be loaded.
    """
    service = service_of(Definition.read(archive), load_checkpoint(checkpoint), torch.device("cpu"))
    try:
        axes = list(service.pipeline.trace(file.read_bytes()).values())[-1].ndim
    except (InputError, PipelineError) as error:
        raise ValueError(
            f"{archive} cannot read {file.name}, so it is not known what its network takes: {error}; put a file first that it reads"
        ) from error

    def score(array: np.ndarray) -> tuple[float, ...]:
        rows = array
        while rows.ndim > axes and rows.shape[0] == 1:
            rows = rows[0]
        tensor = torch.from_numpy(np.ascontiguousarray(rows))
        if tensor.dtype == torch.float64:
            tensor = tensor.float()
        try:
            service.postprocessor.require_windows(len(tensor))
            (outputs,) = service.runtime([tensor])
            return tuple(service.postprocessor.scores(outputs))
        except Exception as error:  # numbers of a program that nobody trained with can be refused in any way
            raise ValueError(f"the network cannot take {tuple(array.shape)} {array.dtype}: {error}") from error

    return score, service.threshold
