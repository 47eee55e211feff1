"""The steps of batches as Lua, which Redis runs each as a whole; `gateway.jobs.scripts` has the rest of the queue.

Keys, below the queue's prefix:
  batch:ID        hash; goes away by itself some time after the batch has ended
  batches:OWNER   sorted set of an owner's batches by their time of creation
  active          sorted set of the batches that haven't ended
  open:ID         hash: the jobs of a batch's lines in the queue, or whose results aren't written yet → custom_id
  ended:ID        sorted set of those that have ended
  stores          sorted set of the directories of files in which gateways work, by when one said so

One process runs a batch, while it holds its lease. What it writes to files counts once Redis knows how many bytes.
"""

from __future__ import annotations

MAX_KEPT = 1000  # batches of one owner; of more, the oldest that has ended is forgotten
ROWS = 64  # results that one call gives

LONGEST_WINDOW_S = 7 * 86400  # in which a batch must have ended
FUNCTIONS = f"""
local function held(id, lease, lease_ms)
  local b = P .. 'batch:' .. id
  if call('HGET', b, 'lease') ~= lease then return nil end
  call('HSET', b, 'leased_until', now + lease_ms)
  return b
end
local function remove(id)
  call('DEL', P .. 'job:' .. id)
  hold('job:' .. id, 0, 0)
end
local function keep_list(owner, keep_ms)
  call('PEXPIRE', P .. 'batches:' .. owner, keep_ms + {(LONGEST_WINDOW_S + 86400) * 1000})
end
"""

# id, owner, max_active, window_ms, keep_ms, fields and values … → 1: it is there; 0: too many haven't ended
CREATE = f"""
local id, list, b = ARGV[1], P .. 'batches:' .. ARGV[2], P .. 'batch:' .. ARGV[1]
if call('EXISTS', b) == 1 then return 1 end
local num_active, oldest = 0, nil
for _, other in ipairs(call('ZRANGE', list, 0, -1)) do
  if call('EXISTS', P .. 'batch:' .. other) == 0 then call('ZREM', list, other)
  elseif call('ZSCORE', P .. 'active', other) then num_active = num_active + 1
  elseif not oldest then oldest = other end
end
if num_active >= tonumber(ARGV[3]) then return 0 end
if call('ZCARD', list) >= {MAX_KEPT} and oldest then
  call('ZREM', list, oldest); call('DEL', P .. 'batch:' .. oldest)
end
call('HSET', b, 'status', 'validating', 'created_at', now, unpack(ARGV, 6))
call('HSET', b, 'expires_at', now + ARGV[4])
call('ZADD', list, now, id); keep_list(ARGV[2], ARGV[5])
call('ZADD', P .. 'active', now, id)
return 1
"""

# owner, the id behind which the page begins or '', count → {id, fields} each, the newest first
LIST = """
local list = P .. 'batches:' .. ARGV[1]
local first = 0
if ARGV[2] ~= '' then
  local rank = call('ZREVRANK', list, ARGV[2])
  if not rank then return 0 end
  first = rank + 1
end
local rows = {}
for _, id in ipairs(call('ZREVRANGE', list, first, -1)) do
  if #rows >= tonumber(ARGV[3]) then break end
  local fields = call('HGETALL', P .. 'batch:' .. id)
  if #fields > 0 then rows[#rows + 1] = {id, fields} end
end
return rows
"""

# id, owner → 1: it ends, or has been cancelled; 2: it has ended otherwise; 0: no such batch of this owner
CANCEL = """
local b = P .. 'batch:' .. ARGV[1]
local status, owner = unpack(call('HMGET', b, 'status', 'owner'))
if not status or owner ~= ARGV[2] then return 0 end
if status == 'validating' or status == 'in_progress' then
  call('HSET', b, 'status', 'cancelling', 'cancelling_at', now)
elseif status == 'completed' or status == 'failed' or status == 'expired' then
  return 2
end
return 1
"""

