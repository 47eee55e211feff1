"""The settings of a scoring engine that runs in the Python backend, declared as those of a generating engine are."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from typing import ClassVar

from deepseek_triton.ensemble.protocol.settings import MAX_THREADS, Settings, setting


@dataclass(frozen=True)
class ScoringSettings(Settings):
    """The settings of a scoring engine. None of them changes a score."""

    WHAT: ClassVar[str] = "scoring engine"

    num_threads: int = setting(
        0, "CPU threads of an instance; 0: its share of the cores", lowest=0, highest=MAX_THREADS
    )
    max_pass_tokens: int = setting(
        512,
        "tokens computed in one pass, padding included; a larger batch runs as several passes",
        lowest=1,
        highest=2**20,
    )

    @classmethod
    def from_model_config(cls, model_config: str) -> ScoringSettings:
        """As `Settings.from_model_config`; the model's instances share the cores among them."""
        settings = super().from_model_config(model_config)
        groups = json.loads(model_config).get("instance_group", ())
        num_instances = sum(group["count"] for group in groups) or 1
        if settings.num_threads or num_instances == 1:
            return settings
        return replace(settings, num_threads=max(1, len(os.sched_getaffinity(0)) // num_instances))
