"""Codes: their one spelling, and patterns that generate them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

import msgspec

from coupon_svc.domain.errors import CouponError
from coupon_svc.domain.outcomes import Outcome, Refused

CODE_LENGTH_MIN, CODE_LENGTH_MAX = 3, 64
_CODE = re.compile(r"[A-Z0-9][A-Z0-9._~+@-]{2,63}")
_PREFIX = re.compile(r"[A-Z0-9][A-Z0-9._~+@-]{0,63}")
_SYMBOL = re.compile(r"[A-Z0-9._~+@-]")

ALPHABETS = {
    "unambiguous": "23456789ABCDEFGHJKMNPQRSTVWXYZ",  # digits and capitals without 0 O 1 I L U
    "alphanumeric": "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "letters": "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "digits": "0123456789",
}


CodeStatus = Literal["available", "assigned", "locked", "redeemed", "quarantined"]


def normalise_code(text: str) -> str | None:
    """The one spelling of a code: trimmed, upper case, 3..64 of `A-Z 0-9 . _ ~ + @ -`, a letter or digit first.

    None when `text` is no code. Only ASCII is upper-cased: `ß` must not become `SS` and so some other code.
    """
    code = text.strip()
    if not code.isascii():
        return None
    code = code.upper()
    return code if _CODE.fullmatch(code) else None


def normalise_prefix(text: str) -> str | None:
    """The one spelling of what codes begin with, trimmed as codes are; None when no code begins so. Every code begins with
    nothing."""
    prefix = text.strip()
    prefix = prefix.upper() if prefix.isascii() else prefix
    return prefix if not prefix or _PREFIX.fullmatch(prefix) else None


def why_taken(book_id: str, has_it: str) -> tuple[Literal["duplicate_in_book", "duplicate_in_other_book"], str]:
    """Why a code is not added to a book, as reason and detail: `has_it` is the book that has it already."""
    if has_it == book_id:
        return "duplicate_in_book", "the book has it already"
    return "duplicate_in_other_book", has_it


def why_invalid(text: str) -> str:
    """What keeps a text from being a code: which character and where, counted from 1 after trimming, or its length."""
    code = text.strip()
    if not CODE_LENGTH_MIN <= len(code) <= CODE_LENGTH_MAX:
        return f"it has {len(code)} characters; a code has {CODE_LENGTH_MIN} to {CODE_LENGTH_MAX}"
    for number, char in enumerate(code, 1):
        if not (char.isascii() and _SYMBOL.fullmatch(char.upper())):
            shown = f"'{char}' (U+{ord(char):04X})" if char.isprintable() else f"U+{ord(char):04X}"
            return f"character {number} is {shown}; a code has only A-Z 0-9 . _ ~ + @ -"
    return f"character 1 is '{code[0]}'; a code begins with a letter or a digit"


class Pattern(msgspec.Struct, frozen=True):
    """What codes to generate look like: each `#` of `text` is one random symbol of `symbols`."""

    text: str
    symbols: str
    """Each of them once, sorted: the same alphabet, however it was written, is the same pattern."""

    @property
    def regex(self) -> str:
        """What its codes match, as a regular expression of Postgres or Python."""
        symbol = "[" + "".join(map(_escaped, self.symbols)) + "]"
        return "^" + "".join(symbol if char == "#" else _escaped(char) for char in self.text) + "$"

    @property
    def bounds(self) -> tuple[str, str]:
        """Its codes are from the first on and before the second, byte by byte."""
        begin = self.text.partition("#")[0]
        return begin, begin + "\x7f"

    @property
    def capacity(self) -> int:
        """How many codes the pattern can name."""
        return int(len(self.symbols) ** self.text.count("#"))

    def draw(self, count: int) -> Iterator[str]:
        """`count` codes, each drawn alone by a CSPRNG: unguessable, and seldom but possibly alike."""
        places = self.text.count("#")
        frame = self.text.replace("#", "%s")
        symbols = self._random_symbols(count * places)
        for start in range(0, count * places or count, places or 1):
            yield frame % tuple(symbols[start : start + places])

    def _random_symbols(self, count: int) -> str:
        """Independent, unbiased symbols: a random byte that would favour some of them is thrown away."""
        size = len(self.symbols)
        fair = 256 - 256 % size
        table = bytes(ord(self.symbols[byte % size]) for byte in range(256))
        unfair = bytes(range(fair, 256))
        drawn = bytearray()
        while len(drawn) < count:
            drawn += os.urandom(count - len(drawn) + 16).translate(table, unfair)
        return drawn[:count].decode("ascii")


class Generated(NamedTuple):
    """Codes that are still to be drawn."""

    pattern: Pattern
    total: int


class InvalidPattern(CouponError):
    """No codes can be made by this pattern. `field` is `pattern`, `alphabet` or `total`; `reason` says what to give."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


def parse_pattern(text: str, alphabet: str) -> Pattern:
    """A pattern from its text and the name or symbols of its alphabet. Raises InvalidPattern.

    Every code the pattern can make must be a legal code; so the symbols must be, too.
    """
    text = text.strip().upper() if text.isascii() else text
    symbols = ALPHABETS.get(alphabet) or alphabet.upper()
    if len(symbols) < 2 or len(set(symbols)) != len(symbols) or not all(map(_SYMBOL.fullmatch, symbols)):
        names = ", ".join(ALPHABETS)
        raise InvalidPattern("alphabet", f"give one of {names}, or 2 or more different symbols of A-Z 0-9 . _ ~ + @ -")
    if not CODE_LENGTH_MIN <= len(text) <= CODE_LENGTH_MAX or not all(c == "#" or _SYMBOL.fullmatch(c) for c in text):
        raise InvalidPattern("pattern", "give 3 to 64 characters of A-Z 0-9 . _ ~ + @ - and # for a random symbol")
    first = symbols if text[0] == "#" else text[0]
    if not first.isalnum():
        raise InvalidPattern("pattern", "a code must begin with a letter or a digit")
    return Pattern(text, "".join(sorted(symbols)))


def fits(pattern: Pattern, requested: int, used: int) -> bool:
    """Whether the codes leave at least half of what the pattern can name. In a fuller one, codes are easy to guess and slow
    to draw."""
    return 2 * (used + requested) <= pattern.capacity


def guess_probability(pattern: Pattern, codes: int) -> float:
    """The chance that one guess within the pattern names one of so many codes that lie in it."""
    return min(1.0, codes / pattern.capacity)


def check_capacity(pattern: Pattern, requested: int, used: int) -> None:
    """Raises Refused(pattern_capacity) unless the codes fit."""
    if not fits(pattern, requested, used):
        raise Refused(Outcome.PATTERN_CAPACITY, capacity=pattern.capacity, requested=requested, already_used=used)


def _escaped(char: str) -> str:
    return char if char.isalnum() else "\\" + char
