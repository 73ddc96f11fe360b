-- What the operations of a section are about to write, and nobody has written yet. Each operation reads through it. It
-- enters its own writes at its end, when nothing can raise any more: one that raises leaves nothing behind.
local events, holdings, taken, listed, records, locks, counts, released, pools

local function begin_section()
  events, holdings, taken, listed, records, locks, counts, released, pools = {}, {}, {}, {}, {}, {}, {}, {}, {}
end

-- The table under a key, made when it is not there.
local function part_of(whole, key)
  local part = whole[key]
  if not part then
    part = {}
    whole[key] = part
  end
  return part
end

local function add(whole, key, thing)
  local part = part_of(whole, key)
  part[#part + 1] = thing
end
