"""What docs/security.md promises: nothing runs that should be data, names stay inside their folders, tokens stay private."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from skewless.core.definition import Definition, DefinitionError
from skewless.errors import BuildError, ServerError, UsageError
from skewless.packaging.build import build_archive
from skewless.scaffold import create
from skewless.torchserve import launch
from skewless.torchserve import server as server_module
from skewless.torchserve.archive import Archive, name_and_version
from skewless.torchserve.client import Client
from skewless.torchserve.server import Server
from skewless.torchserve.smoke import References
from skewless.torchserve.store import listing
from tests import hostile
from tests.conftest import ROOT, call_skewless, run_skewless
from tests.test_server import AUDIO, ECHO, make_archive

# What is data stays data.

_LOADERS = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")
_YAML = ("load", "load_all", "unsafe_load", "full_load", "unsafe_load_all", "full_load_all")
# Where modules are imported by a name that is data: the catalogue's own, Python files of a definition's folder, and the
# synthesisers of corpora, of a fixed list.
_IMPORTS = {"skewless/core/catalogue.py", "skewless/core/own_code.py", "skewless/demos/__init__.py"}
# `skewless diff` and `trace` run a function that the user names, in a process of its own, and talk to that process. The benchmark runs
# the documents' programs in tests/programs, and writes a scaler as their authors did.
_USERS_PROGRAM = {"skewless/programs/program.py", "skewless/programs/worker.py", "benchmarks/old_services.py"}


def runs_what_it_reads(source: str, file: str) -> list[str]:
    """Calls by which bytes or text could become code, with their lines."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        module, _, function = name.rpartition(".")
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        bad = (
            (name == "torch.load" and given.get("weights_only") != "True")
            or (module.rpartition(".")[2] in _LOADERS and function in ("load", "loads", "Unpickler", "open"))
            or (module == "yaml" and function in _YAML)
            or name
            in ("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "os.system", "os.popen")
            or name in ("torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "runpy.run_path")
            or (
                function in ("run", "Popen", "call", "check_output", "check_call")
                and given.get("shell", "False") != "False"
            )
            or (name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False")
            or (function == "import_module" and file not in _IMPORTS and not isinstance(node.args[0], ast.Constant))
            or (name in ("getattr",) and isinstance(node.args[0], ast.Name) and node.args[0].id == "builtins")
        )
        if bad:
            found.append(f"{file}:{node.lineno} {ast.unparse(node):.80}")
    return found


@pytest.mark.parametrize(
    "line",
    [
        *(
            "torch.load(path)",
            "torch.load(path, weights_only=False)",
            "pickle.loads(data)",
            "pickle.Unpickler(f).load()",
        ),
        *(
            "yaml.load(text, Loader=yaml.Loader)",
            "yaml.unsafe_load(text)",
            "eval(text)",
            "exec(text)",
            "os.system(text)",
        ),
        *("subprocess.run(text, shell=True)", "np.load(path, allow_pickle=True)", "importlib.import_module(name)"),
        *("joblib.load(path)", "torch.jit.load(path)", "__import__(name)", "torch.hub.load(name)"),
    ],
)
def test_the_search_below_finds(line: str):
    assert runs_what_it_reads(line, "skewless/any.py")


def test_no_code_of_ours_runs_what_it_reads():
    folders = ("skewless", "handler", "archive", "scripts", "benchmarks")
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 100
    found = []
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        if name not in _USERS_PROGRAM:
            found += runs_what_it_reads(path.read_text(encoding="utf-8"), name)
    assert not found


# Names of archives, versions, models and members stay names.

NAMES = (
    "../x",
    "/x",
    "a/b",
    "a\\b",
    "..",
    ".",
    "",
    "a\0b",
    "a b",
    "a\nb",
    "x" * 101,
    "-a",
    "é",
    3,
    None,
    ["a"],
    {"a": 1},
)


def mar(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    path.write_bytes(hostile.zipped(members))
    return path


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["modelName", "modelVersion"])
def test_a_name_or_version_that_is_no_name_is_refused(tmp_path: Path, key: str, name: object):
    manifest = {**hostile.MANIFEST, "model": {**hostile.MANIFEST["model"], key: name}}
    members = hostile.archive_members() | {hostile.MANIFEST_FILE: json.dumps(manifest).encode()}
    path = mar(tmp_path / "x-1.0.mar", members)
    with pytest.raises(UsageError, match=r"(?s)its (name|version) is .*expected 1 to 100 letters"):
        name_and_version(path)
    (row,) = listing(tmp_path)
    assert (row.name, row.version) == ("x-1.0", "") and "expected 1 to 100 letters" in row.problem
    done = call_skewless("score", path, "--input", tmp_path, "--out", tmp_path / "out.parquet")
    assert done.returncode == 2 and "expected 1 to 100 letters" in done.stderr


@pytest.mark.parametrize(
    "member", ["../x.py", "/tmp/x.py", "a/../../x.py", "a\\..\\x.py", "x.py\0.txt", "..", hostile.METRICS_FILE]
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_with_a_member_outside_or_twice_is_refused(tmp_path: Path, member: str):
    path = tmp_path / "x-1.0.mar"
    # zipfile's writer cuts a name at a NUL, and an attacker's does not: as long, and put in afterwards.
    data = hostile.zipped([*hostile.archive_members().items(), (member.replace("\0", "%"), b"")])
    path.write_bytes(data.replace(b"x.py%.txt", b"x.py\0.txt"))
    for read in (name_and_version, References.from_archive):
        with pytest.raises(UsageError, match=r"which is no name inside a folder|it has 2 files"):
            read(path)


def test_a_link_in_an_archive_is_refused(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "x-1.0.mar", "w") as new:
        for name, content in hostile.archive_members().items():
            new.writestr(name, content)
        link = zipfile.ZipInfo("handler")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        new.writestr(link, "/etc")
    with pytest.raises(UsageError, match="no name inside a folder"):
        name_and_version(tmp_path / "x-1.0.mar")


@pytest.mark.parametrize("code", ["../x.py", "/tmp/x.py", "references/../../x.py"])
def test_what_an_archive_says_of_its_code_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "inner"))
    (tmp_path / "inner").mkdir()
    metrics = json.dumps(hostile.METRICS | {"code": {code: "0" * 64}}).encode()
    path = mar(tmp_path / "x-1.0.mar", hostile.archive_members() | {hostile.METRICS_FILE: metrics})
    with pytest.raises(UsageError, match="it has no"):
        References.from_archive(path)
    assert sorted(each.name for each in tmp_path.rglob("*")) == ["inner", "x-1.0.mar"]


def test_what_is_read_of_an_archive_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = mar(tmp_path / "x-1.0.mar", hostile.archive_members())
    assert name_and_version(path) == ("cough", "1.0")
    assert len(References.from_archive(path).payloads) == 2
    with Archive(path) as archive, pytest.raises(UsageError, match=r"its references/01\.wav has more than 2 bytes"):
        archive.read("references/01.wav", 2)
    monkeypatch.setattr("skewless.torchserve.archive.MAX_READ_BYTES", 500)
    with pytest.raises(UsageError, match="all that is read of it more than 500"):
        References.from_archive(path)
    monkeypatch.setattr("skewless.torchserve.archive.MAX_MEMBERS", 5)
    with pytest.raises(UsageError, match="it has 6 files, expected at most 5"):
        name_and_version(path)


@pytest.mark.parametrize("version", ["../2", "/2", "", "2/3", "2 0", "2\n", "..", "x" * 300 + "/"])
def test_a_version_to_build_is_a_name(tmp_path: Path, version: str):
    with pytest.raises(BuildError, match="expected digits and letters joined by dots"):
        build_archive(ROOT / "archive" / "talent", tmp_path / "none", tmp_path, version, tmp_path / "store")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "", "..", "a\0b", "x y"])
