"""Functions of a script are put where they are called, and do there what they would do when called."""

from __future__ import annotations

import pytest

from coupon_svc.redis.inline import InlineError, inline, number_fields

REFUSE = """-- A comment: return {"no"}
local function refuse_if_shut(book, now_ms)
  if book == "shut" then  -- "--" in a string is none
    return {"book_closed"}
  end
  if now_ms > 5 then
    return {"book_expired",
      now_ms}
  end
end
"""
READ = """local function read_clock()
  local now_ms = redis.call("TIME")[1]
  return now_ms, "text -- of it"
end
"""


def test_results_go_to_the_targets_and_a_refusal_leaves_the_function() -> None:
    assert inline(REFUSE + 'local refusal = refuse_if_shut(book, 7)\nreturn refusal or {"ok"}\n') == (
        "local _1\n"
        "do\n"
        "local now_ms = 7\n"
        "repeat\n"
        'if book == "shut" then\n'
        '_1 = {"book_closed"}\n'
        "break\n"
        "end\n"
        "if now_ms > 5 then\n"
        '_1 = {"book_expired",\n'
        "now_ms}\n"
        "break\n"
        "end\n"
        "until true\n"
        "end\n"
        "local refusal = _1\n"
        'return refusal or {"ok"}\n'
    )


def test_targets_that_exist_are_assigned_and_more_than_one_may_be_returned() -> None:
    lua = inline(READ + "local now_ms, at_ms\nnow_ms, at_ms = read_clock()\n")
    assert '_1, _2 = now_ms, "text -- of it"\n' in lua
    assert lua.endswith("end\nnow_ms, at_ms = _1, _2\n")


def test_a_call_whose_results_nobody_takes_is_a_block() -> None:
    assert inline("local function keep(key)\n  redis.call('SET', key)\nend\nkeep(idem_key)\n") == (
        "do\nlocal key = idem_key\nredis.call('SET', key)\nend\n"
    )


def test_a_call_that_is_returned_returns_from_the_script() -> None:
    assert inline("local function done(code)\n  return {'ok', code}\nend\nreturn done(code)\n") == (
        "do\nreturn {'ok', code}\nend\n"
    )


def test_functions_call_each_other() -> None:
    lua = inline(READ + "local function now()\n  local now_ms = read_clock()\n  return now_ms\nend\nlocal at = now()\n")
    assert "read_clock" not in lua
    assert lua.index("_2 = now_ms") < lua.index("_1 = now_ms")


def test_the_last_parameter_may_take_any_number_of_arguments() -> None:
    event = 'local function event(key, ...)\n  redis.call("XADD", key, "a" .. "b", ...)\nend\n'
    assert inline(event + 'event(key, "code", code,\n  "user", "u")\n') == (
        'do\nredis.call("XADD", key, "a" .. "b", "code", code, "user", "u")\nend\n'
    )


def test_a_parameter_that_the_function_changes_is_a_copy() -> None:
    count = "local function count(uses)\n  uses = uses + 1\n  return uses\nend\n"
    assert "local uses = uses\n" in inline(count + "local more = count(uses)\n")


RECORD = "-- record: book = tenant_id, lent\n"


def test_the_fields_of_a_record_become_numbers() -> None:
    lua = (
        RECORD
        + 'local book = redis.call("HMGET", key, BOOK_FIELDS)\nreturn book.lent + note.book.lent + book.tenant_id\n'
    )
    assert number_fields(lua) == RECORD + (
        'local book = redis.call("HMGET", key, "tenant_id", "lent")\nreturn book[2] + note.book.lent + book[1]\n'
    )


def test_a_field_that_the_record_does_not_have_is_refused() -> None:
    with pytest.raises(InlineError, match="book has no field lend"):
        number_fields(RECORD + "return book.lend\n")


@pytest.mark.parametrize(
    ("lua", "complaint"),
    [
        (READ + "local a = read_clock() + 1\n", "read_clock is called within an expression"),
        (READ + "if read_clock() then\nend\n", "read_clock is called within an expression"),
        (READ + "local a = read_clock(1)\n", "read_clock is called with 1 arguments, and takes 0"),
        ("local function f()\n  for i = 1, 2 do\n  end\nend\n", "f holds a loop or a function"),
        ("local function f()\n  local a = f()\nend\nf()\n", "f calls itself"),
        (READ + "local a = read_clock(\n", "a bracket is never closed"),
    ],
)
def test_what_cannot_be_put_in_place_is_refused(lua: str, complaint: str) -> None:
    with pytest.raises(InlineError) as refusal:
        inline(lua)
    assert complaint in str(refusal.value)
