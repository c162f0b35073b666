"""Python that is hard on whatever rewrites syntax trees: `awkward(path)` runs all of it and returns what came out.

Each case is a function without arguments that returns arrays and plain results. None depends on the file at `path`, on time, or on
the name that the module was imported by, so two runs must agree exactly. The module has to be in `sys.modules` while it runs, as
any imported module is: pickle and dataclasses look for it there.
"""

# What the rules below object to is what this file is made of.
# ruff: noqa
from __future__ import annotations

import abc
import asyncio
import contextlib
import copy
import dataclasses
import enum
import functools
import inspect
import io
import itertools
import linecache
import operator
import pickle
import sys
import traceback
import typing
import warnings
import weakref
from collections import ChainMap, OrderedDict, defaultdict, namedtuple
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

CASES: dict[str, Callable[[], Any]] = {}
COUNTER = 0
RUN_AS_SCRIPT = False
T = TypeVar("T")


def case(function):
    CASES[function.__name__] = function
    return function


def awkward(path: str) -> dict[str, Any]:
    """The result of every case, by its name."""
    assert isinstance(path, str), path
    return {name: function() for name, function in CASES.items()}


class Log(list):
    """Notes the order in which things are evaluated."""

    def __call__(self, value, note=None):
        self.append(value if note is None else note)
        return value


# Generators


@case
def generators():
    """Send, throw, close, return values, and yield in the middle of expressions."""
    log = Log()

    def averager(start=0.0):
        total, count = np.zeros(3) + start, 0
        try:
            while True:
                try:
                    received = yield total / max(count, 1)
                except KeyError as error:
                    log(f"thrown {error.args[0]}")
                    received = yield "caught"
                if received is None:
                    return total
                total = total + received
                count += 1
        finally:
            log("closed")

    def outer():
        result = yield from averager()
        log(result.tolist())
        yield from (x * x for x in range(3))
        yield from [np.arange(2), *np.eye(2)]
        return "done"

    first = outer()
    out = [next(first), first.send(np.arange(3.0)), first.send(np.ones(3)), first.throw(KeyError("k"))]
    out.append(first.send(None))
    out.extend(first)
    second = averager(1.0)
    next(second)
    second.close()

    def both():
        log((yield 1) + (yield 2))
        log([(yield), (yield)])
        log(f"{(yield 5)}{(yield 6)!r:>8}")
        return {(yield 7): (yield 8)}

    third = both()
    for value in [None, 10, 20, 30, 40, "a", "b", "key"]:
        out.append(third.send(value))
    try:
        third.send("value")
    except StopIteration as stop:
        out.append(stop.value)
    else:
        out.append("never")
    with contextlib.suppress(StopIteration):
        next(first)
    fourth = averager()
    next(fourth)
    try:
        fourth.throw(ValueError, "unhandled")
    except ValueError as error:
        out.append(str(error))
    return out, list(log), inspect.getgeneratorstate(fourth), inspect.isgeneratorfunction(averager)


@case
def laziness():
    """Nothing is taken from an iterator before the program asks for it."""
    log = Log()
    numbers = (log(i) for i in itertools.count())
    pairs = zip(numbers, map(lambda x: log(-x), itertools.count(1)))
    head = list(itertools.islice(pairs, 2))
    seen_then = list(log)
    once = iter([np.arange(3), np.arange(3) + 1])
    box = [once]
    first = next(box[0])
    rest = list(once)
    forever = itertools.cycle([1.5, 2.5])
    ended = max((x for x in (3, 1, 2)), key=lambda x: -x)
    return head, seen_then, first, rest, next(forever), ended, next(numbers), list(log)


# Coroutines


async def _ticks(n: int) -> AsyncIterator[np.ndarray]:
    for i in range(n):
        await asyncio.sleep(0)
        sent = yield np.full(2, i)
        if sent is not None:
            yield sent


class _Session:
    def __init__(self, log):
        self.log = log

    async def __aenter__(self):
        self.log("enter")
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, kind, error, trace):
        self.log(f"exit {kind.__name__ if kind else None}")
        return kind is ZeroDivisionError

    def __await__(self):
        yield from asyncio.sleep(0).__await__()
        return np.arange(4.0)


@contextlib.asynccontextmanager
async def _opened(value):
    try:
        yield value
    finally:
        await asyncio.sleep(0)


async def _coroutines():
    log = Log()
    plain = [x async for x in _ticks(3) if x[0] != 1]
    nested = {int(x[0]): [y.sum() async for y in _ticks(int(x[0]) + 1)] async for x in _ticks(2)}
    async with _Session(log) as session, _opened("b") as b:
        total = sum([await session, await session])
        log(b)
    async with _Session(log):
        1 / 0
    gathered = await asyncio.gather(asyncio.sleep(0, "x"), _double(21), return_exceptions=True)
    ticks = _ticks(2)
    sent = [await ticks.asend(None), await ticks.asend(np.ones(1)), await anext(ticks)]
    await ticks.aclose()
    async for last in _ticks(2):
        if last[0]:
            break
    else:
        last = None
    squares = [(y := await _double(x)) + y for x in (1, 2)]
    return plain, nested, total, gathered, sent, last, squares, y, list(log)


async def _double(x):
    return (await asyncio.sleep(0, x)) * 2


@case
def coroutines():
    """async def, async for, async with, async generators and comprehensions, await inside expressions."""
    return asyncio.run(_coroutines()), inspect.iscoroutinefunction(_double), inspect.isasyncgenfunction(_ticks)


# Comprehensions and scopes