def test_a_new_model_has_a_name(tmp_path: Path, name: str):
    with pytest.raises(ValueError, match="the name is"):
        create(name, tmp_path / "models")
    assert not list(tmp_path.iterdir())


def test_own_code_is_inside_its_folder(tmp_path: Path):
    (tmp_path / "outside.py").write_text("raise SystemExit('it ran')")
    folder = create("mine", tmp_path)
    (folder / "link.py").symlink_to(tmp_path / "outside.py")
    model = yaml.safe_load((folder / "model.yaml").read_text())
    for file in ("../outside.py", str(tmp_path / "outside.py"), "link.py", "../mine/../outside.py"):
        (folder / "model.yaml").write_text(yaml.safe_dump(model | {"network": {f"{file}:Net": {}}}))
        with pytest.raises(DefinitionError, match="is outside of the folder"):
            Definition.read(folder).build_network()


@pytest.mark.parametrize(
    "name", ["x-1\N{SUPERSCRIPT TWO}.mar", "x-\N{ARABIC-INDIC DIGIT TWO}.mar", "x" * 251 + ".mar", "x\n.mar"]
)
def test_a_store_is_listed_whatever_its_files_are_called(tmp_path: Path, name: str):
    mar(tmp_path / name, hostile.archive_members())
    mar(tmp_path / "a-1.0.mar", hostile.archive_members())
    (tmp_path / "broken-1.0.mar").write_bytes(b"PK")
    assert {row.archive for row in listing(tmp_path)} == {name, "a-1.0.mar", "broken-1.0.mar"}


