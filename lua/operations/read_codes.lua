--[[
read_codes: who holds some codes of a book, until when they are locked, and whether the book is open. A lock that outlives
the book (its end was moved) is told to end with it: nothing can be redeemed after that.

Class: read

Keys
  book        hash    read
  holders     hash    read
  free        zset    read
  quarantine  set     read
  lock…       string  read; one for each code, 1..1000

Args
  tenant_id  int
  codes…     text  in the order of the locks

Replies, the first that applies
  book_not_loaded
  book_not_found
  suspect(why)      `counts`: codes are missing
  ok(now_ms, ack, redemptions_max, holders, locks, book_status)  redemptions_max: "" is unlimited; holders: "", `quarantined`, or a holding; locks: ms left, or 0 and below; book_status: `active`, `paused`, `closed`, `not_started`, `expired`
]]
-- include: book
-- include: codes_missing
local refusal, book = read_book(book_key, tenant_id)
if refusal then
  return refusal
end
refusal = refuse_if_codes_missing(book_key, free_key, holders_key)
if refusal then
  return refusal
end
local book_ms = book.expires_at_ms ~= "" and tonumber(book.expires_at_ms) - now_ms or math.huge
local book_status = book.status
if book_status == "active" and book.starts_at_ms ~= "" and now_ms < tonumber(book.starts_at_ms) then
  book_status = "not_started"
elseif book_status == "active" and book_ms <= 0 then
  book_status = "expired"
end
local locks = {}
for i, lock_key in ipairs(lock_keys) do
  locks[i] = math.min(redis.call("PTTL", lock_key), book_ms)
end
local holders = redis.call("HMGET", holders_key, unpack(codes))
for i, code in ipairs(codes) do
  if not holders[i] then
    holders[i] = redis.call("SISMEMBER", quarantine_key, code) == 1 and "quarantined" or ""
  end
end
return {"ok", at_ms, book.ack, book.max_redemptions_per_code, holders, locks, book_status}
