-- Who shows the lock's token is never refused for the lock; a token that is not the lock's is refused whatever else.
local held_ms = redis.call("PTTL", KEYS[4])
local held_token = redis.call("GET", KEYS[4])
if shown_token ~= "" and held_token ~= shown_token then
  return {"lock_not_held"}
end
if held_token and shown_token == "" then
  return {"locked", held_ms}
end
