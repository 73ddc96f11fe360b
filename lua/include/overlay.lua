-- What the operations of a section are about to write, and nobody has written yet: their events; and one command for each
-- key, in order and by its key. Each operation reads through them. It adds its own writes at its end, when nothing can raise
-- any more: one that raises leaves nothing behind.
local events, commands, pools

local function begin_section()
  events, commands, pools = {}, {}, {}
end

-- Write a key that no command writes yet.
local function write(key, command)
  commands[#commands + 1] = command
  commands[key] = command
end
