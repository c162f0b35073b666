"""The dashboard's, the alerts', the autoscaler's and the analysis' questions, put to a real Prometheus that watches a real TorchServe."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
import yaml

from skewless.evaluation.evaluate import evaluate
from skewless.packaging.build import build_archive
from skewless.torchserve.client import Client
from skewless.torchserve.launch import free_ports
from skewless.torchserve.server import Server, session
from skewless.training.checkpoint import load_checkpoint
from skewless.training.manifest import read_manifest
from tests.conftest import ROOT, until
from tests.tiny_model import make, recording

MONITORING = ROOT / "deploy" / "monitoring"
KUBERNETES = ROOT / "deploy" / "kubernetes"
DASHBOARD = json.loads((MONITORING / "grafana" / "dashboards" / "skewless.json").read_text())
PANELS = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]
VERSIONS = ("1.0", "2.0")
# What Grafana fills in. Prometheus looks every half second here.
WINDOW = "5m"

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed: apt-get install prometheus"
)
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is not installed: apt-get install prometheus"
)

Samples = list[dict[str, Any]]


def test_the_dashboard_asks_for_the_model_and_compares_its_versions():
    titles = [panel["title"] for panel in DASHBOARD["panels"]]
    assert len(titles) == len(set(titles)) == len({panel["id"] for panel in DASHBOARD["panels"]})
    for title, expr in PANELS:
        assert 'model_name="$model"' in expr, title
        assert "model_version" in expr or title in ("Requests that wait", "Drift from evaluation (PSI)"), title
    assert [each["name"] for each in DASHBOARD["templating"]["list"]] == ["datasource", "model"]
    for panel in DASHBOARD["panels"]:
        assert panel["datasource"]["uid"] == "${datasource}" and panel["description"]


def test_provisioning_points_at_what_compose_mounts():
    compose = yaml.safe_load((ROOT / "deploy" / "compose" / "compose.yaml").read_text())["services"]
    (source,) = yaml.safe_load((MONITORING / "grafana/provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in compose
    (provider,) = yaml.safe_load((MONITORING / "grafana/provisioning/dashboards/skewless.yml").read_text())["providers"]
    assert any(volume.split(":")[1] == provider["options"]["path"] for volume in compose["grafana"]["volumes"])
    (job,) = yaml.safe_load((MONITORING / "prometheus.yml").read_text())["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["server:8082"]}] and "server" in compose


@needs_promtool
def test_every_alert_fires_where_it_should_and_only_there():
    for command in (
        ["check", "config", MONITORING / "prometheus.yml"],
        ["check", "rules", MONITORING / "alerts.yml"],
        ["test", "rules", ROOT / "tests" / "alerts.yml"],
    ):
        done = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    (group,) = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    tested = yaml.safe_load((ROOT / "tests" / "alerts.yml").read_text())["tests"]
    fired = {case["alertname"] for test in tested for case in test["alert_rule_test"] if case.get("exp_alerts")}
    assert fired == {rule["alert"] for rule in group["rules"] if "alert" in rule}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`tiny` 1.0 and 2.0, the same model twice."""
    folder = tmp_path_factory.mktemp("monitoring")
    model = make(folder)
    rows = read_manifest(model.manifest, model.manifest.parent, model.definition.classes)
    checkpoint, cpu = load_checkpoint(model.checkpoint), torch.device("cpu")
    evaluate(model.definition, checkpoint, model.checkpoint, rows, "test", folder / "evaluation", cpu)
    for version in VERSIONS:
        build_archive(model.archive, model.checkpoint, folder / "evaluation", version, folder / "store")
    server = Server.start(folder / "store", folder / "state", ports="free")
    try:
        for version in VERSIONS:
            server.register(folder / "store" / f"tiny-{version}.mar", default=version == "1.0")
        yield server
    finally:
        server.stop()


class Prometheus:
    """A Prometheus on 127.0.0.1 with our rules, that looks at one server every half second.

    asked_at: the moment that questions are about, so that it does not matter when they are asked; None for now.
    """

    asked_at: float | None = None

    def __init__(self, folder: Path, server: Server):
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
        config["rule_files"] = [str(MONITORING / "alerts.yml")]
        (job,) = config["scrape_configs"]
        target = server.metrics_url.removeprefix("http://")
        # As a cluster's Prometheus labels a pod.
        job["static_configs"] = [{"targets": [target], "labels": {"namespace": "skewless", "pod": "tiny-0"}}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stderr=log)

    def ask(self, expr: str) -> Samples:
        """What an expression is. Raises for one that Prometheus does not understand."""
        asked = {"query": expr} | ({"time": self.asked_at} if self.asked_at else {})
        with session() as connection:
            answer = connection.get(f"{self.url}/api/v1/query", params=asked, timeout=10)
        assert answer.status_code == 200, f"{expr}\n{answer.text}"
        return answer.json()["data"]["result"]

    def ready(self) -> bool:
        assert self.process.poll() is None
        try:
            with session() as connection:
                return connection.get(f"{self.url}/-/ready", timeout=2).ok
        except requests.ConnectionError:
            return False


