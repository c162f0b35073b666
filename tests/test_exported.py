"""A network without a class: it computes as it was exported, and a hostile file runs nothing."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import pickle
import zipfile

import pytest
import torch
from torch import nn

from skewless.core.networks.exported import ExportedNetwork
from skewless.core.networks.pt2 import ExportedError, cleaned

PROGRAM = "archive/models/model.json"
WEIGHTS = "archive/data/weights/model_weights_config.json"
CONSTANTS = "archive/data/constants/model_constants_config.json"
SAMPLES = "archive/data/sample_inputs/model.pt"


class Tiny(nn.Module):
    """Convolution, batch normalisation, pooling and a linear layer, with a buffer and a constant; `shape` its outputs."""

    def __init__(self, shape: str = "dict"):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.linear = nn.Linear(4, 3)
        self.register_buffer("scale", torch.tensor([1.5, -2.0, 0.25]))
        self.register_buffer("offset", torch.tensor(0.125), persistent=False)
        self.constant = torch.tensor([0.5, 1.0, 2.0])
        nn.init.uniform_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 1.5)
        self.shape = shape

    def forward(self, x: torch.Tensor):
        maps = torch.relu(self.norm(self.conv(x)))
        pooled = self.drop(nn.functional.adaptive_avg_pool2d(maps, 1).flatten(1))
        logits = self.linear(pooled) * self.scale + self.constant * torch.arange(3) + self.offset
        top = logits.amax(1)
        if self.shape == "dict":
            return {"logits": logits, "top": top, "maps": maps}
        if self.shape == "tuple":
            return logits, top
        if self.shape == "nested":
            return logits, (top,)
        if self.shape == "whole":
            return logits.argmax(1)
        return logits


class Pooling(nn.Module):
    """Attention pooling over a recording's segments: `(S, 5)` to one probability and an attention `(S,)`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.score, self.answer = nn.Linear(5, 1), nn.Linear(5, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        attention = torch.softmax(self.score(x)[:, 0], 0)
        return {"probability": torch.sigmoid(self.answer(attention @ x))[0], "attention": attention}


def export(network: nn.Module, *shape: int, dim=None) -> torch.export.ExportedProgram:
    dim = torch.export.Dim("batch") if dim is None else dim
    return torch.export.export(network, (torch.randn(4, *shape),), dynamic_shapes=({0: dim},))


def saved(program: torch.export.ExportedProgram) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tiny() -> bytes:
    return saved(export(Tiny().eval(), 1, 8, 8))


def rezipped(data: bytes, changed: dict[str, bytes], *more: tuple[str, bytes], compression=zipfile.ZIP_STORED) -> bytes:
    """The archive with some members' content changed and more members behind it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for info in old.infolist():
            new.writestr(info.filename, changed.get(info.filename, old.read(info)))
        for name, content in more:
            new.writestr(name, content)
    return buffer.getvalue()


def edited(data: bytes, member: str, edit) -> bytes:
    """The archive with one JSON member as `edit` leaves it."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        content = json.loads(archive.read(member))
    edit(content)
    return rezipped(data, {member: json.dumps(content).encode()})


def loaded(tmp_path, data: bytes, *args, **kwargs) -> ExportedNetwork:
    path = tmp_path / "model.pt2"
    path.write_bytes(data)
    return ExportedNetwork.from_file(path, *args, **kwargs)


def refused(tmp_path, data: bytes, message: str) -> None:
    """Neither the check nor the loading lets the bytes pass, and both say why."""
    with pytest.raises(ExportedError, match=message):
        cleaned(data)
    with pytest.raises(ExportedError, match=rf"model\.pt2: .*{message}"):
        loaded(tmp_path, data)


