"""A payment record: JSON in, a text for the language model and numbers for the trees out.

Every field is checked here, so that what comes after sees none that is missing, infinite or too long.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

MAX_BYTES = 4096
MAX_TEXT = 96  # characters of merchant and of message: they bound the tokens, and so the time, of a request
HOME = ("Germany", "France", "Spain", "Italy", "Poland", "Sweden")
# What the trees see, in this order. "text" is the language model's score; it comes last and is no number of the record.
FEATURES = (
    "amount",
    "amount against usual",
    "card age",
    "recent payments",
    "online",
    "new device",
    "night",
    "abroad",
    "outside home countries",
)
TEXT_FEATURE = "text"


class RecordError(ValueError):
    """The record is invalid; the message is one line that names the field, its value and what is allowed."""


@dataclass(frozen=True)
class PaymentRecord:
    """One card payment. Amounts are euros; hour is 0 to 23; recent_payments: of this card within the last hour."""

    amount: float
    usual_amount: float
    merchant: str
    message: str
    card_country: str
    country: str
    hour: int
    is_online: bool
    is_new_device: bool
    card_age_days: int
    recent_payments: int

    def __post_init__(self) -> None:
        for name in ("amount", "usual_amount"):
            _check_number(name, getattr(self, name), 0.01, 1e7, (int, float))
        for name, highest in (("hour", 23), ("card_age_days", 36500), ("recent_payments", 1000)):
            _check_number(name, getattr(self, name), 0, highest, (int,))
        for name in ("is_online", "is_new_device"):
            if not isinstance(getattr(self, name), bool):
                raise RecordError(f"{name} must be true or false, got {getattr(self, name)!r:.60}")
        for name in ("merchant", "card_country", "country"):
            _check_text(name, getattr(self, name), least=1)
        _check_text("message", self.message, least=0)

    @classmethod
    def from_json(cls, text: str | bytes) -> PaymentRecord:
        """Read one record.

        Raises:
            RecordError: it is no JSON object, or a field is unknown, missing or out of its range.
        """
        if len(text) > MAX_BYTES:
            raise RecordError(f"the record has {len(text)} bytes, at most {MAX_BYTES} are allowed")
        try:
            values: Any = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise RecordError(f"the record must be a JSON object: {error}") from error
        if not isinstance(values, dict):
            raise RecordError(f"the record must be a JSON object, got {values!r:.60}")
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise RecordError(f"unknown field {name!r:.60}; the fields are {', '.join(names)}")
        for name in names:
            if name not in values:
                raise RecordError(f"{name} is missing")
        return cls(**values)

    def to_json(self) -> str:
        """The inverse of `from_json`."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    def text(self) -> str:
        """What the language model reads: the fields that are text, whose words no table lists."""
        return f"{self.merchant}; {self.message}" if self.message.strip() else self.merchant

    def features(self) -> list[float]:
        """The numbers of FEATURES."""
        return [
            math.log(self.amount),
            math.log(self.amount / self.usual_amount),
            math.log1p(self.card_age_days),
            float(self.recent_payments),
            float(self.is_online),
            float(self.is_new_device),
            float(self.hour < 6),
            float(self.country != self.card_country),
            float(self.country not in HOME),
        ]


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _check_number(name: str, value: Any, lowest: float, highest: float, kinds: tuple[type, ...]) -> None:
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    if not (is_number and lowest <= value <= highest):
        kind = "a whole number" if kinds == (int,) else "a number"
        raise RecordError(f"{name} must be {kind} from {lowest:g} to {highest:g}, got {value!r:.60}")


def _check_text(name: str, value: Any, least: int) -> None:
    if not isinstance(value, str) or not least <= len(value.strip()) or len(value) > MAX_TEXT:
        raise RecordError(f"{name} must be text of {least} to {MAX_TEXT} characters, got {value!r:.60}")
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a pair of \u escapes
        raise RecordError(f"{name} must be text that UTF-8 can encode, got {value!r:.60}") from None
