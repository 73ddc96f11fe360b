"""The head of every Lua script holds: keys, arguments, replies and events are those of the body. No server is needed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import coupon_svc
from coupon_svc.domain.events import COUPON_ASSIGNED, COUPON_REDEEMED
from coupon_svc.redis.scripts import Script, Scripts, read_script
from coupon_svc.resources import resource_folder
from tests.lua_headers import INTERNAL_WORDS, OWNER_WORDS, Head, complaints, read_head, returned_words, sender

LUA = resource_folder("lua")
SCRIPTS = list(Scripts())

# Stands for the harm a trim by length does: it forgets the oldest events, whether or not the ledger has them.
TRIM_BY_LENGTH = re.compile("(?i)maxlen")


def named(script: Script) -> str:
    return script.name


def head_of(script: Script) -> Head:
    return read_head(script.source.partition("--[[\n")[2].partition("\n]]\n")[0])


@pytest.mark.parametrize("script", SCRIPTS, ids=named)
def test_head_and_body_agree(script: Script) -> None:
    assert complaints(script) == []


def test_every_script_is_looked_at() -> None:
    assert {script.name for script in SCRIPTS} == {path.stem for path in LUA.glob("*.lua")}
    assert "redeem_coupon" in {script.name for script in SCRIPTS}


def test_every_include_is_included() -> None:
    sources = "".join(path.read_text() for path in LUA.glob("*.lua"))
    assert set(re.findall(r"^-- include: (\w+)$", sources, re.MULTILINE)) == {p.stem for p in LUA.glob("include/*.lua")}


def test_every_script_compares_the_epoch_before_all_else() -> None:
    for script in SCRIPTS:
        body = script.source.partition("\n]]\n")[2]
        assert returned_words(body)[0] in ("suspect", "fenced", "foreign"), script.name


def test_every_script_has_the_fence_of_who_sends_it_before_anything_is_written() -> None:
    """Two find out by themselves: open_shard comes with a newer generation, shut_shard whatever the epoch."""
    fences = {"api": "fence", "owner": "owner", "recoverer": "recoverer"}
    for script in SCRIPTS:
        if script.name in ("open_shard", "shut_shard"):
            continue
        fence = (LUA / "include" / f"{fences[sender(head_of(script))]}.lua").read_text()
        before, found, _ = script.source.partition("\n]]\n")[2].partition(fence)
        assert found, script.name
        assert "redis.call" not in before, script.name


def test_every_internal_word_is_a_reply() -> None:
    heads = [head_of(script) for script in SCRIPTS]
    assert set(INTERNAL_WORDS) <= {word for head in heads if sender(head) == "api" for word in head.replies}
    assert set(OWNER_WORDS) == {word for head in heads if sender(head) != "api" for word in head.replies}


def test_who_sends_a_script_is_known_by_its_arguments() -> None:
    names = {script.name for script in SCRIPTS if sender(head_of(script)) == "recoverer"}
    assert names == {"shut_shard", "wipe_keys", "restore_book", "restore_coupons", "restore_idem", "certify_shard"}
    names = {script.name for script in SCRIPTS if sender(head_of(script)) == "owner"}
    assert names == {"open_shard", "publish_position", "put_book", "load_codes"}


def test_events_are_those_the_ledger_knows() -> None:
    heads = [head_of(script) for script in SCRIPTS]
    assert {name for head in heads for name in head.events} == {COUPON_ASSIGNED, COUPON_REDEEMED}


def test_nothing_trims_a_stream_by_its_length() -> None:
    assert TRIM_BY_LENGTH.search('redis.call("XADD", KEYS[6], "MAXLEN", "~", 1000, position, "event")')
    for path in LUA.rglob("*.lua"):
        assert not TRIM_BY_LENGTH.search(path.read_text()), path.name
    for path in Path(coupon_svc.__file__).parent.rglob("*.py"):
        lines = [line for line in path.read_text().splitlines() if "MAXLEN" in line or re.search(r"\bmaxlen=", line)]
        assert all("deque(" in line for line in lines), path.name


# --- the check can fail

SOUND = """#!lua
--[[
take_code: a sample.

Prose may say anything, KEYS[9] and `return` too.

Keys
  KEYS[1] meta      hash    read, count
  KEYS[2] free      zset    pop
  KEYS[3] events    stream  append
  KEYS[4] idem      string  read, write; only with an Idempotency-Key
  KEYS[5…] lock     string  read; one for each code

Args
  ARGV[1] epoch     int
  ARGV[2] seen_seq  int   the highest seq
  ARGV[3] user_id   text
  ARGV[4…] code     text  in the order of the locks

Replies, the first that applies
  suspect           another epoch
  replayed          code
  idempotency_key_reused
  book_closed
  locked            retry_after_ms
  renewed           code
  ok                code

Event
  coupon_assigned    code, user
]]
local idem_key, user_id = KEYS[4], ARGV[3]
-- include: fence
if redis.call("GET", idem_key) then  -- a comment may say return {"nothing"} and ARGV[8]
  local answer = cjson.decode(redis.call("GET", idem_key))
  if answer[1] ~= user_id then
    return {"idempotency_key_reused"}
  end
  answer[1] = "replayed"
  return answer
