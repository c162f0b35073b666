"""deploy/: manifests are what Kubernetes and its extensions take, fit together, and are as safe as they say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from skewless.errors import UsageError
from skewless.rollout.kubernetes import service, write_patches
from tests.conftest import ROOT, call_skewless

KUBERNETES = ROOT / "deploy" / "kubernetes"
OVERLAYS = ("cpu", "gpu", "canary")
# The oldest that the manifests are meant for (sidecars that end last, preStop sleep), and the newest known.
VERSIONS = ("1.33", "1.37")
CRDS = ("HTTPRoute", "GRPCRoute", "AnalysisTemplate", "InferenceService")

needs_kubectl = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl is not installed: https://kubernetes.io/docs/tasks/tools/"
)

Object = dict[str, Any]


def kustomize(folder: Path) -> list[Object]:
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> list[Object]:
    return kustomize(KUBERNETES / "overlays" / request.param)


@pytest.fixture(scope="module")
def canary() -> list[Object]:
    return kustomize(KUBERNETES / "overlays" / "canary")


def schema(name: str) -> Object:
    return json.loads((ROOT / "tests" / "schemas" / f"{name}.json").read_text())


def check(found: Object) -> None:
    """Against the schema of its kind: Kubernetes' own, or of an extension."""
    if found["kind"] in CRDS:
        jsonschema.Draft7Validator(schema(found["kind"].lower())).validate(found)
        return
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for version in VERSIONS:
        kubernetes_validate.validate(found, version, strict=True)


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [each for each in objects if each["kind"] == kind]


def containers(pod: Object) -> list[Object]:
    return [*pod.get("initContainers", ()), *pod["containers"]]


def pods(objects: list[Object]) -> Iterator[Object]:
    for deployment in of_kind(objects, "Deployment"):
        yield deployment["spec"]["template"]["spec"]


def inference_service() -> Object:
    return yaml.safe_load((KUBERNETES / "kserve" / "inferenceservice.yaml").read_text())


# --- each manifest ----------------------------------------------------------------------------------------------------


@needs_kubectl
def test_every_object_is_as_its_schema_has_it(overlay: list[Object]):
    for each in overlay:
        check(each)


@needs_kubectl
@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("HTTPRoute", ("spec", "rules", 0, "backendRef")),
        ("GRPCRoute", ("spec", "rules", 0, "sessionPersistence", "sessionname")),
        ("AnalysisTemplate", ("spec", "metrics", 0, "successcondition")),
        ("Deployment", ("spec", "template", "spec", "containers", 0, "readynessProbe")),
    ],
)
def test_a_field_that_is_not_there_is_found(canary: list[Object], kind: str, path: tuple[str | int, ...]):
    found = json.loads(json.dumps(of_kind(canary, kind)[0]))
    *way, last = path
    place = found
    for step in way:
        place = place[step]
    place[last] = "x"
    with pytest.raises(Exception, match=str(last)):
        check(found)


def test_the_inference_service_is_as_its_schema_has_it():
    found = inference_service()
    check(found)
    # Its pod is Kubernetes' business, and KServe's schema leaves it open.
    predictor = found["spec"]["predictor"]
    its_own = set(schema("inferenceservice")["definitions"]["V1beta1PredictorSpec"]["properties"])
    knative = {"canaryTrafficPercent", "minReplicas", "maxReplicas", "timeout"}
    assert knative < its_own
    pod = {key: value for key, value in predictor.items() if key not in knative}
    check({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod})
    assert 0 < predictor["canaryTrafficPercent"] < 100
    (serving,) = [each for each in predictor["containers"] if each.get("ports")]
    assert serving["name"] == "kserve-container" and serving["image"].split("/")[-1].startswith("skewless-gateway:")


# --- safety -----------------------------------------------------------------------------------------------------------


