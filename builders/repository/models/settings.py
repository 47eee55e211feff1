"""Where each setting of a built model stands in its configurations, so that it can be read and changed.

What enters are a served model's parsed configurations by name; they are changed in place. This module reads no files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from deepseek_triton.builders.repository.pbtxt import TEXT_MAX_BATCH_SIZE, set_queue_policy
from deepseek_triton.builders.scoring.options import TIMER_LATE_US, Batching
from deepseek_triton.builders.targets.artefacts.target import Target
from deepseek_triton.ensemble.protocol.pipelines import ENGINE_SUFFIX, SCORER_SUFFIX, TOKENIZER_SUFFIX, model_name
from deepseek_triton.ensemble.protocol.settings import Setting, to_text
from deepseek_triton.ensemble.protocol.text_settings import TextSettings

Configs = Mapping[str, ModelConfig]  # model's name → its configuration
Read = Callable[[Configs, str], Any]
Write = Callable[[Configs, str, Any], None]


@dataclass(frozen=True)
class Place:
    """One setting, and how it is read from and written to the configurations of the served model that is named."""

    setting: Setting
    read: Read
    write: Write


def places(target: Target, task: str) -> dict[str, Place]:
    """Name → place, of every setting that a model of this target and task has."""
    if task != "score":
        engine = [_parameter(declared) for declared in target.own_settings.table().values()]
        return {place.setting.name: place for place in (*engine, TOKENIZER_INSTANCES)}
    engine = (
        [] if target.scores_with_plan else [_parameter(one) for one in target.own_settings.scoring_table().values()]
    )
    return {place.setting.name: place for place in (*engine, *BATCHING, TOKENIZER_INSTANCES, SCORER_INSTANCES)}


def sizes_below(sizes: Sequence[int], max_batch_size: int) -> tuple[int, ...]:
    """The preferred batch sizes that a lower `max_batch_size` leaves."""
    return tuple(size for size in sizes if size < max_batch_size)


def _parameter(declared: Setting) -> Place:
    """A setting among the engine's `parameters`; one that isn't there has its default."""

    def read(configs: Configs, name: str) -> Any:
        parameters = configs[model_name(name, ENGINE_SUFFIX)].parameters
        if declared.name not in parameters:
            return declared.default
        value = declared.parse(parameters[declared.name].string_value)
        declared.check(value)
        return value

    def write(configs: Configs, name: str, value: Any) -> None:
        configs[model_name(name, ENGINE_SUFFIX)].parameters[declared.name].string_value = to_text(value)

    return Place(declared, read, write)


def _instances(declared: Setting, suffix: str) -> Place:
    def read(configs: Configs, name: str) -> int:
        groups = configs[model_name(name, suffix)].instance_group
        value = int(groups[0].count) if groups else 0
        declared.check(value)
        return value

    def write(configs: Configs, name: str, value: int) -> None:
        groups = configs[model_name(name, suffix)].instance_group
        (groups[0] if groups else groups.add(kind=ModelInstanceGroup.KIND_CPU)).count = value

    return Place(declared, read, write)


def _queue(name: str, field: str) -> Place:
    """A setting of Triton's queue in front of a scoring engine."""

    def policy(configs: Configs, model: str) -> Any:
        return configs[model_name(model, ENGINE_SUFFIX)].dynamic_batching.default_queue_policy

    def write(configs: Configs, model: str, value: int) -> None:
        limits = policy(configs, model)
        setattr(limits, field, value)
        config = configs[model_name(model, ENGINE_SUFFIX)]
        set_queue_policy(config, limits.default_timeout_microseconds, limits.max_queue_size)

    return Place(Batching.table()[name], lambda configs, model: int(getattr(policy(configs, model), field)), write)


def _read_batch(configs: Configs, name: str) -> int:
    return int(configs[model_name(name, ENGINE_SUFFIX)].max_batch_size)


def _write_batch(configs: Configs, name: str, value: int) -> None:
    engine, ensemble = configs[model_name(name, ENGINE_SUFFIX)], configs[name]
    preferred = [size for size in engine.dynamic_batching.preferred_batch_size if size < value]
    if value != engine.max_batch_size:
        engine.dynamic_batching.preferred_batch_size[:] = [*preferred, value]
    engine.max_batch_size = value
    # A request with more rows than the engine's batch size could never run.
    ensemble.max_batch_size = min(value, TEXT_MAX_BATCH_SIZE)


def _read_preferred(configs: Configs, name: str) -> tuple[int, ...]:
    """The preferred sizes but for a full batch, which is always one."""
    engine = configs[model_name(name, ENGINE_SUFFIX)]
    sizes = engine.dynamic_batching.preferred_batch_size
    return tuple(int(size) for size in sizes if size != engine.max_batch_size)


def _write_preferred(configs: Configs, name: str, value: tuple[int, ...]) -> None:
    engine = configs[model_name(name, ENGINE_SUFFIX)]
    engine.dynamic_batching.preferred_batch_size[:] = sorted({*value, engine.max_batch_size})


def _read_delay(configs: Configs, name: str) -> int:
    """The longest wait of a request, as in `Batching`, which is longer than Triton's timer is set to."""
    timer = int(configs[model_name(name, ENGINE_SUFFIX)].dynamic_batching.max_queue_delay_microseconds)
    return timer and timer + TIMER_LATE_US


def _write_delay(configs: Configs, name: str, value: int) -> None:
    batching = configs[model_name(name, ENGINE_SUFFIX)].dynamic_batching
    batching.max_queue_delay_microseconds = Batching(max_queue_delay_us=value).timer_us


TOKENIZER_INSTANCES = _instances(TextSettings.table()["tokenizer_instances"], TOKENIZER_SUFFIX)
SCORER_INSTANCES = _instances(TextSettings.table()["scorer_instances"], SCORER_SUFFIX)
BATCHING = (
    Place(Batching.table()["max_batch_size"], _read_batch, _write_batch),
    Place(Batching.table()["preferred_batch_sizes"], _read_preferred, _write_preferred),
    Place(Batching.table()["max_queue_delay_us"], _read_delay, _write_delay),
    _queue("queue_timeout_us", "default_timeout_microseconds"),
    _queue("max_queue_size", "max_queue_size"),
    _instances(Batching.table()["engine_instances"], ENGINE_SUFFIX),
)
