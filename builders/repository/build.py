"""Checkpoint → model repository: every artefact, configuration and adapter of one served model, moved in atomically.

Everything is written into a directory beside the repository, checked there as a whole, and then renamed into place: a
build that fails or is interrupted leaves the repository as it was. Building a name again adds the next version.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from deepseek_triton.builders.checkpoint.reader import Checkpoint, open_checkpoint
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.repository import pbtxt
from deepseek_triton.builders.repository.check import require_sound
from deepseek_triton.builders.repository.options import BuildOptions, Report
from deepseek_triton.builders.repository.sequence_len import choose_max_seq_len
from deepseek_triton.builders.scoring.parts import scoring_configs, write_profile
from deepseek_triton.builders.targets import target_named
from deepseek_triton.builders.targets.artefacts.target import BuildJob
from deepseek_triton.builders.targets.artefacts.write import write_engine, write_scoring_engine
from deepseek_triton.ensemble.protocol.pipelines import (
    DETOKENIZER_SUFFIX,
    ENGINE_SUFFIX,
    GENERATE_PIPELINE,
    SCORER_SUFFIX,
    TOKENIZER_SUFFIX,
    model_name,
)

MODEL_PY = '''"""What Triton loads; the rest comes with the installed package."""

from deepseek_triton.ensemble.models.{} import TritonPythonModel as TritonPythonModel
'''


def build(
    options: BuildOptions,
    report: Report = lambda what, done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Build `options.name` into the repository; returns the new version's number.

    report: called with the progress. say: called with a line for the user on each choice that the build made itself.

    Raises:
        BuildError: the checkpoint, an option or the result is at fault; the repository is untouched.
    """
    target_named(options.target).require_packages()
    checkpoint = open_checkpoint(options.checkpoint)
    chosen = choose_max_seq_len(options, checkpoint.spec)
    if options.max_seq_len is None:
        say(chosen.describe())
    with _created(options.repository), _staging(options.repository) as staging:
        version = _next_version(options)
        write = _write_scorer if options.task == "score" else _write_generator
        write(checkpoint, options, chosen.tokens, staging, version, report)
        require_sound(staging)
        _move_into_place(staging, options.repository, _model_names(options), version)
    return version


def _write_generator(
    checkpoint: Checkpoint, options: BuildOptions, max_seq_len: int, staging: Path, version: int, report: Report
) -> None:
    """Write tokenizer, engine, detokenizer and the ensemble that joins them."""
    target = target_named(options.target)
    settings = target.settings(options, checkpoint.spec, max_seq_len)
    for config in (
        pbtxt.tokenizer_config(options.name),
        pbtxt.detokenizer_config(options.name),
        pbtxt.engine_config(options.name, settings.to_parameters()),
        pbtxt.ensemble_config(options.name, GENERATE_PIPELINE),
    ):
        (staging / config.name / str(version)).mkdir(parents=True)
        _write_config(staging, config)
    tokenizer, detokenizer, engine, _ = (staging / name / str(version) for name in _model_names(options))
    _write_tokenizer(checkpoint, (tokenizer, detokenizer, engine))
    _write_adapter("tokenizer", tokenizer)
    _write_adapter("detokenizer", detokenizer)
    write_engine(target, BuildJob(checkpoint, options, max_seq_len, engine, report), settings)
    _write_adapter("engine", engine)


def _write_scorer(
    checkpoint: Checkpoint, options: BuildOptions, max_seq_len: int, staging: Path, version: int, report: Report
) -> None:
    """Write tokenizer, scoring engine, scorer and the ensemble that joins them."""
    target = target_named(options.target)
    names = _model_names(options)
    tokenizer, scorer, engine, _ = (staging / name / str(version) for name in names)
    for name in names:
        (staging / name / str(version)).mkdir(parents=True)
    _write_tokenizer(checkpoint, (tokenizer,))
    prefix_ids = write_profile(
        options.scoring, max_seq_len, is_plan=target.scores_with_plan, tokenizer=tokenizer, scorer=scorer
    )
    write_scoring_engine(target, BuildJob(checkpoint, options, max_seq_len, engine, report), prefix_ids)
    for config in scoring_configs(options, checkpoint.spec.hidden_size):
        _write_config(staging, config)
    _write_adapter("score_tokenizer", tokenizer)
    _write_adapter("scorer", scorer)
    if not target.scores_with_plan:
        _write_adapter("score_engine", engine)


