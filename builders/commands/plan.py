"""`deepseek-triton plan`: what a model needs of GPUs, how fast it is there, and what it costs."""

from __future__ import annotations

import argparse

DEFAULT_CONTEXT = 8192
SHARE_OF_ANSWER = 4  # of a context, an answer takes one part in so many where nothing else is said


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    from deepseek_triton.builders.targets.plan.gpus import PLANNED_GPUS
    from deepseek_triton.builders.targets.plan.weights import CACHE_WIDTH, WIDTH
    from deepseek_triton.ensemble.protocol.settings import KV_CACHES

    parser.add_argument("model", help="a DeepSeek model's name as r1-distill-qwen-7b, a checkpoint's folder, a .gguf")
    parser.add_argument("--gpu", choices=PLANNED_GPUS, default="h100", help="the kind of GPU (default: %(default)s)")
    parser.add_argument("--gpus", type=_count, metavar="N", help="how many (default: as few as it fits on)")
    parser.add_argument(
        "--context",
        type=_count,
        metavar="TOKENS",
        help="of each user (default: 8192, or as much as the model and target cuda can)",
    )
    parser.add_argument("--users", type=_count, default=1, metavar="N", help="at once (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=_count, metavar="N", help="default: what the answer leaves of it")
    parser.add_argument("--answer-tokens", type=_count, metavar="N", help="default: a quarter of the context")
    parser.add_argument("--precision", choices=WIDTH, help="of the linear layers (default: the GPU's fastest)")
    cache = parser.add_mutually_exclusive_group()
    cache.add_argument("--kv-cache", choices=KV_CACHES, default="pages", help="as of `build` (default: %(default)s)")
    cache.add_argument("--cache-precision", choices=CACHE_WIDTH, help="int8: the same as --kv-cache pages-int8")
    parser.add_argument("--price", type=_price, metavar="AMOUNT", help="of one GPU for an hour, to tell the cost")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; a model that doesn't fit is an answer, not an error."""
    from deepseek_triton.builders.targets.cuda import TARGET
    from deepseek_triton.builders.targets.plan.gpus import PLANNED_GPUS
    from deepseek_triton.builders.targets.plan.models import find_model
    from deepseek_triton.builders.targets.plan.plan import Wanted, make_plan
    from deepseek_triton.builders.targets.plan.text import describe
    from deepseek_triton.clients.nearest import did_you_mean
    from deepseek_triton.clients.printing import json_line

    model, gpu = find_model(arguments.model, did_you_mean), PLANNED_GPUS[arguments.gpu]
    bound = TARGET.bound_by_indexer(model.spec, "generate") or model.spec.max_seq_len
    context = arguments.context or min(DEFAULT_CONTEXT, bound, model.spec.max_seq_len)
    answer = arguments.answer_tokens or max(1, context // SHARE_OF_ANSWER)
    wanted = Wanted(
        gpu=gpu, context=context, users=arguments.users, prompt_tokens=arguments.prompt_tokens or context - answer,
        answer_tokens=answer, precision=arguments.precision or gpu.precision,
        cache_precision="int8" if arguments.kv_cache == "pages-int8" else arguments.cache_precision or "bf16",
        has_pages=arguments.kv_cache != "slots", num_gpus=arguments.gpus, price=arguments.price,
    )  # fmt: skip
    plan = make_plan(model, wanted)
    print(json_line(plan) if arguments.json else "\n".join(describe(plan)))
    return 0


def _count(text: str) -> int:
    value = int(text)
    if not 0 < value <= 1_000_000_000:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number above 0")
    return value


def _price(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return value
