#!lua flags=allow-oom
--[[
publish_position: how far the ledger is, and that it was seen just now; trims what nobody needs any more.

Keys
  KEYS[1] meta      hash    read, write
  KEYS[2] events    stream  trim

Args
  ARGV[1] epoch       int
  ARGV[2] generation  int   of the owner
  ARGV[3] committed   int   the seq of this epoch that the ledger holds
  ARGV[4] ledger      text  "here", or "away" when the ledger could not be reached
  ARGV[5] trim_seq    int   events of this epoch below it are dropped; never above what is committed
  ARGV[6] channel     text  where the API processes listen
  ARGV[7] message     text  what they are told, "" for nothing new

Replies, the first that applies
  suspect    another epoch or owner, or a position that goes back or ahead
  ok         seq
]]
-- include: owner
local committed = tonumber(ARGV[3])
if committed < tonumber(meta[4]) or committed > tonumber(meta[3]) then
  return {"suspect"}
end
-- include: clock
if ARGV[4] == "away" then
  at_ms = "0"
end
redis.call("HSET", KEYS[1], "committed", ARGV[3], "ledger_at_ms", at_ms)
if tonumber(ARGV[5]) > 0 and tonumber(ARGV[5]) <= committed then
  redis.call("XTRIM", KEYS[2], "MINID", ARGV[1] .. "-" .. ARGV[5])
end
if ARGV[7] ~= "" then
  redis.call("PUBLISH", ARGV[6], ARGV[7])
end
return {"ok", tonumber(meta[3])}
