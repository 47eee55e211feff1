"""A build of a name that was built before keeps the settings that were changed, and says so.

The earlier model and the build's options enter; the options to build with leave. Nothing is written here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from google.protobuf.message import Message

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.repository.models.built import CONFIG, BuiltModel
from deepseek_triton.builders.repository.models.config_text import is_edited
from deepseek_triton.builders.repository.models.settings import places, sizes_below
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.builders.repository.pbtxt import parse_text
from deepseek_triton.builders.scoring.options import Batching
from deepseek_triton.builders.targets import target_named
from deepseek_triton.ensemble.protocol.settings import to_text
from deepseek_triton.ensemble.protocol.text_settings import TextSettings

Say = Callable[[str], None]
RESET = "--reset-settings"


def with_kept_settings(options: BuildOptions, say: Say) -> BuildOptions:
    """The options, and the settings that were changed in the model that bears the name now; `say` gets a line on each.

    What the options give themselves wins. With `reset_settings` nothing is kept, and what is lost is said.
    """
    if not (options.repository / options.name / CONFIG).is_file():
        return options
    try:
        model = BuiltModel.read(options.repository, options.name)
        changed = model.changed_settings() if model.versions else {}
    except BuildError as error:
        say(f"the settings of the earlier build can't be kept: {error}")
        return options
    given = given_settings(options)
    changed = {name: value for name, value in changed.items() if name not in given}
    if options.reset_settings:
        if changed:
            say(f"reset to the defaults: {describe(changed)}")
        return options
    known = places(target_named(options.target), options.task)
    kept = {name: value for name, value in changed.items() if name in known}
    if "preferred_batch_sizes" in kept and "max_batch_size" in given:
        kept["preferred_batch_sizes"] = sizes_below(kept["preferred_batch_sizes"], given["max_batch_size"])
    if lost := {name: value for name, value in changed.items() if name not in known}:
        say(f"not kept, since target {options.target} with task {options.task} has no such setting: {describe(lost)}")
    if kept:
        say(f"kept from before: {describe(kept)} ({RESET} builds with the defaults)")
    return with_settings(options, kept)


def given_settings(options: BuildOptions) -> dict[str, Any]:
    """The settings that the options ask for, by name."""
    given = {**options.settings, **options.instances}
    if options.task != "score":
        return given
    scoring = options.scoring
    values = {name: getattr(scoring.batching, name) for name in Batching.table()}
    defaults = {name: declared.default for name, declared in Batching.table().items()}
    if scoring.max_pass_tokens is not None:
        given["max_pass_tokens"] = scoring.max_pass_tokens
    return given | {name: v for name, v in values.items() if v != defaults[name] or name in scoring.given}


def with_settings(options: BuildOptions, values: Mapping[str, Any]) -> BuildOptions:
    """The options with these settings too."""
    rest = dict(values)
    instances = {name: rest.pop(name) for name in TextSettings.table() if name in rest}
    scoring = options.scoring
    if options.task == "score":
        batching = replace(scoring.batching, **{name: rest.pop(name) for name in Batching.table() if name in rest})
        scoring = replace(
            scoring, batching=batching, max_pass_tokens=rest.pop("max_pass_tokens", scoring.max_pass_tokens)
        )
    return replace(
        options, settings={**options.settings, **rest}, instances={**options.instances, **instances}, scoring=scoring
    )


def within_max_seq_len(options: BuildOptions, max_seq_len: int, given: Mapping[str, Any], say: Say) -> BuildOptions:
    """Lower a kept `max_num_batched_tokens` that is more than this build's `max_seq_len` allows."""
    name = "max_num_batched_tokens"
    value = options.settings.get(name, 0)
    if target_named(options.target).own_settings.packs_prompts or name in given or value <= max_seq_len:
        return options
    say(f"{name} {value} was lowered to {max_seq_len}, this build's max_seq_len")
    return with_settings(options, {name: max_seq_len})


def tell_lost_edits(repository: Path, staging: Path, names: list[str], say: Say) -> None:
    """Say of each config.pbtxt that was edited by hand what the file that replaces it has not kept."""
    for name in names:
        path = repository / name / CONFIG
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        if not is_edited(text):
            continue
        try:
            old = parse_text(text, path)
        except BuildError:
            say(f"{path} was edited by hand and can't be read: the build wrote it anew")
            continue
        new = parse_text((staging / name / CONFIG).read_text(encoding="utf-8"), path)
        lost = _differing(old, new)
        what = f"the build wrote these anew: {', '.join(lost)}" if lost else "what was set is kept, comments are not"
        say(f"{path} was edited by hand: {what}; use `deepseek-triton configure` instead")


def describe(settings: Mapping[str, Any]) -> str:
    """ "max_queue_size 5, prefix_reuse off" """
    return ", ".join(f"{name} {to_text(value)}" for name, value in settings.items())


def _differing(old: Message, new: Message) -> list[str]:
    """The fields, and of `parameters` the names, in which two configurations differ."""
    found = []
    for field in old.DESCRIPTOR.fields:
        before, after = getattr(old, field.name), getattr(new, field.name)
        if field.name == "parameters":
            keys = sorted(set(before) | set(after))
            found += [key for key in keys if key not in after or key not in before or before[key] != after[key]]
        elif before != after:
            found.append(field.name)
    return found
