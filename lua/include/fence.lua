-- The fence of the API's scripts: this Redis is the one the caller knows, in the history that was certified, and has not
-- gone back behind what the caller has seen. A field that is missing or not a number was changed by hand.
-- Returns a refusal; or nil, and the meta with its numbers.
-- record: meta = epoch, seq, committed, ledger_at_ms, backlog_max, replid
local function fence(meta_key, epoch, seen_seq)
  local meta = redis.call("HMGET", meta_key, META_FIELDS)
  if meta.epoch ~= epoch then
    return {"suspect", "epoch"}
  end
  meta.seq = meta.seq and string.find(meta.seq, "^%d+$") and tonumber(meta.seq)
  meta.committed, meta.ledger_at_ms = tonumber(meta.committed), tonumber(meta.ledger_at_ms)
  meta.backlog_max = tonumber(meta.backlog_max)
  if not (meta.seq and meta.committed and meta.ledger_at_ms and meta.backlog_max and meta.replid) then
    return {"suspect", "meta"}
  end
  if meta.seq < tonumber(seen_seq) then
    return {"suspect", "position"}
  end
  -- Asked on every call: a server that followed another master for a moment has closed no connection, and kept the epoch.
  if not string.find(redis.call("INFO", "replication"), "master_replid:" .. meta.replid .. "\r", 1, true) then
    return {"suspect", "server"}
  end
  return nil, meta
end
