-- include: server
-- The fence of the API: this Redis is the one the caller knows, in the history that was certified, and has not gone back
-- behind what the caller has seen. A field that is missing or not a number was changed by hand.
-- Returns a refusal; or nil, and the meta with its numbers.
local function fence(meta_key, epoch, seen_seq)
  local kept_epoch, seq, committed, ledger_at_ms, backlog_max, replid, tip = unpack(redis.call("HMGET", meta_key,
    "epoch", "seq", "committed", "ledger_at_ms", "backlog_max", "replid", "tip"))
  if kept_epoch ~= epoch then
    return {"suspect", "epoch"}
  end
  local meta = {epoch = epoch, seq = seq and string.find(seq, "^%d+$") and tonumber(seq), tip = tip,
    committed = tonumber(committed), ledger_at_ms = tonumber(ledger_at_ms), backlog_max = tonumber(backlog_max)}
  if not (meta.seq and meta.committed and meta.ledger_at_ms and meta.backlog_max and replid and tip) then
    return {"suspect", "meta"}
  end
  if meta.seq < tonumber(seen_seq) then
    return {"suspect", "position"}
  end
  if not is_in_history(replid) then
    return {"suspect", "server"}
  end
  return nil, meta
end
