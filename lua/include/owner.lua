-- include: server
-- The fence of the owner's scripts. An owner that was paused has an older generation when it wakes up; a server that
-- followed another one for a moment has another replid, on a connection that stayed open.
-- Returns a refusal; or nil, and the meta with its numbers.
local function owner_fence(meta_key, epoch, generation)
  local kept_epoch, kept_generation, seq, tip, committed, replid, run_id, backlog_max, installation, format = unpack(redis.call(
    "HMGET", meta_key, "epoch", "generation", "seq", "tip", "committed", "replid", "run", "backlog_max", "installation",
    "format"))
  if kept_epoch ~= epoch then
    return {"suspect", "epoch"}
  end
  if kept_generation ~= generation then
    return {"suspect", "owner"}
  end
  if not (replid and run_id and tip and tonumber(backlog_max)) or format ~= FORMAT
    or not string.find(seq or "", "^%d+$") or not string.find(committed or "", "^%d+$") then
    return {"suspect", "meta"}
  end
  if not is_in_history(replid) then
    return {"suspect", "server"}
  end
  return nil, {seq = tonumber(seq), tip = tip, committed = tonumber(committed), run_id = run_id, installation = installation}
end
