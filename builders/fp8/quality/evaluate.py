"""Compare a quantised artefact with the float checkpoint on text: perplexity, accuracy, agreement, KL, layer errors.

Both models run layer by layer in float32 on ONNX Runtime. FP8 layers are simulated with the artefact's codes and scales
(`Float8Nodes`); the numbers are those of the FP8 graph up to the rounding of a float16 network. Peak memory is one
layer, the head, and the windows' hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.fp8.calibrate import CalibrationError, Report, check_finite
from deepseek_triton.builders.fp8.forward.layer_session import Ids, embed, final_norm, layer_session
from deepseek_triton.builders.graph.float8 import Float8Linear
from deepseek_triton.ensemble.decoder.spec import ModelSpec, layer_prefix

Float32 = NDArray[np.float32]
POSITIONS = 128  # logits of this many positions are in memory at a time
MIN_TOKENS = 64


class EvaluationError(CalibrationError):
    """The text can't be used for evaluation."""


class Source(Protocol):
    """Gives a model's weights. An `Artefact` is a source; `FloatSource` makes a `Checkpoint` one."""

    def read(self, name: str) -> NDArray[Any]:
        """A weight by its Hugging Face name."""

    def quantized(self, module: str) -> Float8Linear | None:
        """A linear layer in FP8, or None."""


class StoredSource(Source, Protocol):
    """A source that knows the size of each layer."""

    def stored_bytes(self, module: str) -> int:
        """Bytes of the module's weight and its scales."""


class Readable(Protocol):
    """Gives float weights by name."""

    def read(self, name: str) -> NDArray[Any]:
        """A weight by its Hugging Face name."""


class FloatSource:
    """A checkpoint as a source that has no FP8 layer."""

    def __init__(self, checkpoint: Readable) -> None:
        self.read = checkpoint.read

    def quantized(self, module: str) -> Float8Linear | None:
        return None

    def stored_bytes(self, module: str) -> int:
        return self.read(f"{module}.weight").size * 4


@dataclass(frozen=True)
class Quality:
    """How close a model is to the float model; averages over all predicted tokens.

    perplexity_ratio: perplexity / float_perplexity. accuracy: fraction of positions where the next token has the
    highest logit. accuracy_kept: accuracy / float_accuracy, or None if that is 0. agreement: fraction of positions
    where both models have the same token first. mean_kl, p99_kl, worst_kl: KL(float || model) over positions, in nats.
    """

    num_tokens: int
    float_perplexity: float
    perplexity: float
    perplexity_ratio: float
    float_accuracy: float
    accuracy: float
    accuracy_kept: float | None
    agreement: float
    mean_kl: float
    p99_kl: float
    worst_kl: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Final:
    """Last hidden states after the norm [seq_len, hidden], one for each window, and the head [vocab_size, hidden]."""

    hidden: tuple[Float32, ...]
    head: Float32


@dataclass(frozen=True)
class ModuleError:
    """One linear layer's output error relative to its output (root mean square over root mean square).

    own: the decoder layer's input comes from the float model. accumulated: it comes from the quantised model.
    A constant factor of a channel doesn't count, because smoothing scales channels that a later layer scales back.
    """

    module: str
    precision: str
    num_bytes: int
    own: float
    accumulated: float


def run_model(
    source: Source, spec: ModelSpec, windows: Sequence[Ids], report: Report = lambda what, done, total: None
) -> Final:
    """Run the decoder over windows [seq_len] of token ids, up to the head."""
    longest = max(map(len, windows))
    embedding = source.read("model.embed_tokens.weight")
    hidden = embed(embedding, windows)
    for layer in range(spec.num_layers):
        report("evaluate", layer, spec.num_layers)
        with layer_session(spec, layer, source.read, max_seq_len=longest, quantized=source.quantized) as session:
            for i, window in enumerate(hidden):
                (hidden[i],) = session.run(window)
    report("evaluate", spec.num_layers, spec.num_layers)
    norm = source.read("model.norm.weight")
    head = embedding if spec.tie_word_embeddings else source.read("lm_head.weight")
    for window in hidden:
        check_finite("the last layer's output", window)
    normed = tuple(final_norm(window, norm, spec.rms_norm_eps) for window in hidden)
    return Final(normed, np.asarray(head, np.float32))


