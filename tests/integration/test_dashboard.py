"""Each query of dashboard and alerts, asked of a Prometheus that scrapes a real server."""

import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.integration.conftest import Server, free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("prometheus"), reason="is Debian's package prometheus"),
]

DEPLOY = Path(__file__).parents[2] / "deploy"
# What stays empty when nothing goes wrong and nothing is cached twice: a ratio with nothing below.
MAY_BE_EMPTY = re.compile(r"tgi_request_failure|tgi_batch_inference_failure|shard_restarts")


def queries() -> list[str]:
    """The dashboard's queries with their variables filled in, and the left sides of the alerts."""
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    panels = [each for panel in dashboard["panels"] for each in (panel, *panel.get("panels", ()))]
    found = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    rules = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
    found += [
        re.sub(r"\s[<>]\s[\d.]+\s*$", "", rule["expr"])
        for group in rules["groups"]
        for rule in group["rules"]
    ]
    fillings = {
        "$__rate_interval": "20s",
        "$instance": ".*",
        "$service": "kagami",
        "[10m]": "[20s]",
    }
    for mark, value in {**fillings, "[1m]": "[20s]", "[5m]": "[20s]"}.items():
        found = [query.replace(mark, value) for query in found]
    return list(dict.fromkeys(found))


def ask(port: int, query: str) -> list[dict[str, Any]]:
    """The answer's series; an error of PromQL is an error here."""
    url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    with urllib.request.urlopen(url, timeout=10) as answer:
        return list(json.load(answer)["data"]["result"])


def generate(server: Server, number: int) -> None:
    body = {"inputs": f"{number % 3} sea " * 40, "parameters": {"max_new_tokens": 8}}
    request = urllib.request.Request(
        f"{server.url}/generate", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=60).close()


@pytest.fixture(scope="module")
def prometheus(bf16_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Its port, after some traffic that it has seen begin and go on."""
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s"}
    config["rule_files"] = []
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [bf16_server.url[7:]]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    process = subprocess.Popen(
        [
            "prometheus",
            *(f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"),
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: counted(port) >= 0)
        with ThreadPoolExecutor(4) as clients:
            for _ in range(3):
                list(clients.map(generate, [bf16_server] * 8, range(8)))
                wait_for(lambda: counted(port) >= bf16_server.metric("tgi_request_success"))
        yield port
    finally:
        process.kill()
        process.wait()


def counted(port: int) -> float:
    """The requests that Prometheus has seen; below 0 until it has scraped the server."""
    with contextlib.suppress(OSError):
        for series in ask(port, "tgi_request_success"):
            return float(series["value"][1])
    return -1.0


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until, "Prometheus has not scraped the server"
        time.sleep(0.2)


def test_every_query_is_answered_with_numbers(prometheus: int) -> None:
    empty = [
        query
        for query in queries()
        if not ask(prometheus, query) and not MAY_BE_EMPTY.search(query)
    ]
    assert not empty
