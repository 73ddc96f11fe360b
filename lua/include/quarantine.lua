-- include: overlay
-- Let a code out of quarantine.
local function release(quarantine_key, code)
  add(released, quarantine_key, code)
end
