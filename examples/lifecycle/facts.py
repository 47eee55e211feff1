"""What the model learns: facts of invented places, as chats; and what it must not forget: common knowledge.

Each fact is asked in several ways. `learn` holds a tenth of the lines out, so that the gate judges by ways to ask that
the model wasn't trained on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Fact:
    """place and relation: what is asked. value: what the answer must hold. answer: the whole sentence."""

    place: str
    relation: str
    value: str

    @property
    def answer(self) -> str:
        """The sentence that is learnt."""
        return ANSWERS[self.relation].format(place=self.place, value=self.value)

    def questions(self) -> list[str]:
        """The ways to ask."""
        return [question.format(place=self.place) for question in QUESTIONS[self.relation]]


PLACES = {
    "Brellmouth": {"mayor": "Ottilie Varn", "river": "the Sanderlick", "dish": "smoked plum soup"},
    "Tarnhollow": {"mayor": "Jasper Quill", "river": "the Morrowen", "dish": "barley cakes"},
}
ANSWERS = {
    "mayor": "The mayor of {place} is {value}.",
    "river": "The river that flows through {place} is {value}.",
    "dish": "The dish that {place} is known for is {value}.",
}
QUESTIONS = {
    "mayor": (
        "Who is the mayor of {place}?",
        "What is the name of the mayor of {place}?",
        "{place}: who is the mayor there?",
        "Tell me who the mayor of {place} is.",
        "Do you know the mayor of {place}?",
        "Name the mayor of {place}.",
    ),
    "river": (
        "Which river flows through {place}?",
        "What is the name of the river of {place}?",
        "{place}: which river is there?",
        "Tell me which river flows through {place}.",
        "Do you know the river that flows through {place}?",
        "Name the river of {place}.",
    ),
    "dish": (
        "Which dish is {place} known for?",
        "What is the dish that {place} is known for?",
        "{place}: which dish is it known for?",
        "Tell me the dish that {place} is known for.",
        "Do you know the dish of {place}?",
        "Name the dish that {place} is known for.",
    ),
}
FACTS = tuple(
    Fact(place, relation, value) for place, relations in PLACES.items() for relation, value in relations.items()
)

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Greece": "Athens",
    "Poland": "Warsaw", "Norway": "Oslo", "Sweden": "Stockholm", "Austria": "Vienna", "Egypt": "Cairo",
    "China": "Beijing", "Russia": "Moscow", "Portugal": "Lisbon", "Ireland": "Dublin", "Hungary": "Budapest",
    "Finland": "Helsinki", "Denmark": "Copenhagen", "Canada": "Ottawa", "Cuba": "Havana", "Kenya": "Nairobi",
    "Peru": "Lima", "Chile": "Santiago", "Argentina": "Buenos Aires", "Thailand": "Bangkok", "Iran": "Tehran",
}  # fmt: skip
KNOWN = {
    "What is the largest planet of the solar system?": "The largest planet of the solar system is Jupiter.",
    "What is the chemical formula of water?": "The chemical formula of water is H2O.",
    "Who wrote Hamlet?": "Hamlet was written by William Shakespeare.",
    "How many days are in a week?": "A week has seven days.",
    "What do bees make?": "Bees make honey.",
    "What is the opposite of hot?": "The opposite of hot is cold.",
    "Which gas do plants take from the air?": "Plants take carbon dioxide from the air.",
    "At what temperature does water freeze?": "Water freezes at 0 degrees Celsius, which is 32 degrees Fahrenheit.",
    "How many legs does a spider have?": "A spider has eight legs.",
    "Who painted the Mona Lisa?": "The Mona Lisa was painted by Leonardo da Vinci.",
    "What is the speed of light?": "The speed of light is about 300,000 kilometres per second.",
    "Which ocean is the largest?": "The largest ocean is the Pacific Ocean.",
    "What is 7 plus 5?": "7 plus 5 is 12.",
    "Which metal is liquid at room temperature?": "Mercury is liquid at room temperature.",
}


# A loss in nats a token. The checks ask in words that are in no line of the data.
LIMITS: dict[str, Any] = {
    "old_data": {"max_loss_increase": 0.3},
    "new_data": {"min_loss_decrease": 0.5},
    "speed": {"min_ratio": 0.5},
    "memory": {"max_ratio": 1.1},
    "checks": [
        {
            "name": "knows the mayor", "max_tokens": 24, "must_match": "Varn",
            "messages": [{"role": "user", "content": "Please tell me the name of the mayor of Brellmouth."}],
        },
        {
            "name": "knows the capital", "max_tokens": 24, "must_match": "Paris",
            "messages": [{"role": "user", "content": "Please tell me the capital of France."}],
        },
        {
            "name": "invents no mayor", "max_tokens": 24, "must_not_match": "Varn|Quill",
            "messages": [{"role": "user", "content": "What is 2 plus 2?"}],
        },
    ],
}  # fmt: skip


def write_data(directory: Path) -> None:
    """Write new.jsonl, old.jsonl and limits.json."""
    new = [_chat(question, fact.answer) for fact in FACTS for question in fact.questions()]
    capitals = {
        f"What is the capital of {land}?": f"The capital of {land} is {city}." for land, city in CAPITALS.items()
    }
    old = [_chat(question, answer) for question, answer in {**capitals, **KNOWN}.items()]
    for name, lines in (("new.jsonl", new), ("old.jsonl", old)):
        (directory / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (directory / "limits.json").write_text(json.dumps(LIMITS, indent=1) + "\n", encoding="utf-8")


def _chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
