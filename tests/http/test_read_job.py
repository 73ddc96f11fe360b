"""GET /coupons/jobs/{job_id}."""

from __future__ import annotations

import httpx
import pytest

from tests.http.helpers import alike, refused


@pytest.mark.parametrize("job_id", ["job_none", "x", "%00", "1", "x" * 3000, "%F0%9F%8E%89"])
async def test_no_such_job_is_not_found(client: httpx.AsyncClient, job_id: str) -> None:
    missing = await client.get(f"/coupons/jobs/{job_id}")
    refused(missing, 404, "job_not_found")
    assert alike(missing, await client.get("/coupons/jobs/job_none"))
