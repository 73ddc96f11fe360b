-- include: overlay
-- Make the section's events known: one entry of the stream with all of them, then where the shard is. An entry says which
-- one it follows, so that a history that somebody put back, or made by hand, shows at its next entry.
local function log_events(meta_key, events_key, meta, tip, at_ms)
  if #events == 0 then
    return
  end
  local seq = string.format("%d", meta.seq + #events)
  redis.call("XADD", events_key, meta.epoch .. "-" .. seq, "n", string.format("%d", #events), "after", meta.tip, "tip", tip,
    "at_ms", at_ms, "events", cjson.encode(events))
  redis.call("HSET", meta_key, "seq", seq, "tip", tip)
  meta.seq, meta.tip = meta.seq + #events, tip
end
