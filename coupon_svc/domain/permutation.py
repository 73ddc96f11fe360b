"""FF1, the format-preserving cipher of NIST SP 800-38G, over AES: numbers below radix**length, each to another one.

Codes are computed with it: a secret key turns a counter into a code, unique without a look-up, and back. This module works
on many numbers at once: a round of all of them is one call of AES. So it is fast in Python.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Sequence

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB

DOMAIN_MIN = 1_000_000
"""SP 800-38G Rev. 1 asks for so many numbers at least: in a smaller domain, known attacks come near."""
LENGTH_MAX = 64
ROUNDS = 10
_BLOCK = 16


class FF1:
    """A permutation of 0 .. radix**length - 1. The same key and tweak make the same one, everywhere and for good.

    A number is read as `length` numerals, the most significant first, as the specification reads its strings.
    """

    def __init__(self, key: bytes, radix: int, length: int, tweak: bytes = b"") -> None:
        """`key` is an AES key of 16, 24 or 32 bytes. Raises ValueError for a domain that is too small, or too long."""
        if not (2 <= radix <= 1 << 16 and 2 <= length <= LENGTH_MAX and radix**length >= DOMAIN_MIN):
            raise ValueError("FF1 is not for numbers of this radix and length")
        left, right = length // 2, length - length // 2
        self._sizes = (int(radix**left), int(radix**right))  # of the half that an even round changes, and an odd one
        # The lengths b and d of the specification: bytes of a half as a number, and of what is added to one.
        self._b = ((self._sizes[1] - 1).bit_length() + 7) // 8
        self._d = 4 * ((self._b + 3) // 4) + 4
        self._aes = Cipher(AES(key), ECB()).encryptor()
        head = (
            struct.pack(">BBB", 1, 2, 1) + radix.to_bytes(3, "big") + struct.pack(">BBII", 10, left, length, len(tweak))
        )
        fixed = tweak + bytes((-len(tweak) - self._b - 1) % _BLOCK)
        # CBC-MAC of all blocks that neither the round nor the number has a part in.
        whole = (len(fixed) + 1 + self._b - self._variable_bytes) // _BLOCK * _BLOCK
        self._chain = self._aes.update(head)
        for start in range(0, whole, _BLOCK):
            self._chain = self._aes.update(_xor(self._chain, fixed[start : start + _BLOCK]))
        self._rest = fixed[whole:]

    @property
    def _variable_bytes(self) -> int:
        """Bytes of the last blocks, which hold the round and the number."""
        return (1 + self._b + _BLOCK - 1) // _BLOCK * _BLOCK

    def encrypt(self, numbers: Sequence[int]) -> list[int]:
        """What the numbers become, in their order. Each must be of the domain."""
        right = self._sizes[1]
        a, b = [number // right for number in numbers], [number % right for number in numbers]
        for turn in range(ROUNDS):
            size = self._sizes[turn % 2]
            a, b = b, [(old + added) % size for old, added in zip(a, self._added(turn, b), strict=True)]
        return [high * right + low for high, low in zip(a, b, strict=True)]

    def decrypt(self, numbers: Sequence[int]) -> list[int]:
        """The inverse of `encrypt`."""
        right = self._sizes[1]
        a, b = [number // right for number in numbers], [number % right for number in numbers]
        for turn in reversed(range(ROUNDS)):
            size = self._sizes[turn % 2]
            a, b = [(old - added) % size for old, added in zip(b, self._added(turn, a), strict=True)], a
        return [high * right + low for high, low in zip(a, b, strict=True)]

    def _added(self, turn: int, halves: list[int]) -> Sequence[int]:
        """The round function: for each half the number y, `d` bytes of a MAC of the round and the half."""
        if self._b < 8 and self._variable_bytes == _BLOCK:
            mac = _words(self._mac_of_small(turn, halves))
            if self._d == 8:
                return mac[0::2]
            return [high << 32 | low >> 32 for high, low in zip(mac[0::2], mac[1::2], strict=True)]
        return self._added_to_any(turn, halves)

    def _mac_of_small(self, turn: int, halves: list[int]) -> bytes:
        """One block for each half, of which only the last eight bytes differ."""
        first = int.from_bytes(_xor(self._chain, self._rest + bytes([turn]) + bytes(self._b)), "big")
        low = first & (1 << 64) - 1
        blocks = array("Q", [first >> 64]) * (2 * len(halves))
        blocks[1::2] = array("Q", [low ^ half for half in halves])
        return self._aes.update(_bytes(blocks))

    def _added_to_any(self, turn: int, halves: list[int]) -> list[int]:
        head = int.from_bytes(self._rest + bytes([turn]), "big") << 8 * self._b
        size, count = self._variable_bytes, len(halves)
        texts = array("Q", b"".join([(head | half).to_bytes(size, "big") for half in halves]))
        chain = self._chain * count
        for block in range(size // _BLOCK):
            chain = self._aes.update(_xor(chain, _column(texts, block, size // _BLOCK)))
        parts = [chain]
        for number in range(1, (self._d + _BLOCK - 1) // _BLOCK):
            parts.append(self._aes.update(_xor(chain, number.to_bytes(_BLOCK, "big") * count)))
        wide, step = _beside_each_other(parts), len(parts) * _BLOCK
        number_of, end = int.from_bytes, self._d
        return [number_of(wide[start : start + end], "big") for start in range(0, step * count, step)]


def _column(texts: array[int], block: int, of: int) -> bytes:
    """The n-th block of every text, each of which has as many."""
    column = array("Q", bytes(8)) * (len(texts) // of)
    column[0::2], column[1::2] = texts[2 * block :: 2 * of], texts[2 * block + 1 :: 2 * of]
    return column.tobytes()


def _beside_each_other(parts: list[bytes]) -> bytes:
    """The blocks of each text, of which every part has one, one behind the other."""
    if len(parts) == 1:
        return parts[0]
    texts = array("Q", bytes(8)) * (len(parts) * len(parts[0]) // 8)
    for number, part in enumerate(parts):
        words = array("Q", part)
        texts[2 * number :: 2 * len(parts)], texts[2 * number + 1 :: 2 * len(parts)] = words[0::2], words[1::2]
    return texts.tobytes()


def _xor(one: bytes, other: bytes) -> bytes:
    return (int.from_bytes(one, "big") ^ int.from_bytes(other, "big")).to_bytes(len(one), "big")


def _words(text: bytes) -> array[int]:
    """Numbers of eight bytes, the most significant first."""
    words = array("Q", text)
    if sys.byteorder == "little":
        words.byteswap()
    return words


def _bytes(words: array[int]) -> bytes:
    """The inverse of `_words`."""
    if sys.byteorder == "little":
        words.byteswap()
    return words.tobytes()
