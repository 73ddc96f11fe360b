"""Every setting of the service, read once from the environment and handed on. `docs/deployment.md` explains each."""

from __future__ import annotations

import os
from collections.abc import Mapping
from urllib.parse import urlsplit

import msgspec

from coupon_svc.domain.errors import CouponError
from coupon_svc.domain.master_key import NO_MASTER_KEY, InvalidMasterKey, MasterKeys


class SettingsError(CouponError):
    """A setting is missing or out of bounds; the message names the variable and says what to do."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of one process. Times are whole milliseconds, as everywhere inside the service."""

    redis_url: str
    database_url: str
    shards: int = 16
    host: str = "127.0.0.1"
    port: int = 8080
    workers: int = 1
    backlog_events_max: int = 1_000_000
    """Events a shard may hold that the ledger has not: beyond it assigns and locks are refused."""
    ledger_wait_ms: int = 5_000
    """How long an answer waits for the ledger before it is `outcome_unknown`."""
    head_timeout_ms: int = 10_000
    """How long a caller may take for a request line and its headers."""
    body_timeout_ms: int = 30_000
    """In each such time a body must end, or come at `body_bytes_per_s_min`."""
    body_bytes_per_s_min: int = 4_096
    keep_alive_ms: int = 620_000
    """How long a connection may be idle: longer than any load balancer in front keeps it, or it meets a closed one."""
    connections_max: int = 10_000
    """Connections of callers per API process: beyond it requests are refused with `too_many_connections`."""
    requests_per_s: int = 0
    """Requests per second of one tenant that an API process serves; 0: no limit."""
    unknown_codes_per_s: int = 500
    """Codes per second that do not exist and that one tenant may name to an API process."""
    drain_ms: int = 0
    """How long `/readyz` is 503 after SIGTERM before the process stops serving."""
    key_cache_ms: int = 5_000
    """How long a process trusts what it knows of an API key: a revoked key is refused everywhere after this."""
    lease_codes_min: int = 5_000
    """How many codes of a book Redis is lent at a time; grows with demand up to `lease_codes_max`."""
    lease_codes_max: int = 100_000
    master_key: MasterKeys = NO_MASTER_KEY
    """Under which the keys of computed codes are kept; none: generated codes are stored."""


MASTER_KEY = "COUPON_MASTER_KEY"
_BOUNDS = {
    "shards": (1, 99),
    "port": (0, 65_535),
    "workers": (1, 64),
    "backlog_events_max": (1, 1_000_000_000),
    "ledger_wait_ms": (100, 60_000),
    "head_timeout_ms": (100, 600_000),
    "body_timeout_ms": (100, 600_000),
    "body_bytes_per_s_min": (1, 1_000_000),
    "keep_alive_ms": (100, 86_400_000),
    "connections_max": (10, 1_000_000),
    "requests_per_s": (0, 1_000_000),
    "unknown_codes_per_s": (1, 1_000_000),
    "drain_ms": (0, 600_000),
    "key_cache_ms": (0, 600_000),
    "lease_codes_min": (1, 100_000),
    "lease_codes_max": (1, 1_000_000),
}


def variable(name: str) -> str:
    """The environment variable of a setting: `redis_url` is read from `COUPON_REDIS_URL`."""
    return f"COUPON_{name.upper()}"


def load_settings(environ: Mapping[str, str] | None = None, **overrides: object) -> Settings:
    """Settings from `environ` (the process's own unless given), then `overrides` that are not None.

    Raises SettingsError for a missing URL, a text that is not a number, or a number out of bounds.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, object] = {}
    try:
        values["master_key"] = MasterKeys.parse(environ.get(MASTER_KEY, ""))
    except InvalidMasterKey as error:
        raise SettingsError(f"{MASTER_KEY} is not a master key: {error}.") from None
    for field in msgspec.structs.fields(Settings):
        if field.name in values:
            continue
        text = environ.get(variable(field.name), "").strip()
        given = overrides.get(field.name)
        if given is not None:
            values[field.name] = given
        elif text:
            values[field.name] = _parse(field.name, text) if field.name in _BOUNDS else text
        elif field.required:
            raise SettingsError(
                f"{variable(field.name)} is not set. Give the address of your server, e.g. "
                f"{_EXAMPLES[field.name]}; or run `coupon-svc dev`, which brings its own."
            )
    for name, (low, high) in _BOUNDS.items():
        number = values.get(name)
        if isinstance(number, int) and not low <= number <= high:
            raise SettingsError(f"{variable(name)} must be between {low} and {high}, not {number}.")
    for name in _SCHEMES:
        _check_url(name, str(values[name]))
    settings = Settings(**values)  # type: ignore[arg-type]  # names and types checked above
    if settings.lease_codes_min > settings.lease_codes_max:
        raise SettingsError("COUPON_LEASE_CODES_MIN must not be above COUPON_LEASE_CODES_MAX.")
    return settings


_EXAMPLES = {
    "redis_url": "redis://user:password@127.0.0.1:6379",
    "database_url": "postgresql://user:password@127.0.0.1:5432/coupons",
}


_SCHEMES = {"redis_url": ("redis", "rediss", "unix"), "database_url": ("postgresql", "postgres")}


def _check_url(name: str, url: str) -> None:
    """Raises SettingsError for what is no address; its text, which may hold a password, is not repeated."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  # raises when it is no number
        good = parts.scheme in _SCHEMES[name]
    except ValueError:
        good = False
    if not good:
        raise SettingsError(f"{variable(name)} is not a valid address; it should look like {_EXAMPLES[name]}")


def _parse(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise SettingsError(f"{variable(name)} must be a whole number, not {text!r}.") from None
