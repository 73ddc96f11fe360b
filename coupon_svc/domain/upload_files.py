"""Reads codes out of an upload file while it arrives: CSV or plain text, as spreadsheets and shops write them.

Pure: bytes in, codes with their rows out. However the bytes are cut, the same rows come out. Memory is bounded: at most
RECORD_BYTES_MAX and the piece that was fed.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from typing import Literal

import msgspec

from coupon_svc.domain.codes import CODE_LENGTH_MAX, normalise_code, why_invalid
from coupon_svc.domain.errors import CouponError

FileKind = Literal["csv", "text"]

HEADER_WORDS = frozenset({"code", "codes", "coupon_code", "voucher"})
"""What the head of the column of codes says, in any case."""
SEPARATORS = ",;\t|"
RECORD_BYTES_MAX = 65_536
"""A longer line is rejected, and a longer text in quotes ends the upload: its quote was most likely never closed."""
_HEADER_SHOWN_MAX = 64
_BLANK = " \t\v\f\xa0\"'=" + SEPARATORS
_BOM = b"\xef\xbb\xbf"
_SNIFFED_BYTES = 4
_END = "\0\0end"
"""Fed to the CSV reader behind the last line: it comes out alone unless a quote is still open."""

_all_codes = re.compile(r"(?:[A-Z0-9][A-Z0-9._~+@-]{2,63}\n)*+").fullmatch
_damaged = re.compile(r"^\d+(?:\.\d+)?E\+?\d{1,3}$", re.MULTILINE).findall
_quoted = re.compile(r'"[^"]*"')


class UnreadableFile(CouponError):
    """The file as a whole cannot be read. `line` counts from 1; `reason` holds nothing of the file but single bytes."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"line {line}: {reason}")
        self.line = line
        self.reason = reason


class InvalidRow(msgspec.Struct, frozen=True):
    """A row that holds no code: the first characters of what stands there, and what is wrong with it."""

    row: int
    text: str
    detail: str


class Batch(msgspec.Struct):
    """What one piece of the file has brought. `rows` are the lines of `codes`, one for each."""

    codes: list[str] = []
    rows: list[int] = []
    invalid: list[InvalidRow] = []


