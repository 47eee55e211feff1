"""The engine's settings: validated once, written into config.pbtxt by builders, read back by its model.

What enters and leaves are Triton's `parameters`: text by name. It knows nothing about engines or files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

PrefixReuse = Literal["prompt", "all", "off"]
PREFIX_REUSES: tuple[PrefixReuse, ...] = get_args(PrefixReuse)


class SettingsError(ValueError):
    """A setting is unknown or has a value that it can't have; one line."""


PACKING_TARGETS = ("cuda",)  # which compute several slots' prompts at once


@dataclass(frozen=True)
class EngineSettings:
    """How an engine runs.

    max_num_seqs: sequences in flight at once.
    max_num_batched_tokens: prompt tokens that one step computes at most while nothing else runs, of several sequences
        where the target packs prompts.
    max_prefill_stall: beside running sequences a step computes so much of the prompts as takes this many times as long
        as their next token.
    prefix_reuse: what of a finished sequence's cache a later prompt may begin with: "prompt" what was computed as a
        prompt, which gives the very bits that computing it again would; "all" its answer too, whose last bits may
        differ; "off" nothing.
    num_threads: CPU threads of the runner, 0 for all cores.
    max_queue_size: sequences that may wait for a slot; one more is refused.
    priority_levels: 1 is the most urgent; a request without a priority has the middle one.
    queue_timeout_ms, timeout_ms: the longest wait for a slot, and the longest time for a whole request, in ms, for
        requests that don't say; 0: none.
    cancel_after_s: seconds without an acknowledgement after which a request is taken as abandoned.
    batch_invariant: sums in one order for every batch, so that a sequence's text doesn't depend on its neighbours;
        slower. Target cuda alone.
    tensor_parallel_size: GPUs that the model is split over. Target cuda alone.
    """

    max_num_seqs: int = 8
    max_num_batched_tokens: int = 64
    max_prefill_stall: float = 1.5
    prefix_reuse: PrefixReuse = "prompt"
    num_threads: int = 0
    max_queue_size: int = 1024
    priority_levels: int = 3
    queue_timeout_ms: int = 0
    timeout_ms: int = 0
    cancel_after_s: float = 1.0
    batch_invariant: bool = False
    tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        for name, lowest in _INTEGERS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise SettingsError(f"{name} is {value!r}, must be an integer of at least {lowest}")
        for name, what in _NUMBERS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise SettingsError(f"{name} is {value!r}, must be {what}")
            if not (math.isfinite(value) and value > 0):
                raise SettingsError(f"{name} is {value!r}, must be finite and above 0")
        for name in _BOOLEANS:
            if not isinstance(value := getattr(self, name), bool):
                raise SettingsError(f"{name} is {value!r}, must be true or false")
        if self.prefix_reuse not in PREFIX_REUSES:
            raise SettingsError(f"prefix_reuse is {self.prefix_reuse!r}, must be one of {', '.join(PREFIX_REUSES)}")

    @property
    def default_priority(self) -> int:
        """The level of a request that names none."""
        return (self.priority_levels + 1) // 2

    def check_target(self, target: str) -> None:
        """Can an engine of `target` run so?

        Raises:
            SettingsError: names the setting that this target doesn't have.
        """
        for name, targets in _TARGETS.items():
            value, default = getattr(self, name), getattr(type(self), name)
            if value != default and target not in targets:
                raise SettingsError(
                    f"{name} is {_text(value)}, which target {target} doesn't have: leave it at {_text(default)}, or "
                    f"build for target {' or '.join(targets)}"
                )

    def check_max_num_batched_tokens(self, target: str, max_seq_len: int) -> None:
        """Can a step of an engine of `target` hold so many tokens? Where it packs prompts, it takes what there is.

        Raises:
            SettingsError: `max_num_batched_tokens` is more than `max_seq_len`, and a step takes one sequence's.
        """
        if target not in PACKING_TARGETS and self.max_num_batched_tokens > max_seq_len:
            raise SettingsError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, must be at most max_seq_len {max_seq_len}"
            )

    def to_parameters(self) -> dict[str, str]:
        """These settings as the text values of config.pbtxt's `parameters`."""
        return {name: _text(value) for name, value in asdict(self).items()}

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> EngineSettings:
        """Read `parameters` back; an absent setting has its default.

        Raises:
            SettingsError: one is unknown or malformed.
        """
        # Upper-case names, such as EXECUTION_ENV_PATH, belong to Triton's Python backend.
        ours = {name: text for name, text in parameters.items() if not name.isupper()}
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(ours) - known):
            raise SettingsError(f"unknown engine parameter {unknown[0]!r}, must be one of {sorted(known)}")
        values: dict[str, Any] = {}
        for name, text in ours.items():
            convert, kind = _KINDS.get(name, (str, ""))
            try:
                values[name] = convert(text)
            except ValueError:
                raise SettingsError(f"{name} is {text!r}, must be {kind}") from None
        return cls(**values)

    @classmethod
    def from_model_config(cls, model_config: str) -> EngineSettings:
        """Read the JSON that a Python model gets as `args["model_config"]`."""
        parameters = json.loads(model_config).get("parameters", {})
        return cls.from_parameters({name: value["string_value"] for name, value in parameters.items()})


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _boolean(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(text)
    return text == "true"


# Integers with their lowest values, numbers with what they are.
_INTEGERS = {
    "max_num_seqs": 1, "max_num_batched_tokens": 1, "num_threads": 0, "max_queue_size": 1, "priority_levels": 1,
    "queue_timeout_ms": 0, "timeout_ms": 0, "tensor_parallel_size": 1,
}  # fmt: skip
_NUMBERS = {"max_prefill_stall": "a number", "cancel_after_s": "a number of seconds"}
_BOOLEANS = ("batch_invariant",)
_TARGETS = {"batch_invariant": ("cuda",), "tensor_parallel_size": ("cuda",)}  # that only these targets have
_KINDS: dict[str, tuple[Callable[[str], Any], str]] = {
    **dict.fromkeys(_INTEGERS, (int, "an integer")),
    **dict.fromkeys(_NUMBERS, (float, "a number")),
    **dict.fromkeys(_BOOLEANS, (_boolean, "true or false")),
}
