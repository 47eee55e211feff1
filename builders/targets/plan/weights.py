"""What one GPU of a split holds and reads: bytes of weights and of the cache, and the arithmetic of a token.

Target `cuda` splits a model by tensor parallelism: whole heads, and columns of the MLP; routed experts are shared out
whole where their number allows it. A latent is the same for every head, so that every GPU has the whole cache. Where
that is too much, or over several machines, a plan is for data-parallel attention: each GPU has all of the attention,
computes it for its share of the sequences, and has a share of the routed experts.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatch

from deepseek_triton.builders.targets.plan.gpus import GPUS_PER_MACHINE
from deepseek_triton.ensemble.decoder.gqa import GroupedQueryAttention
from deepseek_triton.ensemble.decoder.mla import LatentAttention
from deepseek_triton.ensemble.decoder.moe import SHARED_DOWN, SHARED_GATE, SHARED_UP, MixtureOfExperts
from deepseek_triton.ensemble.decoder.part import CacheTensor, Linear, Module, Norm, Part, Split
from deepseek_triton.ensemble.decoder.spec import ModelSpec

WIDTH = {"bf16": 2, "fp8": 1}  # bytes of a weight
CACHE_WIDTH = {"bf16": 2, "int8": 1}  # of a cached number
SCALE_BYTES = 2  # of one head of one cached token in INT8
PAGE = 64  # positions of a block of target cuda's cache, which is in pages unless the build says otherwise
SHARED_EXPERTS = (SHARED_GATE, SHARED_UP, SHARED_DOWN)


@dataclass(frozen=True)
class Share:
    """What each of `num_gpus` holds, and what it computes of a token.

    Bytes: table: the embedding, of which a token reads one row. always: read by every step. experts: routed experts,
    of which a step reads those that its tokens chose. cache_bytes_per_token: what a position takes on a GPU that has
    its sequence. users_divisor: each sequence is on one GPU of so many.
    Operations (FLOP) of a token on this GPU: always_flops, expert_flops; head_flops: of these, the head's, which a
    prompt needs once. attention_flops, prompt_attention_flops: for each earlier position of a decode step, a prompt.
    """

    num_gpus: int
    table_bytes: int
    always_bytes: int
    expert_bytes: int
    chosen_share: float
    cache_bytes_per_token: int
    users_divisor: int
    always_flops: float
    expert_flops: float
    head_flops: float
    attention_flops: float
    prompt_attention_flops: float

    @property
    def weight_bytes(self) -> int:
        """All weights of the GPU."""
        return self.table_bytes + self.always_bytes + self.expert_bytes

    @property
    def flops_per_token(self) -> float:
        """The GPU's share of one token's matrix products, attention aside."""
        return self.always_flops + self.expert_flops

    def read_bytes(self, num_tokens: float) -> float:
        """Bytes of weights that a step with so many tokens reads: an expert that no token chose is not read."""
        hit = 1 - (1 - self.chosen_share) ** num_tokens if num_tokens < math.inf else 1.0
        return self.always_bytes + hit * self.expert_bytes


def can_split(spec: ModelSpec, num_gpus: int) -> bool:
    """Whether the model can be shared out evenly over so many GPUs."""
    if spec.experts is not None and (num_gpus > GPUS_PER_MACHINE or spec.experts.num_experts % num_gpus == 0):
        return spec.experts.num_experts % num_gpus == 0
    return tensor_split(spec, num_gpus) is not None


def tensor_split(spec: ModelSpec, num_gpus: int) -> Split | None:
    """How target `cuda` splits the model over so many GPUs of one machine; None: it can't."""
    splits = [Split(num_gpus)]
    if spec.experts is not None:
        splits = [Split(num_gpus, num_gpus), Split(num_gpus), Split(1, num_gpus)]
    parts = dict.fromkeys(part for layer in range(spec.num_layers) for part in spec.parts(layer))
    return next((split for split in splits if all(part.reason_against(split) is None for part in parts)), None)


