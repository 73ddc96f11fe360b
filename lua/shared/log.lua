-- include: overlay
-- Make the section's events known: the entries of the stream first, then where the shard is.
local function log_events(meta_key, events_key, meta, tip, at_ms)
  if #events == 0 then
    return
  end
  for i, event in ipairs(events) do
    local kind, book, code, user, idem, fingerprint, uses, reference, metadata = unpack(event)
    local position = meta.epoch .. "-" .. string.format("%d", meta.seq + i)
    if kind == "coupon_assigned" then
      redis.call("XADD", events_key, position, "event", kind, "book", book, "code", code, "user", user, "at_ms", at_ms,
        "idem", idem, "fingerprint", fingerprint)
    else
      redis.call("XADD", events_key, position, "event", kind, "book", book, "code", code, "user", user, "at_ms", at_ms,
        "uses", uses, "reference", reference, "metadata", metadata, "idem", idem, "fingerprint", fingerprint)
    end
  end
  meta.seq = meta.seq + #events
  redis.call("HSET", meta_key, "seq", string.format("%d", meta.seq))
end
