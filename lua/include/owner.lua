-- The fence of the owner's scripts. An owner that was paused has an older generation when it wakes up; a server that
-- followed another one for a moment has another replid, on a connection that stayed open.
-- Returns a refusal; or nil, and the meta with its numbers.
-- record: meta = epoch, generation, seq, committed, replid, run_id, backlog_max, installation
local function owner_fence(meta_key, epoch, generation)
  local meta = redis.call("HMGET", meta_key, META_FIELDS)
  if meta.epoch ~= epoch then
    return {"suspect", "epoch"}
  end
  if meta.generation ~= generation then
    return {"suspect", "owner"}
  end
  if not (meta.replid and meta.run_id and tonumber(meta.backlog_max))
    or not string.find(meta.seq or "", "^%d+$") or not string.find(meta.committed or "", "^%d+$") then
    return {"suspect", "meta"}
  end
  if not string.find(redis.call("INFO", "replication"), "master_replid:" .. meta.replid .. "\r", 1, true) then
    return {"suspect", "server"}
  end
  meta.seq, meta.committed = tonumber(meta.seq), tonumber(meta.committed)
  return nil, meta
end
