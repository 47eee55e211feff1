"""A whole model repository, checked without a server.

What enters is a directory, what leaves is a list of problems: every one, not the first. It knows what Triton
refuses at load, what it accepts and then runs wrongly, and how an engine's artefacts lie beside its manifest.
How an ensemble's steps are wired is builders/repository/wiring.py's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tritonclient.grpc.model_config_pb2 import ModelConfig

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.repository.check_scoring import check_scoring, is_scoring
from deepseek_triton.builders.repository.pbtxt import PbtxtError, parse_text
from deepseek_triton.builders.repository.wiring import Problem, check_wiring
from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape, LayoutError
from deepseek_triton.ensemble.artefacts.cuda_split import ShardedDecoder
from deepseek_triton.ensemble.artefacts.manifest import FILE_NAME as MANIFEST
from deepseek_triton.ensemble.artefacts.manifest import Manifest, ManifestError
from deepseek_triton.ensemble.protocol.pipelines import ENGINE_SUFFIX
from deepseek_triton.ensemble.protocol.settings import EngineSettings, SettingsError

CONFIG = "config.pbtxt"


class CheckError(BuildError):
    """A model repository that can't be served; the message has one line for each problem."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


def require_sound(repository: Path) -> None:
    """Check `repository`.

    Raises:
        CheckError: with everything that is wrong.
    """
    if problems := check_repository(repository):
        raise CheckError(problems)


def check_repository(repository: Path) -> list[Problem]:
    """Everything that is wrong with the model repository; an empty list if it can be served."""
    if not repository.is_dir():
        return [Problem(str(repository), "is not a directory; build the model first")]
    directories = [repository / name for name in built_models(repository)]
    if not directories:
        return [Problem(str(repository), "holds no built models; build one first")]
    problems: list[Problem] = []
    configs: dict[str, ModelConfig] = {}
    for directory in directories:
        config = _read_config(directory, problems)
        if config is not None:
            configs[directory.name] = config
            problems.extend(_check_model(directory, config))
    for name, config in configs.items():
        if config.platform == "ensemble":
            problems.extend(check_wiring(str(repository / name / CONFIG), config, configs))
    return problems


def built_models(repository: Path) -> list[str]:
    """Names of the models in `repository`, but for those of which there is only the configuration.

    This project keeps its demo model's configuration under version control; artefacts come with a build.
    """
    directories = (path for path in repository.iterdir() if path.is_dir() and not path.name.startswith("."))
    return sorted(path.name for path in directories if {entry.name for entry in path.iterdir()} != {CONFIG})


def served_models(repository: Path) -> list[str]:
    """Names of the ensembles in `repository`, a sound one: what clients ask for."""
    configs = (_read_config(repository / name, []) for name in built_models(repository))
    return [config.name for config in configs if config is not None and config.platform == "ensemble"]


def is_scoring_model(repository: Path, name: str) -> bool:
    """Whether served model `name` was built with task score: clients ask it otherwise."""
    engine = _read_config(repository / f"{name}-{ENGINE_SUFFIX}", [])
    return engine is not None and is_scoring(engine)


def check_engine_files(version_dir: Path) -> list[Problem]:
    """Whether the engine's manifest is there and the files that it names have their lengths."""
    try:
        manifest = Manifest.load(version_dir)
    except ManifestError as error:
        path = version_dir / MANIFEST
        return [Problem(str(path), str(error).removeprefix(str(path)).lstrip(": "))]
    problems = []
    for name, expected in manifest.files.items():
        path = version_dir / name
        if not path.is_file():
            problems.append(Problem(str(path), f"is missing; rebuild with: {manifest.command}"))
        elif (size := path.stat().st_size) != expected.bytes:
            what = f"has {size} bytes, the manifest says {expected.bytes}; rebuild with: {manifest.command}"
            problems.append(Problem(str(path), what))
    return problems


