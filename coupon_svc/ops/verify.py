"""`coupon-svc verify`: shows from Redis and Postgres alone that the promises hold, while the service runs."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import asyncpg
import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from coupon_svc.config import Settings
from coupon_svc.invariants.chains import Head
from coupon_svc.invariants.stores import Report, Verifier
from coupon_svc.postgres.database import PATIENT_S, open_connection
from coupon_svc.postgres.errors import LedgerUnavailable

SHOWN_MAX = 20


def read_heads(path: Path) -> dict[int, Head]:
    """The heads of an earlier report in JSON, by shard. Raises OSError; msgspec.DecodeError when it is no such report."""
    return {head.shard: head for head in msgspec.json.decode(path.read_bytes(), type=_Heads).heads}


class _Heads(msgspec.Struct):
    heads: list[Head]


def run_verify(settings: Settings, *, as_json: bool, heads: Path | None = None) -> int:
    """Print the report and return the exit status: 0 the promises hold, 1 they do not, 2 it could not be told.

    `heads` is an earlier report in JSON: the ledger's history must run through what it says of its heads.
    """
    try:
        earlier = read_heads(heads) if heads else {}
    except (OSError, msgspec.DecodeError) as error:
        print(f"coupon-svc verify: {heads} is no earlier report in JSON ({error}); nothing is shown.", file=sys.stderr)
        return 2

    async def run() -> Report:
        connection = await open_connection(settings.database_url, "coupon-verify", PATIENT_S)
        redis = Redis.from_url(settings.redis_url, decode_responses=True)
        try:
            show = sys.stderr.isatty()
            return await Verifier(settings, connection, redis, show_progress=show, earlier=earlier).verify()
        finally:
            await redis.aclose()
            connection.terminate()

    try:
        report = asyncio.run(run())
    except (LedgerUnavailable, asyncpg.PostgresError, asyncpg.InterfaceError, RedisError, OSError) as error:
        print(f"coupon-svc verify: a store cannot be read ({type(error).__name__}); nothing is shown.", file=sys.stderr)
        return 2
    if as_json:
        print(msgspec.json.encode({"holds": report.holds, **msgspec.structs.asdict(report)}).decode())
    else:
        _print(report)
    return 0 if report.holds else 1 if report.findings else 2


def _print(report: Report) -> None:
    print(
        f"{report.shards} shards, {report.books} books: {report.codes_held} codes held, {report.codes_free} free in Redis,"
        f" {report.under_way} were on their way to the ledger."
    )
    ends = [f"{head.position} {head.chain}" for head in report.heads if head.position]
    for end in ends:
        print(f"ends at      {end}")
    unhashed = sum(head.unhashed for head in report.heads)
    if unhashed:
        print(f"{unhashed} rows of the ledger are from before its hash chain; whether they were edited cannot be told.")
    if report.computed_books:
        print(f"The codes of {report.computed_books} books are computed.")
    if report.told_without_key:
        print(report.told_without_key)
    for text in report.unchecked:
        print(f"NOT CHECKED  {text}")
    for finding in report.findings[:SHOWN_MAX]:
        where = f"shard {finding.shard:02d}" + (f", book {finding.book_id}" if finding.book_id else "")
        print(f"BROKEN       {where}: {finding.what} ({finding.number})")
    if len(report.findings) > SHOWN_MAX:
        print(f"             and {len(report.findings) - SHOWN_MAX} more; see --json")
    print("The promises hold." if report.holds else "The promises are not shown to hold.")
