"""A shard's meta is read whatever is in it: what is missing or torn is None."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coupon_svc.redis.meta import META_FIELDS, meta_of, parse_meta

WHOLE = dict.fromkeys(META_FIELDS, "7") | {"recovery": "3-9"}
NUMBERS = ("epoch", "was", "generation", "seq", "committed", "backlog_max", "ledger_at_ms", "owner_at_ms")


def test_a_whole_meta_is_read() -> None:
    meta = meta_of(WHOLE)
    assert [getattr(meta, name) for name in NUMBERS] == [7] * len(NUMBERS)
    assert (meta.installation, meta.run_id, meta.replid) == ("7", "7", "7")
    assert (meta.recovery_epoch, meta.newest_epoch) == (9, 9)


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize("torn", ["x", "", "-1", "1.5", "٣", "9" * 16, "0x10", " 7", None])
def test_a_torn_number_is_none(field: str, torn: str | None) -> None:
    meta = meta_of(WHOLE | {field: torn})
    assert getattr(meta, field) is None
    assert [getattr(meta, name) for name in NUMBERS if name != field] == [7] * (len(NUMBERS) - 1)


@pytest.mark.parametrize("recovery", ["x", "3-x", "", None])
def test_a_torn_recovery_is_none(recovery: str | None) -> None:
    assert meta_of(WHOLE | {"recovery": recovery}).recovery_epoch is None


@given(st.dictionaries(st.sampled_from([*META_FIELDS, "recovery", "other"]), st.none() | st.text(max_size=20)))
def test_no_meta_is_an_error(fields: dict[str, str | None]) -> None:
    assert meta_of(fields).newest_epoch >= 0


def test_the_newest_epoch_is_the_newest_of_which_redis_knows() -> None:
    assert meta_of({}).newest_epoch == 0
    assert meta_of({"epoch": "4"}).newest_epoch == 4
    assert meta_of({"epoch": "doubt", "was": "5"}).newest_epoch == 5
    assert meta_of({"epoch": "4", "recovery": "2-6"}).newest_epoch == 6


def test_the_values_of_the_fields_are_a_meta() -> None:
    values = [str(number) for number, _ in enumerate(META_FIELDS)]
    assert parse_meta(values) == meta_of(dict(zip(META_FIELDS, values, strict=True)))
