#!lua flags=allow-oom
--[[
put_book: bring a book's rules to Redis, if they are newer than what it has.

Keys
  KEYS[1] meta   hash    read
  KEYS[2] book   hash    read, write

Args
  ARGV[1] epoch       int
  ARGV[2] generation  int   of the owner
  ARGV[3] version     int   of the book
  ARGV[4] known       text  "known" when the book was loaded before: then it must be here
  ARGV[5…] rules      text  field, value, field, value …

Replies, the first that applies
  suspect    another epoch or owner
  gone       a book that was loaded before is not here
  stale      Redis has this version or a newer one
  ok
]]
-- include: owner
local version = redis.call("HGET", KEYS[2], "version")
if not version then
  if ARGV[4] == "known" then
    return {"gone"}
  end
  redis.call("HSET", KEYS[2], "lent", 0, "redeemed", 0, "partly_redeemed", 0, "quarantined", 0)
elseif tonumber(version) >= tonumber(ARGV[3]) then
  return {"stale"}
end
local rules = {}
for i = 5, #ARGV do
  rules[i - 4] = ARGV[i]
end
redis.call("HSET", KEYS[2], "version", ARGV[3], unpack(rules))
return {"ok"}