# store, token, lease_ms, count → {id, lease, fields} of batches that nobody runs, the oldest first
TAKE = """
call('ZADD', P .. 'stores', now, ARGV[1]); call('ZREMRANGEBYSCORE', P .. 'stores', '-inf', now - 60000)
call('EXPIRE', P .. 'stores', 60)
local taken = {}
for _, id in ipairs(call('ZRANGE', P .. 'active', 0, -1)) do
  if #taken >= tonumber(ARGV[4]) then break end
  local b = P .. 'batch:' .. id
  local store, leased_until = unpack(call('HMGET', b, 'store', 'leased_until'))
  if not store then
    call('ZREM', P .. 'active', id)
  elseif store == ARGV[1] and tonumber(leased_until or 0) <= now then
    local lease = ARGV[2] .. '_' .. id
    call('HSET', b, 'lease', lease, 'leased_until', now + ARGV[3])
    taken[#taken + 1] = {id, lease, call('HGETALL', b)}
  end
end
return taken
"""

# id, lease → 1
RELEASE = """
if call('HGET', P .. 'batch:' .. ARGV[1], 'lease') == ARGV[2] then
  call('HSET', P .. 'batch:' .. ARGV[1], 'lease', '', 'leased_until', 0)
end
return 1
"""

# id, lease, lease_ms → 1; -1: the lease is lost
RENEW = """
return held(ARGV[1], ARGV[2], ARGV[3]) and 1 or -1
"""

# id, lease, lease_ms, lines → 1: its file is right; -1: the lease is lost
START = """
local b = held(ARGV[1], ARGV[2], ARGV[3])
if not b then return -1 end
if call('HGET', b, 'status') == 'validating' then call('HSET', b, 'status', 'in_progress') end
call('HSET', b, 'total', ARGV[4])
call('HSETNX', b, 'in_progress_at', now)
return 1
"""

# id, lease, lease_ms, max_waiting, max_bytes, keep_ms, then for each line: number, bytes up to its end, custom_id, body
# → how many of the lines are in the queue; -1: the lease is lost
FEED = """
local b = held(ARGV[1], ARGV[2], ARGV[3])
if not b then return -1 end
local status, owner, caller, endpoint, attempts, deadline, fed =
  unpack(call('HMGET', b, 'status', 'owner', 'caller', 'endpoint', 'max_attempts', 'expires_at', 'fed_lines'))
if status ~= 'in_progress' then return 0 end
fed = tonumber(fed or 0)
local num_fed = 0
for i = 7, #ARGV, 4 do
  if tonumber(ARGV[i]) > fed then
    local size = #ARGV[i + 3]
    if call('ZCARD', P .. 'waiting:3') >= tonumber(ARGV[4]) then break end
    if tonumber(call('GET', P .. 'bytes') or 0) + size > tonumber(ARGV[5]) then break end
    local id = 'batch_req_' .. string.sub(ARGV[1], 7) .. '_' .. ARGV[i]
    local job = P .. 'job:' .. id
    local forget_at = deadline + ARGV[6]
    call('HSET', job, 'status', 'queued', 'created', now, 'deadline', deadline, 'forget_at', forget_at,
      'keep_ms', ARGV[6], 'priority', 3, 'attempts', 0, 'lease', '', 'owner', owner, 'endpoint', endpoint,
      'body', ARGV[i + 3], 'max_attempts', attempts, 'caller', caller, 'tokens_per_minute', 0, 'batch', ARGV[1])
    call('PEXPIREAT', job, forget_at)
    call('ZADD', P .. 'deadlines', deadline, id)
    call('HSET', P .. 'open:' .. ARGV[1], id, ARGV[i + 2])
    hold('job:' .. id, size, forget_at)
    enqueue(id)
    fed = tonumber(ARGV[i])
    call('HSET', b, 'fed_lines', ARGV[i], 'fed_bytes', ARGV[i + 1])
  end
  num_fed = num_fed + 1
end
return num_fed
"""

