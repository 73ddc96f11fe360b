--[[
read_book: a book's rules as Redis has them, and its live counters.

Class: read

Keys
  book      hash    read
  holders   hash    read
  free      zset    read

Args
  tenant_id  int

Replies, the first that applies
  book_not_loaded
  book_not_found
  suspect(why)      `counts`: codes are missing
  ok(version, stored, total, held, redeemed, quarantined, redemptions)  stored is JSON
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
local version, stored, total, redeemed, quarantined, partly_redeemed = unpack(
  redis.call("HMGET", book_key, "version", "stored", "total", "redeemed", "quarantined", "partly_redeemed"))
if not (version and stored and total and redeemed and quarantined) then
  error({err = "WRONGTYPE a book lacks a field"})
end
-- A book that an older version brought here has no count of uses that left more, until its shard has a new owner.
local redemptions = tonumber(redeemed) + tonumber(partly_redeemed or 0)
return {"ok", version, stored, total, redis.call("HLEN", holders_key), redeemed, quarantined, redemptions}
