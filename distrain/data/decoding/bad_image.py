"""The error of bytes that are not an image to train on."""


class BadImageError(ValueError):
    """Bytes that are not an image to train on; the message is the reason."""
