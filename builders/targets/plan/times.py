"""How long a step takes: the formulas of a plan, and the constants that measurements gave them.

The constants were fitted to two shapes in FP8: DENSE to DeepSeek-R1-Distill-Qwen-7B on one and two H100s
(benchmarks/results/decode-gpu.json), EXPERTS to DeepSeek-V2-Lite on one and two H200s (decode-gpu-v2-lite.json).
Another GPU or shape is an extrapolation: the ratio of published rates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from deepseek_triton.builders.targets.plan.gpus import GPUS_PER_MACHINE, NETWORK, Gpu
from deepseek_triton.builders.targets.plan.weights import Share
from deepseek_triton.ensemble.artefacts.cuda_memory import has_one_latent_kernel
from deepseek_triton.ensemble.decoder.spec import ModelSpec

MEMORY_EFFICIENCY = 0.915  # of the published rate: a plain read of an H100's memory reaches 3,065 of 3,350 GB/s
EXPERT_EFFICIENCY = 0.83  # the same of routed experts' weights: each is read for few tokens
LINK_EFFICIENCY = 0.45  # all-reduces and the narrower products of a split
ONE_KERNEL_S = 11e-6  # of a layer beyond reading, where one persistent kernel decodes one sequence
ONE_LATENT_KERNEL_S = 9e-6  # the same of latent attention and experts
ONE_OF_EXPERTS_S = 44e-6  # of other layers with experts on one GPU, whose kernels for one sequence are fewer
SPLIT_PROMPT_LAYER_S = 20e-6  # of a prompt's layer besides, with experts on several GPUs: no kernel starts early there
LAUNCH_S = 170e-6  # of a layer of a prompt at least: its kernels one after the other, however few tokens it has
PEER_ROWS = 64  # that GPUs of a machine add up in each other's memory at most; NCCL does it with more
# Of an all-reduce of few bytes
REDUCE_S = {"one kernel": 1e-6, "one row": 5e-6, "nvlink": 9e-6, "nccl": 36e-6, "pcie": 30e-6, "network": 40e-6}


@dataclass(frozen=True)
class Reached:
    """What a kind of model reaches. step_compute, prompt_compute: shares of the published FLOP/s.

    step_layer_s, prompt_layer_s: seconds of a layer beyond reading and computing. adds_reading: a prompt's weights are
    read before it is computed with them, not meanwhile.
    """

    step_compute: float
    prompt_compute: float
    step_layer_s: float
    prompt_layer_s: float
    adds_reading: bool


DENSE = Reached(0.54, 0.54, 31e-6, 31e-6, adds_reading=False)
EXPERTS = Reached(0.22, 0.365, 44e-6, 40e-6, adds_reading=True)


def formulas(has_experts: bool) -> tuple[str, ...]:
    """The formulas with a kind's constants, as a plan prints them."""
    kind = EXPERTS if has_experts else DENSE
    experts = f" (routed experts: {EXPERT_EFFICIENCY})" if has_experts else ""
    one = f" ({ONE_KERNEL_S * 1e6:.0f} for one sequence)"
    if has_experts:
        one = f" (one sequence, one GPU: {ONE_LATENT_KERNEL_S * 1e6:.0f} as V2-Lite, else {ONE_OF_EXPERTS_S * 1e6:.0f})"
    split = f" ({SPLIT_PROMPT_LAYER_S * 1e6:.0f} more on several GPUs)" if has_experts else ""
    prompt = f"read + operations / ({kind.prompt_compute} · FLOP rate)"
    if not kind.adds_reading:
        prompt = prompt.replace("read +", "max(read,") + ")"
    return (
        "floor = max(bytes read / memory rate, operations / FLOP rate), at the published rates",
        f"step = read + operations / ({kind.step_compute} · FLOP rate) + layers · {kind.step_layer_s * 1e6:.0f} µs{one}"
        " + exchange between GPUs",
        f"read = bytes read / ({MEMORY_EFFICIENCY}{experts} · memory rate)",
        "bytes read = weights every token needs + chosen experts · (1 - (1 - k/E)^tokens)"
        " + sequences · positions · cache",
        f"exchange = 2 · layers · (latency + bytes / ({LINK_EFFICIENCY} · link rate))",
        f"prompts = {prompt} + layers · {kind.prompt_layer_s * 1e6:.0f} µs{split} + exchange,"
        f" at least layers · {LAUNCH_S * 1e6:.0f} µs",
        "tokens/s = users · answer / (prompts of all users + answer · step at half the answer)",
        "cost of a million tokens = GPUs · price of an hour / 3600 / tokens/s · 1e6",
    )


