"""Learn: train a LoRA adapter on new and replayed examples, merge it, and write an ordinary checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_triton.builders.checkpoint.files.hub_cache import model_name
from deepseek_triton.builders.checkpoint.reader import Checkpoint, open_checkpoint
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.fp8.calibrate import Report
from deepseek_triton.builders.fp8.texts.calibration_text import load_tokenizer
from deepseek_triton.builders.lifecycle.digest import digest_of
from deepseek_triton.builders.lifecycle.learning.examples import Lesson, Lessons, read_examples
from deepseek_triton.builders.lifecycle.learning.options import LearnOptions
from deepseek_triton.builders.lifecycle.learning.tokens import TokenSequence, tokenize
from deepseek_triton.builders.lifecycle.output import check_new, new_directory
from deepseek_triton.builders.lifecycle.provenance import Provenance, provenance_of
from deepseek_triton.builders.lifecycle.recovery.state import TrainingState, training_state
from deepseek_triton.ensemble.text.chat import end_workers
from deepseek_triton.quick_imports import quick_imports

CALIBRATION = "calibration.txt"
CALIBRATION_CHARS = 120_000  # more than a calibration reads


@dataclass(frozen=True)
class HeldOutLosses:
    """Mean cross-entropy over held-out tokens in nats."""

    new: float
    old: float


@dataclass(frozen=True)
class Learnt:
    """What was written, how many examples were trained on, and the losses on held-out ones before and after."""

    output: Path
    num_new: int
    num_replay: int
    steps: int
    before: HeldOutLosses
    after: HeldOutLosses


@dataclass(frozen=True)
class _Prepared:
    train_new: list[TokenSequence]
    train_old: list[TokenSequence]
    held_new: list[TokenSequence]
    held_old: list[TokenSequence]
    calibration: str


def learn(
    options: LearnOptions,
    report: Report = lambda what, done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Learnt:
    """Train, merge and write; what a killed run of the same options left is gone on from.

    Raises:
        BuildError: the checkpoint or the data can't be used, the output exists, or the loss isn't finite.
        ModuleNotFoundError: a package of the extra `train` is missing.
    """
    checkpoint = open_checkpoint(options.checkpoint)
    check_new(options.output, checkpoint.path)
    data, replay = (read_examples(path, options.bad_lines) for path in (options.data, options.replay))
    for one in (data, replay):
        say(one.describe())
    prepared = _prepare(checkpoint, data, replay, options)
    parent = digest_of(checkpoint)
    hashes = {"data": data.sha256, "replay": replay.sha256}
    fingerprint = {**options.settings(), **hashes, "checkpoint": parent}
    with training_state(options.output, fingerprint, restarts=options.restarts) as state:
        provenance = Provenance(
            step="learn",
            parent=model_name(checkpoint.path),
            parent_sha256=parent,
            settings=options.settings(),
            data=hashes,
            origin=provenance_of(checkpoint.path) or None,
        )
        learnt = _train(checkpoint, prepared, options, provenance, state, report, say)
        state.discard()
    return learnt


def _prepare(checkpoint: Checkpoint, data: Lessons, replay: Lessons, options: LearnOptions) -> _Prepared:
    """Tokenise both parts of both files; an example of both files is new data.

    Raises:
        BuildError: a part has nothing to learn or to judge by.
    """
    window_len = min(options.window_len, checkpoint.spec.max_seq_len)
    tokenizer = load_tokenizer(checkpoint)
    end_id = checkpoint.spec.eos_token_ids[0]
    share = options.held_out
    train = {"data": data.train(share), "replay": replay.train(share, without=data.keys)}
    held_out = {"data": data.held_out(share), "replay": replay.held_out(share)}
    try:
        tokens = {
            (part, name): tokenize(found, tokenizer, window_len, end_id)
            for part, files in (("train", train), ("held out", held_out))
            for name, found in files.items()
        }
    finally:
        end_workers()
    for (part, name), sequences in tokens.items():
        if not sequences and not (part == "train" and name == "replay" and not options.num_replayed):
            path = {"data": data, "replay": replay}[name].path
            raise BuildError(
                f"{path}: no example is left for {part} within {window_len} tokens; give more lines, a larger "
                "--window or another --held-out"
            )
    return _Prepared(
        tokens["train", "data"], tokens["train", "replay"], tokens["held out", "data"], tokens["held out", "replay"],
        calibration_text(train["data"], train["replay"]),
    )  # fmt: skip


def calibration_text(new: Sequence[Lesson], old: Sequence[Lesson]) -> str:
    """The examples in turn, so that a calibration which reads the beginning sees both."""
    texts: list[str] = []
    for index in range(max(len(new), len(old))):
        texts += [one[index].plain() for one in (new, old) if index < len(one)]
        if sum(map(len, texts)) > CALIBRATION_CHARS:
            break
    return "\n\n".join(texts)


def _train(
    checkpoint: Checkpoint,
    prepared: _Prepared,
    options: LearnOptions,
    provenance: Provenance,
    state: TrainingState,
    report: Report,
    say: Callable[[str], None],
) -> Learnt:
    with quick_imports():
        import peft  # noqa: F401  # and transformers
        import torch

    from deepseek_triton.builders.lifecycle.learning.loss import mean_loss
    from deepseek_triton.builders.lifecycle.learning.train import Batches, train
    from deepseek_triton.builders.lifecycle.recovery.models import choose_device, load_model, save_model, with_lora

    device = choose_device(options.device)

    def losses(model: Any) -> HeldOutLosses:
        held_out = (prepared.held_new, prepared.held_old)
        return HeldOutLosses(*(mean_loss(model, one, device, options.micro_batch) for one in held_out))

    torch.manual_seed(options.seed)  # of LoRA's first weights
    model = with_lora(load_model(checkpoint, device), options.lora_rank)
    before = losses(model)  # LoRA begins as nothing
    batches = Batches(prepared.train_new, prepared.train_old, options)
    if first := train(model, batches, device, state, report):
        say(f"went on from step {first} of {batches.steps}")
    after = losses(model)
    with new_directory(options.output, checkpoint.path, say) as directory:
        save_model(model, checkpoint, directory)
        (directory / CALIBRATION).write_text(prepared.calibration, encoding="utf-8")
        provenance.save(directory)
        open_checkpoint(directory)  # every tensor is there in its shape, or this says which isn't
    return Learnt(options.output, len(prepared.train_new), len(prepared.train_old), batches.steps, before, after)