# The configuration of a server.


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("management_address", "http://0.0.0.0:8081"),
        ("management_address", "http://[::]:8081"),
        ("management_address", "http://192.168.1.2:8081"),
        ("management_address", "https://example.org:8443"),
        ("management_address", "http://127.0.0.1.example.org:8081"),
        ("grpc_management_address", "0.0.0.0"),
        ("grpc_management_address", "127.0.0.1@10.0.0.1"),
        ("enable_envvars_config", "true"),
    ],
)
def test_a_management_api_that_others_could_reach_is_refused(tmp_path: Path, key: str, value: str):
    settings = launch.read_properties(server_module.CONFIG) | {key: value}
    config = tmp_path / "config.properties"
    config.write_text("".join(f"{name}={each}\n" for name, each in settings.items()))
    state = ("--state-dir", tmp_path / "state")
    done = call_skewless("serve", "start", "--config", config, "--model-store", tmp_path, "--ports", "free", *state)
    if done.returncode == 0:
        call_skewless("serve", "stop", *state)
    assert done.returncode == 2 and key in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    "line", ["management\\u005faddress=http://0.0.0.0:8081", "management_address:x", "a=b\\", "a b"]
)
def test_a_setting_that_java_would_read_otherwise_is_refused(tmp_path: Path, line: str):
    config = tmp_path / "config.properties"
    config.write_text(server_module.CONFIG.read_text() + line + "\n")
    with pytest.raises(UsageError, match="is no setting"):
        launch.read_properties(config)


def test_our_configuration_listens_on_this_machine_only():
    settings = launch.read_properties(server_module.CONFIG)
    addresses = {key: value for key, value in settings.items() if key.endswith("_address")}
    assert len(addresses) == 5
    assert all(re.fullmatch(r"(http://)?127\.0\.0\.1(:\d+)?", value) for value in addresses.values()), addresses
    assert settings["disable_token_authorization"] == "false" and settings["allowed_urls"] == ""
    # A container's server answers others, and is not managed by them.
    opened = re.findall(r"\(([\w|\\]*_address[\w|\\]*)\)", (ROOT / "Dockerfile").read_text())
    assert opened and not [each for each in opened if "management" in each]


def test_wider_settings_are_read_as_they_are(tmp_path: Path):
    config = tmp_path / "config.properties"
    config.write_text(
        server_module.CONFIG.read_text().replace(
            "inference_address=http://127.0.0.1", "inference_address = http://0.0.0.0"
        )
    )
    settings = launch.with_ports(launch.read_properties(config), "free")
    assert settings["inference_address"].startswith("http://0.0.0.0:")


# Known vulnerabilities of packages.


def package(name: str, *advisories: str, **more: str) -> dict[str, Any]:
    found = [{"id": each, "aliases": [f"CVE-{each}"], "fix_versions": ["9"]} for each in advisories]
    return {"name": name, "version": "1.0", **({} if more else {"vulns": found}), **more}


