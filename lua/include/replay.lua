-- An Idempotency-Key that was used before: the first answer again, or a refusal when the request is another.
if idem_key then
  local kept = redis.call("GET", idem_key)
  if kept then
    local answer = cjson.decode(kept)
    if answer[1] ~= fingerprint then
      return {"idempotency_key_reused"}
    end
    answer[1] = "replayed"
    return answer
  end
end
