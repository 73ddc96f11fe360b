-- include: overlay
-- Refuse the users of a list whose Idempotency-Key another request has used. Its record is made with the list's first effect
-- and holds the fingerprint alone: the users have records of their own. Nil for a user of no list.
local function refuse_reused(list_key, fingerprint)
  if not list_key then
    return nil
  end
  local kept = planned_record(list_key) or redis.call("GET", list_key)
  if kept and cjson.decode(kept)[1] ~= fingerprint then
    return {"idempotency_key_reused"}
  end
  return nil
end

local function remember_list(list_key, fingerprint)
  if list_key then
    plan_record(list_key, cjson.encode({fingerprint}))
  end
end
