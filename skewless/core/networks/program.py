"""A module as a program of torch.export: the operations alone, for any number of rows, without its Python."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn


def program_of(module: nn.Module, *shapes: Sequence[int]) -> torch.export.ExportedProgram:
    """`module` in eval mode as a program that takes any number of rows, in the first dimension of each input.

    shapes: of one row of each of forward's arguments, all float32 tensors: (3, 224, 224) for `(N, 3, 224, 224)`.
    Raises ValueError for a module that cannot be written so, such as one that needs a fixed number of rows.
    """
    # Different numbers of rows, above 1: torch would take equal ones for one number, and 1 for a constant.
    examples = tuple(torch.zeros(3 + k, *shape) for k, shape in enumerate(shapes))
    rows = tuple({0: torch.export.Dim(f"rows_{k}")} for k in range(len(shapes)))
    with warnings.catch_warnings(), torch.no_grad():
        # What torch warns of here concerns its own code.
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(module.eval(), examples, dynamic_shapes=rows)
        except Exception as error:  # whatever the module's own code raises, and torch where it cannot follow it
            raise ValueError(
                f"torch.export cannot follow the network for any number of rows: {innermost(error)}. In encode and head take "
                "sizes from x.shape, and leave out len(x), .item() and conditions on values"
            ) from error
    for node in program.graph.nodes:
        # Where each operation stands in which file of this machine.
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node"):
            node.meta.pop(key, None)
    return program


def innermost(error: BaseException) -> str:
    """The first line of the error that the others were raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
