#!lua flags=allow-oom
--[[
publish_position: how far the ledger is, and when it was seen last; trims what nobody needs any more.

A position alone does not identify an event: keys of a moment ago that somebody put back may have caught up with what is
committed. So the entry at the committed position must be the one that the ledger has.

Keys
  KEYS[1] meta      hash    read, write
  KEYS[2] events    stream  read, trim

Args
  ARGV[1] epoch       int
  ARGV[2] generation  int   of the owner
  ARGV[3] committed   int   the seq of this epoch that the ledger holds
  ARGV[4] ledger      text  "committed" just now; "seen" by a statement that wrote nothing; "away" when it was not reached
  ARGV[5] trim_seq    int   events of this epoch below it are dropped; never above what is committed
  ARGV[6] channel     text  where the API processes listen
  ARGV[7] message     text  what they are told, "" for nothing new
  ARGV[8] entry       text  SHA-1 of the event that the ledger has at `committed` (its fields, a line each), "" unknown
  ARGV[9] ledger_ms   int   Postgres's clock, "" while it is not known
  ARGV[10] run_id       text  of the server that was certified
  ARGV[11] installation text  whose keys these are to be

Replies, the first that applies
  suspect    another epoch or owner, or a position that goes back or ahead; `entry`: the event there is another
  clock      now_ms: the clocks of Redis and Postgres are more than a minute apart; nothing was written
  ok         seq
]]
-- include: owner
local committed = tonumber(ARGV[3])
if committed < tonumber(meta[4]) or committed > tonumber(meta[3]) or meta[6] ~= ARGV[10] or meta[8] ~= ARGV[11] then
  return {"suspect"}
end
if ARGV[8] ~= "" then
  local position = ARGV[1] .. "-" .. ARGV[3]
  local entry = redis.call("XRANGE", KEYS[2], position, position)[1]
  if entry and redis.sha1hex(table.concat(entry[2], "\n")) ~= ARGV[8] then
    return {"suspect", "entry"}
  end
end
-- include: clock
if ARGV[9] ~= "" and math.abs(now_ms - tonumber(ARGV[9])) > 60000 then
  return {"clock", at_ms}
end
-- While events wait, only a commit shows that the ledger takes them: a table may be locked, and the server answer.
if ARGV[4] == "committed" or (ARGV[4] == "seen" and ARGV[3] == meta[3]) then
  redis.call("HSET", KEYS[1], "committed", ARGV[3], "ledger_at_ms", at_ms, "owner_at_ms", at_ms)
elseif ARGV[4] == "seen" then
  redis.call("HSET", KEYS[1], "committed", ARGV[3], "owner_at_ms", at_ms)
else
  redis.call("HSET", KEYS[1], "committed", ARGV[3], "ledger_at_ms", "0", "owner_at_ms", at_ms)
end
if tonumber(ARGV[5]) > 0 and tonumber(ARGV[5]) <= committed then
  redis.call("XTRIM", KEYS[2], "MINID", ARGV[1] .. "-" .. ARGV[5])
end
if ARGV[7] ~= "" then
  redis.call("PUBLISH", ARGV[6], ARGV[7])
end
return {"ok", tonumber(meta[3])}
