"""The settings of the models around an engine, which turn text into ids and scores into labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deepseek_triton.ensemble.protocol.settings import Settings, setting

MAX_INSTANCES = 64


@dataclass(frozen=True)
class TextSettings(Settings):
    """How many processes of each run. The detokenizer has one: it holds the state of its streams."""

    WHAT: ClassVar[str] = "text model"

    tokenizer_instances: int = setting(1, "processes that encode texts", lowest=1, highest=MAX_INSTANCES)
    scorer_instances: int = setting(
        1, "processes that turn a scoring engine's numbers into labels", lowest=1, highest=MAX_INSTANCES
    )