class FileReader:
    """One upload file. Feed it the body piece by piece; then `finish`. Both raise UnreadableFile."""

    def __init__(self, kind: FileKind) -> None:
        self.header: str | None = None
        """The head of the column of codes, as it stands in the file."""
        self.received = 0
        """Rows that are neither blank nor the header."""
        self.invalid = 0
        self.blank = 0
        self._is_csv = kind == "csv"
        self._separator: str | None = None
        self._column = 0
        self._started = False
        """Whether the first row that is not blank has been seen, which says separator and column."""
        self._sniffed = False
        self._line = 1
        """The number of the next line."""
        self._rest = b""
        """The beginning of an incomplete line."""
        self._skipping = False
        """Whether the line that is arriving was rejected for its length."""
        self._open: list[str] = []
        """Lines of a record whose quote is still open."""
        self._damaged = 0
        self._damaged_for_sure = 0
        self._batch = Batch()

    @property
    def warnings(self) -> list[str]:
        """What its owner should look at, in words that repeat no code."""
        if not self._damaged_for_sure and self._damaged * 10 <= self.received:
            return []
        return [
            f"{self._damaged} codes look like numbers that a spreadsheet has shortened, as 7.00E+12. They were taken as they"
            " are. Format the column as text before you export it."
        ]

    def feed(self, data: bytes) -> Batch:
        """The codes of all lines that are complete now."""
        data = self._rest + data
        if not self._sniffed:
            if len(data) < _SNIFFED_BYTES:
                self._rest = data
                return Batch()
            data = self._sniff(data)
        # A \r at the very end may be half of \r\n.
        end = 1 + max(data.rfind(b"\n"), data.rfind(b"\r", 0, max(len(data) - 1, 0)))
        self._rest = data[end:]
        if end:
            self._take(data[:end])
        if len(self._rest) > RECORD_BYTES_MAX + 1:
            self._skip()
        return self._drain()

    def finish(self) -> Batch:
        """The codes of what is left: the body has ended."""
        if not self._sniffed:
            self._rest = self._sniff(self._rest)
        if self._rest:
            self._take(self._rest)
        if self._open:
            raise UnreadableFile(self._line - len(self._open), "the quote that opens here is never closed")
        return self._drain()

    def _drain(self) -> Batch:
        batch, self._batch = self._batch, Batch()
        return batch

    def _sniff(self, data: bytes) -> bytes:
        """The data without a byte order mark. Raises UnreadableFile for what is no text in UTF-8."""
        self._sniffed = True
        begin = data[:_SNIFFED_BYTES]
        zeros = [not byte for byte in begin]
        if begin.startswith((b"\xff\xfe", b"\xfe\xff")) or zeros in ([True, False] * 2, [False, True] * 2):
            raise UnreadableFile(1, "the file is in UTF-16; save it as UTF-8")
        if begin.startswith(b"\x1f\x8b"):
            raise UnreadableFile(1, "the file is compressed; send it with Content-Encoding: gzip")
        if begin.startswith(b"PK\x03\x04"):
            raise UnreadableFile(1, "the file is a workbook or an archive; save the sheet as CSV")
        return data.removeprefix(_BOM)

    def _skip(self) -> None:
        """Reject the line that is arriving, and drop what there is of it."""
        if not self._skipping:
            self._reject_long(self._rest)
            self._skipping = True
        self._rest = self._rest[-1:] if self._rest.endswith(b"\r") else b""

    def _take(self, block: bytes) -> None:
        """Complete lines."""
        lines = block.splitlines()
        if self._skipping:
            self._skipping = False
            self._line += 1
            del lines[0]
        if len(block) > RECORD_BYTES_MAX:
            begin = 0
            for place in [place for place, line in enumerate(lines) if len(line) > RECORD_BYTES_MAX]:
                self._take_lines(lines[begin:place])
                self._reject_long(lines[place])
                self._line += 1
                begin = place + 1
            lines = lines[begin:]
        self._take_lines(lines)

    def _reject_long(self, line: bytes) -> None:
        if self._open:
            self._check_open(RECORD_BYTES_MAX)
        self.received += 1
        shown = line[: 4 * CODE_LENGTH_MAX].decode(errors="replace")
        self._reject(self._line, shown, f"the line is longer than {RECORD_BYTES_MAX} bytes")

    def _check_open(self, size: int) -> None:
        if size >= RECORD_BYTES_MAX:
            raise UnreadableFile(
                self._line - len(self._open), f"the quote that opens here is not closed within {RECORD_BYTES_MAX} bytes"
            )

    def _take_lines(self, encoded: list[bytes]) -> None:
        if not encoded:
            return
        text = self._decoded(encoded)
        lines = text.split("\n")
        if self._is_csv and (self._open or '"' in text):
            self._take_quoted(lines)
            return
        first = self._line
        self._line += len(lines)
        if not self._started:
            skipped = self._start(lines, first)
            if skipped:
                del lines[:skipped]
                first += skipped
                text = "\n".join(lines)
        if lines and not self._take_fast(text, lines, first):
            for row, line in enumerate(lines, first):
                self._take_record(row, line.split(self._separator) if self._separator else [line])

    def _decoded(self, lines: list[bytes]) -> str:
        whole = b"\n".join(lines)
        try:
            return whole.decode()
        except UnicodeDecodeError as error:
            raise UnreadableFile(
                self._line + whole.count(b"\n", 0, error.start),
                f"byte 0x{whole[error.start]:02X} is not UTF-8; the file is most likely in Latin-1 or Windows-1252."
                " Save it as UTF-8",
            ) from None

    def _start(self, lines: list[str], first: int) -> int:
        """Judge the first row that is not blank, if it is among these lines. Returns how many lines that has used up."""
        for number, line in enumerate(lines):
            if not line.strip(_BLANK):
                self.blank += 1
                continue
            return number + (1 if self._start_record(line) else 0)
        return len(lines)

    def _start_record(self, line: str) -> bool:
        """Choose separator and column by the first row that is not blank. Returns whether it is the header."""
        self._started = True
        if not self._is_csv:
            head = _cleaned(line.rstrip(SEPARATORS + " "))
            self.header = head[:_HEADER_SHOWN_MAX] if head.lower() in HEADER_WORDS else None
            return self.header is not None
        plain = _quoted.sub("", line)
        for separator in sorted(SEPARATORS, key=plain.count, reverse=True):
            cells = [_cleaned(cell) for cell in next(csv.reader([line], delimiter=separator), [])]
            heads = [place for place, cell in enumerate(cells) if cell.lower() in HEADER_WORDS]
            if heads:
                self._separator, self._column = separator, heads[0]
                self.header = cells[heads[0]]
                return True
        self._separator = max(SEPARATORS, key=plain.count) if any(map(plain.count, SEPARATORS)) else ","
        return False

    def _take_fast(self, text: str, lines: list[str], first: int) -> bool:
        """Take lines of which each holds a code and nothing unusual. Returns whether they were."""
        if not text.isascii():
            return False
        codes = lines
        if self._separator is not None and self._separator in text:
            stop = self._column + 1
            try:
                codes = [line.split(self._separator, stop)[self._column] for line in lines]
            except IndexError:
                return False
            text = "\n".join(codes)
        elif self._column:
            return False
        return self._take_codes(text, first)

    def _take_codes(self, text: str, first: int) -> bool:
        """Take the lines of a text, if each is a code but for its case. Returns whether they were."""
        text = text.upper()
        if not _all_codes(text + "\n"):
            return False
        codes = text.split("\n")
        self._batch.codes += codes
        self._batch.rows += range(first, first + len(codes))
        self.received += len(codes)
        self._look_for_damage(text)
        return True

    def _take_quoted(self, lines: list[str]) -> None:
        """Lines with quotes in or before them: separators and line ends in quotes are part of a cell."""
        first = self._line - len(self._open)
        self._line += len(lines)
        lines = self._open + lines
        self._open = []
        if not self._started:
            skipped = 0
            while skipped < len(lines) and not lines[skipped].strip(_BLANK) and lines[skipped].count('"') % 2 == 0:
                skipped += 1
            self.blank += skipped
            lines, first = lines[skipped:], first + skipped
            if not lines:
                return
            # The line alone says which separator it is, also where a quote goes on behind it.
            is_header = self._start_record(lines[0])
            if is_header:
                lines, first = lines[1:], first + 1
        ended = [*(line + "\n" for line in lines), _END]
        if not self._take_plain_cells(ended, first):
            self._take_records(lines, ended, first)

    def _take_plain_cells(self, ended: list[str], first: int) -> bool:
        """Take lines whose quotes hold nothing unusual. Returns whether they were."""
        try:
            records = list(csv.reader(ended, delimiter=self._separator or ","))
        except csv.Error:
            return False
        if len(records) != len(ended) or records.pop() != [_END]:
            return False
        try:
            text = "\n".join([record[self._column] for record in records])
        except IndexError:
            return False
        return text.isascii() and text.count("\n") == len(records) - 1 and self._take_codes(text, first)

    def _take_records(self, lines: list[str], ended: list[str], first: int) -> None:
        """Take lines of which some are in quotes; those behind a quote that is still open are kept."""
        reader = csv.reader(ended, delimiter=self._separator or ",")
        begin = 0
        try:
            for record in reader:
                if record == [_END]:
                    return
                if record and record[-1].endswith(_END):
                    self._open = lines[begin:]
                    self._check_open(sum(map(len, self._open)))
                    return
                if reader.line_num - begin > 1 and sum(map(len, lines[begin : reader.line_num])) >= RECORD_BYTES_MAX:
                    break
                self._take_record(first + begin, record)
                begin = reader.line_num
        except csv.Error:  # a cell is longer than the reader takes
            pass
        self._open = lines[begin:]
        self._check_open(RECORD_BYTES_MAX)

    def _take_record(self, row: int, cells: Sequence[str]) -> None:
        text = cells[self._column] if self._column < len(cells) else ""
        text = _cleaned(text.rstrip(SEPARATORS + " "))
        if not text and not any(cell.strip(_BLANK) for cell in cells):
            self.blank += 1
            return
        self.received += 1
        code = normalise_code(text)
        if code is None:
            self._reject(row, text, why_invalid(text))
            return
        self._batch.codes.append(code)
        self._batch.rows.append(row)
        self._look_for_damage(code)

    def _reject(self, row: int, text: str, detail: str) -> None:
        self.invalid += 1
        shown = text[:CODE_LENGTH_MAX].replace("\0", "\ufffd")  # Postgres keeps no NUL
        self._batch.invalid.append(InvalidRow(row, shown, detail))

    def _look_for_damage(self, codes: str) -> None:
        damaged = _damaged(codes)
        self._damaged += len(damaged)
        self._damaged_for_sure += sum("E+" in code for code in damaged)


def _cleaned(cell: str) -> str:
    """A cell without white space around it, and without what spreadsheets need to keep a text a text."""
    cell = cell.strip()
    if cell.startswith("="):
        cell = cell[1:].strip()
    elif cell.startswith("'"):
        return cell[1:].strip()
    if len(cell) >= 2 and cell[0] == cell[-1] == '"':
        cell = cell[1:-1].strip()
    return cell
