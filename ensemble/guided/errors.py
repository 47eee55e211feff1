"""What guided decoding raises."""

from __future__ import annotations


class GuideError(ValueError):
    """A guide can't be used, or the sequence left it; the message is one line for the client."""
