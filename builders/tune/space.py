"""The search space of tuning: the parameters, their values, and how they are read from and written to configurations.

It transforms configurations in memory; the only files that it reads are manifests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import Message
from tritonclient.grpc.model_config_pb2 import ModelConfig

from deepseek_triton.builders.repository.check_scoring import is_scoring
from deepseek_triton.builders.repository.models.settings import Configs as Configs
from deepseek_triton.builders.repository.models.settings import Place, places
from deepseek_triton.builders.targets import DEFAULT_TARGET, target_named
from deepseek_triton.builders.tune.options import TuneError
from deepseek_triton.ensemble.artefacts.manifest import Manifest, ManifestError
from deepseek_triton.ensemble.protocol.pipelines import ENGINE_SUFFIX, model_name

Point = Mapping[str, int]  # parameter's name → its value


@dataclass(frozen=True)
class Parameter:
    """A parameter: its name, its values in ascending order, and functions that read it from and write it to configs.

    The functions take the configurations and the name of the served model.
    """

    name: str
    values: tuple[int, ...]
    read: Callable[[Configs, str], int]
    write: Callable[[Configs, str, int], None]


def space_of(configs: Configs, name: str, limits: Mapping[str, int]) -> list[Parameter]:
    """Return the parameters of model `name`, the most promising first; their values include the current ones.

    limits: parameter → the highest value that the artefacts allow.

    Raises:
        TuneError: the model isn't an ensemble of this project.
    """
    engine = configs.get(model_name(name, ENGINE_SUFFIX))
    if engine is None or name not in configs:
        raise TuneError(f"{name} is no served model of the repository; it holds {sorted(configs)}")
    space = []
    for parameter in SCORING if is_scoring(engine) else GENERATING:
        now = parameter.read(configs, name)
        highest = limits.get(parameter.name)
        values = {value for value in parameter.values if highest is None or value <= highest} | {now}
        space.append(Parameter(parameter.name, tuple(sorted(values)), parameter.read, parameter.write))
    return space


def read_point(space: list[Parameter], configs: Configs, name: str) -> dict[str, int]:
    """Return the parameters' current values."""
    return {parameter.name: parameter.read(configs, name) for parameter in space}


def with_point(space: list[Parameter], configs: Configs, name: str, point: Point) -> dict[str, ModelConfig]:
    """Return copies of the configurations with the values of `point`."""
    copies = {model: _copy(config) for model, config in configs.items()}
    for parameter in space:
        parameter.write(copies, name, point[parameter.name])
    return copies


def limits_of(version_dir: Path) -> dict[str, int]:
    """Return the maximum values that the engine's artefacts allow.

    They come from a TensorRT plan's profiles, and from the sequence length if a step prefills one sequence only.

    Raises:
        TuneError: the manifest can't be read.
    """
    try:
        manifest = Manifest.load(version_dir)
    except ManifestError as error:
        raise TuneError(str(error)) from error
    known = ("max_batch_size", "max_num_seqs", "max_num_batched_tokens")
    limits = {name: int(manifest.engine[name]) for name in known if name in manifest.engine}
    if target_named(manifest.target).own_settings.packs_prompts:
        return limits
    return {"max_num_batched_tokens": manifest.max_seq_len, **limits}


def _copy(config: ModelConfig) -> ModelConfig:
    copy: Message = ModelConfig()
    copy.CopyFrom(config)
    return copy


def _tuned(place: Place, *values: int) -> Parameter:
    return Parameter(place.setting.name, values, place.read, place.write)


_GENERATING, _SCORING = places(target_named(DEFAULT_TARGET), "generate"), places(target_named(DEFAULT_TARGET), "score")
SCORING = (
    _tuned(_SCORING["max_batch_size"], 1, 2, 4, 8, 16, 32, 64),
    _tuned(_SCORING["max_queue_delay_us"], 0, 500, 2000, 5000, 20000),
    _tuned(_SCORING["tokenizer_instances"], 1, 2),
    _tuned(_SCORING["scorer_instances"], 1, 2),
)
# The detokenizer's instances aren't tuned: each holds the state of its streams.
GENERATING = (
    _tuned(_GENERATING["max_num_seqs"], 1, 2, 4, 8, 16, 32),
    _tuned(_GENERATING["max_num_batched_tokens"], 16, 32, 64, 128, 256),
    _tuned(_GENERATING["tokenizer_instances"], 1, 2),
)
