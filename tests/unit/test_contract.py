"""A script's header alone makes its Lua names and its Python binding."""

from __future__ import annotations

import pytest

from coupon_svc.redis.contract import (
    CallClass,
    Contract,
    ContractError,
    ReplyReader,
    UnexpectedReply,
    operation_preamble,
    packer,
    parse_contract,
    parse_operation,
    preamble,
    section_preamble,
    split_operation,
    split_source,
)

HEADER = """take_code: a sample.

Prose may say anything, (even this).

Keys
  meta       hash    read, count
  free       zset    pop
  idem?      string  read, write; only with an Idempotency-Key

Args
  epoch      int
  user_id    text    of whoever asks
  reference? text    "" without one

Replies, the first that applies
  suspect(why)       another epoch (`epoch`), or a torn meta (`torn`)
  locked(retry_after_ms)
  gone
  ok(code, at_ms, note?)   done

Event
  coupon_assigned(code, user)
"""
LISTS = """restore: a sample with lists.

Keys
  meta       hash    read
  locks…     string  read; one for each code

Args
  epoch      int
  scores…    int
  codes…     text

Replies, the first that applies
  ok
"""
OPERATION = """look_up: a sample of an operation.

Class: read

Keys
  book       hash    read
  free       zset    read
  lock…      string  read; one for each code

Args
  tenant_id  int
  codes…     text

Replies, the first that applies
  ok
"""


def contract(text: str = HEADER) -> Contract:
    return parse_contract(text)


def test_a_header_is_read() -> None:
    read = contract()
    assert read.name == "take_code"
    assert [(key.name, key.mark, key.type, sorted(key.access)) for key in read.keys] == [
        ("meta", "", "hash", ["count", "read"]),
        ("free", "", "zset", ["pop"]),
        ("idem", "?", "string", ["read", "write"]),
    ]
    assert [tuple(arg) for arg in read.args] == [
        ("epoch", "", "int"),
        ("user_id", "", "text"),
        ("reference", "?", "text"),
    ]
    assert [(line.word, line.fields, line.optional) for line in read.replies] == [
        ("suspect", ("why",), 0),
        ("locked", ("retry_after_ms",), 0),
        ("gone", (), 0),
        ("ok", ("code", "at_ms", "note"), 1),
    ]
    assert read.events == {"coupon_assigned": ("code", "user")}


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("Event\n", "Events\n", "no section has this title: Events"),
        ("zset    pop", "heap    pop", "under Keys, this is not understood: free"),
        ("epoch      int", "epoch      number", "under Args, this is not understood: epoch"),
        ("ok(code", "ok((code", "under Replies, the first that applies, this is not understood: ok"),
        ("free       zset", "free?      zset", "free: only the last key may be left out or a list"),
        ("free       zset", "free…      zset", "free: only the last key may be left out or a list"),
        ("user_id    text", "user_id…   text", "a list must not stand before one that is none"),
        ("user_id ", "free ", "free stands in the header twice"),
        ("user_id ", "from ", "from is no name for a parameter"),
        ("  gone\n", "  locked\n", "locked stands in the header twice"),
    ],
)
def test_a_header_that_is_not_understood_is_refused(old: str, new: str, complaint: str) -> None:
    assert old in HEADER
    with pytest.raises(ContractError) as refusal:
        contract(HEADER.replace(old, new))
    assert f"take_code: {complaint}" in str(refusal.value) or complaint in str(refusal.value)


def test_a_file_is_split_at_its_header() -> None:
    text = f"#!lua flags=no-writes\n--[[\n{HEADER}\n]]\nreturn 1\n"
    assert split_source("take_code", text) == ("#!lua flags=no-writes", HEADER, "return 1\n")
    with pytest.raises(ContractError, match="take_code: the file does not begin"):
        split_source("take_code", text.removeprefix("#!lua"))


def test_the_body_finds_keys_and_arguments_by_their_names() -> None:
    assert preamble(contract()) == (
        "local meta_key, free_key, idem_key = KEYS[1], KEYS[2], KEYS[3]\n"
        "local epoch, user_id, reference = ARGV[1], ARGV[2], ARGV[3]\n"
    )


def test_lists_become_tables_and_only_the_last_goes_without_its_length() -> None:
    assert preamble(contract(LISTS)) == (
        "local meta_key = KEYS[1]\n"
        "local locks_keys = {}\n"
        "for i = 2, #KEYS do locks_keys[i - 2 + 1] = KEYS[i] end\n"
        "local epoch = ARGV[1]\n"
        "local scores, scores_count = {}, tonumber(ARGV[2])\n"
        "for i = 1, scores_count do scores[i] = ARGV[2 + i] end\n"
        "local after_scores = 2 + scores_count + 1\n"
        "local codes = {}\n"
        "for i = after_scores, #ARGV do codes[i - after_scores + 1] = ARGV[i] end\n"
    )


