"""The one exception of bad data."""


class DataError(ValueError):
    """Data that cannot be trained on. The message names the file and line, or the problem's index, and the reason."""
