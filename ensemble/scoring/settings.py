"""Settings of the scoring engine, which builders write into config.pbtxt as `parameters` and its model reads."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace

from deepseek_triton.ensemble.protocol.settings import SettingsError


@dataclass(frozen=True)
class ScoringSettings:
    """Performance settings of a scoring engine; they don't change its results.

    num_threads: CPU threads of an instance; 0: its share of the cores.
    max_pass_tokens: maximum tokens, padding included, of one forward pass. A larger batch runs as several passes, with
    rows of similar length together.
    """

    num_threads: int = 0
    max_pass_tokens: int = 512

    def __post_init__(self) -> None:
        for name, lowest in (("num_threads", 0), ("max_pass_tokens", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise SettingsError(f"{name} is {value!r}, must be an integer of at least {lowest}")

    def to_parameters(self) -> dict[str, str]:
        """Return the settings as the string values of config.pbtxt's `parameters`."""
        return {name: str(value) for name, value in asdict(self).items()}

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> ScoringSettings:
        """Read the settings from `parameters`; an absent one has its default.

        Raises:
            SettingsError: a parameter is unknown or invalid.
        """
        # Upper-case names, such as EXECUTION_ENV_PATH, belong to Triton's Python backend.
        ours = {name: text for name, text in parameters.items() if not name.isupper()}
        known = sorted(field.name for field in fields(cls))
        values = {}
        for name, text in ours.items():
            if name not in known:
                raise SettingsError(f"unknown scoring engine parameter {name!r}, must be one of {known}")
            try:
                values[name] = int(text)
            except ValueError:
                raise SettingsError(f"{name} is {text!r}, must be an integer") from None
        return cls(**values)

    @classmethod
    def from_model_config(cls, model_config: str) -> ScoringSettings:
        """Read the settings from `args["model_config"]` of a Python model, and divide the cores among its instances."""
        config = json.loads(model_config)
        parameters = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        settings = cls.from_parameters(parameters)
        num_instances = sum(group["count"] for group in config.get("instance_group", ())) or 1
        if settings.num_threads or num_instances == 1:
            return settings
        return replace(settings, num_threads=max(1, len(os.sched_getaffinity(0)) // num_instances))
