"""Arrays of a commit travel as texts: PostgreSQL must read what was written, whatever stands in it."""

from __future__ import annotations

import random

import pytest

from coupon_svc.postgres.database import open_connection
from coupon_svc.postgres.events import array_literal

NASTY = [
    "",
    "NULL",
    "null",
    '"',
    "\\",
    '\\"',
    "{",
    "}",
    ",",
    '","',
    " a ",
    "\n",
    "\t",
    "ä",
    "💶",
    "{}",
    "a\\",
    '""',
    None,
]


async def test_postgres_reads_the_texts_that_were_written(postgres_url: str) -> None:
    draw = random.Random(7)
    alphabet = [*'",\\{}N ULa\n', "é"]
    cases: list[list[str | None]] = [[], ["plain", "texts"], *([one] for one in NASTY), NASTY]
    cases += [["".join(draw.choices(alphabet, k=draw.randrange(6))) for _ in range(4)] for _ in range(300)]
    connection = await open_connection(postgres_url, "tests")
    try:
        for values in cases:
            assert await connection.fetchval("SELECT $1::text::text[]", array_literal("text", values)) == values
    finally:
        await connection.close()


@pytest.mark.parametrize(
    ("kind", "values"), [("bigint", [0, 1, 2**63 - 1]), ("int", [2**31 - 1]), ("boolean", [True, False]), ("int", [])]
)
async def test_postgres_reads_the_numbers_that_were_written(postgres_url: str, kind: str, values: list[object]) -> None:
    connection = await open_connection(postgres_url, "tests")
    try:
        assert await connection.fetchval(f"SELECT $1::text::{kind}[]", array_literal(kind, values)) == values
    finally:
        await connection.close()
