"""Upload files as people have them, read in pieces of any size."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coupon_svc.domain.upload_files import (
    RECORD_BYTES_MAX,
    Batch,
    FileKind,
    FileReader,
    UnreadableFile,
)

EVERYTHING = (
    '\ufeffname;"Coupon_Code";note\r\n'
    '\r\n;;;\r\n x; a-1 ;"one; ""two""\r\nthree"\n'
    'y;"B-2";\ry;="007";;;\n'
    'z;\'0077\nz;;lost\nä;no\nü;ÄBC\n1;1E5\n2;7.00E+12\n;"A\nB";\nlast;c-3'
)


def read_file(kind: FileKind, pieces: Iterable[bytes]) -> tuple[FileReader, Batch]:
    """A whole file, and the reader that has read it."""
    reader = FileReader(kind)
    whole = Batch()
    for batch in (*map(reader.feed, pieces), reader.finish()):
        whole.codes += batch.codes
        whole.rows += batch.rows
        whole.invalid += batch.invalid
    return reader, whole


def rows(kind: FileKind, body: bytes | str, *, cut: int | None = None) -> list[tuple[int, str]]:
    """(line, code) of a file."""
    data = body if isinstance(body, bytes) else body.encode()
    pieces = [data] if cut is None else [data[:cut], data[cut:]]
    _, batch = read_file(kind, pieces)
    return list(zip(batch.rows, batch.codes, strict=True))


def rejected(kind: FileKind, body: bytes | str) -> list[tuple[int, str, str]]:
    """(line, what stands there, why) of rows without a code."""
    _, batch = read_file(kind, [body if isinstance(body, bytes) else body.encode()])
    return [(row.row, row.text, row.detail) for row in batch.invalid]


def refusal(kind: FileKind, body: bytes, *, size: int = 1 << 20) -> tuple[int, str]:
    with pytest.raises(UnreadableFile) as error:
        read_file(kind, [body[start : start + size] for start in range(0, len(body), size)])
    return error.value.line, error.value.reason


def outcome(kind: FileKind, pieces: list[bytes]) -> object:
    """All that a file is found to hold, or why it cannot be read."""
    try:
        reader, batch = read_file(kind, pieces)
    except UnreadableFile as error:
        return error.line, error.reason
    counts = (reader.received, reader.invalid, reader.blank, reader.header, reader.warnings)
    return counts, list(zip(batch.rows, batch.codes, strict=True)), batch.invalid


def test_a_file_with_everything_in_it() -> None:
    reader, batch = read_file("csv", [EVERYTHING.encode()])
    assert list(zip(batch.rows, batch.codes, strict=True)) == [
        (4, "A-1"),
        (6, "B-2"),
        (7, "007"),
        (8, "0077"),
        (12, "1E5"),
        (13, "7.00E+12"),
        (16, "C-3"),
    ]
    assert [(row.row, row.text) for row in batch.invalid] == [(9, ""), (10, "no"), (11, "ÄBC"), (14, "A\nB")]
    assert (reader.received, reader.invalid, reader.blank, reader.header) == (11, 4, 2, "Coupon_Code")
    assert len(reader.warnings) == 1


@pytest.mark.parametrize("kind", ["csv", "text"])
def test_it_is_the_same_wherever_it_is_cut(kind: FileKind) -> None:
    data = EVERYTHING.encode()
    whole = outcome(kind, [data])
    for cut in range(len(data) + 1):
        assert outcome(kind, [data[:cut], data[cut:]]) == whole, cut
    assert outcome(kind, [data[place : place + 1] for place in range(len(data))]) == whole


@given(
    st.text(alphabet=st.sampled_from("AB1-é\"';,=\t| \r\n\0"), max_size=60),
    st.lists(st.integers(0, 80), max_size=4),
    st.sampled_from(["csv", "text"]),
)
def test_anything_is_the_same_wherever_it_is_cut(text: str, cuts: list[int], kind: FileKind) -> None:
    data = text.encode()
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[start:end] for start, end in pairwise(places)]
    assert outcome(kind, pieces) == outcome(kind, [data])


@given(st.binary(max_size=80), st.sampled_from(["csv", "text"]))
def test_no_bytes_are_more_than_it_can_say_no_to(data: bytes, kind: FileKind) -> None:
    outcome(kind, [data])


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("kind", ["csv", "text"])
def test_every_line_end_is_one(kind: FileKind, end: str) -> None:
    assert rows(kind, end.join(["code", "A-1", "", "A-2"])) == [(2, "A-1"), (4, "A-2")]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_every_separator_is_found(separator: str) -> None:
    assert rows("csv", f"A-1{separator}x{separator}\nA-2{separator}y,;\n") == [(1, "A-1"), (2, "A-2")]
    assert rows("csv", f'"x,;|y"{separator}Voucher\n"a,b"{separator}A-1\n') == [(2, "A-1")]


@pytest.mark.parametrize("head", ["code", "CODES", "Coupon_Code", " voucher ", '"code"', "'code"])
def test_a_header_is_told_as_it_stands(head: str) -> None:
    for kind in ("csv", "text"):
        reader, batch = read_file(kind, [f"\n{head}\nA-1\n".encode()])
        assert reader.header == head.strip(" \"'")
        assert (reader.received, reader.blank, batch.rows) == (1, 1, [3])


def test_only_the_first_row_can_be_a_header() -> None:
    assert rows("text", "A-1\ncode\n") == [(1, "A-1"), (2, "CODE")]


def test_a_byte_order_mark_is_no_part_of_the_first_code() -> None:
    assert rows("text", "\ufeffA-1\n") == [(1, "A-1")]
    assert rows("csv", "\ufeff") == []


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_recognised(encoding: str) -> None:
    assert refusal("csv", "code\nA-1\n".encode(encoding)) == (1, "the file is in UTF-16; save it as UTF-8")


def test_latin_1_is_recognised_with_its_line() -> None:
    line, reason = refusal("csv", "name;code\r\nx;A-1\r\ncafé;A-2\r\n".encode("latin-1"), size=7)
    assert line == 3
    assert reason.startswith("byte 0xE9 is not UTF-8; the file is most likely in Latin-1")
    assert refusal("text", "A-1\nA-2\ncaf\u00e9".encode("latin-1"))[0] == 3


def test_a_workbook_and_a_compressed_file_are_recognised() -> None:
    assert "workbook" in refusal("csv", b"PK\x03\x04\x14\x00")[1]
    assert "Content-Encoding" in refusal("csv", b"\x1f\x8b\x08\x00\x00")[1]


def test_what_spreadsheets_leave_is_taken_off() -> None:
    assert rows("csv", '="007"\n"=""008"""\n\'009\n010;;;\n') == [(1, "007"), (2, "008"), (3, "009"), (4, "010")]
    assert rows("text", '="007"\n\'009\n010;;;\n"011"\n') == [(1, "007"), (2, "009"), (3, "010"), (4, "011")]


