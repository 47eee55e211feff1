"""Prompts: the number of a conversation in, its turns out. Profile, seed and number determine every text.

A turn's text is made of plain sentences, so that a model continues a prompt of any length, and no two prompts are
equal. Answers are unknown here: a conversation's history grows with each answer.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from deepseek_triton.clients.api import GenerateRequest, Generation
from deepseek_triton.clients.score import ScoreRequest
from deepseek_triton.loadtest.profile import Length, LoadProfile, ProtocolName, Requests, image_files

WHO = ("The old sailor", "My neighbour", "A young painter", "The baker", "Our teacher", "A tired doctor", "The farmer")
DOES = ("remembers", "asked about", "wrote a letter on", "cannot forget", "would like to see", "spoke of", "paid for")
WHAT = (
    "the harbour in winter", "a house by the river", "the price of bread", "a long walk home", "three kinds of apples",
    "the train to the coast", "a song from childhood", "the first snow", "a broken clock", "the night market",
)  # fmt: skip
THEN = ("because it was late", "and said so twice", "while the rain fell", "as everybody knows", "before the day ended")
# An estimate, used to decide whether one more turn fits into the context; English text has about 1.3.
TOKENS_PER_WORD = 1.5
TEMPLATE_TOKENS = 16  # estimated tokens that a chat template adds to a turn


@dataclass(frozen=True)
class ConversationTurn:
    """One question: its text, the limit of its answer, and the pause before it is sent."""

    text: str  # of an image: its path
    max_tokens: int  # 0 for a text to score and for an image
    think_s: float  # 0 for the first turn
    more_texts: tuple[str, ...] = ()  # to score with the first, in one request


@dataclass(frozen=True)
class ImageRequest:
    """image: the bytes of a JPEG or PNG file, to be reported on."""

    image: bytes


LoadRequest = GenerateRequest | ScoreRequest | ImageRequest


@dataclass(frozen=True)
class Talk:
    """One conversation; a single request is a conversation of one turn."""

    number: int
    protocol: ProtocolName
    turns: tuple[ConversationTurn, ...]


def talk(profile: LoadProfile, number: int) -> Talk:
    """Conversation `number` of a profile."""
    source = random.Random(f"talk {profile.seed} {number}")
    requests = profile.requests
    (protocol,) = source.choices(list(profile.protocols), list(profile.protocols.values()))
    count = round(sample_length(requests.conversation.turns, source)) if requests.conversation else 1
    turns = []
    for i in range(count):
        text = _one_text(requests, source)
        max_tokens = round(sample_length(requests.answer_tokens, source)) if requests.answer_tokens else 0
        more_texts = tuple(_one_text(requests, source) for _ in range(requests.num_texts - 1))
        pause = sample_length(requests.conversation.think_s, source) if requests.conversation and i else 0.0
        turns.append(ConversationTurn(text, max_tokens, pause, more_texts))
    return Talk(number, protocol, tuple(turns))  # type: ignore[arg-type]


def sample_length(length: Length, source: random.Random) -> float:
    """One random value of a clipped lognormal distribution."""
    value = length.median * math.exp(length.sigma * source.gauss(0.0, 1.0))
    return min(max(value, length.least), length.most)


class History:
    """Makes the requests of one conversation, each with the turns and answers before it."""

    def __init__(self, talk: Talk, requests: Requests, seed: int) -> None:
        self._talk, self._requests, self._seed = talk, requests, seed
        self._messages: list[dict[str, str]] = []
        self._num_tokens = 0

    def request(self, turn: ConversationTurn) -> LoadRequest | None:
        """The request for a turn; None: it would exceed the context, so the conversation is over."""
        conversation = self._requests.conversation
        if conversation:
            more = len(turn.text.split()) * TOKENS_PER_WORD + TEMPLATE_TOKENS + turn.max_tokens
            if self._num_tokens + more > conversation.context_tokens:
                return None
        # Greedy decoding needs no seed. Each sampled request has its own seed, the same in every run of the profile.
        temperature = self._requests.temperature or None
        seed = (self._seed * 1_000_003 + self._talk.number) % 2**63 if temperature else None
        if self._requests.form == "score":
            return ScoreRequest(texts=(turn.text, *turn.more_texts))
        if self._requests.form == "report":
            return ImageRequest(_bytes(turn.text))
        if self._requests.form == "text":
            return GenerateRequest(prompt=turn.text, max_tokens=turn.max_tokens, temperature=temperature, seed=seed)
        self._messages.append({"role": "user", "content": turn.text})
        return GenerateRequest(
            messages=tuple(self._messages), max_tokens=turn.max_tokens, temperature=temperature, seed=seed
        )

    def answered(self, answer: Generation) -> None:
        """Add an answer to the history."""
        self._messages.append({"role": "assistant", "content": answer.text})
        self._num_tokens = answer.num_input_tokens + answer.num_output_tokens


def _one_text(requests: Requests, source: random.Random) -> str:
    """A turn's text: sentences, or one of the profile's texts or images."""
    text = _text(source, round(sample_length(requests.prompt_words, source)))
    if requests.texts:
        return source.choice(_lines(requests.texts))
    return source.choice(_images(requests.images)) if requests.images else text


@cache
def _lines(path: str) -> tuple[str, ...]:
    """The texts of a profile."""
    return tuple(line for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip())


@cache
def _images(directory: str) -> tuple[str, ...]:
    """The paths of a profile's images."""
    return tuple(map(str, image_files(Path(directory))))


@cache
def _bytes(path: str) -> bytes:
    return Path(path).read_bytes()


def _text(source: random.Random, num_words: int) -> str:
    """Random sentences, cut after `num_words` words."""
    words: list[str] = []
    while len(words) < num_words:
        sentence = " ".join(source.choice(part) for part in (WHO, DOES, WHAT, THEN))
        words += f"{sentence}.".split()
    return " ".join(words[:num_words])
