"""How a decoder is split over several GPUs: which rows and columns of each stored tensor belong to which rank.

What reads the hidden state is split by rows: whole heads, and columns of the MLP; what writes to it by columns, so that
each rank has a part of every sum. The head is split by vocabulary. Everything else is on every rank, and so is a key
head that several ranks share, and a latent. Experts are split as the MLP is, or whole experts are shared out. The file
on the disk stays whole. It knows no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property

from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape, LayoutError
from deepseek_triton.ensemble.artefacts.tensor_file import TensorEntry
from deepseek_triton.ensemble.decoder.moe import MixtureOfExperts
from deepseek_triton.ensemble.decoder.part import WHOLE, Shard, Split

TENSOR, EXPERTS = "tensor_parallel_size", "expert_parallel_size"


@dataclass(frozen=True)
class ShardedDecoder:
    """Rank `rank` of the decoder `whole`; tensor_size, expert_size: see `Split`.

    Raises:
        LayoutError: it can't be split evenly so.
    """

    whole: DecoderShape
    rank: int
    tensor_size: int
    expert_size: int = 1

    def __post_init__(self) -> None:
        check_split(self.whole, self.split)
        if not 0 <= self.rank < self.size:
            raise LayoutError(f"rank is {self.rank}, must be one of 0 … {self.size - 1}")

    @property
    def split(self) -> Split:
        """How the decoder is split."""
        return Split(self.tensor_size, self.expert_size)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.split.size

    @cached_property
    def shape(self) -> DecoderShape:
        """What this rank computes; vocabulary and hidden state stay whole."""
        own = {field.name for field in fields(DecoderShape)}
        parts = [part.sharded(self.split, self.rank) for part in self.whole.kinds]
        values = {name: value for part in parts for name, value in vars(part).items() if name in own}
        values.setdefault("num_kv_heads", values["num_heads"])  # latent attention has no key heads of its own
        return replace(self.whole, **values)

    @property
    def vocab_rows(self) -> slice:
        """The tokens whose logits this rank computes: `vocab_width`, fewer or none at the vocabulary's end."""
        start = min(self.rank * self.vocab_width, self.whole.vocab_size)
        return slice(start, min(start + self.vocab_width, self.whole.vocab_size))

    @property
    def vocab_width(self) -> int:
        """Logits of each rank, the last one's padded."""
        return -(-self.whole.vocab_size // self.size)

    def shard(self, name: str) -> Shard:
        """This rank's share of the stored tensor `name`; what isn't sharded is whole on every rank."""
        if name == "head":
            return Shard((self.vocab_rows,))
        matrix, _, kind = name.rpartition(".")
        matrix = matrix.rpartition(".")[2]
        for part in self.whole.kinds:
            if matrix in part.fused or matrix in part.stacked:
                return part.shard(matrix, kind, self.rank, self.split)
        return WHOLE

    def entry(self, name: str, entry: TensorEntry) -> TensorEntry:
        """What `shard` leaves of a stored tensor."""
        return replace(entry, shape=self.shard(name).shape(entry.shape))


def check_split(shape: DecoderShape, split: Split) -> None:
    """Can `shape` be split so?

    Raises:
        LayoutError: names the setting, and the values that this model allows.
    """
    if (found := reason_against(shape, split)) is None:
        return
    setting, reason = found
    field, most = ("tensor_size", shape.num_heads)
    if setting == EXPERTS:
        field, most = "expert_size", 1 if shape.experts is None else shape.experts.num_experts
    changed = ((size, replace(split, **{field: size})) for size in range(1, most + 1))
    possible = ", ".join(str(size) for size, other in changed if reason_against(shape, other) is None)
    allowed = f"this model allows {possible}" if possible else "this model can't be split so"
    raise LayoutError(f"{setting} is {getattr(split, field)}: {reason}; {allowed}")


def reason_against(shape: DecoderShape, split: Split) -> tuple[str, str] | None:
    """The setting that stands against splitting `shape` so, and why it does; None: nothing does."""
    for setting, size in ((TENSOR, split.tensor_size), (EXPERTS, split.expert_size)):
        if size < 1:
            return setting, "it must be at least 1"
    if split.expert_size > 1:
        if shape.experts is None:
            return EXPERTS, "the model has no experts"
        if split.tensor_size > 1 and split.tensor_size % split.expert_size:
            return EXPERTS, f"it must divide tensor_parallel_size {split.tensor_size}"
    for part in shape.kinds:
        if reason := part.reason_against(split):
            is_of_experts = isinstance(part, MixtureOfExperts) and split.expert_size > 1
            return EXPERTS if is_of_experts else TENSOR, reason
    return None
