"""Codes have one spelling, and a pattern makes nothing but codes."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coupon_svc.domain.codes import (
    ALPHABETS,
    CODE_LENGTH_MAX,
    CODE_LENGTH_MIN,
    Pattern,
    check_capacity,
    fits,
    normalise_code,
    normalise_prefix,
    parse_pattern,
    why_invalid,
    why_taken,
)
from coupon_svc.domain.errors import CouponError
from coupon_svc.domain.outcomes import Outcome, Refused

SYMBOLS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._~+@-"
pattern_texts = st.text(SYMBOLS + "#", min_size=CODE_LENGTH_MIN, max_size=CODE_LENGTH_MAX).filter(
    lambda text: text[0] == "#" or text[0].isalnum()
)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("SAVE10", "SAVE10"),
        ("  save10\t\n", "SAVE10"),
        ("a.b_c~d+e@f-g", "A.B_C~D+E@F-G"),
        ("9-9", "9-9"),
        ("x" * CODE_LENGTH_MAX, "X" * CODE_LENGTH_MAX),
    ],
)
def test_a_code_has_one_spelling(text: str, code: str) -> None:
    assert normalise_code(text) == code


@pytest.mark.parametrize(
    "text",
    ["", "AB", "X" * (CODE_LENGTH_MAX + 1), "-AB", "A B", "A/B", "A{B}", "straße", "ＡＢＣ", "AB\x00C", "ABC\u0130"],
)
def test_any_other_text_is_no_code(text: str) -> None:
    assert normalise_code(text) is None


@given(st.text(max_size=CODE_LENGTH_MAX + 2))
def test_a_text_is_a_code_or_there_is_a_reason_why_not(text: str) -> None:
    code = normalise_code(text)
    if code is None:
        assert why_invalid(text)
    else:
        assert normalise_code(code) == code
        assert re.fullmatch(r"[A-Z0-9][A-Z0-9._~+@-]{2,63}", code)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (" AB ", "it has 2 characters"),
        ("A" * 65, "it has 65 characters"),
        ("AB C", "character 3 is ' ' (U+0020)"),
        ("  aé-x", "character 2 is 'é' (U+00E9)"),
        ("AB\x07", "character 3 is U+0007;"),
        ("~AB", "character 1 is '~'; a code begins with a letter or a digit"),
    ],
)
def test_the_reason_names_the_character_and_where_it_is(text: str, reason: str) -> None:
    assert normalise_code(text) is None
    assert why_invalid(text).startswith(reason)


@given(pattern_texts, st.sampled_from(sorted(ALPHABETS)))
def test_what_a_pattern_draws_are_codes_that_it_matches(text: str, alphabet: str) -> None:
    pattern = parse_pattern(text, alphabet)
    low, high = pattern.bounds
    codes = list(pattern.draw(5))
    assert len(codes) == 5
    for code in codes:
        assert normalise_code(code) == code
        assert re.fullmatch(pattern.regex, code)
        assert low <= code < high


def test_a_pattern_matches_nothing_else() -> None:
    pattern = parse_pattern("A.#+#", "digits")
    assert re.fullmatch(pattern.regex, "A.1+2")
    assert [text for text in ("AX1+2", "A.1+", "A.11+2", "A.B+2", "xA.1+2") if re.search(pattern.regex, text)] == []


def test_a_pattern_is_the_same_however_it_is_written() -> None:
    assert parse_pattern(" gift-## ", "CBA") == parse_pattern("GIFT-##", "abc") == Pattern("GIFT-##", "ABC")


def test_the_unambiguous_alphabet_has_no_symbol_that_is_read_as_another() -> None:
    assert not set("0O1ILU") & set(ALPHABETS["unambiguous"])
    assert all(len(set(symbols)) == len(symbols) for symbols in ALPHABETS.values())


@pytest.mark.parametrize("alphabet", ["", "A", "AA", "aA", "A B", "A#", "ÄÖ", "Digits!"])
def test_an_alphabet_has_two_or_more_different_symbols_of_codes(alphabet: str) -> None:
    with pytest.raises(CouponError):
        parse_pattern("GIFT-####", alphabet)


@pytest.mark.parametrize("text", ["", "##", "#" * 65, "GIFT ##", "-###", "GÏFT##", "GIFT/##"])
def test_a_pattern_makes_legal_codes_or_is_refused(text: str) -> None:
    with pytest.raises(CouponError):
        parse_pattern(text, "digits")


def test_a_pattern_that_may_begin_with_a_sign_is_refused() -> None:
    with pytest.raises(CouponError):
        parse_pattern("####", "AB-")
    assert parse_pattern("X###", "AB-").capacity == 27


def test_a_pattern_without_random_symbols_names_one_code() -> None:
    pattern = parse_pattern("WELCOME", "digits")
    assert pattern.capacity == 1
    assert list(pattern.draw(2)) == ["WELCOME", "WELCOME"]


def test_half_of_what_a_pattern_can_name_may_exist() -> None:
    pattern = parse_pattern("X##", "digits")
    assert pattern.capacity == 100
    assert fits(pattern, 50, 0)
    assert fits(pattern, 10, 40)
    assert not fits(pattern, 11, 40)
    check_capacity(pattern, 10, 40)
    with pytest.raises(Refused) as refused:
        check_capacity(pattern, 11, 40)
    assert refused.value.outcome is Outcome.PATTERN_CAPACITY


def test_random_bytes_that_would_favour_some_symbols_are_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 256 bytes 250 fall on ten digits alike; a use of the other six would make 0 to 5 more likely."""
    monkeypatch.setattr("os.urandom", lambda count: (bytes((253, 7)) * count)[:count])
    assert Counter("".join(parse_pattern("X####", "digits").draw(100))) == {"X": 100, "7": 400}


@pytest.mark.parametrize(
    ("text", "prefix"),
    [
        ("", ""),
        ("  ", ""),
        (" ab-", "AB-"),
        ("0" * 64, "0" * 64),
        ("0" * 65, None),
        ("-A", None),
        ("A B", None),
        ("ß", None),
        ("A\n", "A"),
    ],
)
def test_a_prefix_is_spelled_as_a_code_is(text: str, prefix: str | None) -> None:
    assert normalise_prefix(text) == prefix


def test_a_code_that_is_taken_names_the_book_that_has_it() -> None:
    assert why_taken("bk_1", "bk_1") == ("duplicate_in_book", "the book has it already")
    assert why_taken("bk_1", "bk_2") == ("duplicate_in_other_book", "bk_2")
