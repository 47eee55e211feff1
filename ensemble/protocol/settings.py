"""The settings of an engine: each is described once, and everything that reads or writes settings derives from that.

A field of a settings class is declared with `setting()`, which says its range, its targets, its defaults and its
meaning. Validation, config.pbtxt's `parameters`, the options of `deepseek-triton build` and the table in
docs/settings.md read these declarations. This module knows nothing about engines or files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, TypeVar, get_args

PrefixReuse = Literal["prompt", "all", "off"]
PREFIX_REUSES: tuple[PrefixReuse, ...] = get_args(PrefixReuse)
# Targets whose prefill step computes the prompts of several sequences at once.
PACKING_TARGETS = ("cuda",)
# Settings that were renamed: what an earlier version called them, and what they are called now.
RENAMED_SETTINGS = {"num_slots": "max_num_seqs", "prefill_chunk": "max_num_batched_tokens"}

Self = TypeVar("Self", bound="Settings")


class SettingsError(ValueError):
    """A setting is unknown or has a value that it can't have; one line."""


@dataclass(frozen=True)
class Setting:
    """One setting.

    name, default: of the field. lowest: the lowest integer; None for a number, which must be above 0.
    help: what it sets. unit: the name of the option's value in help. choices: the texts that it can be.
    targets: the only targets that have it; empty: all have it. defaults: target → its own default.
    note: what the default depends on, after the default. notes: the same for a target's own default.
    """

    name: str
    default: Any
    help: str
    lowest: int | None = None
    choices: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> type:
        """int, float, bool or str."""
        return type(self.default)

    @property
    def option(self) -> str:
        """The option of `deepseek-triton build`: max_num_seqs → --max-num-seqs."""
        return "--" + self.name.replace("_", "-")

    def check(self, value: object) -> None:
        """Can the setting have this value?

        Raises:
            SettingsError: it can't; names the setting, the value and what it must be.
        """
        if reason := self._reason_against(value):
            raise SettingsError(f"{self.name} is {value!r}, must be {reason}")

    def _reason_against(self, value: Any) -> str:
        if self.kind is bool:
            return "" if isinstance(value, bool) else "true or false"
        if self.kind is str:
            return "" if value in self.choices else f"one of {', '.join(self.choices)}"
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if self.kind is float:
            if not is_number:
                return "a number"
            return "" if math.isfinite(value) and value > 0 else "finite and above 0"
        is_integer = is_number and isinstance(value, int)
        return "" if is_integer and value >= (self.lowest or 0) else f"an integer of at least {self.lowest or 0}"

    def parse(self, text: str) -> Any:
        """The value that config.pbtxt or the command line writes as `text`; its range isn't checked.

        Raises:
            SettingsError: the text isn't of the setting's kind.
        """
        try:
            if self.kind is bool:
                return {"true": True, "false": False}[text]
            return self.kind(text)
        except (KeyError, ValueError):
            kinds = {int: "an integer", float: "a number", bool: "true or false"}
            raise SettingsError(f"{self.name} is {text!r}, must be {kinds[self.kind]}") from None

    def describe_default(self) -> str:
        """ "8; cuda: 64, fewer where …" """
        own = [(f"{target}: {to_text(value)}", self.notes.get(target)) for target, value in self.defaults.items()]
        return "; ".join(", ".join(filter(None, pair)) for pair in [(to_text(self.default), self.note), *own])


def setting(default: Any, help: str, **more: Any) -> Any:
    """A dataclass field with `default`; the other arguments are Setting's."""
    return field(default=default, metadata={"help": help, **more})


def to_text(value: object) -> str:
    """The text for a value in config.pbtxt."""
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Settings:
    """Settings that are declared with `setting()`, checked, and written to and read from Triton's `parameters`.

    Raises:
        SettingsError: a value is out of its range.
    """

    WHAT: ClassVar[str] = "engine"  # whose settings these are, for errors

    def __post_init__(self) -> None:
        for name, declared in self.table().items():
            declared.check(getattr(self, name))

    @classmethod
    def table(cls) -> dict[str, Setting]:
        """Name → setting, in the order of declaration."""
        return {item.name: Setting(item.name, item.default, **item.metadata) for item in fields(cls) if item.metadata}

    def to_parameters(self) -> dict[str, str]:
        """These settings as the text values of config.pbtxt's `parameters`."""
        return {name: to_text(getattr(self, name)) for name in self.table()}

    @classmethod
    def from_parameters(cls: type[Self], parameters: Mapping[str, str]) -> Self:
        """Read `parameters`; an absent setting has its default.

        Raises:
            SettingsError: one is unknown or malformed.
        """
        # Upper-case names, such as EXECUTION_ENV_PATH, belong to Triton's Python backend.
        ours = {name: text for name, text in parameters.items() if not name.isupper()}
        known = cls.table()
        if unknown := sorted(set(ours) - set(known)):
            raise SettingsError(f"unknown {cls.WHAT} parameter {unknown[0]!r}, must be one of {sorted(known)}")
        return cls(**{name: known[name].parse(text) for name, text in ours.items()})

    @classmethod
    def from_model_config(cls: type[Self], model_config: str) -> Self:
        """Read the JSON that a Python model gets as `args["model_config"]`.

        Raises:
            SettingsError: as `from_parameters`.
        """
        parameters = json.loads(model_config).get("parameters", {})
        return cls.from_parameters({name: value["string_value"] for name, value in parameters.items()})


