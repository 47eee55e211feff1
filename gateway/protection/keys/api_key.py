"""ApiKey: what is kept of a key. The key itself is shown once and kept nowhere.

A key has 256 random bits, so nobody can guess it, and a slow hash (argon2, bcrypt) would protect nothing: those exist
for passwords, which have 20 to 40 bits. SHA-256 is enough, and it is fast, so a flood of wrong keys costs little.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import secrets
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

KEY = re.compile(r"sk-([0-9a-f]{16})-([A-Za-z0-9_-]{43})")  # its id, its secret
MAX_DAYS = 36500
LIMITS = ("requests_per_minute", "tokens_per_minute", "max_running")


@dataclass(frozen=True)
class ApiKey:
    """One key. Raises `ValueError` for a field that is wrong.

    id: its public part. name: what it is for. sha256: of the whole key, in hexadecimal digits. created, revoked,
    expires: when, in ISO 8601 and UTC; expires: None: it holds until it is revoked. The limits: None: those of the
    gateway's settings; 0: none. is_collected: False: its answers are never collected.
    """

    id: str
    name: str
    sha256: str
    created: str
    revoked: str | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_running: int | None = None
    is_collected: bool | None = None
    expires: str | None = None

    def __post_init__(self) -> None:
        """Check the fields."""
        for field, pattern in (("id", r"[0-9a-f]{16}"), ("sha256", r"[0-9a-f]{64}")):
            value = getattr(self, field)
            if not (isinstance(value, str) and re.fullmatch(pattern, value)):
                raise ValueError(f"a key's {field} must match {pattern}, got {value!r}")
        if not (isinstance(self.name, str) and self.name.isprintable() and 1 <= len(self.name) <= 128):
            raise ValueError(f"a key's name must have 1 to 128 printable characters, got {self.name!r}")
        for field in LIMITS:
            value = getattr(self, field)
            if value is not None and not (type(value) is int and value >= 0):
                raise ValueError(f"a key's {field} must be a whole number, at least 0, got {value!r}")
        if self.is_collected not in (None, True, False):
            raise ValueError(f"a key's is_collected must be true or false, got {self.is_collected!r}")
        if self.expires is not None and not _is_moment(self.expires):
            raise ValueError(f"a key's expires must be a time in ISO 8601 with its offset, got {self.expires!r}")

    @classmethod
    def make(
        cls, name: str, *, is_collected: bool | None = None, expires: str | None = None, **limits: int | None
    ) -> tuple[ApiKey, str]:
        """A new key: what is kept of it, and the key itself."""
        key_id = secrets.token_hex(8)
        text = f"sk-{key_id}-{secrets.token_urlsafe(32)}"
        form = {"id": key_id, "name": name, "sha256": _sha256(text), "created": now()}
        return cls.from_form({**form, "is_collected": is_collected, "expires": expires, **limits}), text

    @classmethod
    def from_form(cls, form: Any) -> ApiKey:
        """The key that `to_form` has written. Raises `ValueError`."""
        if not isinstance(form, dict):
            raise ValueError(f"a key must be an object, got {form!r}")
        try:
            return cls(**form)
        except TypeError as error:
            raise ValueError(f"a key's fields are wrong: {error}") from None

    def to_form(self) -> dict[str, Any]:
        """Its fields, those that are None left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def expires_at(self) -> float:
        """When it expires, in Unix time; infinity: never."""
        return math.inf if self.expires is None else datetime.fromisoformat(self.expires).timestamp()

    @property
    def is_valid(self) -> bool:
        """Whether it is neither revoked nor expired."""
        return self.revoked is None and time.time() < self.expires_at

    def opens(self, text: str) -> bool:
        """Whether `text` is this key, and it is valid. The time of the comparison tells nothing of the hash."""
        return hmac.compare_digest(self.sha256, _sha256(text)) and self.is_valid


def now() -> str:
    """This moment, in ISO 8601 and UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def after_days(days: float) -> str:
    """The moment so many days from now, in ISO 8601 and UTC. Raises `ValueError`."""
    if not 0 < days <= MAX_DAYS:
        raise ValueError(f"a key expires after more than 0 and at most {MAX_DAYS} days, got {days:g}")
    return (datetime.now(timezone.utc) + timedelta(days=days)).isoformat(timespec="seconds")


def id_of(text: str) -> str | None:
    """The id of the key `text`; None: no key looks so."""
    match = KEY.fullmatch(text)
    return match[1] if match else None


def _is_moment(text: object) -> bool:
    try:
        return isinstance(text, str) and datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
