"""The whole application as a model repository: the scoring model from a checkpoint, and the fraud models around it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.lifecycle.pruning.choose import Choice
from deepseek_triton.builders.lifecycle.pruning.kept import Kept
from deepseek_triton.builders.lifecycle.pruning.write_left import write_left
from deepseek_triton.builders.repository import pbtxt
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.check import require_sound
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.builders.scoring.options import Batching, ScoringOptions
from deepseek_triton.ensemble.protocol.pipelines import model_name
from deepseek_triton.examples.fraud.model import LABELS, FraudModel
from deepseek_triton.examples.fraud.serving.contracts import (
    MAX_BATCH_SIZE,
    NAME,
    PREPROCESS,
    TEXT_SUFFIX,
    judges,
    pipeline,
)

TEXT_MODEL = model_name(NAME, TEXT_SUFFIX)
# Short on purpose: what stands before {text} is computed once, what stands behind it with every payment.
TEMPLATE = "Bank payment: {text}\nThis payment is"
MAX_SEQ_LEN = 256
VERSION = "1"
MODEL_PY = '''"""What Triton loads; the rest comes with the installed package."""

from deepseek_triton.examples.fraud.serving.{} import TritonPythonModel as TritonPythonModel
'''


def build_text_model(
    checkpoint: Path, repository: Path, precision: str, *, target: str = "onnx", layers: int = 0
) -> None:
    """Build the scoring model `fraud-text`: a stateless graph behind Triton's dynamic batcher. Raises `BuildError`.

    layers: the first so many layers alone are used, which takes as much less time; 0: all.
    """
    if layers:
        with tempfile.TemporaryDirectory(prefix="fraud-layers-") as directory:
            first_layers(checkpoint, layers, Path(directory))
            build_text_model(Path(directory), repository, precision, target=target)
        return
    scoring = ScoringOptions(
        template=TEMPLATE, labels=LABELS, batching=Batching(max_batch_size=MAX_BATCH_SIZE, max_queue_delay_us=1000)
    )
    build(
        BuildOptions(
            checkpoint, TEXT_MODEL, repository, target=target, task="score", precision=precision,
            max_seq_len=MAX_SEQ_LEN, scoring=scoring,
        )
    )  # fmt: skip


def first_layers(checkpoint: Path, count: int, directory: Path) -> None:
    """Write the first `count` layers of a checkpoint as one of their own.

    Its hidden state is worth something to a linear head; the words that it would generate are worth nothing.

    Raises:
        BuildError: the checkpoint can't be read, or has fewer layers.
    """
    opened = open_checkpoint(checkpoint)
    if not 1 <= count <= opened.spec.num_layers:
        raise BuildError(f"--layers must be from 1 to {opened.spec.num_layers}, got {count}")
    write_left(opened, Choice(Kept(tuple(range(count)))), directory, "float32")


def write_fraud_models(repository: Path, model: FraudModel, say: Callable[[str], None] = lambda line: None) -> None:
    """Write preprocessing, the three judges and the ensemble beside the scoring model. Raises `BuildError`."""
    hidden_size = len(model.head)
    configs = {
        "preprocess": pbtxt.python_config(model_name(NAME, "preprocess"), PREPROCESS),
        **{name: pbtxt.python_config(model_name(NAME, name), own) for name, own in judges(hidden_size).items()},
    }
    for module, config in configs.items():
        folder = _fresh(repository / config.name)
        (folder / "model.py").write_text(MODEL_PY.format(module), encoding="utf-8")
        if module != "preprocess":
            model.save(folder)
        (folder.parent / "config.pbtxt").write_text(pbtxt.to_text(config), encoding="utf-8")
    ensemble = pbtxt.ensemble_config(NAME, pipeline(hidden_size), MAX_BATCH_SIZE)
    _fresh(repository / NAME)
    (repository / NAME / "config.pbtxt").write_text(pbtxt.to_text(ensemble), encoding="utf-8")
    require_sound(repository)
    say(f"wrote {', '.join([*(config.name for config in configs.values()), NAME])} into {repository}")


def _fresh(model: Path) -> Path:
    """An empty first version of `model`."""
    shutil.rmtree(model, ignore_errors=True)
    (model / VERSION).mkdir(parents=True)
    return model / VERSION
