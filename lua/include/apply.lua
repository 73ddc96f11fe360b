-- include: overlay
-- Write what the section's operations have decided, each key at once.
local function apply_writes()
  for free_key, codes in pairs(taken) do
    redis.call("ZREM", free_key, unpack(codes))
  end
  for holders_key, changed in pairs(holdings) do
    local fields = {}
    for code, text in pairs(changed) do
      fields[#fields + 1] = code
      fields[#fields + 1] = text
    end
    if #fields > 0 then
      redis.call("HSET", holders_key, unpack(fields))
    end
  end
  for coupons_key, members in pairs(listed) do
    redis.call("ZADD", coupons_key, unpack(members))
  end
  for idem_key, record in pairs(records) do
    redis.call("SET", idem_key, record, "PX", IDEMPOTENCY_MS)
  end
  for lock_key, lock in pairs(locks) do
    if lock then
      redis.call("SET", lock_key, lock.token, "PX", lock.ttl_ms)
    else
      redis.call("DEL", lock_key)
    end
  end
  for quarantine_key, codes in pairs(released) do
    redis.call("SREM", quarantine_key, unpack(codes))
  end
  for book_key, fields in pairs(counts) do
    for field, number in pairs(fields) do
      redis.call("HINCRBY", book_key, field, number)
    end
  end
end
