-- Make the next event of the shard; what follows `epoch` are its fields. Returns its position.
local function make_event(meta_key, events_key, epoch, ...)
  local position = epoch .. "-" .. string.format("%d", redis.call("HINCRBY", meta_key, "seq", 1))
  redis.call("XADD", events_key, position, ...)
  return position
end
