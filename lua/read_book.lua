#!lua flags=no-writes
--[[
read_book: a book's rules as Redis has them, and its live counters.

Keys
  KEYS[1] meta      hash    read
  KEYS[2] book      hash    read
  KEYS[3] holders   hash    read
  KEYS[4] free      zset    read

Args
  ARGV[1] epoch      int
  ARGV[2] seen_seq   int   the highest seq of this epoch the caller has seen
  ARGV[3] tenant_id  int

Replies, the first that applies
  suspect           another epoch or behind what the caller has seen; `counts`: codes are missing
  book_not_loaded
  book_not_found
  ok                version, stored (JSON), total, held, redeemed, quarantined, redemptions
]]
-- include: fence
-- include: book
local held = redis.call("HLEN", KEYS[3])
if redis.call("ZCARD", KEYS[4]) + held ~= tonumber(book[9]) then
  return {"suspect", "counts"}
end
local rest = redis.call("HMGET", KEYS[2], "version", "stored", "total", "redeemed", "quarantined",
  "partly_redeemed")
-- A book that an older version brought here has no count of uses that left more, until its shard has a new owner.
local redemptions = tonumber(rest[4]) + tonumber(rest[6] or 0)
return {"ok", rest[1], rest[2], rest[3], held, rest[4], rest[5], redemptions}
