"""Plans against what was measured, what was published, and what the targets' own code says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deepseek_triton.builders.cli import main
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.targets.artefacts.decoder_shape import decoder_shape
from deepseek_triton.builders.targets.cuda import TARGET
from deepseek_triton.builders.targets.plan.gpus import PLANNED_GPUS
from deepseek_triton.builders.targets.plan.models import MODELS, find_model
from deepseek_triton.builders.targets.plan.plan import Plan, Wanted, make_plan
from deepseek_triton.builders.targets.plan.times import StepTimes, formulas
from deepseek_triton.builders.targets.plan.weights import PAGE, can_split, share_of
from deepseek_triton.ensemble.artefacts.cuda_split import ShardedDecoder
from deepseek_triton.ensemble.decoder.part import Split
from deepseek_triton.ensemble.engine.runners.cuda.persistent.latent import LatentFamily

RESULTS = Path(__file__).parents[4] / "benchmarks" / "results"
# Every file of benchmarks.decode_gpu's: its GPU and the model of its shape
DECODED = {
    "decode-gpu.json": ("h100", "r1-distill-qwen-7b"),
    "decode-gpu-h200.json": ("h200", "r1-distill-qwen-7b"),
    "decode-gpu-v2-lite.json": ("h200", "v2-lite"),
}
WITHIN = 0.15
SHORT = Wanted(PLANNED_GPUS["h100"], context=4096, users=8, prompt_tokens=512, answer_tokens=128, precision="fp8")


def recorded(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return found


def plan(name: str, **changes: Any) -> Plan:
    return make_plan(find_model(name), replace(SHORT, **changes))


def measured() -> Iterator[Any]:
    """Each figure that benchmarks.decode_gpu recorded of target cuda: model, what is changed of SHORT, kind, value."""
    for file, (gpu, model) in DECODED.items():
        for engine, values in recorded(file)["engines"].items():
            if not engine.startswith("cuda"):
                continue
            place = {"gpu": PLANNED_GPUS[gpu], "num_gpus": 2 if "2 GPUs" in engine else 1}
            alone = {**place, "users": 1, "prompt_tokens": 128}
            figures = [("one_user_step_s", alone, values["time_between_tokens_ms"] / 1e3)]
            figures += [("one_user_floor_s", alone, values["floor_ms"] / 1e3)]
            for tokens, ms in values["time_to_first_token_ms"].items():
                figures.append(("first_token_s", {**alone, "prompt_tokens": int(tokens)}, ms / 1e3))
            for users, rate in values["tokens_per_s"].items():
                figures.append(("tokens_per_s", {**place, "users": int(users)}, rate))
            for number, (kind, changes, value) in enumerate(figures):
                name = f"{gpu}-{model}-{engine.replace(', ', '-').replace(' ', '')}-{kind}-{number}"
                yield pytest.param(model, changes, kind, value, id=name)


@pytest.mark.parametrize(("model", "changes", "kind", "value"), list(measured()))
def test_every_measured_figure_is_planned(model: str, changes: dict[str, Any], kind: str, value: float) -> None:
    assert getattr(plan(model, **changes), kind) == pytest.approx(value, rel=WITHIN)


def test_no_recorded_gpu_is_left_out() -> None:
    assert {path.name for path in RESULTS.glob("decode-gpu*.json")} == set(DECODED)
    for file, (gpu, _) in DECODED.items():
        assert gpu in recorded(file)["machine"]["gpu"].lower()


def test_pages_and_a_long_prompt_are_those_measured() -> None:
    found = recorded("pages-gpu.json")["pages, 1 GPUs"]
    wanted = {"gpu": PLANNED_GPUS["h200"], "num_gpus": 1, "context": 33_024, "users": 256}
    pages = plan("r1-distill-qwen-7b", **wanted)
    assert pages.pages_tokens / 64 == pytest.approx(found["cache_blocks"], rel=0.02)
    long = plan("r1-distill-qwen-7b", **wanted, prompt_tokens=32_768)
    assert long.first_token_s * 1e3 == pytest.approx(found["long"]["first_token_median_ms"], rel=WITHIN)


@pytest.mark.slow
def test_r1_on_eight_h200_is_near_what_was_published() -> None:
    """TensorRT-LLM's own figure; experts' constants are from V2-Lite on one GPU."""
    eight = {"gpu": PLANNED_GPUS["h200"], "num_gpus": 8, "users": 1024, "prompt_tokens": 1024, "answer_tokens": 2048}
    assert plan("r1", **eight).tokens_per_s == pytest.approx(11_489, rel=WITHIN)


@pytest.mark.parametrize("users", [64, 128])
def test_tokens_through_triton_are_the_runners_within_the_recorded_share(users: int) -> None:
    runner = recorded("serving-gpu.json")["runner"]["tokens_per_s"][str(users)]
    assert plan("r1-distill-qwen-7b", users=users).tokens_per_s == pytest.approx(runner, rel=WITHIN)


@pytest.mark.parametrize("name", ["r1-distill-qwen-7b", "llm-67b", "coder-1.3b"])
@pytest.mark.parametrize("num_gpus", [1, 2, 4])
def test_the_cache_is_what_target_cuda_takes(name: str, num_gpus: int) -> None:
    model = find_model(name)
    if not can_split(model.spec, num_gpus):
        pytest.skip("can't be shared out so")
    share = share_of(model.spec, "fp8", "bf16", num_gpus)
    assert share.cache_bytes_per_token * 100 == TARGET.sequence_bytes(model.spec, "fp8", 100, Split(num_gpus))


@pytest.mark.parametrize("kind", ["pages", "pages-int8"])
@pytest.mark.parametrize("num_gpus", [1, 2, 4])
def test_a_block_is_what_the_runner_takes(kind: Any, num_gpus: int) -> None:
    pytest.importorskip("triton")
    from deepseek_triton.ensemble.engine.runners.cuda.pages import CacheForm

    spec = find_model("r1-distill-qwen-7b").spec
    shape = ShardedDecoder(decoder_shape(spec, 4096), 0, num_gpus).shape
    share = share_of(spec, "fp8", "int8" if kind == "pages-int8" else "bf16", num_gpus)
    assert PAGE * share.cache_bytes_per_token == CacheForm(kind).block_bytes(shape, 2)


def test_pages_hold_what_slots_do_not() -> None:
    """Many short texts with a long context: slots are too long for it, pages aren't."""
    wanted: dict[str, Any] = {"num_gpus": 1, "context": 32_768, "users": 64}
    slots, pages = (plan("r1-distill-qwen-7b", **wanted, has_pages=has_pages) for has_pages in (False, True))
    assert (slots.pages_tokens, slots.pages_sequences) == (0, 0)
    assert slots.served_by.endswith("--kv-cache slots") and "--kv-cache" not in pages.served_by
    assert pages.pages_sequences == pages.pages_tokens // 640 > 64
    assert (
        pages.remedies[0]
        == f"texts of 640 tokens instead of 32,768: the cache's pages hold {pages.pages_sequences:,} at once"
    )
    assert not any("pages hold" in remedy for remedy in slots.remedies)
    whole = plan("r1-distill-qwen-7b", **wanted, prompt_tokens=32_768 - 128)
    assert not any("pages hold" in remedy for remedy in whole.remedies)
    integers = plan("r1-distill-qwen-7b", **wanted, cache_precision="int8")
    assert integers.pages_tokens == pytest.approx(pages.pages_tokens * 1.97, rel=0.01), "docs/cache.md says so"
    assert integers.one_user_step_s > pages.one_user_step_s, "the kernel of one sequence reads no integers"


