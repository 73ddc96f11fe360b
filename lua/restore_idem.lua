#!lua flags=allow-oom
--[[
restore_idem: Idempotency-Keys of the last 24 hours as the ledger knows them. Safe to send twice.

Keys
  KEYS[1] meta      hash    read
  KEYS[2…] idem     string  write; 1..500

Args
  ARGV[1] recovery     text  which one shut the shard: generation-epoch
  ARGV[2…] answers     text  record (JSON), ttl_ms, record, ttl_ms …

Replies, the first that applies
  fenced     the shard is not shut, or another recovery is at work
  ok
]]
-- include: recoverer
for i = 2, #KEYS do
  redis.call("SET", KEYS[i], ARGV[2 * i - 2], "PX", ARGV[2 * i - 1])
end
return {"ok"}
