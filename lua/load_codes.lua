#!lua
--[[
load_codes: put codes that Postgres has lent into the pool. The only way in. Safe to send twice: codes that are in the
pool or in somebody's hands are skipped.

Keys
  meta      hash    read
  book      hash    read, count, write
  free      zset    read, add
  holders   hash    read

Args
  epoch       int   in which the codes were lent
  generation  int   of the owner
  kept_back   int   codes of the book that are still to come, by whatever way: without any the book is exhausted
  scores…     int   from a CSPRNG, one for each code
  codes…      text  at most 500

Replies, the first that applies
  suspect(why)       `epoch`, `owner`, `meta` or `server`, as the fence found it; `counts`: codes are missing
  book_not_loaded
  ok(added, in_pool)
]]
-- include: owner
-- include: codes_missing
local refusal = owner_fence(meta_key, epoch, generation)
if refusal then
  return refusal
end
if not redis.call("HGET", book_key, "version") then
  return {"book_not_loaded"}
end
refusal = refuse_if_codes_missing(book_key, free_key, holders_key)
if refusal then
  return refusal
end
local added = 0
if #codes > 0 then
  local held = redis.call("HMGET", holders_key, unpack(codes))
  local entries = {}
  for i, code in ipairs(codes) do
    if not held[i] then
      entries[#entries + 1] = scores[i]
      entries[#entries + 1] = code
    end
  end
  if #entries > 0 then
    added = redis.call("ZADD", free_key, "NX", unpack(entries))
  end
end
redis.call("HINCRBY", book_key, "lent", added)
redis.call("HSET", book_key, "unlent", kept_back) -- the name is older than what it counts: lent codes that are on their way, too
return {"ok", added, redis.call("ZCARD", free_key)}