@dataclass(frozen=True)
class EngineSettings(Settings):
    """The settings of an engine that generates text."""

    max_num_seqs: int = setting(
        8, "sequences generated at once", lowest=1,
        defaults={"cuda": 64}, notes={"cuda": "fewer where their caches would exceed 32 GiB"},
    )  # fmt: skip
    max_num_batched_tokens: int = setting(
        64, "prompt tokens computed in one step while nothing else runs; target cuda takes several prompts at once. "
        "More: more tokens/s where many prompts wait. Less: less memory, and earlier first tokens", lowest=1,
        note="at most max_seq_len", defaults={"cuda": 8192},
    )  # fmt: skip
    max_prefill_stall: float = setting(
        1.5, "how many times as long as a decode step a step may last that also computes prompts. "
        "Higher: more tokens/s, and longer gaps in running streams", defaults={"cuda": 10.0},
    )  # fmt: skip
    prefix_reuse: PrefixReuse = setting(  # noqa: RUF009 (it makes a field)
        "prompt", "which part of a finished sequence's cache a later prompt may reuse: its prompt; all, its answer "
        "too, whose last bits may differ; or off, nothing", choices=PREFIX_REUSES,
    )  # fmt: skip
    num_threads: int = setting(0, "CPU threads of the engine; 0: one for each core", lowest=0)
    max_queue_size: int = setting(1024, "requests that may wait; one more is refused", lowest=1)
    priority_levels: int = setting(
        3, "levels of priority; 1 is the most urgent, and a request without one has the middle one", lowest=1
    )
    queue_timeout_ms: int = setting(
        0, "longest wait for a slot, in ms, of a request that doesn't say; 0: no limit", lowest=0
    )
    timeout_ms: int = setting(
        0, "longest time for a whole request, in ms, of a request that doesn't say; 0: no limit", lowest=0
    )
    cancel_after_s: float = setting(1.0, "seconds without an acknowledgement after which a request counts as abandoned")
    batch_invariant: bool = setting(
        False, "sum in one order for every batch, so that a text doesn't depend on what runs beside it; slower",
        targets=("cuda",),
    )  # fmt: skip
    tensor_parallel_size: int = setting(
        1, "GPUs of one machine that the model is split over, one process for each; query heads, key heads (or the "
        "ranks that share one) and the MLP must divide evenly", lowest=1, targets=("cuda",),
    )  # fmt: skip

    @property
    def default_priority(self) -> int:
        """The level of a request that names none."""
        return (self.priority_levels + 1) // 2

    def check_target(self, target: str) -> None:
        """Check that an engine of `target` has every setting that isn't at its default.

        Raises:
            SettingsError: names the setting that this target doesn't have.
        """
        for name, declared in self.table().items():
            value, targets = getattr(self, name), declared.targets
            if targets and target not in targets and value != declared.default:
                raise SettingsError(
                    f"{name} is {to_text(value)}, which target {target} doesn't have: leave it at "
                    f"{to_text(declared.default)}, or build for target {' or '.join(targets)}"
                )

    def check_max_num_batched_tokens(self, target: str, max_seq_len: int) -> None:
        """Check that a step of an engine of `target` can hold so many prompt tokens.

        Raises:
            SettingsError: a step takes one sequence's tokens, and `max_num_batched_tokens` is above `max_seq_len`.
        """
        if target not in PACKING_TARGETS and self.max_num_batched_tokens > max_seq_len:
            raise SettingsError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, must be at most max_seq_len {max_seq_len}"
            )


def target_defaults(target: str) -> dict[str, Any]:
    """The default of each engine setting for `target`."""
    return {name: declared.defaults.get(target, declared.default) for name, declared in EngineSettings.table().items()}
