"""What is to be done: the settings of one load, checked before anything is started."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from coupon_svc.domain.errors import CouponError

CODES = 120_000
"""Over all books, unless --codes says otherwise: more than one API process deals in ten seconds."""
_BOOKS = {"flash-sale": 1, "checkout": 4, "retries": 4, "mixed": 20, "campaign": 1}
SCENARIOS = tuple(_BOOKS)
LIST_SECONDS = 600.0
"""How long a campaign with a list of users may take, unless --duration says otherwise."""
_CODES_MAX = 10_000_000


class LoadError(CouponError):
    """The load cannot be run; the message says why and what to do."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of one load. `rate` None: closed loop, in which each of `connections` asks again once it was answered."""

    scenario: str
    url: str | None = None
    rate: float | None = None
    connections: int
    duration_s: float
    ack: str
    books: int
    codes: int
    """of each book"""
    seed: int
    workers: int = 1
    users: tuple[str, ...] | None = None
    audit_stores: bool = False


def make_plan(
    *,
    scenario: str = "flash-sale",
    url: str | None = None,
    rate: float | None = None,
    connections: int | None = None,
    duration_s: float | None = None,
    ack: str = "ledger",
    books: int | None = None,
    codes: int | None = None,
    seed: int = 1,
    workers: int | None = None,
    users: Path | None = None,
    audit_stores: bool = False,
) -> Plan:
    """A plan with what was not given filled in. Raises LoadError for what cannot be done."""
    if url is not None:
        _check_url(url)
    elif audit_stores:
        raise LoadError("--audit-stores goes with --url; without it the load's own servers are audited in any case")
    if workers is not None and url is not None:
        raise LoadError("--workers is for the load's own service; the one at --url has as many as it has")
    listed = _read_users(users) if users is not None else None
    if listed is not None and scenario != "campaign":
        raise LoadError(f"--users is for the campaign scenario, not for {scenario}; add --scenario campaign")
    number = books or _BOOKS[scenario]
    each = codes or (-(-len(listed) // number) if listed else max(1, CODES // number))
    if number * each > _CODES_MAX:
        raise LoadError(f"{number} books of {each} codes are too many; at most {_CODES_MAX} codes in all")
    if listed and len(listed) > number * each:
        raise LoadError(f"{len(listed)} users want a code and there are {number * each}; give more --codes")
    return Plan(
        scenario=scenario,
        url=url.rstrip("/") if url else None,
        rate=rate,
        connections=connections or (256 if rate else 64),
        duration_s=duration_s or (LIST_SECONDS if listed else 10.0),
        ack=ack,
        books=number,
        codes=each,
        seed=seed,
        workers=workers or 1,
        users=listed,
        audit_stores=audit_stores,
    )


def _check_url(url: str) -> None:
    """Raises LoadError for what is no address of a service. A password in it is not repeated."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  # raises when it is no number
    except ValueError as error:
        raise LoadError(f"--url is no address: {error}") from None
    if parts.username or parts.password:
        raise LoadError(
            "--url must hold no user and no password: they would stand in the report; the key goes to --key"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
        raise LoadError("--url is the service's root, as in http://127.0.0.1:8080")


def _read_users(path: Path) -> tuple[str, ...]:
    """The users of a file, one a line, each once. Raises LoadError."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise LoadError(f"cannot read the users of {path}: {why}") from None
    users = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not users:
        raise LoadError(f"{path} names no users; it should hold one user id a line")
    for user in users:
        if len(user) > 128 or not user.isprintable():
            raise LoadError(f"{path} holds what is no user id: 1..128 characters, no control characters")
    return users
