"""A quantised artefact against the float checkpoint, on text: perplexity, accuracy, agreement, divergence, errors.

Both models run layer by layer in float32 on ONNX Runtime; FP8 layers are simulated with the codes and scales that the
artefact holds (`Float8Nodes`), which gives the FP8 graph's own numbers up to the rounding of a float16 network. Peak
memory is one layer, the head, and the windows' hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.fp8.calibrate import CalibrationError, Report, check_finite
from deepseek_triton.builders.fp8.layer_session import Ids, embed, final_norm, layer_session
from deepseek_triton.builders.graph.float8 import Float8Linear
from deepseek_triton.ensemble.decoder.spec import ModelSpec, layer_prefix

Float32 = NDArray[np.float32]
POSITIONS = 128  # whose logits are in memory at a time
MIN_TOKENS = 64


class EvaluationError(CalibrationError):
    """The text can't be evaluated on."""


class Source(Protocol):
    """Where a model's weights are read: a `Checkpoint` is wrapped by `FloatSource`, an `Artefact` is one."""

    def read(self, name: str) -> NDArray[Any]:
        """A weight by its Hugging Face name."""

    def quantized(self, module: str) -> Float8Linear | None:
        """A linear layer in FP8, or None."""


class StoredSource(Source, Protocol):
    """A source that knows what a layer takes."""

    def stored_bytes(self, module: str) -> int:
        """Bytes of the module's weight and its scales."""


class Readable(Protocol):
    """What has float weights by name."""

    def read(self, name: str) -> NDArray[Any]:
        """A weight by its Hugging Face name."""


class FloatSource:
    """A checkpoint as a source without any FP8 layer."""

    def __init__(self, checkpoint: Readable) -> None:
        self.read = checkpoint.read

    def quantized(self, module: str) -> Float8Linear | None:
        return None

    def stored_bytes(self, module: str) -> int:
        return self.read(f"{module}.weight").size * 4


@dataclass(frozen=True)
class Quality:
    """How near a model comes to the float one; averages over all predicted tokens.

    perplexity_ratio: the model's over the float model's. accuracy: how often the next token has the highest logit.
    accuracy_kept: accuracy over the float model's; None if that is 0. agreement: how often both models' first choices
    are the same.
    mean_kl, p99_kl, worst_kl: KL(float || model) in nats, over positions.
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
    """A model's last hidden states, normed: [seq_len, hidden] for each window; and its head [vocab_size, hidden]."""

    hidden: tuple[Float32, ...]
    head: Float32


@dataclass(frozen=True)
class ModuleError:
    """One linear layer's output error, as a fraction of the output's size (root mean square over root mean square).

    own: with the float model's hidden states entering the decoder layer. accumulated: in the quantised model.
    A channel's constant factor is no error: smoothing scales channels that a later layer scales back.
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
    """Both models' predictions of each window's tokens from the second on."""
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
        EvaluationError: the text is empty or too short, or of another vocabulary.
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
