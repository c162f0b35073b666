"""The command: help, wrong use, JSON, completion. What each command does is tested with what it calls."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import zipfile
from dataclasses import fields
from pathlib import Path

import pytest
import typer

from skewless.cli import app
from skewless.cli.frame import Result, command
from skewless.errors import BuildError, CheckFailedError, LoadError, ServerError, UsageError
from skewless.torchserve.archive import Archive
from skewless.torchserve.store import as_table, listing
from skewless.training.config import Config
from tests.conftest import ROOT, call_skewless, run_skewless

COMMANDS = [
    "new",
    "corpus",
    "train",
    "evaluate",
    "features",
    "import",
    "adopt",
    "tune",
    "build",
    "sign",
    "verify",
    "export",
    "skew",
    "trace",
    "diff",
    "serve",
    "register",
    "smoke",
    "predict",
    "score",
    "versions",
    "gateway",
    "rollout",
    "retrain",
    "schema",
]
NESTED = {
    "serve": ("start", "stop", "status", "token", "run", "health"),
    "versions": ("list", "register", "default", "scale", "retire", "log"),
    "gateway": ("start", "run", "stop", "status"),
    "rollout": ("start", "status", "step", "promote", "abort", "run"),
    "retrain": ("start", "run", "status"),
}
EVERY = [(), *((name,) for name in COMMANDS), *((group, name) for group, names in NESTED.items() for name in names)]

WIDE = {"COLUMNS": "160", "TERM": "dumb"}


def called(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_skewless(*arguments, check=False, environment=WIDE | environment)


@pytest.mark.parametrize("arguments", EVERY, ids=" ".join)
def test_help(arguments: tuple[str, ...]):
    shown = called(*arguments, "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert f"Usage: {' '.join(('skewless', *arguments))}" in shown.stdout
    if arguments and arguments[-1] not in NESTED:
        assert "--json" in shown.stdout


def test_help_lists_every_command_in_order():
    shown = called().stdout
    assert re.findall(r"^│ ([a-z]+) ", shown, re.MULTILINE) == COMMANDS


def test_help_answers_at_once():
    started = time.monotonic()
    assert called("--help").returncode == 0
    assert time.monotonic() - started < 3  # about 0.2 s on an idle machine
    loaded = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, skewless.cli; print({'torch', 'sklearn', 'grpc', 'matplotlib', 'ray', 'pyarrow'} & {*sys.modules})",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert loaded.stdout == "set()\n"


def test_training_has_an_option_for_every_setting():
    shown = called("train", "--help").stdout
    for setting in fields(Config):
        assert f"--{setting.name.replace('_', '-')} " in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("bogus",), "skewless: No such command 'bogus'"),
        (("build",), "skewless build: Missing argument 'ARCHIVE'"),
        (("train", "archive/cough", "--out", "x"), "skewless train: Missing option '--manifest'"),
        (("train", "archive/cough", "--manifest", "m.csv", "--out", "x", "--epochs", "many"), "'--epochs' is 'many'"),
        (
            ("train", "archive/cough", "--manifest", "m.csv", "--out", "x", "--schedule", "step"),
            "'--schedule' is 'step'",
        ),
        (("train", "archive/none", "--manifest", "m.csv", "--out", "x"), "archive/none has no pipeline.yaml"),
        (("train", "archive/cough", "--manifest", "nowhere.csv", "--out", "x"), "nowhere.csv"),
        (
            ("evaluate", "archive/cough", "--checkpoint", "c", "--manifest", "m", "--out", "o", "--split", "dev"),
            "'dev'",
        ),
        (
            ("evaluate", "archive/cough", "--checkpoint", "c", "--manifest", "m", "--out", "o", "--references", "1"),
            "is '1'",
        ),
        (("corpus", "--out", "x", "--kind", "cats"), "kind is 'cats', expected one of cough, orca, portrait, talent"),
        (("corpus", "--out", "x", "--kind", "orca", "--formats", "wav"), "has no setting formats"),
        (("new", "1st"), "the name is '1st'"),
        (("new", "mine", "--like", "cat"), "--like is 'cat'"),
        (("build", "archive/cough", "--checkpoint", "c", "--evaluation", "e", "--version", "1/0"), "version is '1/0'"),
        (("tune", "archive/cough", "--checkpoint", "nowhere.pth", "--evaluation", "e"), "no checkpoint nowhere.pth"),
        (("tune", "archive/cough", "--checkpoint", "c", "--evaluation", "e", "--rounds", "0"), "is '0'"),
        (("import", "archive/cough", "nowhere.pth", "--out", "x.pth"), "nowhere.pth"),
        (("export", "archive/cough", "--checkpoint", "c", "--out", "m.tflite"), "--out is m.tflite"),
        (
            ("skew", "archive/cough", "--candidate", "c.yaml", "--checkpoint", "c", "--out", "o", "--threshold", "2"),
            "is '2'",
        ),
        (("serve", "token", "--state-dir", "nowhere"), "no server is running in"),
        (("serve", "start", "--model-store", "nowhere"), "no such model store"),
        (("register", "nowhere.mar", "--state-dir", "nowhere"), "no server is running in"),
        (("smoke", "cough", "--state-dir", "nowhere"), "no server is running in"),
        (("predict", "nowhere.wav", "--model", "cough"), "there is no file nowhere.wav"),
        (("predict", "README.md", "--model", "cough", "--state-dir", "nowhere"), "no server is running in"),
        (("score", "nowhere.mar", "--input", ".", "--out", "x.parquet"), "nowhere.mar: no such archive"),
        (("score", "README.md", "--input", ".", "--out", "x.parquet"), "README.md is not a model archive (.mar)"),
        (("score", "README.md", "--input", ".", "--out", "x.parquet", "--threshold", "2"), "is '2'"),
        (("score", "README.md", "--input", ".", "--out", "x.parquet", "--workers", "0"), "is '0'"),
        (("versions", "list", "--model-store", "nowhere"), "nowhere: no such model store"),
        (("versions", "default", "cough", "2.0", "--state-dir", "nowhere"), "no server is running in"),
        (("versions", "scale", "cough", "2.0"), "Missing option '--workers'"),
        (("versions", "retire", "cough", "2.0", "--state-dir", "nowhere"), "no server is running in"),
        (("retrain", "start", "archive/talent"), "--manifest"),
        (("retrain", "start", "archive/talent", "--manifest", "nowhere.csv"), "there is no manifest nowhere.csv"),
        (("retrain", "status", "--out", "nowhere"), "no retraining was started there"),
        (("retrain", "status"), "Missing option '--out'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_wrong_use_exits_with_2_and_names_the_value(arguments: tuple[str, ...], said: str):
    done = call_skewless(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.startswith("skewless") and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (UsageError("there is none"), 2),
        (ServerError("it does not answer"), 1),
        (LoadError("the self-test failed"), 1),
        (CheckFailedError("the scores of training are not reproduced"), 1),
        (BuildError("the references are not reproduced"), 2),
        (ValueError("rate is -1"), 2),
        (OSError("no space left"), 2),
        (ModuleNotFoundError("No module named 'librosa'", name="librosa"), 2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exceptions_become_one_line_and_an_exit_code(raised: Exception, code: int, capsys: pytest.CaptureFixture):
    own = typer.Typer(name="group")

    @command(own, "fail")
    def fail() -> Result:
        """Fail."""
        raise raised

    @command(own, "other")
    def other() -> Result:
        """Stand beside it: a Typer with one command has no names."""
        return Result({}, "")

    assert own(["fail"], standalone_mode=False) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("skewless group fail: ") and err.count("\n") == 1
    assert ("pip install 'skewless[all]'" in err) == isinstance(raised, ModuleNotFoundError)


def test_a_fault_of_ours_keeps_its_traceback():
    own = typer.Typer(name="group")

    @command(own, "fail")
    def fail() -> Result:
        """Fail."""
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        own([], standalone_mode=False)


def test_the_result_alone_is_on_standard_output(capsys: pytest.CaptureFixture):
    own = typer.Typer(name="group")

    @command(own, "measure")
    def measure() -> Result:
        """Print on the way."""
        print("1 of 2 epochs")
        return Result({"path": Path("a/b"), "auc": float("nan"), "pairs": [(1, 2.5)]}, "all is well", failed=True)

    assert own(["--json"], standalone_mode=False) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == {"path": "a/b", "auc": None, "pairs": [[1, 2.5]]}
    assert err == "1 of 2 epochs\n"
    assert own([], standalone_mode=False) == 1
    assert capsys.readouterr().out == "all is well\n"


def test_json_is_one_document(tmp_path: Path):
    made = called("new", "mine", "--folder", tmp_path, "--json")
    found = json.loads(made.stdout)
    assert found["folder"] == str(tmp_path / "mine")
    assert {"pipeline.yaml", "model.yaml", "model-config.yaml"} <= set(found["files"])
    written = called("corpus", "--out", tmp_path / "corpus", "--kind", "talent", "--count", 36, "--json")
    assert json.loads(written.stdout)["written"] is True
    assert "file/s" in written.stderr or "36/36" in written.stderr
    again = json.loads(
        called("corpus", "--out", tmp_path / "corpus", "--kind", "talent", "--count", 36, "--json").stdout
    )
    assert again["written"] is False
    status = called("serve", "status", "--state-dir", tmp_path, "--json")
    assert (status.returncode, json.loads(status.stdout)["health"]) == (1, "not running")


def test_a_status_without_a_server_is_an_answer(tmp_path: Path):
    status = called("serve", "status", "--state-dir", tmp_path)
    assert (status.returncode, status.stderr) == (1, "")
    assert "no server is running in" in status.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str):
    script = called(_SKEWLESS_COMPLETE=f"source_{shell}")
    assert script.returncode == 0
    assert "skewless" in script.stdout


def test_completion_knows_commands_and_choices():
    words = {"COMP_WORDS": "skewless re", "COMP_CWORD": "1"}
    found = called(_SKEWLESS_COMPLETE="complete_bash", **words)
    assert found.stdout.split() == ["register", "retrain"]
    words = {"COMP_WORDS": "skewless build archive/cough --runtime o", "COMP_CWORD": "4"}
    found = called(_SKEWLESS_COMPLETE="complete_bash", **words)
    assert found.stdout.split() == ["onnxruntime", "openvino"]


@pytest.mark.parametrize(
    ("script", "name"), [("build_archive", "build"), ("register", "register"), ("smoke_test", "smoke")]
)
def test_doors(script: str, name: str):
    """An environment with the package installed, as scripts/environment.sh makes it."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / f"{script}.py"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"skewless {name}: Missing argument")