@case
def comprehensions():
    """Nested, with conditions and walrus; their variables do not leak, except those that walrus binds."""
    i = "outer"
    grid = [[i * j for j in range(3) if j != 1] for i in range(4) if i % 2]
    products = {
        (i, j): a @ b
        for i, a in enumerate([np.eye(2), np.ones((2, 2))])
        for j, b in enumerate([np.arange(2.0)])
        if a.any()
    }
    squares = {k: v for k, v in ((n, n**2) for n in range(5)) if v > 3}
    letters = {c for word in ("ab", "bc") for c in word}
    found = [y for x in range(6) if (y := x * x) > 8 and x < 5]
    any_big = any((witness := x) > 2 for x in [1, 2, 3, 4])
    later = [lambda: i for i in range(3)]
    bound = [lambda i=i: i for i in range(3)]
    arrays = [row[::-1] for row in np.arange(6).reshape(2, 3)]
    gen = (x + offset for x in range(3))
    offset = 100
    late = list(gen)

    class Body:
        base = 5
        direct = [n for n in range(base)]
        doubled = list(map(lambda x: x * 2, range(base)))

    return (
        i,
        grid,
        products,
        squares,
        sorted(letters),
        found,
        y,
        any_big,
        witness,
        [f() for f in later],
        [f() for f in bound],
        arrays,
        late,
        Body.direct,
        Body.doubled,
    )


@case
def closures():
    """nonlocal, global, default values that are evaluated once, cells that change later."""
    global COUNTER
    COUNTER = 0
    total = np.zeros(2)

    def add(x, seen=[]):
        nonlocal total
        global COUNTER
        COUNTER += 1
        seen.append(x)
        total = total + x
        return len(seen)

    counts = [add(n) for n in (1, 2, 3)]

    def make():
        value = 1

        def get():
            return value

        def bump():
            nonlocal value
            value += 1
            return value

        return get, bump

    get, bump = make()
    bump()
    bump()

    def unbound():
        if False:
            never = 1
        return never

    try:
        unbound()
    except UnboundLocalError as error:
        message = type(error).__name__
    compose = lambda *fs: functools.reduce(lambda f, g: lambda x: g(f(x)), fs)
    lambda_default = lambda x, y=total, *, z=(lambda: 3)(): x + y.sum() + z
    names = add.__code__.co_freevars, get.__closure__[0].cell_contents
    return counts, total, COUNTER, get(), message, compose(abs, str, len)(-123), lambda_default(1), names


# Decorators


