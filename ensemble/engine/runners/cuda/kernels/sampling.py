"""Sampling on the GPU: greedy, or by temperature, top-k, top-p and min-p.

Logits are not sorted. z = (logit − largest logit) / temperature is at most 0, and the bits of −z, read as an integer,
have the order of −z. Bisection over these integers finds the k-th largest logit, or the end of the nucleus. One random
number a row, a function of (seed, step) alone, picks one of the tokens kept: the result depends neither on the batch
nor on the slot. Tokens that tie with the last one kept are kept too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deepseek_triton.ensemble.engine.runners.cuda.kernels.common import begin, wait

MIN_TEMPERATURE = tl.constexpr(1e-5)
NO_BOUND = tl.constexpr(0x7F800000)  # the bits of +infinity: every z is kept


@triton.jit
def scan_logits(
    logits,  # [M, V] float32
    chunk_max,  # [M, CHUNKS] float32
    chunk_best,  # [M, CHUNKS] int32, the first token with chunk_max
    chunk_sum,  # [M, CHUNKS] float32, Σ exp(logit − chunk_max)
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The largest logit of each chunk of the vocabulary, and its sum of exponentials."""
    begin(PDL)
    wait(PDL)
    chunk, m = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    value = tl.load(logits + m * V + token, mask=token < V, other=-float("inf"))
    best = tl.max(value)
    at = m * CHUNKS + chunk
    tl.store(chunk_max + at, best)
    tl.store(chunk_best + at, tl.min(tl.where(value == best, token, V)))
    tl.store(chunk_sum + at, tl.sum(tl.exp(value - best)))


@triton.jit
def _keys(row, token, best, temperature, V: tl.constexpr):
    """z of each token, and its key, the bits of −z: larger for less likely tokens."""
    value = tl.load(row + token, mask=token < V, other=-float("inf"))
    z = (value - best) / temperature
    return z, (tl.maximum(-z, 0.0)).to(tl.int32, bitcast=True)


@triton.jit
def _mass(row, best, temperature, bound, V: tl.constexpr, BLOCK: tl.constexpr):
    """Number of tokens whose key is at most `bound`, and their Σ exp(z)."""
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    for first in range(0, V, BLOCK):
        token = first + tl.arange(0, BLOCK)
        z, key = _keys(row, token, best, temperature, V)
        kept = (key <= bound) & (token < V)
        count += kept.to(tl.int32)
        mass += tl.where(kept, tl.exp(z), 0.0)
    return tl.sum(count), tl.sum(mass)


@triton.jit
def sample_tokens(
    logits,  # [M, V] float32
    chunk_max,  # [M, CHUNKS], from scan_logits
    chunk_best,
    chunk_sum,
    temperatures,  # [M] float32; below MIN_TEMPERATURE: greedy
    top_ks,  # [M] int32, 0: all
    top_ps,  # [M] float32, 1: all
    min_ps,  # [M] float32, 0: all
    seeds,  # [M] int64
    steps,  # [M] int64
    tokens,  # [M] int64
    places,  # [M] int32, of a row's results in the next two
    host_tokens,  # [results] int64, in the host's memory
    host_log_probs,  # [results] float32, likewise: of the token at temperature 1, without top-k, top-p and min-p
    V: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sample one token a row."""
    begin(PDL)
    wait(PDL)
    m = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, BLOCK_CHUNKS)
    at, mask = m * CHUNKS + chunk, chunk < CHUNKS
    maxima = tl.load(chunk_max + at, mask=mask, other=-float("inf"))
    best = tl.max(maxima)
    token = tl.min(tl.where(maxima == best, tl.load(chunk_best + at, mask=mask, other=V), V))
    token = tl.minimum(token, V - 1)  # with NaN no token is the largest; the log probability is NaN then
    sums = tl.load(chunk_sum + at, mask=mask, other=0.0) * tl.exp(maxima - best)
    log_sum = tl.log(tl.sum(tl.where(mask, sums, 0.0)))
    row = logits + m * V
    temperature, top_k = tl.load(temperatures + m), tl.load(top_ks + m)
    if (temperature >= MIN_TEMPERATURE) & (top_k != 1):
        bound = NO_BOUND + 0 * top_k
        if top_k > 0:
            low = 0 * top_k - 1  # `low` keeps too few tokens, `bound` enough
            while bound - low > 1:
                middle = low + (bound - low) // 2
                count, _mass_of = _mass(row, best, temperature, middle, V, BLOCK)
                if count >= top_k:
                    bound = middle
                else:
                    low = middle
        top_p = tl.load(top_ps + m)
        _count, total = _mass(row, best, temperature, bound, V, BLOCK)
        if top_p < 1.0:
            low = 0 * top_k - 1
            wanted = top_p * total
            while bound - low > 1:
                middle = low + (bound - low) // 2
                _count_of, mass = _mass(row, best, temperature, middle, V, BLOCK)
                if mass >= wanted:
                    bound = middle
                else:
                    low = middle
        min_p = tl.load(min_ps + m)
        if min_p > 0.0:
            bound = tl.minimum(bound, tl.maximum(-tl.log(min_p), 0.0).to(tl.int32, bitcast=True))
        _count, total = _mass(row, best, temperature, bound, V, BLOCK)
        step = tl.load(steps + m)
        high_step = (step >> 32).to(tl.int32)
        random, _a, _b, _c = tl.philox(tl.load(seeds + m), step.to(tl.int32), high_step, 0 * high_step, 0 * high_step)
        target = tl.uint_to_uniform_float(random) * total
        before = 0.0
        sampled = token
        found = token < 0
        for first in range(0, V, BLOCK):
            candidate = first + tl.arange(0, BLOCK)
            z, key = _keys(row, candidate, best, temperature, V)
            weight = tl.where((key <= bound) & (candidate < V), tl.exp(z), 0.0)
            running = before + tl.cumsum(weight)
            reached = tl.min(tl.where((running > target) & (weight > 0.0), candidate, V))
            if (reached < V) & (found == 0):
                sampled = reached
                found = reached < V
            before += tl.sum(weight)
        token = sampled
    place = tl.load(places + m)
    tl.store(tokens + m, token.to(tl.int64))
    tl.store(host_tokens + place, token.to(tl.int64))
    tl.store(host_log_probs + place, tl.load(row + token) - best - log_sum)
