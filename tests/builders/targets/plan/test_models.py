"""The table of DeepSeek's models: shapes against the parameters that are published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepseek_triton.builders.errors import BuildError, CheckpointError
from deepseek_triton.builders.targets.plan.models import MODELS, OTHERS, PUBLISHED, find_model
from deepseek_triton.clients.nearest import did_you_mean

# Billions of parameters on the models' pages, to the digits that are given there.
PARAMETERS = {
    "llm-7b": 6.91, "llm-67b": 67.4, "coder-1.3b": 1.35, "coder-6.7b": 6.74, "coder-33b": 33.3, "math-7b": 6.91,
    "r1-distill-qwen-1.5b": 1.78, "r1-distill-qwen-7b": 7.62, "r1-distill-qwen-14b": 14.8,
    "r1-distill-qwen-32b": 32.8, "r1-distill-llama-8b": 8.03, "r1-distill-llama-70b": 70.6, "r1-0528-qwen3-8b": 8.19,
    "v2-lite": 15.7, "coder-v2-lite": 15.7, "v2": 236, "v2.5": 236, "coder-v2": 236, "v3": 671, "v3.1": 671,
    "r1": 671, "v3.2-exp": 671,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "billions"), PARAMETERS.items())
def test_a_shape_has_the_published_number_of_parameters(name: str, billions: float) -> None:
    assert find_model(name).spec.num_parameters() / 1e9 == pytest.approx(billions, rel=0.005)


def test_every_published_shape_is_tested() -> None:
    assert {id(MODELS[f"deepseek-{name}"]) for name in PARAMETERS} == {id(published) for published in PUBLISHED}


@pytest.mark.parametrize("text", ["deepseek-ai/DeepSeek-R1", "DeepSeek-R1", "r1", "R1-0528"])
def test_a_name_may_have_its_owner_and_capitals(text: str) -> None:
    model = find_model(text)
    assert model.spec.num_layers == 61
    assert "deepseek-ai/DeepSeek-V3" in model.source


@pytest.mark.parametrize("name", OTHERS)
def test_what_cannot_run_is_refused_by_name(name: str) -> None:
    with pytest.raises(BuildError, match="can't be planned: it"):
        find_model(f"deepseek-ai/DeepSeek-{name}")


def test_a_misspelt_name_gets_the_nearest() -> None:
    with pytest.raises(BuildError, match="did you mean deepseek-r1-distill-qwen-7b"):
        find_model("r1-distil-qwen-7b", did_you_mean)


def test_a_folder_needs_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODELS["deepseek-v2-lite"].config), encoding="utf-8")
    assert find_model(str(tmp_path)).spec == find_model("v2-lite").spec
    (tmp_path / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(CheckpointError, match="must hold a JSON object"):
        find_model(str(tmp_path))


@pytest.mark.slow
def test_a_gguf_file_gives_its_shape() -> None:
    from tests.support.checkpoints import smollm2_path

    assert find_model(str(smollm2_path())).spec.num_layers == 30