def test_blank_rows_are_counted_and_skipped() -> None:
    reader, batch = read_file("csv", [b'\n;;;\nA-1;x\n  \n"";""\nA-2;\n\t\n'])
    assert (batch.rows, reader.blank, reader.received) == ([3, 6], 5, 2)


def test_a_nul_byte_is_rejected_with_its_line() -> None:
    only = "a code has only A-Z 0-9 . _ ~ + @ -"
    for kind in ("csv", "text"):
        assert rejected(kind, "A-1\nA\0-2\nA-3\n") == [(2, "A\ufffd-2", f"character 2 is U+0000; {only}")]


def test_a_line_that_is_too_long_is_rejected_and_the_next_one_is_not() -> None:
    detail = f"the line is longer than {RECORD_BYTES_MAX} bytes"
    body = b"A-1\n" + b"x" * (RECORD_BYTES_MAX + 1) + b"\r\nA-2\n" + b"y" * RECORD_BYTES_MAX + b"\nA-3"
    for size in (1 << 20, 65_536, 1_000):
        reader, batch = read_file("text", [body[start : start + size] for start in range(0, len(body), size)])
        assert (batch.codes, batch.rows) == (["A-1", "A-2", "A-3"], [1, 3, 5])
        assert [(row.row, row.text, row.detail) for row in batch.invalid] == [
            (2, "x" * 64, detail),
            (4, "y" * 64, f"it has {RECORD_BYTES_MAX} characters; a code has 3 to 64"),
        ]
        assert (reader.received, reader.invalid) == (5, 2)


def test_a_line_without_end_takes_no_memory() -> None:
    reader = FileReader("text")
    for _ in range(200):
        reader.feed(b"x" * 65_536)
        assert len(reader._rest) <= RECORD_BYTES_MAX + 1
    assert (reader.received, reader.invalid) == (1, 1)
    assert reader.finish().codes == []


def test_a_quote_that_is_never_closed_is_told_with_its_line() -> None:
    assert refusal("csv", b'A-1\n"A-2\nA-3\n') == (2, "the quote that opens here is never closed")
    line, reason = refusal("csv", b'A-1\n"A-2\n' + b"A-3\n" * 40_000, size=65_536)
    assert (line, reason) == (2, f"the quote that opens here is not closed within {RECORD_BYTES_MAX} bytes")


def test_line_ends_and_separators_in_quotes_are_part_of_their_cell() -> None:
    assert rows("csv", 'note,code\n"a\n""b"",\nc",A-1\n"x",A-2\n') == [(2, "A-1"), (5, "A-2")]


def test_a_column_that_a_spreadsheet_has_broken_is_warned_about() -> None:
    def warned(body: str) -> bool:
        return bool(read_file("csv", [body.encode()])[0].warnings)

    assert warned("7.00E+12\n" + "ABC\n" * 1_000)
    assert warned("1E5\n2E7\n" + "ABC\n" * 10)
    assert not warned("1E5\n" + "ABC\n" * 1_000)
    assert not warned("ABE5\n12345\n1E5X\n")


def test_a_row_that_lacks_the_column_holds_no_code() -> None:
    assert rejected("csv", "name;code\nx\ny;A-1\n") == [(2, "", "it has 0 characters; a code has 3 to 64")]