def test_latent_attention_keeps_576_values_a_layer_and_a_token_chooses_its_experts() -> None:
    share = share_of(find_model("r1").spec, "fp8", "bf16", 1)
    assert share.cache_bytes_per_token == 61 * 576 * 2
    assert share.weight_bytes == pytest.approx(671e9, rel=0.02)
    assert share.flops_per_token / 2 == pytest.approx(37e9, rel=0.03), "37 billion parameters are active"
    assert share.read_bytes(1) < 0.07 * share.read_bytes(10_000)
    lite = share_of(find_model("v2-lite").spec, "bf16", "bf16", 1)
    assert lite.flops_per_token / 2 == pytest.approx(2.4e9, rel=0.05), "2.4 billion parameters are active"


def test_the_one_kernel_of_latent_attention_takes_the_models_that_the_plan_says() -> None:
    """Builders don't know the runners, so the plan has conditions of its own."""
    specs = {name: find_model(name).spec.for_length(2048) for name in MODELS}
    gpu, found = PLANNED_GPUS["h200"], {}
    for name, spec in specs.items():
        if spec.latent is None:
            continue
        found[name] = StepTimes(spec, share_of(spec, "fp8", "bf16", 1), gpu, "fp8")._has_one_kernel
        family = LatentFamily(decoder_shape(spec, 2048), True, blocks=132, shared_limit=232_448)
        assert found[name] == (family.reason_against(1) is None), name
    assert set(found.values()) == {False, True}


