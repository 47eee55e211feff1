"""The error of guided decoding."""

from __future__ import annotations


class GuideError(ValueError):
    """A guide can't be used, or a token violates it; the message is one line for the client."""
