"""Do a model's weights, caches and steps fit into the memory of what will serve it?

Shapes and settings enter; an error with the largest number that fits leaves. It allocates nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.targets.artefacts.memory import ServingMemory
from deepseek_triton.builders.targets.artefacts.target import Target, split_of
from deepseek_triton.ensemble.decoder.spec import ModelSpec

GIB = 2**30
MIN_TOKENS = 64  # a shorter sequence is no advice
OPTION = "--memory"


@dataclass(frozen=True)
class EngineMemory:
    """What an engine that generates needs on one device. settings: all that it has; memory: a GPU's name, GiB or None.

    Raises:
        BuildError: `memory` names neither, or the model can't be split over so many GPUs.
    """

    target: Target
    spec: ModelSpec
    precision: str
    max_seq_len: int
    settings: Mapping[str, Any]
    memory: str | None

    @property
    def available(self) -> ServingMemory:
        """What the device has."""
        return self.target.memory(self.memory)

    @property
    def weights(self) -> int:
        """Bytes of the weights on one device."""
        return self.target.device_weight_bytes(self.spec, self.precision, split_of(self.settings))

    @property
    def free(self) -> int:
        """Bytes beside the weights. Where the weights alone don't fit no setting helps: then all of the device's."""
        rest = self.available.num_bytes - self.weights
        return rest if rest > 0 else self.available.num_bytes

    @property
    def one_cache(self) -> int:
        """Bytes of one sequence's cache."""
        return self.target.sequence_bytes(self.spec, self.precision, self.max_seq_len, split_of(self.settings))

    def needed(self, **more: int) -> int:
        """Bytes of caches and steps with the settings, and `more`."""
        changed = {**self.settings, **more}
        steps = self.target.step_bytes(self.spec, self.max_seq_len, changed)
        return self.target.whole_sequences(changed) * self.one_cache + steps

    def most(self, name: str, **more: int) -> int:
        """The highest value of setting `name`, up to what it is, that fits; 0 if none does."""
        free = self.free
        return _largest(lambda number: self.needed(**{**more, name: number}) <= free, self.settings[name])

    def check(self) -> None:
        """Check that all fits.

        Raises:
            BuildError: names the most sequences, or prompt tokens in a step, that fit.
        """
        if self.needed() <= self.free:
            return
        available, num_seqs, num_tokens = (
            self.available, self.settings["max_num_seqs"], self.settings["max_num_batched_tokens"]
        )  # fmt: skip
        has = (
            f"beside {_gib(self.weights)} GiB of weights, {available.what} has {_gib(available.num_bytes)} GiB: at most"
        )
        largest = self.most("max_num_seqs")
        fitting = 0 if largest else self.most("max_num_batched_tokens", max_num_seqs=1)
        if fitting:
            step = self.needed(max_num_seqs=1) - self.one_cache
            raise BuildError(
                f"max_num_batched_tokens is {num_tokens:,}: a step needs {_gib(step)} GiB {has} {fitting:,} fit; use "
                f"--max-num-batched-tokens {fitting} or {OPTION} for what will serve"
            )
        for_caches = self.free - self.target.step_bytes(self.spec, self.max_seq_len, self.settings)
        tokens = max(0, for_caches) // self.target.whole_sequences(self.settings) * self.max_seq_len // self.one_cache
        advice = [f"--max-num-seqs {largest}"] if largest else []
        advice += [f"--max-seq-len {tokens} in a build"] if tokens >= MIN_TOKENS else []
        raise BuildError(
            f"max_num_seqs is {num_seqs:,}: caches of {self.max_seq_len:,} tokens each and steps need "
            f"{_gib(self.needed())} GiB {has} {largest:,} fit; use "
            f"{' or '.join([*advice, f'{OPTION} for what will serve'])}"
        )


def check_copies(weights: int, count: int, available: ServingMemory) -> None:
    """Check that `count` instances of a scoring engine fit, each with its copy of the weights.

    Raises:
        BuildError: they don't; names the most that do.
    """
    largest = max(1, available.num_bytes // max(1, weights))
    if count > largest:
        raise BuildError(
            f"engine_instances is {count}: copies of {_gib(weights)} GiB of weights, {available.what} has "
            f"{_gib(available.num_bytes)} GiB: at most {largest} fit; use --engine-instances {largest}, or "
            f"{OPTION} for what will serve"
        )


def check_fits(
    target: Target,
    task: str,
    spec: ModelSpec,
    precision: str,
    max_seq_len: int,
    settings: Mapping[str, Any],
    memory: str | None,
) -> None:
    """Check the settings, all that the model has, against the memory of what serves.

    memory: a GPU's name or GiB; None: this machine's.

    Raises:
        BuildError: they don't fit; names the most that do.
    """
    if task == "score":
        check_copies(target.weight_bytes(spec, precision), settings["engine_instances"], target.memory(memory))
    else:
        EngineMemory(target, spec, precision, max_seq_len, settings, memory).check()


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number from 0 to `limit` that fits; 0 if none does."""
    low = 0
    while low < limit:
        middle = (low + limit + 1) // 2
        low, limit = (middle, limit) if fits(middle) else (low, middle - 1)
    return low


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:,.1f}"
