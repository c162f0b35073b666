"""A rollout's state: what may be asked for, that it ends whole however it is interrupted, and that it runs by itself."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from skewless.errors import ServerError, UsageError
from skewless.rollout import gateway, run, state
from skewless.rollout.judge import Verdict
from skewless.rollout.state import Rollout
from tests.conftest import call_skewless
from tests.test_gateway import PLAIN, Callers, Place, needs_nginx, place

__all__ = ["place"]


@dataclass
class Stub:
    """A server that knows versions and a default. workers: states, by version."""

    state_dir: Path
    default: str = "1.0"
    workers: dict[str, list[str]] = field(default_factory=lambda: {"1.0": ["READY"], "2.0": ["READY"], "3.0": []})
    asked: list[str] = field(default_factory=list)

    def models(self) -> list[dict]:
        return [
            {
                "name": "cough",
                "version": each,
                "default": each == self.default,
                "archive": f"cough-{each}.mar",
                "workers": states,
            }
            for each, states in self.workers.items()
        ]

    def set_default(self, name: str, version: str) -> None:
        self.asked.append(version)
        self.default = version


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    stub = Stub(tmp_path)
    (tmp_path / "gateway").mkdir()
    monkeypatch.setattr(run.Server, "attach", lambda state_dir: stub)
    monkeypatch.setattr(
        state.versions, "set_default", lambda server, model, version: server.set_default(model, version)
    )
    return stub


def routed(server: Stub) -> str:
    """What the gateway follows."""
    return (server.state_dir / "gateway" / "routes").read_text()


def begin(server: Stub, percent: float = 5.0, shadow: bool = False) -> Rollout:
    begun = state.start(server, "cough", "2.0", percent, shadow, None)
    gateway.follow(server.state_dir)
    return begun


def test_a_rollout_goes_its_way(server: Stub):
    begun = begin(server, 0.0, shadow=True)
    assert (begun.phase, begun.baseline, begun.candidate, begun.percent, begun.running) == (
        "shadow",
        "1.0",
        "2.0",
        0.0,
        True,
    )
    assert routed(server) == "rollout cough 1.0 2.0 0 shadow\n"
    assert [run.step(server.state_dir, "cough", None, "next").percent for _ in range(4)] == [5.0, 25.0, 50.0, 100.0]
    assert routed(server) == "rollout cough 1.0 2.0 1000 -\n"
    with pytest.raises(UsageError, match="at the last step of its policy"):
        run.step(server.state_dir, "cough", None, "next")
    back = run.step(server.state_dir, "cough", 12.5, "slower", shadow=True)
    assert (back.phase, back.percent, back.shadow, back.step) == ("split", 12.5, True, 1)
    assert routed(server) == "rollout cough 1.0 2.0 125 shadow\n"
    assert run.step(server.state_dir, "cough", None, "next").percent == 25.0

    done = run.promote(server.state_dir, "cough", "well")
    assert (done.phase, done.percent, done.pending, server.default) == ("promoted", 100.0, None, "2.0")
    # From now on the server's default version decides, as it does without a rollout.
    assert routed(server) == ""
    assert Rollout.read(server.state_dir, "cough") == done
    actions = [(each.action, each.percent) for each in done.history]
    assert actions == [
        ("start", 0.0), ("step", 5.0), ("step", 25.0), ("step", 50.0), ("step", 100.0), ("step", 12.5), ("step", 25.0),
        ("promote", 100.0),
    ]  # fmt: skip
    for action in (run.promote, run.abort):
        with pytest.raises(UsageError, match="is over: promoted"):
            action(server.state_dir, "cough", "again")


def test_an_aborted_rollout_leaves_the_baseline(server: Stub):
    begin(server, 50.0)
    done = run.abort(server.state_dir, "cough", "worse")
    assert (done.phase, done.percent, done.history[-1].why) == ("aborted", 0.0, "worse")
    assert (routed(server), server.default, server.asked) == ("", "1.0", [])
    # Whoever had changed the default meanwhile: everybody goes back.
    begin(server, 50.0)
    server.default = "2.0"
    run.abort(server.state_dir, "cough", "worse")
    assert (server.default, server.asked) == ("1.0", ["1.0"])


def test_with_its_server_away_a_rollout_can_be_aborted_all_the_same(server: Stub, monkeypatch: pytest.MonkeyPatch):
    begin(server, 50.0)

    def away(_: object) -> Stub:
        raise UsageError("no server is running")

    with monkeypatch.context() as patch:
        patch.setattr(run.Server, "attach", away)
        for action in (run.promote, run.abort):
            with pytest.raises(UsageError, match="no server is running"):
                action(server.state_dir, "cough", "worse")
            left = Rollout.read(server.state_dir, "cough")
            assert left is not None
            assert left.pending == (None if action is run.promote else "abort")
    assert routed(server) == "rollout cough 1.0 2.0 0 -\n"
    assert run.abort(server.state_dir, "cough", "worse").phase == "aborted"


@pytest.mark.parametrize(
    ("model", "candidate", "percent", "message"),
    [
        ("nobody", "2.0", 5.0, "no model nobody is registered"),
        ("cough", "9.0", 5.0, "cough 9.0 is not registered; registered: 1.0, 2.0, 3.0, 2.0"),
        ("cough", "1.0", 5.0, "cough 1.0 is the default version already"),
        ("cough", "3.0", 5.0, "cough 3.0 has no worker that is ready"),
        ("cough", "2." + "0" * 200, 5.0, "is 202 characters long; expected 127 or fewer"),
        ("cough", "2.0", 0.0, "the candidate would get nothing"),
        ("cough", "2.0", 101.0, "percent is 101; expected 0 to 100, in steps of 0.1"),
        ("cough", "2.0", 0.05, "percent is 0.05; expected"),
        ("cough", "2.0", -1.0, "percent is -1; expected"),
        ("cough", "2.0", float("nan"), "percent is nan; expected"),
        ("../cough", "2.0", 5.0, "is no model's name"),
        (".cough", "2.0", 5.0, "is no model's name"),
        ("cough x", "2.0", 5.0, "is no model's name"),
    ],
)
def test_what_cannot_be_tried_is_refused(server: Stub, model: str, candidate: str, percent: float, message: str):
    server.workers["2." + "0" * 200] = ["READY"]
    with pytest.raises(UsageError, match=message):
        state.start(server, model, candidate, percent, False, None)
    assert state.rollouts(server.state_dir) == []


def test_one_rollout_of_a_model_at_a_time(server: Stub):
    begin(server)
    with pytest.raises(UsageError, match=r"a rollout of cough 2\.0 is running already, at 5 %"):
        begin(server, 50.0)
    for action in (lambda: run.step(server.state_dir, "owl", 5.0, ""), lambda: run.abort(server.state_dir, "owl", "")):
        with pytest.raises(UsageError, match="owl has no rollout"):
            action()


@pytest.mark.parametrize("action", ["step", "promote", "abort"])
def test_a_second_operator_is_refused(server: Stub, action: str):
    begin(server)
    before = Rollout.read(server.state_dir, "cough")
    call: dict[str, Callable] = {
        "step": lambda: run.step(server.state_dir, "cough", 50.0, ""),
        "promote": lambda: run.promote(server.state_dir, "cough", ""),
        "abort": lambda: run.abort(server.state_dir, "cough", ""),
    }
    with (
        state._alone(server.state_dir, "cough"),
        pytest.raises(UsageError, match="somebody else is changing the rollout"),
    ):
        call[action]()
    assert (Rollout.read(server.state_dir, "cough"), server.default) == (before, "1.0")
    call[action]()
    assert Rollout.read(server.state_dir, "cough") != before


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:100],
        lambda text: "[]",
        lambda text: text.replace('"split"', '"over"'),
        lambda text: text.replace('"percent": 5.0', '"percent": 500', 1),
        lambda text: text.replace('"candidate": "2.0"', '"candidate": "2.0 x\\nrollout"'),
        lambda text: text.replace('"model": "cough"', '"model": "owl"'),
    ],
)
def test_a_damaged_file_is_told_and_changes_no_route(server: Stub, damage: Callable[[str], str]):
    begin(server)
    file = server.state_dir / "rollouts" / "cough.json"
    whole, before = file.read_text(), routed(server)
    file.write_text(damage(whole))
    assert file.read_text() != whole
    with pytest.raises(UsageError, match="remove it"):
        run.step(server.state_dir, "cough", 50.0, "")
    with pytest.raises(UsageError, match="remove it"):
        gateway.follow(server.state_dir)
    assert routed(server) == before


class Killed(BaseException):
    """As SIGKILL: nothing that catches exceptions sees it."""


@pytest.mark.parametrize("action", ["promote", "abort"])
@pytest.mark.parametrize("point", range(8))
def test_an_ending_that_is_killed_anywhere_is_ended_by_the_next_run(
    server: Stub, monkeypatch: pytest.MonkeyPatch, action: str, point: int
):
    """Killed before and after each of its three effects: the intention, the default version, the end."""
    begin(server, 50.0)
    server.default = "1.0" if action == "promote" else "2.0"
    moments = iter(range(100))

    def dying(effect: Callable) -> Callable:
        def effect_or_death(*arguments: object) -> None:
            if next(moments) == point:
                raise Killed
            effect(*arguments)
            if next(moments) == point:
                raise Killed

        return effect_or_death

    with monkeypatch.context() as patch:
        patch.setattr(Rollout, "write", dying(Rollout.write))
        patch.setattr(Stub, "set_default", dying(Stub.set_default))
        try:
            getattr(run, action)(server.state_dir, "cough", "test")
            assert point >= 6
        except Killed:
            assert point < 6
    judged = Verdict(action, ["said so"])
    left = Rollout.read(server.state_dir, "cough")
    assert left is not None
    if left.running:
        left = run.unattended(server.state_dir, "cough", 1.0, lambda *_: judged, lambda _: None)
    wanted = ("promoted", "2.0") if action == "promote" else ("aborted", "1.0")
    assert (left.phase, server.default, left.pending, routed(server)) == (*wanted, None, "")


def test_what_is_about_to_end_can_only_end(server: Stub):
    begun = begin(server, 50.0)
    replace(begun, pending="promote", percent=100.0).write(server.state_dir)
    with pytest.raises(UsageError, match=r"about to end \(promote\)"):
        run.step(server.state_dir, "cough", 5.0, "")
    replace(begun, pending="abort", percent=0.0).write(server.state_dir)
    with pytest.raises(UsageError, match="aborting the rollout of cough has begun"):
        run.promote(server.state_dir, "cough", "")
    # A promotion that was interrupted may still be called off.
    replace(begun, pending="promote", percent=100.0).write(server.state_dir)
    server.default = "2.0"
    assert run.abort(server.state_dir, "cough", "").phase == "aborted"
    assert server.default == "1.0"


def scripted(*actions: str) -> Callable[[Path, Rollout], Verdict]:
    """A judge that says one thing after the other."""
    saying = iter(actions)
    return lambda *_: Verdict(next(saying), ["because"])


def test_unattended_it_follows_its_policy(server: Stub):
    begin(server, 0.0, shadow=True)
    slept: list[float] = []
    says = scripted("hold", "step", "hold", "hold", "step", "step", "step", "promote")
    done = run.unattended(server.state_dir, "cough", 7.0, says, slept.append)
    assert (done.phase, server.default) == ("promoted", "2.0")
    assert [each.percent for each in done.history] == [0.0, 5.0, 25.0, 50.0, 100.0, 100.0]
    assert slept == [7.0] * 3

    server.default = "1.0"
    begin(server, 25.0)
    done = run.unattended(server.state_dir, "cough", 7.0, scripted("hold", "abort"), slept.append)
    assert (done.phase, done.history[-1].why, server.default) == ("aborted", "because", "1.0")


def test_unattended_it_goes_on_when_a_server_is_away_for_a_while(server: Stub, monkeypatch: pytest.MonkeyPatch):
    begin(server, 100.0)
    failures = iter([ServerError("no answer"), OSError("disk"), None])

    def attach(_: object) -> Stub:
        if (failure := next(failures)) is not None:
            raise ServerError(str(failure))
        return server

    monkeypatch.setattr(run.Server, "attach", attach)
    done = run.unattended(server.state_dir, "cough", 1.0, lambda *_: Verdict("promote", []), lambda _: None)
    assert done.phase == "promoted"


def test_unattended_twice_is_refused(server: Stub):
    begin(server)

    def second(_: float) -> None:
        with pytest.raises(UsageError, match="follows this rollout already"):
            run.unattended(server.state_dir, "cough", 1.0, scripted("hold"))
        # An operator may act all the same.
        run.abort(server.state_dir, "cough", "by hand")

    assert run.unattended(server.state_dir, "cough", 1.0, scripted("hold"), second).phase == "aborted"
    with pytest.raises(UsageError, match="expected more than 0"):
        run.unattended(server.state_dir, "cough", 0.0)


@pytest.mark.parametrize("kills", range(12))
def test_unattended_it_may_be_killed_at_any_moment(server: Stub, monkeypatch: pytest.MonkeyPatch, kills: int):
    """Killed before its nth effect, whatever that is, and started again."""
    begin(server, 0.0, shadow=True)
    left = iter(range(kills))
    alive = True

    def counted(effect: Callable) -> Callable:
        def effect_or_death(*arguments: object) -> None:
            nonlocal alive
            if alive and next(left, None) is None:
                alive = False
                raise Killed
            effect(*arguments)

        return effect_or_death

    monkeypatch.setattr(Rollout, "write", counted(Rollout.write))
    monkeypatch.setattr(Stub, "set_default", counted(Stub.set_default))
    monkeypatch.setattr(gateway, "_replace", counted(gateway._replace))

    def says(_: Path, rollout: Rollout) -> Verdict:
        return Verdict("promote" if rollout.percent == 100 else "step", [])

    try:
        run.unattended(server.state_dir, "cough", 1.0, says, lambda _: None)
    except Killed:
        run.unattended(server.state_dir, "cough", 1.0, says, lambda _: None)
    done = Rollout.read(server.state_dir, "cough")
    assert done is not None
    assert not alive
    assert (done.phase, server.default, routed(server)) == ("promoted", "2.0", "")
    assert [each.percent for each in done.history] == [0.0, 5.0, 25.0, 50.0, 100.0, 100.0]


def test_a_full_disk_leaves_the_rollout_as_it_was(server: Stub, monkeypatch: pytest.MonkeyPatch):
    begun = begin(server)
    before = routed(server)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(ServerError, match="No space left on device; make room there"):
            run.promote(server.state_dir, "cough", "")
    assert (Rollout.read(server.state_dir, "cough"), routed(server), server.default) == (begun, before, "1.0")


# --- a real gateway and a real TorchServe -----------------------------------------------------------------------------


@pytest.fixture
def callers(place: Place) -> Iterator[Callers]:
    place.open(PLAIN)
    place.split(0)
    place.server.set_default("echo", "1.0")
    while any(row["workers"] != ["READY"] for row in place.server.models()):
        time.sleep(0.1)
    calling = Callers(place.gateway)
    yield calling
    calling.close()


def rollout(place: Place, *arguments: object) -> subprocess.CompletedProcess[str]:
    return call_skewless("rollout", *arguments, "--state-dir", place.server.state_dir)


@needs_nginx
@pytest.mark.chain
def test_the_command_rolls_out_and_back(place: Place, callers: Callers):
    begun = rollout(place, "start", "echo", "--candidate", "2.0", "--percent", 100)
    assert (begun.returncode, begun.stdout) == (
        0,
        "echo: split: 2.0 answers 100 % of the clients, 1.0 the others\n",
    ), begun.stderr
    assert callers.rest(b"x").body["version"] == callers.grpc(b"x").body["version"] == "2.0"
    assert rollout(place, "start", "echo", "--candidate", "2.0").returncode == 2
    moved = rollout(place, "step", "echo", 0.1, "--why", "careful")
    assert (moved.returncode, "2.0 answers 0.1 % of the clients" in moved.stdout) == (0, True)
    assert callers.rest(b"x", headers={"X-Client-Id": "1"}).arm == "baseline"
    shown = rollout(place, "status", "echo", "--json")
    assert json.loads(shown.stdout)["rollout"]["history"][-1]["why"] == "careful"
    assert "careful" in rollout(place, "status").stdout
    ended = rollout(place, "abort", "echo")
    assert (ended.returncode, ended.stdout) == (0, "echo: aborted: 1.0 answers everybody\n")
    assert callers.rest(b"x").body["version"] == "1.0"

    assert rollout(place, "start", "echo", "--candidate", "2.0", "--shadow").returncode == 0
    ended = rollout(place, "promote", "echo")
    assert (ended.returncode, ended.stdout) == (0, "echo: promoted: 2.0 is the default version\n")
    answer = callers.rest(b"x")
    assert (answer.body["version"], "x-skewless-version" in answer.headers) == ("2.0", False)
    assert [row["version"] for row in place.server.models() if row["default"]] == ["2.0"]
    assert rollout(place, "abort", "echo").returncode == 2


@needs_nginx
@pytest.mark.chain
def test_the_command_refuses_with_2(place: Place, callers: Callers):
    for arguments, message in (
        (("start", "owl", "--candidate", "2.0"), "no model owl is registered"),
        (("start", "echo", "--candidate", "9"), "echo 9 is not registered; registered: 1.0, 2.0"),
        (("start", "echo", "--candidate", "1.0"), "is the default version already"),
        (("start", "echo", "--candidate", "2.0", "--percent", "200"), "percent is 200"),
        (("start", "echo", "--candidate", "2.0", "--policy", "none.yaml"), "none.yaml"),
        (("step", "echo", "5"), "echo has no rollout"),
        (("status", "echo"), "echo has had no rollout"),
        (("run", "echo"), "echo has no rollout"),
    ):
        done = rollout(place, *arguments)
        assert (done.returncode, message in done.stderr, done.stdout) == (2, True, ""), (arguments, done.stderr)
    assert rollout(place, "status").stdout == "no model has had a rollout\n"
    assert callers.rest(b"x").status == 200
    place.close()
    done = rollout(place, "start", "echo", "--candidate", "2.0")
    assert (done.returncode, "no gateway is running" in done.stderr) == (2, True)
