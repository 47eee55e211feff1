"""The redactor that is used unless another is given: e-mail addresses, phone and card numbers, and API keys go.

A redactor is a function `text -> text`, or `text -> None` for a text whose record mustn't be kept at all. This one
finds what has the usual form. It knows no names and no street addresses, and a phone number without a prefix, a
leading zero or separators looks like any number.
"""

from __future__ import annotations

import re
from collections.abc import Callable

EMAIL = re.compile(r"(?<![\w.+%-])[\w.+%-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}")
CARD = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-])")
# What may be a phone number; `_is_phone` decides by its digits.
PHONE = re.compile(r"(?<![\w./+-])(?:\+|\()?\d[\d ().\-/\u00a0\u2011]{5,28}\d(?!\w)")
NORTH_AMERICAN = re.compile(r"(?:1[ .-])?\d{3}[ .-]\d{3}[ .-]\d{4}")
KEYS = (
    re.compile(
        r"-----BEGIN [A-Z ]{0,32}PRIVATE KEY-----(?:[^-]|-(?!----)){0,16384}(?:-----END [A-Z ]{0,32}PRIVATE KEY-----)?"
    ),
    re.compile(r"\beyJ[\w-]{8,4096}\.[\w-]{8,8192}\.[\w-]{8,4096}"),  # a JSON web token
    re.compile(r"\b(?:sk|pk|rk)[-_][\w-]{16,512}"),
    re.compile(r"\b(?:gh[pousr]_|github_pat_|glpat-|hf_|npm_|pypi-)[\w-]{16,512}"),
    re.compile(r"\bxox[abeoprs]-[\w-]{10,512}"),
    re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    re.compile(r"\bAIza[\w-]{30,64}"),
)
# A value that is called a secret: its name stays.
NAMED_KEY = re.compile(
    r"\b(api[_ -]?key|access[_ -]?key|auth[_ -]?token|secret(?:[_ -]?key)?|token|passw(?:or)?d|bearer)\b"
    r"(\"?'?(?:\s{0,3}[:=]\s{0,3}|\s{1,3}is\s{1,3}|\s{1,3})\"?'?)([^\s\"',;]{12,512})",
    re.IGNORECASE,
)


def redact(text: str) -> str | None:
    """The text with `[key]`, `[email]`, `[card]` and `[phone]` where such things stood."""
    for pattern in KEYS:
        text = pattern.sub("[key]", text)
    text = NAMED_KEY.sub(_named_key, text)
    text = EMAIL.sub("[email]", text)
    text = CARD.sub(_if(_is_card, "[card]"), text)
    return PHONE.sub(_if(_is_phone, "[phone]"), text)


def _named_key(match: re.Match[str]) -> str:
    """A word of letters alone is no key: «the token is unfortunately missing»."""
    name, between, value = match.groups()
    return match[0] if value.isalpha() or value == "[key]" else f"{name}{between}[key]"


def _if(is_meant: Callable[[str], bool], instead: str) -> Callable[[re.Match[str]], str]:
    return lambda match: instead if is_meant(match[0]) else match[0]


def _digits(text: str) -> str:
    return "".join(character for character in text if character.isdigit())


def _is_card(text: str) -> bool:
    """Luhn's check, which one number in ten passes by chance."""
    total = 0
    for place, digit in enumerate(map(int, reversed(_digits(text)))):
        total += digit if place % 2 == 0 else sum(divmod(2 * digit, 10))
    return total % 10 == 0


def _is_phone(text: str) -> bool:
    digits = _digits(text)
    if not 7 <= len(digits) <= 15:
        return False
    if text.startswith(("+", "(", "00")):
        return True
    if NORTH_AMERICAN.fullmatch(text):
        return True
    return (
        text.startswith("0") and len(digits) >= 9 and not re.fullmatch(r"0\.\d+|0\d{1,2}[-./]\d{2}[-./]\d{4}.*", text)
    )
