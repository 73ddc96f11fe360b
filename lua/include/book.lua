-- The book's rules. A book of another tenant does not exist.
local book = redis.call("HMGET", KEYS[2], "tenant_id", "status", "starts_at_ms", "expires_at_ms", "ack",
  "max_redemptions_per_code", "max_codes_per_user", "unlent", "lent")
if not book[1] then
  return {"book_not_loaded"}
end
if book[1] ~= ARGV[3] then
  return {"book_not_found"}
end
