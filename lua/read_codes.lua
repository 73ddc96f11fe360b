#!lua flags=no-writes
--[[
read_codes: who holds some codes of a book, until when they are locked, and whether the book is open. A lock that outlives
the book (its end was moved) is told to end with it: nothing can be redeemed after that.

Keys
  KEYS[1] meta      hash    read
  KEYS[2] book      hash    read
  KEYS[3] holders   hash    read
  KEYS[4] free      zset    read
  KEYS[5] quarantine  set   read
  KEYS[6…] lock     string  read; one for each code, 1..1000

Args
  ARGV[1] epoch      int
  ARGV[2] seen_seq   int   the highest seq of this epoch the caller has seen
  ARGV[3] tenant_id  int
  ARGV[4…] code      text  in the order of the locks

Replies, the first that applies
  suspect           another epoch or behind what the caller has seen; `counts`: codes are missing
  book_not_loaded
  book_not_found
  ok                now_ms, ack, redemptions_max ("" is unlimited), holders ("", `quarantined`, or `position uses at_ms user`), locks (ms left, or 0 and below), book_status (`active`, `paused`, `closed`, `not_started`, `expired`)
]]
-- include: fence
-- include: book
-- include: clock
if redis.call("ZCARD", KEYS[4]) + redis.call("HLEN", KEYS[3]) ~= tonumber(book[9]) then
  return {"suspect", "counts"}
end
local book_ms = book[4] ~= "" and tonumber(book[4]) - now_ms or math.huge
local book_status = book[2]
if book_status == "active" and book[3] ~= "" and now_ms < tonumber(book[3]) then
  book_status = "not_started"
elseif book_status == "active" and book_ms <= 0 then
  book_status = "expired"
end
local codes, locks = {}, {}
for i = 4, #ARGV do
  codes[i - 3] = ARGV[i]
  locks[i - 3] = math.min(redis.call("PTTL", KEYS[i + 2]), book_ms)
end
local holders = redis.call("HMGET", KEYS[3], unpack(codes))
for i = 1, #codes do
  if not holders[i] then
    holders[i] = redis.call("SISMEMBER", KEYS[5], codes[i]) == 1 and "quarantined" or ""
  end
end
return {"ok", at_ms, book[5], book[6], holders, locks, book_status}
