-- The code has left the pool: it is the user's now, and the last write tells the ledger so.
local seq = redis.call("HINCRBY", KEYS[1], "seq", 1)
local position = ARGV[1] .. "-" .. string.format("%d", seq)
redis.call("HSET", KEYS[4], code, position .. " 0 " .. at_ms .. " " .. user_id)
redis.call("ZADD", KEYS[5], 0, book_id .. ":" .. code)
redis.call("XADD", KEYS[6], position, "event", "coupon_assigned", "book", book_id, "code", code, "user", user_id,
  "at_ms", at_ms, "idem", ARGV[6], "fingerprint", fingerprint)
if idem_key then
  redis.call("SET", idem_key, cjson.encode({fingerprint, code, at_ms, position, book[5], book[6]}), "PX", 86400000)
end
return {"ok", code, at_ms, position, book[5], book[6]}
