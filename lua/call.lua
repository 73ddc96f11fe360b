--[[
call: operations on shards of this server, each decided as if it had come alone. This file and the operations
(lua/operations/) are one library of Redis functions: one function for each class of operations. Redis judges memory, disk
and role once for a whole function, by its flags. A library is compiled once; a script makes its functions anew each time
it runs, which took a third of the time of a call with one operation (docs/adr/0016-functions.md).

A section is one shard's part of the call. Its operations are decided one after the other: deciding only reads, through what
the section itself is about to write. Then comes one entry of the stream, the first write of all; then seq and tip; then what
the operations have decided, in bulk. Redis never takes a write back. In any other order, an operation that fails half-way
would leave writes behind without an event, or take the whole call with it.

An operation that raises while it decides has no part in the entry. A key of another type is damage: the shard is put in
doubt when the section is done. An error after the entry was made puts it in doubt, too. The ledger gets the entry, and the
recovery makes Redis agree with it.

`sections` is the msgpack of a list. A section is [meta, events, epoch, seen_seq, tip, [operation, …]], and an operation
[name, key, …, argument, …] in the order of its header. A key is its place in KEYS, 0 for one that is left out.

The reply has one item for each section, in their order: ["ok", seq, tip, [reply, …], entry], where entry is the one that the
section made, as [n, after, at_ms, events], and is left out when it made none; ["suspect", why], and nothing was done: as the
fence found it, or `events` when the stream took no entry; or ["unknown"] after an error behind the entry. An operation that
raised replies ["error", word], with the first word of Redis's error.

Keys
  keys…     any     read, write; each key of the operations once

Args
  sections  text
]]
-- include: book
-- include: clock
-- include: fence
-- include: server
-- include: overlay
-- include: log
-- include: apply
-- What belongs to one call: `run_call` begins it anew.
local KEYS, now_ms, at_ms, meta, pool_look
local operations = {read = {}, grow = {}, keep = {}}

-- operations

-- The first word of an error that Redis raised, as `WRONGTYPE`; `ERR` of any other.
local function word_of(problem)
  return string.match(type(problem) == "table" and problem.err or problem, "^%-?(%u+) ") or "ERR"
end

-- Let nobody decide anything in the shard until its owner has recovered it.
local function doubt(meta_key)
  redis.call("HSET", meta_key, "epoch", "doubt", "was", meta.epoch)
end

local function decide(class, ops)
  local replies, damaged = {}, false
  for i, op in ipairs(ops) do
    local whole, reply = pcall(operations[class][op[1]], op)
    if not whole then
      local word = word_of(reply)
      damaged = damaged or word == "WRONGTYPE"
      reply = {"error", word}
    end
    replies[i] = reply
  end
  return replies, damaged
end

local function run_section(class, section)
  local meta_key, events_key, epoch, seen_seq, tip, ops = KEYS[section[1]], KEYS[section[2]], unpack(section, 3)
  local whole, refusal
  whole, refusal, meta = pcall(fence, meta_key, epoch, seen_seq)
  if not whole then
    return {"suspect", "meta"} -- of another type: one shard's trouble is no other's
  end
  if refusal then
    return refusal
  end
  begin_section()
  pool_look = #ops
  local replies, damaged = decide(class, ops)
  local entry
  if class ~= "read" then
    whole, entry = pcall(log_events, meta_key, events_key, meta, tip, at_ms)
    if not whole then
      doubt(meta_key)
      return {"suspect", "events"}
    end
    if not pcall(apply_writes) then
      doubt(meta_key)
      return {"unknown"}
    end
    if damaged then
      doubt(meta_key)
    end
  end
  return {"ok", meta.seq, meta.tip, replies, entry or nil}
end

local function run_call(class, keys, sections)
  KEYS = keys
  forget_replication()
  begin_books()
  now_ms, at_ms = read_clock()
  local replies = {}
  for i, section in ipairs(cmsgpack.unpack(sections)) do
    replies[i] = run_section(class, section)
  end
  return replies
end

