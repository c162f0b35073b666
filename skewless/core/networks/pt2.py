"""Looking into a `.pt2` file before torch loads it, so that nothing in it runs.

A `.pt2`, what `torch.export.save` writes, is a zip of raw weights and of a program in JSON, but loading it is not reading
data: torch unpickles some of its members, lets sympy evaluate the text of every symbolic size, finds operators and containers
by their names, and writes Python source with the program's names in it. So the file is read once, each value is held against
torch's own schema and against the patterns below, and torch is given a new zip of what passed, without the sample inputs.
What is not known to be harmless is refused. Written against torch 2.11.

Not checked is what the program computes: operators of torch's `aten` run with the arguments that the file gives them.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import io
import json
import re
import typing
import zipfile
from typing import Any

import torch
from torch import fx, nn

from skewless.core.errors import DefinitionError

MAX_BYTES, _MAX_JSON_BYTES = 4 * 2**30, 32 * 2**20
AGAIN = "export the network again with torch.export.save"

_PROGRAM, _SAMPLES = "models/model.json", "data/sample_inputs/model.pt"
_CONFIGS = {  # in what member torch says which raw numbers are whose, and what the members with the numbers are called
    "data/weights/model_weights_config.json": "data/weights/weight_",
    "data/constants/model_constants_config.json": "data/constants/tensor_",
}
_MEMBER = r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|extra/.+|" + "|".join(
    [*map(re.escape, [_PROGRAM, _SAMPLES, *_CONFIGS]), *(f"{prefix}[0-9]+" for prefix in _CONFIGS.values())]
)

_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_PATH = r"(?!__)[A-Za-z0-9_]+(\.(?!__)[A-Za-z0-9_]+)*"
_SYMBOL = r"[a-z]{1,3}[0-9]{1,6}"
# A size as sympy's srepr writes it: `Mul(Integer(2), Symbol('s77', positive=True, integer=True))`. The names are all that
# sympy can find in it, so what it evaluates are these; powers of numbers, which could fill the memory, are none of them.
_SIZE_SYMBOL = rf"Symbol\('{_SYMBOL}'(, (positive|nonnegative|integer|real)=(True|False))*\)"
_SIZE = (
    rf"(?=.{{1,10000}}$)({_SIZE_SYMBOL}|(Pow|PowByNatural)\({_SIZE_SYMBOL}, Integer\(-?[0-9]{{1,2}}\)\)|true|false|, |\)"
    r"|Integer\(-?[0-9]{1,19}\)|Rational\(-?[0-9]{1,19}, [0-9]{1,19}\)"
    r"|Float\('-?[0-9]{1,20}(\.[0-9]{1,20})?(e[+-]?[0-9]{1,3})?', precision=53\)"
    r"|(Add|Mul|Max|Min|Abs|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv|ModularIndexing|Where|Identity|IntTrueDiv|FloatTrueDiv"
    r"|ToFloat|CeilToInt|FloorToInt|RoundToInt|TruncToInt|TruncToFloat|IsNonOverlappingAndDenseIndicator|And|Or|Not"
    r"|Equality|Unequality|GreaterThan|LessThan|StrictGreaterThan|StrictLessThan)\()+"
)
# The containers around tensors. Of others torch would import the class, or one that is named in their context.
_LEAF = re.escape('{"type": null, "context": null, "children_spec": []}')
_TUPLE = r'\{{"type": "builtins\.tuple", "context": "null", "children_spec": \[{}\]\}}'
_NO_KEYWORDS = re.escape('{"type": "builtins.dict", "context": "[]", "children_spec": []}')
_INPUTS = rf"\[1, {_TUPLE.format(_TUPLE.format(_LEAF) + ', ' + _NO_KEYWORDS)}\]"
_KINDS = rf'"(builtins\.(tuple|list)", "context": "null"|(builtins\.dict|collections\.OrderedDict)", "context": "\[(\\"{_NAME}\\"(, )?)*\]")'
_OUTPUTS = rf'\[1, ({_LEAF}|\{{"type": {_KINDS}, "children_spec": \[({_LEAF}(, )?)*\]\}})\]'

# What a text has to be, by the class and field of torch's schema that hold it. Every other text is a name, as it ends up
# in the Python source that torch writes.
_TEXTS = {
    "Argument.as_string": ("(?s).*", "text"),
    "Argument.as_strings": ("(?s).*", "text"),
    "Device.type": ("cpu", "'cpu'; move the network and its example to the CPU before exporting"),
    "ExportedProgram.guards_code": (
        "(?!)",  # torch would run it as Python
        "no condition on x; export with torch.export.Dim('batch') as x's first dimension",
    ),
    "ExportedProgram.range_constraints": (_SYMBOL, "a symbol such as s77"),
    "ExportedProgram.torch_version": ("(?s).*", "text"),
    "ExportedProgram.verifiers": ("TRAINING|ATEN", "TRAINING or ATEN"),
    "InputToBufferSpec.buffer_name": (_PATH, "a buffer's name"),
    "InputToParameterSpec.parameter_name": (_PATH, "a parameter's name"),
    "InputToTensorConstantSpec.tensor_constant_name": (_PATH, "a constant's name"),
    "ModuleCallEntry.fqn": ("(?s).*", "text"),
    "ModuleCallSignature.in_spec": (_INPUTS, "one tensor by position; export a network whose forward takes only x"),
    "ModuleCallSignature.out_spec": (_OUTPUTS, "a tensor, or a tuple, list or dict of tensors with names as keys"),
    "Node.target": (
        rf"(torch\.ops\.aten\.{_NAME}|_operator|math|torch)\.{_NAME}",
        "an operator torch.ops.aten.*; leave custom operators, torch.no_grad, torch.autocast and torch.cond out of forward",
    ),
    "PayloadConfig.config": (_PATH, "the name of a parameter, buffer or constant"),
    "PayloadMeta.path_name": ("(weight|tensor)_[0-9]+", "weight_0 or tensor_0, ...; custom objects are refused"),
    "SymExpr.expr_str": (_SIZE, "a size of Symbol('s77'), Integer(1) and functions such as Add, Mul and FloorDiv"),
}
_FOREIGN = {"as_custom_obj", "custom_obj", "token", "as_graph", "as_operator", "as_string_to_argument"}
_WRITES = {"buffer_mutation", "parameter_mutation", "user_input_mutation", "loss_output"}
_WRITES |= {"gradient_to_parameter", "gradient_to_user_input"}
# What an operator may take and give: no files, objects or storages.
_OPERAND = re.compile(r"((Optional|List)\[)*(Tensor|int|bool|float|number|complex|str|Device|Generator)\]*")


class ExportedError(DefinitionError):
    """A `.pt2` file or an exported program that cannot be used; the message says why and what to do."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ExportedError(message)


def shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} ({', '.join(map(str, value.shape))})"
    return repr(value) if len(repr(value)) <= 120 else f"{repr(value)[:117]}..."


def cleaned(data: bytes) -> io.BytesIO:
    """A new archive of what torch needs and has been checked, without the sample inputs.

    Raises ExportedError, naming the member and the value, if loading the rest could run code that the bytes bring.
    """
    from torch._export.serde import schema
    from torch.export.pt2_archive import PT2ArchiveWriter

    members = _members(data)
    program = _valid(schema.ExportedProgram, _json(members, _PROGRAM), _PROGRAM)
    records = {_PROGRAM: json.dumps(program).encode(), _SAMPLES: b""}
    for config, prefix in _CONFIGS.items():
        payloads = _valid(schema.PayloadConfig, _json(members, config), config)
        records[config] = json.dumps(payloads).encode()
        for name, payload in payloads["config"].items():
            raw = not payload["use_pickle"] and payload["tensor_meta"] is not None
            require(raw, f"{config}: {name} is pickled, expected raw numbers; register plain tensors as buffers")
            path = f"{prefix.rpartition('/')[0]}/{payload['path_name']}"
            require(path.startswith(prefix) and path in members, f"{config}: {name} is in {path}, which is not there")
            # torch would make up what is not there, however large.
            empty = {"as_int": 0} in payload["tensor_meta"]["sizes"]
            require(empty or len(members[path]) > 0, f"{config}: {name} has no numbers in {path}; {AGAIN}")
            records[path] = members[path]
    cleaned = io.BytesIO()
    with PT2ArchiveWriter(cleaned) as writer:
        for name, content in records.items():
            writer.write_bytes(name, content)
    cleaned.seek(0)
    return cleaned


def _members(data: bytes) -> dict[str, bytes]:
    """The members by name, without their common folder and without those that nothing reads."""
    require(len(data) <= MAX_BYTES, f"it has more than {MAX_BYTES} bytes, expected a network that fits into memory")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            found = archive.infolist()
            folder = found[0].filename.partition("/")[0] + "/"
            names = [info.filename.removeprefix(folder) for info in found]
            require("data.pkl" not in names, "torch.save or torch.jit.save wrote it, expected torch.export.save")
            for name, info in zip(names, found, strict=True):
                require(
                    info.filename.startswith(folder) and re.fullmatch(_MEMBER, name) is not None,
                    f"it holds {info.filename!r}, expected only what torch.export.save writes; {AGAIN}",
                )
                require(info.compress_type == zipfile.ZIP_STORED, f"{name} is compressed, expected as it is; {AGAIN}")
                too_long = name.endswith(".json") and info.file_size > _MAX_JSON_BYTES
                require(not too_long, f"{name} has {info.file_size} bytes, expected at most {_MAX_JSON_BYTES}")
            require(len(set(names)) == len(names), f"it holds members of one name twice: {sorted(names)}; {AGAIN}")
            claimed = sum(info.file_size for info in found)
            require(claimed <= len(data), f"its members claim {claimed} bytes, but it has {len(data)}; {AGAIN}")
            read = [pair for pair in zip(names, found, strict=True) if not pair[0].startswith(("extra/", _SAMPLES))]
            members = {name: archive.read(info) for name, info in read}
    except ExportedError:
        raise
    except Exception as error:  # zipfile raises many kinds on a damaged archive
        raise ExportedError(f"it is no zip that can be read ({error}), expected torch.export.save's file") from error
    order = members.get("byteorder")
    require(order == b"little", f"byteorder is {shown(order)}, expected b'little'; {AGAIN} on another machine")
    return members


