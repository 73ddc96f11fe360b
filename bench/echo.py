"""The bare JSON echo that the service is measured against: Starlette under uvicorn as it comes, with our settings."""

from __future__ import annotations

import socket

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from coupon_svc.http.server import SERVER_SETTINGS


def echo_app() -> Starlette:
    """One route that answers with the JSON that it was sent."""

    async def echo(request: Request) -> JSONResponse:
        return JSONResponse(await request.json())

    return Starlette(routes=[Route("/echo", echo, methods=["POST"])])


def serve_echo(fd: int) -> None:
    """Serve the echo on a listening socket, until SIGTERM."""
    config = uvicorn.Config(echo_app, factory=True, http="httptools", **SERVER_SETTINGS)
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=fd)])
