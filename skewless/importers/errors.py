"""What importing raises."""

from skewless.training.checkpoint import CheckpointError


class ImportFileError(CheckpointError):
    """A file that cannot be imported; the message says what is wrong with it and what to do."""
