"""What is asked: conversation number i of a profile in, its turns out; the seed and the number decide everything.

A turn's text is made of plain sentences, so that prompts of any length stay prompts that a model continues, and no two
are alike. How an answer turns out is unknown here: a conversation's history grows as it is answered.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from deepseek_triton.clients.api import GenerateRequest, Generation
from deepseek_triton.loadtest.profile import Length, LoadProfile, ProtocolName, Requests

WHO = ("The old sailor", "My neighbour", "A young painter", "The baker", "Our teacher", "A tired doctor", "The farmer")
DOES = ("remembers", "asked about", "wrote a letter on", "cannot forget", "would like to see", "spoke of", "paid for")
WHAT = (
    "the harbour in winter", "a house by the river", "the price of bread", "a long walk home", "three kinds of apples",
    "the train to the coast", "a song from childhood", "the first snow", "a broken clock", "the night market",
)  # fmt: skip
THEN = ("because it was late", "and said so twice", "while the rain fell", "as everybody knows", "before the day ended")
# Words to tokens, for the guess whether one more turn still fits: English needs some 1.3.
TOKENS_PER_WORD = 1.5
TEMPLATE_TOKENS = 16  # that a chat template puts around a turn, about


@dataclass(frozen=True)
class ConversationTurn:
    """One question: its text, the longest answer and the pause before it is sent."""

    text: str
    max_tokens: int
    think_s: float  # 0 for a first turn


@dataclass(frozen=True)
class Talk:
    """One conversation, or one request: a conversation of one turn."""

    number: int
    protocol: ProtocolName
    turns: tuple[ConversationTurn, ...]


def talk(profile: LoadProfile, number: int) -> Talk:
    """Conversation `number` of a profile."""
    source = random.Random(f"talk {profile.seed} {number}")
    requests = profile.requests
    (protocol,) = source.choices(list(profile.protocols), list(profile.protocols.values()))
    count = round(draw(requests.conversation.turns, source)) if requests.conversation else 1
    turns = []
    for i in range(count):
        text = _text(source, round(draw(requests.prompt_words, source)))
        max_tokens = round(draw(requests.answer_tokens, source))
        pause = draw(requests.conversation.think_s, source) if requests.conversation and i else 0.0
        turns.append(ConversationTurn(text, max_tokens, pause))
    return Talk(number, protocol, tuple(turns))  # type: ignore[arg-type]


def draw(length: Length, source: random.Random) -> float:
    """One value of a cut-off lognormal distribution."""
    value = length.median * math.exp(length.sigma * source.gauss(0.0, 1.0))
    return min(max(value, length.least), length.most)


class History:
    """The requests of one talk, each made of the turns and answers before it."""

    def __init__(self, talk: Talk, requests: Requests, seed: int) -> None:
        self._talk, self._requests, self._seed = talk, requests, seed
        self._messages: list[dict[str, str]] = []
        self._num_tokens = 0

    def request(self, turn: ConversationTurn) -> GenerateRequest | None:
        """What to send for a turn; None: the context would overflow, and the talk is over."""
        conversation = self._requests.conversation
        if conversation:
            more = len(turn.text.split()) * TOKENS_PER_WORD + TEMPLATE_TOKENS + turn.max_tokens
            if self._num_tokens + more > conversation.context_tokens:
                return None
        # Greedy texts need no seed; others get one each, the same in every run of the profile.
        temperature = self._requests.temperature or None
        seed = (self._seed * 1_000_003 + self._talk.number) % 2**63 if temperature else None
        if self._requests.form == "text":
            return GenerateRequest(prompt=turn.text, max_tokens=turn.max_tokens, temperature=temperature, seed=seed)
        self._messages.append({"role": "user", "content": turn.text})
        return GenerateRequest(
            messages=tuple(self._messages), max_tokens=turn.max_tokens, temperature=temperature, seed=seed
        )

    def answered(self, answer: Generation) -> None:
        """Take up an answer."""
        self._messages.append({"role": "assistant", "content": answer.text})
        self._num_tokens = answer.num_input_tokens + answer.num_output_tokens


def _text(source: random.Random, num_words: int) -> str:
    """Sentences, cut off after `num_words`."""
    words: list[str] = []
    while len(words) < num_words:
        sentence = " ".join(source.choice(part) for part in (WHO, DOES, WHAT, THEN))
        words += f"{sentence}.".split()
    return " ".join(words[:num_words])
