"""Check a whole model repository without a server.

What enters is a directory, what leaves is a list of all problems. It knows what Triton refuses at load, and what Triton
accepts and then runs wrongly. The ensemble's steps are checked by wiring.py, engines by check_engine.py and
check_scoring.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tritonclient.grpc.model_config_pb2 import ModelConfig

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.repository.check_engine import check_engine, check_plan
from deepseek_triton.builders.repository.check_scoring import check_scoring, is_scoring
from deepseek_triton.builders.repository.outdated import outdated_models
from deepseek_triton.builders.repository.pbtxt import PbtxtError, parse_text
from deepseek_triton.builders.repository.wiring import Problem, check_wiring
from deepseek_triton.ensemble.artefacts.manifest import FILE_NAME, Manifest, ManifestError
from deepseek_triton.ensemble.protocol.pipelines import BESIDE_SUFFIXES, ENGINE_SUFFIX, model_name

CONFIG = "config.pbtxt"


class CheckError(BuildError):
    """A model repository that can't be served; the message has one line for each problem."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


def require_sound(repository: Path) -> None:
    """Check `repository`.

    Raises:
        CheckError: it can't be served; has every problem.
    """
    if problems := check_repository(repository):
        raise CheckError(problems)


def sound_models(repository: Path) -> tuple[list[str], list[Problem]]:
    """The models in `repository` that can be served, their parts included, and what is wrong with all others.

    Raises:
        CheckError: there is none.
    """
    problems = check_repository(repository)
    at_fault = {_model_of(repository, problem) for problem in problems}
    sound = [name for names in parts_of_models(repository).values() if at_fault.isdisjoint(names) for name in names]
    if not sound or None in at_fault:
        raise CheckError(problems)
    return list(dict.fromkeys(sound)), problems


def parts_of_models(repository: Path) -> dict[str, list[str]]:
    """Each ensemble in `repository` → itself and the models that belong to it."""
    parts: dict[str, list[str]] = {}
    built = built_models(repository) if repository.is_dir() else []
    for name in built:
        config = _read_config(repository / name, [])
        if config is not None and config.platform == "ensemble":
            beside = [part for suffix in BESIDE_SUFFIXES if (part := model_name(name, suffix)) in built]
            parts[name] = [name, *(step.model_name for step in config.ensemble_scheduling.step), *beside]
    return parts


def _model_of(repository: Path, problem: Problem) -> str | None:
    """The directory in `repository` that a problem is about; None: it is about the repository."""
    where = Path(problem.where)
    return where.relative_to(repository).parts[0] if where != repository and where.is_relative_to(repository) else None


def check_repository(repository: Path) -> list[Problem]:
    """All problems of the model repository; an empty list if it can be served.

    A model that an earlier version built has one problem: that it must be rebuilt.
    """
    if not repository.is_dir():
        return [Problem(str(repository), "is not a directory; build the model first")]
    if (repository / CONFIG).is_file():
        return [Problem(str(repository), f"is one model; give the repository that it lies in, {repository.parent}")]
    folders = [path for path in repository.iterdir() if path.is_dir() and not path.name.startswith(".")]
    if folders and not any((path / CONFIG).is_file() for path in folders):
        return [Problem(str(repository), f"is no model repository: none of its folders has a {CONFIG}; build a model")]
    directories = [repository / name for name in built_models(repository)]
    if not directories:
        return [Problem(str(repository), "holds no built models; build one first")]
    problems: list[Problem] = []
    outdated: set[str] = set()
    for problem, parts in outdated_models(repository):
        problems.append(problem)
        outdated |= parts
    configs: dict[str, ModelConfig] = {}
    for directory in directories:
        if directory.name in outdated:
            continue
        config = _read_config(directory, problems)
        if config is not None:
            configs[directory.name] = config
            problems.extend(_check_model(directory, config))
    for name, config in configs.items():
        if config.platform == "ensemble":
            problems.extend(check_wiring(str(repository / name / CONFIG), config, configs))
    return problems


def check_files(repository: Path) -> list[Problem]:
    """Read every built file whole; a problem for each model whose files have changed since."""
    problems = []
    for path in sorted(repository.glob(f"*/*/{FILE_NAME}")):
        try:
            Manifest.load(path.parent).verify(path.parent, is_whole=True)
        except ManifestError as error:
            problems.append(Problem(str(path.parent.relative_to(repository)), str(error)))
    return problems


def built_models(repository: Path) -> list[str]:
    """Names of the models in `repository` that have more than a configuration.

    This project keeps its demo model's configuration under version control; a build adds the artefacts.
    """
    directories = (path for path in repository.iterdir() if path.is_dir() and not path.name.startswith("."))
    return sorted(path.name for path in directories if {entry.name for entry in path.iterdir()} != {CONFIG})


def unbuilt_models(repository: Path) -> list[str]:
    """Names of the models in `repository` of which there is only the configuration; tritonserver ends over them."""
    built = set(built_models(repository))
    return sorted(path.parent.name for path in repository.glob(f"*/{CONFIG}") if path.parent.name not in built)


def served_models(repository: Path) -> list[str]:
    """Names of the ensembles in a sound `repository`, which are what clients ask for."""
    configs = (_read_config(repository / name, []) for name in built_models(repository))
    return [config.name for config in configs if config is not None and config.platform == "ensemble"]


def is_scoring_model(repository: Path, name: str) -> bool:
    """Whether served model `name` was built with task score."""
    engine = _read_config(repository / f"{name}-{ENGINE_SUFFIX}", [])
    return engine is not None and is_scoring(engine)


def _read_config(directory: Path, problems: list[Problem]) -> ModelConfig | None:
    path = directory / CONFIG
    try:
        config = parse_text(path.read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        problems.append(Problem(str(path), "is missing; build the model again, or move the directory elsewhere"))
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
            yield from check_plan(directory / CONFIG, directory / str(version), config)
    if config.backend != "python":
        return
    model_file = config.default_model_filename or "model.py"
    for version in versions:
        path = directory / str(version) / model_file
        if not path.is_file():
            yield Problem(str(path), "is missing, and the Python backend loads it; build the model again")
    if directory.name.endswith(f"-{ENGINE_SUFFIX}") and not is_scoring(config):
        for version in versions:
            yield from check_engine(directory / CONFIG, directory / str(version), config)


def _served_versions(directory: Path, config: ModelConfig) -> list[int]:
    """The versions that Triton would load: the latest one unless the policy says otherwise."""
    # A name with a leading zero is not a version to Triton.
    names = [path.name for path in directory.iterdir() if path.is_dir()]
    found = sorted(int(name) for name in names if name.isdecimal() and not name.startswith("0"))
    policy = config.version_policy.WhichOneof("policy_choice")
    if policy == "all":
        return found
    if policy == "specific":
        return [version for version in found if version in config.version_policy.specific.versions]
    return found[-(config.version_policy.latest.num_versions or 1) :]
