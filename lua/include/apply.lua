-- include: overlay
-- Write what the section's operations have decided.
local function apply_writes()
  for _, command in ipairs(commands) do
    redis.call(unpack(command))
  end
end
