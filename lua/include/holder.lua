-- Who holds the code. A code that is in nobody's hands must be in the pool or not lent at all: the counts tell.
local holder = redis.call("HGET", KEYS[3], code)
if not holder then
  if redis.call("SISMEMBER", quarantine, code) == 1 then
    return {"code_quarantined"}
  end
  if redis.call("ZCARD", KEYS[5]) + redis.call("HLEN", KEYS[3]) ~= tonumber(book[9]) then
    return {"suspect", "counts"}
  end
  return {"not_assigned"}
end
local held_position, held_uses, held_at_ms, held_by = string.match(holder, "^(%S+) (%d+) (%d+) (.*)$")
if ARGV[5] ~= "" and ARGV[5] ~= held_by then
  return {"not_holder"}
end
if book[6] ~= "" and tonumber(held_uses) >= tonumber(book[6]) then
  return {"already_redeemed"}
end
