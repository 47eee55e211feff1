"""Synthetic payment records for the fraud example: generated from a seed, no real data.

A hidden rule gives each record a probability, from which its label is sampled, so that even the best classifier errs
now and then. The rule uses amounts, places, times and habits. Two of its conditions act only together, which a linear
model of the fields can't express.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

LABELS = ("legitimate", "fraudulent")
HOME = ("Germany", "France", "Spain", "Italy", "Poland", "Sweden")
FAR = ("Nigeria", "Brazil", "Indonesia", "Mexico", "Vietnam")
# merchant → (typical amount in euros, how much fraud likes it)
MERCHANTS = {
    "a supermarket": (45, -1.0),
    "a bakery": (9, -1.2),
    "a petrol station": (60, -0.4),
    "a restaurant": (55, -0.6),
    "a pharmacy": (25, -0.8),
    "a clothing shop": (80, 0.0),
    "an electronics shop": (320, 0.9),
    "a jeweller": (450, 1.0),
    "a gift card shop": (150, 1.5),
    "a money transfer service": (400, 1.3),
}


@dataclass(frozen=True)
class Payment:
    """amount in euros; hour 0 … 23; card_age in days; recent: payments of this card in the last hour."""

    amount: float
    merchant: str
    card_country: str
    country: str
    hour: int
    is_online: bool
    is_new_device: bool
    card_age: int
    recent: int
    usual_amount: float
    is_fraud: bool

    def text(self) -> str:
        """The record as an analyst would read it."""
        how = "online" if self.is_online else "with the card present"
        device = "a device never seen before" if self.is_new_device else "the customer's usual device"
        return (
            f"{self.amount:.2f} EUR at {self.merchant} in {self.country}, {how}, at {self.hour:02d}:00, from {device}. "
            f"The card was issued in {self.card_country} {self.card_age} days ago; its usual payment is "
            f"{self.usual_amount:.0f} EUR. Payments in the last hour: {self.recent}."
        )

    @property
    def label(self) -> str:
        """One of LABELS."""
        return LABELS[self.is_fraud]

    def fields(self) -> list[float]:
        """Numbers for a model of tables: amounts as logarithms, categories as one column each."""
        return [
            math.log(self.amount),
            math.log(self.usual_amount),
            math.log(1 + self.card_age),
            float(self.recent),
            float(self.is_online),
            float(self.is_new_device),
            float(self.hour < 6),
            *(float(self.merchant == name) for name in MERCHANTS),
            *(float(self.country == name) for name in (*HOME, *FAR)),
            *(float(self.card_country == name) for name in HOME),
        ]


def make_payments(count: int, seed: int) -> list[Payment]:
    """`count` records; the same seed gives the same ones. About one in five is fraudulent."""
    random = np.random.default_rng(seed)
    return [_payment(random) for _ in range(count)]


def _payment(random: np.random.Generator) -> Payment:
    merchant = list(MERCHANTS)[int(random.integers(len(MERCHANTS)))]
    typical, taste = MERCHANTS[merchant]
    card_country = HOME[int(random.integers(len(HOME)))]
    is_far, is_abroad = random.random() < 0.12, random.random() < 0.2
    country = card_country
    if is_far:
        country = FAR[int(random.integers(len(FAR)))]
    elif is_abroad:
        country = HOME[int(random.integers(len(HOME)))]
    amount = round(float(typical * random.lognormal(0, 0.7)), 2)
    usual = float(np.clip(40 * random.lognormal(0, 0.5), 5, 400))
    hour = int(random.integers(24))
    is_online, is_new_device = bool(random.random() < 0.45), bool(random.random() < 0.25)
    card_age = int(random.integers(3, 2000))
    recent = int(random.poisson(0.8) + (random.random() < 0.12) * random.integers(2, 8))
    score = -3.6 + taste + 0.55 * math.log(amount / usual) + 1.4 * is_far + 0.45 * recent + 0.9 * (card_age < 60)
    # Each of these is harmless by itself: a new device at night; far away, but in the shop.
    score += 2.6 * (is_new_device and hour < 6) + 1.2 * (is_new_device and is_online) - 1.0 * (is_far and not is_online)
    is_fraud = bool(random.random() < 1 / (1 + math.exp(-score)))
    return Payment(
        amount, merchant, card_country, country, hour, is_online, is_new_device, card_age, recent, usual, is_fraud
    )
