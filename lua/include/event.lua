-- include: overlay
-- Make the next event of the shard, a list of texts. Returns its position.
local function make_event(meta, ...)
  events[#events + 1] = {...}
  return meta.epoch .. "-" .. string.format("%d", meta.seq + #events)
end
