"""How a decoder is split over several GPUs: which rows and columns of each stored tensor belong to which rank.

What reads the hidden state is split by rows: whole heads, and columns of the MLP; what writes to it by columns, so that
each rank has a part of every sum. The head is split by vocabulary. Everything else is on every rank, and so is a key
head that several ranks share. The file on the disk stays whole. It knows no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape, LayoutError
from deepseek_triton.ensemble.artefacts.tensor_file import TensorEntry

ALIGNMENT = 16  # elements of a matrix's inner dimension that the FP8 products read together


@dataclass(frozen=True)
class Cut:
    """Part of a tensor: `rows`, one after the other, None: all; of them `columns`, None: all."""

    rows: tuple[slice, ...] | None = None
    columns: slice | None = None

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The part's shape."""
        num_rows = whole[0] if self.rows is None else sum(rows.stop - rows.start for rows in self.rows)
        if self.columns is None:
            return (num_rows, *whole[1:])
        return num_rows, self.columns.stop - self.columns.start


WHOLE = Cut()


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

    @property
    def shape(self) -> DecoderShape:
        """What this rank computes; vocabulary and hidden state stay whole."""
        whole = self.whole
        return replace(
            whole,
            num_heads=whole.num_heads // self.size,
            num_kv_heads=max(1, whole.num_kv_heads // self.size),
            intermediate_size=whole.intermediate_size // self.size,
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

    def cut(self, name: str) -> Cut:
        """This rank's part of the stored tensor `name`."""
        if name == "head":
            return Cut((self.vocab_rows,))
        group, _, kind = name.rpartition(".")
        match group.rpartition(".")[2], kind:
            case "qkv", _:
                return Cut(self._head_rows())
            case "gate_up", _:
                width, whole = self.shape.intermediate_size, self.whole.intermediate_size
                return Cut(tuple(_part(start, self.rank, width) for start in (0, whole)))
            case "o", "weight":
                return Cut(columns=_part(0, self.rank, self.shape.q_size))
            case "down", "weight":
                return Cut(columns=_part(0, self.rank, self.shape.intermediate_size))
        return WHOLE

    def entry(self, name: str, entry: TensorEntry) -> TensorEntry:
        """What `cut` leaves of a stored tensor."""
        return replace(entry, shape=self.cut(name).shape(entry.shape))

    def _head_rows(self) -> tuple[slice, ...]:
        whole, own = self.whole, self.shape
        first = self.rank * whole.num_kv_heads // self.size * whole.head_dim  # of the key heads; some ranks share one
        keys = slice(whole.q_size + first, whole.q_size + first + own.kv_size)
        values = slice(keys.start + whole.kv_size, keys.stop + whole.kv_size)
        return _part(0, self.rank, own.q_size), keys, values


def reason_against(shape: DecoderShape, size: int) -> str | None:
    """Why `shape` can't be split over `size` ranks; None: it can."""
    if size < 1:
        return "it must be at least 1"
    if shape.num_heads % size:
        return f"{shape.num_heads} query heads can't be shared out evenly"
    if shape.num_kv_heads % size and size % shape.num_kv_heads:
        return f"{shape.num_kv_heads} key heads can't be shared out evenly"
    if shape.intermediate_size % size:
        return f"intermediate_size {shape.intermediate_size} can't be shared out evenly"
    if size > 1 and (width := shape.intermediate_size // size) % ALIGNMENT:
        return f"each rank's part of intermediate_size is {width}, must be a multiple of {ALIGNMENT}"
    return None


def _part(start: int, rank: int, width: int) -> slice:
    return slice(start + rank * width, start + (rank + 1) * width)
