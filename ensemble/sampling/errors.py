"""What sampling raises."""

from __future__ import annotations


class SamplingError(ValueError):
    """A sampling parameter is out of range, or the logits can't be sampled; the message is one line."""

    @classmethod
    def not_finite(cls) -> SamplingError:
        """The error for logits that hold NaN or infinity."""
        return cls("the model's logits are not finite; the checkpoint or its precision is at fault")

    @classmethod
    def none_allowed(cls) -> SamplingError:
        """The error for a step that rules every token out."""
        return cls("no token is allowed here: min_tokens, guided decoding and bad_words leave none; relax one of them")
