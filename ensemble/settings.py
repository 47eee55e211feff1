"""The engine's settings: validated once, written into config.pbtxt by builders, read back by its model.

What enters and leaves are Triton's `parameters`: text by name. It knows nothing about engines or files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

_INTEGERS = ("num_slots", "prefill_chunk", "num_threads")
_NUMBERS = ("cancel_after_s",)


class SettingsError(ValueError):
    """A setting is unknown or has a value that it can't have; one line."""


@dataclass(frozen=True)
class EngineSettings:
    """How an engine runs; none of it changes what it answers.

    num_slots: sequences in flight at once. prefill_chunk: prompt tokens in one step. num_threads: CPU threads
    of the runner, 0 for all cores. cancel_after_s: seconds without an acknowledgement after which a streamed
    sequence is taken as abandoned.
    """

    num_slots: int = 8
    prefill_chunk: int = 64
    num_threads: int = 0
    cancel_after_s: float = 1.0

    def __post_init__(self) -> None:
        for name, lowest in (("num_slots", 1), ("prefill_chunk", 1), ("num_threads", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise SettingsError(f"{name} is {value!r}, must be an integer of at least {lowest}")
        seconds = self.cancel_after_s
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
            raise SettingsError(f"cancel_after_s is {seconds!r}, must be a number of seconds")
        if not (math.isfinite(seconds) and seconds > 0):
            raise SettingsError(f"cancel_after_s is {seconds!r}, must be finite and above 0")

    def to_parameters(self) -> dict[str, str]:
        """These settings as the text values of config.pbtxt's `parameters`."""
        return {name: str(value) for name, value in asdict(self).items()}

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
        values: dict[str, int | float] = {}
        for names, convert in ((_INTEGERS, int), (_NUMBERS, float)):
            for name in names:
                if name not in ours:
                    continue
                try:
                    values[name] = convert(ours[name])
                except ValueError:
                    kind = "an integer" if convert is int else "a number"
                    raise SettingsError(f"{name} is {ours[name]!r}, must be {kind}") from None
        return cls(**values)  # type: ignore[arg-type]  # __post_init__ checks each type

    @classmethod
    def from_model_config(cls, model_config: str) -> EngineSettings:
        """Read the JSON that a Python model gets as `args["model_config"]`."""
        parameters = json.loads(model_config).get("parameters", {})
        return cls.from_parameters({name: value["string_value"] for name, value in parameters.items()})