def _times(factor, *, note="plain"):
    def decorate(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            wrapper.calls += 1
            return function(*args, **kwargs) * factor

        wrapper.calls = 0
        wrapper.note = note
        return wrapper

    return decorate


@_times(2, note="outer")
@_times(factor=3)
def _decorated(x: float, /, y: float = 1.0, *, z: float = 0.5) -> float:
    """Adds three numbers."""
    return x + y + z


@functools.lru_cache(maxsize=4)
def _fibonacci(n):
    return n if n < 2 else _fibonacci(n - 1) + _fibonacci(n - 2)


@functools.singledispatch
def _describe(value):
    return "something"


@_describe.register
def _(value: int) -> str:
    return f"int {value}"


@_describe.register(np.ndarray)
def _(value):
    return f"array {value.shape}"


@_describe.register(list)
@_describe.register(tuple)
def _(value):
    return [_describe(v) for v in value]


class _Properties:
    made = 0

    def __init__(self, level):
        self._level = level
        type(self).made += 1

    @property
    def level(self):
        """The level."""
        return self._level

    @level.setter
    def level(self, value):
        self._level = max(value, 0)

    @level.deleter
    def level(self):
        self._level = None

    @staticmethod
    def twice(x):
        return 2 * x

    @classmethod
    def make(cls, *args):
        return cls(*args)

    @functools.cached_property
    def table(self):
        type(self).made += 100
        return np.linspace(0, self._level, 3)

    @functools.singledispatchmethod
    def show(self, x):
        return "other"

    @show.register
    def _(self, x: float):
        return f"float {x:.1f}"

    def __call__(self, function):
        self.made = type(function).__name__
        return function


@case
def decorators():
    """With arguments, stacked, functools.wraps, lru_cache, singledispatch, property, staticmethod, classmethod, instances."""
    _decorated.calls = _decorated.__wrapped__.calls = 0
    result = _decorated(1.0, z=2.0)
    about = (_decorated.__name__, _decorated.__doc__, _decorated.calls, _decorated.note, _decorated.__wrapped__.calls)
    number, info = _fibonacci(12), _fibonacci.cache_info().hits > 0
    shown = [_describe(x) for x in (3, np.zeros((2, 1)), [1, (2.0, np.ones(1))], "x")]
    _Properties.made = 0
    p = _Properties.make(4)
    p.level -= 6
    level = p.level
    p.level = 2
    tables = p.table, p.table is p.table, _Properties.made
    del p.level
    decorate = _Properties(1)

    @decorate
    @lambda f: functools.partial(f, 10)
    @(lambda factor: _times(factor))(4)
    def subtract(a, b):
        return a - b

    return (
        result,
        about,
        str(inspect.signature(_decorated)),
        number,
        info,
        shown,
        level,
        tables,
        p.level,
        decorate.made,
        _Properties.twice(np.ones(2)),
        p.show(1.5),
        p.show(1),
        _Properties.level.__doc__,
        subtract(3),
        subtract.func.__name__,
    )


@torch.no_grad()
def _without_gradient(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@torch.inference_mode()
def _inference(x):
    yield x + 1
    yield x + 2


@case
def gradients():
    """torch.no_grad as a decorator and as a context manager, on functions and generators; what requires gradients still does."""
    x = torch.ones(2, requires_grad=True)
    a = _without_gradient(x)
    with torch.no_grad():
        b = x * 3
        with torch.enable_grad():
            c = x * 4
    d = (x * x).sum()
    d.backward()
    e = list(_inference(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        f = torch.ones(2, 2) @ torch.ones(2, 2)
    leaf = torch.zeros(3, requires_grad=True)
    with torch.no_grad():
        leaf += 1
    flags = [t.requires_grad for t in (a, b, c, d, leaf)], [t.is_inference() for t in e], leaf.is_leaf
    return a, b, c.detach(), x.grad, flags, torch.is_grad_enabled(), f.dtype == torch.bfloat16, leaf.detach()


# Classes


class _Base:
    __private = "base"
    registry: ClassVar[list[str]] = []

    def __init_subclass__(cls, /, tag="none", **kwargs):
        super().__init_subclass__(**kwargs)
        _Base.registry.append(f"{cls.__name__}:{tag}")

    def __init__(self, x):
        self.__hidden = x
        self.x = np.asarray(x, dtype=float)

    def scaled(self, by=1.0):
        return self.x * by

    def hidden(self):
        __local = self.__hidden
        return __local, self.__private, sorted(n for n in vars(self) if n.startswith("_"))

    @classmethod
    def name(cls):
        return cls.__name__


class _Middle(_Base, tag="middle"):
    def scaled(self, by=1.0):
        return super().scaled(by) + 1

    @classmethod
    def name(cls):
        return "middle " + super().name()


class _Leaf(_Middle, tag="leaf"):
    def __init__(self, x):
        super(_Leaf, self).__init__(x)
        self.kind = __class__.__name__

    def scaled(self, by=1.0):
        parts = [super(_Leaf, self).scaled(by) for _ in range(1)]
        return parts[0] + self.helper()

    def helper(self):
        def inner():
            return super(__class__, self).scaled(0.0).sum()

        return inner()

    @staticmethod
    def __mangled(x):
        return -x

    def mangled(self, x):
        return self.__mangled(x) + _Leaf._Leaf__mangled(x)


class _Meta(type):
    @classmethod
    def __prepare__(mcs, name, bases, **kwargs):
        return OrderedDict(order=[])

    def __new__(mcs, name, bases, namespace, *, extra=0):
        made = super().__new__(mcs, name, bases, dict(namespace))
        made.order = [n for n in namespace if not n.startswith("__")]
        made.extra = extra
        return made

    def __init__(cls, name, bases, namespace, **kwargs):
        super().__init__(name, bases, namespace)

    def __len__(cls):
        return len(cls.order)

    def __getitem__(cls, item):
        return f"{cls.__name__}[{item}]"

    def __instancecheck__(cls, instance):
        return instance == 42


class _Made(metaclass=_Meta, extra=7):
    """Made by a metaclass."""

    b = 1
    a = 2
    for _i in range(3):
        a += _i
    if a > 3:

        def conditional(self):
            return self.a


class _Slots:
    __slots__ = ("x", "__weakref__", "_y")

    def __init__(self):
        self.x = 1


class _Positive:
    def __set_name__(self, owner, name):
        self.name = "_" + name
        self.owner = owner.__name__

    def __get__(self, instance, owner=None):
        return self if instance is None else getattr(instance, self.name)

    def __set__(self, instance, value):
        if value <= 0:
            raise ValueError(f"{self.name} is {value}")
        setattr(instance, self.name, value)


class _Described:
    width = _Positive()
    gain = _Positive()

    def __init__(self, width, gain):
        self.width, self.gain = width, gain


class _Anything:
    """Has every attribute one asks for, and counts the questions."""

    def __init__(self):
        object.__setattr__(self, "asked", [])

    def __getattr__(self, name):
        self.asked.append(name)
        return lambda *args: (name, args)

    def __setattr__(self, name, value):
        self.asked.append(f"{name}={value}")


class _Touchy:
    """Counts, or refuses, whatever is done to it besides being passed on."""

    touched: ClassVar[list[str]] = []

    def __array__(self, dtype=None, copy=None):
        self.touched.append("array")
        return np.zeros(3)

    def __len__(self):
        self.touched.append("len")
        return 3

    def __iter__(self):
        self.touched.append("iter")
        return iter((1.0, 2.0, 3.0))

    def __getitem__(self, i):
        self.touched.append("getitem")
        return 1.0

    @property
    def shape(self):
        self.touched.append("shape")
        return (3,)

    @property
    def dtype(self):
        self.touched.append("dtype")
        return np.dtype(float)

    def __repr__(self):
        raise RuntimeError("repr of a touchy object")

    def __eq__(self, other):
        raise RuntimeError("comparison of a touchy object")

    def __bool__(self):
        raise RuntimeError("truth of a touchy object")

    __hash__ = None


@case
def classes():
    """super() with and without arguments, __class__, private names, metaclasses, slots, descriptors, __getattr__."""
    leaf = _Leaf([1, 2])
    slots = _Slots()
    try:
        slots.z = 1
    except AttributeError:
        refused = not hasattr(slots, "_y")
    described = _Described(3, np.float64(2.0))
    try:
        described.gain = -1
    except ValueError as error:
        message = str(error)
    anything = _Anything()
    answer = anything.shape(2, 3)
    anything.level = 4
    _Touchy.touched.clear()
    touchy = _Touchy()
    box = [touchy, (touchy, {"a": touchy})]
    again = (lambda x, *rest, **named: x)(touchy, touchy, key=touchy)
    listed = list((touchy, 1.0, touchy)), dict(key=touchy)
    same = again is touchy and listed[0][2] is touchy and box[1][1]["a"] is touchy
    x = touchy.shape
    made = _Made()
    return (
        leaf.scaled(2.0),
        leaf.hidden(),
        leaf.kind,
        _Leaf.name(),
        leaf.mangled(5),
        _Base.registry,
        [c.__name__ for c in _Leaf.__mro__],
        (_Made.order, _Made.extra, len(_Made), _Made["k"], isinstance(42, _Made), made.conditional(), _Made.__doc__),
        refused,
        (described.width, described.gain, message, _Described.width.owner, vars(described)),
        answer,
        anything.asked,
        same,
        x,
        list(_Touchy.touched),
    )


class _Colour(enum.Enum):
    RED = (1.0, 0.0)
    GREEN = (0.0, 1.0)
    ALIAS = RED

    def __init__(self, x, y):
        self.x, self.y = x, y

    @property
    def mean(self):
        return (self.x + self.y) / 2

    def __add__(self, other):
        return NotImplemented if not isinstance(other, _Colour) else np.add(self.value, other.value)


class _Flags(enum.IntFlag):
    A = enum.auto()
    B = enum.auto()
    AB = A | B


class _Point(NamedTuple):
    """A point."""

    x: float
    y: float = 2.0

    @property
    def norm(self):
        return (self.x**2 + self.y**2) ** 0.5


_Pair = namedtuple("_Pair", "left right", defaults=[None])


@dataclass(order=True)
class _Settings:
    """Settings with defaults of several kinds."""

    rate: int = 16000
    window: str = "hann"
    bands: list[int] = field(default_factory=lambda: [1, 2], compare=False)
    derived: float = field(init=False, repr=False)
    shared: ClassVar[int] = 9
    start: dataclasses.InitVar[int] = 3

    def __post_init__(self, start):
        self.derived = self.rate / start


@dataclass(frozen=True, kw_only=True)
class _Frozen(Generic[T]):
    value: T
    data: np.ndarray = field(default_factory=lambda: np.zeros(2), compare=False)


@case
def records():
    """Dataclasses, NamedTuple, namedtuple and its __module__, Enum, typing.get_type_hints, pickle, copy."""
    settings = _Settings(start=4)
    changed = dataclasses.replace(settings, rate=8000, start=2)
    frozen = _Frozen[int](value=1)
    try:
        frozen.value = 2
    except dataclasses.FrozenInstanceError as error:
        message = type(error).__name__
    local = namedtuple("Local", ["a", "b"])
    point = _Point(3.0)._replace(y=4.0)
    restored = pickle.loads(pickle.dumps([settings, point, _Colour.GREEN, _Pair(1), _Leaf([1.0])]))
    deep = copy.deepcopy({"s": settings, "a": np.arange(3)})
    deep["s"].bands.append(3)
    hints = typing.get_type_hints(_Settings)
    return (
        repr(settings),
        repr(changed),
        settings.derived,
        changed < settings,
        dataclasses.asdict(settings),
        [f.name for f in dataclasses.fields(_Settings)],
        message,
        dataclasses.replace(frozen, value=np.float32(2)).value,
        local.__module__ == __name__ == _Pair.__module__ == _Settings.__module__,
        tuple(point),
        point.norm,
        [type(r).__name__ for r in restored],
        restored[0] == settings,
        restored[2] is _Colour.GREEN,
        restored[4].scaled(),
        settings.bands,
        (hints["rate"], hints["bands"] == list[int], typing.get_type_hints(_decorated)["z"]),
        (_Colour.ALIAS.name, [c.mean for c in _Colour], _Colour.RED + _Colour.GREEN, _Colour((0.0, 1.0)).name),
        (_Flags.A | _Flags.B) is _Flags.AB,
        int(_Flags.AB),
    )


# Operators


class _Odd:
    """Operators that return odd types, or none."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def __add__(self, other):
        self.log(f"{self.name}+")
        return NotImplemented

    def __radd__(self, other):
        self.log(f"+{self.name}")
        return [self.name, other]

    def __iadd__(self, other):
        self.log(f"{self.name}+=")
        return "replaced"

    def __matmul__(self, other):
        return (self.name, "@", other)

    def __rmatmul__(self, other):
        return (other, "@", self.name)

    def __getitem__(self, key):
        self.log(f"{self.name}[{key}]")
        return key

    def __setitem__(self, key, value):
        self.log(f"{self.name}[{key}]={value}")

    def __delitem__(self, key):
        self.log(f"del {self.name}[{key}]")

    def __contains__(self, item):
        self.log(f"{item} in {self.name}")
        return "yes"

    def __lt__(self, other):
        self.log(f"{self.name}<")
        return []

    def __eq__(self, other):
        return "equal"

    __hash__ = object.__hash__

    def __bool__(self):
        self.log(f"bool {self.name}")
        return False

    def __neg__(self):
        return None

    def __invert__(self):
        return np.array(~0)

    def __round__(self, n=None):
        return f"round {n}"

    def __format__(self, spec):
        return f"<{self.name}:{spec}>"

    def __index__(self):
        return 1

    def __pow__(self, other, modulo=None):
        return (other, modulo)

    def __divmod__(self, other):
        return 1, 2, 3

    def __enter__(self):
        self.log(f"enter {self.name}")
        return self.name

    def __exit__(self, kind, error, trace):
        self.log(f"exit {self.name} {kind and kind.__name__}")
        return kind is not None and issubclass(kind, LookupError)


class _Tagged(np.ndarray):
    """An array of a class of its own, which carries a note through operations."""

    def __array_finalize__(self, obj):
        self.note = getattr(obj, "note", "fresh")


class _Counted:
    """Takes part in numpy's operations without being an array."""

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        return ufunc.__name__, method, len(inputs)


class _Wrapped(torch.Tensor):
    calls: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls.append(getattr(func, "__name__", str(func)))
        return super().__torch_function__(func, types, args, kwargs or {})


@case
def operators():
    """Operands are evaluated in order and once; NotImplemented, reflected and in-place forms, odd results."""
    log = Log()
    a, b = _Odd("a", log), _Odd("b", log)
    reflected = 5 + b
    first_asked = a + type("_Special", (_Odd,), {"__radd__": lambda self, other: (self.name, other.name)})("s", log)
    try:
        a + 1
    except TypeError as error:
        refused = "unsupported" in str(error)
    both = log(1, "first") + log(2, "second") * log(3, "third")
    chained = log(1, "low") < log(5, "middle") <= log(5, "high") != log(0, "last")
    stopped = log(3, "x") < log(2, "y") < log(1, "never")
    odd_chain = a < b < 1
    contained = 3 in a, 3 not in a
    old = a
    a += 1
    kept = a, old.name
    equal = old == 1, old != 1, np.arange(3) == 1, torch.arange(3) == 1, (np.arange(3) == np.arange(2).sum()).any()
    logic = [] or "right", 0 and log("never"), old or "fell through", not old, 1 and 2, None or 0
    order = {log("k1"): log("v1"), log("k2"): log("v2"), **{log("k3"): log("v3")}}
    called = (lambda *p, **k: (p, k))(log(1), *[log(2)], log(3), x=log(4), **{"y": log(5)})
    picked = log("yes") if log(True, "test") else log("no")
    sliced = old[log(1) : log(2) : log(3)], old[1:2, ..., None], old[()], old[-1]
    old[log("t")] = log("value", "value first")
    del old[log("u")]
    matrix = np.eye(2)
    matrix @= np.array([[1.0, 2.0], [3.0, 4.0]])
    tagged = np.arange(4.0).view(_Tagged)
    tagged.note = "kept"
    wrapped = torch.ones(2).as_subclass(_Wrapped)
    _Wrapped.calls.clear()
    doubled = wrapped * 2
    calls = list(_Wrapped.calls)
    scalars = (
        7 // 2,
        -7 // 2,
        -7 % 3,
        7 % -3,
        2**-1,
        2**100,
        1 << 70,
        ~5,
        5 ^ 3,
        6 & 3,
        6 | 3,
        divmod(-7, 2),
        pow(3, 50, 7),
    )
    large = 2**200 % (10**9 + 7), int.from_bytes(b"\x01\x02", "little"), (10**30).bit_length(), 0.1 + 0.2, 1e308 * 10
    is_same = a is not old, None is None, matrix is matrix
    complex_number = (1 + 2j) * 1j, abs(3 + 4j), (-8) ** (1 / 3)
    return (
        (
            reflected[0],
            reflected[1],
            first_asked,
            refused,
            both,
            chained,
            stopped,
            odd_chain,
            contained,
            kept,
            equal,
            logic,
        ),
        (
            order,
            called,
            picked,
            sliced,
            -old,
            ~old,
            round(old, 2),
            f"{old:>{3 + 2}}",
            [10, 20][old],
            old**2,
            divmod(old, 1),
        ),
        (old @ 1, 1 @ old, matrix, type(tagged * 2).__name__, (tagged + 1)[1:].note, np.asarray(tagged)),
        (np.ones(2) + _Counted(), np.exp(_Counted()), type(doubled).__name__, calls, doubled.as_subclass(torch.Tensor)),
        (scalars, large, is_same, complex_number),
        list(log),
    )


@case
def assignments():
    """Augmented, multiple, starred, annotated, walrus; each target's parts are evaluated once, in Python's order."""
    log = Log()
    values = {"k": 10, "o": _Described(1, 1)}

    def f(key="k"):
        log(f"f {key}")
        return key

    def g(value=5):
        log(f"g {value}")
        return value

    values[f()] += g()
    values[f("o")].width += g(2)
    (lambda: log("container", "container") and values)()[f()] -= g(1)
    a = b = c = np.arange(3)
    a += 1
    b = b + 1
    first, *middle, last = range(5)
    [(p, q), *r] = [[1, 2], 3, 4]
    (*head, tail), single = "abc", 1
    x: int
    y: float = 1.5
    values["z"]: int = 3
    i = 0
    i, values[i] = 1, "at the new index"
    array = np.zeros((3, 3))
    array[f(0)], array[:, f(1)] = g(1), g(2)
    array[1:, ::2] += np.array([[1], [2]])
    array[[0, 0, 1]] += 1
    array[array > 3] *= -1
    array[..., -1] **= 2
    view = array[::2]
    view[:] = view[::-1].copy()
    lists = [1, 2, 3, 4]
    lists[1:3] = [9] * 4
    lists[::2] = "abc"
    alias = lists
    lists += [5]
    lists *= 1
    del lists[0], lists[-1:]
    tuples = ([1], 2)
    try:
        tuples[0] += [2]
    except TypeError:
        swallowed = tuples
    if (n := len(lists)) > 2 and (m := n * 2):
        n += m
    while (n := n - 1) > 3:
        pass
    swap = [1, 2]
    swap[0], swap[1] = swap[1], swap[0]
    text = "a"
    text += f"bc{text}"
    nothing = None
    nothing = (yielded := nothing)
    old_view = array[0]
    frozen = old_view.tolist()
    array[0] = 7.0
    return (
        values["k"],
        values["o"].width,
        a,
        b,
        c is a,
        (first, middle, last, p, q, r, head, tail, single),
        "x" in locals(),
        y,
        values["z"],
        values[1],
        array,
        old_view is not array[0],
        old_view,
        frozen,
        lists,
        alias is lists,
        swallowed,
        (n, m, swap, text, yielded),
        list(log),
    )


@case
def in_place():
    """Values that change after they were computed: torch's mul_, out=, views, slices, aliases, resize."""
    x = torch.arange(6.0)
    before = x.clone()
    view = x.view(2, 3)
    view[0].mul_(10)
    x[4:] = view[0, :2]
    torch.add(x, 1, out=x)
    y = x
    y -= 1
    y = y - 1
    z = np.arange(5.0)
    w = z[1:4]
    np.multiply(w, 2, out=w)
    np.cumsum(z, out=z)
    w[::-1] -= 0.5
    z.sort()
    z.fill(3.0) if z.size > 10 else z.clip(0, 9, out=z)
    shared = torch.from_numpy(z)
    shared[0] = -1
    grown = np.arange(3)
    grown.resize(5)
    padded = torch.zeros(2, 4)
    padded[:, 1:3].copy_(torch.ones(2, 2))
    padded.index_add_(0, torch.tensor([0]), torch.full((1, 4), 2.0))
    buffer = bytearray(b"\x00\x01\x02\x03")
    over = np.frombuffer(buffer, dtype=np.uint8)
    buffer[0] = 255
    wrapped = over + np.uint8(1)
    read_only = np.arange(3)
    read_only.flags.writeable = False
    try:
        read_only[0] = 5
    except ValueError:
        kept = read_only
    module = torch.nn.BatchNorm1d(3, momentum=0.5)
    normal = module(torch.arange(6.0).reshape(2, 3)).detach()
    records = np.zeros(2, dtype=[("a", "i4"), ("b", "f8", 2)])
    records["b"][1] = [1.5, 2.5]
    records[0]["a"] = 3
    loop = [1.0, 2.0]
    loop.append(loop)
    loops = list(loop)
    rows = [np.zeros(2)] * 2
    rows[0][0] = 1
    generator = np.random.default_rng(3)
    draws = generator.normal(size=2), generator.integers(0, 100, 3)
    torch.manual_seed(7)
    torch_draws = torch.rand(2)
    legacy = np.random.RandomState(1).rand(2)
    return (
        (before, x, y, view, z, w, shared, grown, padded, over, wrapped, kept),
        (normal, module.running_mean, int(module.num_batches_tracked)),
        (records["a"], records["b"], loops[2] is loop, rows, draws, torch_draws, legacy),
    )


# Control flow


@case
def control():
    """try, except, else, finally with return, loops with else, with several managers, suppress, exception groups."""
    log = Log()

    def early(x):
        try:
            if x == 0:
                return log("body")
            if x == 1:
                raise KeyError("one")
            1 / (x - 2)
        except KeyError:
            return log("except")
        except (ZeroDivisionError, TypeError) as error:
            log(type(error).__name__)
            raise RuntimeError("again") from error
        else:
            log("else")
        finally:
            log("finally")
            if x < 3:
                return "from finally"
        return "after"

    returned = [early(n) for n in range(4)]

    def loops():
        for i in range(3):
            try:
                if i == 1:
                    continue
                if i == 2:
                    break
            finally:
                log(f"loop {i}")
        else:
            log("never")
        while i:
            i -= 1
        else:
            log("exhausted")
        for i in ():
            pass
        return i

    ended = loops()
    with _Odd("m", log) as m, _Odd("n", log) as n, contextlib.suppress(ValueError):
        raise ValueError(m + n)
    with _Odd("k", log):
        {}["missing"]
    with contextlib.ExitStack() as stack:
        entered = [stack.enter_context(_Odd(name, log)) for name in "pq"]
        stack.callback(log, "callback")
    with np.errstate(divide="ignore", invalid="ignore"):
        infinite = np.array([1.0, 0.0]) / 0
    try:
        try:
            raise ValueError("inner")
        except ValueError as error:
            raise KeyError("outer") from None
    except KeyError as error:
        chain = error.__cause__, type(error.__context__).__name__, error.__suppress_context__
    gone = "error" in locals()

    def grouped():
        try:
            raise ExceptionGroup("several", [ValueError(1), TypeError("t"), ExceptionGroup("deep", [ValueError(2)])])
        except* ValueError as group:
            log([type(e).__name__ for e in group.exceptions])
        except* TypeError as group:
            log(group.exceptions[0].args)
        return "grouped"

    def noted():
        try:
            raise ValueError("base")
        except ValueError as error:
            error.add_note("a note")
            raise

    try:
        noted()
    except ValueError as error:
        notes = error.__notes__
        frames = [f.name for f in traceback.extract_tb(error.__traceback__) if f.filename == __file__]
        lines = [f.line for f in traceback.extract_tb(error.__traceback__) if f.filename == __file__]
    try:
        assert returned and log("asserted"), log("no message")
        assert not returned, log("message")
    except AssertionError as error:
        message = error.args
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def warn():
            warnings.warn("look up", UserWarning, stacklevel=2)

        start = sys._getframe().f_lineno
        warn()
        warnings.warn("here", DeprecationWarning)
    warned = [(str(w.message), w.lineno - start, w.filename == __file__) for w in caught]
    return (returned, ended, entered, infinite, chain, gone, grouped(), notes, frames, lines, message, warned), list(
        log
    )


def _matched(subject):
    match subject:
        case np.ndarray(shape=(_, n)) as array if n > 1:
            return array.T
        case np.ndarray():
            return "array"
        case 0 | 1:
            return "bit"
        case int(n) if n < 0:
            return f"negative {n}"
        case int() | float():
            return "number"
        case "on" | "off" as switch:
            return switch
        case str():
            return "text"
        case []:
            return "empty"
        case [_Point(x=x, y=0.0), *rest]:
            return x, rest
        case [first, [second, *_], *rest]:
            return first, second, rest
        case (a, b):
            return a, b
        case {"rate": rate, "data": np.ndarray(shape=(n,)), **others}:
            return rate, n, others
        case {}:
            return "mapping"
        case _Colour.RED:
            return "red"
        case None | True:
            return "singleton"
        case _:
            return "rest"


@case
def matching():
    """The match statement, with patterns of every kind."""
    match = {"case": 1}
    case = match["case"]
    subjects = [0, -3, 7, 2.5, "on", "word", [], [_Point(1.0, 0.0), 5], [1, [2, 3], 4], (8, 9), np.ones((1, 2)), object]
    more = [{"rate": 8, "data": np.zeros(4), "x": 1}, {"rate": 8}, _Colour.RED, _Colour.GREEN, None, np.arange(2)]
    return [_matched(s) for s in subjects + more], case


# Looking at itself


def _signature(
    a, b=2, /, c: "int" = 3, *args: float, d, e: list[np.ndarray] | None = None, **kwargs: Any
) -> tuple[int, ...]:
    """Has every kind of parameter.

    And a docstring of two paragraphs.
    """
    return a, b, c, args, d, e, kwargs


def _who():
    return sys._getframe().f_code.co_name, sys._getframe(1).f_code.co_name, inspect.stack()[1].function


def _scriptable(x: torch.Tensor, n: int) -> torch.Tensor:
    for i in range(n):
        x = x + i
    return x


@case
def introspection():
    """locals(), globals(), eval, exec, frames, signatures, docstrings, names, source."""
    one, two = 1, np.arange(2)
    names = sorted(locals())
    inner = (lambda: sorted(vars()))()
    evaluated = eval("one + two.sum() + COUNTER * 0"), eval("x + 1", {"x": 2}), eval(compile("one", "<text>", "eval"))
    space: dict[str, Any] = {"np": np}
    exec("def area(r):\n    return np.square(r) * 3\nside = area(4)", space)
    exec("three = 3")
    module = globals()
    here = sys._getframe()
    first = inspect.currentframe().f_lineno - introspection.__code__.co_firstlineno
    refused = []
    for attempt in (lambda: _signature(1, b=2, d=3), lambda: _signature(1), lambda: _signature(d=1)):
        try:
            attempt()
        except TypeError as error:
            refused.append(str(error))
    source = inspect.getsource(_who).splitlines()[0], linecache.getline(__file__, 1).strip()[:12]
    nested = lambda: None
    with warnings.catch_warnings():
        # Deprecated, and still common in code that prepares inputs.
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(_scriptable)(torch.arange(3.0), 2)
    return (
        names,
        inner,
        evaluated,
        space["side"],
        space["area"](np.ones(2)),
        "three" in locals(),
        module["CASES"] is CASES and module is sys.modules[__name__].__dict__,
        here.f_code.co_name,
        here.f_code.co_argcount,
        first,
        _who(),
        str(inspect.signature(_signature)),
        inspect.getdoc(_signature),
        _signature.__doc__,
        _signature.__annotations__,
        _signature.__defaults__,
        _signature.__kwdefaults__,
        _signature.__qualname__,
        nested.__qualname__,
        nested.__name__,
        _signature.__code__.co_varnames[:5],
        _Leaf.scaled.__qualname__,
        _signature(1, 2, 3, 4, 5, d=6, f=7),
        refused,
        source,
        scripted,
        __doc__.split(":")[0],
        __name__ == _who.__module__ == _Leaf.__module__,
        (__name__ == "__main__") is RUN_AS_SCRIPT,
        __debug__,
    )


@case
def lifetimes():
    """What the program drops is gone, and what it deletes is no longer there."""

    class Thing:
        pass

    gone = []
    thing = Thing()
    reference = weakref.ref(thing, lambda _: gone.append("thing"))
    del thing
    after = reference() is None
    array = np.zeros(3)
    weakref.finalize(array, gone.append, "array")
    array = None
    try:
        thing
    except UnboundLocalError as error:
        name = "thing" in str(error)
    made = [Thing() for _ in range(2)]
    cache = weakref.WeakSet(made)
    made.clear()
    count = {"a": [1, 2]}
    del count["a"][0]
    return after, gone, name, len(cache), count


# Text and numbers


@case
def text():
    """f-strings nested and with =, percent formatting, bytes, slices with steps and Ellipsis."""
    value, width, name = 3.14159, 10, "it's"
    items = {"k": [1, 2]}
    array = np.arange(24).reshape(2, 3, 4)
    strings = [
        f"{value=:.2f} {width = !s} {items['k'][0]=}",
        f"{f'{value:.{1 + 1}f}':>{width}}|{name!r:^{width}}|{{literal}}",
        f"{(lambda x: x * 2)(width)} {[i for i in range(3)]} {width if width > 3 else 0:+d} {'ab'}",
        f"""{value + 1:.1f}""",
        "%s %5.2f %-5s|%%" % (name, value, "x"),
        "%(a)d of %(b)r" % {"a": 3, "b": np.float32(1.5).item()},
        "{0:>{1}} {a[0]} {0!r}".format("x", 4, a=[9]),
        "\N{GREEK SMALL LETTER MU}" r"\n" "\t",
        f"{array.shape} {array[0, 0, 0]:03d} {np.float64(2)!s}",
    ]
    data = b"abc\x00\xff"
    count = "%d items" % array.size
    parts = [
        data[::-1],
        data[1:3],
        data[0],
        bytes([1, 2]) + data[-1:],
        b"%d-%s" % (3, b"x"),
        memoryview(data)[1:2].tobytes(),
    ]
    slices = [array[..., 0], array[0, ::-1, 1::2], array[:, None, -1, ..., :2].shape, "hello"[-3::-1], range(10)[2:8:3]]
    picks = array[[0, 1], :, [1, 2]], array[array % 5 == 0], array[np.ix_([0], [0, 2])], torch.arange(6)[None, ::2, ...]
    numbers = 1_000_000, 0xFF, 0b101, 0o17, 1e-3, 10**20, float("nan") != float("nan"), -0.0, 1 // 1, True + True
    printed = io.StringIO()
    print("a", 1, array[0, 0], sep="-", end="!", file=printed)
    return strings, count, parts, slices, picks, numbers, printed.getvalue()


@case
def calls():
    """Star arguments, unpacking, recursion, methods taken from objects, builtins given functions of the program."""

    def depth(n):
        return 0 if n == 0 else 1 + depth(n - 1)

    def variadic(first, *rest, last=None, **named):
        return first, rest, last, named

    def flatten(x):
        return sum(map(flatten, x), []) if isinstance(x, list) else [x]

    grid = np.arange(6).reshape(2, 3)
    append = (collected := []).append
    for row in grid:
        append(row.sum())
    swapped = dict(zip(*[["a", "b"], grid]))
    merged = {**swapped, "c": 1, **{"a": 0}}
    ordered = sorted([3, -1, 2], key=lambda x: (abs(x), x), reverse=True)
    words = sorted({"b": 2, "a": 1}.items(), key=operator.itemgetter(1))
    reduced = functools.reduce(np.add, grid, np.zeros(3))
    vectorized = np.vectorize(lambda x: x * 2 if x > 2 else -x)(grid)
    applied = np.apply_along_axis(lambda r: r - r.mean(), 1, grid)
    groups = {k: list(v) for k, v in itertools.groupby([1, 1, 2, 3, 3], key=lambda x: x % 2)}
    by_default = defaultdict(lambda: [0])
    by_default["x"] += [1]
    chain = ChainMap({"a": 1}, {"b": 2})
    shape, *_ = grid.shape, 1, 2
    total = sum(x for x in [np.ones(2), np.ones(2)])
    maximum = max(grid.tolist(), key=lambda r, k=-1: r[k])
    method = str.upper, "abc".replace
    try:
        print(*[1], **{"nothing": 2})
    except TypeError as error:
        message = str(error)
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.ReLU())
    handle = module.register_forward_hook(lambda m, args, out: out + 1)
    hooked = module(torch.tensor([[-1.0, 2.0]]))
    handle.remove()
    loader = torch.utils.data.DataLoader(
        [torch.full((2,), float(i)) for i in range(3)], batch_size=2, collate_fn=lambda b: torch.stack(b) * 2
    )
    return (
        (
            depth(200),
            variadic(*range(3), *"x", last=1, **{"k": 2}),
            flatten([1, [2, [3, []]]]),
            collected,
            swapped,
            merged,
        ),
        (ordered, words, reduced, vectorized, applied, groups, by_default["x"], chain["b"], shape, total, maximum),
        (method[0]("x"), method[1]("b", "_"), message, hooked, list(loader), (lambda: (yield))().__class__.__name__),
        [*grid, *(x for x in "ab"), *{1: 2}],
    )


class _Reads(Protocol):
    def read(self) -> bytes: ...


class _Abstract(abc.ABC):
    @property
    @abc.abstractmethod
    def rate(self) -> int: ...

    @abc.abstractmethod
    def load(self): ...


class _Concrete(_Abstract):
    rate = 3

    def load(self):
        try:
            return super().load()
        finally:
            self.loaded = True


@typing.overload
def _either(x: int) -> int: ...
@typing.overload
def _either(x: str) -> str: ...
def _either(x):
    return x


@case
def types():
    """Abstract classes, protocols, overloads, generics, annotations that are never evaluated."""
    try:
        _Abstract()
    except TypeError:
        abstract = sorted(_Abstract.__abstractmethods__)
    concrete = _Concrete()

    def annotated(x: NotDefinedAnywhere = 1, *, y: 1 / 0 = 2) -> also.not_there:
        local: not_evaluated.at.all = x
        return local + y

    return (
        abstract,
        concrete.load(),
        concrete.loaded,
        annotated(),
        annotated.__annotations__,
        _either("e"),
        _Frozen[str].__args__[0] is str,
    )


def __getattr__(name):
    if name == "computed_on_demand":
        return np.arange(3)
    raise AttributeError(name)


@case
def module():
    """A module's own __getattr__, names bound in the module by loops and conditions, deleted names."""
    return sys.modules[__name__].computed_on_demand, _LOOPED, _CHOSEN, "_scratch" in globals(), _NESTED, _TRIED


_LOOPED = 0
for _scratch in range(4):
    _LOOPED += _scratch
else:
    _LOOPED *= 10
del _scratch
_CHOSEN = np.float32(1) if sys.version_info >= (3, 11) else None
_NESTED = (lambda n: [[n, _LOOPED] for _ in range(2)])(5)
try:
    import a_module_that_does_not_exist as _TRIED
except ImportError as _error:
    _TRIED = type(_error).__name__

if __name__ == "__main__":
    RUN_AS_SCRIPT = True
    print(awkward(""))
