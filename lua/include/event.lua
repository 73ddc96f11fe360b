-- include: overlay
-- include: position
-- Make the next event of the shard, a list of texts. Returns its position.
local function make_event(meta, ...)
  events[#events + 1] = {...}
  return format_position(meta.epoch, meta.seq + #events)
end
