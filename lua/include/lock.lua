-- Who shows the lock's token is never refused for the lock; a token that is not the lock's is refused whatever else.
-- Returns a refusal; or nil, and the token of the lock, false without one.
local function find_lock(lock_key, shown_token)
  local held_ms = redis.call("PTTL", lock_key)
  local held_token = redis.call("GET", lock_key)
  if shown_token ~= "" and held_token ~= shown_token then
    return {"lock_not_held"}
  end
  if held_token and shown_token == "" then
    return {"locked", held_ms}
  end
  return nil, held_token
end
