"""The sampling options that a checkpoint proposes hold where a request leaves them out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek_triton.builders.checkpoint.config.sampling import gguf_sampling, hf_sampling, unknown_generation_keys
from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.errors import CheckpointError
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.models.options import read_options
from tests.support.checkpoints import make_tokenizer, write_tiny

# What published files say, and what holds where a request says nothing.
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "R1-Distill": ({"do_sample": True, "temperature": 0.6, "top_p": 0.95}, {"temperature": 0.6, "top_p": 0.95}),
    "Qwen2.5-Instruct": (
        {"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
        {"repetition_penalty": 1.05, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
    ),
    "Qwen2.5 base": ({"do_sample": False, "max_new_tokens": 2048}, {}),
    "no do_sample": ({"temperature": 0.6}, {"temperature": 0.6}),
    "do_sample off": ({"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
    "do_sample alone": ({"do_sample": True}, {"temperature": 1.0}),
    "null": ({"do_sample": None, "temperature": None, "top_k": None}, {}),
    "all tokens": ({"top_k": 0}, {}),
    "all tokens, vLLM's": ({"top_k": -1, "min_p": 0.1}, {"min_p": 0.1}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_published_files_propose(name: str) -> None:
    generation, expected = PUBLISHED[name]
    assert hf_sampling(generation) == expected
    assert unknown_generation_keys(generation) == ()


def test_a_gguf_proposes_too() -> None:
    metadata = {"general.sampling.temp": 0.6, "general.sampling.top_k": 0, "general.sampling.penalty_repeat": 1.1}
    assert gguf_sampling(metadata) == {"temperature": 0.6, "repetition_penalty": 1.1}


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"temperature": -1}, "temperature is -1, must be a finite number of at least 0"),
        ({"temperature": "0.6"}, "temperature is '0.6', must be"),
        ({"top_p": 0}, "top_p is 0, must be above 0 and at most 1"),
        ({"top_k": 2.5}, "top_k is 2.5, must be at least 1"),
        ({"do_sample": "yes"}, "do_sample is 'yes', must be true or false"),
    ],
)
def test_values_that_no_request_may_have_are_named(tmp_path: Path, generation: dict[str, Any], message: str) -> None:
    write_tiny(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(tmp_path)
    assert str(tmp_path / "generation_config.json") in str(error.value)


def test_what_is_not_served_is_named() -> None:
    generation = {"num_beams": 4, "no_repeat_ngram_size": 3, "typical_p": 1.0, "length_penalty": 1.0, "mystery": 1}
    assert unknown_generation_keys(generation) == (
        "warning: generation_config.json has keys that are not known here and have no effect: mystery",
        "warning: generation_config.json asks for what is not served and has no effect: num_beams 4, "
        "no_repeat_ngram_size 3",
    )


@pytest.mark.slow
def test_proposals_reach_a_request_that_leaves_them_out(tmp_path: Path) -> None:
    source = make_tokenizer(write_tiny(tmp_path / "checkpoint", vocab_size=260, eos_token_id=259), 260)
    (source / "generation_config.json").write_text(json.dumps(PUBLISHED["R1-Distill"][0]))
    build(BuildOptions(source, "m", tmp_path / "repository"))
    proposed = Manifest.load(tmp_path / "repository/m-engine/1").sampling
    assert proposed == {"temperature": 0.6, "top_p": 0.95}
    silent = read_options({}, proposed).params
    assert (silent.temperature, silent.top_p, silent.is_greedy) == (0.6, 0.95, False)
    greedy = read_options({"temperature": np.zeros((1, 1), np.float32)}, proposed).params
    assert greedy.is_greedy and greedy.top_p == 0.95
    assert read_options({}).params.is_greedy


@pytest.mark.slow
def test_a_manifest_of_before_proposes_nothing(tmp_path: Path) -> None:
    source = make_tokenizer(write_tiny(tmp_path / "checkpoint", vocab_size=260, eos_token_id=259), 260)
    build(BuildOptions(source, "m", tmp_path / "repository"))
    file = tmp_path / "repository/m-engine/1/manifest.json"
    values = json.loads(file.read_text())
    del values["sampling"]
    file.write_text(json.dumps(values))
    assert Manifest.load(file.parent).sampling == {}
