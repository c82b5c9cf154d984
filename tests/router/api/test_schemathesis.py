"""Requests that our OpenAPI document allows, and some that it does not, from schemathesis."""

import asyncio
import sys
from pathlib import Path

import pytest
from tests.fakes.fake_server import serving

from kagami_router.api.routes import ROUTES

pytestmark = pytest.mark.slow

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_schema_conformance,allow_header_conformance"
)


async def test_every_answer_fits_the_document(tmp_path: Path) -> None:
    async with serving(max_concurrent_requests=64) as server:
        process = await asyncio.create_subprocess_exec(
            str(Path(sys.executable).with_name("schemathesis")),
            *("run", f"{server.url}/api-doc/openapi.json"),
            *("--checks", CHECKS, "--phases", "examples,coverage,fuzzing"),
            *("--max-examples", "20", "--seed", "1", "--no-color"),
            *("--request-timeout", "10", "--continue-on-failure"),
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            async with asyncio.timeout(120):
                output, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
        report = output.decode()
        assert process.returncode == 0, report[-8000:]
        # schemathesis skips only one operation: the document itself.
        assert f"Tested: {len(ROUTES) - 1}" in report
        assert server.loop.num_open == 0
