"""The header of every Lua script holds: the body does what it says of keys, replies and events. No server is needed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import coupon_svc
from coupon_svc.domain.events import COUPON_ASSIGNED, COUPON_CONFIRMED, COUPON_REDEEMED
from coupon_svc.redis.scripts import CONSTANTS, Library, OperationSource, Script, Scripts, read_operation, read_script
from coupon_svc.resources import resource_folder
from tests.lint.lua_headers import (
    INTERNAL_WORDS,
    OWNER_WORDS,
    Body,
    body_of,
    complaints,
    functions_of,
    returned_words,
    sender,
    without_comments,
)

LUA = resource_folder("lua")
OPERATIONS = list(Scripts().operations.values())
LIBRARY = Scripts().library
PARTS = {"call", "publish_positions", *(operation.name for operation in OPERATIONS)}
"""Parts of a call, and what is about several shards: no check takes these for the script of one shard."""
SCRIPTS = [script for script in Scripts() if script.name not in PARTS]
BOTH: list[Script | OperationSource] = [*SCRIPTS, *OPERATIONS]

# Stands for the harm a trim by length does: it forgets the oldest events, whether or not the ledger has them.
TRIM_BY_LENGTH = re.compile("(?i)maxlen")


def named(script: Script | OperationSource) -> str:
    return script.name


@pytest.mark.parametrize("script", BOTH, ids=named)
def test_head_and_body_agree(script: Script | OperationSource) -> None:
    assert complaints(script) == []


def test_every_script_is_looked_at() -> None:
    assert {script.name for script in SCRIPTS} == {path.stem for path in LUA.glob("*.lua")} - PARTS
    assert {operation.name for operation in OPERATIONS} == {path.stem for path in LUA.glob("operations/*.lua")}
    assert "redeem_coupon" in {operation.name for operation in OPERATIONS}


def test_every_file_calls_what_it_includes_and_every_include_is_included() -> None:
    shared = {path.stem: path.read_text() for path in LUA.glob("include/*.lua")}
    included = set()
    for path in LUA.rglob("*.lua"):
        source = path.read_text()
        names = re.findall(r"^-- include: (\w+)$", source, re.MULTILINE)
        included |= set(names)
        code = without_comments(source)
        functions = {name: functions_of(without_comments(shared[name]))[0] for name in names}
        idle = [name for name in names if name != "overlay" and not any(one in code for one in functions[name])]
        assert idle == [], path.name
    assert included == shared.keys()


def test_a_call_asks_the_fence_before_all_else() -> None:
    loop = (LUA / "call.lua").read_text().partition("local function run_section")[2]
    assert loop.index("fence, meta_key, epoch, seen_seq)") < loop.index("begin_section()")


def test_a_section_replies_what_the_header_of_the_call_says() -> None:
    functions, _ = functions_of(without_comments((LUA / "call.lua").read_text()))
    words = returned_words(Body({}, functions["run_section"].text))
    assert set(words) == {line.word for line in Scripts().section.replies}


def test_a_position_is_published_behind_the_fence_of_each_shard() -> None:
    publish = (LUA / "publish_positions.lua").read_text().partition("local function publish(")[2]
    assert publish.index("owner_fence(meta_key, epoch, generation)") < publish.index("redis.call(")


def test_what_an_operation_tells_of_is_written() -> None:
    """Each table of the overlay that somebody fills is read where all is written."""
    overlay, apply, log = ((LUA / "include" / f"{name}.lua").read_text() for name in ("overlay", "apply", "log"))
    tables = re.search(r"^local (events, .*)$", overlay, re.MULTILINE)
    assert tables is not None
    for table in set(tables[1].split(", ")) - {"pools"}:
        assert f"({table})" in (log if table == "events" else apply), table


def test_every_script_has_the_fence_of_who_sends_it_before_all_else() -> None:
    """Two find out by themselves: open_shard comes with a newer generation, shut_shard whatever the epoch."""
    fences = {"api": "fence", "owner": "owner_fence", "recoverer": "refuse_unless_recovering"}
    for script in SCRIPTS:
        body = body_of(script)
        assert returned_words(body)[0] in ("suspect", "fenced", "foreign"), script.name
        if script.name not in ("open_shard", "shut_shard"):
            fence = fences[sender(script.contract)]
            called = re.match(
                r"\s*(?:local \w+\s+)*local refusal(?:, meta)? = (\w+)\(meta_key, (.*?)\)(?: or read_book\(.*\))?\n",
                body.main,
            )
            assert called is not None, script.name
            assert called[1] == fence, script.name
            assert called[2].split(", ") == [arg.name for arg in script.contract.args[: len(called[2].split(", "))]]
            assert body.main[called.end() :].startswith("if refusal then\n  return refusal\nend\n"), script.name


def test_every_internal_word_is_a_reply() -> None:
    words: dict[bool, set[str]] = {True: set(), False: set()}
    for script in BOTH:
        words[sender(script.contract) == "api"] |= {line.word for line in script.contract.replies}
    assert set(INTERNAL_WORDS) <= words[True]
    assert set(OWNER_WORDS) - {"clock"} == words[False]


def test_who_sends_a_script_is_known_by_its_arguments() -> None:
    names = {script.name for script in SCRIPTS if sender(script.contract) == "recoverer"}
    assert names == {"shut_shard", "wipe_keys", "restore_book", "restore_coupons", "restore_idem", "certify_shard"}
    names = {script.name for script in SCRIPTS if sender(script.contract) == "owner"}
    assert names == {"open_shard", "put_book", "load_codes"}


def test_events_are_those_the_ledger_knows() -> None:
    assert {name for script in OPERATIONS for name in script.contract.events} == {
        COUPON_ASSIGNED,
        COUPON_CONFIRMED,
        COUPON_REDEEMED,
    }


def test_a_constant_is_defined_in_python_alone() -> None:
    """No Lua has a number of its own above 1,000, by which the clock is read."""
    both: list[Script | Library] = [*SCRIPTS, LIBRARY]
    for name, value in CONSTANTS.items():
        assert any(f"local {name} = {value}\n" in lua.source for lua in both), name
    for lua in both:
        assert lua.source.count("local IDEMPOTENCY_MS =") <= 1, lua.name
        assert set(re.findall(r"\b\d{4,}\b", without_comments(lua.body))) <= {"1000"}, lua.name


def test_nothing_trims_a_stream_by_its_length() -> None:
    assert TRIM_BY_LENGTH.search('redis.call("XADD", events_key, "MAXLEN", "~", 1000, position, "event")')
    for path in LUA.rglob("*.lua"):
        assert not TRIM_BY_LENGTH.search(path.read_text()), path.name
    for path in Path(coupon_svc.__file__).parent.rglob("*.py"):
        lines = [line for line in path.read_text().splitlines() if "MAXLEN" in line or re.search(r"\bmaxlen=", line)]
        assert all("deque(" in line for line in lines), path.name


# --- the check can fail

SOUND = """--[[
take_code: a sample.

Prose may say anything, KEYS[9] and `return` too.

Class: grow

Keys
  free      zset    read, remove
  idem      string  read, write
  lock…     string  read; one for each code

Args
  user_id   text
  codes…    text  in the order of the locks

Replies, the first that applies
  suspect(why)      no `counts`
  replayed(code)
  idempotency_key_reused
  book_closed
  locked(retry_after_ms)
  renewed(code)
  ok(code)

Event
  coupon_assigned(code, user)
]]
-- include: pool
-- include: event
local refusal, code = next_free(free_key, user_id)
if refusal then
  return refusal
