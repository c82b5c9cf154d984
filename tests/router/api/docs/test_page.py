"""The docs page in a real browser that can load nothing from other hosts."""

import asyncio
import shutil
from pathlib import Path

import pytest
from tests.fakes.fake_server import serving

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium")
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    " --disable-background-networking --disable-component-update --disable-default-apps"
    " --virtual-time-budget=15000 --dump-dom"
).split()
# Requests of chromium itself resolve to no address.
NO_NAMES = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium; .ci/run installs it")
async def test_a_browser_shows_the_operations(tmp_path: Path) -> None:
    async with serving() as server:
        process = await asyncio.create_subprocess_exec(
            str(CHROMIUM),
            *QUIET,
            NO_NAMES,
            f"--user-data-dir={tmp_path}",
            f"{server.url}/docs/",
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            async with asyncio.timeout(60):
                page, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
    text = page.decode()
    assert "/v1/chat/completions" in text
    assert "One text for each instance" in text
