"""What is wrong with an image."""


class ImageError(ValueError):
    """The bytes are no image that is accepted; the message is one line for the client."""
