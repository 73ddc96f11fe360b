-- include: overlay
-- include: position
-- Make the section's events known: one entry of the stream with all of them. It is the one write here, so one that raises has
-- done nothing. An entry says which one it follows, so that a history that somebody put back, or made by hand, shows at its
-- next entry. Returns what the entry holds beside its position and tip, false without events: whoever called keeps it until
-- the ledger has it.
local function log_events(events_key, meta, tip, at_ms)
  if #events == 0 then
    return false
  end
  local seq = meta.seq + #events
  local position, n, after, body = format_position(meta.epoch, seq), string.format("%d", #events), meta.tip, cjson.encode(events)
  redis.call("XADD", events_key, position, "n", n, "after", after, "tip", tip, "at_ms", at_ms, "events", body)
  meta.seq, meta.tip = seq, tip
  return {n, after, at_ms, body}
end
