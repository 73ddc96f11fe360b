"""A receipt proves what it was made for, and nothing else."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coupon_svc.domain.position import Epoch, Position, Seq
from coupon_svc.domain.receipts import Receipt, check_receipt, make_receipt

SECRET = bytes(range(32))
RECEIPT = Receipt("ann of Kent", Position.parse("4-17"), 1_795_357_061_878)
users = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)
numbers = st.integers(1, 2**53)
positions = st.builds(Position, numbers.map(Epoch), numbers.map(Seq))


@given(st.builds(Receipt, users, positions, numbers))
def test_a_receipt_comes_back_from_its_text(receipt: Receipt) -> None:
    text = make_receipt(SECRET, 7, "bk_00book", "SAVE-10", receipt)
    assert re.fullmatch(r"rc_[A-Za-z0-9_=-]+", text), "it is safe in a URL"
    assert check_receipt(SECRET, 7, "bk_00book", "SAVE-10", text) == receipt


@pytest.mark.parametrize(
    ("secret", "tenant_id", "book_id", "code"),
    [
        (bytes(32), 7, "bk_00book", "SAVE-10"),
        (SECRET, 8, "bk_00book", "SAVE-10"),
        (SECRET, 7, "bk_01book", "SAVE-10"),
        (SECRET, 7, "bk_00book", "SAVE-11"),
    ],
)
def test_a_receipt_is_of_one_installation_tenant_book_and_code(
    secret: bytes, tenant_id: int, book_id: str, code: str
) -> None:
    text = make_receipt(SECRET, 7, "bk_00book", "SAVE-10", RECEIPT)
    assert check_receipt(secret, tenant_id, book_id, code, text) is None


@given(st.integers(3, 60), st.sampled_from("AZaz09_-"))
def test_a_receipt_with_another_character_proves_nothing(at: int, char: str) -> None:
    text = make_receipt(SECRET, 7, "bk_00book", "SAVE-10", RECEIPT)
    forged = text[:at] + char + text[at + 1 :]
    assert check_receipt(SECRET, 7, "bk_00book", "SAVE-10", forged) == (RECEIPT if forged == text else None)


@given(st.text(max_size=80))
def test_any_other_text_proves_nothing(text: str) -> None:
    assert check_receipt(SECRET, 7, "bk_00book", "SAVE-10", text) is None
    assert check_receipt(SECRET, 7, "bk_00book", "SAVE-10", "rc_" + text) is None
