"""Dockerfile, compose file and what they carry: valid, and in step with one another."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import compose_spec
import dockerfile
import pytest
import yaml

from kagami_launcher.cli import flags

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
COLLECTOR = yaml.safe_load((DEPLOY / "otel-collector.yaml").read_text())


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cuda.yaml"])
def test_the_compose_specification_takes_it(name: str) -> None:
    merged = yaml.safe_load((DEPLOY / name).read_text())  # the library knows no merge keys
    assert compose_spec.PyCompose.from_json(json.dumps(merged)).services


def test_every_image_has_a_version() -> None:
    for service in COMPOSE["services"].values():
        assert re.search(r":v?[\w.]+$", service["image"])
        assert not service["image"].endswith(":latest")


def test_every_file_that_is_mounted_is_there() -> None:
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (DEPLOY / source).exists(), source


def test_the_server_gets_flags_of_ours() -> None:
    known = {item.name.upper() for item, _ in flags()} | {"HF_TOKEN"}
    assert set(COMPOSE["services"]["kagami"]["environment"]) <= known


def test_traces_and_metrics_go_where_somebody_listens() -> None:
    server = COMPOSE["services"]["kagami"]
    assert server["environment"]["OTLP_ENDPOINT"] == "http://otel-collector:4317"
    assert COLLECTOR["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"].endswith(":4317")
    scrapes = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    (target,) = scrapes["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target == f"kagami:{server['environment']['PORT']}"


def test_the_collectors_pipelines_use_what_is_declared() -> None:
    service = COLLECTOR["service"]
    for pipeline in service["pipelines"].values():
        for kind, names in pipeline.items():
            assert set(names) <= set(COLLECTOR[kind])
    assert set(service["extensions"]) <= set(COLLECTOR["extensions"])


def test_the_image_copies_what_is_there() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for command in dockerfile.parse_file(str(DEPLOY / "Dockerfile")):
        if command.cmd.upper() == "COPY" and not command.flags:
            for source in command.value[:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source.removesuffix('/')}" in ignored, source


def test_the_image_runs_as_nobody_special() -> None:
    commands = dockerfile.parse_file(str(DEPLOY / "Dockerfile"))
    users = [command.value[0] for command in commands if command.cmd.upper() == "USER"]
    assert users[-1].split(":")[0] not in ("0", "root")


def test_the_dashboard_is_what_its_table_makes(tmp_path: Path) -> None:
    made = runpy.run_path(str(DEPLOY / "grafana" / "make_dashboard.py"))
    assert made["text"]() == (DEPLOY / "grafana" / "dashboard.json").read_text()


def panels() -> list[dict[str, Any]]:
    document = yaml.safe_load((DEPLOY / "grafana" / "dashboard.json").read_text())
    found: list[dict[str, Any]] = []
    for panel in document["panels"]:
        found += [panel, *panel.get("panels", ())]
    return found


def test_no_two_panels_share_an_id_or_a_place() -> None:
    ids = [panel["id"] for panel in panels()]
    assert len(ids) == len(set(ids))
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels() if p["type"] != "row"]
    assert len(places) == len(set(places))