end
if redis.call("GET", idem_key) then  -- a comment may say return {"nothing"} and ARGV[8]
  local answer = cjson.decode(redis.call("GET", idem_key))
  if answer[1] ~= user_id then
    return {"idempotency_key_reused"}
  end
  answer[1] = "replayed"
  return answer
end
if meta.status == "closed" then
  return {"book_closed"}
end
for i, lock_key in ipairs(lock_keys) do
  if redis.call("PTTL", lock_key) > 0 and codes[i] ~= "user_id" then
    return {"locked", redis.call("PTTL", lock_key)}
  end
end
make_event(meta, "coupon_assigned", code,
  user_id)
take(free_key, code)
remember(idem_key, code)
return {meta.status and "renewed" or "ok",
  code}
"""
POOL = """local function next_free(free_key, user_id)
  local code = redis.call("ZRANGE", free_key, 0, 0)[1]
  if not code or user_id == "" then
    return {"suspect", "counts"}
  end
  return nil, code
end
"""
EVENT = """local function make_event(meta, ...)
  events[#events + 1] = {...}
end
"""


def sample(folder: Path, source: str, pool: str = POOL) -> OperationSource:
    (folder / "include").mkdir()
    (folder / "include" / "pool.lua").write_text(pool)
    (folder / "include" / "event.lua").write_text(EVENT)
    (folder / "operations").mkdir()
    (folder / "operations" / "take_code.lua").write_text(source)
    return read_operation(folder / "operations" / "take_code.lua")


def test_a_sound_operation_has_no_complaints(tmp_path: Path) -> None:
    assert complaints(sample(tmp_path, SOUND)) == []


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("take_code: a", "give_code: a", "the header is about give_code"),
        ("-- include: pool", "  -- include: pool", "an include was not replaced"),
        # keys and arguments
        ('"GET", idem_key', '"GET", KEYS[2]', "KEYS has a name"),
        ("codes[i]", "ARGV[i]", "ARGV has a name"),
        ("meta.status ==", "meta[2] ==", "meta[2] has a name"),
        ("  user_id   text", "  user_id   text\n  idle      text", "idle stands in the header and is not used"),
        (
            "  idem      string",
            "  idle      string  read\n  idem      string",
            "idle_key stands in the header and is not",
        ),
        (
            "next_free(free_key, user_id",
            "next_free(idem_key, user_id",
            "next_free is called with idem_key as its free_key",
        ),
        (
            "next_free(free_key, user_id",
            "next_free(free_key, idem_key",
            "next_free is called with idem_key as its user_id",
        ),
        # what is done to a key
        ("read, remove", "read", "free: the body does remove, and the header does not say so"),
        ("read, remove", "read, remove, add", "free: the header says add, and the body does not"),
        ("string  read, write", "string  read", "idem: the body does write, and the header does not say so"),
        (
            "zset    read",
            "set     read",
            "take is called on free_key, which is not one of the keys, or of another type",
        ),
        ("string  read, write", "hash    read, write", "GET is called on idem, which the header calls a hash"),
        ('"PTTL"', '"SPOP"', "SPOP is not among the commands a script may call"),
        ('"GET", idem_key', '"KEYS", "*"', "KEYS must not be called"),
        ('redis.call("GET"', 'redis.pcall("SCAN"', "SCAN must not be called"),
        ('"GET"', '"EVAL"', "EVAL must not be called"),
        ('"GET", idem_key', '"GET", "cb:idem"', 'GET is called on "cb:idem", which is not one of the keys'),
        (
            "take(free_key",
            "take(idem_key",
            "take is called on idem_key, which is not one of the keys, or of another type",
        ),
        # replies
        ("  book_closed\n", "", "book_closed is returned and does not stand in the header"),
        ('return {"book_closed"}', "error()", "book_closed stands in the header and is never returned"),
        ("  replayed(code)\n", "", "replayed is returned and does not stand in the header"),
        ("  renewed(code)\n", "", "renewed is returned and does not stand in the header"),
        ('answer[1] = "replayed"', "", "replayed stands in the header and is never returned"),
        ('return {"book_closed"}', "return {meta.status}", "a return does not begin with a literal word"),
        ('return {"book_closed"}', "return meta", "meta is returned, which is neither a refusal nor an earlier answer"),
        ("book_closed", "book_shut", "book_shut is neither an Outcome nor an internal word"),
        ("book_closed", "backlog_full", "Outcome has them in the order idempotency_key_reused, locked, backlog_full"),
        ("book_closed\n  locked(retry_after_ms)", "locked(retry_after_ms)\n  book_closed", "the body in suspect, "),
        ("no `counts`", "`counts` or `lost`", "the header says that suspect carries lost"),
        ("no `counts`", "no counts", "suspect carries counts, and the header does not say so"),
        ('{"book_closed"}', '{"book_closed", 1}', "book_closed is returned with 1 fields, and the header names 0"),
        ("  locked(retry_after_ms)", "  locked", "locked is returned with 1 fields, and the header names 0"),
        ("  ok(code)", "  ok(code, at_ms)", "ok is returned with 1 fields, and the header names 2"),
        # events
        ("Event\n  coupon_assigned(code, user)\n", "", "coupon_assigned is made and does not stand in the header"),
        ("  coupon_assigned(", "  coupon_given(", "coupon_given stands in the header and is never made"),
        ("(code, user)\n", "(code)\n", "coupon_assigned: the header has the fields code; the body code, user"),
        (
            "(code, user)\n",
            "(user, code)\n",
            "coupon_assigned: the header has the fields user, code; the body code, user",
        ),
        ('"coupon_assigned", code', "kind, code", "an event is not (meta, kind, value, …)"),
        ("make_event(meta", 'redis.call("XADD", idem_key', "added without make_event"),
    ],
)
def test_a_broken_script_is_complained_about(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    assert old in SOUND
    found = complaints(sample(tmp_path, SOUND.replace(old, new)))
    assert any(complaint in text for text in found), found


def test_what_stands_in_an_include_counts(tmp_path: Path) -> None:
    broken = POOL.replace('{"suspect", "counts"}', '{"doubtful"}').replace('"ZRANGE", free_key', '"ZSCAN", free_key')
    found = complaints(sample(tmp_path, SOUND, broken))
    assert "doubtful is returned and does not stand in the header" in found
    assert "suspect stands in the header and is never returned" in found
    assert "ZSCAN is not among the commands a script may call" in found


def test_a_key_has_its_own_name_in_a_function_too(tmp_path: Path) -> None:
    found = complaints(sample(tmp_path, SOUND, POOL.replace("free_key", "pool_key")))
    assert "ZRANGE is called on pool_key, which is not one of the keys" in found
    assert "next_free is called with free_key as its pool_key" in found


RECOVERY = """#!lua flags=allow-oom
--[[
drop_keys: a sample of what a recovery sends.

Keys
  meta        hash    read
  free        zset    delete
  quarantine  set     delete, add, remove, read
  doomed…     any     delete; 1..500

Args
  generation  int   of the owner
  codes…      text

Replies, the first that applies
  fenced(how)  not shut; `gone`: not here either
  ok
]]
if redis.call("HGET", meta_key, "generation") ~= generation then
  return {"fenced", "gone"}
end
redis.call("UNLINK", free_key, quarantine_key)
for _, doomed_key in ipairs(doomed_keys) do
  redis.call("UNLINK", doomed_key)
end
for _, code in ipairs(codes) do
  if redis.call("SISMEMBER", quarantine_key, code) == 0 then
    redis.call("SADD", quarantine_key, code)
    redis.call("SREM", quarantine_key, code)
  end
end
return {"ok"}
"""


def recovery_sample(folder: Path, source: str) -> Script:
    (folder / "drop_keys.lua").write_text(source)
    return read_script(folder / "drop_keys.lua")


def test_a_sound_script_of_a_recovery_has_no_complaints(tmp_path: Path) -> None:
    assert complaints(recovery_sample(tmp_path, RECOVERY)) == []


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("generation  int", "term        int", "the first arguments must be epoch, and seen_seq (API) or generation"),
        ("delete, add", "delete", "quarantine: the body does add, and the header does not say so"),
        (", remove", "", "quarantine: the body does remove, and the header does not say so"),
        (", read\n", "\n", "quarantine: the body does read, and the header does not say so"),
        ("set     delete, add", "set     add", "quarantine: the body does delete, and the header does not say so"),
        ("zset    delete", "zset    delete, read", "free: the header says read, and the body does not"),
        (
            '"UNLINK", free_key, quarantine_key',
            '"UNLINK", free_key, "cb:x"',
            'UNLINK is called on "cb:x", which is not one',
        ),
        ('"UNLINK", free_key', '"SADD", free_key', "SADD is called on free, which the header calls a zset"),
        ('"UNLINK", doomed_key', '"HGET", doomed_key', "HGET is called on doomed, which the header calls a any"),
        ('"SADD"', '"SPOP"', "SPOP is not among the commands a script may call"),
        ('"SADD"', '"SMEMBERS"', "SMEMBERS is not among the commands a script may call"),
        ("; `gone`: not here either", "", "fenced carries gone, and the header does not say so"),
        ("fenced", "locked", "locked is not among the words for an owner"),
        ("ok", "done", "done is not among the words for an owner"),
    ],
)
def test_a_broken_script_of_a_recovery_is_complained_about(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    assert old in RECOVERY
    found = complaints(recovery_sample(tmp_path, RECOVERY.replace(old, new)))
    assert any(complaint in text for text in found), found