end
if meta[2] == "closed" then
  return {"book_closed"}
end
for i = 4, #ARGV do
  if redis.call("PTTL", KEYS[i + 1]) > 0 and ARGV[i] ~= "user_id" then
    return {"locked", redis.call("PTTL", KEYS[i + 1])}
  end
end
local code = redis.call("ZPOPMIN", KEYS[2])[1]
redis.call("HINCRBY", KEYS[1], "seq", 1)
redis.call("XADD", KEYS[3], ARGV[1] .. "-" .. string.format("%d", 1), "event", "coupon_assigned", "code", code,
  "user", user_id)
redis.call("SET", idem_key, cjson.encode({"", code}), "PX", 86400000)
return {meta[2] and "renewed" or "ok",
  code}
"""
FENCE = """local meta = redis.call("HMGET", KEYS[1], "epoch", "status")
if meta[1] ~= ARGV[1] or ARGV[2] == "" then
  return {"suspect"}
end
"""


def sample(folder: Path, source: str, fence: str = FENCE) -> Script:
    (folder / "include").mkdir()
    (folder / "include" / "fence.lua").write_text(fence)
    (folder / "take_code.lua").write_text(source)
    return read_script(folder / "take_code.lua")


def test_a_sound_script_has_no_complaints(tmp_path: Path) -> None:
    assert complaints(sample(tmp_path, SOUND)) == []


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("#!lua\n", "", "the file does not begin with #!lua and a --[[ comment ]]"),
        ("take_code: a", "give_code: a", "the head is about give_code"),
        ("-- include: fence", "  -- include: fence", "an include was not replaced"),
        ("Event\n", "Events\n", "no section has this title: Events"),
        ("ARGV[2] seen_seq  int ", "ARGV[2] seen_seq  number", "under Args, this is not understood"),
        ("ARGV[2] seen_seq", "ARGV[2] behind", "the first arguments must be epoch, and seen_seq (API) or generation"),
        # keys
        ("KEYS[2] free", "KEYS[3] free", "KEYS: the numbers in the head are [1, 3, 3, 4, 5]"),
        ('"ZPOPMIN", KEYS[2]', '"ZPOPMIN", KEYS[3]', "KEYS[2] stands in the head and is not used"),
        ('"ZPOPMIN", KEYS[2]', '"ZPOPMIN", KEYS[6]', "KEYS[6] is used and does not stand in the head"),
        ("KEYS[5…]", "KEYS[5]", "KEYS[i + 1] is used and the head has no open-ended list"),
        ("KEYS[i + 1]", "KEYS[1]", "KEYS[5…] stands in the head and is not used"),
        ("KEYS[4] idem ", "KEYS[4…] idem", "KEYS: only the last may be open-ended"),
        ("user_id = KEYS[4]", "user_id = ARGV[2]", "KEYS[4] stands in the head and is not used"),
        # arguments
        ("user_id = KEYS[4],", "user_id, idle = KEYS[4], ARGV[2],", "idle = ARGV[3] is never used"),
        ("user_id = KEYS[4], ARGV[3]", 'user_id = KEYS[4], "u"', "ARGV[3] stands in the head and is not used"),
        ('"code", code,\n', '"code", ARGV[4],\n', "ARGV[4] is used and does not stand in the head"),
        ("ARGV[i]", "code", "ARGV[4…] stands in the head and is not used"),
        ("ARGV[4…]", "ARGV[4]", "ARGV[i] is used and the head has no open-ended list"),
        # what is done to a key
        ("read, count", "read", "meta: the body does count, and the head does not say so"),
        ("read, count", "read, count, write", "meta: the head says write, and the body does not"),
        ("zset    pop", "set     pop", "ZPOPMIN is called on free, which the head calls a set"),
        ("zset    pop", "any     pop", "ZPOPMIN is called on free, which the head calls a any"),
        ("zset    pop", "heap    pop", "under Keys, this is not understood"),
        ('"ZPOPMIN"', '"SPOP"', "SPOP is not among the commands a script may call"),
        ('"ZPOPMIN", KEYS[2]', '"KEYS", "*"', "KEYS must not be called"),
        ('redis.call("ZPOPMIN"', 'redis.pcall("SCAN"', "SCAN must not be called"),
        ('"ZPOPMIN"', '"EVAL"', "EVAL must not be called"),
        ('"HINCRBY", KEYS[1]', '"HINCRBY", "cb:meta"', 'HINCRBY is called on "cb:meta", which is not one of KEYS'),
        # replies
        ("  book_closed\n", "", "book_closed is returned and does not stand in the head"),
        ('return {"book_closed"}', "error()", "book_closed stands in the head and is never returned"),
        ("  replayed          code\n", "", "replayed is returned and does not stand in the head"),
        ("  renewed           code\n", "", "renewed is returned and does not stand in the head"),
        ('answer[1] = "replayed"', "", "a return does not begin with a literal word"),
        ('return {"book_closed"}', "return {meta[2]}", "a return does not begin with a literal word"),
        ("  book_closed\n", "  book_closed\n  book_closed\n", "a reply stands in the head twice"),
        ("book_closed", "book_shut", "book_shut is neither an Outcome nor an internal word"),
        ("book_closed", "backlog_full", "Outcome has them in the order idempotency_key_reused, locked, backlog_full"),
        ("book_closed\n  locked            retry_after_ms", "locked\n  book_closed", "the body in suspect, "),
        ("  suspect           another epoch", "  suspect           `lost`", "the head says that suspect carries lost"),
        (
            'return {"book_closed"}',
            'return {"book_closed", "now"}',
            "book_closed carries now, and the head does not say",
        ),
        # events
        ("Event\n  coupon_assigned    code, user\n", "", "coupon_assigned is added and does not stand in the head"),
        ("  coupon_assigned ", "  coupon_given ", "coupon_given stands in the head and is never added"),
        ("code, user\n", "code\n", "coupon_assigned: the head has the fields code; the body code, user"),
        ("code, user\n", "user, code\n", "coupon_assigned: the head has the fields user, code; the body code, user"),
        ('"event", "coupon', '"kind", "coupon', "an XADD is not (key, position, event, name, field, value, …)"),
        ('"code", code,\n', "code,\n", "an XADD is not (key, position, event, name, field, value, …)"),
    ],
)
def test_a_broken_script_is_complained_about(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    assert old in SOUND
    found = complaints(sample(tmp_path, SOUND.replace(old, new)))
    assert any(complaint in text for text in found), found


def test_a_refusal_that_the_script_turns_off_is_none_of_its_replies(tmp_path: Path) -> None:
    refusal = 'if waits_for_ledger and meta[2] ~= "here" then\n  return {"ledger_behind"}\nend\n'
    off, on = (f"{FENCE}local share, waits_for_ledger = 1, {value}\n{refusal}" for value in ("false", "true"))
    (tmp_path / "off").mkdir()
    (tmp_path / "on").mkdir()
    assert complaints(sample(tmp_path / "off", SOUND, off)) == []
    assert "ledger_behind is returned and does not stand in the head" in complaints(sample(tmp_path / "on", SOUND, on))


def test_what_stands_in_an_include_counts(tmp_path: Path) -> None:
    broken = FENCE.replace('{"suspect"}', '{"doubtful"}').replace("ARGV[2]", "ARGV[1]")
    found = complaints(sample(tmp_path, SOUND, broken))
    assert "doubtful is returned and does not stand in the head" in found
    assert "suspect stands in the head and is never returned" in found
    assert "ARGV[2] stands in the head and is not used" in found


RECOVERY = """#!lua flags=allow-oom
--[[
drop_keys: a sample of what a recovery sends.

Keys
  KEYS[1] meta        hash    read
  KEYS[2] free        zset    delete
  KEYS[3] quarantine  set     delete, add, remove, read
  KEYS[4…] doomed     any     delete; 1..500

Args
  ARGV[1] generation  int   of the owner
  ARGV[2…] codes      text

Replies, the first that applies
  fenced     not shut; `gone`: not here either
  ok
]]
if redis.call("HGET", KEYS[1], "generation") ~= ARGV[1] then
  return {"fenced", "gone"}