@dataclass(frozen=True)
class StepTimes:
    """The times of one model's share on one kind of GPU. All in seconds."""

    spec: ModelSpec
    share: Share
    gpu: Gpu
    precision: str
    cache_precision: str = "bf16"

    def floor(self, num_sequences: int, num_positions: float) -> float:
        """The least time of a decode step that the published rates allow."""
        own = self._own(num_sequences) * self.share.users_divisor  # tokens' operations are told as shared by all GPUs
        products = own * self.share.flops_per_token / self.gpu.flops(self.precision)
        num_bytes = self.share.read_bytes(num_sequences) + self._cache_read(num_sequences, num_positions)
        return max(num_bytes / self.gpu.memory_bytes_per_s, products)

    def step(self, num_sequences: int, num_positions: float) -> float:
        """The expected time of a decode step, in which each of `num_sequences` with so many positions gets a token."""
        read = self._read(num_sequences, self._cache_read(num_sequences, num_positions))
        attention = num_positions * self.share.attention_flops
        operations = self._operations(self._own(num_sequences), self.share.flops_per_token, attention)
        is_one_kernel = num_sequences == 1 and self._has_one_kernel
        layer = self._reached.step_layer_s
        if is_one_kernel:
            layer = ONE_KERNEL_S if self.spec.latent is None else ONE_LATENT_KERNEL_S
        elif num_sequences == 1 and self.spec.experts is not None and self._where == "alone":
            layer = ONE_OF_EXPERTS_S
        where = self._where
        if num_sequences == 1 and where == "nvlink":
            where = "one kernel" if is_one_kernel else "one row"
        exchange = self._exchange(num_sequences, where)
        return read + operations / self._reached.step_compute + self.spec.num_layers * layer + exchange

    def prompts(self, num_prompts: int, num_tokens: int) -> float:
        """The expected time in which so many prompts of `num_tokens` are computed together."""
        total = num_prompts * num_tokens
        read = self._read(total, 0.0)
        products = self.share.flops_per_token - self.share.head_flops  # the head reads each prompt's last token
        attention = num_tokens / 2 * self.share.prompt_attention_flops  # on average, half of the prompt came before
        operations = self._operations(self._own(num_prompts) * num_tokens, products, attention)
        compute = operations / self._reached.prompt_compute
        both = read + compute if self._reached.adds_reading else max(read, compute)
        layers, layer = self.spec.num_layers, self._reached.prompt_layer_s
        if self.spec.experts is not None and self._where != "alone":
            layer += SPLIT_PROMPT_LAYER_S
        whole = both + layers * layer + self._exchange(total, self._where)
        return max(whole, layers * LAUNCH_S)

    def tokens_per_s(self, num_users: int, prompt_tokens: int, answer_tokens: int) -> float:
        """Answers' tokens each second where `num_users` always have a request: prompts and steps take turns."""
        step = self.step(num_users, prompt_tokens + answer_tokens / 2)
        return num_users * answer_tokens / (self.prompts(num_users, prompt_tokens) + answer_tokens * step)

    @property
    def _reached(self) -> Reached:
        return DENSE if self.spec.experts is None else EXPERTS

    @property
    def _has_one_kernel(self) -> bool:
        """Whether one persistent kernel decodes one sequence: no integers, and of latent attention as V2-Lite's."""
        spec = self.spec
        if self.cache_precision != "bf16":
            return False
        if spec.latent is None:
            return self._where in ("alone", "nvlink")
        return self._where == "alone" and has_one_latent_kernel(spec.num_heads, spec.latent, spec.experts)

    @property
    def _where(self) -> str:
        if self.share.num_gpus == 1:
            return "alone"
        if self.share.num_gpus > GPUS_PER_MACHINE:
            return "network"
        return "nvlink" if self.gpu.has_nvlink else "pcie"

    def _own(self, num_sequences: int) -> int:
        """The sequences whose cache is on one GPU."""
        return math.ceil(num_sequences / self.share.users_divisor)

    def _cache_read(self, num_sequences: int, num_positions: float) -> float:
        """Bytes of the cache that a decode step reads."""
        return self._own(num_sequences) * num_positions * self.share.cache_bytes_per_token

    def _read(self, num_tokens: float, cache_bytes: float) -> float:
        """Seconds in which a step with so many tokens reads its weights and the cache."""
        experts = self.share.read_bytes(num_tokens) - self.share.always_bytes
        plain = (self.share.always_bytes + cache_bytes) / MEMORY_EFFICIENCY
        return (plain + experts / EXPERT_EFFICIENCY) / self.gpu.memory_bytes_per_s

    def _operations(self, own_tokens: int, flops_per_token: float, attention_flops: float) -> float:
        """Seconds of the products at the published rates."""
        products, attention = flops_per_token / self.gpu.flops(self.precision), attention_flops / self.gpu.bf16_flops
        return own_tokens * self.share.users_divisor * (products + attention)

    def _exchange(self, num_tokens: int, where: str) -> float:
        """All-reduces, two a layer; where GPUs share out the sequences, each token's vector to its experts and back."""
        size = self.share.num_gpus
        if size == 1:
            return 0.0
        if self.spec.experts is None or self.share.users_divisor == 1:
            num_bytes = num_tokens * self.spec.hidden_size * 2 * 2 * (size - 1) / size
        else:  # a byte an element there, two back, half of it in each of the layer's two exchanges
            sent = num_tokens / size * self.spec.experts.num_experts_per_tok * self.spec.hidden_size * 3
            num_bytes = sent * (size - 1) / size / 2
        link = NETWORK if where == "network" else self.gpu.link_bytes_per_s
        latency = REDUCE_S["nccl" if where == "nvlink" and num_tokens > PEER_ROWS else where]
        return 2 * self.spec.num_layers * (latency + num_bytes / (LINK_EFFICIENCY * link))
