"""Parameters that all of OpenAI's routes read in the same way."""

from typing import Any

import pytest
from tests.fakes.fake_server import serving
from tests.router.api.openai.test_chat import hi_loop

from kagami_router.api.answering.openai_params import seed_of

ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    "/v1/completions": {"prompt": "a"},
    "/v1/responses": {"input": "a"},
}
SIGNED = [
    (0, 0),
    (-1, 2**64 - 1),
    (-(2**63), 2**63),
    (2**63 - 1, 2**63 - 1),
    (2**64 - 1, 2**64 - 1),
]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(("given", "used"), SIGNED)
async def test_a_seed_may_be_signed(path: str, given: int, used: int) -> None:
    body = {"model": "m", "max_tokens": 5, "seed": given} | ROUTES[path]
    async with serving(hi_loop()) as server, server.post(path, body) as response:
        assert response.status == 200, await response.text()
        assert [request.sampling.seed for request in server.loop.requests] == [used]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("given", [-(2**63) - 1, 2**64, -(10**30), 10**30, 1.5, "1"])
async def test_other_seeds_are_refused_by_name(path: str, given: object) -> None:
    body = {"model": "m", "seed": given} | ROUTES[path]
    async with serving() as server, server.post(path, body) as response:
        assert response.status == 422
        assert "seed" in (await response.json())["error"]["message"]


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_native_seeds_stay_unsigned(path: str) -> None:
    body = {"inputs": "a", "parameters": {"seed": -1}}
    async with serving() as server, server.post(path, body) as response:
        assert response.status == 422
        assert "parameters.seed" in (await response.json())["error"]


def test_no_seed_stays_none() -> None:
    assert seed_of(None) is None