end
redis.call("UNLINK", KEYS[2], KEYS[3])
for i = 4, #KEYS do
  redis.call("UNLINK", KEYS[i])
end
for i = 2, #ARGV do
  if redis.call("SISMEMBER", KEYS[3], ARGV[i]) == 0 then
    redis.call("SADD", KEYS[3], ARGV[i])
    redis.call("SREM", KEYS[3], ARGV[i])
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
        ("ARGV[1] generation", "ARGV[1] term", "the first arguments must be epoch, and seen_seq (API) or generation"),
        ("delete, add", "delete", "quarantine: the body does add, and the head does not say so"),
        (", remove", "", "quarantine: the body does remove, and the head does not say so"),
        (", read\n", "\n", "quarantine: the body does read, and the head does not say so"),
        ("set     delete, add", "set     add", "quarantine: the body does delete, and the head does not say so"),
        ("zset    delete", "zset    delete, read", "free: the head says read, and the body does not"),
        ('"UNLINK", KEYS[2], KEYS[3]', '"UNLINK", KEYS[2], "cb:x"', 'UNLINK is called on "cb:x", which is not one'),
        ('"UNLINK", KEYS[2], KEYS[3]', '"UNLINK", KEYS[3]', "KEYS[2] stands in the head and is not used"),
        ('"UNLINK", KEYS[2]', '"SADD", KEYS[2]', "SADD is called on free, which the head calls a zset"),
        ('"UNLINK", KEYS[i]', '"HGET", KEYS[i]', "HGET is called on doomed, which the head calls a any"),
        ('"SADD"', '"SPOP"', "SPOP is not among the commands a script may call"),
        ('"SADD"', '"SMEMBERS"', "SMEMBERS is not among the commands a script may call"),
        ("; `gone`: not here either", "", "fenced carries gone, and the head does not say so"),
        ("fenced", "locked", "locked is not among the words for an owner"),
        ("ok", "done", "done is not among the words for an owner"),
    ],
)
def test_a_broken_script_of_a_recovery_is_complained_about(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    assert old in RECOVERY
    found = complaints(recovery_sample(tmp_path, RECOVERY.replace(old, new)))
    assert any(complaint in text for text in found), found
