"""Change the settings of a built model: its configurations and its manifests, all of them or none.

A model and the new values enter; the changes leave, with what each value was before. Artefacts stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tritonclient.grpc.model_config_pb2 import ModelConfig

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.repository.models.built import CONFIG, BuiltModel
from deepseek_triton.builders.repository.models.config_text import is_edited, to_text
from deepseek_triton.builders.repository.models.memory import check_fits
from deepseek_triton.builders.repository.models.settings import places, sizes_below
from deepseek_triton.builders.repository.options import setting_words
from deepseek_triton.builders.scoring.options import Batching
from deepseek_triton.builders.tune.repository import put_files
from deepseek_triton.ensemble.artefacts.manifest import FILE_NAME as MANIFEST
from deepseek_triton.ensemble.artefacts.manifest import Manifest, ManifestError
from deepseek_triton.ensemble.artefacts.rebuild_command import with_options
from deepseek_triton.ensemble.protocol.settings import EngineSettings, SettingsError

UNREADABLE = "unreadable"  # what stands for a value that can't be read


@dataclass(frozen=True)
class Change:
    """One setting: its value before and after. One that couldn't be read was UNREADABLE."""

    name: str
    before: Any
    after: Any


def configure(
    model: BuiltModel, values: Mapping[str, Any], *, is_reset: bool = False, memory: str | None = None
) -> list[Change]:
    """Give the settings these values; with `is_reset` all others get their defaults. Returns what has changed.

    memory: of what serves; see `BuildOptions`.

    Raises:
        BuildError: the model doesn't have a setting, or a value is out of its range or needs a rebuild.
    """
    table = places(model.target, model.task)
    for name in values:
        if name not in table:
            raise BuildError(
                f"{name} is no setting of {model.name}, which has task {model.task} and target {model.target.name}"
            )
    before, faults = model.read_settings()
    if not is_reset and set(faults) - set(values):
        model.settings()  # raises, and says how to correct what is neither given nor reset
    if not is_reset:
        model.require_known_parameters()
    before |= dict.fromkeys(faults, UNREADABLE)
    after = {**(model.defaults() if is_reset else before), **values}
    if "max_batch_size" in values and "preferred_batch_sizes" not in values:
        after["preferred_batch_sizes"] = sizes_below(after["preferred_batch_sizes"], after["max_batch_size"])
    _check(model, after, memory)
    changes = [Change(name, before[name], after[name]) for name in table if before[name] != after[name]]
    changes += [Change(name, UNREADABLE, "removed") for name in model.unknown_parameters()]
    if changes:
        put_files(model.repository, model.name, _files(model, after), "configure")
    return changes


def rebuild_command(model: BuiltModel, values: Mapping[str, Any]) -> str:
    """The command line that builds the model with these settings."""
    words = [word for name, value in values.items() for word in setting_words(name, value)]
    options = {f"--{prefix}{name.replace('_', '-')}" for name in values for prefix in ("", "no-")}
    return with_options(model.manifest.command, options, words)


def _check(model: BuiltModel, values: Mapping[str, Any], memory: str | None) -> None:
    try:
        for name, place in places(model.target, model.task).items():
            place.setting.check(values[name])
    except SettingsError as error:
        raise BuildError(str(error)) from error
    for name in model.target.compiled_settings:
        limit = model.manifest.engine.get(name)
        if limit is not None and name in values and values[name] > limit:
            command = rebuild_command(model, {name: values[name]})
            raise BuildError(
                f"{name} is {values[name]}, the plan was compiled for {limit}; to have more, rebuild with: {command}"
            )
    if model.task == "score":
        Batching(**{name: values[name] for name in Batching.table()})
    else:
        settings = EngineSettings(**{name: values[name] for name in EngineSettings.table() if name in values})
        for problem in model.target.check(model.manifest, settings):
            raise BuildError(problem)
    check_fits(
        model.target, model.task, model.spec, model.manifest.precision, model.manifest.max_seq_len, values, memory
    )


def _files(model: BuiltModel, values: Mapping[str, Any]) -> dict[str, str]:
    """The text of each file, by its path in the repository."""
    configs = {}
    for name, config in model.configs.items():
        configs[name] = ModelConfig()
        configs[name].CopyFrom(config)
    table, defaults = places(model.target, model.task), model.defaults()
    for name in model.unknown_parameters():
        del configs[model.engine].parameters[name]
    for name, place in table.items():
        place.write(configs, model.name, values[name])
    files = {
        f"{name}/{CONFIG}": to_text(config, is_edited=is_edited(model.texts[name])) for name, config in configs.items()
    }
    options = {f"--{prefix}{name.replace('_', '-')}" for name in table for prefix in ("", "no-")}
    words = [
        word for name in table if values[name] != defaults[name] for word in setting_words(name, values[name])
    ]  # fmt: skip
    for version in model.versions:
        try:
            manifest = Manifest.load(model.version_dir(version))
        except ManifestError:  # an older version that can't be served
            continue
        changed = replace(manifest, command=with_options(manifest.command, options, words))
        files[f"{model.engine}/{version}/{MANIFEST}"] = changed.to_json()
    return files