@pytest.fixture(scope="module")
def prometheus(served: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It has seen thirty good files, ten that are none, and ten long ones, of each version."""
    started = Prometheus(tmp_path_factory.mktemp("prometheus"), served)
    try:
        until(started.ready)
        # Of what there is at the first look, Prometheus sees no increase.
        until(lambda: started.ask("up == 1"))
        long = recording(1, seed=1)[:44] + recording(1, seed=1)[44:] * 10
        with Client(served) as client:
            for version in VERSIONS:
                client.predict_rest("tiny", b"RIFF no audio", version)
            until(
                lambda: (
                    len(started.ask('skewless_files_total{status="400"} or skewless_files_total{status="415"}')) == 2
                )
            )
            for version in VERSIONS:
                for number in range(30):
                    assert client.predict_rest("tiny", recording(number % 2, number), version).status == 200
                for _ in range(10):
                    assert client.predict_rest("tiny", b"RIFF no audio", version).status >= 400
                    assert client.predict_rest("tiny", long, version).status in (200, 400)
        # All of them, and not only as many as it has seen so far: of each version one, and then 30 and 10 times 2.
        sent = len(VERSIONS) * (1 + 30 + 10 * 2)
        until(lambda: sum(float(each["value"][1]) for each in started.ask("skewless_files_total")) == sent)
        until(lambda: len(started.ask("skewless:score_psi")) == len(VERSIONS))
        started.asked_at = time.time()
        yield started
    finally:
        started.process.terminate()
        started.process.wait(30)


def filled(expr: str) -> str:
    """An expression of the dashboard as Grafana sends it."""
    return expr.replace("$model", "tiny").replace("$__rate_interval", WINDOW).replace("$__range", WINDOW)


def of_version(samples: Samples, version: str) -> dict[str, float]:
    """Values of one version by what else they are labelled with; those that are no number are left out."""
    return {
        ",".join(
            f"{k}={v}" for k, v in sorted(each["metric"].items()) if k not in ("model_name", "model_version")
        ): value
        for each in samples
        if each["metric"].get("model_version") == version and (value := float(each["value"][1])) == value
    }


@pytest.mark.chain
@needs_prometheus
@pytest.mark.parametrize(("title", "expr"), PANELS, ids=[title for title, _ in PANELS])
def test_every_panel_shows_both_versions(prometheus: Prometheus, title: str, expr: str):
    samples = prometheus.ask(filled(expr))
    if title == "Requests that wait":
        assert len(samples) == 1 and float(samples[0]["value"][1]) >= 0
        return
    for version in VERSIONS:
        values = of_version(samples, version)
        assert values and all(value >= 0 for value in values.values()), (title, samples)
        match title:
            case "Requests":
                assert sum(values.values()) > 0
            case "Errors" | "Lost lines of the journal":
                assert sum(values.values()) == 0
            case "Decision rate" | "Probabilities" | "Probabilities in evaluation":
                assert sum(values.values()) == pytest.approx(1, abs=1e-6)
                assert len(values) >= 2
            case "Refused files":
                assert sum(values.values()) > 0 and all("kind=" in key for key in values)
            case "Latency, p50" | "Latency, p95" | "Latency, p99":
                assert 0 < sum(values.values()) < 60
            case "Truncated recordings":
                assert all(value <= 1 for value in values.values())


@pytest.mark.chain
@needs_prometheus
def test_the_autoscaler_and_the_analysis_get_numbers(prometheus: Prometheus):
    (rule,) = yaml.safe_load((KUBERNETES / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    assert prometheus.ask(rule["seriesQuery"])
    # As the adapter fills it in for a pod.
    asked = (
        rule["metricsQuery"]
        .replace("<<.LabelMatchers>>", 'namespace="skewless",pod=~"tiny-0"')
        .replace("<<.GroupBy>>", "pod")
    )
    (sample,) = prometheus.ask(asked)
    assert sample["metric"] == {"pod": "tiny-0"} and float(sample["value"][1]) >= 0

    template = yaml.safe_load((KUBERNETES / "overlays" / "canary" / "analysis.yaml").read_text())
    arguments = {"model": "tiny", "baseline": "1.0", "candidate": "2.0"}
    found = {}
    for metric in template["spec"]["metrics"]:
        query = re.sub(
            r"\{\{args\.(\w+)\}\}", lambda name: arguments[name[1]], metric["provider"]["prometheus"]["query"]
        )
        (sample,) = prometheus.ask(query)
        found[metric["name"]] = float(sample["value"][1])
    # The same model twice, asked the same.
    assert found["requests"] > 20 and found["latency"] > 0
    assert found["errors"] == 0 and 0 <= found["decisions"] <= 0.05, found
    # No alert is about to fire, and each asks for what there is.
    with session() as connection:
        groups = connection.get(f"{prometheus.url}/api/v1/rules", timeout=10).json()["data"]["groups"]
    assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}


@pytest.mark.chain
def test_metrics_named_in_deploy_are_exported(served: Server):
    with Client(served) as client:
        client.predict_rest("tiny", recording(1, seed=1))
        exported = set(re.findall(r"^# TYPE (\w+)", client.metrics(), re.MULTILINE))
    files = [*MONITORING.rglob("*.yml"), *MONITORING.rglob("*.json"), *KUBERNETES.rglob("*.yaml")]
    named = {name for file in files for name in re.findall(r"\b((?:skewless|ts)_[a-z_]+)\{", file.read_text())}
    named |= {name for _, expr in PANELS for name in re.findall(r"\b((?:skewless|ts)_[a-z_]+)", expr)}
    named = {name.removesuffix("_bucket") for name in named} - {"skewless_requests_waiting"}
    assert {name for name in named if ":" not in name} <= exported | {"skewless"}, named - exported