def share_of(spec: ModelSpec, precision: str, cache_precision: str, num_gpus: int, split: Split | None = None) -> Share:
    """One GPU's share of `spec` with its linear layers in `precision`; `can_split` says whether there is one.

    split: target `cuda`'s; None: of latent attention the data-parallel one, of other attention `Split(num_gpus)`.
    """
    is_data_parallel = spec.latent is not None and split is None
    split = split or Split(num_gpus)
    layers = Counter(spec.parts(layer) for layer in range(spec.num_layers))
    always = experts = cache = 0
    always_flops = expert_flops = attention = prompt_attention = 0.0
    for parts, count in layers.items():
        for part in parts if is_data_parallel else [part.sharded(split, 0) for part in parts]:
            cache += count * sum(_cached_bytes(tensor, cache_precision) for tensor in part.cache)
            attention += count * _attention_flops(part, is_prompt=False)
            prompt_attention += count * _attention_flops(part, is_prompt=True)
            for module in part.modules:
                elements, num_bytes = _size(module, part, precision)
                if isinstance(part, MixtureOfExperts) and _is_routed(module):
                    experts += count * num_bytes
                    chosen = part.options.num_experts_per_tok / part.options.num_experts
                    expert_flops += count * 2 * elements * chosen
                else:
                    always += count * num_bytes
                    always_flops += count * 2 * elements if isinstance(module, Linear) else 0
    table = spec.vocab_size * spec.hidden_size
    divisor = num_gpus if is_data_parallel else 1
    head_flops = 2 * table / num_gpus
    head = 0 if spec.tie_word_embeddings and num_gpus == 1 else 2 * table // num_gpus
    read_twice = 2 * table if spec.tie_word_embeddings and num_gpus == 1 else 0  # the embedding is the head too
    always_flops = (always_flops / divisor) + head_flops
    chosen_share = 0.0 if spec.experts is None else spec.experts.num_experts_per_tok / spec.experts.num_experts
    return Share(
        num_gpus=num_gpus, table_bytes=2 * table - read_twice, always_bytes=always + head + read_twice,
        expert_bytes=experts // divisor, chosen_share=chosen_share,
        cache_bytes_per_token=cache, users_divisor=divisor, always_flops=always_flops,
        expert_flops=expert_flops / divisor, head_flops=head_flops,
        attention_flops=attention / divisor, prompt_attention_flops=prompt_attention / divisor,
    )  # fmt: skip


def _cached_bytes(tensor: CacheTensor, cache_precision: str) -> int:
    scales = SCALE_BYTES * tensor.num_heads if cache_precision == "int8" else 0
    return tensor.elements * CACHE_WIDTH[cache_precision] + scales


def _is_routed(module: Module) -> bool:
    return isinstance(module, Linear) and module.module not in SHARED_EXPERTS


def _size(module: Module, part: Part, precision: str) -> tuple[int, int]:
    """Elements of a module's weight, and its bytes: the linear layers that a recipe may put in FP8, others in 16 bits.

    An FP8 layer has a float32 scale for each output channel.
    """
    if isinstance(module, Norm):
        return module.size, 2 * module.size
    if not isinstance(module, Linear):
        elements = math.prod(module.shape)
        return elements, 2 * elements
    elements = module.out_features * module.in_features
    bias = 4 * module.out_features if module.has_bias else 0
    if precision == "fp8" and any(fnmatch(module.module, pattern) for pattern in part.LINEARS):
        return elements, elements + 4 * module.out_features + bias
    return elements, 2 * elements + bias


def _attention_flops(part: Part, is_prompt: bool) -> float:
    """Operations of a query token for each earlier position: scores, and the weighted sum."""
    if isinstance(part, GroupedQueryAttention):
        return 4.0 * part.q_size
    if isinstance(part, LatentAttention):  # a prompt's is taken of keys and values, a decode step's of the latent
        options = part.options
        width = options.qk_head_dim + options.v_head_dim if is_prompt else part.entry_size + options.kv_lora_rank
        return 2.0 * part.num_heads * width
    return 0.0