@pytest.mark.parametrize(
    ("printed", "code", "said"),
    [
        ([package("a"), package("b")], 0, "2 packages checked, 0 advisories"),
        ([package("a", "PYSEC-1"), package("b")], 1, "a 1.0: PYSEC-1, fixed in 9: NEW"),
        ([package("a", "PYSEC-2")], 0, "a 1.0: PYSEC-2, fixed in 9: never called"),
        (
            [package("a"), package("b", skip_reason="not found")],
            0,
            "not checked, 1 packages that nobody could be asked about: b",
        ),
        ([package("b", skip_reason="not found")], 2, "nothing was checked"),
        (None, 2, "nothing was checked: no route to pypi.org"),
    ],
)
def test_the_audit_takes_nothing_for_safe_that_it_did_not_check(
    tmp_path: Path, monkeypatch, capsys, printed, code, said
):
    program = tmp_path / "pip-audit"
    out = "" if printed is None else json.dumps({"dependencies": printed})
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{out}\nEND\necho 'no route to pypi.org' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    spec = importlib.util.spec_from_file_location("audit", ROOT / "scripts" / "audit.py")
    audit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(audit)
    monkeypatch.setattr(audit, "ACCEPTED", {"CVE-PYSEC-2": "never called"})
    assert audit.main() == code
    assert said in "".join(capsys.readouterr())


# A real server.


def _tokens(server: Server) -> dict[str, str]:
    keys = json.loads((server.state_dir / "key_file.json").read_text())
    return {
        kind: keys[name]["key"]
        for kind, name in (("inference", "inference"), ("management", "management"), ("api", "API"))
    }