def _json(members: dict[str, bytes], name: str) -> Any:
    require(name in members, f"it has no {name}; {AGAIN} of torch {torch.__version__}")
    try:
        return json.loads(members[name])
    except (ValueError, RecursionError) as error:
        raise ExportedError(f"{name} is not JSON ({error}); {AGAIN}") from error


def _valid(kind: Any, value: Any, at: str, field: str = "") -> Any:
    """`value` if torch's schema and the patterns above allow it here, without what is only for people to read.

    kind: a type of the schema. field: the class and field there that hold the value. Raises ExportedError.
    """
    origin, of = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is typing.Union:
        return None if value is None else _valid(of[0], value, at, field)
    if dataclasses.is_dataclass(kind):
        return _valid_fields(kind, value, at)
    if origin is float:
        fits = type(value) in (int, float) or value in ("Infinity", "-Infinity", "NaN")
    elif issubclass(origin, enum.IntEnum):
        fits = type(value) is int and value in list(kind)
    else:
        fits = type(value) is origin and (origin is not int or -(2**63) <= value < 2**63)
    if not fits:
        raise ExportedError(f"{at} is {shown(value)}, expected {origin.__name__}; {AGAIN}")
    if origin is list:
        return [_valid(of[0], item, f"{at}[{k}]", field) for k, item in enumerate(value)]
    if origin is dict:
        return {_valid(str, k, f"a key of {at}", field): _valid(of[1], v, f"{at}.{k}", field) for k, v in value.items()}
    if origin is str:
        pattern, expected = _TEXTS.get(field, (_NAME, "a name of letters, digits and underscores"))
        harmless = re.fullmatch(pattern, value) and (field != "Node.target" or _is_operator(value))
        # A tensor at a path of what a module has itself would take its place, for all modules where it is a class's.
        if pattern is _PATH:
            harmless = harmless and not any(hasattr(_bare_module(), part) for part in value.split("."))
        if not harmless:
            raise ExportedError(f"{at} is {shown(value)}, expected {expected}")
    return value


def _valid_fields(kind: Any, value: Any, at: str) -> dict[str, Any]:
    from torch._export.serde import schema, union

    hints, one_of = _hints(kind), issubclass(kind, union._Union)
    needed = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}
    fits = type(value) is dict and value.keys() <= hints.keys()
    fits = fits and (len(value) == 1 if one_of else needed <= value.keys())
    if not fits:
        raise ExportedError(f"{at} is {shown(value)}, expected {'one of ' * one_of}{', '.join(hints)}; {AGAIN}")
    fields = {}
    for name, item in value.items():
        if name in _FOREIGN:
            raise ExportedError(f"{at}.{name} is {shown(item)}, expected tensors or numbers; do without it")
        require(name not in _WRITES, f"{at}.{name}: forward writes to what it is given; call .eval() before exporting")
        # Not kept: texts for people, and names of classes to warn about.
        kept = name not in ("metadata", "treespec_namedtuple_fields")
        fields[name] = _valid(hints[name], item, f"{at}.{name}", f"{kind.__name__}.{name}") if kept else {}
    if kind is schema.SchemaVersion and fields["major"] != schema.SCHEMA_VERSION[0]:
        raise ExportedError(f"{at} is {value}, expected {schema.SCHEMA_VERSION}; {AGAIN} of torch {torch.__version__}")
    return fields


_hints = functools.cache(typing.get_type_hints)
_bare_module = functools.cache(lambda: fx.GraphModule(nn.Module(), fx.Graph()))


def _is_operator(target: str) -> bool:
    """Whether this is an operation on sizes, or an operator of aten that takes and gives tensors and numbers."""
    from torch._export.serde.serialize import _SYM_OPS

    *_, name, overload = target.split(".")
    operator = getattr(getattr(torch.ops.aten, name, None), overload, None)
    if not target.startswith("torch.ops.aten.") or not isinstance(operator, torch._ops.OpOverload):
        return target in {f"{operation.__module__}.{operation.__name__}" for operation in _SYM_OPS}
    operands = [*operator._schema.arguments, *operator._schema.returns]
    # Without a tensor, what is no condition may set something of the whole process, such as the seed.
    if not name.startswith(("_assert", "sym_")) and not any("Tensor" in str(operand.type) for operand in operands):
        return False
    return all(_OPERAND.fullmatch(str(operand.type)) and operand.name != "filename" for operand in operands)
