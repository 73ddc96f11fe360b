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

The call has every key once in KEYS, and one argument: the msgpack of one list, whose values follow each other. Lists in lists
would take Redis longer to read. Those of a section are its keys and arguments, in the order below; then, for each of its
operations, the name, and the keys and arguments in the order of that header. A key is its place in KEYS, 0 for one that is
left out.

The reply is the JSON of a list with one item for each section, in their order, as below. An operation that raised replies
["error", word], with the first word of Redis's error. A text costs Redis less than lists in lists; what JSON cannot say, such
as a number that was made infinite by hand, comes as lists. In the JSON an empty list is `{}`, and a text that is missing is
`false`.

Keys
  meta      hash    read, write
  events    stream  append

Args
  epoch     int
  seen_seq  int   the highest seq of this epoch the caller has seen
  tip       text  of the entry, if the section makes one
  count     int   of its operations

Replies, the first that applies
  suspect(why)  nothing was done: as the fence found it; `meta`: of another type; `events`: the stream took no entry
  unknown       after an error behind the entry
  ok(seq, tip, replies, entry?)  of the shard's last entry; of the operations; entry is [n, after, at_ms, events] of the one that was made
]]
-- include: names
-- include: book
-- include: clock
-- include: fence
-- include: server
-- include: overlay
-- include: log
-- include: apply
-- What belongs to one call: `run_call` begins it anew.
local KEYS, sent, now_ms, at_ms
-- What belongs to one section: what the fence found, and how many codes of a pool are looked at (lua/include/pool.lua).
local meta, pool_look
local operations = {read = {}, grow = {}, keep = {}}

-- The functions of all operations are put in place of the next line (coupon_svc/redis/scripts.py).
-- operations

-- The first word of an error that Redis raised, as `WRONGTYPE`; `ERR` of any other.
local function word_of(problem)
  return string.match(type(problem) == "table" and problem.err or problem, "^%-?(%u+) ") or "ERR"
end

-- Let nobody decide anything in the shard until its owner has recovered it. Where Redis takes not even that, the reply of the
-- section must not be lost with it.
local function doubt(meta_key)
  pcall(redis.call, "HSET", meta_key, "epoch", "doubt", "was", meta.epoch)
end

-- Decide the operations whose values begin at `at`. Returns their replies, and whether a key that they met is damaged.
local function decide(class, at, count)
  local replies, damaged = {}, false
  for i = 1, count do
    local operation = class[sent[at]]
    local whole, reply = pcall(operation.decide, at)
    if not whole then
      local word = word_of(reply)
      damaged = damaged or word == "WRONGTYPE"
      reply = {"error", word}
    end
    replies[i] = reply
    at = at + operation.size
  end
  return replies, damaged
end

-- Where the values of the next section begin.
local function skip(class, at, count)
  for _ = 1, count do
    at = at + class[sent[at]].size
  end
  return at
end

-- Run the section whose operations begin at `at`. Returns its reply.
local function run_section(class, at, meta_key, events_key, epoch, seen_seq, tip, count)
  local whole, refusal
  whole, refusal, meta = pcall(fence, meta_key, epoch, seen_seq)
  if not whole then
    return {"suspect", "meta"} -- of another type: one shard's trouble is no other's
  end
  if refusal then
    return refusal
  end
  begin_section()
  pool_look = count
  local replies, damaged = decide(class, at, count)
  local entry
  if class ~= operations.read then
    whole, entry = pcall(log_events, events_key, meta, tip, at_ms)
    if not whole then
      doubt(meta_key)
      return {"suspect", "events"}
    end
    if not pcall(apply_writes, meta_key, meta) then
      doubt(meta_key)
      return {"unknown"}
    end
    if damaged then
      doubt(meta_key)
    end
  end
  return {"ok", string.format("%d", meta.seq), meta.tip, replies, entry or nil}
end

local function run_call(class, keys, sections)
  if not redis then
    redis, cjson, string, tonumber, ipairs, pcall, unpack = read_globals()
  end
  KEYS = keys
  forget_replid()
  begin_books()
  now_ms, at_ms = read_clock()
  sent = cmsgpack.unpack(sections)
  local replies, at = {}, 1
  while sent[at] do
    -- The keys and arguments of a section get their names in place of the next line, and `at` goes on behind them.
    -- section
    replies[#replies + 1] = run_section(class, at, meta_key, events_key, epoch, seen_seq, tip, count)
    at = skip(class, at, count)
  end
  local whole, text = pcall(cjson.encode, replies)
  return whole and text or replies
end

