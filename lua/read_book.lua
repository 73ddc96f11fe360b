#!lua flags=no-writes
--[[
read_book: a book's rules as Redis has them, and its live counters.

Keys
  KEYS[1] meta      hash    read
  KEYS[2] book      hash    read
  KEYS[3] holders   hash    read

Args
  ARGV[1] epoch      int
  ARGV[2] seen_seq   int   the highest seq of this epoch the caller has seen
  ARGV[3] tenant_id  int

Replies, the first that applies
  suspect           another epoch, or behind what the caller has seen
  book_not_loaded
  book_not_found
  ok                version, stored (JSON), total, held, redeemed, quarantined
]]
-- include: fence
-- include: book
local rest = redis.call("HMGET", KEYS[2], "version", "stored", "total", "redeemed", "quarantined")
return {"ok", rest[1], rest[2], rest[3], redis.call("HLEN", KEYS[3]), rest[4], rest[5]}