@needs_kubectl
def test_no_container_may_do_more_than_serve(overlay: list[Object]):
    for pod in [*pods(overlay), inference_service()["spec"]["predictor"]]:
        context = pod["securityContext"]
        assert context["runAsNonRoot"] and context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert context["runAsUser"] == context["runAsGroup"] == context["fsGroup"] == 10001
        assert pod["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        for container in containers(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, container["name"]
        assert not [volume for volume in pod["volumes"] if "hostPath" in volume]
    for pod in pods(overlay):
        for container in containers(pod):
            assert {"cpu", "memory"} <= set(container["resources"]["limits"]), container["name"]
            # A tag that says which, so that a pod started later is the same.
            assert re.fullmatch(r"registry\.example\.org/skewless(-gateway)?:\d+\.\d+\.\d+(-cuda)?", container["image"])


@needs_kubectl
def test_an_archive_is_checked_as_a_copy_before_it_is_served(overlay: list[Object]):
    for pod in pods(overlay):
        names = [each["name"] for each in pod["initContainers"]]
        assert names == ["fetch", "check-digest", "check-signature", "gateway"]
        by_name = {each["name"]: each for each in containers(pod)}
        for name in ("check-digest", "check-signature", "server"):
            (store,) = [m for m in by_name[name]["volumeMounts"] if m["mountPath"] == "/app/model_store"]
            assert (store["name"], store["readOnly"]) == ("store", True)
        # What is on the volume is read by the copy alone.
        readers = [each["name"] for each in containers(pod) for m in each["volumeMounts"] if m["name"] == "archives"]
        assert readers == ["fetch"]
        (keys,) = [m for m in by_name["server"]["volumeMounts"] if m["name"] == "trusted-keys"]
        assert {"name": "SKEWLESS_TRUSTED_KEYS", "value": keys["mountPath"]} in by_name["server"]["env"]
        assert by_name["check-signature"]["command"][-1] == keys["mountPath"]


def test_the_digest_check_refuses_another_archive_and_a_missing_one(tmp_path: Path):
    """The init container's command, run here."""
    deployment = yaml.safe_load((KUBERNETES / "base" / "deployment.yaml").read_text())
    (found,) = [c for c in deployment["spec"]["template"]["spec"]["initContainers"] if c["name"] == "check-digest"]
    sums, store = tmp_path / "SHA256SUMS", tmp_path / "store"
    store.mkdir()
    for name in ("a-1.0.mar", "a-2.0.mar"):
        (store / name).write_bytes(name.encode())
    made = subprocess.run(["sha256sum", "a-1.0.mar", "a-2.0.mar"], cwd=store, capture_output=True, check=True)
    sums.write_bytes(made.stdout)
    (store / "a-1.0.mar").unlink()

    def code() -> int:
        return subprocess.run([*found["command"][:-1], sums], cwd=store, capture_output=True, check=False).returncode

    assert code() == 0
    (store / "a-2.0.mar").write_bytes(b"another")
    assert code() == 1
    (store / "a-2.0.mar").unlink()
    assert code() == 1


@needs_kubectl
def test_management_and_torchserve_itself_are_reached_by_nobody(overlay: list[Object]):
    for each in of_kind(overlay, "Service"):
        assert {port["port"] for port in each["spec"]["ports"]} == {8090, 7090}
    for policy in of_kind(overlay, "NetworkPolicy"):
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"] and policy["spec"]["egress"] == []
        assert {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]} == {8090, 7090, 8082}
        assert all(rule["from"] for rule in policy["spec"]["ingress"])


# --- how they fit together --------------------------------------------------------------------------------------------


def selects(selector: Object, labels: Object) -> bool:
    return bool(selector) and selector.items() <= labels.items()


@needs_kubectl
def test_objects_find_each_other(overlay: list[Object]):
    deployments = {each["metadata"]["name"]: each["spec"]["template"] for each in of_kind(overlay, "Deployment")}
    for name, template in deployments.items():
        labels = template["metadata"]["labels"]

        def chosen(kind: str, *path: str, labels: Object = labels) -> list[str]:
            found = []
            for each in of_kind(overlay, kind):
                place = each
                for step in path:
                    place = place[step]
                found += [each["metadata"]["name"]] if selects(place, labels) else []
            return found

        # Each has one of every kind, and none of another version's.
        assert chosen("Service", "spec", "selector") == [name]
        assert chosen("PodDisruptionBudget", "spec", "selector", "matchLabels") == [name]
        assert chosen("NetworkPolicy", "spec", "podSelector", "matchLabels") == [name]
        (spread,) = template["spec"]["topologySpreadConstraints"]
        assert selects(spread["labelSelector"]["matchLabels"], labels)
        (fetch,) = [each for each in template["spec"]["initContainers"] if each["name"] == "fetch"]
        config = fetch["env"][0]["valueFrom"]["configMapKeyRef"]["name"]
        (archive,) = [each for each in of_kind(overlay, "ConfigMap") if each["metadata"]["name"] == config]
        assert re.fullmatch(r"cough-\d\.\d\.mar", archive["data"]["ARCHIVE"])
        assert labels["app.kubernetes.io/version"] == archive["data"]["ARCHIVE"][6:-4]
        mounted = {m["name"] for each in containers(template["spec"]) for m in each["volumeMounts"]}
        assert mounted == {volume["name"] for volume in template["spec"]["volumes"]}
    targets = [each["spec"]["scaleTargetRef"]["name"] for each in of_kind(overlay, "HorizontalPodAutoscaler")]
    assert sorted(targets) == sorted(deployments)


