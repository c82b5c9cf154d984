"""The manifests: Kubernetes' own schemas take them, and they ask what the server answers."""

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from kagami_launcher.cli import flags
from kagami_router.api.routes import ROUTES
from kagami_router.telemetry.metrics import Metrics

FOLDER = Path(__file__).parents[2] / "deploy" / "k8s"
DOCUMENTS = [
    document
    for name in ("kagami.yaml", "monitoring.yaml")
    for document in yaml.safe_load_all((FOLDER / name).read_text())
]
BUILT_IN = [one for one in DOCUMENTS if "coreos" not in one["apiVersion"]]


def of_kind(kind: str) -> dict[str, Any]:
    (found,) = [document for document in DOCUMENTS if document["kind"] == kind]
    return dict(found)


@pytest.fixture
def container() -> dict[str, Any]:
    (one,) = of_kind("Deployment")["spec"]["template"]["spec"]["containers"]
    return dict(one)


@pytest.mark.parametrize("document", BUILT_IN, ids=lambda one: one["kind"])
def test_kubernetes_takes_it(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, "1.30", strict=True)


def test_all_select_the_pods_of_the_deployment() -> None:
    labels = of_kind("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert of_kind("Service")["spec"]["selector"] == labels
    for kind in ("Deployment", "PodMonitor", "PodDisruptionBudget"):
        assert of_kind(kind)["spec"]["selector"]["matchLabels"] == labels


def test_ports_are_named_alike(container: dict[str, Any]) -> None:
    (port,) = container["ports"]
    assert of_kind("Service")["spec"]["ports"][0]["targetPort"] == port["name"]
    assert of_kind("PodMonitor")["spec"]["podMetricsEndpoints"][0]["port"] == port["name"]
    assert {"name": "PORT", "value": str(port["containerPort"])} in container["env"]


def test_probes_ask_open_routes(container: dict[str, Any]) -> None:
    paths = {route.path for route in ROUTES if route.method == "GET" and route.operation.is_open}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in paths
    assert of_kind("PodMonitor")["spec"]["podMetricsEndpoints"][0]["path"] in paths


def test_variables_are_flags(container: dict[str, Any]) -> None:
    known = {item.name.upper() for item, _ in flags()} | {"HF_TOKEN"}
    assert {one["name"] for one in container["env"]} <= known


def test_a_drain_ends_before_the_pod_is_killed(container: dict[str, Any]) -> None:
    drain_s = next(item.default for item, _ in flags() if item.name.startswith("graceful"))
    sleep_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    pod = of_kind("Deployment")["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > drain_s + sleep_s


def test_the_autoscaler_reads_a_metric_that_exists() -> None:
    (metric,) = of_kind("HorizontalPodAutoscaler")["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert f"\n{name} 0" in Metrics().render()
    rule = yaml.safe_load((FOLDER / "prometheus-adapter.yaml").read_text())["rules"]["custom"][0]
    assert rule["seriesQuery"].startswith(name)


def test_every_mount_has_its_volume(container: dict[str, Any]) -> None:
    volumes = of_kind("Deployment")["spec"]["template"]["spec"]["volumes"]
    assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in volumes}
