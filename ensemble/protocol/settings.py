"""The settings of an engine: each is described once, and everything that reads or writes settings derives from that.

A field of a settings class is declared with `setting()`, which says its range, its default and its meaning.
Validation, config.pbtxt's `parameters`, the options of `deepseek-triton build` and the table in docs/settings.md read
these declarations. What a target has of its own is in target_settings.py. This module knows nothing about engines or
files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, TypeVar, get_args

from deepseek_triton.ensemble.protocol.ranges import MAX_INT32

PrefixReuse = Literal["prompt", "all", "off"]
KvCache = Literal["slots", "pages", "pages-int8"]
KV_CACHES: tuple[KvCache, ...] = get_args(KvCache)
PREFIX_REUSES: tuple[PrefixReuse, ...] = get_args(PrefixReuse)
MAX_THREADS = 1024
GROUPS = CAPACITY, WAITING, DEVICES = "Sequences and prompts", "Waiting and time limits", "What computes"
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
    is_common: whether every target has it; otherwise those whose `TargetSettings` name it.
    note: what the default depends on, after the default. highest: the highest integer; None: there is none.
    group: the heading, one of GROUPS, under which config.pbtxt has it.
    """

    name: str
    default: Any
    help: str
    lowest: int | None = None
    choices: tuple[str, ...] = ()
    is_common: bool = True
    note: str = ""
    highest: int | None = None
    group: str = DEVICES

    @property
    def kind(self) -> type:
        """int, float, bool, str, or tuple: integers of at least `lowest`."""
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
        if self.kind is tuple:
            is_whole = isinstance(value, tuple) and all(type(one) is int and one >= (self.lowest or 0) for one in value)
            return "" if is_whole else f"integers of at least {self.lowest or 0}"
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if self.kind is float:
            if not is_number:
                return "a number"
            return "" if math.isfinite(value) and value > 0 else "finite and above 0"
        lowest, highest = self.lowest or 0, math.inf if self.highest is None else self.highest
        if is_number and isinstance(value, int) and lowest <= value <= highest:
            return ""
        is_above = is_number and value > highest
        return f"at most {highest}" if is_above else f"an integer of at least {lowest}"

    def parse(self, text: str) -> Any:
        """The value that config.pbtxt or the command line writes as `text`; its range isn't checked.

        Raises:
            SettingsError: the text isn't of the setting's kind.
        """
        try:
            if self.kind is bool:
                return {"true": True, "false": False}[text]
            if self.kind is tuple:
                return tuple(int(one) for one in text.split(",") if one)
            return self.kind(text)
        except (KeyError, ValueError):
            kinds = {
                int: "an integer",
                float: "a number",
                bool: "true or false",
                tuple: "numbers with commas between them",
            }
            raise SettingsError(f"{self.name} is {text!r}, must be {kinds[self.kind]}") from None

    def describe_default(self) -> str:
        """ "64, at most max_seq_len" """
        return ", ".join(filter(None, (to_text(self.default), self.note)))


def setting(default: Any, help: str, **more: Any) -> Any:
    """A dataclass field with `default`; the other arguments are Setting's."""
    return field(default=default, metadata={"help": help, **more})


def to_text(value: object) -> str:
    """The text for a value in config.pbtxt."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
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

    max_num_seqs: int = setting(8, "sequences generated at once", lowest=1, group=CAPACITY)
    max_num_batched_tokens: int = setting(
        64, "prompt tokens computed in one step while nothing else runs. More: more tokens/s where many prompts wait. "
        "Less: less memory, and earlier first tokens", lowest=1, note="at most max_seq_len", group=CAPACITY,
    )  # fmt: skip
    max_prefill_stall: float = setting(
        1.5, "how many times as long as a decode step a step may last that also computes prompts. "
        "Higher: more tokens/s, and longer gaps in running streams", group=CAPACITY,
    )  # fmt: skip
    prefix_reuse: PrefixReuse = setting(  # noqa: RUF009 (it makes a field)
        "prompt", "which part of a finished sequence's cache a later prompt may reuse: its prompt; all, its answer "
        "too, whose last bits may differ; or off, nothing", choices=PREFIX_REUSES, group=CAPACITY,
    )  # fmt: skip
    num_threads: int = setting(
        0, "CPU threads of the engine; 0: one for each core", lowest=0, highest=MAX_THREADS, group=DEVICES
    )
    max_queue_size: int = setting(
        1024, "requests that may wait; one more is refused", lowest=1, highest=MAX_INT32, group=WAITING
    )
    priority_levels: int = setting(
        3, "levels of priority; 1 is the most urgent, and a request without one has the middle one", lowest=1,
        highest=1000, group=WAITING,
    )  # fmt: skip
    queue_timeout_ms: int = setting(
        0, "longest wait for a slot, in ms, of a request that doesn't say; 0: no limit", lowest=0, highest=MAX_INT32,
        group=WAITING,
    )  # fmt: skip
    timeout_ms: int = setting(
        0, "longest time for a whole request, in ms, of a request that doesn't say; 0: no limit", lowest=0,
        highest=MAX_INT32, group=WAITING,
    )  # fmt: skip
    cancel_after_s: float = setting(
        1.0, "seconds without an acknowledgement after which a request counts as abandoned", group=WAITING
    )
    nv_trt_llm_metrics: bool = setting(
        False, "also publish gauges under the names of NVIDIA's tensorrtllm_backend, nv_trt_llm_*, for dashboards that "
        "show those", group=WAITING,
    )  # fmt: skip
    batch_invariant: bool = setting(
        False, "sum in one order for every batch, so that a text doesn't depend on what runs beside it; slower",
        is_common=False, group=DEVICES,
    )  # fmt: skip
    tensor_parallel_size: int = setting(
        1, "GPUs of one machine that the model is split over, one process for each; query heads, key heads (or the "
        "ranks that share one), MLPs and experts must divide evenly", lowest=1, highest=64, is_common=False,
        group=DEVICES,
    )  # fmt: skip
    pipeline_parallel_size: int = setting(
        1, "parts of as many layers each, one after the other, that the model is split into; with "
        "tensor_parallel_size GPUs for each", lowest=1, highest=64, is_common=False, group=DEVICES,
    )  # fmt: skip
    expert_parallel: bool = setting(
        False, "give each GPU whole experts instead of a share of every expert", is_common=False, group=DEVICES
    )
    expert_parallel_size: int = setting(
        1, "groups of GPUs of one machine, each with whole experts of its own; it divides tensor_parallel_size, or is "
        "alone, and then each GPU has all but the experts", lowest=1, highest=64, is_common=False, group=DEVICES,
    )  # fmt: skip
    gpu_memory_share: float = setting(
        0.9, "share of each GPU's memory for weights, caches and steps, at most 1", is_common=False, group=DEVICES
    )
    kv_cache: KvCache = setting(  # noqa: RUF009 (it makes a field)
        "slots", "how keys and values are kept: slots of max_seq_len tokens; pages, blocks of 64 tokens in what memory "
        "is left; or pages-int8, twice the tokens in the same memory", choices=KV_CACHES, is_common=False,
        group=DEVICES,
    )  # fmt: skip
    kv_cache_tokens: int = setting(
        0, "tokens that the pages of all sequences hold; 0: as many as there is memory for", lowest=0, is_common=False,
        group=DEVICES,
    )  # fmt: skip

    @property
    def default_priority(self) -> int:
        """The level of a request that names none."""
        return (self.priority_levels + 1) // 2
