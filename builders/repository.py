"""Checkpoint → model repository: every artefact, configuration and adapter of one served model, moved in atomically.

Everything is made in a directory beside the repository, checked there as a whole, and only then renamed into place: a
build that fails or is interrupted leaves the repository as it was. Building a name again adds the next version.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version as package_version
from pathlib import Path

import onnx

import ensemble.models
from builders import pbtxt
from builders.check import require_sound
from builders.checkpoint import Checkpoint, open_checkpoint
from builders.errors import BuildError
from builders.graph.decoder import DTYPES, build_graph
from ensemble.manifest import ArtefactFile, Manifest
from ensemble.pipelines import (
    DETOKENIZER_SUFFIX,
    ENGINE_SUFFIX,
    GENERATE_PIPELINE,
    TOKENIZER_SUFFIX,
    model_name,
)
from ensemble.settings import EngineSettings

TARGETS = ("onnx",)
DEFAULT_MAX_SEQ_LEN = 2048
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# opset → the first ONNX Runtime that runs every operator of the graph in it
ONNX_RUNTIME_FOR_OPSET = {24: (1, 24), 23: (1, 23)}

# Called with what is done now, and its progress and total in bytes.
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BuildOptions:
    """What to build.

    max_seq_len: tokens in a sequence, prompt and answer; None: the model's own limit, at most 2,048.
    """

    checkpoint: Path
    name: str
    repository: Path = Path("model_repository")
    target: str = "onnx"
    precision: str = "fp32"
    max_seq_len: int | None = None
    settings: EngineSettings = field(default_factory=EngineSettings)

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise BuildError(f"name is {self.name!r}; use letters, digits, '.', '_' and '-', the first not a sign")
        if self.target not in TARGETS:
            raise BuildError(f"target is {self.target!r}; supported: {', '.join(TARGETS)}")
        if self.precision not in DTYPES:
            raise BuildError(f"precision is {self.precision!r}; supported: {', '.join(DTYPES)}")
        if self.max_seq_len is not None and self.max_seq_len < 2:
            raise BuildError(f"max_seq_len is {self.max_seq_len}, must be at least 2")

    def command(self) -> str:
        """The command line that builds this again."""
        words = [
            "deepseek-triton",
            "build",
            str(self.checkpoint),
            "--name",
            self.name,
            "--target",
            self.target,
        ]
        words += ["--precision", self.precision, "--repository", str(self.repository)]
        if self.max_seq_len is not None:
            words += ["--max-seq-len", str(self.max_seq_len)]
        for name in ("num_slots", "prefill_chunk", "num_threads"):
            if (value := getattr(self.settings, name)) != getattr(EngineSettings, name):
                words += ["--" + name.replace("_", "-"), str(value)]
        return shlex.join(words)


def build(options: BuildOptions, report: Report = lambda what, done, total: None) -> int:
    """Build `options.name` into the repository; returns the new version's number.

    Raises:
        BuildError: the checkpoint, an option or the result is at fault; the repository is untouched.
    """
    checkpoint = open_checkpoint(options.checkpoint)
    max_seq_len = _max_seq_len(checkpoint, options)
    with _created(options.repository), _staging(options.repository) as staging:
        version = _next_version(options)
        configs = _configs(options)
        for name, config in configs.items():
            (staging / name / str(version)).mkdir(parents=True)
            (staging / name / "config.pbtxt").write_text(pbtxt.to_text(config), encoding="utf-8")
        tokenizer, detokenizer, engine = (
            staging / model_name(options.name, suffix) / str(version)
            for suffix in (TOKENIZER_SUFFIX, DETOKENIZER_SUFFIX, ENGINE_SUFFIX)
        )
        _write_text_models(checkpoint, tokenizer, detokenizer)
        _write_engine(checkpoint, options, max_seq_len, engine, report)
        require_sound(staging)
        _move_into_place(staging, options.repository, list(configs), version)
    return version


def _max_seq_len(checkpoint: Checkpoint, options: BuildOptions) -> int:
    spec = checkpoint.spec
    limit = spec.max_position_embeddings
    if spec.rope.scaling == "dynamic":
        limit = int(limit * spec.rope.factor)
    max_seq_len = min(limit, DEFAULT_MAX_SEQ_LEN) if options.max_seq_len is None else options.max_seq_len
    if max_seq_len > limit:
        raise BuildError(f"max_seq_len is {max_seq_len}, the model was trained for {limit} tokens")
    if options.settings.prefill_chunk > max_seq_len:
        raise BuildError(
            f"prefill_chunk is {options.settings.prefill_chunk}, must be at most max_seq_len {max_seq_len}"
        )
    return max_seq_len


def _configs(options: BuildOptions) -> dict[str, pbtxt.ModelConfig]:
    """Model name → its configuration; the ensemble last."""
    configs = (
        pbtxt.tokenizer_config(options.name),
        pbtxt.detokenizer_config(options.name),
        pbtxt.engine_config(options.name, options.settings.to_parameters()),
        pbtxt.ensemble_config(options.name, GENERATE_PIPELINE),
    )
    return {config.name: config for config in configs}


def _next_version(options: BuildOptions) -> int:
    """One more than the highest version that any part of the model has."""
    versions = (path for name in _configs(options) for path in (options.repository / name).glob("*"))
    return max((int(path.name) for path in versions if path.name.isdigit()), default=0) + 1


@contextlib.contextmanager
def _created(directory: Path) -> Iterator[None]:
    """Make `directory` if it isn't there; a build that fails takes away again what it made."""
    with contextlib.ExitStack() as undo:
        for path in reversed([path for path in (directory, *directory.parents) if not path.exists()]):
            undo.callback(_remove_empty, path)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            raise BuildError(f"{error.filename or directory}: {error.strerror}; build into another directory") from error
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
        raise BuildError(f"{where}: {error.strerror}; the repository is as it was: mend this and build again") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_text_models(checkpoint: Checkpoint, tokenizer: Path, detokenizer: Path) -> None:
    from ensemble.text import Tokenizer

    try:
        checkpoint.write_tokenizer(tokenizer)
        vocab_size = Tokenizer.from_directory(tokenizer).vocab_size
    except ValueError as error:  # a GGUF's tokenizer, or a tokenizer.json: they name the copy, which goes away
        reason = str(error).replace(f"{tokenizer}/", "")
        raise BuildError(f"{checkpoint.path}: {reason}; fetch the checkpoint again") from error
    if vocab_size > checkpoint.spec.vocab_size:
        raise BuildError(
            f"{checkpoint.path}: the tokenizer has {vocab_size} tokens, the model {checkpoint.spec.vocab_size}; "
            "they don't belong together"
        )
    for path in tokenizer.iterdir():
        shutil.copyfile(path, detokenizer / path.name)
    _write_adapter("tokenizer", tokenizer)
    _write_adapter("detokenizer", detokenizer)


