-- include: overlay
-- Count something in a book's hash. Before the first time its counts are looked at: one that Redis cannot raise is
-- found here, since nothing may fail once the events are logged. Raises what says that the shard is damaged.
local function require_counters(book_key, book)
  if not book.counted then
    for _, count in ipairs(redis.call("HMGET", book_key, "redeemed", "partly_redeemed", "quarantined", "lent")) do
      if count and count ~= "0" and (#count > 15 or not string.find(count, "^%-?[1-9]%d*$")) then
        error({err = "WRONGTYPE a count of a book cannot be raised"})
      end
    end
    book.counted = true
  end
end

local function count(book_key, field, number)
  local counter = book_key .. " " .. field
  local command = commands[counter]
  if command then
    command[4] = command[4] + number -- in the place of `number` below
  else
    plan(counter, {"HINCRBY", book_key, field, number})
  end
end