class Touch:
    """Its unpickling creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def marker(tmp_path):
    path = tmp_path / "marker"
    yield path
    assert not path.exists(), "the file's code ran"


# What it computes


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_segment_network_computes_what_eager_does(tmp_path, tiny, rows):
    network, x = loaded(tmp_path, tiny).eval(), torch.randn(rows, 1, 8, 8)
    assert network.input_shape == (1, 8, 8)
    assert network.output_names == ("logits", "top", "maps")
    with torch.inference_mode():
        expected = Tiny().eval()(x)
        features = network.encode(x)
        assert features.shape == (rows, 3 + 1 + 4 * 6 * 6) and features.dtype == torch.float32
        outputs = network.head(features)
    assert list(outputs) == list(expected)
    for name, value in expected.items():
        assert torch.equal(outputs[name], value), name


def test_outputs_of_a_tuple_are_named_by_the_caller(tmp_path):
    data, x = saved(export(Tiny("tuple").eval(), 1, 8, 8)), torch.randn(3, 1, 8, 8)
    network = loaded(tmp_path, data, outputs=["logits", "top"])
    logits, top = Tiny("tuple").eval()(x)
    outputs = network.head(network.encode(x))
    assert torch.equal(outputs["logits"], logits) and torch.equal(outputs["top"], top)
    for names, message in (
        ((), r"2 outputs without names and outputs is \[\]; name them with outputs: \[name_1, name_2\]"),
        (("logits",), "2 outputs without names"),
        (("logits", "logits"), "all different"),
        (("logits", ""), "none empty"),
    ):
        with pytest.raises(ExportedError, match=message):
            loaded(tmp_path, data, outputs=names)


def test_a_single_tensor_takes_one_name(tmp_path):
    x = torch.randn(2, 1, 8, 8)
    network = loaded(tmp_path, saved(export(Tiny("tensor").eval(), 1, 8, 8)), outputs=("logits",))
    assert torch.equal(network.head(network.encode(x))["logits"], Tiny("tensor").eval()(x))


def test_a_dict_keeps_its_names(tmp_path, tiny):
    assert loaded(tmp_path, tiny, outputs=("maps", "top", "logits")).output_names == ("logits", "top", "maps")
    with pytest.raises(
        ExportedError, match=r"names its outputs itself: \['logits', 'top', 'maps'\]; leave outputs out"
    ):
        loaded(tmp_path, tiny, outputs=("a", "b", "c"))


@pytest.mark.parametrize("segments", [1, 3, 8])
def test_a_recording_network_takes_all_rows_at_once(tmp_path, segments):
    data, x = saved(export(Pooling().eval(), 5)), torch.randn(segments, 5)
    network = loaded(tmp_path, data, per="recording")
    assert network.encode(x) is x
    outputs, expected = network.head(x), Pooling().eval()(x)
    assert outputs["probability"].shape == () and outputs["attention"].shape == (segments,)
    assert all(torch.equal(outputs[name], expected[name]) for name in expected)
    with pytest.raises(ExportedError, match=r"output probability is .*choose per: recording"):
        loaded(tmp_path, data)
    with pytest.raises(ExportedError, match="per is 'bag', expected segment or recording"):
        loaded(tmp_path, data, per="bag")


def test_it_stays_in_inference(tmp_path, tiny):
    network = loaded(tmp_path, tiny)
    assert network.eval() is network and network.train(False) is network and not network.training
    with pytest.raises(ExportedError, match="train before exporting"):
        network.train()
    assert torch.equal(network.state_dict()["program.conv.weight"], Tiny().conv.weight)


def test_a_copy_computes_the_same(tmp_path, tiny):
    network, x = loaded(tmp_path, tiny), torch.randn(2, 1, 8, 8)
    assert torch.equal(copy.deepcopy(network).encode(x), network.encode(x))


def test_constants_and_new_tensors_move_with_it(tmp_path, tiny):
    network = loaded(tmp_path, tiny).to("meta")
    outputs = network.head(network.encode(torch.randn(2, 1, 8, 8, device="meta")))
    assert all(value.device.type == "meta" for value in outputs.values())


class Sized(nn.Module):
    """Sizes that are computed from the number of rows."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = x.shape[0]
        halves = x.reshape(rows * 2, -1).sum(1).reshape(rows, 2) / rows
        return {"halves": halves, "rank": torch.arange(rows)[:, None] * torch.full((rows, 1), 0.5) + rows // 2}


@pytest.mark.parametrize("dim", [torch.export.Dim("batch"), torch.export.Dim.AUTO], ids=["named", "auto"])
def test_sizes_may_depend_on_the_number_of_rows(tmp_path, dim):
    network = loaded(tmp_path, saved(export(Sized(), 6, dim=dim)))
    for rows in (1, 3, 8):
        x = torch.randn(rows, 6)
        outputs, expected = network.head(network.encode(x)), Sized()(x)
        assert all(torch.equal(outputs[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), (5, 16)),
        (nn.Sequential(nn.Conv2d(1, 4, 3, padding="same"), nn.ReLU(inplace=True), nn.GELU("tanh")), (1, 8, 8)),
    ],
    ids=["transformer", "inplace"],
)
def test_other_layers(tmp_path, network, shape):
    x = torch.randn(3, *shape)
    program = loaded(tmp_path, saved(export(network.eval(), *shape)), outputs=["y"])
    # Eager without torch.no_grad: with it, a transformer layer computes in another way than the one that is exported.
    expected = network(x)
    with torch.inference_mode():
        assert torch.equal(program.head(program.encode(x))["y"], expected)