def archive(store: Path, name: str, version: str, metrics: dict | None = None) -> None:
    manifest = {"model": {"modelName": name, "modelVersion": version}}
    with zipfile.ZipFile(store / f"{name}-{version}.mar", "w") as file:
        file.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        if metrics is not None:
            file.writestr("metrics.json", json.dumps(metrics))


METRICS = {
    "threshold": 0.31,
    "pipeline_fingerprint": "0123456789abcdef0123",
    "runtime": {"name": "eager", "tier": "exact"},
    "evaluation": {"auc": 0.98765},
}


def test_versions_without_a_server(tmp_path: Path):
    for version in ("1.9", "1.10"):
        archive(tmp_path, "cough", version, METRICS)
    archive(tmp_path, "echo", "1.0")
    (tmp_path / "broken-1.0.mar").write_bytes(b"no archive")
    where = ("--model-store", tmp_path, "--state-dir", tmp_path / "state")
    shown = called("versions", "list", *where)
    assert shown.returncode == 0, shown.stderr
    assert re.search(
        r"^cough +1\.10 +- +- +0\.31 +0123456789ab +eager +exact +0\.9877 +[0-9a-f]{12}$", shown.stdout, re.MULTILINE
    )
    assert "broken-1.0.mar: " in shown.stdout and "is not a model archive" in shown.stdout
    found = json.loads(called("versions", "list", "cough", *where, "--json").stdout)["versions"]
    assert [(row["name"], row["version"], row["state"], row["workers"]) for row in found] == [
        ("cough", "1.9", "-", None),
        ("cough", "1.10", "-", None),
    ]
    assert found[0]["metrics"] == METRICS["evaluation"]
    with Archive(tmp_path / "cough-1.9.mar") as opened:
        assert found[0]["digest"] == opened.digest()


