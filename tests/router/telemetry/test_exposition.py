"""/metrics of a whole router, as Prometheus' own tool reads it."""

import asyncio
import shutil
from pathlib import Path

import pytest
from aiohttp import ClientSession
from tests.fakes.fake_shard import FakeShard
from tests.router.telemetry.test_metrics import TGI, families
from tests.router.test_app import args_for, folder, running, until

__all__ = ["folder"]  # a fixture

NO_SUFFIX = 'counter metrics should have "_total" suffix'
HISTOGRAMS_SUFFIX = 'non-histogram and non-summary metrics should not have "_count" suffix'
# What the linter says of names that TGI has given; it has nothing to say of ours.
HINTS = {
    "tgi_request_count": [NO_SUFFIX, HISTOGRAMS_SUFFIX],
    "tgi_request_success": [NO_SUFFIX],
    "tgi_request_failure": [NO_SUFFIX],
    "tgi_batch_concat": [NO_SUFFIX],
    "tgi_batch_inference_count": [NO_SUFFIX, HISTOGRAMS_SUFFIX],
    "tgi_batch_inference_success": [NO_SUFFIX],
    "tgi_batch_inference_failure": [NO_SUFFIX],
}


async def scrape(http: ClientSession) -> str:
    async with http.get("/metrics") as response:
        assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        return await response.text()


async def generate(http: ClientSession) -> None:
    body = {"inputs": "abcdefgh" * 4, "parameters": {"max_new_tokens": 5}}
    async with http.post("/generate", json=body) as response:
        await response.read()


async def lint(text: str) -> dict[str, list[str]]:
    """What `promtool check metrics` says, by name."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool (Debian's package prometheus) is not installed")
    check = await asyncio.create_subprocess_exec(
        promtool,
        *("check", "metrics"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await check.communicate(text.encode())
    found: dict[str, list[str]] = {}
    for line in said.decode().splitlines():
        name, _, hint = line.partition(" ")
        found.setdefault(name, []).append(hint)
    return found


async def test_promtool_finds_nothing_wrong_after_traffic_but_tgis_names(folder: Path) -> None:
    async with FakeShard(f"{folder}/shard-0"), running(args_for(folder)) as (http, _, _):
        await until(http, 200)
        await asyncio.gather(*(generate(http) for _ in range(3)))
        await http.post("/generate", json={})
        text = await scrape(http)
    assert await lint(text) == HINTS
    assert HINTS.keys() <= TGI.keys()


async def test_while_the_model_loads_every_metric_is_there(folder: Path) -> None:
    async with running(args_for(folder)) as (http, _, _):
        await until(http, 503)
        loading = families(await scrape(http))
        async with FakeShard(f"{folder}/shard-0"):
            await until(http, 200)
            await generate(http)
            assert families(await scrape(http)) == loading


async def test_what_a_router_does_is_in_its_metrics(folder: Path) -> None:
    async with FakeShard(f"{folder}/shard-0"), running(args_for(folder)) as (http, _, _):
        await until(http, 200)
        await generate(http)
        await generate(http)
        lines = (await scrape(http)).splitlines()
    assert "tgi_request_success 2" in lines
    assert "tgi_generated_tokens_total 10" in lines
    assert 'tgi_prompt_tokens_total{source="computed"} 34' in lines
    assert 'tgi_prompt_tokens_total{source="cached"} 32' in lines
    assert 'tgi_batch_inference_success{method="decode"} 8' in lines
    assert "tgi_kv_blocks_capacity 63" in lines
    assert "tgi_kv_blocks_used 0" in lines
    assert "tgi_memory_bandwidth_bytes_per_second 10000000000" in lines
    (share,) = [line for line in lines if line.startswith("tgi_memory_bandwidth_used_ratio ")]
    assert float(share.split()[1]) == pytest.approx(0.1, rel=0.01)  # 1 MB in 1 ms of 10 GB/s
