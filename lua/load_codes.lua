#!lua
--[[
load_codes: put codes that Postgres has lent into the pool. The only way in. Safe to send twice: codes that are in the
pool or in somebody's hands are skipped.

Keys
  KEYS[1] meta      hash    read
  KEYS[2] book      hash    read, count, write
  KEYS[3] free      zset    read, add
  KEYS[4] holders   hash    read

Args
  ARGV[1] epoch       int   in which the codes were lent
  ARGV[2] generation  int   of the owner
  ARGV[3] unlent      int   codes of the book that Postgres keeps back still
  ARGV[4…] codes      text  score, code, score, code …; at most 500 codes; scores from a CSPRNG

Replies, the first that applies
  suspect            another epoch or owner; or codes are missing, and whose they were is not known
  book_not_loaded
  ok                 added, in_pool
]]
-- include: owner
local lent = redis.call("HGET", KEYS[2], "lent")
if not lent then
  return {"book_not_loaded"}
end
if redis.call("ZCARD", KEYS[3]) + redis.call("HLEN", KEYS[4]) ~= tonumber(lent) then
  return {"suspect"}
end
local codes = {}
for i = 5, #ARGV, 2 do
  codes[#codes + 1] = ARGV[i]
end
local added = 0
if #codes > 0 then
  local held = redis.call("HMGET", KEYS[4], unpack(codes))
  local entries = {}
  for i, code in ipairs(codes) do
    if not held[i] then
      entries[#entries + 1] = ARGV[2 * i + 2]
      entries[#entries + 1] = code
    end
  end
  if #entries > 0 then
    added = redis.call("ZADD", KEYS[3], "NX", unpack(entries))
  end
end
redis.call("HINCRBY", KEYS[2], "lent", added)
redis.call("HSET", KEYS[2], "unlent", ARGV[3])
return {"ok", added, redis.call("ZCARD", KEYS[3])}
