"""The cache manager that fits a runner."""

from __future__ import annotations

from deepseek_triton.ensemble.engine.cache.manager import CacheManager
from deepseek_triton.ensemble.engine.cache.pages import Pages
from deepseek_triton.ensemble.engine.cache.slots import Slots
from deepseek_triton.ensemble.engine.runners.base import PagedRunner, Runner


def cache_manager(runner: Runner, *, is_reused: bool = True) -> CacheManager:
    """Pages for a runner that has blocks, else slots."""
    if isinstance(runner, PagedRunner) and runner.num_blocks:
        return Pages(
            runner.max_num_seqs, runner.max_seq_len,
            num_blocks=runner.num_blocks, block_size=runner.block_size, is_reused=is_reused,
        )  # fmt: skip
    return Slots(runner.max_num_seqs, is_reused=is_reused, idle_position=runner.max_seq_len - 1)
