"""schemathesis reads the OpenAPI document, makes requests from it, valid and invalid ones, and holds the answers to it."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path

import pytest

from tests.harness import Stack

ROOT = Path(__file__).parents[2]
SEED = 8
"""The same requests in every run: of a failure there is never more than one to look for."""
TIMEOUT_S = 300
"""It takes some ten seconds; the rest is for a busy machine."""


@pytest.mark.parametrize(
    ("examples", "requests_min"), [(1, 300), pytest.param(8, 700, marks=pytest.mark.chaos)], ids=["few", "many"]
)
async def test_schemathesis_finds_nothing(service: Stack, tmp_path: Path, examples: int, requests_min: int) -> None:
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(ROOT / "tests/http/schemathesis.toml")),
        *("run", service.base_url + "/openapi.json", "--header", f"Authorization: Bearer {await service.key()}"),
        *("--checks", "all", "--phases", "examples,coverage,fuzzing,stateful", "--generation-database", "none"),
        *("--seed", str(SEED), "--max-examples", str(examples), "--continue-on-failure", "--no-color"),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "SCHEMATHESIS_HOOKS": "tests.http.schemathesis_hooks",
        "HYPOTHESIS_STORAGE_DIRECTORY": str(ROOT / ".hypothesis"),  # which keeps what it has read of all Unicode
    }
    process = await asyncio.create_subprocess_exec(
        *command, cwd=tmp_path, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    said = output.decode()
    assert process.returncode == 0, said
    generated = re.search(r"(\d+) generated, (\d+) passed", said)
    assert generated, said
    assert int(generated[1]) == int(generated[2]) >= requests_min, said
