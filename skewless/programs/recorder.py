"""Notes what a rewritten program computes: the hooks that skewless.programs.rewrite puts into it."""

from __future__ import annotations

import functools
import inspect
import operator
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import PurePath
from typing import Any

import numpy as np

from skewless.programs.trace import Call, Event, Item, Site, Swallowed, Trace, Value
from skewless.programs.values import Found, array_of, find, measure, number_of, replaced, state, unseen

# A line that runs more often than this is a loop over single numbers; what it does later is counted, not recorded.
MOST_RUNS = 2000
MIB = 1 << 20

Place = tuple[Site, int]
Substitutes = Mapping[Place, Mapping[str, np.ndarray]]

_OPERATORS: dict[str, tuple[str, Callable[..., Any]]] = {
    "Add": ("+", operator.add),
    "Sub": ("-", operator.sub),
    "Mult": ("*", operator.mul),
    "Div": ("/", operator.truediv),
    "FloorDiv": ("//", operator.floordiv),
    "Mod": ("%", operator.mod),
    "Pow": ("**", operator.pow),
    "MatMult": ("@", operator.matmul),
    "LShift": ("<<", operator.lshift),
    "RShift": (">>", operator.rshift),
    "BitOr": ("|", operator.or_),
    "BitXor": ("^", operator.xor),
    "BitAnd": ("&", operator.and_),
    "Lt": ("<", operator.lt),
    "LtE": ("<=", operator.le),
    "Gt": (">", operator.gt),
    "GtE": (">=", operator.ge),
    "Eq": ("==", operator.eq),
    "NotEq": ("!=", operator.ne),
    "USub": ("-x", operator.neg),
    "UAdd": ("+x", operator.pos),
    "Invert": ("~x", operator.invert),
}
_IN_PLACE: dict[str, Callable[..., Any]] = {
    "Add": operator.iadd,
    "Sub": operator.isub,
    "Mult": operator.imul,
    "Div": operator.itruediv,
    "FloorDiv": operator.ifloordiv,
    "Mod": operator.imod,
    "Pow": operator.ipow,
    "MatMult": operator.imatmul,
    "LShift": operator.ilshift,
    "RShift": operator.irshift,
    "BitOr": operator.ior,
    "BitXor": operator.ixor,
    "BitAnd": operator.iand,
}
# A container's own methods compute nothing.
_CONTAINERS = (list, tuple, dict, set, frozenset, str, bytes)


def _unseen(method: Callable[..., Any]) -> Callable[..., Any]:
    """Looking at a value may run the user's code, such as `__array_finalize__`; what that computes is not the program's."""

    @functools.wraps(method)
    def looking(self: Recorder, *args: Any, **keywords: Any) -> Any:
        before, self._local.looking = self.looking, True
        try:
            with unseen():
                return method(self, *args, **keywords)
        finally:
            self._local.looking = before

    return looking


@dataclass
class _Pending:
    """A call between the evaluation of its function and its result."""

    function: Any
    args: list[Any] = field(default_factory=list)
    keywords: dict[str, Any] = field(default_factory=dict)
    items: list[Item] = field(default_factory=list)