def _read_config(directory: Path, problems: list[Problem]) -> ModelConfig | None:
    path = directory / CONFIG
    try:
        config = parse_text(path.read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        problems.append(Problem(str(path), "is missing; build the model again or remove the directory"))
        return None
    except (OSError, UnicodeDecodeError) as error:
        problems.append(Problem(str(path), f"is unreadable: {error}; build the model again"))
        return None
    except PbtxtError as error:
        problems.append(Problem(str(path), str(error).removeprefix(f"{path}:")))
        return None
    if config.name != directory.name:
        what = f"name is {config.name!r}, must be the directory's: {directory.name!r}"
        problems.append(Problem(str(path), what))
    return config


def _check_model(directory: Path, config: ModelConfig) -> Iterator[Problem]:
    versions = _served_versions(directory, config)
    if not versions:
        yield Problem(str(directory), "has no version that is served; needs a directory named 1")
    if is_scoring(config):
        for version in versions:
            yield from check_scoring(directory, directory / str(version), config)
    if config.platform == "tensorrt_plan":
        for version in versions:
            yield from _check_plan(directory, directory / str(version), config)
    if config.backend != "python":
        return
    model_file = config.default_model_filename or "model.py"
    for version in versions:
        path = directory / str(version) / model_file
        if not path.is_file():
            yield Problem(str(path), "is missing, and the Python backend loads it; build the model again")
    if directory.name.endswith(f"-{ENGINE_SUFFIX}") and not is_scoring(config):
        for version in versions:
            yield from _check_engine(directory, directory / str(version), config)


def _served_versions(directory: Path, config: ModelConfig) -> list[int]:
    """The versions that Triton would load: the latest one unless the policy says otherwise."""
    # Triton takes a name with a leading zero for no version.
    names = [path.name for path in directory.iterdir() if path.is_dir()]
    found = sorted(int(name) for name in names if name.isdecimal() and not name.startswith("0"))
    policy = config.version_policy.WhichOneof("policy_choice")
    if policy == "all":
        return found
    if policy == "specific":
        return [version for version in found if version in config.version_policy.specific.versions]
    return found[-(config.version_policy.latest.num_versions or 1) :]


def _check_plan(directory: Path, version_dir: Path, config: ModelConfig) -> Iterator[Problem]:
    problems = check_engine_files(version_dir)
    yield from problems
    limit = None if problems else Manifest.load(version_dir).engine.get("max_batch_size")
    if limit is not None and config.max_batch_size > limit:
        what = f"max_batch_size is {config.max_batch_size}, the plan was built for {limit}: lower it"
        yield Problem(str(directory / CONFIG), what)


def _check_split(where: str, manifest: Manifest, settings: EngineSettings) -> Iterator[Problem]:
    try:
        ShardedDecoder(DecoderShape.from_dict(manifest.engine), 0, settings.tensor_parallel_size)
    except LayoutError as error:
        yield Problem(where, f"parameters: {error}")


def _check_engine(directory: Path, version_dir: Path, config: ModelConfig) -> Iterator[Problem]:
    file_problems = check_engine_files(version_dir)
    yield from file_problems
    where = str(directory / CONFIG)
    try:
        parameters = {name: value.string_value for name, value in config.parameters.items()}
        settings = EngineSettings.from_parameters(parameters)
    except SettingsError as error:
        yield Problem(where, f"parameters: {error}")
        return
    if not config.model_transaction_policy.decoupled:
        yield Problem(where, "model_transaction_policy.decoupled is false, an engine streams: set it to true")
    if file_problems:
        return
    manifest = Manifest.load(version_dir)
    try:
        settings.check_target(manifest.target)
    except SettingsError as error:
        yield Problem(where, f"parameters: {error}")
    if manifest.target == "cuda":
        yield from _check_split(where, manifest, settings)
    for name in ("max_num_seqs", "max_num_batched_tokens"):
        value, limit = getattr(settings, name), manifest.engine.get(name)
        if limit is not None and value > limit:
            yield Problem(where, f"parameters: {name} is {value}, the plan was built for {limit}: lower it")
    try:
        settings.check_max_num_batched_tokens(manifest.target, manifest.max_seq_len)
    except SettingsError as error:
        yield Problem(where, f"parameters: {error}")