@needs_kubectl
def test_routes_lead_to_the_two_versions(canary: list[Object]):
    services = {
        (each["metadata"]["name"], port["port"]): port["name"]
        for each in of_kind(canary, "Service")
        for port in each["spec"]["ports"]
    }
    for kind, port in (("HTTPRoute", "http"), ("GRPCRoute", "grpc")):
        (route,) = of_kind(canary, kind)
        (rule,) = route["spec"]["rules"]
        assert [services[ref["name"], ref["port"]] for ref in rule["backendRefs"]] == [port, port]
        assert [ref["name"] for ref in rule["backendRefs"]] == [service("cough", "1.0"), service("cough", "2.0")]
        assert [ref["weight"] for ref in rule["backendRefs"]] == [1000, 0]
        assert rule["sessionPersistence"]["type"] == {"http": "Cookie", "grpc": "Header"}[port]


def test_the_autoscaler_asks_for_what_the_adapter_gives():
    (rule,) = yaml.safe_load((KUBERNETES / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    scaler = yaml.safe_load((KUBERNETES / "base" / "autoscaler.yaml").read_text())
    (metric,) = scaler["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]


@needs_kubectl
def test_a_pod_has_time_to_drain(overlay: list[Object]):
    for pod in pods(overlay):
        (server,) = pod["containers"]
        drain = float(server["args"][server["args"].index("--drain") + 1])
        # Server.stop gives TorchServe and its workers 30 s.
        assert pod["terminationGracePeriodSeconds"] >= server["lifecycle"]["preStop"]["sleep"]["seconds"] + drain + 30
        # The first check waits for the self-test of every worker, which TorchServe gives 180 s.
        startup = server["startupProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 180 + 60
        assert "--live" in server["livenessProbe"]["exec"]["command"]
        assert "--live" not in server["readinessProbe"]["exec"]["command"]


def skewless_commands(objects: list[Object]) -> set[tuple[str, ...]]:
    """Every command line of `skewless` in pods: commands, arguments, probes, and what a shell is told."""
    found = set()
    for pod in [*pods(objects), inference_service()["spec"]["predictor"]]:
        for each in containers(pod):
            probes = [each[name]["exec"]["command"] for name in each if name.endswith("Probe") and "exec" in each[name]]
            for line in [each.get("command", []), each.get("args", []), *probes]:
                if line[:1] == ["skewless"]:
                    found.add(tuple(line))
                elif line[:2] == ["sh", "-c"]:
                    found |= {tuple(words.split()) for words in re.findall(r"skewless [^;]+", line[2])}
    return found


@needs_kubectl
@pytest.mark.parametrize("name", ["serve run", "serve health", "gateway run", "verify"])
def test_every_command_has_the_options_that_it_is_given(canary: list[Object], name: str):
    words = tuple(name.split())
    lines = [line for line in skewless_commands(canary) if line[1 : len(words) + 1] == words]
    assert lines
    shown = call_skewless(*words, "--help")
    if shown.returncode == 2 and "No such command" in shown.stderr:
        pytest.skip(f"`skewless {name}` is not in this checkout")
    assert shown.returncode == 0, shown.stderr
    for line in lines:
        assert {word for word in line if word.startswith("--")} <= set(re.findall(r"--[a-z][a-z-]*", shown.stdout)), (
            line
        )
    covered = {" ".join(words) for words in ({line[1:3] for line in skewless_commands(canary)} | {("verify",)})}
    assert {each for each in covered if not each.startswith("verify")} == {"serve run", "serve health", "gateway run"}


# --- the steps of a rollout -------------------------------------------------------------------------------------------


def patched(canary: list[Object], folder: Path, patches: list[Path]) -> dict[str, Object]:
    """The rules of the two routes after patches, one after another."""
    folder.mkdir()
    routes = [each for each in canary if each["kind"] in ("HTTPRoute", "GRPCRoute")]
    (folder / "routes.yaml").write_text(yaml.safe_dump_all(routes))
    kinds = {"httproute": "HTTPRoute", "grpcroute": "GRPCRoute"}
    listed = [
        {"path": each.name, "target": {"kind": kinds[each.suffixes[-2][1:]], "name": "cough"}} for each in patches
    ]
    for each in patches:
        shutil.copy(each, folder)
    (folder / "kustomization.yaml").write_text(yaml.safe_dump({"resources": ["routes.yaml"], "patches": listed}))
    routes = kustomize(folder)
    for each in routes:
        check(each)
    return {each["kind"]: each["spec"]["rules"][0] for each in routes}


@needs_kubectl
def test_steps_become_patches_of_both_routes(canary: list[Object], tmp_path: Path):
    files = write_patches("cough", "1.0", "2.0", [5, 12.5, 50, 100], tmp_path / "steps")
    stems = [
        f"{n:02}-{name}" for n, name in enumerate(("shadow", "5-percent", "12.5-percent", "50-percent", "promote"))
    ]
    assert [file.name for file in files] == [
        f"{stem}.{route}.yaml" for stem in (*stems, "abort") for route in ("httproute", "grpcroute")
    ]
    weights = dict(zip((*stems, "abort"), (0, 50, 125, 500, 1000, 0), strict=True))
    for stem, weight in weights.items():
        mine = [file for file in files if file.name.startswith(f"{stem}.")]
        # After any other step, and twice.
        for number, before in enumerate(([], files[:2], mine)):
            rules = patched(canary, tmp_path / f"{stem}-{number}", [*before, *mine])
            assert len(rules) == 2
            for kind, rule in rules.items():
                assert [ref["weight"] for ref in rule["backendRefs"]] == [1000 - weight, weight], (stem, before)
                mirrors = [each["requestMirror"]["backendRef"] for each in rule["filters"]]
                expected = {"name": "skewless-cough-2-0", "port": 8090 if kind == "HTTPRoute" else 7090}
                assert mirrors == ([expected] if stem == "00-shadow" else []), (stem, before)


@needs_kubectl
def test_a_patch_changes_no_route_of_other_versions(canary: list[Object], tmp_path: Path):
    files = write_patches("cough", "1.0", "3.0", [5], tmp_path / "steps")
    with pytest.raises(AssertionError, match=r"test failed|testing value"):
        patched(canary, tmp_path / "other", files[:1])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("cough", "1.0", "2.0", [5, 5, 100]), "rising percentages"),
        (("cough", "1.0", "2.0", [50, 5]), "rising percentages"),
        (("cough", "1.0", "2.0", [0, 5]), "rising percentages"),
        (("cough", "1.0", "2.0", [101]), "rising percentages"),
        (("cough", "1.0", "2.0", []), "rising percentages"),
        (("cough", "1.0", "1-0", [5]), "are both skewless-cough-1-0"),
        (("c" * 60, "1.0", "2.0", [5]), "too long a name"),
    ],
)
def test_steps_that_cannot_be_are_refused(arguments: tuple[Any, ...], said: str, tmp_path: Path):
    with pytest.raises(UsageError, match=said):
        write_patches(*arguments, tmp_path / "steps")
    assert not (tmp_path / "steps").exists()


# --- compose ----------------------------------------------------------------------------------------------------------

COMPOSE = yaml.safe_load((ROOT / "deploy" / "compose" / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
BUILT = ("server", "gateway")


def test_the_compose_file_is_as_its_schema_has_it():
    known = {key: value for key, value in COMPOSE.items() if not key.startswith("x-")}
    validator = jsonschema.Draft202012Validator(schema("compose"))
    validator.validate(known)
    wrong = known | {"services": {"server": SERVICES["server"] | {"readonly": True}}}
    assert not validator.is_valid(wrong)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_can_write_to_its_volume_and_nothing_else(name: str):
    found = SERVICES[name]
    assert found["read_only"] is True and found["cap_drop"] == ["ALL"]
    assert found["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "devices", "user"} & set(found)
    assert {"mem_limit", "pids_limit", "healthcheck"} <= set(found)
    assert re.fullmatch(r"[a-z/-]+:v?\d+\.\d+\.\d+", found["image"])
    for volume in found["volumes"]:
        source = volume.partition(":")[0]
        assert source in COMPOSE["volumes"] or volume.endswith(":ro"), volume
        if source not in COMPOSE["volumes"] and "model_store" not in source:
            assert (ROOT / "deploy" / "compose" / source).exists(), volume


def test_nothing_is_published_to_other_machines():
    published = [port for each in SERVICES.values() for port in each.get("ports", ())]
    assert published and all(re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port) for port in published), published
    # TorchServe is reached through the gateway alone, which has its network.
    assert {port.split(":")[1] for port in SERVICES["server"]["ports"]} == {"8090", "7090"}
    assert SERVICES["gateway"]["network_mode"] == SERVICES["gateway"]["pid"] == "service:server"


@pytest.mark.parametrize("name", BUILT)
def test_the_images_are_the_dockerfiles(name: str):
    found = SERVICES[name]
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f" AS {found['build']['target']}\n" in dockerfile
    assert (ROOT / "deploy" / "compose" / found["build"]["context"]).resolve() == ROOT
    check = found["healthcheck"]["test"]
    assert check[:2] == ["CMD", "skewless"]
    if name == "server":
        (written,) = re.findall(r"^    CMD (\[.*\])$", dockerfile, re.MULTILINE)
        assert check[1:] == json.loads(written)
        # The default of --drain, and what stopping takes.
        assert int(found["stop_grace_period"][:-1]) >= 30 + 30