def test_versions_beside_those_that_are_registered(tmp_path: Path):
    archive(tmp_path, "cough", "1.0", METRICS)
    archive(tmp_path, "cough", "2.0", METRICS)
    row = {"name": "cough", "version": "1.0", "archive": "cough-1.0.mar", "default": True, "workers": ["READY"]}
    gone = {"name": "cough", "version": "0.9", "archive": "cough-0.9.mar", "default": False, "workers": ["READY"]}
    recorded = {
        ("cough", "1.0"): ("cough-1.0.mar", "left out"),
        ("cough", "2.0"): ("cough-2.0.mar", "left out"),
        ("cough", "0.8"): ("cough-0.8.mar", "left out"),
        ("cough", "0.7"): ("cough-0.7.mar", "retired"),
    }
    rows = listing(tmp_path, [row, gone], recorded)
    assert [(r.version, r.state, r.default, r.workers, r.problem) for r in rows] == [
        ("1.0", "default", True, ["READY"], ""),
        ("2.0", "left out", False, None, ""),
        ("0.9", "registered", False, ["READY"], "the file is gone"),
        ("0.8", "left out", False, None, "the file is gone"),
    ]
    table = as_table(rows)
    assert re.search(r"^cough +1\.0 +default +READY +0\.31 ", table, re.MULTILINE)
    assert "cough-0.9.mar: the file is gone" in table


def test_the_app_is_the_command():
    assert app.info.name == "skewless"