def test_eight_gpus_share_experts_and_users() -> None:
    one, eight = (share_of(find_model("r1").spec, "fp8", "bf16", count) for count in (1, 8))
    assert eight.expert_bytes * 8 == one.expert_bytes
    assert eight.cache_bytes_per_token == one.cache_bytes_per_token
    assert eight.users_divisor == 8
    assert eight.flops_per_token * 8 == pytest.approx(one.flops_per_token)
    assert not can_split(find_model("r1").spec, 7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "gpu", "least"),
    [("r1", "h100", 16), ("r1", "h200", 8), ("r1", "b200", 4), ("v2-lite", "h100", 1), ("llm-67b", "h100", 1),
     ("llm-67b", "a100", 2), ("r1-distill-llama-70b", "l40s", 2)],
)  # fmt: skip
def test_the_fewest_gpus_are_found(name: str, gpu: str, least: int) -> None:
    wanted = {"gpu": PLANNED_GPUS[gpu], "precision": PLANNED_GPUS[gpu].precision, "users": 1}
    found = plan(name, **wanted)
    assert (found.fits, found.num_gpus) == (True, least)


def test_the_claims_of_67b_on_eight_a100_and_on_four_4090() -> None:
    eight = plan("llm-67b", gpu=PLANNED_GPUS["a100"], precision="bf16", num_gpus=8, users=1)
    assert eight.fits and eight.one_user_step_s < eight.first_token_s < 0.120
    four = {"gpu": PLANNED_GPUS["rtx4090"], "num_gpus": 4, "users": 1}
    assert plan("llm-67b", **four).fits
    assert not plan("llm-67b", **four, precision="bf16").fits


def test_what_must_give_is_enough_and_no_more() -> None:
    too_much = plan("r1-distill-qwen-7b", num_gpus=1, context=32768, users=64)
    assert not too_much.fits
    users = next(int(text.split()[0]) for text in too_much.remedies if "users" in text)
    assert plan("r1-distill-qwen-7b", num_gpus=1, context=32768, users=users).fits
    assert not plan("r1-distill-qwen-7b", num_gpus=1, context=32768, users=users + 1).fits
    context = next(int(text.split()[3].replace(",", "")) for text in too_much.remedies if "context" in text)
    assert plan("r1-distill-qwen-7b", num_gpus=1, context=context, users=64).fits
    assert not plan("r1-distill-qwen-7b", num_gpus=1, context=context + 1, users=64).fits
    assert {"an INT8 cache (--kv-cache pages-int8)", "2 GPUs instead of 1", "1 × h200"} <= set(too_much.remedies)


def test_cost_is_price_over_tokens() -> None:
    found = plan("r1-distill-qwen-7b", price=2.5, num_gpus=2)
    assert found.cost_per_million_tokens == pytest.approx(2 * 2.5 / (found.tokens_per_s * 3600) * 1e6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 200_000}, "has at most 131072 tokens"),
        ({"context": 1, "prompt_tokens": 0}, "must have room for a prompt and an answer"),
        ({"prompt_tokens": 4000}, "are more than context 4096"),
        ({"gpu": PLANNED_GPUS["a100"]}, "a100 has no FP8: use --precision bf16"),
        ({"num_gpus": 3}, "can't be shared out over 3 GPUs; it can over 1, 2, 4"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BuildError, match=message):
        plan("r1-distill-qwen-7b", **changes)


@pytest.mark.parametrize("gpu", PLANNED_GPUS.values(), ids=PLANNED_GPUS)
def test_more_work_never_takes_less_time(gpu: Any) -> None:
    for name in ("r1-distill-qwen-7b", "v2-lite"):
        spec = find_model(name).spec
        times = StepTimes(spec, share_of(spec, gpu.precision, "bf16", 1), gpu, gpu.precision)
        steps = [times.step(users, positions) for users in (2, 8, 64) for positions in (100, 1000)]
        assert steps == sorted(steps)
        assert all(times.floor(users, 500) < times.step(users, 500) for users in (1, 2, 64, 512))


@pytest.mark.slow
def test_the_command_prints_the_plan_and_its_formulas(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "r1-distill-qwen-7b", "--gpu", "h100", "--context", "32768", "--users", "64"]
    assert main([*words, "--price", "2.5"]) == 0
    text = capsys.readouterr().out
    assert "fits on 2 × h100: yes" in text and "--tensor-parallel-size 2" in text and "cost of a million" in text
    assert all(formula in text for formula in formulas(has_experts=False))
    assert main([*words, "--gpus", "1", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["fits"] is False and values["remedies"]
    assert main(["plan", "r1", "--gpu", "h200"]) == 0
    assert "--tensor-parallel-size 8 --expert-parallel-size 8" in capsys.readouterr().out
    assert main(["plan", "v2-lite", "--gpu", "h100"]) == 0
    assert "--target cuda --precision fp8" in (text := capsys.readouterr().out) and "--recipe" not in text
    assert all(formula in text for formula in formulas(has_experts=True))
    assert main(["plan", "r1-distill-qwen-7b", "--gpu", "h100", "--kv-cache", "pages-int8"]) == 0
    assert "--kv-cache pages-int8" in capsys.readouterr().out
    assert main(["plan", "v2-lite", "--gpu", "h100", "--cache-precision", "int8"]) == 0
    assert "latent attention has no INT8 cache" in capsys.readouterr().out
