"""The cipher behind computed codes: as its specification has it, a permutation, and without a trace of the number."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB
from hypothesis import given
from hypothesis import strategies as st

from coupon_svc.domain.codes import ALPHABETS, Pattern, parse_pattern
from coupon_svc.domain.computed import (
    TOTAL_MIN,
    PatternCipher,
    codes_beginning_with,
    count_beginning_with,
    may_compute,
    overlap,
    share_of_capacity,
)
from coupon_svc.domain.permutation import FF1
from coupon_svc.postgres.computed.ciphers import seal_of
from coupon_svc.postgres.computed.ranges import is_computed

NIST_KEY = bytes.fromhex("2B7E151628AED2A6ABF7158809CF4F3CEF4359D8D580AA4F7F036D6F04FC6A94")
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
OUR_KEY = bytes(range(32))
OUR_VECTORS = {
    ("SUMMER-####-####", "unambiguous"): ["SUMMER-S958-VWM8", "SUMMER-979S-NCFB", "SUMMER-QFX5-VE7W"],
    ("######", "digits"): ["920033", "288660", "811655"],
    ("A#######", "letters"): ["ABHZPZRD", "AZEFGVKY", "AKQPKAXJ"],
}
"""Codes of the numbers 0, 1, 2 under OUR_KEY. They stand in docs/codes.md: a change here changes codes that were printed."""


@pytest.mark.parametrize(
    ("radix", "tweak", "plain", "key_bytes", "cipher"),
    [
        (10, b"", "0123456789", 16, "2433477484"),
        (10, b"9876543210", "0123456789", 16, "6124200773"),
        (36, b"7777pqrs777", "0123456789abcdefghi", 16, "a9tv40mll9kdu509eum"),
        (10, b"", "0123456789", 24, "2830668132"),
        (10, b"9876543210", "0123456789", 24, "2496655549"),
        (36, b"7777pqrs777", "0123456789abcdefghi", 24, "xbj3kv35jrawxv32ysr"),
        (10, b"", "0123456789", 32, "6657667009"),
        (10, b"9876543210", "0123456789", 32, "1001623463"),
        (36, b"7777pqrs777", "0123456789abcdefghi", 32, "xs8a0azh2avyalyzuwd"),
    ],
)
def test_it_is_ff1_as_nist_publishes_it(radix: int, tweak: bytes, plain: str, key_bytes: int, cipher: str) -> None:
    permutation = FF1(NIST_KEY[:key_bytes], radix, len(plain), tweak)
    number = permutation.encrypt([int(plain, radix)])[0]
    assert _numerals(number, radix, len(plain)) == cipher
    assert permutation.decrypt([number]) == [int(plain, radix)]


@pytest.mark.parametrize(("pattern", "alphabet"), OUR_VECTORS)
def test_codes_are_those_that_were_published(pattern: str, alphabet: str) -> None:
    cipher = PatternCipher(parse_pattern(pattern, alphabet), OUR_KEY)
    assert cipher.codes(range(3)) == OUR_VECTORS[pattern, alphabet]


@given(
    symbols=st.sampled_from([*ALPHABETS.values(), "AB", "X7-"]),
    text=st.text("#X-", min_size=7, max_size=63).map(lambda rest: "A" + rest),
    key=st.binary(min_size=32, max_size=32),
    data=st.data(),
)
def test_every_number_comes_back_from_its_code(symbols: str, text: str, key: bytes, data: st.DataObject) -> None:
    pattern = parse_pattern(text, symbols)
    if not may_compute(pattern):
        return
    cipher = PatternCipher(pattern, key)
    numbers = data.draw(st.lists(st.integers(0, pattern.capacity - 1), min_size=1, max_size=20, unique=True))
    codes = cipher.codes(numbers)
    assert len(set(codes)) == len(numbers)
    assert cipher.numbers_of(codes) == dict(zip(codes, numbers, strict=True))


def first_codes(count: int) -> list[str]:
    """The codes of a small pattern, by number: there are a million."""
    cipher = PatternCipher(parse_pattern("######", "digits"), OUR_KEY)
    return [code for start in range(0, count, 1000) for code in cipher.codes(range(start, start + 1000))]


@pytest.fixture(scope="module")
def some_codes() -> list[str]:
    return first_codes(200_000)


def test_some_codes_of_a_pattern_have_one_number_each(some_codes: list[str]) -> None:
    assert len(some_codes) == len(set(some_codes)) == 200_000


@pytest.mark.chaos
def test_each_code_of_a_pattern_has_one_number() -> None:
    codes = first_codes(10**6)
    assert len(codes) == len(set(codes)) == 10**6


def test_the_first_codes_are_spread_evenly(some_codes: list[str]) -> None:
    codes = some_codes[:100_000]
    for at in range(6):
        assert _chi_square(Counter(code[at] for code in codes).values(), 10) < 40, f"position {at}"
    for one in range(6):
        for other in range(one + 1, 6):
            pairs = Counter(code[one] + code[other] for code in codes)
            assert _chi_square(pairs.values(), 100) < 180, f"positions {one} and {other}"


def test_neighbours_in_number_are_no_neighbours_as_codes(some_codes: list[str]) -> None:
    values = [int(code) for code in some_codes]
    steps = Counter((after - before) % 10**6 // 10**4 for before, after in itertools.pairwise(values))
    assert _chi_square(steps.values(), 100) < 180
    for at in range(6):
        pairs = Counter(before[at] + after[at] for before, after in itertools.pairwise(some_codes))
        assert _chi_square(pairs.values(), 100) < 180, f"position {at}"


def test_small_patterns_are_not_computed() -> None:
    assert not may_compute(parse_pattern("A#####", "digits"))
    assert may_compute(parse_pattern("A######", "digits"))
    with pytest.raises(ValueError, match="FF1"):
        PatternCipher(parse_pattern("A#####", "digits"), OUR_KEY)


@pytest.mark.parametrize(
    ("text", "total", "computed"),
    [("A######", TOTAL_MIN, True), ("A######", TOTAL_MIN - 1, False), ("A#####", TOTAL_MIN, False)],
)
def test_many_codes_of_a_large_pattern_are_computed(text: str, total: int, computed: bool) -> None:
    assert is_computed(parse_pattern(text, "digits"), total) is computed


@pytest.mark.parametrize(
    ("one", "other", "meet"),
    [
        (("A###", "digits"), ("A###", "digits"), True),
        (("A###", "digits"), ("####", "alphanumeric"), True),
        (("A###", "digits"), ("B###", "digits"), False),
        (("A###", "digits"), ("A##", "digits"), False),
        (("A#", "XY"), ("A#", "YZ"), True),
        (("A##", "letters"), ("A1#", "alphanumeric"), False),
        (("A#1", "digits"), ("A1#", "letters"), False),
    ],
)
def test_patterns_overlap_where_a_code_lies_in_both(one: tuple[str, str], other: tuple[str, str], meet: bool) -> None:
    a, b = (parse_pattern(text.ljust(3, "Q"), alphabet) for text, alphabet in (one, other))
    assert overlap(a, b) == overlap(b, a) == meet
    assert (share_of_capacity(a, b) > 0) == meet


def test_the_share_of_a_pattern_that_lies_in_another() -> None:
    assert share_of_capacity(parse_pattern("A###", "digits"), parse_pattern("####", "alphanumeric")) == (
        pytest.approx(1 / 36 * (10 / 36) ** 3)
    )


@pytest.mark.parametrize("prefix", ["", "A", "A1", "A10", "A10-", "A10-0", "A10-01", "B", "A2", "A10-011"])
def test_all_codes_that_begin_so_are_named(prefix: str) -> None:
    pattern = parse_pattern("A##-##", "01")
    codes = [f"A{a}{b}-{c}{d}" for a, b, c, d in itertools.product("01", repeat=4)]
    expected = [code for code in codes if code.startswith(prefix)]
    assert count_beginning_with(pattern, prefix) == len(expected)
    if expected:
        assert sorted(codes_beginning_with(pattern, prefix)) == expected


def _numerals(number: int, radix: int, length: int) -> str:
    text = ""
    for _ in range(length):
        number, digit = divmod(number, radix)
        text = DIGITS[digit] + text
    return text


def _chi_square(counts: Iterable[int], cells: int) -> float:
    """The sum over all cells. Of 9 degrees of freedom it is above 40 once in 100,000 times, of 99 above 180 once in
    1,000,000."""
    found = list(counts)
    expected = sum(found) / cells
    return sum((count - expected) ** 2 / expected for count in found) + (cells - len(found)) * expected


def _ff1_by_the_book(key: bytes, radix: int, length: int, number: int) -> int:
    """Algorithm 7 of SP 800-38G, one step after the other, for an empty tweak."""
    aes = Cipher(AES(key), ECB()).encryptor().update
    u, v = length // 2, length - length // 2
    a, b = divmod(number, radix**v)
    b_bytes = ((radix**v - 1).bit_length() + 7) // 8
    d = 4 * -(-b_bytes // 4) + 4
    p = bytes([1, 2, 1]) + radix.to_bytes(3, "big") + bytes([10, u]) + length.to_bytes(4, "big") + bytes(4)
    for turn in range(10):
        q = bytes((-b_bytes - 1) % 16) + bytes([turn]) + b.to_bytes(b_bytes, "big")
        r, text = bytes(16), p + q
        for at in range(0, len(text), 16):
            r = aes(bytes(x ^ y for x, y in zip(r, text[at : at + 16], strict=True)))
        s = r
        for block in range(1, -(-d // 16)):
            s += aes(bytes(x ^ y for x, y in zip(r, block.to_bytes(16, "big"), strict=True)))
        a, b = b, (a + int.from_bytes(s[:d], "big")) % radix ** (v if turn % 2 else u)
    return int(a * radix**v + b)


@pytest.mark.parametrize("radix", [2, 10, 30, 36, 41])
@pytest.mark.parametrize("length", [7, 12, 20, 33, 48, 64])
def test_long_numbers_are_encrypted_as_the_specification_says(radix: int, length: int) -> None:
    """NIST's samples have halves of seven bytes at most; ours have up to 22, of two blocks."""
    if radix**length < 10**6:
        return
    numbers = [0, 1, radix**length // 3, radix**length - 1]
    permutation = FF1(OUR_KEY, radix, length)
    encrypted = permutation.encrypt(numbers)
    assert encrypted == [_ff1_by_the_book(OUR_KEY, radix, length, number) for number in numbers]
    assert permutation.decrypt(encrypted) == numbers


def test_what_a_key_is_sealed_for_keeps_its_text() -> None:
    """Else no key that is at rest could be opened any more."""
    assert seal_of(7, Pattern("A-##", "01")) == "7\nA-##\n01"
