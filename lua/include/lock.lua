-- include: overlay
-- The token that holds the lock, false without one; and the milliseconds it has left.
local function read_lock(lock_key)
  local command = commands[lock_key]
  if command then
    local _, _, token, _, ttl_ms = unpack(command)
    return token or false, ttl_ms -- neither of a lock that is dropped
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
  plan(lock_key, {"SET", lock_key, token, "PX", ttl_ms})
end

local function drop_lock(lock_key)
  plan(lock_key, {"DEL", lock_key})
end
