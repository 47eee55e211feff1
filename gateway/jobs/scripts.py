"""The queue's steps as Lua: Redis runs each as a whole, so a process that is killed leaves none half done.

Keys, all below one prefix (KEYS[1]):
  job:ID        hash; goes away by itself after `forget_at`
  events:ID     stream of what became of the job; goes with it
  waiting:0-3   sorted sets of jobs by their time of creation, one for each priority; 3 has lines of batches
  later         jobs that are tried again, by when
  running       jobs by the end of their lease
  deadlines     jobs by when they expire
  hooks         jobs whose end is to be told, by when
  dead          the newest jobs that failed too often
  idem:…        hash: an idempotency key's job and request
  sizes, held, bytes   what each thing takes, until when it is kept, and the sum
  bell          a list on which idle workers wait
  ended:BATCH   sorted set of a batch's lines whose results its feeder has to write yet (`batches.scripts`)

A lease is a token that only one delivery of a job has. What no longer holds it can't store anything.
"""

from __future__ import annotations

MAX_DEAD = 1000
MAX_EVENTS = 20_000
MAX_BELLS = 64
AT_ONCE = 100  # that one call of a script reclaims or expires

_COMMON = f"""
local P = KEYS[1]
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local call = redis.call
local function ring()
  call('LPUSH', P .. 'bell', '1'); call('LTRIM', P .. 'bell', 0, {MAX_BELLS - 1}); call('EXPIRE', P .. 'bell', 60)
end
local function hold(member, size, gone_at)
  local before = tonumber(call('HGET', P .. 'sizes', member) or 0)
  call('INCRBY', P .. 'bytes', size - before)
  if size == 0 then call('HDEL', P .. 'sizes', member); call('ZREM', P .. 'held', member); return end
  call('HSET', P .. 'sizes', member, size)
  call('ZADD', P .. 'held', gone_at, member)
end
local function event(id, kind, data)
  if string.sub(id, 1, 10) == 'batch_req_' then return end  -- nobody follows one line
  local key = P .. 'events:' .. id
  call('XADD', key, 'MAXLEN', '~', {MAX_EVENTS}, '*', 'event', kind, 'data', data)
  call('PEXPIREAT', key, call('HGET', P .. 'job:' .. id, 'forget_at'))
end
local function enqueue(id)
  local job = call('HMGET', P .. 'job:' .. id, 'priority', 'created')
  if job[1] then call('ZADD', P .. 'waiting:' .. job[1], job[2], id); ring() end
end
local function unplace(id)
  for _, name in ipairs({{'waiting:0', 'waiting:1', 'waiting:2', 'waiting:3', 'later', 'running', 'deadlines'}}) do
    call('ZREM', P .. name, id)
  end
end
-- The one place in which a job ends.
local function settle(id, status, response, fault, by)
  local job = P .. 'job:' .. id
  unplace(id)
  local keep, webhook, batch = unpack(call('HMGET', job, 'keep_ms', 'webhook', 'batch'))
  if not keep then return end
  local forget_at = now + keep
  call('HSET', job, 'status', status, 'finished', now, 'forget_at', forget_at, 'lease', '', 'by', by)
  if response ~= '' then call('HSET', job, 'response', response) end
  if fault ~= '' then call('HSET', job, 'error', fault) end
  if batch then
    call('HDEL', job, 'body')
    if call('HEXISTS', P .. 'open:' .. batch, id) == 1 then call('ZADD', P .. 'ended:' .. batch, now, id) end
  elseif status == 'failed' then
    call('ZADD', P .. 'dead', now, id); call('ZREMRANGEBYRANK', P .. 'dead', 0, -{MAX_DEAD + 1})
  else
    call('HDEL', job, 'body')
  end
  call('PEXPIREAT', job, forget_at)
  hold('job:' .. id, #response + #fault + call('HSTRLEN', job, 'body'), forget_at)
  event(id, status, '{{}}')
  if webhook then call('ZADD', P .. 'hooks', now, id) end
end
local function fault_of(code, message)
  return cjson.encode({{code = code, message = message}})
end
local function bury(id, code, message)
  settle(id, 'failed', '', fault_of(code, message), '')
end
local function attempts_left(id)
  local job = call('HMGET', P .. 'job:' .. id, 'attempts', 'max_attempts')
  return job[1] and tonumber(job[2]) - tonumber(job[1])
end
"""

