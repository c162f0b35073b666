"""A pickle read as data: what it would build is written down, and nothing of it is built.

A pickle is a program. Its operations are walked through here with lists, dicts, texts and numbers as they are; where it would
import something, the name is kept, and where it would call or make something, `Made` records which, from what, and the state
given to it. So nothing is imported or called, whatever the file asks for.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, BinaryIO

from skewless.importers.errors import ImportFileError

# Every operation is at least a byte and takes a bounded amount of memory; a scaler of 37 features has some hundred.
MAX_OPERATIONS = 100_000

# Python 2's names for modules that Python 3 calls otherwise, which protocols 0 to 2 still write.
_PYTHON_3 = {"copy_reg": "copyreg", "__builtin__": "builtins"}

_VALUES = frozenset(
    {
        "INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT",
        "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINUNICODE",
        "BINBYTES", "BINBYTES8", "SHORT_BINBYTES", "BYTEARRAY8",
    }
)  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class Named:
    """What a pickle would import, such as `numpy.ndarray`."""

    name: str


@dataclass(eq=False)
class Made:
    """What a pickle would make: by calling `function` with `arguments`, and then setting `state`, None where it sets none."""

    function: str
    arguments: tuple[Any, ...]
    state: Any = None


Finish = Callable[[Made, BinaryIO], Any]


def read_pickle(file: BinaryIO, allowed: Collection[str], finish: Finish | None = None) -> Any:
    """The value that one pickle of protocol 0 to 5 describes; the file is left behind its last operation.

    allowed: what it may name for importing, as `module.name`.
    finish: called with what has just been given its state, and the file; what it returns takes the value's place. So a
        format is read that puts other bytes between a pickle's operations.
    Raises ImportFileError for every other name, for an operation that plain data does not need, and for a damaged pickle.
    """
    machine = _Machine(allowed)
    try:
        for count, (operation, argument, _) in enumerate(pickletools.genops(file)):
            if count >= MAX_OPERATIONS:
                raise ImportFileError(f"its pickle has more than {MAX_OPERATIONS:,} operations")
            if operation.name == "STOP":
                return machine.result()
            machine.step(operation.name, argument)
            if operation.name == "BUILD" and finish is not None:
                machine.stack.append(finish(machine.pop(Made), file))
    except ImportFileError:
        raise
    # What pickletools raises for bytes that are no pickle, and the machine for operations without their operands.
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        raise ImportFileError(
            f"it is no pickle, or a damaged one: {str(error) or type(error).__name__:.200}"
        ) from error
    raise ImportFileError("its pickle breaks off")


class _Machine:
    def __init__(self, allowed: Collection[str]):
        self.allowed = allowed
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def pop(self, kind: type) -> Any:
        """The last value; raises ValueError where there is none of this kind, or where it is behind a mark."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0) or not isinstance(self.stack[-1], kind):
            raise ValueError(f"an operation has no {kind.__name__} to work on")
        return self.stack.pop()

    def marked(self) -> list[Any]:
        """The values since the last mark."""
        at = self.marks.pop()
        values, self.stack[at:] = self.stack[at:], []
        return values

    def result(self) -> Any:
        value = self.pop(object)
        if self.stack or self.marks:
            raise ValueError("it ends with more than one value")
        return value

    def step(self, name: str, argument: Any) -> None:
        if name in _VALUES:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            self.stack.append(tuple(reversed([self.pop(object) for _ in range(_TUPLES[name])])))
        else:
            self._structure(name, argument)

    def _structure(self, name: str, argument: Any) -> None:
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.marks.append(len(self.stack))
            case "EMPTY_LIST":
                self.stack.append([])
            case "EMPTY_DICT":
                self.stack.append({})
            case "TUPLE" | "LIST":
                values = self.marked()
                self.stack.append(tuple(values) if name == "TUPLE" else values)
            case "APPEND" | "APPENDS":
                values = [self.pop(object)] if name == "APPEND" else self.marked()
                target = self.pop(list)
                target += values
                self.stack.append(target)
            case "DICT" | "SETITEM" | "SETITEMS":
                values = self.marked() if name != "SETITEM" else [self.pop(object), self.pop(object)][::-1]
                target = {} if name == "DICT" else self.pop(dict)
                target |= self._items(values)
                self.stack.append(target)
            case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                self.memo[len(self.memo) if name == "MEMOIZE" else argument] = self.stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case "GLOBAL" | "STACK_GLOBAL":
                self.stack.append(self._named(name, argument))
            case "REDUCE" | "NEWOBJ":
                arguments = self.pop(tuple)
                self.stack.append(_made(self.pop(Named), arguments))
            case "BUILD":
                state = self.pop(object)
                made = self.pop(Made)
                if made.state is not None:
                    raise ValueError(f"it sets the state of a {made.function} twice")
                made.state = state
                self.stack.append(made)
            case _:
                raise ImportFileError(f"its pickle has the operation {name}, which plain data does not need")

    def _items(self, values: list[Any]) -> dict[str, Any]:
        keys = values[::2]
        # Texts only: others could be made to collide, or hash without end.
        if len(values) % 2 or any(type(key) is not str for key in keys):
            raise ValueError("a dict has something else than a text for a key")
        return dict(zip(keys, values[1::2], strict=True))

    def _named(self, operation: str, argument: Any) -> Named:
        if operation == "STACK_GLOBAL":
            name, module = self.pop(str), self.pop(str)
        else:
            module, _, name = argument.partition(" ")
        full = f"{_PYTHON_3.get(module, module)}.{name}"
        if full not in self.allowed:
            raise ImportFileError(f"it would have Python import '{full:.200}'")
        return Named(full)


def _made(named: Named, arguments: tuple[Any, ...]) -> Made:
    """Protocols 0 and 1 make an object by copyreg._reconstructor(its class, object, None)."""
    if named.name == "copyreg._reconstructor":
        if (
            len(arguments) != 3
            or not isinstance(arguments[0], Named)
            or arguments[1:] != (Named("builtins.object"), None)
        ):
            raise ValueError("copyreg._reconstructor is given something else than a class")
        return Made(arguments[0].name, ())
    return Made(named.name, arguments)
