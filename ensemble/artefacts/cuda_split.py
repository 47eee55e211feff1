"""How a decoder is split over several GPUs: which rows and columns of each stored tensor belong to which rank.

What reads the hidden state is split by rows: whole heads, and columns of the MLP; what writes to it by columns, so that
each rank has a part of every sum. The head is split by vocabulary. Everything else is on every rank, and so is a key
head that several ranks share. The file on the disk stays whole. It knows no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property

from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape, LayoutError
from deepseek_triton.ensemble.artefacts.tensor_file import TensorEntry
from deepseek_triton.ensemble.decoder.part import WHOLE, Shard


@dataclass(frozen=True)
class ShardedDecoder:
    """Rank `rank` of `size` of the decoder `whole`.

    Raises:
        LayoutError: it can't be split evenly over `size` ranks.
    """

    whole: DecoderShape
    rank: int
    size: int

    def __post_init__(self) -> None:
        if reason := reason_against(self.whole, self.size):
            sizes = range(1, self.whole.num_heads + 1)
            possible = ", ".join(str(size) for size in sizes if reason_against(self.whole, size) is None)
            raise LayoutError(f"tensor_parallel_size is {self.size}: {reason}; this model allows {possible}")
        if not 0 <= self.rank < self.size:
            raise LayoutError(f"rank is {self.rank}, must be one of 0 … {self.size - 1}")

    @cached_property
    def shape(self) -> DecoderShape:
        """What this rank computes; vocabulary and hidden state stay whole."""
        own = {field.name for field in fields(DecoderShape)}
        parts = [part.sharded(self.size) for part in self.whole.parts]
        return replace(
            self.whole, **{name: value for part in parts for name, value in vars(part).items() if name in own}
        )

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
        for part in self.whole.parts:
            if matrix in part.fused:
                return part.shard(matrix, kind, self.rank, self.size)
        return WHOLE

    def entry(self, name: str, entry: TensorEntry) -> TensorEntry:
        """What `shard` leaves of a stored tensor."""
        return replace(entry, shape=self.shard(name).shape(entry.shape))


def reason_against(shape: DecoderShape, size: int) -> str | None:
    """Why `shape` can't be split over `size` ranks; None: it can."""
    if size < 1:
        return "it must be at least 1"
    return next((reason for part in shape.parts if (reason := part.reason_against(size))), None)
