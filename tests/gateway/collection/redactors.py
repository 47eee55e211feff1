"""Redactors of the tests, which are called in a process of their own."""

from __future__ import annotations

import os
import time


def misbehave(text: str) -> str | None:
    """Do what the text asks for."""
    if "sleep" in text:
        time.sleep(60)
    if "spin" in text:
        while True:
            pass
    if "die" in text:
        os._exit(3)
    if "raise" in text:
        raise KeyError(text)
    if "number" in text:
        return 7  # type: ignore[return-value]
    if "secret" in text:
        return None
    print("what a redactor prints disturbs nobody")
    return text.upper()
