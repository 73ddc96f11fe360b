"""What http/server.py takes from uvicorn beyond its documentation: names that another version may change.

If this fails after an update of uvicorn, read its httptools_impl.py beside http/server.py before moving the version here.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
from typing import Any

import uvicorn
from uvicorn.protocols.http import httptools_impl
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from coupon_svc.http import server
from coupon_svc.http.server import CouponProtocol

VERSION = "0.54.0"
PROTOCOL = {
    "app",
    "connections",
    "cycle",
    "expect_100_continue",
    "flow",
    "headers",
    "loop",
    "parser",
    "pipeline",
    "scope",
    "server_state",
    "tasks",
    "transport",
    "url",
}
"""Attributes of its protocol, some of them set by a parser callback or by connection_made."""
OVERRIDDEN = {
    "connection_lost",
    "connection_made",
    "data_received",
    "eof_received",
    "on_body",
    "on_headers_complete",
    "on_message_begin",
    "on_message_complete",
    "on_response_complete",
    "pause_writing",
    "send_400_response",
    "shutdown",
}
CYCLE = {
    "chunked_encoding",
    "default_headers",
    "disconnected",
    "expected_content_length",
    "keep_alive",
    "message_event",
    "more_body",
    "response_complete",
    "response_started",
    "send",
    "transport",
}
"""Attributes of a request's cycle; `_HotCycle` stands in for one."""
OUR_CYCLE = {"body", "driven", "endpoint", "headers", "path", "request_id"}
"""Attributes of `_HotCycle` alone."""
FLOW = {"pause_reading", "read_paused", "resume_reading", "write_paused"}
SERVER_STATE = {"default_headers", "total_requests"}


def attributes_of(*names: str) -> set[str]:
    """What http/server.py reads or sets of `names`, e.g. of `self` or `self.cycle`."""
    tree = ast.parse(inspect.getsource(server))
    return {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) in names
    }


def test_it_is_the_version_that_was_read() -> None:
    assert uvicorn.__version__ == VERSION


def test_the_protocol_has_what_is_used_of_it() -> None:
    protocol = _protocol(HttpToolsProtocol)
    protocol.url = b""  # from on_message_begin
    assert {name for name in PROTOCOL if not hasattr(protocol, name)} == set()
    assert {name for name in OVERRIDDEN if name not in vars(HttpToolsProtocol)} == set()
    assert "url" in inspect.getsource(HttpToolsProtocol.on_message_begin)
    assert isinstance(httptools_impl.STATUS_LINE[200], bytes)


def test_nothing_else_is_used_of_the_protocol() -> None:
    inherited = set(dir(_protocol(HttpToolsProtocol))) | {"url"}
    used = {name for name in vars(CouponProtocol) if not name.startswith("_")} | attributes_of("self")
    assert used & inherited == PROTOCOL | OVERRIDDEN


def test_the_cycle_the_flow_and_the_state_have_what_is_used_of_them() -> None:
    cycle = set(inspect.signature(RequestResponseCycle.__init__).parameters)
    cycle |= set(RequestResponseCycle.__init__.__code__.co_names) | set(vars(RequestResponseCycle))
    assert cycle >= CYCLE
    assert attributes_of("cycle", "self.cycle", "self._cycle") - OUR_CYCLE <= CYCLE
    assert {name for name in FLOW if not hasattr(FlowControl(None), name)} == set()  # type: ignore[arg-type]
    assert attributes_of("self.flow") == FLOW
    assert {name for name in SERVER_STATE if not hasattr(ServerState(), name)} == set()
    assert attributes_of("self.server_state") == SERVER_STATE


def _protocol(cls: type[HttpToolsProtocol]) -> Any:
    async def make() -> HttpToolsProtocol:
        config = uvicorn.Config(lambda scope: None, http="httptools", lifespan="off", log_config=None)
        return cls(config, ServerState(), {})

    return asyncio.run(make())