# id, idempotency key, fingerprint, max_waiting, max_bytes, ttl_ms, keep_ms, priority, fields and values …
SUBMIT = """
local id, idem, mark, job = ARGV[1], P .. 'idem:' .. ARGV[2], ARGV[3], P .. 'job:' .. ARGV[1]
if call('EXISTS', job) == 1 then return {'new', id} end
if ARGV[2] ~= '' then
  local known = call('HMGET', idem, 'id', 'mark')
  if known[1] and call('EXISTS', P .. 'job:' .. known[1]) == 1 then
    return {known[2] == mark and 'known' or 'differs', known[1]}
  end
end
local waiting = call('ZCARD', P .. 'later')
for level = 0, 2 do waiting = waiting + call('ZCARD', P .. 'waiting:' .. level) end
if waiting >= tonumber(ARGV[4]) then return {'full', 'jobs'} end
local size = 0
for i = 9, #ARGV do size = size + #ARGV[i] end
if tonumber(call('GET', P .. 'bytes') or 0) + size > tonumber(ARGV[5]) then return {'full', 'bytes'} end
local deadline = now + ARGV[6]
local forget_at = deadline + ARGV[7]
call('HSET', job, 'status', 'queued', 'created', now, 'deadline', deadline, 'forget_at', forget_at, 'keep_ms', ARGV[7],
  'priority', ARGV[8], 'attempts', 0, 'lease', '', unpack(ARGV, 9))
call('PEXPIREAT', job, forget_at)
call('ZADD', P .. 'deadlines', deadline, id)
hold('job:' .. id, size, forget_at)
if ARGV[2] ~= '' then
  call('HSET', idem, 'id', id, 'mark', mark); call('PEXPIREAT', idem, forget_at)
end
event(id, 'queued', '{}')
enqueue(id)
return {'new', id}
"""

# token, lease_ms, count → {id, lease, fields} for each job
TAKE = f"""
for _, id in ipairs(call('ZRANGEBYSCORE', P .. 'running', '-inf', now, 'LIMIT', 0, {AT_ONCE})) do
  call('ZREM', P .. 'running', id)
  local left = attempts_left(id)
  if left and left <= 0 then
    bury(id, 'worker_lost', 'the processes that ran this job died, each time')
  elseif left then
    call('HSET', P .. 'job:' .. id, 'status', 'queued', 'lease', '')
    enqueue(id)
  end
end
for _, id in ipairs(call('ZRANGEBYSCORE', P .. 'later', '-inf', now, 'LIMIT', 0, {AT_ONCE})) do
  call('ZREM', P .. 'later', id)
  enqueue(id)
end
local taken = {{}}
for level = 0, 3 do
  while #taken < tonumber(ARGV[3]) do
    local id = call('ZPOPMIN', P .. 'waiting:' .. level)[1]
    if not id then break end
    local job = P .. 'job:' .. id
    if call('EXISTS', job) == 1 then
      local attempt = call('HINCRBY', job, 'attempts', 1)
      local lease = ARGV[1] .. ':' .. id .. ':' .. attempt
      call('HSET', job, 'status', 'running', 'lease', lease, 'started', now, 'emitted', 0)
      call('ZADD', P .. 'running', now + ARGV[2], id)
      event(id, 'running', '{{"attempt":' .. attempt .. '}}')
      taken[#taken + 1] = {{id, lease, call('HGETALL', job)}}
    end
  end
end
return taken
"""

# lease_ms, then ids and leases → the ids whose lease is lost
RENEW = """
local lost = {}
for i = 2, #ARGV, 2 do
  if call('HGET', P .. 'job:' .. ARGV[i], 'lease') == ARGV[i + 1] then
    call('ZADD', P .. 'running', now + ARGV[1], ARGV[i])
  else
    lost[#lost + 1] = ARGV[i]
  end
end
return lost
"""

# id, lease, status, response, error → 1: stored; 0: the lease is lost
FINISH = """
local held, by = unpack(call('HMGET', P .. 'job:' .. ARGV[1], 'lease', 'by'))
if by == ARGV[2] then return 1 end  -- said again: the answer to the first time got lost
if held ~= ARGV[2] then return 0 end
settle(ARGV[1], ARGV[3], ARGV[4], ARGV[5], ARGV[2])
if ARGV[3] == 'failed' then call('ZREM', P .. 'dead', ARGV[1]) end
return 1
"""