class Recorder:
    """The hooks of one run.

    sites: what the numbers in the hooks mean. own: whether a module, by its name, is the user's. substitutes: what to put in place of a
    result, by site, how often it ran before, and path in the result. memory: arrays are kept whole up to so many bytes together.
    file: the path of the input, by which calls are not told apart.
    """

    def __init__(
        self,
        sites: list[Site],
        own: Callable[[str], bool],
        substitutes: Substitutes | None = None,
        memory: int = 256 * MIB,
        file: str = "",
    ):
        self._file = file
        self._sites, self._own, self._substitutes, self._memory = sites, own, substitutes or {}, memory
        self._pending: dict[tuple[int, int], _Pending] = {}
        # Containers that were written to since they were last looked at: looked at again only when they are used.
        self._written: dict[int, tuple[Any, int, list[Item]]] = {}
        # Objects of libraries that hold arrays, such as a fitted scaler: what they held when they were made or fitted.
        self._states: dict[int, tuple[Any, list[Item]]] = {}
        self._runs: Counter[int] = Counter()
        self._numbers: set[float] = set()
        self._caught: dict[tuple[int, str, str], int] = {}
        self._last_caught: dict[int, list[tuple[int, str, str]]] = {}
        self._notes: dict[str, None] = {}
        self.events: list[Event] = []
        self.values: dict[str, Value] = {}
        self.arrays: dict[str, np.ndarray] = {}
        self.settings: dict[str, str] = {}
        self._local = threading.local()

    @property
    def looking(self) -> bool:
        return getattr(self._local, "looking", False)

    def trace(self, program: str, file: str, outputs: Any, seconds: float, sources: Mapping[str, str]) -> Trace:
        """What was noted; `outputs` is what the function returned."""
        returned = self._items(outputs)
        swallowed = tuple(
            Swallowed(self._sites[site], kind, message, count)
            for (site, kind, message), count in self._caught.items()
            if count > 0
        )
        over = [
            f"{self._sites[s]} ran {n:,} times; the first {MOST_RUNS:,} are recorded"
            for s, n in self._runs.items()
            if n > MOST_RUNS
        ]
        versions = {e.call.package: e.call.version for e in self.events if e.call and e.call.version}
        return Trace(
            program,
            file,
            tuple(self.events),
            self.values,
            tuple(returned),
            self.arrays,
            swallowed,
            self.settings,
            {"python": ".".join(map(str, sys.version_info[:3])), **dict(sorted(versions.items()))},
            seconds,
            (*self._notes, *over),
            sources,
        )

    # --- hooks of calls

    def function(self, site: int, function: Any) -> Any:
        if not self.looking:
            pending = self._pending[id(sys._getframe(1)), site] = _Pending(function)
            owner = _owner(function)
            if owner is not None and type(owner) not in _CONTAINERS and not self._is_own(function):
                # Before the call, which may change it: `x.sort()`.
                pending.items += self._items(owner)
        return function

    def argument(self, site: int, value: Any, name: str | None = None) -> Any:
        pending = self._pending.get((id(sys._getframe(1)), site))
        if pending is not None:
            if name is None:
                pending.args.append(value)
            else:
                pending.keywords[name] = value
            pending.items += self._items(value)
        return value

    def starred(self, site: int, values: Iterable[Any]) -> tuple[Any, ...]:
        values = tuple(values)
        pending = self._pending.get((id(sys._getframe(1)), site))
        if pending is not None:
            pending.args += values
            for value in values:
                pending.items += self._items(value)
        return values

    def mapping(self, site: int, values: Any) -> Any:
        pending = self._pending.get((id(sys._getframe(1)), site))
        if pending is not None and isinstance(values, Mapping):
            pending.keywords.update(values)
            pending.items += self._items(dict(values))
        return values

    def result(self, site: int, value: Any) -> Any:
        pending = self._pending.pop((id(sys._getframe(1)), site), None)
        return value if pending is None else self._called(site, pending, value)

    @_unseen
    def _called(self, site: int, pending: _Pending, value: Any) -> Any:
        function = pending.function
        owner = _owner(function)
        if type(owner) in _CONTAINERS or self._is_own(function):
            return value
        inputs = pending.items
        if owner is not None:
            inputs = [*self._state(owner), *inputs]
        elif not isinstance(function, type):
            inputs = [*self._state(function), *inputs]
        call = self._call(pending)
        name = call.function if call else _name(function)
        outputs = self._found(value, derived=bool(inputs))
        made = not outputs and value is not owner and self._is_library_object(value)
        if made:
            outputs = list(state(value))
        if not outputs and (value is None or value is owner):
            self._changed(site, name, pending, owner, inputs, call)
            return value
        if not outputs and made and call is not None and self._runs[site] < MOST_RUNS:
            # An object without arrays, such as one that takes decibels: what it was made with still tells the programs apart.
            self.events.append(
                Event(len(self.events), self._sites[site], self._runs[site], name, tuple(inputs), (), call)
            )
            self._runs[site] += 1
        value = self._event(site, name, inputs, outputs, value, call)
        if made and outputs:
            self._states[id(value)] = (value, [self._item(f) for f in state(value)])
        return value

    @_unseen
    def _changed(
        self, site: int, name: str, pending: _Pending, owner: Any, inputs: list[Item], call: Call | None
    ) -> None:
        """A call that gave nothing may have changed what it was given, such as `shuffle(x)` or `scaler.fit(x)`."""
        known = {item.digest for item in inputs}
        things = [owner, *pending.args, *pending.keywords.values()]
        for thing in things:
            if array_of(thing) is not None:
                outputs = [found for found in self._found(thing) if measure(found.array).digest not in known]
                if outputs:
                    self._event(site, name, inputs, outputs, thing, call, in_place=True)
        if owner is not None and self._is_library_object(owner):
            held = list(state(owner))
            if held and [measure(f.array).digest for f in held] != [
                i.digest for i in self._states.get(id(owner), (None, []))[1]
            ]:
                self._event(site, name, pending.items, held, owner, call, in_place=True)
                self._states[id(owner)] = (owner, [self._item(f) for f in state(owner)])

    # --- hooks of operators and statements

    def binary(self, site: int, name: str, left: Any, right: Any) -> Any:
        symbol, operation = _OPERATORS[name]
        if self.looking or self._too_often(site):
            return operation(left, right)
        inputs = [*self._items(left), *self._items(right)]
        return self._done(site, symbol, inputs, operation(left, right))

    def _too_often(self, site: int) -> bool:
        """Whether a line's runs are only counted by now: looking at what it is given takes longer than what it does."""
        if self._runs[site] < MOST_RUNS:
            return False
        self._runs[site] += 1
        return True

    def unary(self, site: int, name: str, operand: Any) -> Any:
        symbol, operation = _OPERATORS[name]
        if self.looking or self._too_often(site):
            return operation(operand)
        inputs = self._items(operand)
        return self._done(site, symbol, inputs, operation(operand))

    def inplace(self, site: int, name: str, left: Any, right: Any) -> Any:
        if self.looking or self._too_often(site):
            return _IN_PLACE[name](left, right)
        inputs = [*self._items(left), *self._items(right)]
        return self._done(site, f"{_OPERATORS[name][0]}=", inputs, _IN_PLACE[name](left, right))

    def inplace_part(self, site: int, name: str, part: Any, value: Any, container: Any) -> Any:
        """`container[...] += value`: the part may be a view, and the container changed before anything is stored into it."""
        if self.looking or self._runs[site] > MOST_RUNS:
            return _IN_PLACE[name](part, value)
        before = self._items(container)
        done = self.inplace(site, name, part, value)
        if before:
            self._written[id(container)] = (container, site, [*before, *self._items(done)])
        return done

    def item(self, site: int, container: Any, index: Any) -> Any:
        if self.looking or type(container) in _CONTAINERS or isinstance(container, type) or self._too_often(site):
            return operator.getitem(container, index)
        if not (inputs := self._items(container)):
            return operator.getitem(container, index)
        inputs = [*inputs, *self._items(index)]
        return self._done(site, "[]", inputs, operator.getitem(container, index))

    @staticmethod
    def slice(lower: Any, upper: Any, step: Any) -> Any:
        return slice(lower, upper, step)

    def attribute(self, site: int, thing: Any, name: str) -> Any:
        value = getattr(thing, name)
        if self.looking or array_of(value) is None:
            return value
        inputs = [*self._items(thing), *self._state(thing)]
        return self._done(site, f".{name}", inputs, value) if inputs else value

    def elements(self, site: int, value: Any) -> Any:
        """An array's rows are values of their own when somebody loops over it."""
        known = None if self.looking else array_of(value)
        if known is not None and known[1].ndim > 1 and known[0] in ("numpy", "torch"):
            found = [Found(f"[{at}]", known[0], value[at], row) for at, row in enumerate(known[1][:MOST_RUNS])]
            self._event(site, "for", self._items(value), found, value, None, in_place=True)
        return value

    def assigned(self, site: int, value: Any, name: str) -> Any:
        if type(value) in (bool, int, float, str) and len(text := repr(value)) < 80:
            self.settings[f"{self._sites[site]} {name}"] = text
        return value

    def unpacked(self, site: int, value: Any, *names: str) -> Any:
        if isinstance(value, list | tuple) and len(value) == len(names):
            for name, part in zip(names, value, strict=True):
                self.assigned(site, part, name)
        return value

    def storing(self, site: int, value: Any, container: Any) -> Any:
        """Before `container[...] = value`. What that makes of the container is noted when it is used: a loop may write a million times."""
        key = id(container)
        if self.looking:
            return value
        if array_of(container) is not None or key in self._written:
            if key not in self._written:
                self._written[key] = (container, site, self._items(container))
            _, _, inputs = self._written[key]
            if len(inputs) < MOST_RUNS:
                inputs += self._items(value)
            self._written[key] = (container, site, inputs)
        return value

    def caught(self, site: int) -> None:
        kind, error, _ = sys.exc_info()
        if self.looking:
            return
        key = (site, kind.__name__ if kind else "", " ".join(str(error).split())[:200])
        self._caught[key] = self._caught.get(key, 0) + 1
        self._last_caught.setdefault(site, []).append(key)

    def escaped(self, site: int) -> None:
        if not self.looking and (waiting := self._last_caught.get(site)):
            self._caught[waiting.pop()] -= 1

    # --- what is noted

    def _done(self, site: int, name: str, inputs: list[Item], value: Any) -> Any:
        if not inputs:
            return value
        return self._event(site, name, inputs, self._found(value, derived=True), value, None)

    @_unseen
    def _event(
        self,
        site: int,
        name: str,
        inputs: list[Item],
        outputs: list[Found],
        value: Any,
        call: Call | None,
        in_place: bool = False,
    ) -> Any:
        if not outputs:
            return value
        occurrence = self._runs[site]
        self._runs[site] += 1
        if occurrence >= MOST_RUNS:
            return value
        place = (self._sites[site], occurrence)
        if new := self._substitutes.get(place):
            for path, array in new.items():
                value = _written_into(value, array) if in_place and not path else replaced(value, path, array)
            outputs = [*self._found(value, derived=True)] or list(state(value))
        items = tuple(map(self._item, outputs))
        for found in outputs:
            if found.array.size == 1:
                self._numbers.add(float(np.real(found.array.reshape(-1)[0])))
        self.events.append(Event(len(self.events), place[0], occurrence, name, tuple(inputs), items, call))
        return value

    @_unseen
    def _found(self, value: Any, derived: bool = False) -> list[Found]:
        self._look_again(value)
        found = list(find(value, self._note))
        if not found and derived and (number := number_of(value)) is not None:
            return [Found("", "number", value, number)]
        return found

    @_unseen
    def _items(self, value: Any) -> list[Item]:
        if (number := number_of(value)) is not None:
            return [self._item(Found("", "number", value, number))] if float(value) in self._numbers else []
        if isinstance(value, slice):
            return [i for part in (value.start, value.stop, value.step) for i in self._items(part)]
        if value is None or isinstance(value, bool | int | str | bytes | type):
            return []
        self._look_again(value)
        return [self._item(found) for found in find(value, self._note)]

    def _look_again(self, value: Any) -> None:
        """Note what a container holds that was written to since it was last used."""
        parts = value if isinstance(value, list | tuple) and len(value) < MOST_RUNS else (value,)
        for part in parts:
            if (waiting := self._written.pop(id(part), None)) is not None:
                container, site, inputs = waiting
                if (known := array_of(container)) is not None:
                    self._event(site, "[]=", inputs, [Found("", known[0], container, known[1])], container, None, True)

    def _item(self, found: Found) -> Item:
        value = measure(found.array)
        if value.digest not in self.values:
            self.values[value.digest] = value
            if found.array.nbytes <= self._memory:
                self._memory -= found.array.nbytes
                self.arrays[value.digest] = np.array(found.array)
            else:
                self._note(
                    f"more arrays than fit into memory: some are compared by {len(value.sample)} of their numbers only"
                )
        dtype = str(getattr(found.holder, "dtype", found.array.dtype)).removeprefix("torch.")
        shape = tuple(found.array.shape)
        return Item(value.digest, found.path, found.kind, shape, dtype)

    def _state(self, thing: Any) -> list[Item]:
        return self._states.get(id(thing), (None, []))[1]

    def _shown(self, value: Any) -> str:
        if isinstance(value, str | PurePath) and self._file and str(value) == self._file:
            return "<the file>"
        return _text(value)

    def _note(self, text: str) -> None:
        self._notes[text] = None

    # --- functions

    def _is_own(self, function: Any) -> bool:
        function = _plain(function)
        if isinstance(function, type) or inspect.isroutine(function):
            module = getattr(function, "__module__", None)
            return self._own(module if isinstance(module, str) else type(function).__module__)
        return self._own(type(function).__module__)

    def _is_library_object(self, value: Any) -> bool:
        kind = type(value)
        return (
            kind.__module__ != "builtins"
            and not self._own(kind.__module__)
            and not isinstance(value, type)
            and not inspect.isroutine(value)
            and not inspect.ismodule(value)
        )

    @_unseen
    def _call(self, pending: _Pending) -> Call | None:
        function = pending.function
        name = _name(function)
        package = name.partition(".")[0]
        if package == "builtins":
            return None
        names, values = _bound(function, pending.args, pending.keywords)
        return Call(name, {n: self._shown(v) for n, v in values.items()}, tuple(names), package, _version(package))


