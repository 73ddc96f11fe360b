"""How the API is served: uvicorn, whose own refusals are problems, too."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from coupon_svc.api.problems import bad_request

SERVER_SETTINGS: dict[str, Any] = {
    "loop": "uvloop",
    "access_log": False,  # it would print codes
    "log_config": None,
    "server_header": False,
    "proxy_headers": False,  # nothing here depends on the caller's address
    "timeout_graceful_shutdown": 5,
}


class ProblemProtocol(HttpToolsProtocol):
    """HTTP/1.1; what is no valid HTTP is refused as a problem, and the connection closed."""

    def send_400_response(self, msg: str) -> None:
        body = bad_request()
        head = (
            "HTTP/1.1 400 Bad Request\r\nContent-Type: application/problem+json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
