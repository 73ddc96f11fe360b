-- include: overlay
-- The answer to a request whose Idempotency-Key was used before: the first answer again, or a refusal when the request is
-- another one. Nil when there is none.
local function replay(idem_key, fingerprint)
  if not idem_key then
    return nil
  end
  local kept = planned_record(idem_key) or redis.call("GET", idem_key)
  if not kept then
    return nil
  end
  local answer = cjson.decode(kept)
  if answer[1] ~= fingerprint then
    return {"idempotency_key_reused"}
  end
  answer[1] = "replayed" -- the outcome, in the place of the fingerprint
  return answer
end

-- Keep the answer to a request with an Idempotency-Key; `answer` begins with the fingerprint.
local function remember(idem_key, ...)
  if idem_key then
    plan_record(idem_key, cjson.encode({...}))
  end
end