def _written_into(container: Any, array: np.ndarray) -> Any:
    known = array_of(container)
    if known is None or (known[1].shape != array.shape and np.squeeze(known[1]).shape != np.squeeze(array).shape):
        raise ValueError("an array that is changed in place keeps its shape")
    array = array.reshape(known[1].shape)
    if known[0] == "torch":
        import torch

        container.detach().copy_(torch.from_numpy(np.ascontiguousarray(array)))
    elif known[0] == "numpy":
        container[...] = array
    else:
        raise ValueError(f"a {type(container).__name__} that was changed in place")
    return container


def _owner(function: Any) -> Any:
    """The object whose method a function is, None for any other function."""
    owner = function.__self__ if inspect.isroutine(function) and hasattr(function, "__self__") else None
    return None if isinstance(owner, type) or inspect.ismodule(owner) else owner


def _plain(function: Any) -> Any:
    """The function behind a partial or a decorator that says what it wraps."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.unwrap(function) if inspect.isroutine(function) else function


def _name(function: Any) -> str:
    """The name by which a library's users know a function: "torch.stack", "numpy.ndarray.mean"."""
    function = _plain(function)
    owner = getattr(function, "__self__", None) if inspect.isroutine(function) else None
    if isinstance(function, np.ufunc):
        return f"numpy.{function.__name__}"
    if inspect.isroutine(function) and owner is not None and not inspect.ismodule(owner):
        kind = owner if isinstance(owner, type) else type(owner)
        module = kind.__module__
        if inspect.ismethod(function):
            # As its class in the library says it: a JPEG's `resize` is PIL.Image.Image.resize.
            return _public(f"{function.__func__.__module__}.{function.__func__.__qualname__}")
        if kind.__name__ == "_VariableFunctionsClass":
            return f"torch.{function.__name__}"
        return _public(f"{module}.{kind.__qualname__}.{function.__name__}")
    if isinstance(function, type) or inspect.isroutine(function):
        module = getattr(function, "__module__", None) or (owner.__name__ if inspect.ismodule(owner) else "builtins")
        package = module.partition(".")[0]
        name = getattr(function, "__name__", "")
        if name and getattr(sys.modules.get(package), name, None) is function:
            # numpy.stack, wherever numpy keeps it.
            return f"{package}.{name}"
        return _public(f"{module}.{getattr(function, '__qualname__', function.__name__)}")
    return _public(f"{type(function).__module__}.{type(function).__qualname__}.__call__")


