"""A plan: does a model fit on some GPUs, how fast is it there, and what must give where it doesn't fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.targets.artefacts.decoder_shape import decoder_shape
from deepseek_triton.builders.targets.artefacts.memory import GIB
from deepseek_triton.builders.targets.cuda import TARGET
from deepseek_triton.builders.targets.plan.gpus import GPUS_PER_MACHINE, PLANNED_GPUS, Gpu
from deepseek_triton.builders.targets.plan.models import PlannedModel
from deepseek_triton.builders.targets.plan.times import StepTimes
from deepseek_triton.builders.targets.plan.weights import PAGE, Share, can_split, share_of, tensor_split
from deepseek_triton.ensemble.artefacts.cuda_memory import step_bytes
from deepseek_triton.ensemble.artefacts.cuda_split import ShardedDecoder
from deepseek_triton.ensemble.decoder.part import Split

DRIVER_BYTES = GIB  # of each GPU, which CUDA's context takes and no process gets
COUNTS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Wanted:
    """What is to be served. Lengths in tokens; users: sequences at once, each with room for `context`.

    has_pages: whether the cache is in pages; else each sequence has a slot. num_gpus: None: as few as it fits on.
    price: of a GPU's hour, in any currency; None: no cost is told.
    """

    gpu: Gpu
    context: int
    users: int
    prompt_tokens: int
    answer_tokens: int
    precision: str
    cache_precision: str = "bf16"
    has_pages: bool = True
    num_gpus: int | None = None
    price: float | None = None


@dataclass(frozen=True)
class GpuMemory:
    """Bytes of each GPU."""

    weights: int
    cache: int
    activations: int
    available: int

    @property
    def needed(self) -> int:
        """All three."""
        return self.weights + self.cache + self.activations

    @property
    def fits(self) -> bool:
        """Whether a GPU has that much."""
        return self.needed <= self.available


@dataclass(frozen=True)
class Plan:
    """The answer. Times in seconds; the first group of fields says what was asked.

    active_bytes: weights that one token reads, on all GPUs together. pages_tokens: what the cache's pages hold, which
    take all that weights and activations leave, 0 for slots; pages_sequences: so many of a prompt and an answer.
    split, served_by, remedies: for the user.
    """

    model: str
    source: str
    gpu: str
    num_gpus: int
    precision: str
    cache_precision: str
    context: int
    users: int
    prompt_tokens: int
    answer_tokens: int
    parameters: int
    has_experts: bool
    active_bytes: int
    cache_bytes_per_token: int
    memory: GpuMemory
    fits: bool
    pages_tokens: int
    pages_sequences: int
    split: str
    served_by: str
    one_user_floor_s: float
    one_user_step_s: float
    floor_s: float
    step_s: float
    first_token_s: float
    tokens_per_s: float
    cost_per_million_tokens: float | None
    remedies: tuple[str, ...]


def make_plan(model: PlannedModel, wanted: Wanted) -> Plan:
    """Plan `model` on so many GPUs as were asked for, or as few as it fits on.

    Raises:
        BuildError: a number doesn't fit the model, or it can't be shared out over so many GPUs.
    """
    _check(model, wanted)
    model = replace(model, spec=model.spec.for_length(wanted.context))
    num_gpus = wanted.num_gpus or _fewest(model, wanted) or _largest(model)
    split, share, memory = _placed(model, wanted, num_gpus)
    times = StepTimes(model.spec, share, wanted.gpu, wanted.precision, wanted.cache_precision)
    full = wanted.prompt_tokens + wanted.answer_tokens
    rate = times.tokens_per_s(wanted.users, wanted.prompt_tokens, wanted.answer_tokens)
    whole = share_of(model.spec, wanted.precision, wanted.cache_precision, 1)
    pages = _pages(memory, share, wanted)
    return Plan(
        model=model.name, source=model.source, gpu=wanted.gpu.name, num_gpus=num_gpus, precision=wanted.precision,
        cache_precision=wanted.cache_precision, context=wanted.context, users=wanted.users,
        prompt_tokens=wanted.prompt_tokens, answer_tokens=wanted.answer_tokens,
        parameters=model.spec.num_parameters(), has_experts=model.spec.experts is not None,
        active_bytes=round(whole.read_bytes(1)),
        cache_bytes_per_token=whole.cache_bytes_per_token, memory=memory, fits=memory.fits,
        pages_tokens=pages * PAGE, pages_sequences=_sequences(wanted, pages),
        split=_split(model, num_gpus, split), served_by=_served_by(model, wanted, num_gpus, split),
        one_user_floor_s=times.floor(1, full), one_user_step_s=times.step(1, full),
        floor_s=times.floor(wanted.users, full), step_s=times.step(wanted.users, full),
        first_token_s=times.prompts(1, wanted.prompt_tokens), tokens_per_s=rate,
        cost_per_million_tokens=None if wanted.price is None else num_gpus * wanted.price / 3600 / rate * 1e6,
        remedies=() if memory.fits else tuple(_remedies(model, wanted, num_gpus)),
    )  # fmt: skip


def memory_of(model: PlannedModel, wanted: Wanted, num_gpus: int) -> GpuMemory:
    """What each GPU must hold: every sequence has a cache of `context` positions."""
    return _placed(model, wanted, num_gpus)[2]


def _placed(model: PlannedModel, wanted: Wanted, num_gpus: int) -> tuple[Split | None, Share, GpuMemory]:
    """The split, one GPU's share and its memory: as target cuda does it; None where that doesn't fit: data-parallel."""
    spec = model.spec
    split = tensor_split(spec, num_gpus)
    if spec.experts is None or (split is not None and num_gpus <= GPUS_PER_MACHINE):
        share = share_of(spec, wanted.precision, wanted.cache_precision, num_gpus, split)
        memory = _memory(model, wanted, share, split or Split(num_gpus))
        if memory.fits or spec.experts is None or num_gpus == 1 or spec.experts.num_experts % num_gpus:
            return split, share, memory
    share = share_of(spec, wanted.precision, wanted.cache_precision, num_gpus)
    return None, share, _memory(model, wanted, share, Split())


def _memory(model: PlannedModel, wanted: Wanted, share: Share, split: Split) -> GpuMemory:
    users = -(-wanted.users // share.users_divisor)
    shape = decoder_shape(model.spec, wanted.context)
    step_tokens = min(TARGET.own_settings.default_values()["max_num_batched_tokens"], wanted.context * users)
    own = ShardedDecoder(shape, 0, split.tensor_size, split.expert_size).shape
    activations = step_bytes(own, users, step_tokens, share.num_gpus)
    positions = _blocks(wanted.context) * PAGE if wanted.has_pages else wanted.context
    cache = users * positions * share.cache_bytes_per_token
    return GpuMemory(share.weight_bytes, cache, activations, wanted.gpu.memory_bytes - DRIVER_BYTES)


def _blocks(num_tokens: int) -> int:
    """Blocks that a sequence of so many tokens fills."""
    return -(-num_tokens // PAGE)


def _pages(memory: GpuMemory, share: Share, wanted: Wanted) -> int:
    """Blocks of all GPUs that have room beside weights and activations; on each, one belongs to nobody."""
    if not wanted.has_pages:
        return 0
    left = memory.available - memory.weights - memory.activations
    return max(0, left // (PAGE * share.cache_bytes_per_token) - 1) * share.users_divisor


def _sequences(wanted: Wanted, pages: int) -> int:
    return pages // _blocks(wanted.prompt_tokens + wanted.answer_tokens)


def _check(model: PlannedModel, wanted: Wanted) -> None:
    if wanted.context > model.spec.max_seq_len:
        raise BuildError(f"context is {wanted.context}, but {model.name} has at most {model.spec.max_seq_len} tokens")
    bound = TARGET.bound_by_indexer(model.spec, "generate")
    if bound is not None and wanted.context > bound:
        raise BuildError(
            f"context is {wanted.context}: texts of more than {bound} tokens need the indexer of {model.name}, which "
            "target cuda doesn't compute"
        )
    if min(wanted.prompt_tokens, wanted.answer_tokens) < 1:
        raise BuildError(f"context is {wanted.context}, must have room for a prompt and an answer")
    if wanted.prompt_tokens + wanted.answer_tokens > wanted.context:
        raise BuildError(
            f"prompt_tokens {wanted.prompt_tokens} and answer_tokens {wanted.answer_tokens} together are more than "
            f"context {wanted.context}"
        )
    if wanted.precision == "fp8" and wanted.gpu.fp8_flops is None:
        raise BuildError(f"{wanted.gpu.name} has no FP8: use --precision bf16")
    if wanted.num_gpus is not None and not can_split(model.spec, wanted.num_gpus):
        possible = ", ".join(str(count) for count in range(1, COUNTS[-1] + 1) if can_split(model.spec, count))
        raise BuildError(f"{model.name} can't be shared out over {wanted.num_gpus} GPUs; it can over {possible}")


def _counts(model: PlannedModel) -> list[int]:
    """Numbers of GPUs to try: of one machine; experts, which move least between machines, also over several."""
    most = COUNTS[-1] if model.spec.experts is not None else GPUS_PER_MACHINE
    return [count for count in COUNTS if count <= most and can_split(model.spec, count)]


def _fewest(model: PlannedModel, wanted: Wanted) -> int | None:
    return next((count for count in _counts(model) if memory_of(model, wanted, count).fits), None)


def _largest(model: PlannedModel) -> int:
    return _counts(model)[-1]


def _split(model: PlannedModel, num_gpus: int, split: Split | None) -> str:
    if num_gpus == 1:
        return "none: one GPU has all of it"
    if split is not None:
        return _tensor_split(model, num_gpus, split)
    assert model.spec.experts is not None
    machines = -(-num_gpus // GPUS_PER_MACHINE)
    where = "" if machines == 1 else f", {machines} machines of {GPUS_PER_MACHINE}"
    return (
        f"expert parallelism over {num_gpus}{where}: each GPU has {model.spec.experts.num_experts // num_gpus} experts "
        "of each layer, and all of the attention, which it computes for its share of the users"
    )


def _tensor_split(model: PlannedModel, num_gpus: int, split: Split) -> str:
    heads = f"tensor parallelism over {num_gpus}: whole heads and columns of the MLP on each GPU"
    if split.tensor_size == 1:
        heads = f"expert parallelism over {num_gpus}: attention and dense MLPs on each GPU"
    if (experts := model.spec.experts) is not None:
        own = f"{experts.num_experts // split.expert_size} experts of each layer"
        heads += f", with {own}" if split.expert_size > 1 else " and of each expert"
    return heads + ("; the latent cache whole on each" if model.spec.latent is not None else "")


def _served_by(model: PlannedModel, wanted: Wanted, num_gpus: int, placed: Split | None) -> str:
    """The command that builds it so, or what stands against it here."""
    parts = {part for layer in range(model.spec.num_layers) for part in model.spec.parts(layer)}
    is_fp8 = wanted.precision == "fp8"
    built = TARGET.quantized_parts if is_fp8 else TARGET.parts
    for part in sorted(parts, key=lambda part: part.NOUN):
        if type(part) not in built:
            return f"not here yet: target cuda doesn't build its {part.NOUN}; the plan is for an engine that does"
    if placed is None:
        why = "serves from one machine" if num_gpus > GPUS_PER_MACHINE else "would have the whole cache on each GPU"
        return f"not here yet: target cuda {why}; the plan is for an engine with data-parallel attention"
    split = f" --tensor-parallel-size {placed.tensor_size}" if placed.tensor_size > 1 else ""
    split += f" --expert-parallel-size {placed.expert_size}" if placed.expert_size > 1 else ""
    if wanted.cache_precision != "bf16":
        if model.spec.latent is not None:
            return "not here yet: latent attention has no INT8 cache; the plan is for an engine that has one"
        split += " --kv-cache pages-int8"
    elif not wanted.has_pages:
        split += " --kv-cache slots"
    lengths = f"--max-seq-len {wanted.context} --max-num-seqs {wanted.users}"
    return f"deepseek-triton build … --target cuda --precision {wanted.precision} {lengths}{split}"


def _remedies(model: PlannedModel, wanted: Wanted, num_gpus: int) -> list[str]:
    """Each change that alone makes it fit; largest numbers of users and context by bisection."""

    def fits(**changes: Any) -> bool:
        return memory_of(model, replace(wanted, **changes), num_gpus).fits

    found = []
    length = wanted.prompt_tokens + wanted.answer_tokens
    _, share, memory = _placed(model, wanted, num_gpus)
    pages = _pages(memory, share, wanted)
    if wanted.users <= (most := _sequences(wanted, pages)):
        found.append(
            f"texts of {length:,} tokens instead of {wanted.context:,}: the cache's pages hold {most:,} at once"
        )
    if users := _most(wanted.users, lambda users: fits(users=users)):
        found.append(f"{users} users instead of {wanted.users}")
    if context := _most(wanted.context, lambda context: context > 1 and fits(context=context)):
        found.append(f"a context of {context:,} tokens instead of {wanted.context:,}")
    if wanted.precision != "fp8" and wanted.gpu.fp8_flops is not None and fits(precision="fp8"):
        found.append("FP8 weights instead of BF16")
    if wanted.cache_precision != "int8" and model.spec.latent is None and fits(cache_precision="int8"):
        found.append("an INT8 cache (--kv-cache pages-int8)")
    if fewest := _fewest(model, wanted):
        found.append(f"{fewest} GPUs instead of {num_gpus}")
    for gpu in sorted(PLANNED_GPUS.values(), key=lambda gpu: gpu.memory_bytes):
        if wanted.precision == "fp8" and gpu.fp8_flops is None:
            continue
        if gpu.memory_bytes > wanted.gpu.memory_bytes and fits(gpu=gpu):
            found.append(f"{num_gpus} × {gpu.name}")
            break
    return found or ["no single change is enough: combine fewer users, a shorter context and more GPUs"]


def _most(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number below `most` that fits; 0: none."""
    low, high = 0, most
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
