"""Recover a pruned checkpoint: train it to answer as its parent does, and write the best of what came out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek_triton.builders.checkpoint.files.hub_cache import model_name
from deepseek_triton.builders.checkpoint.reader import Checkpoint, open_checkpoint
from deepseek_triton.builders.fp8.calibrate import Report
from deepseek_triton.builders.lifecycle.output import check_new, new_directory
from deepseek_triton.builders.lifecycle.provenance import Provenance, provenance_of
from deepseek_triton.builders.lifecycle.recovery.options import RecoverOptions
from deepseek_triton.builders.lifecycle.recovery.state import TrainingState, training_state
from deepseek_triton.builders.lifecycle.recovery.windows import Windows, text_windows
from deepseek_triton.quick_imports import quick_imports

if TYPE_CHECKING:
    from deepseek_triton.builders.lifecycle.recovery.train import Judgement


@dataclass(frozen=True)
class Recovered:
    """What was written: the student before training, its best, and all judgements in the order of their steps."""

    output: Path
    before: Judgement
    after: Judgement
    judgements: tuple[Judgement, ...]
    num_steps: int


def recover(
    options: RecoverOptions,
    report: Report = lambda what, done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Recovered:
    """Train and write; what a killed run of the same options left is gone on from.

    Raises:
        BuildError: a checkpoint or text can't be used, the output exists, or the loss isn't finite.
        ModuleNotFoundError: a package of the extra `train` is missing.
    """
    student, teacher = open_checkpoint(options.student), open_checkpoint(options.teacher)
    check_new(options.output, student.path)
    windows = text_windows(student, teacher, options.text, options.held_out, options.window_len)
    digests = {"student": digest(student), "teacher": digest(teacher)}
    fingerprint = {**options.settings(), **digests, "texts": windows.digests}
    with training_state(options.output, fingerprint, restarts=options.restarts) as state:
        recovered = _train(student, teacher, windows, options, digests, state, report, say)
        state.discard()
    return recovered


def digest(checkpoint: Checkpoint) -> str:
    """SHA-256 of all tensors, as a provenance has it."""
    opened = checkpoint.reopened()
    for name in opened.spec.tensor_shapes():
        opened.read(name)
    return opened.digest()


def _train(
    student: Checkpoint,
    teacher: Checkpoint,
    windows: Windows,
    options: RecoverOptions,
    digests: Mapping[str, str],
    state: TrainingState,
    report: Report,
    say: Callable[[str], None],
) -> Recovered:
    with quick_imports():
        import peft  # noqa: F401  # and transformers
        import torch

    from deepseek_triton.builders.lifecycle.recovery.models import choose_device, load_model, save_model, with_lora
    from deepseek_triton.builders.lifecycle.recovery.train import Trainer

    device = choose_device(options.device)
    torch.manual_seed(options.seed)  # of LoRA's first weights
    model: Any = load_model(student, device)
    if options.lora_rank is not None:
        model = with_lora(model, options.lora_rank)
    reference = load_model(teacher, device, "float32" if device == "cpu" else "bfloat16")
    trainer = Trainer(model, reference, windows, options, device, state)
    if trainer.step:
        say(f"goes on from step {trainer.step} of {options.steps}")
    trainer.run(report, say)
    with new_directory(options.output, student.path, say) as directory:
        save_model(model, student, directory)
        Provenance(
            step="recover",
            parent=model_name(student.path),
            parent_sha256=digests["student"],
            settings={**options.settings(), "teacher": model_name(teacher.path), "teacher_sha256": digests["teacher"]},
            data=dict(windows.digests),
            origin=provenance_of(student.path) or None,
        ).save(directory)
        open_checkpoint(directory)
    return Recovered(options.output, trainer.judgements[0], trainer.best, tuple(trainer.judgements), trainer.step)
