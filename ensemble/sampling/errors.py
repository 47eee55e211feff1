"""The error of sampling."""

from __future__ import annotations


class SamplingError(ValueError):
    """A sampling parameter is out of range, or the logits can't be sampled; the message is one line."""

    @classmethod
    def not_finite(cls) -> SamplingError:
        """Return the error for logits that hold NaN or infinity."""
        return cls("the model's logits are not finite; check the checkpoint and its precision")

    @classmethod
    def none_allowed(cls) -> SamplingError:
        """Return the error for a step in which no token is allowed."""
        return cls("no token is allowed here: min_tokens, guided decoding and bad_words exclude all; relax one of them")