def _write_engine(
    checkpoint: Checkpoint, options: BuildOptions, max_seq_len: int, directory: Path, report: Report
) -> None:
    spec, itemsize = checkpoint.spec, DTYPES[options.precision].itemsize
    total = checkpoint.spec.num_parameters() * itemsize + max_seq_len * spec.head_dim * itemsize
    free = shutil.disk_usage(directory).free
    if free < total:
        raise BuildError(f"{directory.parent}: {total // 2**20} MiB needed, {free // 2**20} MiB free; make room")

    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        report("weights", done, total)

    opset = _opset()
    path = build_graph(
        spec, checkpoint.read, directory,
        max_seq_len=max_seq_len, precision=options.precision, opset=opset,
        version=package_version("deepseek-triton"), progress=advance,
    )  # fmt: skip
    _write_adapter("engine", directory)
    packages = ("deepseek-triton", "numpy", "onnx", "onnxruntime", "tokenizers")
    Manifest(
        name=options.name,
        target=options.target,
        precision=options.precision,
        checkpoint=checkpoint.path.name,
        checkpoint_sha256=checkpoint.digest(),
        spec=spec.to_dict(),
        limits={"max_seq_len": max_seq_len},
        end_ids=spec.eos_token_ids,
        shapes=_shapes(path),
        versions={package: package_version(package) for package in packages},
        requires={"onnxruntime": ".".join(map(str, ONNX_RUNTIME_FOR_OPSET[opset]))},
        files={file.name: ArtefactFile.of(file) for file in (path, path.with_name(path.name + ".data"))},
        command=options.command(),
    ).save(directory)


def _opset() -> int:
    """The newest opset that the ONNX Runtime installed here can run; Python 3.10 has none later than 1.23."""
    installed = tuple(int(part) for part in package_version("onnxruntime").split(".")[:2])
    for opset, needed in ONNX_RUNTIME_FOR_OPSET.items():
        if installed >= needed:
            return opset
    raise BuildError(f"onnxruntime {package_version('onnxruntime')} is too old; pip install 'onnxruntime>=1.23'")


def _shapes(path: Path) -> dict[str, list[int | str]]:
    graph = onnx.load(path, load_external_data=False).graph
    return {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


def _write_adapter(name: str, directory: Path) -> None:
    shutil.copyfile(Path(ensemble.models.__path__[0]) / f"{name}.py", directory / "model.py")


def _move_into_place(staging: Path, repository: Path, names: list[str], version: int) -> None:
    """Rename each model's version in, the ensemble last, so that it never names a version that isn't there.

    Each step's undoing is set down before the step: an interrupt too must not leave half a model.
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