def _public(name: str) -> str:
    """Without the private modules in which a library keeps what it offers: scipy.signal._filter_design.butter is scipy.signal.butter."""
    return ".".join(part for part in name.split(".") if not part.startswith("_") or part.startswith("__"))


def _bound(function: Any, args: list[Any], keywords: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """(names that were given, all arguments by name with defaults); by position where a function does not tell its own."""
    try:
        bound = inspect.signature(function).bind(*args, **keywords)
    except (TypeError, ValueError):
        given = {**{str(at): value for at, value in enumerate(args)}, **keywords}
        return list(given), given
    names = list(bound.arguments)
    bound.apply_defaults()
    values: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            values.update(value)
        elif kind is not inspect.Parameter.VAR_POSITIONAL or value:
            values[name] = value
    return names, values


# Objects of these packages tell briefly what they are: torch.float32, cuda:0, PosixPath.
_SHOWN = ("torch", "numpy", "pathlib", "PIL", "enum", "fractions", "decimal")


def _text(value: Any) -> str:
    known = array_of(value)
    if known is not None:
        dtype = str(getattr(value, "dtype", known[1].dtype)).removeprefix("torch.")
        return f"<{known[0]} {dtype} {tuple(known[1].shape)}>"
    if inspect.isroutine(value) or isinstance(value, type):
        return _name(value)
    if value is None or type(value) in (bool, int, float, complex, str, bytes, slice):
        text = repr(value)
        return text if len(text) <= 120 else text[:117] + "..."
    if isinstance(value, list | tuple | set | dict) and type(value) in _CONTAINERS and len(value) <= 16:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{_text(k)}: {_text(v)}" for k, v in value.items()) + "}"
        opening, closing = {list: ("[", "]"), tuple: ("(", ")")}.get(type(value), ("{", "}"))
        return opening + ", ".join(map(_text, value)) + closing
    if type(value).__module__.partition(".")[0] in _SHOWN:
        return str(value)
    return f"<{type(value).__qualname__}>"


_VERSIONS: dict[str, str] = {}


def _version(package: str) -> str:
    if package not in _VERSIONS:
        try:
            known = metadata.version(package)
        except metadata.PackageNotFoundError:
            known = str(getattr(sys.modules.get(package), "__version__", ""))
        _VERSIONS[package] = known
    return _VERSIONS[package]
