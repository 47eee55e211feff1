"""A plan as text for a person."""

from __future__ import annotations

from collections.abc import Iterator

from deepseek_triton.builders.targets.plan.gpus import PLANNED_GPUS
from deepseek_triton.builders.targets.plan.plan import Plan
from deepseek_triton.builders.targets.plan.times import formulas


def describe(plan: Plan) -> Iterator[str]:
    """Lines: what it is, its memory and whether that fits, its times, and how they were computed."""
    memory, gpus = plan.memory, f"{plan.num_gpus} × {plan.gpu}"
    yield f"{plan.model}: {plan.parameters / 1e9:.2f} billion parameters, {plan.precision} ({plan.source})"
    yield f"for {plan.users} users at once with a context of {plan.context:,} tokens, on {gpus}"
    yield ""
    yield "bytes of each GPU"
    yield f"  weights      {_gb(memory.weights)}"
    yield f"  cache        {_gb(memory.cache)}  ({plan.cache_bytes_per_token:,} bytes a token of the whole model)"
    yield f"  activations  {_gb(memory.activations)}"
    yield f"  together     {_gb(memory.needed)} of {_gb(memory.available).strip()}"
    if plan.fits:
        yield f"fits on {gpus}: yes"
    else:
        yield f"fits on {gpus}: NO. One of these must give:"
        yield from (f"  - {remedy}" for remedy in plan.remedies)
    if plan.pages_tokens:
        texts = f"{plan.pages_sequences:,} texts of {plan.prompt_tokens + plan.answer_tokens:,} tokens at once"
        yield f"the cache's pages take what is left: room for {plan.pages_tokens:,} tokens, {texts}"
    yield f"split: {plan.split}"
    yield f"served by: {plan.served_by}"
    yield ""
    yield f"times with prompts of {plan.prompt_tokens:,} and answers of {plan.answer_tokens:,} tokens"
    yield f"  first token, nothing else running        {_ms(plan.first_token_s)}"
    for who, floor, step in (
        ("1 user", plan.one_user_floor_s, plan.one_user_step_s),
        (f"{plan.users} users", plan.floor_s, plan.step_s),
    )[: plan.users]:
        yield f"  between tokens, {who:12}             {_ms(step)} expected, floor {_ms(floor).strip()}"
    yield f"  answers' tokens/s of all users           {plan.tokens_per_s:10,.0f}"
    yield f"  weights that one token reads             {_gb(plan.active_bytes)}"
    if plan.cost_per_million_tokens is not None:
        yield f"  cost of a million tokens of answers      {plan.cost_per_million_tokens:10.3f}"
    yield ""
    gpu = PLANNED_GPUS[plan.gpu]
    yield (
        f"{gpu.name}: {gpu.memory_bytes_per_s / 1e9:,.0f} GB/s, {gpu.flops(plan.precision) / 1e12:,.0f} TFLOP/s in "
        f"{plan.precision}, link {gpu.link_bytes_per_s / 1e9:,.0f} GB/s ({gpu.source})"
    )
    yield from formulas(plan.has_experts)


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:9.2f} GB"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:10.2f} ms"
