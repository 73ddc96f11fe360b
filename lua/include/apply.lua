-- include: overlay
-- Write where the shard is behind its new entry, if there is one; then what the section's operations have decided.
local function apply_writes(meta_key, meta)
  if #events > 0 then
    redis.call("HSET", meta_key, "seq", string.format("%d", meta.seq), "tip", meta.tip)
  end
  for _, command in ipairs(commands) do
    redis.call(unpack(command))
  end
end
