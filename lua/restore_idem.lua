#!lua flags=allow-oom
--[[
restore_idem: idempotency records of the last 24 hours as the ledger knows them. Safe to send twice.

Keys
  meta      hash    read
  idem…     string  write; 1..500

Args
  recovery     text  which one shut the shard: generation-epoch
  records…     text  JSON, in the order of the keys
  ttls_ms…     int   how long each is kept

Replies, the first that applies
  fenced     the shard is not shut, or another recovery is at work
  ok
]]
-- include: recoverer
local refusal = refuse_unless_recovering(meta_key, recovery)
if refusal then
  return refusal
end
for i, idem_key in ipairs(idem_keys) do
  redis.call("SET", idem_key, records[i], "PX", ttls_ms[i])
end
return {"ok"}
