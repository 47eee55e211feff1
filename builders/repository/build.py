"""Checkpoint → model repository: every artefact, configuration and adapter of one served model, moved in atomically.

Everything is written into a directory beside the repository, checked there as a whole, and then renamed into place: a
build that fails or is interrupted leaves the repository as it was. Building a name again adds the next version.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from deepseek_triton.builders.checkpoint.files.hub import local_checkpoint
from deepseek_triton.builders.checkpoint.reader import Checkpoint, open_checkpoint
from deepseek_triton.builders.checkpoint.tokenizer.ends import end_ids
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.fp8.journal import BuildJournal, journal_directory
from deepseek_triton.builders.fp8.plan import describe_seconds, planned
from deepseek_triton.builders.fp8.stored import stored_recipe
from deepseek_triton.builders.repository import pbtxt
from deepseek_triton.builders.repository.check import require_sound
from deepseek_triton.builders.repository.models.kept import (
    given_settings,
    tell_lost_edits,
    with_kept_settings,
    with_settings,
    within_max_seq_len,
)
from deepseek_triton.builders.repository.models.memory import EngineMemory, check_copies
from deepseek_triton.builders.repository.models.settings import places
from deepseek_triton.builders.repository.options import BuildOptions, Report
from deepseek_triton.builders.repository.sequence_len import choose_max_seq_len, require_usable
from deepseek_triton.builders.repository.staging import staging_directory
from deepseek_triton.builders.scoring.parts import scoring_configs, write_profile
from deepseek_triton.builders.targets import target_named
from deepseek_triton.builders.targets.artefacts.target import BuildJob
from deepseek_triton.builders.targets.artefacts.write import write_engine, write_scoring_engine
from deepseek_triton.ensemble.decoder.spec import ModelSpec
from deepseek_triton.ensemble.protocol.pipelines import (
    BESIDE_SUFFIXES,
    DETOKENIZER_SUFFIX,
    ENGINE_SUFFIX,
    GENERATE_PIPELINE,
    INFER_SUFFIX,
    SCORER_SUFFIX,
    TOKENIZER_SUFFIX,
    VLLM_SUFFIX,
    model_name,
)
from deepseek_triton.ensemble.text.chat import end_workers
from deepseek_triton.ensemble.text.tokenizer import Tokenizer

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
    path = local_checkpoint(options.checkpoint, options.revision, report)
    adapter = None if options.adapter is None else local_checkpoint(options.adapter, None, report)
    checkpoint = open_checkpoint(path, adapter)
    _require_apart(options.repository, path)
    for note in checkpoint.notes:
        say(note)
    target_named(options.target).check_parts(options, checkpoint.spec)
    given, options = given_settings(options), with_kept_settings(options, say)
    chosen = choose_max_seq_len(options, checkpoint.spec)
    require_usable(options, checkpoint.spec, chosen)
    if options.max_seq_len is None:
        say(chosen.describe())
    options = within_max_seq_len(options, chosen.tokens, given, say)
    checkpoint.spec = checkpoint.spec.for_length(chosen.tokens)
    options = _fitting(options, checkpoint.spec, chosen.tokens, say)
    compile_s = target_named(options.target).compile_seconds(checkpoint.spec)
    if compile_s:
        say(f"compiling for {options.target} will take some {describe_seconds(compile_s)}")
    takes_blocks = target_named(options.target).takes_blocks(options, checkpoint.spec)
    if options.precision == "fp8" and stored_recipe(checkpoint, takes_blocks=takes_blocks) is not None:
        say("the checkpoint is FP8: its codes and scales are taken over, nothing is calibrated")
    else:
        options = planned(options, checkpoint.spec, say, compile_s)
    with (
        _no_workers_after(),
        _created(options.repository),
        staging_directory(options.repository, options.name, say) as staging,
    ):
        version = _next_version(options)
        write = _write_scorer if options.task == "score" else _write_generator
        write(checkpoint, options, chosen.tokens, staging, version, report, say)
        _write_instances(options, staging)
        require_sound(staging)
        tell_lost_edits(options.repository, staging, _model_names(options), say)
        _move_into_place(staging, options.repository, _model_names(options), version)
    BuildJournal(journal_directory(options.repository, options.name)).discard()
    return version


def _require_apart(repository: Path, checkpoint: Path) -> None:
    """Refuse to build among a checkpoint's files, which a server would then take for its repository.

    Raises:
        BuildError: the repository is the checkpoint's directory.
    """
    directory = checkpoint if checkpoint.is_dir() else checkpoint.parent
    if repository.resolve() == directory.resolve():
        raise BuildError(
            f"{repository} is where the checkpoint is; build into another --repository, as {repository / 'models'}"
        )


@contextlib.contextmanager
def _no_workers_after() -> Iterator[None]:
    """End the processes that rendered the chat template: a program that builds may go on for long."""
    try:
        yield
    finally:
        end_workers()


def _fitting(options: BuildOptions, spec: ModelSpec, max_seq_len: int, say: Callable[[str], None]) -> BuildOptions:
    """The options, with as many sequences as fit where nobody chose their number.

    `say` gets a line on that, and where the weights alone are more than what serves has.

    Raises:
        BuildError: chosen settings don't fit.
    """
    target = target_named(options.target)
    if options.task == "score":
        weights, available = target.weight_bytes(spec, options.precision), target.memory(options.memory)
        check_copies(weights, options.scoring.batching.engine_instances, available)
    else:
        settings = asdict(target.settings(options, spec, max_seq_len))
        need = EngineMemory(target, spec, options.precision, max_seq_len, settings, options.memory)
        weights, available = need.weights, need.available
        largest = need.most("max_num_seqs")
        if "max_num_seqs" in options.settings or not largest:
            need.check()
        elif largest < settings["max_num_seqs"]:
            say(f"max_num_seqs {largest} (as many as fit into what {available.what} has; --max-num-seqs sets it)")
            options = with_settings(options, {"max_num_seqs": largest})
    if weights > available.num_bytes:
        what = f"{available.what} has {available.num_bytes / 2**30:.1f} GiB"
        say(f"the weights alone take {weights / 2**30:.1f} GiB, {what}: serve the model on a larger one")
    return options


def _write_generator(
    checkpoint: Checkpoint,
    options: BuildOptions,
    max_seq_len: int,
    staging: Path,
    version: int,
    report: Report,
    say: Callable[[str], None],
) -> None:
    """Write tokenizer, engine, detokenizer and the ensemble that joins them."""
    target = target_named(options.target)
    settings = target.settings(options, checkpoint.spec, max_seq_len)
    configs = [
        pbtxt.tokenizer_config(options.name),
        pbtxt.detokenizer_config(options.name),
        pbtxt.engine_config(options.name, target.parameters(settings)),
        pbtxt.ensemble_config(options.name, GENERATE_PIPELINE),
    ]
    if VLLM_SUFFIX in target.beside:
        configs.append(pbtxt.vllm_config(options.name))
    if options.infer:
        configs.append(pbtxt.infer_config(options.name))
    for config in configs:
        (staging / config.name / str(version)).mkdir(parents=True)
        _write_config(staging, config)
    suffixes = (TOKENIZER_SUFFIX, DETOKENIZER_SUFFIX, ENGINE_SUFFIX)
    tokenizer, detokenizer, engine = (staging / model_name(options.name, s) / str(version) for s in suffixes)
    served = _write_tokenizer(checkpoint, (tokenizer, detokenizer, engine))
    ends = end_ids(checkpoint.spec, served, str(checkpoint.path))
    _write_adapter("tokenizer", tokenizer)
    _write_adapter("detokenizer", detokenizer)
    job = BuildJob(checkpoint, options, max_seq_len, engine, report, ends, say)
    write_engine(target, job, settings)
    target.write_beside(job, settings, {s: staging / model_name(options.name, s) / str(version) for s in target.beside})
    _write_adapter("engine", engine)
    if options.infer:
        _write_adapter("infer", staging / model_name(options.name, INFER_SUFFIX) / str(version))


def _write_scorer(
    checkpoint: Checkpoint,
    options: BuildOptions,
    max_seq_len: int,
    staging: Path,
    version: int,
    report: Report,
    say: Callable[[str], None],
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
    write_scoring_engine(target, BuildJob(checkpoint, options, max_seq_len, engine, report, say=say), prefix_ids)
    for config in scoring_configs(options, checkpoint.spec.hidden_size):
        _write_config(staging, config)
    _write_adapter("score_tokenizer", tokenizer)
    _write_adapter("scorer", scorer)
    if not target.scores_with_plan:
        _write_adapter("score_engine", engine)


def _write_instances(options: BuildOptions, staging: Path) -> None:
    """Write into the configurations how many processes the models around the engine have."""
    known = places(target_named(options.target), options.task)
    for setting, count in options.instances.items():
        configs = {
            name: pbtxt.parse_text((staging / name / "config.pbtxt").read_text(encoding="utf-8"), staging / name)
            for name in _model_names(options)
        }
        known[setting].write(configs, options.name, count)
        for config in configs.values():
            _write_config(staging, config)


def _write_config(repository: Path, config: pbtxt.ModelConfig) -> None:
    (repository / config.name / "config.pbtxt").write_text(pbtxt.to_text(config), encoding="utf-8")


def _model_names(options: BuildOptions) -> list[str]:
    """The models that make up `options.name`, in the order in which they are moved in: each after those it calls."""
    last = SCORER_SUFFIX if options.task == "score" else DETOKENIZER_SUFFIX
    suffixes = (TOKENIZER_SUFFIX, last, ENGINE_SUFFIX)
    beside = target_named(options.target).beside if options.task != "score" else ()
    names = [*(model_name(options.name, suffix) for suffix in (*beside, *suffixes)), options.name]
    return [*names, model_name(options.name, INFER_SUFFIX)] if options.infer else names


def _next_version(options: BuildOptions) -> int:
    """One more than the highest version that any part of the model has."""
    names = {*_model_names(options), *(model_name(options.name, suffix) for suffix in BESIDE_SUFFIXES)}
    versions = (path for name in names for path in (options.repository / name).glob("*"))
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


def _write_tokenizer(checkpoint: Checkpoint, directories: Sequence[Path]) -> Tokenizer:
    """Write the tokenizer's files for each model that reads them; the engine does for stop words and guides."""
    first, *others = directories
    try:
        checkpoint.write_tokenizer(first)
        tokenizer = Tokenizer.from_directory(first)
    except ValueError as error:  # of a GGUF's tokenizer or a tokenizer.json; it names the copy, which is temporary
        reason = str(error).replace(f"{first}/", "")
        raise BuildError(f"{checkpoint.path}: {reason}; correct it or fetch the checkpoint again") from error
    # Added tokens beyond the model's rows, as [PAD], are there for training: a text that holds one is refused.
    num_needed = max(tokenizer.base_vocab_size, (tokenizer.bos_id or 0) + 1)
    if num_needed > checkpoint.spec.vocab_size:
        raise BuildError(
            f"{checkpoint.path}: the tokenizer has {num_needed} tokens, the model {checkpoint.spec.vocab_size}; "
            "they don't belong together"
        )
    for other in others:
        shutil.copytree(first, other, dirs_exist_ok=True)
    return tokenizer


def _write_adapter(name: str, directory: Path) -> None:
    # It imports the installed package: a copy of the code would be older than everything that it calls.
    (directory / "model.py").write_text(MODEL_PY.format(name), encoding="utf-8")


def _move_into_place(staging: Path, repository: Path, names: list[str], version: int) -> None:
    """Rename each model's version into the repository, those it calls first: none names a version that isn't there.

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
