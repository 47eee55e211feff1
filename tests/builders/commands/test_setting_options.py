"""Every setting has an option of `build`; the one that scoring models have too belongs to the task."""

from __future__ import annotations

from dataclasses import fields

import pytest

from deepseek_triton.builders import cli
from deepseek_triton.builders.commands.build import read_options
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.builders.targets import all_targets
from deepseek_triton.builders.targets.artefacts.target import Target
from deepseek_triton.ensemble.protocol.settings import EngineSettings

VALUES = {
    "max_num_seqs": 3, "max_num_batched_tokens": 17, "max_prefill_stall": 2.5, "prefix_reuse": "off", "num_threads": 2,
    "max_queue_size": 5, "priority_levels": 4, "queue_timeout_ms": 10, "timeout_ms": 20, "cancel_after_s": 0.5,
    "batch_invariant": True, "tensor_parallel_size": 2, "nv_trt_llm_metrics": True,
    "kv_cache": "pages", "kv_cache_tokens": 4096, "pipeline_parallel_size": 2, "expert_parallel": True,
    "expert_parallel_size": 4,
    "gpu_memory_share": 0.5,
}  # fmt: skip


def read(*words: str) -> BuildOptions:
    return read_options(cli.parse(["build", "c", "--name", "m", *words]))


def test_every_setting_is_a_targets() -> None:
    assert set(VALUES) == {field.name for field in fields(EngineSettings)}
    assert set(VALUES) == {name for target in all_targets() for name in target.own_settings.table()}


@pytest.mark.parametrize("target", all_targets(), ids=lambda target: target.name)
def test_every_setting_can_be_given_and_is_repeated_by_the_command(target: Target) -> None:
    values = {name: VALUES[name] for name in target.own_settings.table()}
    words = ["--target", target.name]
    for name, value in values.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    options = read(*words)
    assert options.settings == values
    again = read_options(cli.parse(options.command().split()[1:]))
    assert again.settings == values


def test_what_is_not_given_is_the_targets() -> None:
    assert read().settings == {}


def test_the_queue_is_that_of_the_model_that_is_built() -> None:
    scoring = read("--task", "score", "--max-queue-size", "7")
    assert scoring.settings == {} and scoring.scoring.batching.max_queue_size == 7
    assert "--max-queue-size 7" in scoring.command()
    assert read("--task", "score").scoring.batching.max_queue_size == 0
    generating = read("--max-queue-size", "5")
    assert generating.settings == {"max_queue_size": 5} and generating.scoring.batching.max_queue_size == 0
    with pytest.raises(BuildError, match="max_queue_size is 0, must be an integer of at least 1"):
        read("--max-queue-size", "0")
