"""How a target's engines differ in their settings: which they have beside the common ones, and their own defaults.

A target describes itself with one `TargetSettings`; its builder and its runner share it. This module names no target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from deepseek_triton.ensemble.protocol.settings import EngineSettings, Setting, SettingsError, to_text
from deepseek_triton.ensemble.scoring.settings import ScoringSettings


@dataclass(frozen=True)
class TargetSettings:
    """The settings of one target.

    own: the names of settings that aren't common to all targets, and that this one has. without: those that all others
    have, and this one hasn't.
    defaults: its defaults where they differ from the common ones. notes: what a default of its own depends on.
    packs_prompts: whether a prefill step computes the prompts of several sequences at once.
    scoring_without, scoring_defaults: likewise, of the settings of its scoring engines.
    """

    own: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    packs_prompts: bool = False
    scoring_without: tuple[str, ...] = ()
    scoring_defaults: Mapping[str, Any] = field(default_factory=dict)

    def table(self) -> dict[str, Setting]:
        """Name → setting, of those that the target has."""
        return {
            name: declared
            for name, declared in EngineSettings.table().items()
            if (declared.is_common and name not in self.without) or name in self.own
        }

    def scoring_table(self) -> dict[str, Setting]:
        """Name → setting, with the target's default, of those that its scoring engines have."""
        return {
            name: replace(declared, default=self.scoring_defaults.get(name, declared.default))
            for name, declared in ScoringSettings.table().items()
            if name not in self.scoring_without
        }

    def default_values(self) -> dict[str, Any]:
        """The default of each setting that the target has."""
        return {name: self.defaults.get(name, declared.default) for name, declared in self.table().items()}

    def check(self, settings: EngineSettings, target: str, others: Callable[[str], str] = lambda name: "") -> None:
        """Check that an engine of this target, whose name is `target`, has every setting that isn't at its default.

        others: a setting's name → what else the user may do, after "leave it at false".

        Raises:
            SettingsError: names the setting that the target doesn't have.
        """
        known = self.table()
        for name, declared in EngineSettings.table().items():
            value = getattr(settings, name)
            if name not in known and value != declared.default:
                raise SettingsError(
                    f"{name} is {to_text(value)}, which target {target} doesn't have: leave it at "
                    f"{to_text(declared.default)}{others(name)}"
                )

    def check_max_num_batched_tokens(self, settings: EngineSettings, max_seq_len: int) -> None:
        """Check that a step can hold as many prompt tokens as `settings` say.

        Raises:
            SettingsError: a step takes one sequence's tokens, and `max_num_batched_tokens` is above `max_seq_len`.
        """
        if not self.packs_prompts and settings.max_num_batched_tokens > max_seq_len:
            asked = settings.max_num_batched_tokens
            raise SettingsError(f"max_num_batched_tokens is {asked}, must be at most max_seq_len {max_seq_len}")
