"""What a build says before it begins, and the recipe that it chooses within a budget."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.fp8 import plan
from deepseek_triton.builders.fp8.journal import journal_directory
from deepseek_triton.builders.fp8.plan import Rates, describe_seconds, estimated_seconds, planned
from deepseek_triton.builders.fp8.recipe import RECIPES
from deepseek_triton.builders.fp8.rounding.arrays import Arrays
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.ensemble.decoder.spec import ModelSpec

SEVEN = ModelSpec(
    "qwen2", 152064, 3584, 18944, 28, 28, 4, 128, 1e-6, 131072,
    tie_word_embeddings=False, qkv_bias=True, qk_norm=False,
)  # fmt: skip
SMALL = replace(SEVEN, vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_heads=12, num_kv_heads=2)
TWO_CORES = Rates(flops=6e10, weights=5e7, column_s=2e-4, element_s=5e-8)
GPU = Rates(flops=4e13, weights=2e10, column_s=1.36e-4, element_s=1e-10)  # an H100's
MEASURED = Path(__file__).parents[3] / "benchmarks" / "results" / "fp8-build-gpu.json"


def options(tmp_path: Path, **changes: Any) -> BuildOptions:
    return BuildOptions(tmp_path, "m", target="cuda", precision="fp8", **changes)


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> list[Rates]:
    now = [TWO_CORES]
    monkeypatch.setattr(plan.Rates, "measured", lambda arrays: now[0])
    return now


def test_the_best_recipe_that_ends_within_the_budget_is_chosen_and_told(tmp_path: Path, rates: list[Rates]) -> None:
    said: list[str] = []
    assert planned(options(tmp_path), SEVEN, said.append).recipe == "fast"
    assert "recipe fast will take some" in said[0] and "insist with --recipe default, or raise --budget" in said[0]
    assert " h, more than the budget of 15 minutes" in said[0]
    assert planned(options(tmp_path, budget=6000), SEVEN, said.append).recipe == "default"
    rates[0] = GPU
    assert planned(options(tmp_path), SEVEN, said.append).recipe == "default"
    assert said[-1].startswith("recipe default will take some") and "insist" not in said[-1]


def test_a_recipe_that_was_asked_for_stays_and_is_told_too(tmp_path: Path, rates: list[Rates]) -> None:
    said: list[str] = []
    assert planned(options(tmp_path, recipe="default"), SEVEN, said.append).recipe == "default"
    assert said[0].startswith("recipe default will take some") and said[0].endswith(" h on the processor")


def test_a_killed_build_is_gone_on_with_whatever_the_budget(tmp_path: Path, rates: list[Rates]) -> None:
    said: list[str] = []
    unfinished = journal_directory(tmp_path / "models", "m")
    (unfinished / "calibrate-0").mkdir(parents=True)
    (unfinished / "quantize-1").mkdir()
    (unfinished / "quantize-1" / "layer-0.npz").touch()
    asked = options(tmp_path, repository=tmp_path / "models")
    assert planned(asked, SEVEN, said.append).recipe == "default"
    assert said == ["going on where a killed build of m was: 1 of 28 layers are quantised"]


def test_who_gives_a_text_or_ranges_gets_the_recipe_that_reads_them(tmp_path: Path, rates: list[Rates]) -> None:
    for change in ({"calibration_text": tmp_path / "text"}, {"ranges": tmp_path / "ranges"}):
        assert planned(options(tmp_path, **change), SEVEN, lambda line: None).recipe == "default"


def test_other_precisions_are_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.Rates, "measured", None)
    asked = BuildOptions(tmp_path, "m", target="cuda", precision="bf16")
    assert planned(asked, SEVEN, print) is asked


def test_estimates_grow_with_what_there_is_to_do() -> None:
    def seconds(name: str, spec: ModelSpec = SEVEN, num_tokens: int = 9000, rates: Rates = GPU) -> float:
        return estimated_seconds(RECIPES[name], spec, rates, num_tokens, is_gpu=True)

    assert seconds("fast") < seconds("nearest") < seconds("default")
    assert seconds("default") < seconds("default", num_tokens=20000) < seconds("default", rates=TWO_CORES)
    half = ModelSpec(**{**SEVEN.__dict__, "num_layers": 14})
    assert 0.4 * seconds("default") < seconds("default", half) < 0.8 * seconds("default")


@pytest.mark.parametrize(
    ("run", "spec"),
    [
        ("build 7b, 2 layers, default", replace(SEVEN, num_layers=2)),
        ("build 1.5b, 28 layers, default", SMALL),
        ("build 7b, 28 layers, fast", SEVEN),
        ("build 1.5b, 28 layers, fast", SMALL),
    ],
)
def test_a_build_takes_about_as_long_as_was_said(
    run: str, spec: ModelSpec, tmp_path: Path, rates: list[Rates], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = json.loads(MEASURED.read_text(encoding="utf-8"))[run]["seconds"]
    monkeypatch.setattr(plan, "best_arrays", lambda: SimpleNamespace(is_gpu=True))
    monkeypatch.setattr(plan, "describe_seconds", str)
    rates[0], said = GPU, list[str]()
    planned(options(tmp_path, recipe=run.split(", ")[-1]), spec, said.append)
    (told,) = (float(word) for word in said[0].split() if word[0].isdigit())
    assert 0.8 * seconds <= told <= 1.3 * seconds


def test_rates_are_measured_here() -> None:
    rates = Rates.measured(Arrays())
    assert 1e8 < rates.flops < 1e14 and rates.weights > 1e5 and rates.column_s > 0 and rates.element_s >= 0


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.2, "1 s"), (75, "75 s"), (300, "5 min"), (5000, "83 min"), (90000, "25.0 h")]
)
def test_durations(seconds: float, told: str) -> None:
    assert describe_seconds(seconds) == told


def test_a_budget_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="budget is 0"):
        options(tmp_path, budget=0)
