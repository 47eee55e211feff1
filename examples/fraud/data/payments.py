"""Synthetic payments with known truth: generated from a seed, nobody's data.

A hidden rule gives each record a probability of fraud, from which its label is sampled, so that even the best
classifier errs. The rule has three parts: numbers (some of which act only together), the kind of merchant, and what
the message is about. Kinds of merchants and messages are known only by their words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from deepseek_triton.examples.fraud.data.phrases import FILLERS, MERCHANTS, MESSAGES, PhraseKind
from deepseek_triton.examples.fraud.records import HOME, PaymentRecord

FAR = ("Nigeria", "Brazil", "Indonesia", "Mexico", "Vietnam")
BASE = -5.3  # log-odds of a payment that nothing speaks for or against


@dataclass(frozen=True)
class LabelledPayment:
    """A record, its label, and the probability that the label was sampled from."""

    record: PaymentRecord
    is_fraud: bool
    probability: float


def make_payments(count: int, seed: int, *, new_words: bool = False) -> list[LabelledPayment]:
    """`count` payments; the same arguments give the same ones. About one in fifteen is fraud.

    new_words: merchants and messages in wordings that no payment without `new_words` has.
    """
    random = np.random.default_rng(seed)
    return [_payment(random, new_words) for _ in range(count)]


def _payment(random: np.random.Generator, new_words: bool) -> LabelledPayment:
    merchant, merchant_text = _phrase(random, MERCHANTS, new_words)
    message, message_text = _phrase(random, MESSAGES, new_words)
    card_country = HOME[int(random.integers(len(HOME)))]
    is_far, is_abroad = random.random() < 0.08, random.random() < 0.15
    country = FAR[int(random.integers(len(FAR)))] if is_far else card_country
    if is_abroad and not is_far:
        country = HOME[int(random.integers(len(HOME)))]
    usual = float(np.clip(40 * random.lognormal(0, 0.5), 5, 400))
    record = PaymentRecord(
        amount=round(max(float(usual * random.lognormal(0.1, 0.8)), 0.5), 2),
        usual_amount=round(usual, 2),
        merchant=merchant_text,
        message=message_text,
        card_country=card_country,
        country=country,
        hour=int(random.integers(24)),
        is_online=bool(random.random() < 0.45),
        is_new_device=bool(random.random() < 0.2),
        card_age_days=int(random.integers(3, 2000)),
        recent_payments=int(random.poisson(0.8) + (random.random() < 0.1) * random.integers(2, 8)),
    )
    probability = 1 / (1 + math.exp(-_log_odds(record, merchant, message)))
    return LabelledPayment(record, bool(random.random() < probability), probability)


def _log_odds(record: PaymentRecord, merchant: PhraseKind, message: PhraseKind) -> float:
    excess = math.log(record.amount / record.usual_amount)
    is_far, is_night = record.country not in HOME, record.hour < 6
    score = BASE + merchant.effect + message.effect
    score += 0.6 * excess + 1.2 * is_far + 0.35 * record.recent_payments + 0.8 * (record.card_age_days < 60)
    # Each of these is harmless by itself: a new device at night; a far country, but in the shop.
    score += 2.2 * (record.is_new_device and is_night) + 0.9 * (record.is_new_device and record.is_online)
    score -= 0.9 * (is_far and not record.is_online)
    return score + 1.0 * (message.effect > 1 and excess > 0.7)


def _phrase(random: np.random.Generator, kinds: dict[str, PhraseKind], new_words: bool) -> tuple[PhraseKind, str]:
    weights = np.array([kind.weight for kind in kinds.values()])
    kind = list(kinds.values())[int(random.choice(len(kinds), p=weights / weights.sum()))]
    wordings = kind.new if new_words else kind.known
    fillers = {name: words[int(random.integers(len(words)))] for name, words in FILLERS.items()}
    text = wordings[int(random.integers(len(wordings)))]
    return kind, text.format(**fillers, number=int(random.integers(1000, 99999)))
