"""What Redis is rebuilt from: a book's coupons, and the events of a day that carry an Idempotency-Key. Only reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import asyncpg

from coupon_svc.domain.events import Entry, Event, MalformedEntry, events_of
from coupon_svc.domain.position import Epoch, Position, Seq
from coupon_svc.postgres.entries import ENTRIES_PAGE
from coupon_svc.postgres.marks import Mark

PAGE = 5_000
"""Rows per statement of what Redis is rebuilt from."""
EVENTS_PAGE = 20_000
# By position alone, however few of them count: so each page is read in the same time. The page's last position comes with
# it, in a row of nulls where none of its events counts.
_OLD_IDEMPOTENT_EVENTS = """
    WITH page AS MATERIALIZED (
        SELECT event, book_id, epoch, seq, code, user_id, at_ms, uses, idem, fingerprint FROM old_events
        WHERE shard = $1 AND (epoch, seq) > ($2, $3) ORDER BY epoch, seq LIMIT $5)
    SELECT page.*, last.epoch AS last_epoch, last.seq AS last_seq
    FROM (SELECT epoch, seq FROM page ORDER BY epoch DESC, seq DESC LIMIT 1) last
    LEFT JOIN page ON idem IS NOT NULL AND at_ms > $4
    ORDER BY page.epoch, page.seq
"""
# By position alone, as before; bodies only of those in which a key is looked for.
_KEYED_ENTRIES = f"""
    SELECT {", ".join(Entry._fields[:-1])}, CASE WHEN keyed AND at_ms > $5 THEN events END AS body FROM entries
    WHERE shard = $1 AND (epoch, seq) > ($2, $3) ORDER BY epoch, seq LIMIT $4
"""
_DEAD_LETTERS_BEHIND = "SELECT epoch, seq FROM dead_letters WHERE shard = $1 AND (epoch, seq) > ($2, $3)"
# What came late stands at an old position, whenever it was decided.
_LATE_IDEMPOTENT_EVENTS = """
    SELECT event, book_id, epoch, seq, code, user_id, at_ms, uses, idem, fingerprint FROM late_events
    WHERE shard = $1 AND recorded AND (epoch, seq) <= ($2, $3) AND idem IS NOT NULL AND at_ms > $4 ORDER BY epoch, seq
"""
_COUPONS = """
    SELECT code, user_id, assigned_at_ms, uses, epoch, seq FROM coupons
    WHERE book_id = $1 AND code > $2 ORDER BY code LIMIT $3
"""
_COUPONS_NAMED = "SELECT code, assigned_at_ms, epoch, seq FROM coupons WHERE book_id = $1 AND code = ANY ($2)"


async def coupons_named(
    connection: asyncpg.Connection, book_id: str, codes: Sequence[str]
) -> dict[str, tuple[Position, int]]:
    """By code: where each of these coupons was assigned, and when in Unix milliseconds."""
    rows = await connection.fetch(_COUPONS_NAMED, book_id, codes)
    return {row["code"]: (Position(Epoch(row["epoch"]), Seq(row["seq"])), row["assigned_at_ms"]) for row in rows}


async def coupons_of_book(connection: asyncpg.Connection, book_id: str, after: str = "") -> list[asyncpg.Record]:
    """The next PAGE coupons of a book behind a code: code, user_id, assigned_at_ms, uses, epoch, seq."""
    return list(await connection.fetch(_COUPONS, book_id, after, PAGE))


class EventsPage(NamedTuple):
    """Events that carry an Idempotency-Key, and up to which position that is all of them; None at the end."""

    events: list[Event]
    upto: Mark | None


async def late_idempotent_events(connection: asyncpg.Connection, shard: int, upto: Mark, since_ms: int) -> list[Event]:
    """Events up to a position that came late and carry an Idempotency-Key, oldest first."""
    return [_event(row) for row in await connection.fetch(_LATE_IDEMPOTENT_EVENTS, shard, *upto, since_ms)]


async def old_idempotent_events(connection: asyncpg.Connection, shard: int, after: Mark, since_ms: int) -> EventsPage:
    """As `idempotent_events`, of those that older versions wrote. They all stand before the first entry."""
    rows = await connection.fetch(_OLD_IDEMPOTENT_EVENTS, shard, *after, since_ms, EVENTS_PAGE)
    if not rows:
        return EventsPage([], None)
    events = [_event(row) for row in rows if row["idem"] is not None]
    return EventsPage(events, Mark(rows[0]["last_epoch"], rows[0]["last_seq"]))


async def idempotent_events(connection: asyncpg.Connection, shard: int, after: Mark, since_ms: int) -> EventsPage:
    """Events of a shard behind a position that carry an Idempotency-Key and are younger than `since_ms`, a page of them.

    Oldest first: of two with the same key (the first was lost for a while) the later one is what the key answers.
    """
    rows = await connection.fetch(_KEYED_ENTRIES, shard, *after, ENTRIES_PAGE, since_ms)
    if not rows:
        return EventsPage([], None)
    dead = await connection.fetch(_DEAD_LETTERS_BEHIND, shard, *after)
    passed_over = {(row["epoch"], row["seq"]) for row in dead}
    events = [
        event
        for row in rows
        if row["body"] is not None
        for event in _readable(Entry(*row))
        if event.idem is not None and event.position not in passed_over
    ]
    return EventsPage(events, Mark(rows[-1]["epoch"], rows[-1]["seq"]))


def _readable(entry: Entry) -> list[Event]:
    try:
        return events_of(entry)
    except MalformedEntry:
        return []


def _event(row: asyncpg.Record) -> Event:
    return Event(
        row["epoch"], row["seq"], row["event"], row["book_id"], row["code"], row["user_id"], row["at_ms"], row["uses"],
        idem=row["idem"], fingerprint=row["fingerprint"],
    )  # fmt: skip
