"""Computed codes: a pattern's key turns numbers into codes, and codes back into numbers. Nothing is looked up."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, product

from coupon_svc.domain.codes import Pattern
from coupon_svc.domain.permutation import DOMAIN_MIN, FF1

KEY_BYTES = 32
TOTAL_MIN = 100_001
"""Fewer codes are drawn and stored: their rows are cheap, and they may be listed in order."""


class PatternCipher:
    """The codes of one pattern under one key: number 0 .. capacity - 1 to code, each code once."""

    def __init__(self, pattern: Pattern, key: bytes) -> None:
        """Raises ValueError unless `may_compute(pattern)`."""
        self.pattern = pattern
        self._matches = re.compile(pattern.regex).fullmatch
        self._random_at = [at for at, char in enumerate(pattern.text) if char == "#"]
        self._permutation = FF1(key, len(pattern.symbols), len(self._random_at))
        # A number becomes text two symbols at a time; of an odd number of symbols the first is a piece of its own.
        symbols = pattern.symbols
        self._pairs = [high + low for high in symbols for low in symbols]
        # Then each run of `#` takes its part of the text.
        self._frame = re.sub("#+", "%s", pattern.text)  # no code has a `%`
        lengths = [len(run) for run in re.findall("#+", pattern.text)]
        ends = list(accumulate(lengths))
        self._runs = [slice(end - length, end) for length, end in zip(lengths, ends, strict=True)]
        self._values = {symbol: value for value, symbol in enumerate(symbols)}

    def codes(self, numbers: Sequence[int]) -> list[str]:
        """The codes of these numbers, in their order. Each must be below the pattern's capacity."""
        frame, runs = self._frame, self._runs
        texts = self._texts(self._permutation.encrypt(numbers))
        if len(runs) == 1:
            return [frame % text for text in texts]
        return [frame % tuple([text[run] for run in runs]) for text in texts]

    def number_of(self, code: str) -> int | None:
        """The number of a code; None when the code does not lie in the pattern."""
        return self.numbers_of([code]).get(code)

    def numbers_of(self, codes: Iterable[str]) -> dict[str, int]:
        """The numbers of those of the codes that lie in the pattern."""
        lying = [code for code in codes if self._matches(code)]
        return dict(zip(lying, self._permutation.decrypt([self._value(code) for code in lying]), strict=True))

    def _texts(self, values: list[int]) -> list[str]:
        """The symbols of each value, column by column: the last pair of all of them comes first."""
        pairs, size = self._pairs, len(self._pairs)
        columns = []
        for _ in range(len(self._random_at) // 2):
            columns.append([pairs[value % size] for value in values])
            values = [value // size for value in values]
        if len(self._random_at) % 2:
            columns.append([self.pattern.symbols[value] for value in values])
        columns.reverse()
        return ["".join(pieces) for pieces in zip(*columns, strict=True)]

    def _value(self, code: str) -> int:
        radix, value = len(self._values), 0
        for at in self._random_at:
            value = value * radix + self._values[code[at]]
        return value


def may_compute(pattern: Pattern) -> bool:
    """Whether the pattern is large enough for its codes to be computed."""
    return pattern.text.count("#") >= 2 and pattern.capacity >= DOMAIN_MIN


def overlap(one: Pattern, other: Pattern) -> bool:
    """Whether some code lies in both patterns."""
    return len(one.text) == len(other.text) and all(
        _symbols(one, mine) & _symbols(other, theirs) for mine, theirs in zip(one.text, other.text, strict=True)
    )


def count_beginning_with(pattern: Pattern, prefix: str) -> int:
    """How many codes of the pattern begin so."""
    possible = len(prefix) <= len(pattern.text) and all(
        char in _symbols(pattern, place) for char, place in zip(prefix, pattern.text, strict=False)
    )
    return len(pattern.symbols) ** pattern.text.count("#", len(prefix)) if possible else 0


def codes_beginning_with(pattern: Pattern, prefix: str) -> Iterator[str]:
    """These codes; `prefix` must be the beginning of some."""
    rest = [pattern.symbols if char == "#" else char for char in pattern.text[len(prefix) :]]
    return (prefix + "".join(symbols) for symbols in product(*rest))


def share_of_capacity(part: Pattern, whole: Pattern) -> float:
    """How much of what `whole` can name lies in `part` too, from 0 to 1."""
    if len(part.text) != len(whole.text):
        return 0.0
    share = 1.0
    for mine, theirs in zip(part.text, whole.text, strict=True):
        there = _symbols(whole, theirs)
        share *= len(_symbols(part, mine) & there) / len(there)
    return share


def _symbols(pattern: Pattern, char: str) -> set[str]:
    return set(pattern.symbols) if char == "#" else {char}
