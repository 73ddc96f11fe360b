"""Unit tests start nothing and call nobody: no server, no process, no socket."""

from __future__ import annotations

import socket
import subprocess
from typing import NoReturn

import pytest


def _no_server() -> NoReturn:
    pytest.fail("a unit test starts no server: it belongs beside the tests that do")


for _name in ("postgres_url", "plain_redis", "cluster_redis", "service", "make_stack"):
    globals()[_name] = pytest.fixture(name=_name, scope="session")(_no_server)


@pytest.fixture(autouse=True)
def _start_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a unit test starts no process and opens no connection")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "bind", refuse)
