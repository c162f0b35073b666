"""A network without a class: what `torch.export.save` wrote, run in eager mode."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from skewless.core.git_lfs import pointer
from skewless.core.networks.network import Network
from skewless.core.networks.pt2 import AGAIN, MAX_BYTES, ExportedError, cleaned, require, shown


@dataclass(frozen=True)
class ExportedFile:
    """What a model.yaml says of an exported network: `{exported: model.pt2}` or `{exported: {file: model.pt2, ...}}`.

    file: in the archive's folder. outputs: names for the program's outputs, in order, where it has none of its own.
    per: "segment" for a program whose rows do not depend on one another and whose outputs have a row for each; "recording"
        for one that takes all rows of one recording.
    """

    file: str
    outputs: tuple[str, ...] = ()
    per: Literal["segment", "recording"] = "segment"

    def __post_init__(self):
        if Path(self.file).name != self.file or not self.file:
            raise ValueError(
                f"file is {self.file!r}, expected the name of a file in the archive's folder, such as model.pt2"
            )


class ExportedNetwork(Network):
    """A network that is its own exported program, as `torch.export.save` wrote it with a dynamic first dimension.

    The program takes one float32 tensor `(N, *input_shape)`. Its outputs have names: the keys where forward returns a
    dict, otherwise those that `outputs` gives to the tensors in order. With `per="segment"` the rows do not depend on one
    another and every output has N rows too; with `per="recording"` all N rows are one recording's segments and the
    outputs may have any shape. The network computes as it was exported, and cannot be trained.

    State-dict keys: `program.` and the names in the network that was exported.

    file: the name of the file it came from, in the archive's folder; empty for a program made in memory.

    input_shape: of one row, without the first dimension. output_names: in the program's order.
    Raises ExportedError for any other program.
    """

    packages: ClassVar[tuple[str, ...]] = ("torch",)

    def __init__(
        self,
        program: torch.export.ExportedProgram,
        outputs: Sequence[str] = (),
        per: Literal["segment", "recording"] = "segment",
        file: str = "",
    ):
        super().__init__()
        require(per in ("segment", "recording"), f"per is {per!r}, expected segment or recording")
        _require_inference(program)
        values = {node.name: node.meta.get("val") for node in program.graph.nodes}
        batch, self.input_shape = _input_of(program, values)
        self.per, self.output_names = per, _output_names(program, tuple(outputs))
        found: list[Any] = [values.get(name) for name in program.graph_signature.user_outputs]
        for name, value in zip(self.output_names, found, strict=True):
            _require_output(name, value, batch if per == "segment" else None)
        self._row_shapes = [tuple(value.shape[1:]) for value in found]
        self.file = file
        self.program = program.module()
        # torch leaves constants as plain attributes, which `.to(device)` would not move.
        for path, value in program.constants.items():
            owner, name = self.program.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
            if owner.__dict__.pop(name, None) is not None:
                owner.register_buffer(name, value, persistent=False)
        self.training = False

    @classmethod
    def from_file(
        cls, path: Path, outputs: Sequence[str] = (), per: Literal["segment", "recording"] = "segment"
    ) -> ExportedNetwork:
        """The network of a `.pt2` file, loaded onto the CPU without running code that the file brings."""
        from torch.export.pt2_archive._package import load_pt2  # torch.export.load, which only logs what goes wrong

        try:
            with open(path, "rb") as file:
                # Not all that it may have at once: Python takes the memory before it reads.
                size = os.fstat(file.fileno()).st_size
                data = file.read(min(size, MAX_BYTES) + 1)
            lfs = pointer(data)
            require(not lfs, lfs)
            checked = cleaned(data)
            with warnings.catch_warnings(action="ignore", category=UserWarning):
                # Without torch's warning of weights in bytes that Python takes for constant: nothing else has them.
                program = load_pt2(checked).exported_programs["model"]
            return cls(program, outputs, per, Path(path).name)
        except (ExportedError, OSError) as error:
            raise ExportedError(f"{path}: {error}") from error
        except Exception as error:  # whatever torch and sympy raise where a program does not fit together
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise ExportedError(f"{path}: torch {torch.__version__} cannot load it: {reason}; {AGAIN}") from error

    @property
    def files(self) -> tuple[str, ...]:
        return (self.file,) if self.file else ()

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Rows `(N, *input_shape)` to all outputs side by side `(N, F)`, each flattened; per recording `x` itself."""
        if self.per == "recording":
            return x
        return torch.cat([value.reshape(value.shape[0], -1).float() for value in self._run(x)], dim=1)

    def head(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """One recording's rows of `encode` to its outputs by name: per segment each `(S, ...)`, per recording as the
        program gives them."""
        if self.per == "recording":
            return dict(zip(self.output_names, self._run(features), strict=True))
        columns = features.split([math.prod(shape) for shape in self._row_shapes], dim=1)
        shaped = [column.reshape(-1, *shape) for column, shape in zip(columns, self._row_shapes, strict=True)]
        return dict(zip(self.output_names, shaped, strict=True))

    def _run(self, x: torch.Tensor) -> list[torch.Tensor]:
        result = self.program(x)
        if isinstance(result, torch.Tensor):
            return [result]
        return list(result.values() if isinstance(result, dict) else result)

    def train(self, mode: bool = True) -> ExportedNetwork:
        """Stays in inference; raises ExportedError when asked to train."""
        require(not mode, "an exported network stays as it was exported and cannot train; train before exporting")
        return self

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ExportedNetwork:
        """As in nn.Module; the device on which the program makes new tensors is written into it and moves along."""
        super()._apply(fn, recurse)
        device = fn(torch.empty(0)).device
        for node in self.program.graph.nodes:
            arguments = node.args, dict(node.kwargs)
            moved = fx.node.map_aggregate(arguments, lambda a: device if isinstance(a, torch.device) else a)
            node.args, node.kwargs = moved
        self.program.recompile()
        return self


def _require_inference(program: torch.export.ExportedProgram) -> None:
    """Raise ExportedError if a layer was exported as it is in training."""
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            names = [argument.name for argument in node.target._schema.arguments]
            given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
            training = given.get("training") is True or given.get("train") is True or given.get("dropout_p")
            require(not training, f"{node.name} was exported as in training; call .eval() before torch.export.export")


def _input_of(program: torch.export.ExportedProgram, values: dict[str, Any]) -> tuple[Any, tuple[int, ...]]:
    """The symbol of the input's first dimension, and the shape of its rows."""
    found: list[Any] = [values.get(name) for name in program.graph_signature.user_inputs]
    fits = len(found) == 1 and isinstance(found[0], torch.Tensor) and found[0].dtype == torch.float32
    require(fits, f"the program takes {' and '.join(map(shown, found))}, expected one float32 tensor")
    batch = _rows(found[0])
    require(
        batch is not None and batch.is_Symbol,
        f"the program takes {shown(found[0])}, expected a dynamic first dimension and no other; export it with "
        "dynamic_shapes=({0: torch.export.Dim('batch')},)",
    )
    limits = program.range_constraints.get(batch)
    # torch takes one row too where it notes a lower limit of two.
    require(
        limits is None or (limits.lower <= 2 and not limits.upper.is_Integer),
        f"the program takes {limits and limits.lower} to {limits and limits.upper} rows, expected 1 and more; export it "
        "with torch.export.Dim('batch'), without min and max",
    )
    return batch, tuple(found[0].shape[1:])


def _output_names(program: torch.export.ExportedProgram, given: tuple[str, ...]) -> tuple[str, ...]:
    """The names of a dict's values, or those given for a tuple, a list or a single tensor."""
    spec = program.call_spec.out_spec
    flat = spec.is_leaf() or all(child.is_leaf() for child in spec.children())
    require(flat, "the program's outputs are nested, expected a tensor, or a tuple, list or dict of tensors")
    own = list(spec.context) if not spec.is_leaf() and issubclass(spec.type, dict) else None
    example = ", ".join(f"name_{k + 1}" for k in range(spec.num_leaves))
    require(
        own is not None or len(given) == spec.num_leaves,
        f"the program has {spec.num_leaves} outputs without names and outputs is {list(given)}; name them with outputs: "
        f"[{example}]",
    )
    require(
        own is None or not given or set(given) == set(own),
        f"outputs is {list(given)}, but the program names its outputs itself: {own}; leave outputs out",
    )
    names = given if own is None else tuple(own)
    valid = all(isinstance(name, str) and name for name in names) and 0 < len(names) == len(set(names))
    require(valid, f"the outputs' names are {list(names)}, expected at least one, all different, none empty")
    return names


def _require_output(name: str, value: Any, batch: Any) -> None:
    """Raise ExportedError unless the output is of floating-point numbers, in `batch` rows where that is not None."""
    floating = isinstance(value, torch.Tensor) and value.dtype.is_floating_point
    require(floating, f"the program's output {name} is {shown(value)}, expected a tensor of floating-point numbers")
    require(
        batch is None or _rows(value) == batch,
        f"the program's output {name} is {shown(value)}, expected one row of fixed shape for each row of the input; if "
        "the rows are one recording's segments, choose per: recording",
    )


def _rows(value: torch.Tensor) -> Any:
    """The size of a dynamic first dimension, as sympy has it; None if that is not the tensor's only dynamic one."""
    # An int where fixed, a torch.SymInt where dynamic; torch annotates both as int.
    shape: Sequence[Any] = value.shape
    only = value.ndim > 0 and all(isinstance(size, int) for size in shape[1:])
    return shape[0].node.expr if only and isinstance(shape[0], torch.SymInt) else None
