#!lua flags=allow-oom
--[[
publish_position: how far the ledger is, and when it was seen last; trims what nobody needs any more.

A position alone does not identify an event: keys of a moment ago that somebody put back may have caught up with what is
committed. So the entry at the committed position must be the one that the ledger has.

Keys
  meta      hash    read, write
  events    stream  read, trim

Args
  epoch         int
  generation    int   of the owner
  committed     int   the seq of this epoch that the ledger holds
  ledger        text  "committed" just now; "seen" by a statement that wrote nothing; "away" when it was not reached
  trim_seq      int   events of this epoch below it are dropped; never above what is committed
  channel       text  where the API processes listen
  message?      text  what they are told, "" for nothing new
  entry?        text  SHA-1 of the event that the ledger has at `committed` (its fields, a line each), "" unknown
  ledger_ms?    int   Postgres's clock, "" while it is not known
  run_id        text  of the server that was certified
  installation  text  whose keys these are to be

Replies, the first that applies
  suspect(why)   `epoch`, `owner`, `meta` or `server`, as the fence found it; `position` goes back or ahead; `entry`: the event there is another
  clock(now_ms)  the clocks of Redis and Postgres are too far apart; nothing was written
  ok(seq)
]]
-- include: owner
-- include: clock
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
if entry ~= "" then
  local position = epoch .. "-" .. committed
  local kept = redis.call("XRANGE", events_key, position, position)[1]
  if kept and redis.sha1hex(table.concat(kept[2], "\n")) ~= entry then
    return {"suspect", "entry"}
  end
end
local now_ms, at_ms = read_clock()
if ledger_ms ~= "" and math.abs(now_ms - tonumber(ledger_ms)) > CLOCKS_APART_MAX_MS then
  return {"clock", at_ms}
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
  redis.call("XTRIM", events_key, "MINID", epoch .. "-" .. trim_seq)
end
if message ~= "" then
  redis.call("PUBLISH", channel, message)
end
return {"ok", meta.seq}
