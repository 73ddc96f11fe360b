-- include: overlay
-- Let a code out of quarantine.
local function release(quarantine_key, code)
  local command = commands[quarantine_key]
  if command then
    command[#command + 1] = code
  else
    plan(quarantine_key, {"SREM", quarantine_key, code})
  end
end
