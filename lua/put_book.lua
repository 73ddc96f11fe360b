#!lua flags=allow-oom
--[[
put_book: bring a book's rules to Redis, if they are newer than what it has.

Keys
  meta   hash    read
  book   hash    read, write

Args
  epoch       int
  generation  int   of the owner
  version     int   of the book
  known?      text  "known" when the book was loaded before: then it must be here
  rules…      text  field, value, field, value …

Replies, the first that applies
  suspect(why)  `epoch`, `owner`, `meta` or `server`, as the fence found it
  gone          a book that was loaded before is not here
  stale         Redis has this version or a newer one
  ok
]]
-- include: owner
local refusal = owner_fence(meta_key, epoch, generation)
if refusal then
  return refusal
end
local kept_version = redis.call("HGET", book_key, "version")
if not kept_version then
  if known == "known" then
    return {"gone"}
  end
  redis.call("HSET", book_key, "lent", 0, "redeemed", 0, "partly_redeemed", 0, "quarantined", 0)
elseif tonumber(kept_version) >= tonumber(version) then
  return {"stale"}
end
redis.call("HSET", book_key, "version", version, unpack(rules))
return {"ok"}