def test_a_decomposed_program_loads(tmp_path, tiny):
    program, x = export(Tiny().eval(), 1, 8, 8).run_decompositions(), torch.randn(3, 1, 8, 8)
    network, expected = loaded(tmp_path, saved(program)), Tiny().eval()(x)
    torch.testing.assert_close(network.head(network.encode(x)), expected)


# What is refused because it could not be used


class TwoInputs(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


class Listening(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = x * 2
        return y


class Even(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[0] % 2 == 0 else x * 3


def test_networks_that_do_not_fit(tmp_path):
    x, dim = torch.randn(4, 5), {0: torch.export.Dim("batch")}
    cases = [
        (torch.export.export(Sized(), (x[:, :4],)), r"float32 \(4, 4\), expected a dynamic first dimension"),
        (torch.export.export(Sized(), (x[:, :4].double(),), dynamic_shapes=(dim,)), "float64 .*expected one float32"),
        (torch.export.export(TwoInputs(), (x, x), dynamic_shapes=(dim, dim)), "forward takes only x"),
        (torch.export.export(Sized(), (), {"x": x[:, :4]}, dynamic_shapes={"x": dim}), "forward takes only x"),
        (export(Pooling(), 5, dim=torch.export.Dim("batch", max=64)), "0 to 64 rows, expected 1 and more"),
        (export(Pooling(), 5, dim=torch.export.Dim("batch", min=4)), "4 to int_oo rows, expected 1 and more"),
        (export(Tiny("nested").eval(), 1, 8, 8), "tuple, list or dict of tensors"),
        (export(Tiny("whole").eval(), 1, 8, 8), "int64 .*expected a tensor of floating-point numbers"),
        (export(Tiny(), 1, 8, 8), r"batch_norm.* exported as in training; call \.eval\(\)"),
        (export(nn.Dropout(), 5), r"dropout.* exported as in training; call \.eval\(\)"),
        (export(Listening(), 5), r"wrap_with_set_grad_enabled.*expected an operator.*torch\.no_grad"),
        (export(Even(), 5, dim=torch.export.Dim.AUTO), r"size\(\)\[0\] % 2.*no condition on x"),
    ]
    for program, message in cases:
        with pytest.raises(ExportedError, match=message):
            loaded(tmp_path, saved(program), outputs=() if "orch.Size" in message else ("y",), per="recording")


# What is refused because it could run code


def test_sample_inputs_are_never_unpickled(tmp_path, tiny, marker):
    hostile = rezipped(tiny, {SAMPLES: pickle.dumps(Touch(marker))})
    network, x = loaded(tmp_path, hostile), torch.randn(2, 1, 8, 8)
    assert torch.equal(network.head(network.encode(x))["logits"], Tiny().eval()(x)["logits"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("member", ["sizes", "samples"])
def test_torch_itself_would_run_them(tmp_path, tiny, member):
    """Without the check, a hostile file does what the tests here say that it does not do."""
    path = tmp_path / "ran"

    def injected(program):
        sizes(program)["expr_str"] = f"__import__('os').system('touch {path}')"

    samples = {SAMPLES: pickle.dumps(Touch(path))}
    data = edited(tiny, PROGRAM, injected) if member == "sizes" else rezipped(tiny, samples)
    with contextlib.suppress(Exception):
        torch.export.load(io.BytesIO(data))
    assert path.exists()


@pytest.mark.parametrize(("member", "key", "path"), [(WEIGHTS, "scale", "weight"), (CONSTANTS, "constant", "tensor")])
def test_pickled_numbers(tmp_path, tiny, marker, member, key, path):
    def pickled(config):
        config["config"][key]["use_pickle"] = True

    buffer = io.BytesIO()
    torch.save(Touch(marker), buffer)
    hostile = edited(tiny, member, pickled)
    with zipfile.ZipFile(io.BytesIO(hostile)) as archive:
        name = json.loads(archive.read(member))["config"][key]["path_name"]
    hostile = rezipped(hostile, {f"{member.rpartition('/')[0]}/{name}": buffer.getvalue()})
    refused(tmp_path, hostile, f"{key} is pickled, expected raw numbers")


def test_custom_objects(tmp_path, tiny, marker):
    def custom(config):
        config["config"]["constant"].update(path_name="custom_obj_0", use_pickle=True)

    hostile = edited(tiny, CONSTANTS, custom)
    refused(tmp_path, hostile, "path_name is 'custom_obj_0', expected weight_0 or tensor_0")
    more = ("archive/data/constants/custom_obj_0", pickle.dumps(Touch(marker)))
    refused(tmp_path, rezipped(hostile, {}, more), "holds 'archive/data/constants/custom_obj_0'")


def graph(program):
    return program["graph_module"]["graph"]


def sizes(program):
    """The symbolic first size of some tensor."""
    return next(
        size["as_expr"]
        for meta in graph(program)["tensor_values"].values()
        for size in meta["sizes"]
        if "as_expr" in size
    )


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch {}')",
        "Symbol('s77', positive=__import__('os').system('touch {}'))",
        'Symbol("s77\').__class__")',
        "Symbol('s77').free_symbols",
        "Integer(1) if 1 else 2",
        "Pow(Integer(9), Integer(99))",
        "Pow(Pow(Symbol('s77'), Integer(99)), Integer(99))",
        "Symbol('s77')\n",
        "lambda: 1",
        "Function('f')(Integer(1))",
        "eval('1')",
        "Integer(10)!",
        "Symbol('s77')" + " " * 20_000,
        "Float('1e999999999', precision=53)",
        "s77",
    ],
)
def test_sizes_that_are_more_than_sizes(tmp_path, tiny, marker, text):
    def injected(program):
        sizes(program)["expr_str"] = text.format(marker)

    refused(tmp_path, edited(tiny, PROGRAM, injected), "as_expr.expr_str is .*, expected a size of")


@pytest.mark.parametrize("at", ["hint", "range", "size", "stride"])
def test_texts_where_numbers_belong(tmp_path, tiny, marker, at):
    code = f"__import__('os').system('touch {marker}')"

    def injected(program):
        if at == "hint":
            sizes(program)["hint"] = {"as_int": code}
        elif at == "range":
            program["range_constraints"]["s77"]["max_val"] = code
        else:
            meta = next(iter(graph(program)["tensor_values"].values()))
            meta["sizes" if at == "size" else "strides"][0] = {"as_int": code}

    refused(tmp_path, edited(tiny, PROGRAM, injected), "expected int")


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "_operator.attrgetter",
        "torch.ops.skewless.x",
        "torch.ops.aten.from_file.default",
        "torch.ops.aten.manual_seed.default",
        "torch.ops.aten.relu",
        "torch.ops.aten.relu.__call__",
        "torch.hub.load",
        "torch.load",
        "torch.ops.higher_order.cond",
        "math.factorial",
        "#namespace:operator",
    ],
)
def test_foreign_operators(tmp_path, tiny, marker, target):
    def injected(program):
        node = graph(program)["nodes"][0]
        node["target"] = target
        node["inputs"] = [{"name": "", "arg": {"as_string": f"touch {marker}"}, "kind": 1}]

    refused(tmp_path, edited(tiny, PROGRAM, injected), r"nodes\[0\].*, expected a")


def test_guards(tmp_path, tiny, marker):
    def injected(program):
        program["guards_code"] = [f"__import__('os').system('touch {marker}') == 0"]

    refused(tmp_path, edited(tiny, PROGRAM, injected), r"guards_code\[0\] is .*no condition on x")


SPECS = [
    {"type": "collections.namedtuple", "context": "os.system", "children_spec": []},
    {"type": "collections.defaultdict", "context": {"default_factory_module": "evil", "default_factory_name": "x"}},
    {"type": "builtins.dict", "context": '[{"__enum__": true, "fqn": "evil:X", "name": "a"}]', "children_spec": []},
    {"type": "builtins.dict", "context": "[\"a':__import__('evil')\"]", "children_spec": []},
    {"type": "evil.Class", "context": "null", "children_spec": []},
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec["type"])
@pytest.mark.parametrize("field", ["in_spec", "out_spec"])
def test_foreign_containers(tmp_path, tiny, spec, field, monkeypatch):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w').close()\nx = dict\n")
    monkeypatch.syspath_prepend(tmp_path)

    def injected(program):
        program["graph_module"]["module_call_graph"][0]["signature"][field] = json.dumps([1, spec])

    refused(
        tmp_path, edited(tiny, PROGRAM, injected), f"signature.{field} is .*, expected a tensor|expected one tensor"
    )
    assert not (tmp_path / "marker").exists()


def test_names_that_are_more_than_names(tmp_path, tiny, marker):
    code = f"x=__import__('os').system('touch {marker}')"

    def argument(program):
        program["graph_module"]["module_call_graph"][0]["signature"]["forward_arg_names"] = [code]

    def placeholder(program):
        graph(program)["inputs"][-1]["as_tensor"]["name"] = code

    def node(program):
        graph(program)["nodes"][0]["name"] = code

    def key(program):
        graph(program)["tensor_values"][code] = next(iter(graph(program)["tensor_values"].values()))

    for edit in (argument, placeholder, node, key):
        refused(tmp_path, edited(tiny, PROGRAM, edit), "expected a name of letters")
    for name in ('a").b', "__class__.__call__", "graph", "forward", "_modules.x", code):

        def path(program, name=name):
            program["graph_module"]["signature"]["input_specs"][0]["parameter"]["parameter_name"] = name

        refused(tmp_path, edited(tiny, PROGRAM, path), "parameter_name is .*, expected a parameter's name")


def test_unknown_fields_versions_and_devices(tmp_path, tiny):
    def field(program):
        program["plugins"] = ["evil"]

    def version(program):
        program["schema_version"]["major"] = 9

    def device(program):
        next(iter(graph(program)["tensor_values"].values()))["device"]["type"] = "cuda"

    def nested(program):
        graph(program)["nodes"][0]["inputs"][0]["arg"] = {"as_graph": {"name": "g", "graph": {}}}

    def verifier(program):
        program["verifiers"] = ["EVIL"]

    refused(tmp_path, edited(tiny, PROGRAM, field), "expected graph_module, opset_version, ")
    refused(tmp_path, edited(tiny, PROGRAM, version), "schema_version is .*'major': 9")
    refused(tmp_path, edited(tiny, PROGRAM, device), "is 'cuda', expected 'cpu'; move the network")
    refused(tmp_path, edited(tiny, PROGRAM, nested), "as_graph is .*expected tensors or numbers")
    refused(tmp_path, edited(tiny, PROGRAM, verifier), "is 'EVIL', expected TRAINING or ATEN")


# What is refused because it is no such file


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_torch_did_not_write(tmp_path, tiny, marker):
    duplicate = (WEIGHTS, b"{}")
    refused(tmp_path, rezipped(tiny, {}, duplicate), "members of one name twice")
    refused(
        tmp_path, rezipped(tiny, {}, ("archive/data/aotinductor/model/x.so", b"")), "holds .*aotinductor/model/x.so"
    )
    refused(
        tmp_path, rezipped(tiny, {}, ("archive/data/weights/model.pt", b"")), "holds 'archive/data/weights/model.pt'"
    )
    refused(tmp_path, rezipped(tiny, {}, ("archive/models/other.json", b"{}")), "holds 'archive/models/other.json'")
    refused(tmp_path, rezipped(tiny, {}, ("../outside", b"")), r"holds '\.\./outside'")
    refused(tmp_path, rezipped(tiny, {}, compression=zipfile.ZIP_DEFLATED), "is compressed, expected as it is")
    refused(tmp_path, rezipped(tiny, {PROGRAM: b"{"}), "models/model.json is not JSON")
    refused(tmp_path, rezipped(tiny, {PROGRAM: b"[" * 100_000}), "models/model.json is not JSON")
    refused(tmp_path, rezipped(tiny, {"archive/byteorder": b"big"}), "byteorder is b'big', expected b'little'")


def test_a_damaged_archive(tmp_path, tiny):
    refused(tmp_path, tiny[: len(tiny) // 2], "no zip that can be read")
    refused(tmp_path, b"", "no zip that can be read")
    refused(tmp_path, b"weights", "no zip that can be read")
    at = tiny.index(b'{"config"')
    refused(tmp_path, tiny[:at] + b"[" + tiny[at + 1 :], "no zip that can be read")
    with zipfile.ZipFile(buffer := io.BytesIO(), "w"):
        pass
    refused(tmp_path, buffer.getvalue(), "no zip that can be read")


def test_members_that_claim_more_than_there_is(tmp_path, tiny):
    with zipfile.ZipFile(io.BytesIO(tiny)) as archive:
        info = archive.getinfo("archive/data/weights/weight_0")
    # The two sizes in the member's entry of the central directory, which is the last thing before its name.
    entry = tiny.rindex(b"archive/data/weights/weight_0") - 46
    assert tiny[entry : entry + 4] == b"PK\x01\x02" and tiny[entry + 24] == info.file_size
    hostile = tiny[: entry + 20] + (2**31 - 1).to_bytes(4, "little") * 2 + tiny[entry + 28 :]
    refused(tmp_path, hostile, r"members claim 2147\d+ bytes, but it has")


def test_sizes_that_are_nested_too_deeply(tmp_path, tiny):
    def nest(program):
        sizes(program)["expr_str"] = "Add(" * 1500 + "Symbol('s77')" + ")" * 1500

    with pytest.raises(ExportedError, match=r"torch .* cannot load it: "):
        loaded(tmp_path, edited(tiny, PROGRAM, nest))


def test_an_empty_member_for_a_large_tensor(tmp_path, tiny):
    def claim(config):
        config["config"]["scale"]["tensor_meta"]["sizes"] = [{"as_int": 2**40}]

    with zipfile.ZipFile(io.BytesIO(tiny)) as archive:
        path = json.loads(archive.read(WEIGHTS))["config"]["scale"]["path_name"]
    hostile = edited(tiny, WEIGHTS, claim)
    refused(tmp_path, rezipped(hostile, {f"archive/data/weights/{path}": b""}), f"scale has no numbers in .*{path}")
    with pytest.raises(ExportedError, match=r"torch .* cannot load it: .*out of bounds"):
        loaded(tmp_path, hostile)


def test_other_files_of_torch(tmp_path, marker):
    torch.save({"weights": Touch(marker)}, tmp_path / "saved")
    refused(tmp_path, (tmp_path / "saved").read_bytes(), "torch.save or torch.jit.save wrote it")
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "scripted")
    refused(tmp_path, (tmp_path / "scripted").read_bytes(), "torch.save or torch.jit.save wrote it")
    refused(tmp_path, pickle.dumps(Touch(marker)), "no zip that can be read")
    with pytest.raises(ExportedError, match=r"missing\.pt2: .*No such file"):
        ExportedNetwork.from_file(tmp_path / "missing.pt2")


def test_extra_files_are_left_out(tmp_path, tiny):
    loaded(tmp_path, rezipped(tiny, {}, ("archive/extra/readme.txt", b"hello")))
