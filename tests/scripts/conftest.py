"""Every test of a script runs on a cluster, which refuses a script that touches two slots; in `make chaos` also on a plain
server, as all other tests have it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from coupon_svc.dev.servers import EmbeddedRedis
from coupon_svc.redis.scripts import Scripts
from tests.scripts.runner import Server, Shard


@pytest.fixture(scope="session", params=[pytest.param("plain_redis", marks=pytest.mark.chaos), "cluster_redis"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server with all scripts loaded."""
    embedded: EmbeddedRedis = request.getfixturevalue(request.param)
    with Server(embedded, Scripts()) as loaded:
        yield loaded


@pytest.fixture
def unopened(server: Server) -> Shard:
    """A shard nobody has certified yet: no key has its tag."""
    return Shard(server)


@pytest.fixture
def shard(unopened: Shard) -> Shard:
    """A shard that was certified, and whose ledger is at hand however slow the test is."""
    unopened.certify()
    return unopened
