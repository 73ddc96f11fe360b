"""What is kept of an event that the ledger cannot take."""

from __future__ import annotations

from coupon_svc.domain.events import COUPON_ASSIGNED, Event
from coupon_svc.domain.position import Epoch, Position, Seq
from coupon_svc.postgres.events import DeadLetter, dead_letter, garbled_letter, unread_letters
from tests.entries import entry_of

AT = Position(Epoch(3), Seq(8))
EVENT = Event(*AT, COUPON_ASSIGNED, "bk_1", "SUMMER-1", "u", 5)


def test_the_letter_of_an_event_names_its_book_and_code_unless_they_are_what_is_wrong() -> None:
    letter = dead_letter(EVENT, "why")
    assert (letter.seq, letter.reason, letter.book_id, letter.code) == (8, "why", "bk_1", "SUMMER-1")
    for wrong in (EVENT._replace(code="summer-1"), EVENT._replace(book_id="bk_\0")):
        letter = dead_letter(wrong, "why")
        assert (letter.book_id, letter.code) == (None, None)


def test_the_letter_of_a_garbled_entry_has_all_its_fields_and_its_code_where_that_can_be_told() -> None:
    fields = [b"book", b"bk_1", b"code", b"SUMMER-1", b"\xff", b"odd", b"no value"]
    letter = garbled_letter(AT, fields, "why")
    assert letter == DeadLetter(
        8, '["book","bk_1","code","SUMMER-1","\ufffd","odd","no value"]'.encode(), "why", "bk_1", "SUMMER-1"
    )
    letter = garbled_letter(AT, [b"by", b"hand"], "why")
    assert (letter.seq, letter.fields, letter.book_id, letter.code) == (8, b'["by","hand"]', None, None)


def test_an_entry_whose_events_cannot_be_read_has_a_letter_for_each() -> None:
    entry = entry_of(EVENT, EVENT._replace(seq=9))._replace(body=b"{}")
    assert unread_letters(entry, "why") == [DeadLetter(8, b"{}", "why"), DeadLetter(9, b"{}", "why")]