# id, lease, lease_ms, max_bytes → {fields of the batch, num_open, {id, custom_id, status, response, error} …};
# -1: the lease is lost
RESULTS = f"""
local b = held(ARGV[1], ARGV[2], ARGV[3])
if not b then return -1 end
local open, ended = P .. 'open:' .. ARGV[1], P .. 'ended:' .. ARGV[1]
local rows, size = {{}}, 0
for _, id in ipairs(call('ZRANGE', ended, 0, {ROWS - 1})) do
  local custom_id = call('HGET', open, id)
  if not custom_id then
    call('ZREM', ended, id)
  else
    local job = call('HMGET', P .. 'job:' .. id, 'status', 'response', 'error')
    rows[#rows + 1] = {{id, custom_id, job[1] or '', job[2] or '', job[3] or ''}}
    size = size + #(job[2] or '')
    if size > tonumber(ARGV[4]) then break end
  end
end
return {{call('HGETALL', b), call('HLEN', open), rows}}
"""

# id, lease, lease_ms, segment, its bytes of output, of errors, lines that were written without a job, and the number of
# the last of them and the bytes up to its end, then each written line's job and whether it is completed → 1; -1: the
# lease is lost
COMMIT = """
local b = held(ARGV[1], ARGV[2], ARGV[3])
if not b then return -1 end
call('HSET', b, 'output:' .. ARGV[4], ARGV[5], 'error:' .. ARGV[4], ARGV[6])
if tonumber(ARGV[8]) > tonumber(call('HGET', b, 'fed_lines') or 0) then
  call('HINCRBY', b, 'failed', ARGV[7])
  call('HSET', b, 'fed_lines', ARGV[8], 'fed_bytes', ARGV[9])
end
for i = 10, #ARGV, 2 do
  if call('HDEL', P .. 'open:' .. ARGV[1], ARGV[i]) == 1 then
    call('HINCRBY', b, ARGV[i + 1] == '1' and 'completed' or 'failed', 1)
  end
  call('ZREM', P .. 'ended:' .. ARGV[1], ARGV[i])
  remove(ARGV[i])
end
return 1
"""

# id, lease, lease_ms, status → 1: every line that is in the queue has ended, now or before; -1: the lease is lost
CLOSE = """
if not held(ARGV[1], ARGV[2], ARGV[3]) then return -1 end
for _, id in ipairs(call('HKEYS', P .. 'open:' .. ARGV[1])) do
  if not call('ZSCORE', P .. 'ended:' .. ARGV[1], id) then
    settle(id, ARGV[4], '', '', '')
    call('ZADD', P .. 'ended:' .. ARGV[1], now, id)
  end
end
return 1
"""

# id, lease, lease_ms, outcome, output file's id or '', error file's id or '' → {outcome, both ids} as they were noted
# first; -1: the lease is lost
FINALIZE = """
local b = held(ARGV[1], ARGV[2], ARGV[3])
if not b then return -1 end
if call('HSETNX', b, 'outcome', ARGV[4]) == 1 then
  call('HSET', b, 'output_file_id', ARGV[5], 'error_file_id', ARGV[6])
  if ARGV[4] ~= 'cancelled' then call('HSET', b, 'status', 'finalizing', 'finalizing_at', now) end
end
return call('HMGET', b, 'outcome', 'output_file_id', 'error_file_id')
"""

# id, lease, lease_ms, status, errors, keep_ms → 1; -1: the lease is lost
END = """
local b = held(ARGV[1], ARGV[2], ARGV[3])
if not b then return call('ZSCORE', P .. 'active', ARGV[1]) and -1 or 1 end
for _, name in ipairs(call('HKEYS', b)) do
  if string.sub(name, 1, 7) == 'output:' or string.sub(name, 1, 6) == 'error:' then call('HDEL', b, name) end
end
call('HSET', b, 'status', ARGV[4], ARGV[4] .. '_at', now, 'errors', ARGV[5], 'lease', '')
call('ZREM', P .. 'active', ARGV[1])
call('DEL', P .. 'open:' .. ARGV[1], P .. 'ended:' .. ARGV[1])
call('PEXPIRE', b, ARGV[6])
keep_list(call('HGET', b, 'owner'), ARGV[6])
return 1
"""

# → unfinished batches, age of the oldest in ms, directories of files
STATS = """
local first = call('ZRANGE', P .. 'active', 0, 0, 'WITHSCORES')
return {call('ZCARD', P .. 'active'), first[2] and now - first[2] or 0,
  call('ZCOUNT', P .. 'stores', now - 60000, '+inf')}
"""
