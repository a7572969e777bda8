"""What can be wrong with a checkpoint."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read; the message names the file and what is wrong with it."""


class UnsupportedArchitectureError(CheckpointError):
    """The architecture has no native implementation; the message lists those that have one."""