def test_an_operation_says_of_which_class_it_is() -> None:
    read = parse_operation(OPERATION)
    assert read.call_class is CallClass.READ
    assert [key.name for key in read.keys] == ["book", "free", "lock"]
    assert contract().call_class is None


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("Class: read\n\n", "", "names its class"),
        ("Class: read", "Class: write", "not understood: Class: write"),
        ("Class: read", "Class: read\nClass: grow", "not understood: Class: grow"),
        ("  book ", "  meta ", "meta is the call's"),
        ("  book ", "  events ", "events is the call's"),
        ("  tenant_id", "  epoch", "epoch is the call's"),
        ("  tenant_id", "  seen_seq", "seen_seq is the call's"),
        ("Keys\n", "Keys\nClass: read\n", "no section has this title: Class: read"),
    ],
)
def test_an_operation_that_is_not_understood_is_refused(old: str, new: str, complaint: str) -> None:
    assert old in OPERATION
    with pytest.raises(ContractError, match=complaint):
        parse_operation(OPERATION.replace(old, new))


def test_the_file_of_an_operation_is_split_at_its_header() -> None:
    text = f"--[[\n{OPERATION}\n]]\nreturn 1\n"
    assert split_operation("look_up", text) == (OPERATION, "return 1\n")
    with pytest.raises(ContractError, match="look_up: the file does not begin"):
        split_operation("look_up", "#!lua\n" + text)


def test_an_operation_finds_its_keys_and_arguments_by_their_names() -> None:
    assert operation_preamble(parse_operation(OPERATION)) == (
        "local book_key, free_key = KEYS[sent[at + 1]], KEYS[sent[at + 2]]\n"
        "local tenant_id, codes = sent[at + 4], sent[at + 5]\n"
        "local lock_keys = {}\n"
        "for i, k in ipairs(sent[at + 3]) do lock_keys[i] = KEYS[k] end\n"
    )


def test_a_section_finds_its_own_in_front_of_its_operations() -> None:
    assert section_preamble(contract()) == (
        "local meta_key, free_key, idem_key = KEYS[sent[at + 0]], KEYS[sent[at + 1]], KEYS[sent[at + 2]]\n"
        "local epoch, user_id, reference = sent[at + 3], sent[at + 4], sent[at + 5]\n"
        "at = at + 6\n"
    )


def test_a_key_that_is_left_out_is_number_0_and_so_nil() -> None:
    text = OPERATION.replace("  lock…      string  read; one for each code", "  idem?      string  read, write")
    assert operation_preamble(parse_operation(text)) == (
        "local book_key, free_key, idem_key = KEYS[sent[at + 1]], KEYS[sent[at + 2]], KEYS[sent[at + 3]]\n"
        "local tenant_id, codes = sent[at + 4], sent[at + 5]\n"
    )


def test_a_command_is_packed_in_the_order_of_the_header() -> None:
    pack = packer(contract(), "5ha")
    assert pack(user_id="ann", epoch=4, free="f", meta="m", idem="i", reference="till 3") == (
        "EVALSHA", "5ha", 3, "m", "f", "i", 4, "ann", "till 3",
    )  # fmt: skip


@pytest.mark.parametrize("left_out", [{}, {"idem": None}])
def test_what_may_be_left_out_is_left_out(left_out: dict[str, None]) -> None:
    pack = packer(contract(), "5ha")
    assert pack(meta="m", free="f", epoch=4, user_id="ann", **left_out) == (
        "EVALSHA", "5ha", 2, "m", "f", 4, "ann", "",
    )  # fmt: skip


def test_lists_are_packed_with_their_lengths() -> None:
    pack = packer(contract(LISTS), "5ha")
    assert pack(meta="m", locks=["a", "b"], epoch=4, scores=[7, 8], codes=["A-1", "B-2"]) == (
        "EVALSHA", "5ha", 3, "m", "a", "b", 4, 2, 7, 8, "A-1", "B-2",
    )  # fmt: skip
    assert pack(meta="m", locks=[], epoch=4, scores=[], codes=()) == ("EVALSHA", "5ha", 1, "m", 4, 0)


@pytest.mark.parametrize(
    "wrong", [{"meta": "m"}, {"meta": "m", "free": "f", "epoch": 4, "user_id": "u", "book": "b"}], ids=["less", "more"]
)
def test_a_wrong_parameter_is_an_error(wrong: dict[str, object]) -> None:
    with pytest.raises(TypeError):
        packer(contract(), "5ha")(**wrong)


def test_a_reply_has_the_names_of_the_header() -> None:
    read = ReplyReader(contract())
    reply = read(["ok", "A-1", "1700", "again"])
    assert (reply.outcome, reply.code, reply.at_ms, reply.note) == ("ok", "A-1", "1700", "again")
    assert reply == ("ok", "A-1", "1700", "again")
    assert read(["ok", "A-1", "1700"]).note == ""
    assert read(["locked", 250]).retry_after_ms == 250
    assert read(["gone"]).outcome == "gone"


def test_each_outcome_has_its_own_names() -> None:
    reply = ReplyReader(contract())(["gone"])
    with pytest.raises(AttributeError):
        _ = reply.code


@pytest.mark.parametrize("raw", [[], ["done"], ["ok", "A-1"], ["gone", "A-1"], ["ok", "A-1", "1700", "again", "more"]])
def test_a_reply_that_the_header_does_not_list_is_an_error_without_its_values(raw: list[str]) -> None:
    with pytest.raises(UnexpectedReply) as error:
        ReplyReader(contract())(raw)
    assert "A-1" not in str(error.value)
