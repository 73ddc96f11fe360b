#!lua flags=allow-oom
--[[
publish_positions: how far the ledger is in some shards, and when it was seen last; trims what nobody needs any more. One
shard's refusal is no other's.

A position alone does not identify an entry: keys of a moment ago that somebody put back may have caught up with what is
committed. So where the shard stands at the committed position, its tip must be that of the ledger's entry. Where it is
further, the next entry says what it follows, and the owner compares that before it commits it.

Keys
  meta…     hash    read, write
  events…   stream  trim

Args
  ledger        text  "committed" just now; "seen" by a statement that wrote nothing; "away" when it was not reached
  channel       text  where the API processes listen
  message?      text  what they are told, "" for nothing new
  ledger_ms?    int   Postgres's clock, "" while it is not known
  run_id        text  of the server that was certified
  installation  text  whose keys these are to be
  epochs…       int   one of each that follows for each shard
  generations…  int   of the owner
  committed…    int   the seq of this epoch that the ledger holds
  tips…         text  of the entry that the ledger has at `committed`, "" before the first of the epoch
  trim_seqs…    int   events of this epoch below it are dropped; never above what is committed

Replies, the first that applies
  clock(now_ms)      the clocks of Redis and Postgres are too far apart; nothing was written
  ok(verdicts)       for each shard [ok, seq], or [suspect, why]: `epoch`, `owner`, `meta` or `server`, as the fence found it; `position` goes back or ahead; `entry`: the one there is another; `type`: a key has another type
]]
-- include: owner
-- include: clock
-- include: position
local now_ms, at_ms = read_clock()
if ledger_ms ~= "" and math.abs(now_ms - tonumber(ledger_ms)) > CLOCKS_APART_MAX_MS then
  return {"clock", at_ms}
end

local function publish(meta_key, events_key, epoch, generation, committed, tip, trim_seq)
  local refusal, meta = owner_fence(meta_key, epoch, generation)
  if refusal then
    return refusal
  end
  local committed_seq = tonumber(committed)
  if committed_seq < meta.committed or committed_seq > meta.seq then
    return {"suspect", "position"}
  end
  if meta.run_id ~= run_id then
    return {"suspect", "server"}
  end
  if meta.installation ~= installation then
    return {"suspect", "meta"}
  end
  if committed_seq == meta.seq and meta.tip ~= tip then
    return {"suspect", "entry"}
  end
  -- While events wait, only a commit shows that the ledger takes them: a table may be locked, and the server answer.
  if ledger == "committed" or (ledger == "seen" and committed_seq == meta.seq) then
    redis.call("HSET", meta_key, "committed", committed, "ledger_at_ms", at_ms, "owner_at_ms", at_ms)
  elseif ledger == "seen" then
    redis.call("HSET", meta_key, "committed", committed, "owner_at_ms", at_ms)
  else
    redis.call("HSET", meta_key, "committed", committed, "ledger_at_ms", "0", "owner_at_ms", at_ms)
  end
  if tonumber(trim_seq) > 0 and tonumber(trim_seq) <= committed_seq then
    redis.call("XTRIM", events_key, "MINID", format_position(epoch, trim_seq))
  end
  return {"ok", meta.seq}
end

local verdicts = {}
for i, meta_key in ipairs(meta_keys) do
  local events_key = events_keys[i]
  local whole, verdict = pcall(publish, meta_key, events_key, epochs[i], generations[i], committed[i], tips[i], trim_seqs[i])
  verdicts[i] = whole and verdict or {"suspect", "type"}
end
if message ~= "" then
  redis.call("PUBLISH", channel, message)
end
return {"ok", verdicts}