def _write_config(repository: Path, config: pbtxt.ModelConfig) -> None:
    (repository / config.name / "config.pbtxt").write_text(pbtxt.to_text(config), encoding="utf-8")


def _model_names(options: BuildOptions) -> list[str]:
    """The models that make up `options.name`, in the order in which they are moved in: the ensemble last."""
    last = SCORER_SUFFIX if options.task == "score" else DETOKENIZER_SUFFIX
    suffixes = (TOKENIZER_SUFFIX, last, ENGINE_SUFFIX)
    return [*(model_name(options.name, suffix) for suffix in suffixes), options.name]


def _next_version(options: BuildOptions) -> int:
    """One more than the highest version that any part of the model has."""
    versions = (path for name in _model_names(options) for path in (options.repository / name).glob("*"))
    return max((int(path.name) for path in versions if path.name.isdigit()), default=0) + 1


@contextlib.contextmanager
def _created(directory: Path) -> Iterator[None]:
    """Make `directory` if it isn't there; a build that fails removes what it made."""
    with contextlib.ExitStack() as undo:
        for path in reversed([path for path in (directory, *directory.parents) if not path.exists()]):
            undo.callback(_remove_empty, path)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            raise BuildError(
                f"{error.filename or directory}: {error.strerror}; build into another directory"
            ) from error
        undo.pop_all()


@contextlib.contextmanager
def _staging(repository: Path) -> Iterator[Path]:
    # Beside the repository, not inside it: a running server would take it for a model.
    parent = repository.resolve().parent
    staging = Path(tempfile.mkdtemp(prefix=f".{repository.name}-building-", dir=parent))
    try:
        yield staging
    except OSError as error:
        is_staged = error.filename is None or Path(error.filename).is_relative_to(staging)
        where = repository if is_staged else error.filename
        raise BuildError(
            f"{where}: {error.strerror}; the repository is unchanged: correct this and build again"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_tokenizer(checkpoint: Checkpoint, directories: Sequence[Path]) -> None:
    """Write the tokenizer's files for each model that reads them; the engine does for stop words and guides."""
    from deepseek_triton.ensemble.text.tokenizer import Tokenizer

    first, *others = directories
    try:
        checkpoint.write_tokenizer(first)
        vocab_size = Tokenizer.from_directory(first).vocab_size
    except ValueError as error:  # of a GGUF's tokenizer or a tokenizer.json; it names the copy, which is temporary
        reason = str(error).replace(f"{first}/", "")
        raise BuildError(f"{checkpoint.path}: {reason}; fetch the checkpoint again") from error
    if vocab_size > checkpoint.spec.vocab_size:
        raise BuildError(
            f"{checkpoint.path}: the tokenizer has {vocab_size} tokens, the model {checkpoint.spec.vocab_size}; "
            "they don't belong together"
        )
    for path in first.iterdir():
        for other in others:
            shutil.copyfile(path, other / path.name)


def _write_adapter(name: str, directory: Path) -> None:
    # It imports the installed package: a copy of the code would be older than everything that it calls.
    (directory / "model.py").write_text(MODEL_PY.format(name), encoding="utf-8")


def _move_into_place(staging: Path, repository: Path, names: list[str], version: int) -> None:
    """Rename each model's version into the repository, the ensemble last: it never names a version that isn't there.

    How to undo a step is recorded before the step, so that an interrupt doesn't leave half a model either.
    """
    with contextlib.ExitStack() as undo:
        for name in names:
            model, target = repository / name, repository / name / str(version)
            if not model.exists():
                undo.callback(_remove_empty, model)
                model.mkdir()
            undo.callback(shutil.rmtree, target, ignore_errors=True)
            (staging / name / str(version)).rename(target)
        for name in names:
            config = repository / name / "config.pbtxt"
            undo.callback(_restore, config, config.read_bytes() if config.exists() else None)
            (staging / name / "config.pbtxt").replace(config)
        undo.pop_all()


def _remove_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()


def _restore(file: Path, content: bytes | None) -> None:
    if content is None:
        file.unlink(missing_ok=True)
    else:
        file.write_bytes(content)