# id, lease, delay_ms, whether this attempt counts, response, error → 1: it is tried again; 2: buried; 0: lease lost
RETRY = """
local job = P .. 'job:' .. ARGV[1]
if call('HGET', job, 'lease') ~= ARGV[2] then return 0 end
if ARGV[4] == '0' then
  call('HINCRBY', job, 'attempts', -1)
elseif attempts_left(ARGV[1]) <= 0 then
  settle(ARGV[1], 'failed', ARGV[5], ARGV[6], ARGV[2])
  return 2
end
call('ZREM', P .. 'running', ARGV[1])
call('HSET', job, 'status', 'queued', 'lease', '')
if ARGV[3] == '0' then enqueue(ARGV[1]) else call('ZADD', P .. 'later', now + ARGV[3], ARGV[1]) end
event(ARGV[1], 'queued', '{}')
return 1
"""

# id, owner → 1: it is or was there; 0: no such job of this owner
CANCEL = """
local status, owner, batch = unpack(call('HMGET', P .. 'job:' .. ARGV[1], 'status', 'owner', 'batch'))
if not status or batch or owner ~= ARGV[2] then return 0 end
if status == 'queued' or status == 'running' then settle(ARGV[1], 'cancelled', '', '', '') end
return 1
"""

# id, lease, the number of events before, then events' data
EMIT = """
local job = P .. 'job:' .. ARGV[1]
local lease, emitted = unpack(call('HMGET', job, 'lease', 'emitted'))
if lease ~= ARGV[2] then return 0 end
if emitted and tonumber(emitted) > tonumber(ARGV[3]) then return 1 end  -- said again
for i = 4, #ARGV do event(ARGV[1], 'chunk', ARGV[i]) end
call('HSET', job, 'emitted', ARGV[3] + #ARGV - 3)
return 1
"""

SWEEP = f"""
local due = call('ZRANGEBYSCORE', P .. 'deadlines', '-inf', now, 'LIMIT', 0, {AT_ONCE})
for _, id in ipairs(due) do
  unplace(id)
  settle(id, 'expired', '', fault_of('expired', 'this request did not end before it expired'), '')
end
local old = call('ZRANGEBYSCORE', P .. 'held', '-inf', now, 'LIMIT', 0, {AT_ONCE})
for _, member in ipairs(old) do hold(member, 0, 0) end
for _, id in ipairs(call('ZRANGE', P .. 'dead', 0, 9)) do
  if call('EXISTS', P .. 'job:' .. id) == 0 then call('ZREM', P .. 'dead', id) end
end
return #due + #old
"""

# → waiting of each priority, later, running, dead, bytes, age of the oldest that waits in ms
STATS = """
local oldest, counts = now, {}
for level = 0, 3 do
  counts[level + 1] = call('ZCARD', P .. 'waiting:' .. level)
  local first = call('ZRANGE', P .. 'waiting:' .. level, 0, 0, 'WITHSCORES')
  if first[2] then oldest = math.min(oldest, tonumber(first[2])) end
end
return {counts[1], counts[2], counts[3], counts[4], call('ZCARD', P .. 'later'), call('ZCARD', P .. 'running'),
  call('ZCARD', P .. 'dead'), tonumber(call('GET', P .. 'bytes') or 0), now - oldest}
"""

# lease_ms, count → {id, fields} for each webhook that is due; it is due again when the lease ends
TAKE_HOOKS = """
local taken = {}
for _, id in ipairs(call('ZRANGEBYSCORE', P .. 'hooks', '-inf', now, 'LIMIT', 0, ARGV[2])) do
  if call('EXISTS', P .. 'job:' .. id) == 1 then
    call('ZADD', P .. 'hooks', now + ARGV[1], id)
    taken[#taken + 1] = {id, call('HINCRBY', P .. 'job:' .. id, 'webhook_tries', 1), call('HGETALL', P .. 'job:' .. id)}
  else
    call('ZREM', P .. 'hooks', id)
  end
end
return taken
"""

# id, "delivered", "failed", or "" to try again, delay_ms
NOTE_HOOK = """
if ARGV[2] == '' then call('ZADD', P .. 'hooks', 'XX', now + ARGV[3], ARGV[1]); return 1 end
call('ZREM', P .. 'hooks', ARGV[1])
if call('EXISTS', P .. 'job:' .. ARGV[1]) == 1 then
  call('HSET', P .. 'job:' .. ARGV[1], 'webhook_status', ARGV[2])
end
return 1
"""


def script(steps: str, more: str = "") -> str:
    """A whole script; `more`: functions that its steps need beside the common ones."""
    return _COMMON + more + steps
