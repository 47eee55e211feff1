"""Scoring: texts and candidate labels in, each text's label and probabilities out, the same for every transport.

Embeddings come from the same models. A scoring request holds whole tensors of several rows. Transports send and receive
them; this module makes and reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from deepseek_triton.clients.errors import ProtocolError
from deepseek_triton.clients.messages import Turn, messages_json, read_messages
from deepseek_triton.ensemble.protocol import contract
from deepseek_triton.ensemble.protocol.contract import TensorSpec

Chat = Sequence[Turn]
ANY_LABELS = ("a", "b")  # of a request for embeddings: the model scores something, and nobody reads it
EMBED_OUTPUTS = (contract.EMBEDDING, contract.NUM_INPUT_TOKENS)


@dataclass(frozen=True)
class Tensor:
    """Values in row-major order; the shape begins with the rows."""

    shape: tuple[int, ...]
    values: Sequence[Any]

    def __post_init__(self) -> None:
        if len(self.values) != prod(self.shape):
            raise ProtocolError(f"a tensor of shape {list(self.shape)} came with {len(self.values)} values")

    def rows(self) -> list[list[Any]]:
        """The values of each row."""
        width = prod(self.shape[1:])
        return [list(self.values[i * width : (i + 1) * width]) for i in range(self.shape[0])]


@dataclass(frozen=True)
class ScoreRequest:
    """Texts, or chats, and the labels to choose among.

    `texts` go into the model's prompt template; `chats` go through its chat template as they are. Exactly one of the
    two is given; one string is one text. `labels` None: those that the model was built with.

    Raises `ValueError`, naming the field and its value, for a value that is not text.
    """

    texts: str | Sequence[str] | None = None
    chats: Sequence[Chat] | None = None
    labels: Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Check every field; keep them as tuples."""
        if (self.texts is None) == (self.chats is None):
            raise ValueError(f"exactly one of texts and chats must be given, got {self.texts!r} and {self.chats!r}")
        if isinstance(self.texts, str):
            object.__setattr__(self, "texts", (self.texts,))
        for name in ("texts", "labels"):
            if (values := getattr(self, name)) is not None:
                object.__setattr__(self, name, _texts(name, values))
        if self.chats is not None:
            if not self.chats:
                raise ValueError(f"chats must not be empty, got {self.chats!r}")
            object.__setattr__(self, "chats", tuple(read_messages(chat) for chat in self.chats))

    def to_tensors(self) -> dict[TensorSpec, Tensor]:
        """Give the input tensors of `contract.SCORE`, a row for each text."""
        if self.texts is not None:
            spec, rows = contract.TEXT_INPUT, list(self.texts)
        else:
            assert self.chats is not None
            spec, rows = contract.MESSAGES, [messages_json(chat) for chat in self.chats]
        tensors = {spec: Tensor((len(rows), 1), rows)}
        if self.labels is not None:
            # Triton wants every tensor to have the same number of rows.
            shape = (len(rows), len(self.labels))
            tensors[contract.LABELS] = Tensor(shape, list(self.labels) * len(rows))
        return tensors


@dataclass(frozen=True)
class Score:
    """The result for one text.

    probabilities: label → probability; they add up to 1. log_probs: label → its log-probability as a continuation of
    the prompt, in nats. is_calibrated: whether a calibration of these very labels was used.
    """

    label: str
    probabilities: dict[str, float]
    log_probs: dict[str, float]
    is_calibrated: bool
    num_input_tokens: int

    @classmethod
    def from_tensors(cls, outputs: Mapping[str, Tensor]) -> tuple[Score, ...]:
        """Read the outputs of `contract.SCORE`, a Score for each row; `ProtocolError` for a malformed response."""
        specs = (
            contract.LABEL, contract.SCORED_LABELS, contract.PROBABILITIES, contract.LOG_PROBS, contract.IS_CALIBRATED,
            contract.NUM_INPUT_TOKENS,
        )  # fmt: skip
        for spec in specs:
            if spec.name not in outputs:
                raise ProtocolError(f"output {spec.name} is missing from a response with {sorted(outputs)}")
        tensors = [outputs[spec.name].rows() for spec in specs]
        if len({len(rows) for rows in tensors}) != 1:
            raise ProtocolError(f"outputs have different numbers of rows: {[len(rows) for rows in tensors]}")
        scores = []
        for label, labels, probabilities, log_probs, is_calibrated, num_tokens in zip(*tensors, strict=True):
            if not len(labels) == len(probabilities) == len(log_probs):
                raise ProtocolError(f"{len(labels)} labels came with {len(probabilities)} probabilities")
            scores.append(
                cls(
                    label=label[0],
                    probabilities=dict(zip(labels, probabilities, strict=True)),
                    log_probs=dict(zip(labels, log_probs, strict=True)),
                    is_calibrated=bool(is_calibrated[0]),
                    num_input_tokens=num_tokens[0],
                )
            )
        return tuple(scores)


@dataclass(frozen=True)
class Embedding:
    """One text's embedding: the hidden state [hidden_size] after the last norm, where the filled template ends."""

    values: tuple[float, ...]
    num_input_tokens: int

    @classmethod
    def from_tensors(cls, outputs: Mapping[str, Tensor]) -> tuple[Embedding, ...]:
        """Read the outputs of `EMBED_OUTPUTS`, an Embedding for each row; `ProtocolError` for a malformed response."""
        for spec in EMBED_OUTPUTS:
            if spec.name not in outputs:
                raise ProtocolError(f"output {spec.name} is missing from a response with {sorted(outputs)}")
        values, num_tokens = (outputs[spec.name].rows() for spec in EMBED_OUTPUTS)
        if len(values) != len(num_tokens):
            raise ProtocolError(f"{len(values)} embeddings came with {len(num_tokens)} token counts")
        return tuple(cls(tuple(row), count[0]) for row, count in zip(values, num_tokens, strict=True))


def _texts(name: str, values: Sequence[str]) -> tuple[str, ...]:
    if isinstance(values, str):
        raise ValueError(f"{name} must be several texts, got {values!r}")
    if not values:
        raise ValueError(f"{name} must not be empty, got {values!r}")
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise ValueError(f"{name}[{index}] must be text, got {value!r}")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name}[{index}] must be text that UTF-8 can encode, got {value!r}") from None
    return tuple(values)