class Running:
    """A server, and every token that it has had."""

    def __init__(self, server: Server):
        self.server = server
        self.tokens = set(_tokens(server).values())
        self.seen: list[Any] = []

    def renew(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(server_module, "RENEW_BEFORE_S", 2 * 3600.0)
            for kind in ("inference", "management"):
                self.server.token(kind)
        self.tokens |= set(_tokens(self.server).values())

    def family(self) -> list[psutil.Process]:
        process = self.server.process()
        assert process is not None
        return [process, *process.children(recursive=True)]

    def secrets_in(self, text: bytes) -> list[str]:
        return [token for token in self.tokens if token.encode() in text]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    store = tmp_path_factory.mktemp("server") / "store"
    store.mkdir()
    # Variables by which TorchServe could be opened, if it were told to heed any.
    environment = {"TS_MANAGEMENT_ADDRESS": "http://0.0.0.0:0", "TS_DISABLE_TOKEN_AUTHORIZATION": "true"}
    state = store.parent / "state"
    state.mkdir(mode=0o700)
    started = Server.start(store, state, ports="free", environment=environment)
    try:
        started.register(make_archive(store, "1.0", ECHO))
        yield Running(started)
    finally:
        started.stop()


@pytest.fixture(scope="module")
def used(running: Running) -> Running:
    """After requests of every kind: right and wrong, with the right token and with others, and after a renewal."""
    server = running.server
    first = dict(_tokens(server))
    with Client(server) as client:
        assert client.predict_rest("echo", AUDIO).status == client.predict_grpc("echo", AUDIO).status == 200
        running.renew()
        assert client.predict_rest("echo", AUDIO, multipart=True).status == 200
        assert client.predict_rest("nobody", AUDIO).status == 404
        running.seen += [client.describe("echo"), client.metrics(), server.status(), server.models()]
    for token in (
        "wrong",
        first["inference"],
        first["management"],
        _tokens(server)["management"],
        _tokens(server)["api"],
        "",
    ):
        with Client(server.inference_url, server.grpc_address, lambda kind, token=token: token) as stranger:
            for answer in (stranger.predict_rest("echo", AUDIO), stranger.predict_grpc("echo", AUDIO)):
                assert answer.status in (400, 403), token
                running.seen.append(answer.body)
    for token in (_tokens(server)["inference"], _tokens(server)["api"], "wrong"):
        answer = server_module._send("GET", f"{server.management_url}/models", token)
        assert answer.status_code == 400
        running.seen.append(answer.text)
    with pytest.raises(ServerError) as refused:
        server.manage("GET", "/models/nobody")
    running.seen.append(str(refused.value))
    for command in (("serve", "status"), ("serve", "status", "--json"), ("versions", "list"), ("register", "none.mar")):
        done = run_skewless(*command, "--state-dir", server.state_dir, check=False)
        running.seen += [done.stdout, done.stderr]
    recording = server.state_dir.parent / "recording.wav"
    recording.write_bytes(AUDIO)
    done = run_skewless("predict", recording, "--model", "echo", "--state-dir", server.state_dir)
    running.seen += [done.stdout, done.stderr]
    return running


@pytest.mark.chain
def test_tokens_are_in_no_answer_and_no_message(used: Running):
    assert len(used.tokens) >= 5
    assert not used.secrets_in(json.dumps(used.seen, default=str).encode())


@pytest.mark.chain
def test_tokens_are_in_no_file_but_one_that_only_its_owner_reads(used: Running):
    server, holding = used.server, []
    for path in server.state_dir.parent.rglob("*"):
        if path.is_file() and not path.is_symlink() and used.secrets_in(path.read_bytes()):
            holding.append(path)
    assert holding == [server.state_dir / "key_file.json"]
    assert stat.S_IMODE(holding[0].stat().st_mode) == 0o600
    assert stat.S_IMODE(server.state_dir.stat().st_mode) == 0o700
    logs = list((server.state_dir / "logs").iterdir())
    assert len(logs) >= 3 and (server.state_dir / "logs" / "access_log.log").stat().st_size > 0


@pytest.mark.chain
def test_tokens_are_in_no_process_argument_or_environment(used: Running):
    for process in (*used.family(), psutil.Process()):
        for name in ("cmdline", "environ"):
            assert not used.secrets_in(Path(f"/proc/{process.pid}/{name}").read_bytes()), (process, name)
    assert len(used.family()) >= 2


@pytest.mark.chain
def test_a_server_listens_on_this_machine_only_whatever_its_environment_says(used: Running):
    environment = Path(f"/proc/{used.server.pid}/environ").read_bytes()
    assert (
        b"TS_DISABLE_TOKEN_AUTHORIZATION=true" in environment
        and b"TS_MANAGEMENT_ADDRESS=http://0.0.0.0:0" in environment
    )
    listening = [
        each.laddr
        for process in used.family()
        for each in process.net_connections("inet")
        if each.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 5
    assert {address.ip.removeprefix("::ffff:") for address in listening} <= {"127.0.0.1", "::1"}


@pytest.mark.chain
def test_what_a_server_writes_is_for_its_owner(used: Running):
    made = [path for path in used.server.state_dir.rglob("*") if not path.is_symlink()]
    assert len(made) > 10
    # Inside a folder of mode 0700; what TorchServe and its workers write has none of the others' bits itself.
    by_torchserve = [path for path in made if path.parts[len(used.server.state_dir.parts)] in ("tmp", "key_file.json")]
    open_to_others = [
        path for path in by_torchserve if path.stat().st_mode & 0o077 and path != used.server.state_dir / "tmp"
    ]
    assert not open_to_others


@pytest.mark.chain
def test_torchserve_itself_unpacks_nothing_outside_of_its_folder(used: Running):
    """What `register` refuses before, an archive that comes by the management API itself must not do either."""
    server = used.server
    good = (server.model_store / "echo-1.0.mar").read_bytes()
    evil = server.model_store / "evil-1.0.mar"
    with zipfile.ZipFile(server.model_store / "echo-1.0.mar") as old:
        members = [(name, old.read(name)) for name in old.namelist()]
    evil.write_bytes(hostile.zipped([*members, ("../../../../escaped.txt", b"x"), ("../escaped.txt", b"x")]))
    with pytest.raises(UsageError, match="no name inside a folder"):
        server.register(evil)
    answer = server.manage(
        "POST", "/models", {"url": evil.name, "model_name": "evil", "synchronous": "true"}, expect=None
    )
    assert answer.status_code >= 400, answer.text
    assert not list(server.state_dir.parent.rglob("escaped.txt"))
    assert not Path(os.sep, "escaped.txt").exists()
    assert good == (server.model_store / "echo-1.0.mar").read_bytes()
    evil.unlink()
