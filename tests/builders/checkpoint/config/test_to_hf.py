"""A spec written as config.json is read back as the same spec."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from deepseek_triton.builders.checkpoint.config.hf_config import from_hf, unknown_config_keys
from deepseek_triton.builders.checkpoint.config.to_hf import LLAMA3, changed_config, config_from_spec
from deepseek_triton.builders.errors import UnsupportedError
from deepseek_triton.builders.graph.rope import inverse_frequencies
from deepseek_triton.ensemble.decoder.rope import RopeSpec
from deepseek_triton.ensemble.decoder.spec import ModelSpec
from tests.support.checkpoints import LATENT_OPTIONS, LATENT_SMALL, OPTIONS, SMALL

BOTH = {**{name: (SMALL, *option) for name, option in OPTIONS.items()},
        **{name: (LATENT_SMALL, *option) for name, option in LATENT_OPTIONS.items()}}  # fmt: skip


def own_config(option: str) -> dict[str, Any]:
    """As transformers writes it."""
    transformers = pytest.importorskip("transformers")
    base, model_type, changes = BOTH[option]
    config: dict[str, Any] = transformers.AutoConfig.for_model(model_type, **{**base, **changes}).to_dict()
    return config


@pytest.mark.parametrize("option", BOTH)
def test_a_spec_is_read_back(option: str) -> None:
    spec = from_hf(own_config(option))
    config = config_from_spec(spec, "float16")
    found = from_hf(config)
    if spec.latent is not None and found.latent is not None:  # by a logarithm and an exponential
        assert found.latent.softmax_factor == pytest.approx(spec.latent.softmax_factor)
        found = replace(found, latent=spec.latent)
    assert found == spec
    assert unknown_config_keys(config) == ()


@pytest.mark.parametrize("option", BOTH)
def test_a_checkpoint_s_own_configuration_keeps_what_isn_t_changed(option: str) -> None:
    config = own_config(option)
    spec = from_hf(config)
    smaller = replace(spec, num_layers=2, intermediate_size=64)
    found = changed_config({**config, "quantization_config": {"quant_method": "fp8"}}, smaller, (0, 2), "bfloat16")
    assert from_hf(found) == smaller
    assert found["dtype"] == "bfloat16" and "quantization_config" not in found


def llama(rope: RopeSpec) -> ModelSpec:
    return replace(from_hf({**SMALL, "model_type": "llama", "head_dim": 128}), rope=rope)


@pytest.mark.parametrize("scaled", LLAMA3)
def test_the_frequencies_of_a_gguf_are_those_of_llama_3(scaled: RopeSpec) -> None:
    scaled = replace(scaled, theta=500000.0)
    plain = RopeSpec(500000.0)
    factors = inverse_frequencies(plain, 128) / inverse_frequencies(scaled, 128)
    spec = llama(RopeSpec(500000.0, "factors", frequency_factors=tuple(map(float, factors))))
    assert from_hf(config_from_spec(spec, "float16")).rope == scaled


def test_other_frequencies_are_refused() -> None:
    spec = llama(RopeSpec(500000.0, "factors", frequency_factors=tuple(np.linspace(1, 5, 64))))
    with pytest.raises(UnsupportedError, match="isn't Llama 3's scaling by 8 or 32"):
        config_from_spec(spec, "float16")
