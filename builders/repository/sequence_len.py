"""The length of a sequence that an engine is built for: what was asked for, or what the model has and memory holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.builders.targets import target_named

if TYPE_CHECKING:
    from deepseek_triton.ensemble.decoder.spec import ModelSpec

MIN_TOKENS = 256  # fewer leave no room for a prompt and its answer
SCORING_MAX_SEQ_LEN = 2048  # a scoring engine has no cache; it reads a prompt and its labels


@dataclass(frozen=True)
class SequenceLen:
    """max_seq_len in tokens, prompt and answer; reason: why, for the user, where the build has chosen it."""

    tokens: int
    reason: str = ""

    def describe(self) -> str:
        """One line: the length, why, and what changes it."""
        return f"max_seq_len {self.tokens:,} ({self.reason}; --max-seq-len sets it)"


def choose_max_seq_len(options: BuildOptions, spec: ModelSpec) -> SequenceLen:
    """The length that `options` ask for, else the model's own within the target's budget.

    A length that the budget bounds is a power of two.

    Raises:
        BuildError: it is more than the model was trained for, or than the target computes.
    """
    own, target = spec.max_seq_len, target_named(options.target)
    bound = target.bound_by_indexer(spec, options.task)
    if options.max_seq_len is not None:
        # Whether max_position_embeddings is the length before linear scaling or after it, a file doesn't say.
        allowed = int(own * spec.rope.factor) if spec.rope.scaling == "linear" else own
        if options.max_seq_len > allowed:
            raise BuildError(f"max_seq_len is {options.max_seq_len}, the model was trained for {allowed} tokens")
        if bound is not None and options.max_seq_len > bound:
            raise BuildError(
                f"max_seq_len is {options.max_seq_len}: texts of more than {bound:,} tokens need the model's indexer, "
                f"which {_named(options)} doesn't compute; give --max-seq-len {bound} or less"
            )
        return SequenceLen(options.max_seq_len)
    limit, reason = own, "the model's own"
    if bound is not None and bound < own:
        limit, reason = bound, f"the model's own is {own:,}, but {_named(options)} doesn't compute its indexer"
        spec = spec.for_length(bound)
    if options.task == "score":
        is_bound = limit < own and limit <= SCORING_MAX_SEQ_LEN
        return SequenceLen(min(limit, SCORING_MAX_SEQ_LEN), reason if is_bound else f"the model's own is {own:,}")
    budget = target.cache_budget()
    num_seqs = target.whole_sequences({"max_num_seqs": budget.num_seqs, **options.settings})
    needed = num_seqs * target.cache_bytes(options, spec, limit)
    fitting = limit if needed <= budget.num_bytes else _power_of_two(limit * budget.num_bytes // needed)
    if budget.max_tokens is not None and budget.max_tokens < min(limit, fitting):
        return SequenceLen(
            budget.max_tokens, f"the model's own is {own:,}, but target {options.target} slows down with the length"
        )
    if fitting < limit:
        what = "the model's own" if limit == own else "what its indexer chooses,"
        return SequenceLen(
            fitting,
            f"{what} {limit:,} would need {needed / 2**30:.1f} GiB of cache for {num_seqs} "
            f"sequence{'s' * (num_seqs > 1)}, "
            f"{budget.what} is {budget.num_bytes / 2**30:.1f} GiB",
        )
    return SequenceLen(limit, reason)


def _named(options: BuildOptions) -> str:
    return f"target {options.target}" if options.task == "generate" else f"task {options.task}"


def require_usable(options: BuildOptions, spec: ModelSpec, chosen: SequenceLen) -> None:
    """Refuse so many sequences that the length which is left for each is of no use.

    Raises:
        BuildError: names the number of sequences for which MIN_TOKENS are left.
    """
    num_seqs = options.settings.get("max_num_seqs")
    if options.max_seq_len is not None or num_seqs is None or options.task == "score" or chosen.tokens >= MIN_TOKENS:
        return
    target = target_named(options.target)
    num_seqs = target.whole_sequences(options.settings)
    budget, wanted = target.cache_budget(), min(MIN_TOKENS, spec.max_position_embeddings)
    largest = budget.num_bytes // target.cache_bytes(options, spec, wanted)
    if num_seqs > largest:
        raise BuildError(
            f"max_num_seqs is {num_seqs:,}, for which {budget.what}, {budget.num_bytes / 2**30:.1f} GiB, holds caches "
            f"of {chosen.tokens} tokens each: at most {largest:,} have {wanted}; lower it, or give --max-seq-len"
        )


def _power_of_two(tokens: int) -> int:
    """The largest power of two up to `tokens`, and at least 2, the shortest sequence."""
    return max(2, 1 << tokens.bit_length() - 1) if tokens else 2
