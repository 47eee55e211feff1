"""What a decoder's description raises."""


class SpecError(ValueError):
    """A dimension or an option of a decoder has a value that it can't have; the message is one line."""
