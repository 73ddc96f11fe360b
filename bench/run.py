"""What a run was taken on: machine, versions, the servers' settings."""

from __future__ import annotations

import platform
import statistics
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version

from bench.figures import Run
from coupon_svc.dev.servers import EmbeddedPostgres, postgres_binary, valkey_binary
from coupon_svc.http.server import SERVER_SETTINGS
from coupon_svc.load.processes import machine

_PACKAGES = ("uvicorn", "uvloop", "httptools", "starlette", "msgspec", "asyncpg", "hiredis")


def describe_run(command: str, settings: dict[str, str], load_shares: Sequence[float]) -> Run:
    """Now and here. `load_shares` are parts of a core, one a turn."""
    here = {name: str(value) for name, value in machine().items()}
    servers = {"Valkey": _said(valkey_binary()), "Postgres": _said(postgres_binary("postgres"))}
    packages = {name: version(name) for name in _PACKAGES}
    uvicorn_settings = ", ".join(f"{name}={value}" for name, value in SERVER_SETTINGS.items())
    return Run(
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        command=command,
        machine={"processor": here["processor"], "cores": here["processors"], "system": here["system"]},
        versions={"Python": platform.python_version(), **servers, **packages},
        settings={
            "uvicorn": uvicorn_settings,
            "Valkey": "appendonly yes, appendfsync everysec",
            "Postgres": ", ".join(
                setting for setting in EmbeddedPostgres.settings if not setting.startswith(("listen", "unix"))
            ),
            **settings,
        },
        load_share=(statistics.median(load_shares), max(load_shares)) if load_shares else (0.0, 0.0),
    )


def _said(binary: object) -> str:
    """The version that a server's binary says it has."""
    said = subprocess.run([str(binary), "--version"], capture_output=True, text=True, check=True).stdout
    words = said.replace("v=", "").split()
    return next(word for word in words if word[:1].isdigit())