def compare(reference: Final, candidate: Final, windows: Sequence[Ids]) -> Quality:
    """Compare how both models predict each window's tokens, from the second on."""
    columns: list[NDArray[Any]] = []
    for window, exact, rounded in zip(windows, reference.hidden, candidate.hidden, strict=True):
        targets = window[1:]
        for start in range(0, len(targets), POSITIONS):
            part = slice(start, min(start + POSITIONS, len(targets)))
            columns.append(
                _compare_positions(exact[part] @ reference.head.T, rounded[part] @ candidate.head.T, targets[part])
            )
    rows = np.concatenate(columns, axis=1)
    float_loss, loss, float_hit, hit, agree, kl = (float(value) for value in rows.mean(axis=1))
    return Quality(
        num_tokens=rows.shape[1],
        float_perplexity=float(np.exp(float_loss)),
        perplexity=float(np.exp(loss)),
        perplexity_ratio=float(np.exp(loss - float_loss)),
        float_accuracy=float_hit,
        accuracy=hit,
        accuracy_kept=hit / float_hit if float_hit else None,
        agreement=agree,
        mean_kl=kl,
        p99_kl=float(np.quantile(rows[5], 0.99)),
        worst_kl=float(rows[5].max()),
    )


def _compare_positions(exact: Float32, rounded: Float32, targets: Ids) -> NDArray[np.float64]:
    """Logits [n, vocab_size] of both → [6, n]: losses, hits, agreement, KL."""
    choice, rounded_choice = exact.argmax(axis=1), rounded.argmax(axis=1)
    for logits in (exact, rounded):  # to log-probabilities, in place
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, dtype=np.float64))[:, None].astype(np.float32)
    rows = np.arange(len(targets))
    losses = (-exact[rows, targets], -rounded[rows, targets])
    rounded -= exact
    kl = -np.einsum("ij,ij->i", np.exp(exact), rounded, dtype=np.float64)
    hits = (choice == targets, rounded_choice == targets, choice == rounded_choice)
    return np.stack([np.asarray(column, np.float64) for column in (*losses, *hits, np.maximum(kl, 0))])


def module_errors(reference: Source, candidate: StoredSource, spec: ModelSpec, window: Ids) -> list[ModuleError]:
    """Each linear layer's error on one window of token ids [seq_len], in the order of the layers."""
    exact = embed(reference.read("model.embed_tokens.weight"), [window])[0]
    rounded = embed(candidate.read("model.embed_tokens.weight"), [window])[0]
    errors = []
    for layer in range(spec.num_layers):
        prefix, length = layer_prefix(layer), len(window)
        names = tuple(module for tap in spec.taps(layer) for module in tap.modules)
        with layer_session(spec, layer, reference.read, max_seq_len=length, outputs=names) as session:
            next_exact, *wanted = session.run(exact, names)
        with layer_session(
            spec, layer, candidate.read, max_seq_len=length, quantized=candidate.quantized, outputs=names
        ) as session:
            _, *own = session.run(exact, names)
            rounded, *accumulated = session.run(rounded, names)
        exact = next_exact
        for module, want, alone, all_before in zip(names, wanted, own, accumulated, strict=True):
            errors.append(
                ModuleError(
                    prefix + module,
                    "network" if candidate.quantized(prefix + module) is None else "fp8",
                    candidate.stored_bytes(prefix + module),
                    _relative_error(want, alone),
                    _relative_error(want, all_before),
                )
            )
    return errors


def _relative_error(want: Float32, got: Float32) -> float:
    gain = np.einsum("ij,ij->j", want, got) / np.maximum(np.einsum("ij,ij->j", got, got), 1e-30)
    return float(np.linalg.norm(got * gain - want) / max(float(np.linalg.norm(want)), 1e-30))


def text_windows(ids: NDArray[Any], window_len: int, num_tokens: int, vocab_size: int) -> list[Ids]:
    """Cut a text's ids [n] into windows that predict `num_tokens` tokens in all.

    Raises:
        EvaluationError: the text is too short, or has a token outside the vocabulary.
    """
    ids = np.asarray(ids, np.int64)
    if len(ids) < MIN_TOKENS:
        raise EvaluationError(f"the text has {len(ids)} tokens, at least {MIN_TOKENS} are needed: give a longer one")
    if int(ids.max()) >= vocab_size:
        raise EvaluationError(f"token {int(ids.max())} is outside the vocabulary of {vocab_size}")
    windows, left = [], num_tokens
    for start in range(0, len(ids) - 1, window_len):
        window = ids[start : start + min(window_len, left + 1)]
        if left <= 0 or len(window) < 2:
            break
        windows.append(window)
        left -= len(window) - 1
    return windows
