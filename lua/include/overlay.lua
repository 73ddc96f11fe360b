-- What the operations of a section are about to write, and nobody has written yet: their events; and their commands, in
-- their order. The last one for a key (of a count: for a field) is found by that name, too. Each operation reads through
-- them. It adds its own writes at its end, when nothing can raise any more: one that raises leaves nothing behind.
local events, commands, pools

local function begin_section()
  events, commands, pools = {}, {}, {}
end

-- Plan a command for a key.
local function plan(key, command)
  commands[#commands + 1] = command
  commands[key] = command
end

-- Plan the record of an Idempotency-Key, in the place of one that was planned before.
local function plan_record(key, record)
  local command = commands[key]
  if command then
    command[3] = record
  else
    plan(key, {"SET", key, record, "PX", IDEMPOTENCY_MS})
  end
end

-- The record that was planned for a key; nil without one.
local function planned_record(key)
  local command = commands[key]
  return command and command[3]
end
