-- include: overlay
-- The token that holds the lock, false without one; and the milliseconds it has left.
local function read_lock(lock_key)
  local changed = locks[lock_key]
  if changed then
    return changed.token, changed.ttl_ms
  end
  if changed == false then
    return false
  end
  local held_ms = redis.call("PTTL", lock_key)
  return redis.call("GET", lock_key), held_ms
end

-- Who shows the lock's token is never refused for the lock; a token that is not the lock's is refused whatever else.
-- Returns a refusal; or nil, and the token of the lock, false without one.
local function find_lock(lock_key, shown_token)
  local held_token, held_ms = read_lock(lock_key)
  if shown_token ~= "" and held_token ~= shown_token then
    return {"lock_not_held"}
  end
  if held_token and shown_token == "" then
    return {"locked", tonumber(held_ms)}
  end
  return nil, held_token
end

local function set_lock(lock_key, token, ttl_ms)
  locks[lock_key] = {token = token, ttl_ms = ttl_ms}
end

local function drop_lock(lock_key)
  locks[lock_key] = false
end
